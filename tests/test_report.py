"""The report shows every published number, ours where it exists, and the README shows the committed results."""

import pytest

from krause_repro.recipes import get_recipe, published_tables
from krause_repro.records import project_root, save_result, summarise
from krause_repro.report import README_END, README_START, coverage, format_published, our_results, readme_results, report, update_readme


def test_every_published_number_is_in_the_report():
    text = report("desk")
    for table in published_tables().values():
        assert table["title"] in text
        for row in table["rows"]:
            for value in row:
                assert format_published(value) in text


def test_without_results_only_the_parameters_of_our_models_are_ours(tmp_path):
    assert our_results("paper", tmp_path) == {}
    assert coverage("paper", tmp_path)["ours"] == 26
    rows = [line for line in report("paper", tmp_path).splitlines() if line.startswith("| KViT-T |")]
    assert rows[0] == "| KViT-T | 93.81 | — | 5,362,774 | 5,362,774 | 0.25 | — |" and rows[-1] == "| KViT-T | 94.65 | — |"


def test_unknown_profiles_and_stale_results_are_refused(root_with_results):
    with pytest.raises(ValueError, match="profile must be one of smoke, desk, paper"):
        report("tset", root_with_results)
    recipe = get_recipe("kvit_t/fashion_mnist").at("desk")
    changed = {recipe.name: recipe.to_dict() | {"lr": 0.5}}
    save_result("image_classification", {"recipes": changed, "models": {}}, "desk", root_with_results)
    with pytest.raises(ValueError, match="stale.*kvit_t/fashion_mnist"):
        report("desk", root_with_results)


def one_model(label, values):
    accuracy = summarise(values)
    return {
        "label": label, "test_accuracy": accuracy, "held_out_accuracy": accuracy, "parameters": 123456, "paper": 94.65, "test_images": 10,
        "device": "CPU", "versions": {"torch": "0", "transformers": "0"},
    }


@pytest.fixture
def root_with_results(tmp_path):
    names = ("kvit_t/fashion_mnist", "vit_t/fashion_mnist", "vit_t_post/fashion_mnist")
    models = {name: one_model(name, [0.5 + i / 10, 0.6 + i / 10]) for i, name in enumerate(names)}
    save_result("image_classification", {"recipes": {}, "models": models}, "desk", tmp_path)
    return tmp_path


def test_our_numbers_stand_in_the_row_of_their_recipe(root_with_results):
    lines = report("desk", root_with_results).splitlines()
    ours = [line for line in lines if line.startswith("| KViT-T | 94.65 |")]
    assert ours == ["| KViT-T | 94.65 | 55.00 ± 7.07 (2 seeds) |"]
    before = coverage("desk", root_with_results / "elsewhere")
    after = coverage("desk", root_with_results)
    assert after["ours"] == before["ours"] + 2 and after["published"] == before["published"]


def test_update_readme_replaces_the_block_and_nothing_else(root_with_results):
    readme = root_with_results / "README.md"
    readme.write_text(f"before\n{README_START}\nold\n{README_END}\nafter\n", encoding="utf-8")
    update_readme(root_with_results)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{README_START}\n") and text.endswith(f"{README_END}\nafter\n")
    assert "old" not in text and "55.00 ± 7.07" in text
    update_readme(root_with_results)
    assert readme.read_text(encoding="utf-8") == text


def test_update_readme_needs_its_marks(root_with_results):
    readme = root_with_results / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the lines"):
        update_readme(root_with_results)
    assert readme.read_text(encoding="utf-8") == "nothing here\n"


def test_readme_shows_the_committed_desk_results():
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    block = text.split(README_START)[1].split(README_END)[0].strip()
    assert block == readme_results().strip()


def test_readme_links_and_pictures_exist():
    import re

    root = project_root()
    for target in re.findall(r"\]\(([^)#]+)\)", (root / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (root / target).is_file(), target
