"""Krause attention, reproduced: the library that the notebooks in `nbs/` export, one module a notebook.

In reading order:

- the idea: `dynamics`, `checks`, `reference` (scores, neighbourhoods, top-k: the definition), `fast_attention`, `native_kernels`,
  `triton_kernels`, `attention` (`krause_attention`, `KrauseAttention`), `ring_cache`, `transformers_attention`, `native_decode`
- the models: `model_base`, `vision_transformer`, `swin`, `image_transformer`, `baselines`, `llm_branch`, `branched_models`,
  `adapters`, `attention_patterns`, `language_model`
- the tools: `records` (files), `results`, `recipe_base`, `image_recipes`, `generation_recipes`, `language_recipes`, `recipes`,
  `image_files`, `image_data`, `packaged_data`, `language_data`, `sampling`, `likelihood`, `corpus`, `tasks`, `runs`, `training`,
  `flops`, `timing`, `author_checkpoints`
- the measures: `statistics`, `evaluation`, `plans`, `generation_evaluation`, `fine_tuning_evaluation`,
  `language_model_evaluation`, `language_tasks`, `language_benchmarks`, `attention_analysis`, `sinks`
- the benchmarks: `bench_attention`, `bench_models`, `bench_generation`, `bench_language`, `benchmarks`
- figures and the book: `drawing`, `figures`, `result_figures`, `runner`, `website`, `claims`, `report`, `cli`
"""
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

__version__ = "0.2.0"
__all__ = ["CausalWindow", "Full", "GridWindow", "KrauseAttention", "create_model", "krause_attention", "list_models"]

_MODULES = {  # where the names above are, imported at their first use: PyTorch takes seconds
    "CausalWindow": "reference", "Full": "reference", "GridWindow": "reference",
    "KrauseAttention": "attention", "krause_attention": "attention", "create_model": "recipes", "list_models": "recipes",
}
_MODELS = {  # model types and the modules that register them with the auto classes of 🤗 Transformers
    "krause_vision_transformer": "vision_transformer", "krause_swin": "swin", "krause_pixel_classifier": "baselines",
    "krause_image_transformer": "image_transformer", "krause_language_model": "language_model",
    "krause_repro_branch": "branched_models",
}


def __getattr__(name):
    "Import a name of `__all__` from its module."
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__():
    return sorted([*globals(), *__all__])


class _LateConfigs(dict):
    "Configurations by model type; those of this package are imported when they are asked for."

    def __contains__(self, model_type):
        return super().__contains__(model_type) or model_type in _MODELS

    def __missing__(self, model_type):
        import_module(f"{__name__}.{_MODELS[model_type]}")
        if not super().__contains__(model_type):
            raise KeyError(model_type)
        return super().__getitem__(model_type)


def _register(auto):
    "Make the models known to the module of 🤗 Transformers that holds `AutoConfig`."
    auto.CONFIG_MAPPING._extra_content = _LateConfigs(auto.CONFIG_MAPPING._extra_content)


class _Registration(MetaPathFinder):
    "Registers the models as soon as 🤗 Transformers is imported, which takes seconds and is not needed for everything here."

    module = "transformers.models.auto.configuration_auto"

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


if _Registration.module in sys.modules:
    _register(sys.modules[_Registration.module])
else:
    sys.meta_path.insert(0, _Registration())
