"""Timing itself is no test; how times become ratios is, that the contenders compute what they say, and what memory is counted."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from hypothesis import example, given
from hypothesis import strategies as st

from krause_repro import bench_attention as attention_benchmarks
from krause_repro import bench_models, timing
from krause_repro.bench_attention import (
    BASELINE,
    DENSE_LENGTH,
    KINDS,
    SELECTORS,
    attention_calls,
    attention_contenders,
    bench_attention,
    bench_grids,
    bench_scaling,
    bench_selection,
    compiled_selector,
    kth_largest,
    peak_memory,
    relative_values,
    scaling_series,
)
from krause_repro.bench_generation import bench_generation, generation_seconds
from krause_repro.bench_language import (
    bench_language,
    bench_text,
    benchmark_language_model,
    branch_memory,
    deployed_models,
    language_speed_table,
    lora_step,
    prefill_and_decode,
    resident_growth,
    text_decoder,
    text_model,
    text_speed_series,
    text_speed_table,
)
from krause_repro.bench_models import (
    bench_images,
    bench_training,
    forward_pass,
    training_speed_table,
    training_speeds,
    training_step,
)
from krause_repro.benchmarks import BENCHMARKS, bench_cost, format_rows, report_benchmark
from krause_repro.checks import UserError
from krause_repro.drawing import COLOURS
from krause_repro.flops import language_mac_table
from krause_repro.llm_branch import branches
from krause_repro.native_decode import DecodeLinear
from krause_repro.recipes import (
    CIFAR_CASE,
    COST,
    GENERATION_SPEED,
    LANGUAGE_GOALS,
    LANGUAGE_SPEED,
    PASSES,
    TEXT_SPEED,
    AttentionCase,
    GenerationCase,
    ImageCase,
    LanguageCase,
    get_recipe,
)
from krause_repro.records import read_json
from krause_repro.reference import CausalWindow, GridWindow, reference_attention
from krause_repro.results import stale_recipes
from krause_repro.timing import (
    LONG_ROUNDS,
    ROUNDS,
    compare,
    compare_in_pairs,
    fitted_exponent,
    interleave,
    interleave_within_budget,
    peak_memory_increase,
    summarise_times,
)
from krause_repro.training import build_trainer

SMOKE = COST.at("smoke")
TINY = AttentionCase("tiny", 2, 3, 40, 8, 7, 4)
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be measured on Linux only")


def test_every_contender_runs_once_a_round_and_the_order_rotates():
    calls = []
    seconds = interleave({name: lambda n=name: calls.append(n) for name in "abc"}, rounds=3, warmup=1)
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]


def test_ratios_are_taken_within_a_round():
    rows = compare({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 2.0]}, "fast")
    assert rows[0]["ratio"] == pytest.approx(2.0) and rows[0]["ratio_quartiles"] == pytest.approx([2.0, 2.5])
    assert rows[0]["seconds"] == pytest.approx(4.0) and rows[1]["ratio"] == 1.0


def test_times_are_summarised_by_median_and_quartiles():
    assert summarise_times([5.0, 1.0, 2.0, 3.0, 4.0]) == {"seconds": 3.0, "seconds_quartiles": [2.0, 4.0], "rounds": 5}
    assert summarise_times([2.0]) == {"seconds": 2.0, "seconds_quartiles": [2.0, 2.0], "rounds": 1}


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"), [(5.0, 9.0, LONG_ROUNDS), (1.0, 9.0, ROUNDS[0]), (0.1, 2.0, 10), (1e-6, 9.0, ROUNDS[1])]
)
def test_slow_contenders_get_fewer_rounds(monkeypatch, seconds, budget, rounds):
    monkeypatch.setattr(timing, "interleave", lambda names, rounds, warmup: {name: [seconds] * (rounds + warmup) for name in names})
    found = interleave_within_budget({"a": None, "b": None}, budget)
    assert {name: len(times) for name, times in found.items()} == {"a": rounds, "b": rounds}


def test_every_contender_takes_turns_with_the_baseline_alone(monkeypatch):
    times = {"base": [1.0, 2.0], "a": [3.0, 2.0], "b": [0.5, 1.0]}
    asked = []
    monkeypatch.setattr(timing, "interleave_within_budget", lambda pair, budget: (
        asked.append((*pair, budget)) or {name: times[name] for name in pair}))
    rows = compare_in_pairs({"a": None, "base": None, "b": None}, "base", 7.0)
    assert asked == [("base", "a", 7.0), ("base", "b", 7.0)]
    assert [(row["name"], row["ratio"], row["rounds"]) for row in rows] == [("base", 1.0, 4), ("a", 2.0, 2), ("b", 0.5, 2)]
    assert [row["name"] for row in compare_in_pairs({"base": None}, "base")] == ["base"]


def test_profiles_of_the_cost_recipe():
    assert COST.at("desk").to_dict() | {"profile": "paper"} == COST.to_dict()
    saved = {"recipes": json.loads(json.dumps({"cost": SMOKE.to_dict()}))}
    assert stale_recipes(saved, [SMOKE]) == [] and stale_recipes(saved, [replace(SMOKE, lengths=(64,))]) == ["cost"]
    assert max(SMOKE.lengths) <= 512 and not SMOKE.compiled
    for recipe in (COST, SMOKE):
        assert list(recipe.lengths) == sorted(recipe.lengths) and list(recipe.windows) == sorted(recipe.windows)
        assert sum(length >= recipe.fit_from for length in recipe.lengths) > 1
        assert recipe.selection.top_k and recipe.scaling.top_k
        assert all(case.top_k is None or case.top_k < case.window < case.length for case in recipe.cases)
        for case in recipe.images:
            krause, softmax = case.recipes()["KViT"], case.recipes()["ViT"]
            assert (krause.score, softmax.score) == ("krause", "softmax") and krause.drop_path == softmax.drop_path
            assert all(getattr(krause, f) == getattr(softmax, f) for f in ("width", "depth", "heads", "image_size", "patch_size"))


def test_tensors_have_the_layout_of_projections():
    *tensors, sigma = TINY.tensors()
    assert {x.shape for x in tensors} == {(2, 3, 40, 8)} and all(x.transpose(1, 2).is_contiguous() for x in tensors)
    assert sigma.tolist() == [2.5] * 3 and all(torch.equal(a, b) for a, b in zip(tensors, TINY.tensors(), strict=False))
    assert len({x.sum().item() for x in tensors}) == 4


def oracle(name, case, leaves):
    "What a contender says it computes, by the reference in float64."
    full = name == BASELINE
    soft = full or "softmax" in name or name == "fused, window mask"
    top_k = None if full or name in ("fused, window mask", "sdpa") else case.top_k
    window = CausalWindow(case.length if full else case.window)
    return reference_attention(*leaves[:3], window, top_k, score="softmax" if soft else "krause", sigma=leaves[3])


@pytest.mark.parametrize("top_k", [4, None])
def test_contenders_compute_what_they_say_forward_and_backward(top_k):
    case = replace(TINY, top_k=top_k)
    *tensors, gradient, sigma = case.tensors()
    leaves = [x.double().requires_grad_() for x in (*tensors, sigma)]
    assert ("sdpa" in attention_contenders(case)) == (top_k is None)
    forward, both = (attention_calls(case, step) for step in PASSES)
    assert set(forward) == set(both) == set(attention_contenders(case)) and set(both) <= set(KINDS)
    for name in both:
        output = oracle(name, case, leaves)
        exact = [output, *torch.autograd.grad(output, leaves, gradient.double(), allow_unused=True)]
        exact = [x for x in exact if x is not None]
        found = both[name]()
        assert len(found) == len(exact) == (4 if exact[-1].shape != sigma.shape else 5)
        for fast, reference in zip(found, exact, strict=True):
            torch.testing.assert_close(fast.double(), reference, rtol=1e-4, atol=1e-4, msg=name)
        (only,) = forward[name]()
        assert not only.requires_grad and torch.allclose(only, found[0], atol=1e-6)


def test_long_sequences_have_no_dense_reference():
    assert "dense reference" in attention_contenders(replace(TINY, length=DENSE_LENGTH))
    assert "dense reference" not in attention_contenders(replace(TINY, length=DENSE_LENGTH + 1))


def test_no_dense_mask_is_made_for_those_that_need_none(monkeypatch):
    monkeypatch.setattr(CausalWindow, "mask", lambda *arguments: pytest.fail("a T×T mask was made"))
    names = (BASELINE, "banded, PyTorch", "dense reference")
    calls = attention_calls(replace(TINY, batch=1, length=DENSE_LENGTH + 1), "forward", names)
    assert list(calls) == list(names[:2]) and all(call()[0].shape[2] == DENSE_LENGTH + 1 for call in calls.values())


def test_without_kernels_there_is_no_operator_to_time(monkeypatch):
    monkeypatch.setattr(attention_benchmarks, "kernels_available", lambda: False)
    assert not [name for name in attention_contenders(TINY) if "C++" in name]
    result = bench_selection(SMOKE)
    assert attention_benchmarks.OPERATOR_SHARE in result["missing"] and len(result["rows"]) == len(SELECTORS)
    assert {row["name"] for row in bench_scaling(SMOKE)["rows"]} == {BASELINE, "banded, PyTorch", "dense reference"}


def test_roles_have_colours():
    assert set(KINDS.values()) <= set(COLOURS)


LEAVES_OUT = """
import torch
from krause_repro.timing import peak_memory_increase

