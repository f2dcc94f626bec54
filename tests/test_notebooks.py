"""The form of the book: what every page must have, what none may, and that the modules keep to the layers."""
import ast
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

from cases import over

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(path for path in (ROOT / "krause_repro").glob("*.py") if not path.name.startswith("_"))
EXPORTED = {path.stem for path in MODULES}
NUMBERS = {path.stem[3:]: path.stem[:2] for path in PAGES}
OWN_CLASSES = {node.name for path in MODULES for node in ast.parse(path.read_text(encoding="utf-8")).body
               if isinstance(node, ast.ClassDef)}
PRIVATE_PATH = re.compile(r"(?<![\w.~-])/(?:work|home|root|tmp|mnt|Users)/")


each_page, each_module = over("path", PAGES), over("path", MODULES)


@cache
def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def output_texts(cell):
    "The readable parts of a cell's outputs; images are not text."
    for output in cell["outputs"]:
        yield "".join(output.get("text", []))
        yield "\n".join(output.get("traceback", []))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield data if isinstance(data, str) else "".join(map(str, data))


def test_every_page_is_numbered_in_a_known_group():
    assert PAGES
    assert [path.name for path in PAGES if not re.fullmatch(r"[0-8]\d_[a-z][a-z0-9_]*\.ipynb", path.name)] == []
    assert len({path.stem[:2] for path in PAGES}) == len(PAGES)


@each_page
def test_a_page_begins_with_title_and_subtitle(path):
    first = load(path)["cells"][0]
    assert first["cell_type"] == "markdown"
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert re.match(r"# \S", lines[0])
    assert re.match(r"> \S", lines[1])
    assert len(lines) == 2 or not lines[2].startswith(">")
    headings = [line for cell in load(path)["cells"] if cell["cell_type"] == "markdown" for line in source(cell).splitlines()
                if line.startswith("# ")]
    assert len(headings) == 1


@each_page
def test_a_page_exports_to_the_module_of_its_name(path):
    exports = [match for cell in code_cells(path) for match in re.findall(r"^#\| *default_exp +(\S+)", source(cell), re.MULTILINE)]
    assert exports == ([path.stem[3:]] if path.stem[3:] in EXPORTED else [])
    assert (path.stem[0] == "6" and path.stem != "68_claims") == (exports == [])
    if not exports:
        assert not any(re.search(r"^#\| *exports?\b", source(cell), re.MULTILINE) for cell in code_cells(path))


@each_page
def test_a_page_first_installs_the_package_where_it_is_missing(path):
    url = re.search(r"^git_url = (\S+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert source(code_cells(path)[0]) == '#| hide\nfrom importlib.util import find_spec\nif find_spec("krause_repro") is None:\n' \
        f'    get_ipython().run_line_magic("pip", "install -q git+{url}")'


@each_page
def test_experiments_have_one_parameters_cell_and_other_pages_none(path):
    tagged = [source(cell) for cell in load(path)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == (['profile = "desk"\ntrain = "never"'] if path.stem[0] in "67" else [])


@each_page
def test_no_page_was_committed_with_injected_parameters_or_other_metadata(path):
    notebook = load(path)
    assert [cell["metadata"] for cell in notebook["cells"] if cell["metadata"] not in ({}, {"tags": ["parameters"]})] == []
    assert set(notebook["metadata"]) == {"kernelspec"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@each_page
def test_cells_have_content_and_an_id_of_their_own(path):
    cells = load(path)["cells"]
    assert [cell["id"] for cell in cells if not source(cell).strip()] == []
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert {cell.get("execution_count") for cell in cells} == {None}


@each_page
def test_outputs_hold_no_error_and_no_warning(path):
    for cell in code_cells(path):
        kinds = [(output["output_type"], output.get("name")) for output in cell["outputs"]]
        assert not [kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"], source(cell)


@each_page
def test_no_path_of_the_writers_machine_is_shown(path):
    found = []
    for cell in load(path)["cells"]:
        texts = [source(cell), *(output_texts(cell) if cell["cell_type"] == "code" else [])]
        found += [text[max(match.start() - 20, 0):match.end() + 40] for text in texts for match in PRIVATE_PATH.finditer(text)]
    assert found == []


@each_page
def test_pages_run_anywhere(path):
    text = "\n".join(source(cell) for cell in code_cells(path))
    assert "MPLBACKEND" not in text
    assert not re.search(r"matplotlib\.use\(|plt\.switch_backend\(", text)
    assert not re.search(r"""["']\.\./""", text)


@each_page
def test_pages_with_code_to_show_were_executed(path):
    cells = [cell for cell in code_cells(path) if not re.search(r"^#\| *(export|default_exp|hide)", source(cell), re.MULTILINE)]
    if cells:
        assert any(cell["outputs"] for cell in cells)


@each_page
def test_links_between_pages_lead_somewhere(path):
    for cell in load(path)["cells"]:
        if cell["cell_type"] == "markdown":
            for name in re.findall(r"\]\((?:\./)?([\w./-]+\.ipynb)", source(cell)):
                assert (path.parent / name).is_file(), name


def project_imports(tree):
    "The names of this project's modules a syntax tree imports."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "krause_repro":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("krause_repro."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("krause_repro."))


def test_every_module_comes_from_a_page():
    assert EXPORTED - set(NUMBERS) == set()


@each_module
def test_modules_import_from_their_own_or_an_earlier_group(path):
    names = set(project_imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert {name: NUMBERS.get(name, "9") for name in names if NUMBERS.get(name, "9")[0] > NUMBERS[path.stem][0]} == {}


@each_module
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def describes_itself(annotation):
    "Whether a parameter's type is one of this project's classes, which says more than a comment could."
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return bool(names & OWN_CLASSES)


@each_module
def test_public_functions_say_what_each_parameter_is(path):
    "By a comment on its line (fastcore's docments), by its name in the docstring, or by a class of this project as its type."
    text = path.read_text(encoding="utf-8")
    commented = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT}
    silent = []
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            for parameter in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
                named = re.search(rf"\b{parameter.arg}\b", ast.get_docstring(function) or "")
                said = parameter.end_lineno in commented or named or parameter.annotation and describes_itself(parameter.annotation)
                if parameter.annotation is None or not said:
                    silent.append(f"{function.name}({parameter.arg})")
    assert silent == []


@each_module
def test_names_in_backticks_are_where_they_are_said_to_be(path):
    texts = {each.stem: each.read_text(encoding="utf-8") for each in MODULES}
    said = [name for name in re.findall(r"`([a-z_]+)\.([A-Za-z_]\w*)`", texts[path.stem]) if name[0] in texts and name[1] != "csv"]
    assert not [name for name in said if not re.search(rf"^ {{0,4}}(?:(?:def|class) +)?{name[1]}\b", texts[name[0]], re.MULTILINE)]
