"""What an experiment page saves is the recipe it was passed, and the committed results are of today's recipes."""

import shutil

import pytest

from krause_repro.figures import figure_index
from krause_repro.recipes import get_recipe
from krause_repro.records import load_result, project_root, stale_recipes
from krause_repro.runner import run

EXPERIMENTS = {
    "30_particles": ("particles/circle", "particles/sphere"),
    "31_image_classification": ("kvit_t/fashion_mnist", "vit_t/fashion_mnist", "vit_t_post/fashion_mnist"),
}


def test_every_experiment_page_is_listed_here():
    assert {path.stem for path in project_root().glob("nbs/3*.ipynb")} == set(EXPERIMENTS)


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_committed_results_are_of_todays_recipes(page):
    result = load_result(page[3:], "desk")
    recipes = [get_recipe(name).at("desk") for name in EXPERIMENTS[page]]
    assert set(result["recipes"]) == set(EXPERIMENTS[page]) and stale_recipes(result, recipes) == []


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_a_page_saves_the_recipe_it_was_passed(page, tmp_path):
    shutil.copy(project_root() / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    shutil.copy(project_root() / "nbs" / f"{page}.ipynb", tmp_path / "nbs")
    records = run(profile="smoke", train="missing", root=tmp_path, quiet=True)
    assert [record["status"] for record in records] == ["ok"], records
    saved = load_result(page[3:], "smoke", tmp_path)
    assert saved["profile"] == "smoke"
    assert saved["recipes"] == {name: get_recipe(name).at("smoke").to_dict() for name in EXPERIMENTS[page]}
    drawn = figure_index("smoke", tmp_path)
    assert drawn and {figure["notebook"] for figure in drawn} == {page} and {figure["profile"] for figure in drawn} == {"smoke"}
    assert not (tmp_path / "figures").exists()
