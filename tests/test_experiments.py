"""What an experiment page saves is the recipe it was passed, and the committed results are of today's recipes."""

import json
import shutil

import pytest

from krause_repro import image_data, image_recipes
from krause_repro.drawing import figure_files, read_figure
from krause_repro.evaluation import CLASSIFIER_LABELS
from krause_repro.flops import COUNTED
from krause_repro.generation_evaluation import GENERATOR_LABELS
from krause_repro.generation_recipes import GENERATORS
from krause_repro.language_recipes import LM_DATASET_BY_PROFILE, LM_MIXERS_BY_PROFILE
from krause_repro.plans import read_plan
from krause_repro.recipes import COST, GENERATION_SPEED, LANGUAGE_SPEED, SINKS, TEXT_SPEED, get_recipe
from krause_repro.records import project_root
from krause_repro.report import expected_results
from krause_repro.results import load_result, result_page, result_path, stale_recipes
from krause_repro.sinks import sink_models


def generator_files(data):
    files = {f"image_generation/{model}": [get_recipe(f"{model}/{data}")] for model in GENERATOR_LABELS}
    return files | {"image_generation/baselines": [get_recipe(f"karm/{data}")], "generation_speed": [GENERATION_SPEED]}


def fine_tuning_files(profile):
    sinks = {f"sinks/{file}": [SINKS, get_recipe(recipe.name)] for file, (_, recipe) in sink_models(profile).items()}
    plans = planned_files("questions", "questions_at_base") | planned_files("textbooks", "textbooks_at_base")
    scores = {f"{folder}/{arm}_smollm2": [get_recipe(f"{arm}_smollm2/{data}")] for folder, data in
              (("question_tasks", "questions"), ("textbook_tasks", "openstax")) for arm in ("lora", "krause")}
    return plans | scores | sinks | {"language_speed": [LANGUAGE_SPEED], "textbook_tasks/base": [get_recipe("lora_smollm2/openstax")]}


def cifar_files():
    plan = read_plan("cifar10")
    names = [*plan["models"], *(name for name in plan["baselines"] if "/" in name), "residual/cifar10"]
    files = {f"image_classification/{name.partition('/')[0]}": [get_recipe(name)] for name in names}
    return files | {"image_classification/nearest_neighbours": [get_recipe("softmax_regression/cifar10")]}


def planned_files(folder, plan):
    "Files of the models of a plan, trained one at a time."
    return {f"{folder}/{name.partition('/')[0]}": [get_recipe(name)] for name in read_plan(plan)["models"]}


def language_model_files(profile):
    names = [f"lm_{mixer}_100m" for mixer in LM_MIXERS_BY_PROFILE[profile]]
    data = LM_DATASET_BY_PROFILE[profile]
    folders = ("language_models", "language_model_sinks", "language_model_tasks")
    return {f"{folder}/{name}": [get_recipe(f"{name}/{data}")] for folder in folders for name in names} | {
        "language_models/kneser_ney": [get_recipe(f"lm_krause_100m/{data}")], "language_model_speed": [TEXT_SPEED]}


TRIO = [get_recipe(f"{name}/fashion_mnist") for name in ("kvit_t", "vit_t", "vit_t_post")]
ON_WINDOW = get_recipe("softmax_t_local_top_k/fashion_mnist")
TRAINED_ONE_BY_ONE = ("image_classification/", "image_generation/", "question", "textbook", "language_model")  # beginnings of files
EXPERIMENTS = {  # page: its files of results under desk, and the recipes each is made from
    "60_particles": {"particles": [get_recipe(name) for name in ("particles/circle", "particles/sphere")]},
    "61_image_classification": cifar_files() | {"training_speed": [get_recipe(name) for name in CLASSIFIER_LABELS["desk"]]},
    "62_image_generation": generator_files("mnist") | {
        f"image_generation_colour/{model}": [get_recipe(f"{model}/photograph_tiles")] for model in GENERATORS
    },
    "63_llm_finetuning": fine_tuning_files("desk"),
    "64_language_modelling": language_model_files("desk"),
    "65_ablations": {},  # reads the results of page 61
    "66_cost": {"cost": [COST], "counting": [get_recipe(name) for name in COUNTED], "training_profile": TRIO[:1]},
    "67_attention_maps": {"attention_maps": TRIO, "attention_maps/untrained": [*TRIO, ON_WINDOW]},
    "68_claims": {},  # reads the results of the others
}


def test_every_experiment_page_is_listed_here():
    assert {path.stem for path in project_root().glob("nbs/6*.ipynb")} == set(EXPERIMENTS)


def test_the_results_of_the_pages_are_those_that_are_expected():
    assert sorted(file for files in EXPERIMENTS.values() for file in files) == sorted(expected_results("desk"))
    assert all(result_page(file) == page[:2] for page, files in EXPERIMENTS.items() for file in files)


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_committed_results_are_of_todays_recipes(page):
    for file, recipes in EXPERIMENTS[page].items():
        if file.startswith(TRAINED_ONE_BY_ONE) and not result_path(file, "desk").is_file():
            continue  # the page counts what is finished
        recipes, result = [recipe.at("desk") for recipe in recipes], load_result(file, "desk")
        assert set(result["recipes"]) == {recipe.name for recipe in recipes} and stale_recipes(result, recipes) == []


def execute_here(path, **parameters):
    "Execute a page in this process, which has imported everything."
    names = {"display": lambda *shown: None}  # as in a kernel
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def test_a_page_saves_the_recipes_it_was_passed(tmp_path, monkeypatch, source):
    page = "61_image_classification"  # one for all: `make figures PROFILE=smoke` executes every page
    shutil.copy(project_root() / "settings.ini", tmp_path)
    shutil.copytree(project_root() / "results" / "plans", tmp_path / "results" / "plans")
    path = project_root() / "nbs" / f"{page}.ipynb"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_data, "find_source", lambda name, folder: source)
    for setting, small in (("train_images", 128), ("held_out", 16), ("test_images", 16)):
        monkeypatch.setitem(image_recipes.SMOKE, setting, small)
    execute_here(path, profile="smoke", train="missing")
    saved = [load_result(f"image_classification/{recipe.name.partition('/')[0]}", "smoke", tmp_path) for recipe in TRIO]
    assert all(result["profile"] == "smoke" for result in saved)
    assert [result["recipes"] for result in saved] == [{recipe.name: recipe.at("smoke").to_dict()} for recipe in TRIO]
    files = [path.read_text(encoding="utf-8") for path in result_path("image_classification/any", "smoke", tmp_path).parent.glob("*.json")]
    assert len(files) == 5 and not any("cifar10" in name for text in files for name in json.loads(text)["recipes"])  # a newcomer has none
    drawn = [read_figure(png) for png in figure_files("smoke", tmp_path)]
    assert drawn and {figure["notebook"] for figure in drawn} == {page} and {figure["profile"] for figure in drawn} == {"smoke"}
    assert not (tmp_path / "figures").exists()
