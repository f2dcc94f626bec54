"""The runner: parameters reach the pages, failures and interrupts leave evidence, bad input is refused before any work."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from krause_repro import runner

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 'profile = "desk"\ntrain = "never"'


def code(source, *tags):
    "A code cell."
    return {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None}


def write_page(project, stem, *cells):
    "Write a notebook of a heading and the given cells into a project's nbs/."
    heading = {"cell_type": "markdown", "metadata": {}, "source": f"# Page {stem}\n\n> what {stem} shows, $E_{{ij}}$"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    page = {"cells": [heading, *cells], "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}
    (project / "nbs").mkdir(parents=True, exist_ok=True)
    path = project / "nbs" / f"{stem}.ipynb"
    path.write_text(json.dumps(page), encoding="utf-8")
    return path


def new_project(folder):
    "A folder that the runner takes for the project."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text((ROOT / "settings.ini").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def site(project, profile="smoke"):
    return project / "runs" / profile / "site"


def executed(project, stem, profile="smoke"):
    "The executed copy of a page."
    return json.loads((site(project, profile) / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))


def outputs(notebook):
    "All text a notebook puts out."
    return ["".join(output.get("text") or output.get("data", {}).get("text/plain", []))
            for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.fixture
def project(tmp_path):
    return new_project(tmp_path / "a project")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A project in a folder with a space in its name, run under smoke: a lesson, an experiment, a page that fails and one never reached."
    project = new_project(tmp_path_factory.mktemp("smoke") / "a project")
    write_page(project, "00_lesson", code("import os, sys\nprint(os.getcwd())\nprint(sys.executable)\nprint(os.environ['MPLBACKEND'])"))
    write_page(project, "30_experiment", code(PARAMETERS, "parameters"), code("profile, train"))
    write_page(project, "31_broken", code(PARAMETERS, "parameters"), code("before = 1"), code("1 / 0"), code("'not reached'"))
    write_page(project, "40_report", code(PARAMETERS, "parameters"))
    return project, runner.run("smoke", root=project, quiet=True)


def test_pages_are_listed_in_reading_order(project):
    write_page(project, "30_b", code(PARAMETERS, "parameters"))
    write_page(project, "01_a", code("1"))
    (project / "nbs" / "_draft.ipynb").write_text("not a notebook")
    pages = runner.notebooks(project / "nbs")
    assert [(page.number, page.stem, page.name, page.has_parameters) for page in pages] == [
        ("01", "01_a", "a", False), ("30", "30_b", "b", True)]
    assert pages[0].title == "Page 01_a"
    assert pages[0].subtitle == "what 01_a shows, $E_{ij}$"


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="NN_name.ipynb"):
        runner.notebooks(tmp_path)


def test_parameters_are_injected_and_recorded(smoke):
    project, records = smoke
    notebook = executed(project, "30_experiment")
    injected = [cell for cell in notebook["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert ["".join(cell["source"]) for cell in injected] == ['# Parameters\nprofile = "smoke"\ntrain = "always"\n']
    assert outputs(notebook) == ["('smoke', 'always')"]
    assert notebook["metadata"]["papermill"]["parameters"] == {"profile": "smoke", "train": "always"}
    record = notebook["metadata"]["krause_repro"]
    assert (record["status"], record["error"], record["profile"], record["train"]) == ("ok", None, "smoke", "always")
    assert "parameters" not in executed(project, "00_lesson")["metadata"]["papermill"]["parameters"]


def test_the_kernel_is_this_interpreter_in_the_project_folder(smoke):
    project, _ = smoke
    folder, python, backend = "".join(outputs(executed(project, "00_lesson"))).split("\n")[:3]
    assert folder == str(project.resolve())
    assert python == sys.executable
    assert "inline" in backend


def test_a_shadowing_kernel_is_not_used(project, monkeypatch):
    kernel = project / "share" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/nonexistent/python"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    assert runner.kernel_manager()().kernel_spec.argv[0] == sys.executable


def test_a_failure_stops_the_run_and_is_kept_as_evidence(smoke):
    project, records = smoke
    assert [(record["notebook"], record["status"]) for record in records] == [
        ("00_lesson", "ok"), ("30_experiment", "ok"), ("31_broken", "failed")]
    assert records[-1]["error"] == "cell 5 (In [4]: 1 / 0): ZeroDivisionError: division by zero"
    assert executed(project, "31_broken")["metadata"]["krause_repro"]["status"] == "failed"
    assert sorted(path.name for path in (site(project) / "notebooks").iterdir()) == [
        "00_lesson.ipynb", "30_experiment.ipynb", "31_broken.ipynb"]
    assert "ZeroDivisionError" in (site(project) / "31_broken.html").read_text(encoding="utf-8")


def test_the_page_shows_every_notebook_and_how_it_went(smoke):
    project, _ = smoke
    text = (site(project) / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'class="status ([a-z ]+)"', text) == ["ok", "ok", "failed", "not run"]
    assert "numbers mean nothing" in text
    assert 'href="30_experiment.html"' in text and 'href="40_report.html"' not in text
    assert "ZeroDivisionError: division by zero" in text
    assert "torch" in text and "3 of 4 executed" in text


def test_the_site_asks_nothing_of_other_hosts_and_can_be_moved(smoke):
    project, _ = smoke
    pages = sorted(site(project).glob("*.html"))
    assert len(pages) == 4
    for page in pages:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text) + re.findall(r'<link[^>]+href="([^"]+)"', text)
        links += re.findall(r'@import\s+(?:url\()?["\']?([^"\')\s]+)', text)
        assert not [link for link in links if re.match(r"(https?:)?//", link)], page
        for link in links:
            if not link.startswith("data:"):
                assert (site(project) / link.split("?")[0]).is_file(), link
    assert "MathJax.js" in pages[0].read_text(encoding="utf-8")


def test_figures_stand_beside_the_committed_ones(project):
    from matplotlib.figure import Figure

    from krause_repro.figures import save_figure

    write_page(project, "30_particles", code(PARAMETERS, "parameters"))
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1])
    for name, profile in (("both", "desk"), ("both", "smoke"), ("fresh", "smoke")):
        save_figure(figure, name, profile=profile, caption="Groups form.", notebook="30_particles", root=project)
    text = runner.site("smoke", project).read_text(encoding="utf-8")
    assert [f"figures/{profile}/{name}.png" in text for profile, name in
            (("desk", "both"), ("smoke", "both"), ("desk", "fresh"), ("smoke", "fresh"))] == [True, True, False, True]
    assert text.count('alt="') == 3 and text.count("Groups form.") == 5
    assert "Not drawn under the desk profile yet." in text
    for image in re.findall(r'<img src="([^"]+)"', text):
        assert (site(project) / image).is_file() and (site(project) / image).with_suffix(".svg").is_file()
    assert "smoke run, numbers mean nothing" not in runner.site("desk", project).read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "allowed"), [
    ({"profile": "tiny"}, "smoke, desk, paper"),
    ({"train": "sometimes"}, "never, missing, always"),
    ({"only": "31_imaginary"}, "00_lesson, 30_untagged, 31_one_parameter"),
    ({"only": "30"}, "no cell tagged 'parameters'"),
    ({"only": "31"}, "has no parameter train; its parameters cell defines: profile"),
])
def test_bad_input_is_refused_before_any_work(project, given, allowed):
    write_page(project, "00_lesson", code("1"))
    write_page(project, "30_untagged", code(PARAMETERS))
    write_page(project, "31_one_parameter", code('profile = "desk"', "parameters"))
    with pytest.raises(ValueError, match=re.escape(allowed)):
        runner.run(**given, root=project)
    assert not (project / "runs").exists()


def test_a_report_brings_the_experiments_whose_results_are_missing(project):
    for stem in ("00_lesson", "30_made", "31_missing", "40_report"):
        write_page(project, stem, code(PARAMETERS, "parameters"))
    (project / "results" / "desk").mkdir(parents=True)
    (project / "results" / "desk" / "made.json").write_text("{}")
    pages = runner.notebooks(project / "nbs")

    def needed(only, train):
        return [page.stem for page in runner.with_needs(runner.select(pages, only), pages, "desk", train, project)]

    assert needed("40", "missing") == ["31_missing", "40_report"]
    assert needed("40", "never") == ["40_report"]
    assert needed("31_missing, 00", "missing") == ["00_lesson", "31_missing"]


def test_a_dead_kernel_is_a_failed_page(project):
    write_page(project, "00_dies", code("import os\nos._exit(1)"))
    records = runner.run("smoke", root=project, quiet=True)
    assert [(record["status"], "DeadKernelError" in record["error"]) for record in records] == [("failed", True)]
    assert executed(project, "00_dies")["metadata"]["krause_repro"]["status"] == "failed"


def test_the_book_is_executed_in_place_and_clean(project):
    path = write_page(project, "30_experiment", code(PARAMETERS, "parameters"), code("print('a')\nprint('b')\nprofile, train"))
    assert [record["status"] for record in runner.book(root=project)] == ["ok"]
    notebook, first = json.loads(path.read_text(encoding="utf-8")), path.read_bytes()
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}, {"tags": ["parameters"]}, {}]
    assert set(notebook["metadata"]) == {"kernelspec"}
    assert outputs(notebook) == ["a\nb\n", "('desk', 'never')"]
    assert {cell.get("execution_count") for cell in notebook["cells"]} == {None}
    runner.clean(path, project)
    assert path.read_bytes() == first
    path = write_page(project, "30_experiment", code(PARAMETERS, "parameters"), code("1 / 0"))
    first = path.read_bytes()
    assert [record["status"] for record in runner.book(root=project)] == ["failed"]
    assert path.read_bytes() == first


def test_ctrl_c_keeps_what_is_finished_and_kills_the_kernel(project, capsys, monkeypatch):
    started = project / "started"
    write_page(project, "00_finished", code("'done'"))
    write_page(project, "01_long", code("import os, pathlib, time\npathlib.Path('started').write_text(str(os.getpid()))\ntime.sleep(600)"))
    write_page(project, "02_after", code("1"))
    def interrupt():
        while not (started.is_file() and started.read_text()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(project)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert runner.main(["run"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "krause-repro: interrupted; what was finished is kept\n"
    assert [path.name for path in (site(project) / "notebooks").iterdir()] == ["00_finished.ipynb"]
    text = (site(project) / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'class="status ([a-z ]+)"', text) == ["ok", "not run", "not run"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def command(*arguments):
    "Run the installed command in the project."
    done = subprocess.run([Path(sys.executable).parent / "krause-repro", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_help_and_version_of_the_command():
    helped, bare, version = command("--help"), command(), command("--version")
    assert helped == bare and helped[0] == 0 and helped[2] == ""
    commands = ["list", "run", "train", "sample", "data", "report", "site", "book", "bench", "kernels", "evaluate"]
    assert re.findall(r"^  (\w+) ", helped[1], re.MULTILINE) == commands
    assert re.fullmatch(r"krause-repro \d+\.\d+\.\d+\n", version[1])
    code, text, _ = command("run", "--help")
    assert code == 0 and all(option in text for option in ("--profile", "--only", "--train", "smoke, desk or paper"))


def test_list_names_recipes_with_published_numbers_and_notebooks(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runner.main(["list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"kvit_s/cifar10 .*95\.2", text)
    assert re.search(r"26 +runner", text)


def test_an_unknown_command_is_one_line():
    code, text, error = command("fly")
    assert (code, text) == (2, "")
    assert error.startswith("krause-repro: error: unknown command 'fly'; allowed: list, run") and error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "kvit_s/cifar11"], "'kvit_s/cifar11'"),
    (["train", "kvit_s/cifar10", "--profile", "tiny"], "smoke, desk, paper"),
    (["run", "--profile", "tiny"], "smoke, desk, paper"),
    (["run", "--only", "99"], "only='99' is not a notebook; allowed: 0"),
    (["run", "--train", "maybe"], "never, missing, always"),
    (["run", "--speed", "9"], "unrecognized arguments: --speed 9; see krause-repro run --help"),
    (["data"], "required: name; see krause-repro data --help"),
    (["train", "kvit_s/cifar10", "--seed", "x"], "invalid int value: 'x'"),
    (["train", "kvit_s16/photographs", "--unreadable", "maybe"], "unreadable must be one of stop, skip, got 'maybe'"),
    (["report", "--profile", "tiny"], "smoke, desk, paper"),
    (["site", "--profile", "tiny"], "smoke, desk, paper"),
    (["book", "--only", "99"], "only='99' is not a notebook"),
    (["bench", "nothing"], "name='nothing' is not a benchmark; allowed: "),
    (["bench", "dynamics", "--threads", "0"], "threads must be an integer ≥ 1, got 0"),
])
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert runner.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("krause-repro: error: ") and error.count("\n") == 1
    assert message in error


def test_a_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(runner.COMMANDS, "list", lambda: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        runner.main(["list"])


def test_the_exit_code_says_whether_a_notebook_failed(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    write_page(project, "00_fails", code("raise KeyError('gone')"))
    assert runner.main(["run"]) == 1
    out, error = capsys.readouterr()
    assert re.search(r"^\[ 1/1\] 00_fails \.\.\. failed, [\d.]+ s$", out, re.MULTILINE)
    assert error == "00_fails failed: cell 2 (In [1]: raise KeyError('gone')): KeyError: 'gone'\n"
    assert "The page: " in out