def call():
    working = torch.ones(16_000_000)  # 64 MB, of which half is returned
    return [working[:8_000_000].clone(), working[:1].clone()]

torch.ones(10).clone()
found = peak_memory_increase(call)
"""


@on_linux
def test_peak_memory_leaves_out_what_is_returned():
    "In a new process, as `peak_memory_increase` demands: this one holds memory that earlier tests have freed."
    assert run_fresh(LEAVES_OUT) == pytest.approx(64_000_000, abs=3_000_000)


@on_linux
def test_a_view_counts_as_all_that_it_keeps():
    assert peak_memory_increase(lambda: [torch.ones(16_000_000)[:10], torch.ones(10)]) < 3_000_000


@on_linux
def test_peak_memory_in_a_fresh_process(monkeypatch):
    case = AttentionCase("one dense matrix is 4 MiB", 1, 1, 1024, 8, 32, 24)
    dense, band = peak_memory([("dense reference", case), ("banded, PyTorch", case)])
    assert dense > 3 * 2**22 > band
    monkeypatch.setattr(attention_benchmarks, "_FRESH", "raise KeyError('no such contender')")
    with pytest.raises(RuntimeError, match="peak memory could not be measured: .*no such contender"):
        peak_memory([("no such contender", case)])


def test_peak_memory_is_unknown_elsewhere(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(Path, "write_text", lambda self, text: (_ for _ in ()).throw(FileNotFoundError(self)))
    assert peak_memory_increase(lambda: [torch.ones(3)]) is None and peak_memory([("sdpa", TINY)]) == [None] and peak_memory([]) == []


NUMBERS = st.floats(width=32, allow_nan=False)


@given(st.lists(st.lists(NUMBERS, min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
@example([[0.0, -0.0, 0.0, -1e-45, 1e-45]], 3)
@example([[float("inf"), float("-inf"), 3.0, 3.0, 3.0], [-3.4e38, 3.4e38, 0.0, 1.0, 1.0]], 2)
def test_selectors_find_the_kth_largest(rows, k):
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = torch.tensor([sorted(row, reverse=True)[k - 1] for row in rows], dtype=torch.float32)
    for name, selector in SELECTORS.items():
        assert torch.equal(selector(scores, k), expected), name


def test_bisection_equals_topk_on_many_rows():
    scores = torch.randn(500, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 500).unsqueeze(1)
    assert torch.equal(kth_largest(scores, 192), scores.topk(192).values[:, -1])


def test_a_missing_compiler_is_reported(monkeypatch):
    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("no compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert compiled_selector(torch.zeros(1, 2), 1) == (None, "RuntimeError: no compiler found")
    result = bench_selection(replace(SMOKE, compiled=True))
    assert result["missing"]["bisection, compiled"] == "RuntimeError: no compiler found"


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_exponents_of_power_laws_are_found(power, scale):
    sizes = [1, 2, 4, 8, 16]
    costs = [1e3, *(scale * x**power for x in sizes[1:])]
    exponent, points = fitted_exponent(sizes, costs, least=2)
    assert exponent == pytest.approx(power, abs=1e-9) and points == 4
    assert fitted_exponent(sizes, costs, least=16) == (None, 1) and fitted_exponent(sizes, costs, least=17) == (None, 0)


def test_series_keep_to_one_sweep_and_pass_and_leave_out_what_is_missing():
    shared = {"name": BASELINE, "sweep": "length", "pass": "forward"}
    rows = [shared | {"length": 1, "seconds": 2.0, "peak_bytes": 3e6}, shared | {"length": 2, "seconds": 4.0, "peak_bytes": None},
            shared | {"sweep": "window", "length": 9, "window": 3, "seconds": 9.0},
            shared | {"pass": PASSES[1], "length": 9, "seconds": 9.0}]
    assert scaling_series(rows, "length", "forward") == [
        {"label": BASELINE, "kind": "softmax", "x": [1, 2], "y": [2.0, 4.0], "exponent": pytest.approx(1.0), "points": 2}]
    (memory,) = scaling_series(rows, "length", "forward", "peak_bytes", 1e6)
    assert (memory["x"], memory["y"], memory["exponent"]) == ([1], [3.0], None)
    assert scaling_series(rows, "window", PASSES[1]) == []


def test_values_are_relative_within_a_case_and_pass():
    def row(name, case, seconds, peak=None):
        return {"case": case, "pass": "forward", "name": name, "seconds": seconds, "peak_bytes": peak}

    rows = [row("a", "x", 3.0, 8), row("banded, C++", "x", 2.0, 4), row("a", "y", 1.0), row("banded, C++", "y", 4.0)]
    assert relative_values(rows, "a") == [1.5, 0.25] and relative_values(rows, "a", "peak_bytes") == [2.0]


def test_a_contender_drops_out_of_longer_sequences_when_it_would_take_too_long(monkeypatch):
    speed = {BASELINE: lambda case: case.length**2, "dense reference": lambda case: 9 * case.length**2}
    monkeypatch.setattr(attention_benchmarks, "attention_calls", lambda case, step, names: {name: (name, case) for name in names})
    monkeypatch.setattr(attention_benchmarks, "interleave_within_budget", lambda calls, budget: {
        name: [float(speed.get(name, lambda case: case.length)(case))] for name, case in calls.values()})
    rows = bench_scaling(replace(COST, lengths=(1, 2, 4, 8), windows=(4, 8), window_length=1, limit=70.0))["rows"]
    reached = {name: [row["length"] for row in rows if (row["name"], row["sweep"], row["pass"]) == (name, "length", "forward")]
               for name in dict.fromkeys(row["name"] for row in rows)}
    assert [*reached.values()] == [[1, 2, 4, 8], [1, 2, 4, 8], [1, 2]]
    assert {(row["window"], row["top_k"]) for row in rows if row["sweep"] == "window"} == {(4, 3), (8, 6)}
    assert len(bench_scaling(replace(COST, lengths=(8, 16), windows=(4,), limit=0.0))["rows"]) == 2 * (3 + 2)


def test_a_training_step_trains():
    recipe = get_recipe("kvit_t/fashion_mnist").at("smoke")
    step = training_step(recipe, 2)
    trained = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, list))
    before = [p.detach().clone() for p in trained]
    step()
    assert not all(map(torch.equal, before, trained)) and all(p.grad is None for p in trained)


def test_a_forward_pass_predicts():
    forward = forward_pass(get_recipe("kvit_t/fashion_mnist").at("smoke"), 2)
    model = next(c.cell_contents for c in forward.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.logits.requires_grad)))
    forward()
    assert seen == [(False, False)]


def test_image_rows_give_images_per_second():
    case = ImageCase("tiny", "kvit_t/fashion_mnist", "vit_t/fashion_mnist", "smoke", 3)
    rows = bench_images(replace(SMOKE, images=(case,)), passes=("forward",))["rows"]
    assert [(row["name"], row["pass"], row["images"]) for row in rows] == [("ViT", "forward", 3), ("KViT", "forward", 3)]
    assert all(row["images_per_second"] == pytest.approx(3 / row["seconds"]) for row in rows)


def test_every_classifier_has_its_images_per_second():
    recipes = {name: replace(get_recipe(name).at("smoke"), batch_size=size) for name, size in
               (("kvit_t/fashion_mnist", 3), ("softmax_regression/fashion_mnist", 2))}
    speeds = training_speeds(recipes, budget=0.1)
    assert [row["images_per_second"] * row["seconds"] for row in speeds["rows"]] == pytest.approx([3, 2])
    lines = training_speed_table(speeds, dict(zip(recipes, ("KViT", "linear"), strict=True))).splitlines()
    assert lines[2].startswith("| KViT | ") and lines[2].endswith("| 1.00 | 1.00 |") and lines[3].startswith("| linear | ")


def test_the_training_that_is_timed_is_real_training(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_models, "build_trainer", lambda *a, **k: seen.append(build_trainer(*a, **k)) or seen[-1])
    found = bench_training(get_recipe("kvit_t/fashion_mnist").at("smoke"), steps=3, warmup=2)
    assert seen[0].state.global_step == 5 and found["steps"] == 3 and len(seen[0].data_collator.seconds) >= 5
    step, collator = (row["seconds"] for row in found["rows"])
    assert 0 < collator < step and found["busy"] > 0


def test_profiles_of_the_language_recipe():
    smoke = LANGUAGE_SPEED.at("smoke")
    assert LANGUAGE_SPEED.at("desk").to_dict() | {"profile": "paper"} == LANGUAGE_SPEED.to_dict() and LANGUAGE_SPEED.base == "smollm2"
    assert {(case.batch, case.context) for case in LANGUAGE_SPEED.cases} == {(b, n) for b in (1, 8) for n in (128, 512, 2048)}
    assert (LANGUAGE_SPEED.step.batch, LANGUAGE_SPEED.step.context) == (4, 256) and smoke.base == "random"
    saved = {"recipes": json.loads(json.dumps({"language_speed": smoke.to_dict()}))}
    assert stale_recipes(saved, [smoke]) == [] and stale_recipes(saved, [replace(smoke, tokens=4)]) == ["language_speed"]


def test_deployed_models_differ_in_the_branch_alone():
    models = deployed_models(benchmark_language_model("random"))
    assert [len(branches(model)) for model in models.values()] == [0, 0, 2, 2] and not any(model.training for model in models.values())
    assert not [name for model in models.values() for name, _ in model.named_parameters() if "lora" in name or "modules_to_save" in name]
    ids = torch.randint(61, (1, 9))
    base, merged, krause, plain = (model(ids).logits for model in models.values())
    assert torch.equal(base, merged) and not torch.allclose(base, krause)
    torch.testing.assert_close(krause, plain)
    layers = [{type(module) for module in models[name].modules()} for name in ("Krause", "Krause, plain layers")]
    assert DecodeLinear in layers[0] and DecodeLinear not in layers[1]


@pytest.mark.parametrize("name", ["base", "Krause"])
def test_what_is_timed_writes_what_generate_writes(name):
    model = deployed_models(benchmark_language_model("random"))[name]
    ids, written = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0)), []
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, min_new_tokens=6)
    read, write = prefill_and_decode(model, ids, 6)
    model.register_forward_hook(lambda module, args, output: written.append(output.logits[:, -1].argmax(-1)))
    for _ in range(2):  # a second reading begins anew
        written.clear()
        read()
        for _ in range(5):
            write()
        assert torch.equal(torch.stack(written, 1), whole[:, 40:])


def test_a_lora_step_trains_lora_gate_and_sigma():
    model = deployed_models(benchmark_language_model("random"))["Krause"]
    step = lora_step(model, LANGUAGE_SPEED.at("smoke"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert all(any(part in name for name in moved) for part in ("lora_B", "token_gate", "log_sigma"))
    assert all("lora" in name or "modules_to_save" in name for name in moved) and all(p.grad is None for p in model.parameters())


def test_speeds_of_language_models_are_tokens_over_seconds():
    result = json.loads(json.dumps(bench_language(LANGUAGE_SPEED.at("smoke")), allow_nan=False))
    assert list(result) == ["benchmark", "rows", "notes", "memory", "macs", "goals"] and result["goals"] == LANGUAGE_GOALS
    assert [(row["pass"], row["name"]) for row in result["rows"]] == [
        (step, name) for step in ("prefill", "decode") * 2 for name in ("base", "LoRA merged", "Krause", "Krause, plain layers")] + [
        ("training step", "LoRA"), ("training step", "LoRA + Krause")]
    for row in result["rows"]:
        tokens = row["batch"] * (1 if row["pass"] == "decode" else row["context"])
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert row["speed_ratio"] == pytest.approx(1 / row["ratio"]) and row["speed_ratio"] == 1 or row["name"] not in ("base", "LoRA")
    assert len(result["notes"]) == 9 + 1 and [each["context"] for each in result["macs"]] == [8, 40]
    lines = language_speed_table(result).splitlines()
    assert len(lines) == 2 + 18 + 2 and lines[2].startswith("| prefill, batch 1, 40 tokens | base | ")
    assert [line.count("≥") for line in lines[2:6]] == [0, 0, 1, 1] and len(language_mac_table(result).splitlines()) == 2 + 6 + 5 + 2


@on_linux
def test_resident_growth_is_that_of_what_is_kept():
    grown = resident_growth(lambda: torch.ones(16_000_000))
    assert grown is None or grown == pytest.approx(64_000_000, abs=3_000_000)
    memory = branch_memory(benchmark_language_model("random"))
    assert memory["branch_parameters"] < memory["base_parameters"]


def test_attention_rows_hold_shapes_and_ratios():
    rows = bench_attention(replace(SMOKE, cases=SMOKE.cases[:1]))["rows"]
    baselines = [row for row in rows if row["name"] == BASELINE]
    assert [(row["pass"], row["ratio"]) for row in baselines] == [(step, 1.0) for step in PASSES]
    assert all(row.items() >= SMOKE.cases[0].shape.items() and row["case"] == SMOKE.cases[0].title for row in rows)


def test_grid_rows_hold_every_contender_and_its_ratio():
    rows = bench_grids(SMOKE)["rows"]
    names = [row["name"] for row in rows if row["pass"] == PASSES[0]]
    assert names[0] == BASELINE and names[-2:] == ["gathered, PyTorch", "dense reference"] and rows[0]["ratio"] == 1
    for case in COST.grids:
        grid = GridWindow(case.side, case.side, case.radius, case.metric)
        assert (grid.length, grid.mask(grid.length)[1:].sum(-1).max()) == (case.length, case.window)


def test_all_of_the_cost_page_is_json_and_has_memory(monkeypatch):
    monkeypatch.setattr(attention_benchmarks, "peak_memory", lambda jobs: [8 * case.length for _, case in jobs])
    result = json.loads(json.dumps(bench_cost(replace(SMOKE, lengths=(64, 128), windows=(8,))), allow_nan=False))
    assert list(result) == ["attention", "grids", "selection", "scaling", "images"]
    for row in result["attention"]["rows"] + result["scaling"]["rows"]:
        assert ("peak_bytes" in row) == (row["pass"] == PASSES[1])
        assert row.get("peak_bytes") in (None, 8 * row["length"])


def test_the_table_names_case_contender_ratio_and_memory():
    rows = [{"case": "c", **row} for row in compare({"a": [2.0], "b": [1.0]}, "b")]
    assert "c" in format_rows(rows) and "2.00" in format_rows(rows).splitlines()[1]
    plain = {"case": "c", "pass": "forward", "name": "a", **summarise_times([0.5])}
    lines = format_rows([plain, plain | {"peak_bytes": 1_500_000}, plain | {"peak_bytes": None}]).splitlines()
    assert lines[1].split() == lines[3].split() == ["c", "forward", "a", "500.0"] and lines[2].split()[-2:] == ["500.0", "1.5"]


def test_a_report_is_printed_and_saved_with_its_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"case": "c", "name": "a", **summarise_times([0.5])}
    report_benchmark(lambda: {"benchmark": "example", "rows": [row], "missing": {"b": "no compiler"}})
    printed = capsys.readouterr().out
    assert "500.0" in printed and "not measured: b (no compiler)" in printed and f"{torch.get_num_threads()} threads" in printed
    saved = read_json(tmp_path / "runs" / "bench" / "example.json")
    assert saved["rows"] == [row] and {"commit", "threads", "versions", "device"} <= set(saved)


REFUSED = {
    "no contender": (lambda: interleave({}), "contenders is empty"),
    "no round": (lambda: interleave({"a": int}, rounds=0), "rounds must be an integer ≥ 1"),
    "negative warm-up": (lambda: interleave({"a": int}, warmup=-1), "warmup must be an integer ≥ 0"),
    "no budget": (lambda: interleave_within_budget({"a": int}, 0), "budget must be a number > 0"),
    "budget that is no number": (lambda: interleave_within_budget({"a": int}, float("nan")), "budget must be a number > 0"),
    "no time": (lambda: summarise_times([]), "times must be one or more finite numbers"),
    "NaN time": (lambda: compare({"a": [1.0], "b": [float("nan")]}, "a"), "times must be one or more finite numbers"),
    "unknown baseline": (lambda: compare({"a": [1.0]}, "b"), "baseline must be one of a, got 'b'"),
    "no batch": (lambda: replace(CIFAR_CASE, batch=0), "batch must be an integer ≥ 1"),
    "length": (lambda: replace(CIFAR_CASE, length=2.5), "length must be an integer ≥ 1"),
    "no window": (lambda: replace(CIFAR_CASE, window=0, top_k=None), "window must be an integer ≥ 1"),
    "top-k beyond the window": (lambda: replace(CIFAR_CASE, top_k=257), "top_k must be at most the window, 256"),
    "grid of another length": (lambda: replace(COST.grids[0], length=49), "length must be 50"),
    "no image": (lambda: replace(COST.images[0], images=0), "images must be an integer ≥ 1"),
    "no length": (lambda: bench_scaling(replace(COST, lengths=())), "lengths must be a tuple, each an integer ≥ 1, got ()"),
    "length of 0": (lambda: bench_cost(replace(COST, lengths=(1024, 0))), "lengths must be a tuple, each an integer ≥ 1, got (1024, 0)"),
    "window of 0": (lambda: bench_cost(replace(COST, windows=(0,))), "windows must be a tuple, each an integer ≥ 1, got (0,)"),
    "endless limit": (lambda: bench_cost(replace(COST, limit=float("inf"))), "limit must be a number ≥ 0"),
    "unknown pass": (lambda: bench_images(SMOKE, ("backward",)), "passes must be of forward, training step, got 'backward'"),
    "no step": (lambda: bench_training(steps=0), "steps must be an integer ≥ 1"),
    "no step before": (lambda: bench_training(warmup=0), "warmup must be an integer ≥ 1"),
    "k beyond the scores": (lambda: kth_largest(torch.zeros(2, 3), 4), "k must be at most the 3 columns"),
    "scores in double": (lambda: kth_largest(torch.zeros(2, 3).double(), 1), "scores must be (N, C) float32"),
    "cost of 0": (lambda: fitted_exponent([1, 2], [1, 0]), "sizes and costs must be finite numbers > 0"),
    "start beyond the image": (lambda: generation_seconds(GenerationCase("a", "digits", "smoke", 1, 63)), "must leave 2 tokens or more"),
    "stop beyond the image": (lambda: generation_seconds(GenerationCase("a", "digits", "smoke", 1, 0, 65)), "must leave 2 tokens or more"),
    "stop before start": (lambda: GenerationCase("a", "digits", "smoke", 1, 5, 4), "stop must be an integer ≥ 7"),
    "no layer": (lambda: bench_generation(replace(GENERATION_SPEED, step_depth=0)), "step_depth must be an integer ≥ 1"),
    "no context": (lambda: LanguageCase(1, 0, 1), "context must be an integer ≥ 1"),
    "no token": (lambda: bench_language(replace(LANGUAGE_SPEED, tokens=0)), "tokens must be an integer ≥ 1"),
    "unknown base": (lambda: benchmark_language_model("smollm3"), "base must be 'smollm2' or 'random'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_clock_starts(kind, monkeypatch):
    call, message = REFUSED[kind]
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("the clock has started"))
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_one_size_has_no_exponent():
    assert fitted_exponent([5, 5], [1, 2]) == (None, 2)


def test_benchmarks_are_callables_by_name():
    assert set(BENCHMARKS) >= {"attention", "selection", "scaling", "training-step", "generation", "language", "dynamics"}
    assert all(callable(make) for make in BENCHMARKS.values())


@pytest.mark.parametrize(("change", "message"), [
    ({"mixers": ("standard", "window")}, "mixers must begin with standard, the baseline, and contain krause_only, got standard, window"),
    ({"mixers": ("krause_only", "standard")}, "mixers must begin with standard"),
    ({"lengths": (16,)}, r"targets must be one of lengths = \(16,\) and two of positions"),
    ({"targets": (64, 8, 33)}, "targets must be one of lengths"),
])
def test_the_targets_of_text_speed_are_measured(change, message):
    with pytest.raises(UserError, match=message):
        replace(TEXT_SPEED.at("smoke"), **change)


def test_language_models_from_scratch_are_timed_in_turns_after_their_context():
    recipe = TEXT_SPEED.at("smoke")
    result = bench_text(recipe)
    contexts = [("training step", length) for length in recipe.lengths] + [("generation", place) for place in recipe.positions]
    assert [(row["pass"], row["context"], row["name"]) for row in result["rows"]] == [
        (kind, context, mixer) for kind, context in contexts for mixer in recipe.mixers[:3 if context <= recipe.short_limit else 2]]
    assert all(row["ratio"] == 1 for row in result["rows"] if row["name"] == "standard")
    assert result["flat"].keys() == {"standard", "krause_only"}
    labels = {mixer: (f"label of {mixer}", "krause") for mixer in recipe.mixers}
    table = text_speed_table(result, labels, recipe)
    assert len(result["notes"]) == 3 and "| generation | 8 tokens | 32 tokens |" in table and table.count("| — |") == 2
    kept = {(row["name"], row["context"]): row["cache_bytes"] for row in result["rows"] if row["pass"] == "generation"}
    shape = get_recipe("lm_krause_only_100m/openstax").at("smoke")
    per_token = 2 * 4 * shape.depth * shape.width  # keys and values in float32
    assert all(kept["standard", place] >= per_token * place for place in recipe.positions)
    assert kept["krause_only", 32] == kept["krause_only", 8] == per_token * shape.window
    panels = text_speed_series(result, dict.fromkeys(recipe.mixers, ("a label", "krause")))
    assert [panel["title"] for panel in panels] == ["training step", "generation"]
    assert [line["x"] for panel in panels for line in panel["series"]] == [[16, 64], [16, 64], [16], [8, 32], [8, 32], [8]]
    model = text_model("krause_only", recipe.size, 64)
    (decode, _), tokens = text_decoder(model, 8), torch.randint(model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    decode()
    assert torch.equal(decode(), model.generate(tokens, max_new_tokens=3, do_sample=False)[:, -1:])


def test_the_gpu_benchmark_compares_the_same_attention_and_needs_a_gpu():
    case = AttentionCase("tiny", batch=1, heads=1, length=8, dim=16, window=5, top_k=2)  # Triton is interpreted here, block by block
    result = attention_benchmarks.bench_gpu_attention((case,), rounds=1, device="cpu")
    names = [row["name"] for row in result["rows"] if row["pass"] == "forward"]
    assert names == ["fused full", "Triton", "FlexAttention, window", "dense reference"]
    for row in result["rows"]:
        moved, operations = attention_benchmarks.attention_work(case, row["pass"], row["name"] == "fused full")
        assert row["teraflops"] * row["seconds"] * 1e12 == pytest.approx(operations)
        assert row["gigabytes_per_second"] * row["seconds"] * 1e9 == pytest.approx(moved)
    contenders, tensors = attention_benchmarks.gpu_contenders(case), [*case.tensors()[:3], case.tensors()[4]]
    torch.testing.assert_close(contenders["Triton"](*tensors), contenders["dense reference"](*tensors), atol=1e-5, rtol=1e-4)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be cpu"):
            attention_benchmarks.bench_gpu_attention()
