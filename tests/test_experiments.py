"""What an experiment page saves is the recipe it was passed, and the committed results are of today's recipes."""

import shutil

import pytest

from krause_repro.benchmarks import COST
from krause_repro.figures import figure_index
from krause_repro.recipes import get_recipe
from krause_repro.records import load_result, project_root, stale_recipes
from krause_repro.runner import run

EXPERIMENTS = {  # page: the recipes it is made from
    "30_particles": [get_recipe(name) for name in ("particles/circle", "particles/sphere")],
    "31_image_classification": [get_recipe(f"{name}/fashion_mnist") for name in ("kvit_t", "vit_t", "vit_t_post")],
    "36_cost": [COST],
}


def test_every_experiment_page_is_listed_here():
    assert {path.stem for path in project_root().glob("nbs/3*.ipynb")} == set(EXPERIMENTS)


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_committed_results_are_of_todays_recipes(page):
    result = load_result(page[3:], "desk")
    recipes = [recipe.at("desk") for recipe in EXPERIMENTS[page]]
    assert set(result["recipes"]) == {recipe.name for recipe in recipes} and stale_recipes(result, recipes) == []


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_a_page_saves_the_recipe_it_was_passed(page, tmp_path):
    shutil.copy(project_root() / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(project_root() / "nbs" / f"{page}.ipynb", tmp_path / "nbs")
    records = run(profile="smoke", train="missing", root=tmp_path, quiet=True)
    assert [record["status"] for record in records] == ["ok"], records
    saved = load_result(page[3:], "smoke", tmp_path)
    assert saved["profile"] == "smoke"
    assert saved["recipes"] == {recipe.name: recipe.at("smoke").to_dict() for recipe in EXPERIMENTS[page]}
    drawn = figure_index("smoke", tmp_path)
    assert drawn and {figure["notebook"] for figure in drawn} == {page} and {figure["profile"] for figure in drawn} == {"smoke"}
    assert not (tmp_path / "figures").exists()
