"""The report shows every published number and ours of the same quantity; README and RESULTS.md show the committed results."""

import json
import re
import shutil
import subprocess

import pytest

from krause_repro import claims, results
from krause_repro.claims import (
    CLAIMS,
    DOES_NOT_HOLD,
    HOLDS,
    IN_PART,
    NOT_SHOWN,
    UNDECIDED,
    claim_text,
)
from krause_repro.plans import PLANS, planned_difference, planned_results
from krause_repro.recipe_base import published_tables
from krause_repro.recipes import SINKS, get_recipe
from krause_repro.records import project_root
from krause_repro.report import (
    README_BLOCKS,
    README_RESULTS,
    RESULT_SECTIONS,
    block_marks,
    coverage,
    expected_results,
    fine_tuning_section,
    format_published,
    generation_section,
    missing_results,
    missing_table,
    our_results,
    report,
    results_page,
    update_readme,
)
from krause_repro.results import load_result, result_path, save_result
from krause_repro.sinks import sink_numbers, stored_sinks
from krause_repro.statistics import summarise


def test_every_published_number_is_in_the_report():
    text = report("desk")
    for table in published_tables().values():
        assert table["title"] in text
        for row in table["rows"]:
            for value in row:
                assert format_published(value) in text


def test_without_results_only_parameters_and_flops_are_ours(tmp_path):
    assert our_results("paper", tmp_path) == {}
    assert coverage("paper", tmp_path) == {"published": 218, "measured": 0, "counted": 52}
    text = report("paper", tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| KViT-T |")]
    assert rows[0] == "| KViT-T | 93.81 | 5,362,774 | 5,362,774 | 0.25 | 0.37 |" and rows[-1] == "| KViT-T | 94.65 |"
    assert all(table["title"] in text.splitlines()[0] for table in published_tables().values()) and "—" not in text


def test_generators_stand_beside_the_papers_once_they_are_trained(tmp_path):
    recipe, bits = get_recipe("karm/mnist"), summarise([0.56, 0.57])
    flat, falling = ({"held_out": {"epochs": [24, 30], "mean": [0.6 + fall, 0.6], "sd": [0, 0]}} for fall in (0, 0.02))
    result = {"recipes": {recipe.name: recipe.to_dict()}, "bits_per_dim": bits, "parameters": 9_809_760, "curves": flat}
    save_result("image_generation/karm", result, "paper", tmp_path)
    lines = [line for line in report("paper", tmp_path).splitlines() if line.startswith("| KARM |")]
    ours = "0.5650 ± 0.0071 (2 seeds; 9,809,760 parameters, 30 epochs)"
    assert lines == [f"| KARM | 0.5652 | {ours} | 105.6037 |", "| KARM | 3.0032 | 4.524 |"]
    twice = [line for line in report("paper", tmp_path).splitlines() if line.startswith("| KARM (W=128, k=96) |")]
    assert twice == [f"| KARM (W=128, k=96) | 0.5652 | {ours} |"] and coverage("paper", tmp_path)["measured"] == 2
    colour = get_recipe("larm/cifar10")
    result = {"recipes": {colour.name: colour.to_dict()}, "bits_per_dim": summarise([3.2]), "parameters": 52_274_432,
              "curves": falling}
    save_result("image_generation_colour/larm", result, "paper", tmp_path)
    assert "| LARM | 3.1836 | 3.2000 (1 seed; 52,274,432 parameters, 30 epochs, undertrained) | 14.4032 |" in report("paper", tmp_path)


def test_the_results_count_trained_generators(tmp_path):
    shutil.copytree(project_root() / "results" / "plans", tmp_path / "results" / "plans")
    text = generation_section(tmp_path)
    assert text.startswith("0 of 21 runs are finished") and "Not finished: KARM (Krause); ARM (softmax);" in text
    karm, bits = get_recipe("karm/mnist").at("desk"), {"order 1": {"bits_per_dim": 3.9, "bits_per_dim_all": 3.8}}
    save_result("image_generation/baselines", {"recipes": {karm.name: karm.to_dict()}, "bits": bits}, "desk", tmp_path)
    assert "| counts, bigram | 3.900 | 3.800 |" in generation_section(tmp_path)


def test_zero_shot_scores_stand_below_the_published_ones_with_their_items_and_sizes(tmp_path):
    assert "Not comparable number by number: our desk-size models" not in report("desk", tmp_path)
    recipe = get_recipe("lm_window_100m/openstax").at("desk")
    score = {"accuracies": summarise([0.53]), "standard_accuracies": summarise([0.5]), "stderr": 0.01, "chance": 0.5, "items": 2000}
    result = {"recipes": {recipe.name: recipe.to_dict()}, "tasks": {"blimp": score}, "parameters": 1500, "seeds": [0]}
    save_result("language_model_tasks/lm_window_100m", result, "desk", tmp_path)
    found = report("desk", tmp_path).split("### Language models from scratch, ~100M")[1].split("###")[0]
    assert "| model | seeds | BLiMP, 2,000 items |" in found and "| softmax, window, 1,500 parameters | 1 | 53.00 |" in found
    assert "by our recipes: Krause 102.4M, Window 83.5M" in found


def tuned(name, values):
    recipe, right = get_recipe(name).at("desk"), summarise([0.6] * len(values))
    before = {"token_loss": summarise([2.5]), "token_accuracy": summarise([0.4])}
    seeds = {"seeds": list(range(len(values))), "seconds": summarise([60.0] * len(values)),
             "curves": {"held_out": {"steps": [20, 25], "mean": [1.8, 1.7], "sd": [0, 0]}}}
    return {"recipes": {recipe.name: recipe.to_dict()}, **seeds, "token_loss": summarise(values), "token_accuracy": right,
            "before": before, "letter_accuracy": None, "letters": None, "steps": 25, "bf16": True, "trainable": 5, "frozen": 95,
            "parameters": 100}


def sinks_of(kinds):
    def told(near, far):
        return {key: {"all_layers": {"mean": value, "sd": 0.01, "n": 200}} for key, value in
                (("first_all", (31 * near + 96 * far) / 127), ("first_near", near), ("first_far", far))}

    flat = {"window": {"first_near": 0.1}, "past": {"first_near": 0.1, "first_all": 0.04}}
    return {"sinks": {kind: told(*values) for kind, values in kinds.items()}, "uniform": flat}


def test_the_results_show_what_is_tuned_and_the_answer_on_sinks(tmp_path):
    shutil.copytree(project_root() / "results" / "plans", tmp_path / "results" / "plans")
    text = fine_tuning_section(tmp_path)
    assert text.startswith("SmolLM2-135M-Instruct on questions: 0 of 15 runs are finished") and "Attention sinks" not in text
    for kind, values in (("lora", [1.6, 1.7, 1.8]), ("krause", [1.5, 1.6, 1.7])):
        save_result(f"questions/{kind}_smollm2", tuned(f"{kind}_smollm2/questions", values), "desk", tmp_path)
    text = fine_tuning_section(tmp_path)
    assert text.startswith("SmolLM2-135M-Instruct on questions: 6 of 15 runs are finished")
    assert "| LoRA | 5 | 1.700 ± 0.100 *(undertrained)* | 3 (seeds 0, 1, 2) |" in text
    assert "| LoRA + Krause branch − LoRA | 3 (seeds 0, 1, 2) | -0.100 | -0.100 to -0.100 | lower |" in text
    models = {"base": ("lora_smollm2/openstax", {"softmax": (0.6, 0.5)}),
              "krause_textbooks": ("krause_smollm2/openstax", {"softmax": (0.6, 0.5), "krause": (0.5, 0.0), "mixed": (0.6, 0.4)})}
    for file, (name, kinds) in models.items():
        recipes = {recipe.name: recipe.to_dict() for recipe in (SINKS.at("desk"), get_recipe(name).at("desk"))}
        save_result(f"sinks/{file}", {"recipes": recipes, **sinks_of(kinds)}, "desk", tmp_path)
    text = fine_tuning_section(tmp_path)
    assert "| branch after training on textbooks | 0.122 | 0.500 | present | 0.524 | 0.449 | present |" in text
    lines = report("desk", tmp_path).splitlines()
    assert "| Llama3-8B | 0.707 |" in lines and "| Krause-Llama3-8B (Krause branch) | 0.364 |" in lines
    assert ("Not comparable number by number: SmolLM2, 200 other passages of 128 tokens: 0.524 ± 0.010 for the base model, "
            "0.122 ± 0.010 for the Krause branch (± over passages, first seed).") in lines


def test_the_statement_on_speed_is_answered(tmp_path):
    rows = [{"pass": step, "name": name, "speed_ratio": ratio} for step, name, ratio in
            (("decode", "Krause", 0.8), ("decode", "Krause", 0.75), ("decode", "base", 1.0), ("prefill", "Krause", 0.5))]
    assert "Ours, not" not in report("desk", tmp_path)
    save_result("language_speed", {"rows": rows}, "desk", tmp_path)
    assert "decoding: with a branch 0.75 to 0.80 times the tokens per second of the base model." in report("desk", tmp_path)


def test_unknown_profiles_and_stale_results_are_refused(root_with_results):
    with pytest.raises(ValueError, match="profile must be one of smoke, desk, paper"):
        report("tset", root_with_results)
    recipe = get_recipe("kvit_s/cifar10").at("desk")
    changed = {"recipes": {recipe.name: recipe.to_dict() | {"lr": 0.5}}}
    save_result("image_classification/kvit_s", changed | one_model([0.5]), "desk", root_with_results)
    with pytest.raises(ValueError, match="stale: it was not made with today's kvit_s/cifar10"):
        report("desk", root_with_results)


def one_model(values):
    accuracy = summarise(values)
    return {
        "test_accuracy": accuracy, "held_out_accuracy": accuracy, "parameters": 123456, "paper": 95.35, "test_images": 10,
        "seeds": list(range(len(values))), "seconds": summarise([60.0] * len(values)),
        "curves": {"epochs": [1, 4], "validation_accuracy": {"mean": [0.5, 0.5], "sd": [0, 0]}},
    }


@pytest.fixture
def root_with_results(tmp_path):
    for i, model in enumerate(("kvit_s", "vit_s")):
        recipe = get_recipe(f"{model}/cifar10").at("desk")
        result = {"recipes": {recipe.name: recipe.to_dict()}, **one_model([0.5 + i / 10, 0.6 + i / 10])}
        save_result(f"image_classification/{model}", result, "desk", tmp_path)
    band = {"case": "a case", "batch": 1, "heads": 2, "dim": 8, "length": 3072, "window": 256, "top_k": None}
    ratios = {"forward": 0.123, "forward + backward": 0.456}
    rows = [{**band, "name": "banded, C++", "pass": step, "ratio": ratio} for step, ratio in ratios.items()]
    images = [{"case": "S", "pass": "forward", "name": "KViT", "ratio": 0.8}]
    dense = {**band, "name": "dense reference", "pass": "forward + backward", "ratio": 9, "seconds": 20}
    rows = [*({**row, "seconds": 0.5} for row in rows), dense]
    lengths = [{"sweep": "length", "name": "banded, C++", "length": length, "pass": step, "seconds": seconds, "peak_bytes": 2.5e6}
               for length, seconds in ((4096, 0.1), (32768, 0.82)) for step in ratios]
    result = {"recipes": {}, "attention": {"rows": rows}, "images": {"rows": images}, "scaling": {"rows": lengths}}
    save_result("cost", result, "desk", tmp_path)
    return tmp_path


@pytest.fixture
def committed(tmp_path):
    "The committed results, which a test may damage, and a README to fill."
    shutil.copytree(project_root() / "results", tmp_path / "results")
    (tmp_path / "README.md").write_text(empty_readme(), encoding="utf-8")
    return tmp_path


def empty_readme():
    return "before\n" + "\n".join("\n".join([block_marks(name)[0], "old", block_marks(name)[1], "between"]) for name in README_BLOCKS)


def test_our_numbers_stand_in_the_row_of_their_recipe(root_with_results):
    lines = report("desk", root_with_results).splitlines()
    ours = [line for line in lines if line.startswith("| KViT-S |")]
    assert ours[0] == "| KViT-S | 95.2 | 55.00 ± 7.07 (2 seeds; 123,456 parameters, 20 epochs) | 21,342,358 | 21,342,358 | 0.97 | 1.42 |"
    before = coverage("desk", root_with_results / "elsewhere")
    after = coverage("desk", root_with_results)
    assert after == before | {"measured": 4}


def test_update_readme_replaces_the_blocks_and_writes_the_results(committed, root_with_results):
    readme, tables = committed / "README.md", committed / "RESULTS.md"
    update_readme(committed)
    text, page = readme.read_text(encoding="utf-8"), tables.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{block_marks('verdicts')[0]}\n") and text.endswith(f"{block_marks('claims')[1]}\nbetween")
    assert "\nold\n" not in text and text.count("between") == len(README_BLOCKS)
    assert "55.00 ± 7.07" in page and re.findall("^## (.*)", page, re.MULTILINE) == list(RESULT_SECTIONS)
    assert "| 1 × 2 × 8 | 3,072 | 256 | — | 0.12 | 0.46 | — | — |" in page and "KViT processes 1.25 times as many images per second" in page
    assert "takes 40 times as long" in page and "8.2 times the time forward, 8.2 forward + backward" in page and "gradients: 2.5 MB" in page
    update_readme(committed)
    assert readme.read_text(encoding="utf-8") == text and tables.read_text(encoding="utf-8") == page


def test_every_committed_result_is_expected_and_what_the_readme_shows_is_there():
    folder = project_root() / "results" / "desk"
    committed = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json")}
    missing = {name for names in missing_results("desk").values() for name in names}
    assert committed | missing == set(expected_results("desk")) and not committed & missing
    assert {name.partition("/")[0] for name in missing} <= {
        "image_classification", "image_generation", "questions", "textbooks", "question_tasks", "textbook_tasks", "language_models",
        "language_model_sinks", "language_model_tasks", "language_model_speed"}  # trained or measured one by one
    text = missing_table("desk")
    assert text.startswith(f"{len(committed)} of {len(expected_results('desk'))} result files exist under the desk profile.")


def test_the_readme_needs_the_results_that_it_opens(monkeypatch):
    opened, read = set(), results.read_json
    monkeypatch.setattr(results, "read_json", lambda path, remedy: opened.add(path) or read(path, remedy))
    for make in (*README_BLOCKS.values(), results_page):
        make()
    planned = {*(folder for folder, _ in PLANS.values()), "language_model_tasks", "question_tasks", "textbook_tasks"}  # made one by one
    folders = {path.relative_to(project_root() / "results" / "desk").with_suffix("").parts[0] for path in opened}
    assert folders - planned == set(README_RESULTS)


def planned_runs(root, plan, values):
    "Results of every model of a plan with all seeds; by recipe name: one number a seed."
    folder, field = PLANS[plan][0], PLANS[plan][1].field
    for name in planned_results(plan, root)[0]["models"]:
        recipe, numbers = get_recipe(name).at("desk"), summarise(values.get(name, [0.5, 0.51, 0.52]))
        flat = {"mean": [0.7, 0.7], "sd": [0, 0]}
        curves = {"epochs": [1, 20], "validation_accuracy": flat} if plan == "cifar10" else {"held_out": {"epochs": [1, 20], **flat}}
        result = {"recipes": {name: recipe.to_dict()}, field: numbers, "seeds": [0, 1, 2], "curves": curves, "parameters": 7}
        save_result(f"{folder}/{name.partition('/')[0]}", result, "desk", root)


@pytest.mark.parametrize(("plan", "claim", "values", "verdict"), [
    ("cifar10", "accuracy", {"kvit_s/cifar10": [0.55, 0.561, 0.57]}, HOLDS),
    ("cifar10", "accuracy", {"kvit_s/cifar10": [0.45, 0.461, 0.47]}, DOES_NOT_HOLD),
    ("cifar10", "accuracy", {}, NOT_SHOWN),
    ("cifar10", "parts", {"kvit_s/cifar10": [0.55, 0.561, 0.57]}, IN_PART),
    ("cifar10", "parts", {"kvit_s/cifar10": [0.45, 0.461, 0.47]}, DOES_NOT_HOLD),
    ("cifar10", "parts", {}, NOT_SHOWN),
    ("mnist", "bits", {"karm/mnist": [0.45, 0.461, 0.47]}, HOLDS),
    ("mnist", "bits", {"karm/mnist": [0.55, 0.561, 0.57]}, DOES_NOT_HOLD),
    ("mnist", "bits", {"arm/mnist": [0.55, 0.561, 0.57]}, IN_PART),
    ("mnist", "bits", {}, NOT_SHOWN),
    ("textbooks", "fine_tuning", {}, NOT_SHOWN),
    ("textbooks", "fine_tuning", {"krause_smollm2/openstax": [0.45, 0.461, 0.47]}, IN_PART),
    ("questions", "fine_tuning", {"krause_smollm2/questions": [0.45, 0.461, 0.47]}, IN_PART),
    ("textbooks", "fine_tuning", {f"krause_{kind}smollm2/openstax": [0.55, 0.561, 0.57] for kind in ("", "near_base_")}, DOES_NOT_HOLD),
])
def test_a_verdict_follows_from_the_plan_once_its_seeds_are_finished(committed, monkeypatch, plan, claim, values, verdict):
    monkeypatch.setattr(results, "table_lines", lambda folder: [])  # of all results, for each that is saved
    for each in ("questions", "textbooks") if claim == "fine_tuning" else (plan,):  # claim 10 has two plans
        planned_runs(committed, each, values)
    assert CLAIMS[claim].judge(committed).verdict == verdict
    assert "finished so far" not in claim_text(claim, committed)
    measure, (found, grid) = PLANS[plan][1], planned_results(plan, committed)
    first, second = found["comparisons"][0]
    assert planned_difference(found, {**grid, second: None}, first, second, measure) is None
    part = {**grid[first], "seeds": [0, 1], measure.field: summarise([0.1, 0.2])}
    assert not planned_difference(found, {**grid, first: part}, first, second, measure)["finished"]


def test_claims_say_what_is_not_tested_and_when_thresholds_were_fixed(committed):
    for folder, _ in PLANS.values():
        shutil.rmtree(committed / "results" / "desk" / folder, ignore_errors=True)
    verdicts = {name: claim.judge(committed).verdict for name, claim in CLAIMS.items()}
    untested = [name for name, verdict in verdicts.items() if verdict == UNDECIDED]
    assert untested == ["accuracy", "parts", "heads", "bits", "fine_tuning", "from_scratch"]
    assert len(CLAIMS) == 12
    page = json.loads((project_root() / "nbs" / "68_claims.ipynb").read_text(encoding="utf-8"))
    named = re.findall(r"commit `([0-9a-f]{7})`", "\n".join("".join(cell["source"]) for cell in page["cells"]))

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True, check=False)
        return done.stdout.split() if done.returncode == 0 else []

    if git("cat-file", "-t", "955f128") == ["commit"]:  # else a shallow clone, or none
        plans = (f"results/plans/{plan}.json" for plan in PLANS)
        first = {git("log", "--format=%h", "--abbrev=7", "--", plan)[-1] for plan in plans}
        assert len(named) == 9 and first | {"955f128"} == set(named)


