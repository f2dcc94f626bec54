"""Numbers from a finished run: recomputed here by independent loops, and by hand."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from cases import over

from krause_repro import cli, evaluation
from krause_repro.checks import UserError
from krause_repro.evaluation import (
    CLASSIFIER_LABELS,
    FLAT_GAIN,
    FLAT_SHARE,
    add_seeds,
    altered_note,
    evaluate_runs,
    held_out_lead,
    is_undertrained,
    last_gain,
    learned_sigma,
    logged_curve,
    loss_curves,
    provenance_table,
    save_finished,
    test_accuracy,
    train_seeds,
    training_curves,
)
from krause_repro.image_data import Collator, load_splits
from krause_repro.plans import (
    ACCURACY,
    PLANS,
    TEXT_BITS,
    Measure,
    load_or_run_grid,
    means_so_far,
    planned_difference,
    planned_experiment,
    planned_table,
    read_plan,
    trained_table,
    unplanned_differences,
)
from krause_repro.recipes import RECIPES, get_recipe
from krause_repro.records import git_output, project_root, read_json
from krause_repro.results import save_result
from krause_repro.runs import Run, run_path
from krause_repro.statistics import (
    MIN_EFFECT,
    effect,
    exceeds_noise,
    is_shown,
    outcome,
    paired_difference,
    percent,
    summarise,
    summarise_curves,
    unpaired_difference,
)


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    "A copy of the finished run, for evaluation to write into."
    path = tmp_path_factory.mktemp("evaluated") / "seed-0"
    shutil.copytree(finished.path, path)
    return Run(path, finished.recipe, finished.seed)


@pytest.fixture(scope="module")
def part(recipe, source):
    "The test images of the recipe."
    return load_splits(recipe, source).test


def test_test_accuracy_is_the_share_of_right_answers(run, source, part):
    before = {path.name for path in run.path.iterdir()}
    found = test_accuracy(run, source)
    model, right, loss = run.model(), 0, 0.0
    collate = Collator(run.recipe, training=False)
    with torch.no_grad():
        for i in range(len(part)):
            batch = collate([part[i]])
            logits = model(batch["pixel_values"]).logits[0].double()
            right += int(logits.argmax() == batch["labels"][0])
            loss += (logits.logsumexp(0) - logits[batch["labels"][0]]).item() / len(part)
    assert found["accuracy"] == pytest.approx(right / 64) and found["images"] == 64
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert {path.name for path in run.path.iterdir()} == before | {"test.json"}


def test_test_accuracy_is_computed_once(run, source):
    first = test_accuracy(run, source)
    kept = run.path / "test.json"
    assert json.loads(kept.read_text(encoding="utf-8")).items() > first.items()
    stamp = kept.stat().st_mtime_ns
    assert test_accuracy(run) == first and kept.stat().st_mtime_ns == stamp


def test_cached_numbers_that_cannot_be_are_refused(run, source):
    found, kept = test_accuracy(run, source), run.path / "test.json"
    text = kept.read_text(encoding="utf-8")
    model = {"model": json.loads(text)["model"]}
    for wrong in ({"accuracy": 2}, {"accuracy": "x"}, {"accuracy": None}, {"loss": math.nan}, {"loss": "x"}, {"images": -1}, {}):
        kept.write_text(json.dumps((found | wrong if wrong else {}) | model), encoding="utf-8")
        with pytest.raises(UserError, match=f"test.json: {next(iter(wrong), 'accuracy')} must be .*; delete it to evaluate again"):
            test_accuracy(run)
    kept.write_text(text, encoding="utf-8")


def test_an_unfinished_run_has_no_test_accuracy(finished, source, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    broken = Run(tmp_path / "run", finished.recipe, 0)
    command = "krause-repro train kvit_t/fashion_mnist --profile smoke --seed 0"
    with pytest.raises(ValueError, match=f"{broken.path} is not finished.*{command}"):
        test_accuracy(broken, source)
    assert not (broken.path / "test.json").exists()


def test_missing_data_are_named(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no fashion_mnist in"):
        test_accuracy(Run(tmp_path / "run", finished.recipe, 0), tmp_path)


# Curves and summaries


def test_curves_are_the_log(finished):
    found = logged_curve([finished], "eval_accuracy", axis="epoch")
    assert found["epochs"] == [1.0, 2.0]
    assert found["mean"] == [line["eval_accuracy"] for line in finished.metrics() if "eval_accuracy" in line]
    found = loss_curves([finished], math.log(2), "epoch")
    assert found["held_out"]["epochs"] == [1.0, 2.0] and found["training"]["epochs"] == [i / 4 for i in range(1, 9)]
    assert found["training"]["mean"] == [line["loss"] / math.log(2) for line in finished.metrics() if "loss" in line]
    assert logged_curve([finished], "nothing") == {"steps": [], "mean": [], "sd": []}


def logged(path, accuracies, losses):
    "A run of which only the log is there."
    path.mkdir()
    lines = [{"epoch": 0.5 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    lines += [{"epoch": i + 1, "eval_accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Run(path, None, 0)


def test_training_curves_are_mean_and_spread_over_seeds(tmp_path):
    runs = [logged(tmp_path / "a", [0.25, 0.75], [4.0, 2.0]), logged(tmp_path / "b", [0.5, 0.75], [2.0, 2.0])]
    found = training_curves(runs)
    assert found["epochs"] == [1, 2]
    assert found["validation_accuracy"]["mean"] == [0.375, 0.75]
    assert found["validation_accuracy"]["sd"] == pytest.approx([0.25 / math.sqrt(2), 0])
    assert found["train_loss"]["epochs"] == [0.5, 1.0] and found["train_loss"]["mean"] == [3.0, 2.0]
    assert found["train_loss"]["sd"] == pytest.approx([math.sqrt(2), 0])


def test_learned_sigma(finished):
    found = learned_sigma(finished)
    assert found == pytest.approx([math.exp(block.attention.log_sigma.item()) for block in finished.model().blocks])
    assert len(found) == 2 and all(1e-4 < abs(sigma - 2.5) < 0.5 for sigma in found)


def test_summary_of_runs(run, source):
    found = evaluate_runs([run], source)
    test, end = test_accuracy(run, source), run.summary()
    assert found["test_accuracy"] == {"values": [test["accuracy"]], "mean": test["accuracy"], "sd": None, "n": 1}
    assert found["held_out_accuracy"]["mean"] == end["held_out_accuracy"] and found["chosen_epochs"] == [end["chosen_epoch"]]
    assert (found["parameters"], found["test_images"], found["seeds"]) == (end["parameters"], 64, [0])
    assert found["sigma"]["mean"] == learned_sigma(run) and found["seconds"]["values"] == [end["seconds"]]
    assert found["paper"] == 94.65
    json.dumps(found, allow_nan=False)


# Differences


def accuracies(values):
    return {"seeds": range(len(values)), "test_accuracy": {"values": values}}


def difference(first, second, comparisons=1):
    return paired_difference(accuracies(first), accuracies(second), comparisons)


def test_paired_difference_by_hand():
    found = difference([0.5, 0.75, 1.0], [0.25, 0.25, 0.75])
    assert found["values"] == [0.25, 0.5, 0.25] and found["n"] == 3
    assert found["mean"] == pytest.approx(1 / 3) and found["sd"] == pytest.approx(1 / math.sqrt(48))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / 12  # t × sd / √3, with the quantile of two degrees of freedom in closed form
    assert found["interval"] == pytest.approx([1 / 3 - half, 1 / 3 + half])
    two = difference([1.0, 2.0], [0.0, 0.0])
    half = math.tan(0.475 * math.pi) / 2  # of one degree of freedom
    assert two["interval"] == pytest.approx([1.5 - half, 1.5 + half])


def test_one_seed_has_no_interval():
    assert difference([0.5], [0.25]) == {"values": [0.25], "mean": 0.25, "sd": None, "n": 1, "interval": None, "seeds": [0]}
    assert difference([1.0] * 11, [0.5] * 11)["interval"] == [0.5, 0.5]  # any number of seeds from two on


def test_comparisons_are_counted():
    for comparisons in (0, -1, 0.5, math.nan, True):
        with pytest.raises(UserError, match="comparisons must be an integer ≥ 1"):
            difference([1.0, 2.0], [1.0, 3.0], comparisons)


def test_results_are_paired_by_seed_whatever_the_order():
    def result(seeds, values):
        return {"seeds": seeds, "test_accuracy": summarise(values)}

    first, second = result([0, 1, 2], [0.8, 0.9, 0.7]), result([0, 2, 1], [0.79, 0.69, 0.89])
    assert paired_difference(first, second)["values"] == pytest.approx([0.01, 0.01, 0.01])
    assert paired_difference(first, result([1, 0], [0.5, 0.6]))["seeds"] == [0, 1]
    for wrong in (result([1, 1, 2], [0.8, 0.9, 0.7]), result([0, 1, 2], [0.8, 0.9])):
        with pytest.raises(UserError, match="seeds must differ and have one value of test_accuracy each, got seeds"):
            paired_difference(first, wrong)


def test_one_seed_each_has_no_interval():
    found = unpaired_difference({"mean": [1.0], "sd": [0.0]}, {"mean": [0.9], "sd": [0.3]}, 1)
    assert found["interval"] is None and found["mean"] == pytest.approx(0.1) and not is_shown(found, 0)


@over("freedom", range(1, 13))
def test_student_quantiles(freedom):
    "Integrate the density of Student's t: 97.5% lies below the quantile that an interval uses."
    found = difference([float(i * i) for i in range(freedom + 1)], [0.0] * (freedom + 1))
    quantile = (found["interval"][1] - found["mean"]) * math.sqrt(freedom + 1) / found["sd"]
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    steps = 4000
    width = quantile / steps
    density = [constant * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    below = 0.5 + width * (sum(density) - (density[0] + density[-1]) / 2)
    assert below == pytest.approx(0.975, abs=2e-5)


def test_a_share_in_percent():
    assert percent(summarise([0.125])) == "12.50" and percent(summarise([0.5, 0.75, 1.0])) == "75.00 ± 25.00"


@pytest.mark.parametrize("restart", [False, True])
def test_train_seeds_trains_each_seed_of_the_profile(monkeypatch, tmp_path, restart):
    calls = []
    monkeypatch.setattr(evaluation, "train", lambda *arguments: calls.append(arguments) or len(calls))
    assert train_seeds("vit_t/fashion_mnist", "desk", restart, tmp_path, progress=False) == [1, 2, 3]
    recipe = RECIPES["vit_t/fashion_mnist"].at("desk")
    assert calls == [(recipe, seed, tmp_path, restart, False) for seed in (0, 1, 2)]


def test_cells_without_a_file_are_missing_and_stale_ones_an_error(tmp_path):
    first, second = "softmax_s_local/cifar10", "kvit_s_full/cifar10"
    assert load_or_run_grid("image_classification", [first, second], "desk", "never", root=tmp_path) == {first: None, second: None}
    recipe = get_recipe(first).at("desk")
    save_result("image_classification/softmax_s_local", {"recipes": {first: recipe.to_dict()}, "answer": 42}, "desk", tmp_path)
    cells = load_or_run_grid("image_classification", [first, second], "desk", "never", root=tmp_path)
    assert cells[first]["answer"] == 42 and cells[second] is None
    save_result("image_classification/softmax_s_local", {"recipes": {first: recipe.to_dict() | {"lr": 1}}}, "desk", tmp_path)
    with pytest.raises(ValueError, match="stale"):
        load_or_run_grid("image_classification", [first], "desk", "never", root=tmp_path)


def test_provenance_names_every_commit_and_version_once():
    made = {"seeds": [0, 1], "test_images": 10_000, "seconds": {"values": [60, 90.0]}, "threads": [1, 1], "device": "cpu"}
    old, new = ({"python": "3.11", "torch": torch, "transformers": "5"} for torch in ("2.14", "2.15"))
    models = {"a": {"label": "A", "commits": ["1" * 40, "1" * 40], "versions": old, **made},
              "b": {"label": "B", "commits": ["1" * 40, "2" * 40], "versions": new, **made}}
    lines = provenance_table(models).splitlines()
    assert lines[2] == "| A | 0, 1 | 10,000 | 1.0, 1.5 | 1 | 1111111111 |" and lines[3].endswith("| 1 | 1111111111, 2222222222 |")
    assert lines[-1] == "Python 3.11, torch 2.14, transformers 5; cpu · Python 3.11, torch 2.15, transformers 5; cpu"


@pytest.mark.parametrize(("mean", "interval", "shown"), [
    (0.012, [0.001, 0.023], True), (0.012, [-0.001, 0.025], False), (0.009, [0.008, 0.010], False), (-0.02, [-0.03, -0.01], True),
    (0.5, None, False),
])
def test_a_difference_counts_if_it_is_large_and_apart_from_zero(mean, interval, shown):
    assert is_shown({"mean": mean, "interval": interval}) is shown
    word = ("higher" if mean > 0 else "lower") if shown else "too small to count" if mean == 0.009 else "not shown"
    assert outcome({"mean": mean, "interval": interval}, "higher", "lower") == word


# Trained, and planned


def test_a_lead_is_read_at_the_quarters_of_training():
    first, second = ({"curves": {"held_out": {"steps": [0, 10, 20, 30, 40, 50, 60, 70, 80], "mean": [end - 0.1 * i for i in range(9)]}}}
                     for end in (2.0, 1.0))
    times, leads = held_out_lead(first, second)
    assert times == [20, 40, 60, 80] and leads == pytest.approx([1.0] * 4)
    assert held_out_lead(second, first)[1] == pytest.approx([-1.0] * 4)


def test_unplanned_pairs_are_those_of_trained_models_without_a_correction():
    values = {"kvit_s_local": [0.78, 0.79], "softmax_s_local": [0.77, 0.79], "vit_s_post": [0.75, 0.77]}
    models = {f"{name}/cifar10": {"label": name, "seeds": [0, 1], "test_accuracy": summarise(each)} for name, each in values.items()}
    found = unplanned_differences(models | {"vit_s/cifar10": {"label": "not trained"}})
    assert list(found) == ["softmax_s_local − vit_s_post", "kvit_s_local − vit_s_post"]
    assert found["kvit_s_local − vit_s_post"]["interval"] == difference(values["kvit_s_local"], values["vit_s_post"])["interval"]


def test_a_published_lead_is_compared_with_the_sampling_of_its_items():
    assert not exceeds_noise(52.0, 48.0, 1000) and exceeds_noise(52.0, 48.0, 2000)  # two errors: 4.47 and 3.16 points
    assert not exceeds_noise(48.0, 52.0, 2000)


@pytest.mark.parametrize(("values", "gain", "undertrained"), [
    ([0.1, 0.2, 0.3, 0.4, 0.404], 0.004, False), ([0.1, 0.2, 0.3, 0.4, 0.405001], 0.005, True), ([0.1, 0.2, 0.3, 0.4, 0.3], -0.1, False),
    ([0.1, 0.2, 0.2], 0.0, False), ([0.5], None, True),
])
def test_a_curve_is_flat_if_its_last_fifth_gains_less_than_half_a_point(values, gain, undertrained):
    curves = {"epochs": list(range(1, len(values) + 1)), "validation_accuracy": {"mean": values}}
    assert is_undertrained(curves) is undertrained
    assert last_gain(curves) == (None if gain is None else pytest.approx(gain, abs=1e-5))


def planned(label, accuracies, seeds=(0, 1, 2)):
    return {"label": label, "seeds": list(seeds), "test_accuracy": summarise(accuracies)}


def test_differences_are_paired_by_seed_and_corrected():
    first, second = planned("A", [0.7, 0.72, 0.75], (0, 1, 2)), planned("B", [0.71, 0.66, 0.9], (2, 0, 5))
    found = paired_difference(first, second, 6)
    assert found["seeds"] == [0, 2] and found["values"] == pytest.approx([0.04, 0.04])
    first, second = planned("A", [0.7, 0.72, 0.74]), planned("B", [0.65, 0.66, 0.67])
    quantile = (1 - 0.05 / 6) / (2 * (1 - 0.025 / 6) * (0.025 / 6)) ** 0.5  # of Student's t with two degrees of freedom
    low, high = paired_difference(first, second, 6)["interval"]
    assert (high - low) / 2 == pytest.approx(quantile * 0.01 / 3**0.5) and (high + low) / 2 == pytest.approx(0.06)
    assert paired_difference(planned("A", [0.7], (0,)), second, 6)["interval"] is None
    without = paired_difference(planned("A", [0.7], (9,)), second, 6)
    assert without["mean"] is None and effect(without) == "—"


def test_the_plans_table_names_what_is_not_trained_and_its_commit():
    plan = {"comparisons": [["a", "b"], ["a", "c"], ["a", "d"]], "smallest_difference": 0.01, "commit": "ab" * 20, "seeds": [0, 1, 2]}
    plan["counts_as_a_difference"] = "big"
    models = {"a": planned("A", [0.70, 0.71, 0.72]), "b": planned("B", [0.65, 0.66, 0.67]), "c": {"label": "C"}}
    models["d"] = planned("D", [0.6], (7,))
    lines = planned_table(models, plan).splitlines()
    assert lines[2] == "| A − B | 3 (seeds 0, 1, 2) | +5.00 | +5.00 to +5.00 | higher |"
    assert lines[-1] .startswith("A difference counts if big. Fixed before the first of these runs, in commit ababababab. ")
    assert lines[3:5] == ["", "Not finished: A − C; A − D."]
    small = planned_table(models, {**plan, "smallest_difference": 0.06}).splitlines()
    assert small[2].endswith("| too small to count |")
    assert planned_table(models, {**plan, "seeds": [0, 1, 2, 3]}).splitlines()[2].endswith("| unfinished |")
    models["b"] = planned("B", [0.69, 0.73, 0.7])
    assert planned_table(models, plan).splitlines()[2].endswith("| not shown |")


def test_a_measure_of_which_less_is_better_is_compared_and_judged_alike():
    falling = {"held_out": {"steps": [0, 5, 10], "mean": [3.0, 2.5, 2.25]}}
    assert last_gain(falling) == pytest.approx(0.25) and is_undertrained(falling, 0.25) and not is_undertrained(falling, 0.26)
    bits = Measure("bits", "test bits", "bits", held_out="held_out_bits")
    models = {"a": {"label": "A", "bits": summarise([1.0, 1.1]), "seeds": [0, 1]},
              "b": {"label": "B", "bits": summarise([1.2, 1.3]), "seeds": [0, 1]}}
    plan = {"comparisons": [["a", "b"]], "smallest_difference": 0.1, "commit": None, "counts_as_a_difference": "big", "seeds": [0, 1]}
    assert planned_table(models, plan, bits).splitlines()[2] == "| A − B | 2 (seeds 0, 1) | -0.200 | -0.200 to -0.200 | lower |"
    models["a"] |= {"trainable": 7, "held_out_bits": summarise([2.0]), "curves": falling}
    assert planned_difference(plan, models, "a", "b", bits)["finished"] and planned_difference(plan, models, "a", "b", ACCURACY) is None
    assert not planned_difference({**plan, "seeds": [0, 1, 2]}, models, "a", "b", bits)["finished"]
    assert planned_difference(plan, {**models, "b": {**models["b"], "seeds": [2, 3]}}, "a", "b", bits) is None
    lines = trained_table({"a": models["a"], "c": {"label": "C"}}, bits, {"flat_gain": 0.2}).splitlines()
    assert lines[0] == "| model | trained parameters | test bits | seeds | held-out bits | fell at the end of training, bits |"
    assert lines[2] == "| A | 7 | 1.050 ± 0.071 *(undertrained)* | 2 (seeds 0, 1) | 2.000 | +0.250 |" and lines[4] == "Not finished: C."


def test_a_plan_in_nats_is_applied_to_curves_in_bits():
    held_out = {"epochs": [3, 4], "mean": [5.025, 5.0]}  # 0.025 bits are 0.017 nats
    result = {"bits_per_token": summarise([5.0]), "seeds": [0], "curves": {"held_out": held_out}}
    plan = {"flat_gain": 0.02, "seeds": [0]}
    assert means_so_far(plan, {"a": result}, TEXT_BITS, {"a": "A"}) == "A 5.000 (1 seed)"
    held_out["mean"][0] = 5.03
    assert means_so_far(plan, {"a": result}, TEXT_BITS, {"a": "A"}, 1) == "A 5.0 (1 seed, undertrained)"


@pytest.mark.parametrize("name", ["mnist", "questions", "textbooks", "language_models"])
def test_other_plans_are_about_recipes_too(name):
    plan = read_plan(name)
    assert {each for pair in plan["comparisons"] for each in pair} <= set(plan["models"]) <= set(RECIPES)
    assert all(RECIPES[each].at("desk").seeds == tuple(plan["seeds"]) for each in plan["models"]) and plan["flat_share"] == FLAT_SHARE


def test_a_plan_names_the_commit_before_its_runs_and_none_once_it_is_changed(tmp_path):
    folder, known = project_root() / "results", set()
    for name, (results, *_) in PLANS.items():
        plan = read_plan(name)
        commit, own = plan["commit"], {model.partition("/")[0] for model in plan["models"] if model not in plan.get("earlier", ())}
        if git_output("cat-file", "-t", commit, folder=folder) == "commit":  # else a shallow clone, or none
            assert git_output("show", f"{commit}:results/plans/{name}.json", folder=folder).strip() == (
                folder / "plans" / f"{name}.json").read_text(encoding="utf-8").strip()
            runs = {run for path in (folder / "desk" / results).glob("*.json") if path.stem in own
                    for each in read_json(path)["commits"] for run in each.split(", ")}
            assert all(git_output("merge-base", commit, run, folder=folder) == commit for run in runs)
            known |= runs
    assert known or git_output("rev-parse", "--is-shallow-repository", folder=folder) != "false"
    shutil.copytree(folder / "plans", tmp_path / "results" / "plans")
    path = tmp_path / "results" / "plans" / "mnist.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.02,", "1,"), encoding="utf-8")
    plan = read_plan("mnist", tmp_path)
    assert plan["commit"] is None
    models = {name: {"label": name} for name in plan["models"]}
    assert "Not the plan that was committed." in planned_table(models, plan) and "these runs" not in planned_table(models, plan)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"seeds": [', '"seed": [', "whose seeds is a tuple, .*all different, got None"),
    ('"seeds": [', '"seeds": [0,', "whose seeds is a tuple, .*all different"), ('"seeds": [', '"seeds": ["a",', "whose seeds is a tuple"),
    ('"karm/mnist",\n   "arm/mnist"', '"karm/mnist"', "whose comparisons is a tuple, each 2 values"),
    ('"karm/mnist",\n   "arm/mnist"', '"karm/mnist", "arm/mnits"', "each the name of a recipe"),
    ('"karm/mnist",\n   "arm/mnist"', '"karm/mnist", "karm/mnist"', "all different"),
    ('"karm/mnist",\n   "arm/mnist"', '"karm/mnist", ["arm/mnist"]', "each the name of a recipe"),
    ('"karm/mnist",\n   "arm/mnist"', '"larm/mnist", "karm/mnist"', "comparisons must be different pairs of its models"),
    ('"karm/mnist",\n   "arm/mnist"', '"karm/mnist", "karm/digits"', "comparisons must be different pairs of its models"),
    ('"models": [', '"models": [["arm/mnist"],', "whose models is a tuple"), ('"models": [', '"models": ["arm/minst",', "whose models is"),
    ('"smallest_difference": 0.02', '"smallest_difference": NaN', "whose smallest_difference is a number ≥ 0, got nan"),
    ('{', '[{', "is not valid JSON"),
    ('"models": [', '"earlier": 5, "models": [', "whose earlier is a tuple of strings, or None, got 5"),
])
def test_a_damaged_plan_is_named(tmp_path, old, new, message):
    shutil.copytree(project_root() / "results" / "plans", tmp_path / "results" / "plans")
    path = tmp_path / "results" / "plans" / "mnist.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=f"mnist.json.*{message}.*: restore it from its repository"):
        read_plan("mnist", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"mnist": 5}', '{"mnist": {}}', '{"mnist": {"sha256": "5b"}}'])
def test_damaged_commits_of_plans_are_named(tmp_path, content):
    shutil.copytree(project_root() / "results" / "plans", tmp_path / "results" / "plans")
    path = tmp_path / "results" / "plans" / "commits.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="commits.json .*: restore it from its repository"):
        read_plan("mnist", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="commits.json is missing; the plans are part of the project"):
        read_plan("mnist", tmp_path)


def test_the_committed_plan_is_about_recipes():
    plan = read_plan("cifar10")
    assert {name for pair in plan["comparisons"] for name in pair} <= set(plan["models"]) and set(plan["models"]) <= set(RECIPES)
    assert (plan["flat_gain"], plan["flat_share"]) == (FLAT_GAIN, FLAT_SHARE) and plan["smallest_difference"] == MIN_EFFECT
    assert all(RECIPES[name].at("desk").seeds == tuple(plan["seeds"]) for name in plan["models"])
    compared = {*plan["models"], *(name for name in plan["baselines"] if "/" in name), "residual/cifar10"}  # which came later
    assert set(CLASSIFIER_LABELS["desk"]) == set(CLASSIFIER_LABELS["paper"]) == compared and set(CLASSIFIER_LABELS["smoke"]) <= set(RECIPES)


def test_a_table_of_trained_models_says_which_stopped_too_early_and_what_is_missing():
    flat = {"epochs": [1, 2, 3, 4, 5], "validation_accuracy": {"mean": [0.5, 0.6, 0.64, 0.65, 0.65]}}
    rising = {"epochs": [1, 2], "validation_accuracy": {"mean": [0.5, 0.6]}}
    common = {"parameters": 1234, "held_out_accuracy": summarise([0.5]), "paper": None}
    models = {"a": {**planned("A", [0.7, 0.8, 0.9]), **common, "curves": flat}, "c": {"label": "C"},
              "b": {**planned("B", [0.7], (0,)), **common, "curves": rising, "paper": 95.2}}
    lines = trained_table(models).splitlines()
    assert {line.count("|") for line in lines[:4]} == {8} and lines[4:] == ["", "Not finished: C."]
    assert lines[2] == "| A | 1,234 | 80.00 ± 10.00 | 3 (seeds 0, 1, 2) | 50.00 | +0.00 | — |"
    assert lines[3] == "| B | 1,234 | 70.00 *(undertrained)* | 1 (seed 0) | 50.00 | +10.00 | 95.2 |"
    data = {"train": {"images": 50_000, "altered": 82}, "test": {"images": 10_000, "altered": 21}}
    note = altered_note({"a": {}, "b": {"data": data}})
    assert note.startswith("103 of the 60,000 images (82 for training, 21 for testing) are JPEG copies")
    original = {"train": {"images": 50_000, "altered": 0}, "test": {"images": 10_000, "altered": 0}}
    assert altered_note({"a": {}}) == altered_note({"a": {"data": original}}) == ""
    assert altered_note({"a": {"data": original}, "b": {"data": data}}) == note
    unknown = {"data": {**original, "test": {"images": 10_000, "altered": None}}}
    assert altered_note({"a": {"data": data}, "b": unknown}) == "It is not known how many images differ from the published pixels."


def test_the_seeds_that_are_finished_make_a_result(finished, run, source, tmp_path, monkeypatch):
    recipe = replace(finished.recipe, seeds=(0, 1))
    monkeypatch.setattr(evaluation, "get_recipe", lambda name: replace(recipe, profile="paper"))
    monkeypatch.setattr(type(recipe), "changes", lambda self, profile: {})
    monkeypatch.setattr(evaluation, "run_path", lambda recipe, seed, runs: run.path if seed == 0 else tmp_path / "not begun")
    path, new = save_finished("folder", recipe.name, "smoke", source=source, root=tmp_path)
    assert new == [0]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "results" / "smoke" / "folder" / "kvit_t.json" and result["seeds"] == [0]
    assert result["recipes"].keys() == {recipe.name} and result["test_accuracy"]["n"] == 1
    monkeypatch.setattr(evaluation, "run_path", lambda recipe, seed, runs: tmp_path / "not begun")
    before = path.read_bytes()
    assert save_finished("folder", recipe.name, "smoke", source=source, root=tmp_path) == (path, []) and path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no finished run of kvit_t/fashion_mnist under profile 'smoke'"):
        save_finished("other", recipe.name, "smoke", source=source, root=tmp_path)

    second = tmp_path / "seed-1"  # of another machine, where there is no run of seed 0
    shutil.copytree(run.path, second)
    saved = json.loads((second / "recipe.json").read_text(encoding="utf-8"))
    (second / "recipe.json").write_text(json.dumps(saved | {"seed": 1}), encoding="utf-8")
    monkeypatch.setattr(evaluation, "run_path", lambda recipe, seed, runs: second if seed == 1 else tmp_path / "not begun")
    assert save_finished("folder", recipe.name, "smoke", source=source, root=tmp_path) == (path, [1])
    both = json.loads(path.read_text(encoding="utf-8"))
    assert both["seeds"] == [0, 1] and both["test_accuracy"]["values"] == 2 * result["test_accuracy"]["values"]
    assert both["curves"]["validation_accuracy"]["mean"] == pytest.approx(result["curves"]["validation_accuracy"]["mean"])
    assert len(both["commits"]) == 2 and both["versions"] == result["versions"]
    monkeypatch.setattr(evaluation, "get_recipe", lambda name: replace(recipe, profile="paper", lr=0.5))
    with pytest.raises(UserError, match="was made with another recipe kvit_t/fashion_mnist"):
        save_finished("folder", recipe.name, "smoke", source=source, root=tmp_path)


def test_scores_of_a_recipe_in_no_plan_are_printed(finished, source, tmp_path, monkeypatch, capsys):
    recipe, command = finished.recipe, ["summarise", finished.recipe.name, "--profile", "smoke", "--source", str(source)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(recipe), "at", lambda self, profile: recipe)
    assert cli.main(command) == 2 and "no finished run of kvit_t/fashion_mnist" in capsys.readouterr().err
    path = run_path(recipe, 0)
    shutil.copytree(finished.path, path)
    (path.parent / "seed-of another tool").mkdir()
    assert cli.main(command) == 0
    expected = test_accuracy(Run(path, recipe, 0))
    assert capsys.readouterr().out == f"seed 0: accuracy {expected['accuracy']:.6g}, loss {expected['loss']:.6g}, images 64\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("name", "change", "message"), [
    ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "model.safetensors.* SHA-256"),
    ("digests.json", lambda content: content[:9], "digests.json"),
    ("finished.json", lambda content: b'{"steps": 3}', "finished.json is damaged: it has no seconds"),
    ("environment.json", lambda content: b"[]", "environment.json is damaged: it has no commit"),
    ("finished.json", lambda content: content.replace(b"held_out_accuracy", b"held_out_luck"), "it has no held_out_accuracy"),
    ("metrics.jsonl", lambda content: b"".join(content.splitlines(keepends=True)[1:]), "metrics.jsonl has .* bytes instead of"),
])
def test_a_damaged_run_makes_no_result(finished, run, source, tmp_path, monkeypatch, name, change, message):
    copied = tmp_path / "seed-0"
    shutil.copytree(run.path, copied)
    (copied / name).write_bytes(change((copied / name).read_bytes()))
    monkeypatch.setattr(evaluation, "get_recipe", lambda name: replace(finished.recipe, profile="paper", seeds=(0,)))
    monkeypatch.setattr(type(finished.recipe), "changes", lambda self, profile: {})
    monkeypatch.setattr(evaluation, "run_path", lambda recipe, seed, runs: copied)
    with pytest.raises(UserError, match=message):
        save_finished("folder", finished.recipe.name, "smoke", source=source, root=tmp_path)
    assert not (tmp_path / "results").exists()


def test_seeds_of_two_machines_are_one_result():
    def result(seeds, accuracies, torch, **fields):
        runs = {"seeds": seeds, "commits": ["abc"] * len(seeds), "versions": {"torch": torch, "python": "3.11"}, "device": "CPU"}
        curve = {"epochs": [1, 2], "train_loss": {"epochs": [1], **summarise_curves([[a] for a in accuracies])}}
        sinks = {**summarise_curves([[a] for a in (*accuracies, *accuracies)]), "n": 2 * len(seeds)}  # two passages for each seed
        return {"test_accuracy": summarise(accuracies), "curves": curve, "sinks": sinks, "paper": None, **runs, **fields}

    first, second = result([0, 2], [0.7, 0.8], "2.14", samples="a"), result([1], [0.6], "2.15", samples="b")
    whole = add_seeds(first, second)
    assert whole["seeds"] == [0, 2, 1] and whole["test_accuracy"] == summarise([0.7, 0.8, 0.6]) and whole["samples"] == "a"
    assert whole["versions"] == {"torch": "2.14, 2.15", "python": "3.11"}
    for found, values in ((whole["curves"]["train_loss"], [0.7, 0.8, 0.6]), (whole["sinks"], [0.7, 0.8, 0.7, 0.8, 0.6, 0.6])):
        expected = summarise_curves([[value] for value in values])
        assert (found["mean"], found["sd"]) == (pytest.approx(expected["mean"]), pytest.approx(expected["sd"]))
    assert whole["sinks"]["n"] == 6 and "n" not in whole["curves"]["train_loss"]
    assert add_seeds(whole, result([3], [0.9], "2.15", samples="c"))["versions"]["torch"] == "2.14, 2.15"
    with pytest.raises(UserError, match="seeds must differ, but 2 are in both"):
        add_seeds(first, result([2], [0.6], "2.14", samples="b"))
    with pytest.raises(UserError, match="curves.epochs must be the same for all seeds"):
        add_seeds(first, {**second, "curves": {**second["curves"], "epochs": [1]}})
    with pytest.raises(UserError, match="paper must be the same"):
        add_seeds(first, {**second, "paper": 95.2})
    with pytest.raises(UserError, match=r"test_accuracy must have a value for each of the seeds \[0\], got 2"):
        add_seeds({**first, "seeds": [0]}, second)
    judged = [{"values": [real], "mean": real, "sd": None, "n": 1, "real": real} for real in (1.0, 2.0)]  # by another classifier each
    for distances in (judged, [None, judged[0]], [judged[0], None]):
        mine, other = ({**result([seed], [0.5], "2.14"), "frechet": each} for seed, each in enumerate(distances))
        assert add_seeds(mine, other)["frechet"] is None
    named = add_seeds(add_seeds({**first, "device": "H200"}, second), result([3], [0.9], "2.15", samples="c"))
    assert named["device"] == "H200, CPU"
    for name in ("corpus", "data"):  # one result may be of an earlier version, which did not record it
        assert add_seeds({**first, name: "a"}, second)[name] == add_seeds(first, {**second, name: "a"})[name] == "a"
        with pytest.raises(UserError, match=f"{name} must be the same for all seeds"):
            add_seeds({**first, name: "a"}, {**second, name: "b"})
    plain, scored = ({"tasks": {"lambada": {"items": 2, **more}}} for more in ({}, {"perplexities": summarise([9.0])}))
    for pair in ((first | plain, second | scored), (first | scored, second | plain)):
        assert add_seeds(*pair)["tasks"] == plain["tasks"]  # an earlier version kept no perplexity: that of some seeds is none of all
    for pair in (({**first, "bits": 1}, second), (first, {**second, "bits": 1})):
        with pytest.raises(UserError, match="both results must have the same fields, but bits are only in one of them"):
            add_seeds(*pair)
    known, unknown = ({"data": {"test": {"files": {"test": "e5"}, "altered": altered}}} for altered in (21, None))
    assert add_seeds(first | known, second | unknown)["data"] == add_seeds(first | unknown, second | known)["data"] == known["data"]
    more = add_seeds(first, {**second, "versions": {**second["versions"], "datasets": "5"}})
    assert more["versions"] == {"torch": "2.14, 2.15", "python": "3.11", "datasets": "5"}


@pytest.mark.parametrize(("recipe", "places"), [
    ("karm/mnist", [None, "image_generation", "image_generation"]), ("lm_top_k_100m/openstax", [None, "language_models", None]),
    ("kvit_s/cifar10", [None, "image_classification", "image_classification"]), ("lora_smollm2/openstax", [None, "textbooks", None]),
    ("lora_wide_smollm2/questions", ["questions", "questions", None]),
    ("karm/digits", [None] * 3),
])
def test_a_planned_recipe_has_a_place_where_no_other_data_set_has_it(recipe, places):
    assert [planned_experiment(recipe, profile) for profile in ("smoke", "desk", "paper")] == places


def test_the_command_adds_seeds_to_every_result_of_a_planned_recipe(monkeypatch, capsys, tmp_path):
    saved = []

    def save(folder, recipe, profile, source, summary):
        saved.append((folder, recipe, profile, source, getattr(summary, "func", summary).__name__))
        return tmp_path / folder, [0, 2]

    monkeypatch.setattr(evaluation, "save_finished", save)
    assert cli.main(["summarise", "lm_window_100m/openstax", "--source", "here", "--items", "hub", "--limit", "5"]) == 0
    assert saved == [(folder, "lm_window_100m/openstax", "desk", "here", summary) for folder, summary in (
        ("language_model_tasks", "evaluate_zero_shot"), ("language_models", "evaluate_language_models"),
        ("language_model_sinks", "evaluate_text_sinks"))]
    assert capsys.readouterr().out.splitlines() == [f"Result, with 2 seeds more: {tmp_path / folder}" for folder, *_ in saved]
    monkeypatch.setenv("HOME", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "save_finished", lambda folder, *_, source, **options: saved.append(source) or (folder, []))
        assert cli.main(["summarise", "convolution/cifar10", "--source=~/data"]) == 0 and saved.pop() == f"{tmp_path}/data"
    assert capsys.readouterr().out.startswith("Unchanged, since no other seed is finished: ")
    saved.clear()
    for recipe in ("residual/cifar10", "karm/mnist", "lora_wide_smollm2/openstax"):
        assert cli.main(["summarise", recipe]) == 0
    for recipe in ("lora_wide_smollm2/openstax", "lora_smollm2/questions"):
        assert cli.main(["summarise", recipe, "--items", "hub"]) == 0
    assert [(folder, summary) for folder, *_, summary in saved] == [
        ("image_classification", "evaluate_runs"), ("image_generation", "evaluate_generators"), ("textbooks", "evaluate_fine_tuning"),
        ("textbook_tasks", "evaluate_zero_shot"), ("textbooks", "evaluate_fine_tuning"),
        ("question_tasks", "evaluate_zero_shot"), ("questions", "evaluate_fine_tuning")]
    for arguments, message in (
            (["karm/fashion_mnist", "--source", "nowhere"], "source must be a file or folder that is there"),
            (["karm/minst"], "such as karm/mnist"),
            (["karm/mnist", "--items", "hub"], "items are for a language model"),
            (["lm_window_100m/openstax", "--items", "nowhere"], "items must be hub, local, or a folder that is there"),
            (["karm/mnist", "--profile", "smoke"], "no finished run of karm/mnist"),  # page 62 has karm/digits under this name
            (["karm/mnist", "--limit", "5"], "limit is for the items")):
        assert cli.main(["summarise", *arguments]) == 2 and message in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # where there is no plan
    assert cli.main(["summarise", "lm_window_100m/openstax", "--items", "hub"]) == 2
    assert f"{tmp_path}/results/plans is missing; the plans are part of the project" in capsys.readouterr().err
    assert cli.main(["summarise", "karm/mnist"]) == 2
    assert f"no finished run of karm/mnist under profile 'desk' in {tmp_path}/runs/desk/karm/mnist" in capsys.readouterr().err
