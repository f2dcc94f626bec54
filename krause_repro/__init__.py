"""Krause attention, reproduced: the library that the notebooks in `nbs/` export, one module a notebook.

In reading order:

- the idea: `dynamics`, `checks`, `reference` (scores, neighbourhoods, top-k: the definition), `fast_attention`, `native_kernels`,
  `triton_kernels`, `attention` (`krause_attention`, `KrauseAttention`), `ring_cache`, `transformers_attention`, `native_decode`
- the models: `model_base`, `vision_transformer`, `swin`, `image_transformer`, `baselines`, `llm_branch`, `branched_models`,
  `language_models`, `attention_patterns`, `language_model`
- the tools: `records` (files), `results`, `recipe_base`, `image_recipes`, `generation_recipes`, `language_recipes`, `recipes`,
  `image_files`, `image_data`, `packaged_data`, `language_data`, `sampling`, `likelihood`, `corpus`, `tasks`, `runs`, `training`,
  `flops`, `timing`, `checkpoints`
- the measures: `statistics`, `frechet`, `evaluation`, `ablation`, `generation_evaluation`, `fine_tuning_evaluation`, `language_tasks`,
  `language_benchmarks`, `attention_analysis`, `sinks`
- the benchmarks: `bench_attention`, `bench_models`, `bench_generation`, `bench_language`, `benchmarks`
- figures and the book: `drawing`, `figures`, `result_figures`, `runner`, `website`, `claims`, `report`, `cli`
"""
__version__ = "0.2.0"
__all__ = ["CausalWindow", "Full", "GridWindow", "KrauseAttention", "krause_attention"]

_MODULES = {  # where the names above are, imported at their first use: PyTorch takes seconds
    "CausalWindow": "reference", "Full": "reference", "GridWindow": "reference",
    "KrauseAttention": "attention", "krause_attention": "attention",
}


def __getattr__(name):
    "Import a name of `__all__` from its module."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__():
    return sorted([*globals(), *__all__])