def test_a_missing_result_is_an_error_of_the_readme_and_a_line_of_the_report(committed):
    for name in [name for name in expected_results("desk") if name.partition("/")[0] in README_RESULTS]:
        path = result_path(name, "desk", committed)
        kept = path.rename(committed / "kept.json")
        with pytest.raises(FileNotFoundError, match=rf"{path} \(make: make figures PROFILE=desk ONLY=6\d TRAIN=missing\)$"):
            update_readme(committed)
        assert (committed / "README.md").read_text(encoding="utf-8") == empty_readme()
        assert any(name in line and "| `make figures PROFILE=desk ONLY=6" in line for line in missing_table("desk", committed).splitlines())
        kept.rename(path)


def put(value, place, new):
    "Change what is at a place such as 'models.a.mean' in nested objects and lists; `None` for `new` takes it out."
    *path, last = [int(part) if part.isdigit() else part for part in place.split("|")]
    for part in path:
        value = value[part]
    if new is None:
        del value[last]
    else:
        value[last] = new


DAMAGE = {  # file, place, what is put there (None: it is taken out), what the message says of it
    "NaN": ("image_classification/kvit_s", "test_accuracy|mean", float("nan"), "test_accuracy.mean"),
    "infinity": ("cost", "attention|rows|0|ratio", float("inf"), "attention.rows[0].ratio is inf"),
    "missing field": ("language_speed", "rows|2|speed_ratio", None, "has no field rows[2].speed_ratio"),
    "missing part": ("generation_speed", "rows", None, "has no field rows"),
    "number for a summary": ("image_classification/kvit_s", "test_accuracy", 0.8, "test_accuracy must be a summary in 0…1, got 0"),
    "text for a number": ("textbooks/lora_smollm2", "token_loss|mean", "1.5", "token_loss must be a summary"),
    "empty list": ("cost", "scaling|rows", [], "scaling.rows must be a list of objects, got []"),
    "a value too few": ("image_generation_colour/karm", "bits_per_dim|values|0", None, "bits_per_dim must be a number or a summary"),
    "another mean": ("image_classification/residual", "test_accuracy|mean", 0.99, "must have the mean and standard deviation"),
    "a seed too few": ("image_classification/kvit_s", "seeds|0", None, "must have a value of test_accuracy for each of the seeds"),
    "a time too few": ("image_classification/kvit_s", "curves|epochs|0", None, "curves must have 19 points in"),
    "object for a list": ("cost", "images|rows", {"ratio": 1}, "images.rows must be a list of objects"),
    "one quartile": ("language_speed", "rows|0|ratio_quartiles|0", None, "rows[0].ratio_quartiles must be two numbers"),
    "layers of different numbers": ("sinks/krause_textbooks", "sinks|krause|first_all|sd", [0.1], "sinks.krause.first_all must be"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_field_is_named_with_its_file_and_the_readme_stays(committed, kind):
    name, place, new, message = DAMAGE[kind]
    path = result_path(name, "desk", committed)
    result = json.loads(path.read_text(encoding="utf-8"))
    put(result, place, new)
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        update_readme(committed)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "delete it and make it again with: make figures PROFILE=desk ONLY=6" in str(caught.value)
    assert (committed / "README.md").read_text(encoding="utf-8") == empty_readme()


@pytest.mark.parametrize("text", [
    b"", b"[]", b"3", b'{"a": 1}', b'{"profile": "desk", "rec', b"\xff\xfe{\0}\0", b'{"\xe9": 1}', b"[" * 100_000,
], ids=["empty", "list", "number", "other", "cut", "utf-16", "latin-1", "deep"])
@pytest.mark.parametrize("name", ["cost", "sinks/base"])
def test_a_damaged_file_is_named(committed, name, text):
    path = result_path(name, "desk", committed)
    path.write_bytes(text)
    for read in (load_result, lambda name, profile, root: update_readme(root)):
        with pytest.raises(ValueError, match=f"^{path} "):
            read(name, "desk", committed)
    assert (committed / "README.md").read_text(encoding="utf-8") == empty_readme()


@pytest.mark.parametrize("text", ["nothing here\n", "end first\n" + "\n".join(reversed(empty_readme().splitlines())), empty_readme() * 2])
def test_update_readme_needs_its_marks(committed, text):
    readme = committed / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="must contain the lines"):
        update_readme(committed)
    assert readme.read_text(encoding="utf-8") == text


def test_readme_and_results_show_the_committed_desk_results():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    for name, make in README_BLOCKS.items():
        start, end = block_marks(name)
        before, rest = text.split(start)
        block, after = rest.split(end)
        assert block.strip() == make().strip()
        text = before + after
    assert (project_root() / "RESULTS.md").read_text(encoding="utf-8") == results_page()
    typed = re.sub(r"```.*?```|\]\(.*?\)|arXiv [\d.]+|Apache-2.0|Python [\d.]+", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+|\d+ ?%", typed) == ["95%"]  # every other number is generated


def test_what_the_readme_says_of_the_window_follows_from_the_results():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    assert "KViT is not shown to be more accurate than the paper's pre-norm ViT and is less accurate than a post-norm ViT;" in text
    assert claims.on_cifar10()[-1]["verdict"] == DOES_NOT_HOLD
    assert claims.part_effects()[1] == {"distance": "not shown", "top-k": "harms"}
    assert claims.judged()["accuracy"].verdict == NOT_SHOWN
    window = {pair: found["mean"] for pair, found in claims.planned_differences("mnist_window", None)[2].items()}
    assert 0 > window["karm/mnist", "arm_window/mnist"] > claims.on_mnist()[2]["arm"]["mean"] / 2
    assert claims.planned_differences("mnist_window", None)[2]["karm_no_top_k/mnist", "arm_window/mnist"]["verdict"] == NOT_SHOWN
    assert "windowed softmax as fast" in claims.judged()["linear"].ours
    assert all(numbers["cut"] <= numbers["branch"] for numbers in sink_numbers(stored_sinks("desk"), SINKS.at("desk")).values())


def test_readme_is_short():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    table = text.split(block_marks("claims")[0])[1].split(block_marks("claims")[1])[0].strip().splitlines()
    long = [cell for row in table[4:] for cell in row.strip("|").split("|") if len(cell.split()) > 14]
    assert len(table) == 4 + len(CLAIMS) and not long
    findings = text.split(block_marks("findings")[0])[1].split(block_marks("findings")[1])[0].strip().splitlines()
    assert len(findings) == 5 and all(re.search(r" to |±", line) and "Caveat: " in line for line in findings)


def test_readme_links_and_pictures_exist():
    root = project_root()
    for target in re.findall(r"\]\(([^)#]+)\)", (root / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (root / target).is_file(), target
