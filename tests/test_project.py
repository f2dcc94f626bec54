"""The project as a package: modules are what the notebooks export, metadata has one source, the commands exist."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest
from mutations import FAULTS, place_of

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def contents(folder):
    "Every file of the book and the library below a folder, with its bytes."
    paths = [path for part in ("nbs", "krause_repro") for path in (folder / part).rglob("*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths
            if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def copy_project(target):
    "Copy what nbdev reads and writes."
    for part in ("nbs", "krause_repro"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)


def run_in(folder, home, *command):
    "Run a command of this environment in a folder, with a home and settings of its own."
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("NBDEV", "PYTHONPATH"))}
    environment = {**variables, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "XDG_CACHE_HOME": str(home / ".cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(before, after):
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def test_export_and_clean_change_nothing_but_what_was_edited_by_hand(tmp_path):
    project, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_project(project)
    before, module = contents(project), project / "krause_repro" / "runner.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nedited_by_hand = True\n", encoding="utf-8")
    assert changed(before, contents(project)) == ["krause_repro/runner.py"]
    run_in(project, home, BIN / "nbdev_export")
    assert changed(before, contents(project)) == []
    run_in(project, home, BIN / "nbdev_clean")
    assert changed(before, contents(project)) == []


def test_requirements_are_those_the_book_runs_on(settings):
    required = {re.match(r"[A-Za-z0-9._-]+", item).group(): item for item in settings["requirements"].split()}
    needed = {"torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "scipy", "matplotlib",
              "nbdev", "execnb", "fastcore", "papermill", "nbformat", "nbclient", "nbconvert", "ipykernel", "jupyter",
              "jupyter-server-mathjax", "tqdm"}
    assert needed - set(required) == set()
    assert [required[name] for name in ("nbdev", "execnb", "fastcore")] == ["nbdev>=2.4.14,<3", "execnb<0.2", "fastcore>=1.14.5,<2"]
    assert {re.match(r"[A-Za-z0-9._-]+", item).group() for item in settings["dev_requirements"].split()} >= {"pytest", "ruff"}


def test_the_lock_has_one_version_with_digests_for_every_requirement(settings):
    from packaging.requirements import Requirement

    blocks = re.findall(r"^(\S.*?)(?=^\S|\Z)", (ROOT / "requirements-lock.txt").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    locked = {}
    for block in (block for block in blocks if not block.startswith("#")):
        pin = Requirement(block.split("\\")[0].strip())
        locked.setdefault(pin.name.lower().replace("_", "-"), []).append(pin)
        assert "--hash=sha256:" in block and [each.operator for each in pin.specifier] == ["=="], pin
    environment = {"python_version": settings["min_python"], "python_full_version": f"{settings['min_python']}.0"}
    for item in " ".join(settings[f"{kind}requirements"] for kind in ("", "dev_", "eval_")).split():
        wanted = Requirement(item)
        (pin,) = (each for each in locked[wanted.name] if each.marker is None or each.marker.evaluate(environment))
        (version,) = (each.version for each in pin.specifier)
        assert wanted.specifier.contains(version), f"{item}, locked: {version}"


def test_settings_keep_the_tag_that_papermill_looks_for(settings):
    assert "tags" in settings["allowed_cell_metadata_keys"].split()
    assert settings["nbs_path"] == "nbs" and settings["lib_path"] == "krause_repro"


def test_code_and_data_are_built_into_the_package(tmp_path):
    assert files("krause_repro").joinpath("published.json").is_file()
    copy_project(tmp_path / "project")
    run_in(tmp_path / "project", tmp_path, sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built"))
    library = tmp_path / "built" / "krause_repro"
    built = {path.name for path in library.iterdir()}
    assert built >= {path.name for path in (ROOT / "krause_repro").glob("*.py")} | {"published.json"}
    for folder in ("csrc", "templates", "templates/interactive", "tasks", "tasks/items"):
        names, copied = ({path.name for path in (top / folder).iterdir() if path.is_file()} for top in (ROOT / "krause_repro", library))
        assert names and copied == names


def test_the_command_is_installed(settings):
    (script,) = entry_points(group="console_scripts", name="krause-repro")
    assert script.value == "krause_repro.cli:main"
    assert settings["console_scripts"] == "krause-repro=krause_repro.cli:main"
    assert callable(script.load())


def test_version_is_stated_once(settings):
    from importlib.metadata import version

    import krause_repro

    assert krause_repro.__version__ == settings["version"] == version("krause_repro")


def test_the_package_says_what_is_where_in_reading_order():
    import krause_repro

    listed = re.findall(r"`([a-z_]+)`", krause_repro.__doc__.replace("`krause_attention`", ""))
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "krause_repro").glob("[!_]*.py"))


def test_the_package_exports_the_attention_and_imports_it_lazily():
    count = "import sys, krause_repro; print(len({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", count], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "0\n"
    import krause_repro

    assert set(krause_repro.__all__) == {
        "CausalWindow", "Full", "GridWindow", "KrauseAttention", "create_model", "krause_attention", "list_models"}
    for name in krause_repro.__all__:
        assert getattr(krause_repro, name).__name__ == name and name in dir(krause_repro)
    with pytest.raises(AttributeError, match="has no attribute 'CausalWindwo'"):
        _ = krause_repro.CausalWindwo


def test_auto_classes_know_the_models_once_the_package_is_imported(monkeypatch):
    "And import them only when they are asked for: here in a second copy of Transformers' module, which nobody has imported yet."
    import krause_repro

    finder = krause_repro._Registration()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert finder.find_spec("transformers.models.auto") is None and finder in sys.meta_path
    spec = finder.find_spec("transformers.models.auto.configuration_auto")
    assert finder not in sys.meta_path
    auto = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(auto)
    late = auto.CONFIG_MAPPING._extra_content
    assert "krause_swin" in auto.CONFIG_MAPPING and not list(late) and "nothing" not in auto.CONFIG_MAPPING
    monkeypatch.setattr(krause_repro, "import_module", lambda name: late.__setitem__("krause_swin", name))
    assert auto.CONFIG_MAPPING["krause_swin"] == "krause_repro.swin"


def test_every_model_type_is_registered_by_its_module():
    from transformers import AutoConfig, PreTrainedConfig

    import krause_repro

    for model_type, module in krause_repro._MODELS.items():
        importlib.import_module(f"krause_repro.{module}")
        assert AutoConfig.for_model(model_type).model_type == model_type
    ours, rest = set(), [PreTrainedConfig]
    while rest:
        rest += (kind := rest.pop()).__subclasses__()
        ours |= {kind.model_type} if kind.__module__ in {f"krause_repro.{module}" for module in krause_repro._MODELS.values()} else set()
    assert {name for name in ours if name.startswith("krause")} == set(krause_repro._MODELS)


PAGES = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = {path.stem[3:]: ROOT / "krause_repro" / f"{path.stem[3:]}.py" for path in PAGES
           if (ROOT / "krause_repro" / f"{path.stem[3:]}.py").is_file()}  # in the order of their notebooks
LIMIT_MODULE, LIMIT_FUNCTION, LIMIT_CELL = 600, 60, 60  # lines


def imports_of(path):
    "The modules of this package that a module imports, inside of functions, too."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = ("krause_repro." if node.level else "") + (node.module or "")
            if package.rstrip(".") == "krause_repro":
                yield from (alias.name for alias in node.names if alias.name in MODULES)
            elif package.startswith("krause_repro."):
                yield package.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("krause_repro."))


def test_modules_import_only_from_earlier_notebooks_so_there_is_no_circle():
    order = list(MODULES)
    later = [(name, other) for name, path in MODULES.items() for other in imports_of(path) if order.index(other) >= order.index(name)]
    assert later == []


def test_no_module_and_no_function_is_too_long():
    long = []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LIMIT_MODULE:
            long.append((name, len(text.splitlines())))
        long += [(f"{name}.{node.name}", node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LIMIT_FUNCTION]
    assert long == []


def test_no_cell_is_too_long():
    long = {}
    for path in PAGES:
        lengths = [len("".join(cell["source"]).splitlines()) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        if max(lengths) > LIMIT_CELL:
            long[path.stem[3:]] = max(lengths)
    assert long == {}


def test_continuous_integration_tests_and_walks_the_path():
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-2:] == ["make test", "make figures PROFILE=smoke"]
    assert os.access(script, os.X_OK)


def make(*arguments):
    "The commands that make would run."
    command = ["make", "-n", "-o", ".venv/.installed", "VENV=.venv", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "krause-repro" in line or "pytest" in line]


@pytest.mark.parametrize(("arguments", "commands"), [
    ([], ["data fashion_mnist", "run --profile 'smoke'"]),
    (["figures", "PROFILE=desk", "ONLY=61", "TRAIN=missing"],
     ["data fashion_mnist", "run --profile 'desk' --only '61' --train 'missing'"]),
    (["figures", "PROFILE=desk"], ["run --profile 'desk'"]),
    (["book", "ONLY=61"], ["book --only '61'"]),
    (["site", "PROFILE=desk"], ["site --profile 'desk'"]),
])
def test_make_passes_its_settings_on(arguments, commands):
    assert [line.split("krause-repro ", 1)[1].strip() for line in make(*arguments)] == commands


def test_make_help_lists_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = ["figures", "book", "test", "test-thorough", "test-latest", "site", "pdf", "lock", "help"]
    assert re.findall(r"^  ([a-z-]+) ", text, re.MULTILINE) == targets


def test_every_committed_figure_is_made_by_a_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nbs").glob("*.ipynb"))
    names = {path: re.sub("^(questions|textbooks)_", "{data}_", path.stem) for path in (ROOT / "figures").iterdir()}  # made in a loop
    assert [path.name for path, name in names.items() if f'\\"{name}\\"' not in pages] == []


def test_nothing_chooses_a_backend_that_hides_figures():
    for path in (ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "krause_repro" / "runner.py"):
        assert "MPLBACKEND" not in path.read_text(encoding="utf-8")


def test_what_a_run_makes_is_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv*/", "runs/", "results/smoke/"} <= set(ignored)


def test_every_fault_that_tests_must_find_still_has_its_place():
    assert all(place_of(ROOT, fault).is_file() for fault in FAULTS)
