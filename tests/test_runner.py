"""The runner: parameters reach the pages, failures and interrupts leave evidence, bad input is refused before any work."""
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from krause_repro import cli, runner, website
from krause_repro.records import InUse, locked

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


def run_and_build(project, profile="smoke"):
    "Execute a project's pages and build its site, as the command line does."
    return runner.run(profile, root=project, quiet=True, at_end=lambda: website.site(profile, project))


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
    "A project in a folder with a space in its name, run under smoke: a lesson, an experiment, one that fails, and what comes after it."
    project = new_project(tmp_path_factory.mktemp("smoke") / "a project")
    write_page(project, "00_lesson", code("import os, sys\nprint(os.getcwd())\nprint(sys.executable)\nprint(os.environ['MPLBACKEND'])"))
    write_page(project, "60_experiment", code(PARAMETERS, "parameters"), code("profile, train"))
    write_page(project, "61_image_classification", code(PARAMETERS, "parameters"), code("before = 1"), code("1 / 0"), code("'not reached'"))
    write_page(project, "62_<b>x<b>", code(PARAMETERS, "parameters"), code("raise ValueError('<script>alert(1)</script>')"))
    write_page(project, "70_report", code(PARAMETERS, "parameters"))
    left = site(project) / "notebooks" / ".00_lesson.ipynb.0123abcd.1.ab_d1234.ipynb"
    left.parent.mkdir(parents=True)
    left.write_text("half a notebook of a process that was killed")
    return project, run_and_build(project)


def test_pages_are_listed_in_reading_order(project):
    write_page(project, "60_b", code(PARAMETERS, "parameters"))
    write_page(project, "01_a", code("1"))
    (project / "nbs" / "_draft.ipynb").write_text("not a notebook")
    pages = runner.notebooks(project / "nbs")
    assert [(page.number, page.stem, page.name, page.has_parameters) for page in pages] == [
        ("01", "01_a", "a", False), ("60", "60_b", "b", True)]
    assert pages[0].title == "Page 01_a"
    assert pages[0].subtitle == "what 01_a shows, $E_{ij}$"


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="NN_name.ipynb"):
        runner.notebooks(tmp_path)


def test_parameters_are_injected_and_recorded(smoke):
    project, records = smoke
    notebook = executed(project, "60_experiment")
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
    assert runner.Kernels(project).manager()().kernel_spec.argv[0] == sys.executable


def test_a_failure_is_kept_as_evidence_and_does_not_hide_the_others(smoke):
    project, records = smoke
    assert [(record["notebook"], record["status"]) for record in records] == [
        ("00_lesson", "ok"), ("60_experiment", "ok"), ("61_image_classification", "failed"), ("62_<b>x<b>", "failed"),
        ("70_report", "not run")]
    assert records[2]["error"] == "cell 5 (In [4]: 1 / 0): ZeroDivisionError: division by zero"
    assert records[4]["because"] == "61_image_classification"
    assert executed(project, "61_image_classification")["metadata"]["krause_repro"]["status"] == "failed"
    assert sorted(path.name for path in (site(project) / "notebooks").iterdir()) == [
        "00_lesson.ipynb", "60_experiment.ipynb", "61_image_classification.ipynb", "62_<b>x<b>.ipynb"]
    assert "ZeroDivisionError" in (site(project) / "61_image_classification.html").read_text(encoding="utf-8")
    lines, words = cli.summary(records).splitlines(), ("status", "ok", "ok", "failed", "failed", "not run")
    assert len({line.index(word) for line, word in zip(lines, words, strict=True)}) == 1
    assert lines[0].endswith("seconds") and lines[5].endswith("not run because of 61_image_classification")
    assert lines[1].endswith(f"{records[0]['seconds']:.1f}")


def test_the_page_shows_every_notebook_and_how_it_went(smoke):
    project, _ = smoke
    text = website.site("smoke", project).read_text(encoding="utf-8")  # built again, it says the same
    assert re.findall(r'class="status ([a-z ]+)"', text) == ["ok", "ok", "failed", "failed", "not run"]
    assert "its numbers are meaningless" in text
    assert 'href="60_experiment.html"' in text and 'href="70_report.html"' not in text
    assert "ZeroDivisionError: division by zero" in text and "not run because of 61_image_classification" in text
    assert "torch" in text and "4 of 5 executed" in text


def test_the_report_of_an_earlier_run_is_marked(smoke):
    project, _ = smoke
    copy, other = (site(project) / "notebooks" / f"{stem}.ipynb" for stem in ("70_report", "60_experiment"))
    copy.write_text(other.read_text(encoding="utf-8").replace('"executed": "20', '"executed": "19'), encoding="utf-8")
    text = website.site("smoke", project).read_text(encoding="utf-8")
    copy.unlink()
    (site(project) / "70_report.html").unlink()
    assert "not run because of 61_image_classification; the page shown is from an earlier run" in text


def test_the_site_asks_nothing_of_other_hosts_and_can_be_moved(smoke):
    project, _ = smoke
    pages = sorted(site(project).glob("*.html"))
    assert len(pages) == 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text) + re.findall(r'<link[^>]+href="([^"]+)"', text)
        links += re.findall(r'@import\s+(?:url\()?["\']?([^"\')\s]+)', text)
        assert not [link for link in links if re.match(r"(https?:)?//", link)], page
        for link in links:
            if not link.startswith("data:"):
                assert (site(project) / link.split("?")[0]).is_file(), link
    assert "MathJax.js" in pages[0].read_text(encoding="utf-8")


class Elements(HTMLParser):
    "The elements of a page, and what could be executed in it: scripts, handlers, addresses of scripts."

    def __init__(self, text):
        super().__init__()
        self.tags, self.active, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag if tag in ("script", "style") else None
        handlers = [value for name, value in attributes if name.startswith("on")]
        self.active += handlers + [value for name, value in attributes if value and re.match(r"\s*(javascript|data:text)", value)]
        self.active += [value for name, value in attributes if tag == "script" and name == "src"]

    def handle_data(self, data):
        if self.inside:
            self.active.append(data)

    def handle_endtag(self, tag):
        self.inside = None


def test_names_and_errors_are_text_in_every_page(smoke):
    project, _ = smoke
    index = site(project) / "index.html"
    text = index.read_text(encoding="utf-8")
    assert "62_&lt;b&gt;x&lt;b&gt;" in text and 'href="62_%3Cb%3Ex%3Cb%3E.html"' in text
    for page in (index, site(project) / "62_<b>x<b>.html"):
        found = Elements(page.read_text(encoding="utf-8"))
        assert not [text for text in found.active if "alert(1)" in text] and "b" not in found.tags
        assert "alert(1)" in page.read_text(encoding="utf-8")


EVIL = """"'><evil onload="evil()"></evil><script>evil()</script>"""
HOSTILE = {
    "cells": [
        {"cell_type": "markdown", "source": f"# {EVIL}\n\n> {EVIL}\n\n[a](javascript:evil()) ![{EVIL}](javascript:evil() '{EVIL}')\n\n"
            f"```mermaid\n{EVIL}\n```\n\n$x {EVIL}$\n\n<evil>\n\n| {EVIL} |\n| --- |\n| {EVIL} |", "metadata": {"tags": [EVIL]},
            "attachments": {EVIL: {"image/png": EVIL}}},
        {"cell_type": "raw", "source": EVIL, "metadata": {"format": "text/html", "raw_mimetype": "text/html"}},
        {"cell_type": "code", "source": EVIL, "metadata": {"tags": [EVIL], "magics_language": EVIL}, "execution_count": 1, "outputs": [
            {"output_type": "stream", "name": "stdout", "text": EVIL},
            {"output_type": "error", "ename": EVIL, "evalue": EVIL, "traceback": [EVIL]},
            *({"output_type": "display_data", "data": {kind: EVIL, "text/plain": EVIL}, "metadata": {
                kind: {"width": EVIL, "height": "1 onload=evil()", "alt": EVIL}, "filenames": {kind: EVIL}}} for kind in (
                    "text/html", "application/javascript", "image/svg+xml", "image/png", "text/markdown", "text/latex",
                    "application/vnd.jupyter.widget-view+json", "application/json"))]},
    ],
    "metadata": {
        "title": EVIL, "kernelspec": {"name": EVIL, "display_name": EVIL, "language": EVIL},
        "language_info": {"name": EVIL, "pygments_lexer": EVIL, "codemirror_mode": EVIL},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": EVIL}},
        "krause_repro": {"status": EVIL, "error": EVIL, "seconds": 1.0, "executed": EVIL, "commit": EVIL, "profile": EVIL, "train": EVIL}},
    "nbformat": 4, "nbformat_minor": 4,
}


def test_nothing_from_a_file_becomes_a_part_of_the_page(project):
    from matplotlib.figure import Figure
    from PIL import Image, PngImagePlugin

    heading = {"cell_type": "markdown", "metadata": {}, "source": f"# {EVIL}\n> `{EVIL}` {EVIL}"}
    for stem in ("60_evil", "61_'onload='evil()"):
        write_page(project, stem, code(PARAMETERS, "parameters"))
        page = json.loads((project / "nbs" / f"{stem}.ipynb").read_text())
        (project / "nbs" / f"{stem}.ipynb").write_text(json.dumps(page | {"cells": [heading, *page["cells"][1:]]}))
        copy = site(project) / "notebooks" / f"{stem}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(HOSTILE))
    from krause_repro.drawing import save_figure

    figure = Figure(figsize=(1, 1))
    for name, profile in (("evil", "desk"), ("other", "smoke")):
        png, svg = save_figure(figure, name, profile=profile, caption=EVIL, notebook="60_evil", root=project)
        text = PngImagePlugin.PngInfo()
        for key in ("Title", "Description", "Source", "Comment"):
            text.add_text(key, EVIL)
        with Image.open(png) as image:
            image.save(png, pnginfo=text)
        png.rename(png.with_name(f"{name}'onload='evil().png"))
        svg.rename(svg.with_name(f"{name}'onload='evil().svg"))
    pages = [website.site("smoke", project), *site(project).glob("6*.html")]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        found = Elements(text)
        assert "evil" not in found.tags and not [part for part in found.active if "evil" in part], page
        assert "evil()" in text


def damaged(whole):
    "Executed copies that something has happened to, by page."
    notebook = json.loads(whole)

    def changed(**record):
        return json.dumps({**notebook, "metadata": {"krause_repro": record}})

    texts = {"truncated": whole[:len(whole) // 2], "empty": "", "a_list": "[]", "a_number": "1", "no_cells": '{"metadata": {}}',
             "cells_of_text": '{"metadata": {}, "cells": ["a"]}', "cell_without_source": '{"metadata": {}, "cells": [{"metadata": {}}]}',
             "cells_is_an_object": '{"metadata": {}, "cells": {}}', "no_cell": '{"metadata": {"krause_repro": []}, "cells": []}',
             "seconds_is_text": changed(seconds="<b>"), "seconds_is_nan": changed(seconds=float("nan")), "error_is_3": changed(error=3),
             "executed_is_a_number": changed(executed=3), "outputs_is_null": whole.replace('"outputs": []', '"outputs": null'),
             "deep": "[" * 100_000, "utf_16": whole.encode("utf-16"), "nul": b"\0" * 100}
    return {name: text if isinstance(text, bytes) else text.encode() for name, text in texts.items()}


def test_damaged_copies_and_figures_are_marked_and_the_rest_is_built(smoke, tmp_path):
    from matplotlib.figure import Figure

    from krause_repro.drawing import save_figure

    project, whole = new_project(tmp_path / "p"), (site(smoke[0]) / "notebooks" / "60_experiment.ipynb").read_text(encoding="utf-8")
    copies = {f"{10 + i}_{name}": text for i, (name, text) in enumerate(damaged(whole).items())} | {"00_whole": whole.encode()}
    (site(project) / "notebooks").mkdir(parents=True)
    for stem, text in copies.items():
        write_page(project, stem, code("1"))
        (site(project) / "notebooks" / f"{stem}.ipynb").write_bytes(text)
        (site(project) / f"{stem}.html").write_text("of an earlier build")
    for name in ("whole", "cut", "no_svg"):
        png, svg = save_figure(Figure(figsize=(1, 1)), name, profile="smoke", caption="Groups form.", notebook="00_whole", root=project)
    (png.parent / "cut.png").write_bytes(png.read_bytes()[:200])
    svg.unlink()
    text = website.site("smoke", project).read_text(encoding="utf-8")
    assert re.findall(r'class="status ([a-z ]+)"', text) == ["ok", *["damaged"] * (len(copies) - 1)]
    assert [path.name for path in site(project).glob("*.html") if path.name != "index.html"] == ["00_whole.html"]
    for stem in copies:
        assert re.search(rf"notebooks/{stem}.ipynb is (damaged|not valid JSON) \(", text) or stem == "00_whole", stem
    assert text.count("execute the page again") == len(copies) - 1 and str(project) not in text
    assert text.count("Damaged: ") == 2 and 'src="figures/smoke/whole.svg"' in text and 'src="figures/smoke/cut.svg"' not in text


def test_figures_stand_beside_the_committed_ones(project):
    from matplotlib.figure import Figure

    from krause_repro.drawing import save_figure

    write_page(project, "60_particles", code(PARAMETERS, "parameters"))
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1])
    for name, profile in (("both", "desk"), ("both", "smoke"), ("fresh", "smoke")):
        save_figure(figure, name, profile=profile, caption="Groups form.", notebook="60_particles", root=project)
    text = website.site("smoke", project).read_text(encoding="utf-8")
    assert [f"figures/{profile}/{name}.svg" in text for profile, name in
            (("desk", "both"), ("smoke", "both"), ("desk", "fresh"), ("smoke", "fresh"))] == [True, True, False, True]
    assert text.count('alt="') == 3 and text.count("Groups form.") == 5
    assert "Not drawn under the desk profile yet." in text
    for image in re.findall(r'<img src="([^"]+)"', text):
        assert (site(project) / image).is_file()
    assert "smoke run, numbers mean nothing" not in website.site("desk", project).read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "allowed"), [
    ({"profile": "tiny"}, "smoke, desk, paper"),
    ({"train": "sometimes"}, "never, missing, always"),
    ({"only": "61_imaginary"}, "00_lesson, 60_untagged, 61_one_parameter"),
    ({"only": "60"}, "no cell tagged 'parameters'"),
    ({"only": "61"}, "has no parameter train; its parameters cell defines: profile"),
])
def test_bad_input_is_refused_before_any_work(project, given, allowed):
    write_page(project, "00_lesson", code("1"))
    write_page(project, "60_untagged", code(PARAMETERS))
    write_page(project, "61_one_parameter", code('profile = "desk"', "parameters"))
    with pytest.raises(ValueError, match=re.escape(allowed)):
        runner.run(**given, root=project)
    assert not (project / "runs").exists()


def test_desk_runs_independent_experiments_two_at_a_time_and_the_report_last(project):
    meet = "import os, pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.05)"
    threads = code("os.environ.get('OMP_NUM_THREADS') == str(max(1, os.cpu_count() // 2))")
    write_page(project, "00_lesson", code("1 / 0"))
    write_page(project, "60_first", code(PARAMETERS, "parameters"), code(meet.format("a", "b")), threads)
    write_page(project, "61_second", code(PARAMETERS, "parameters"), code(meet.format("b", "a")), threads)
    write_page(project, "70_report", code(PARAMETERS, "parameters"), code("import pathlib\nassert pathlib.Path('a').exists()"))
    records = runner.run("desk", root=project, quiet=True)
    assert [(record["notebook"], record["status"]) for record in records] == [("60_first", "ok"), ("61_second", "ok"), ("70_report", "ok")]
    assert outputs(executed(project, "60_first", "desk")) == ["True"]
    pages = runner.notebooks(ROOT / "nbs")
    before = {page.name: {other[3:] for other in runner.earlier_pages(page, pages)} for page in pages}
    assert before["report"] >= {"particles", "cost", "image_classification"} and "image_classification" in before["attention_maps"]
    assert not any(others for page in pages for others in [before[page.name]] if not page.takes_profile)


def test_a_report_alone_takes_what_is_there(project):
    write_page(project, "61_image_classification", code(PARAMETERS, "parameters"), code("1 / 0"))
    write_page(project, "70_report", code(PARAMETERS, "parameters"))
    records = runner.run("smoke", "70", root=project, quiet=True)
    assert [(record["notebook"], record["status"]) for record in records] == [("70_report", "ok")]


def test_the_report_needs_the_pages_whose_results_it_opens(monkeypatch):
    from krause_repro import report, results

    opened, read = set(), results.read_json
    monkeypatch.setattr(results, "read_json", lambda path, remedy: opened.add(path) or read(path, remedy))
    report.report("desk"), report.coverage("desk")
    names = {path.relative_to(ROOT / "results" / "desk").with_suffix("").as_posix() for path in opened}
    stems = {page.stem for page in runner.notebooks(ROOT / "nbs") if page.number in {results.result_page(name) for name in names}}
    assert set(runner.NEEDS["70_report"]) == stems


def test_one_run_of_a_profile_at_a_time(project):
    write_page(project, "00_lesson", code("1"))
    with locked(site(project)):
        for _ in range(2):
            with pytest.raises(InUse, match=rf"runs/smoke/site is in use by process {os.getpid()} on \S+"):
                runner.run("smoke", root=project, quiet=True)
    with locked(site(project, "desk")), pytest.raises(InUse, match="runs/desk/site is in use"):
        runner.book(root=project)
    assert not (site(project) / "notebooks").exists()


def test_a_notebook_that_cannot_be_executed_is_a_failed_page(project):
    path = write_page(project, "00_odd", code("1"))
    path.write_text(path.read_text().replace('"outputs": []', '"outputs": 3'))
    write_page(project, "01_after", code("2"))
    records = run_and_build(project)
    assert [record["status"] for record in records] == ["failed", "ok"] and records[0]["error"]
    assert re.findall(r'class="status ([a-z ]+)"', (site(project) / "index.html").read_text(encoding="utf-8")) == ["failed", "ok"]


def test_run_alone_builds_no_site(project):
    write_page(project, "00_lesson", code("1"))
    assert [record["status"] for record in runner.run("smoke", root=project, quiet=True)] == ["ok"]
    assert not (site(project) / "index.html").exists() and executed(project, "00_lesson")


def test_code_of_pages_about_tools_is_folded(project):
    exported, opened = "#| export\ndef f():\n    return 'f'", "#| export\n#| code-fold: false\ndef g():\n    return 'g'"
    for stem in ("10_model", "20_tool"):
        write_page(project, stem, code(exported), code(opened), code("f()"), code("#| code-fold: true\ng()"))
    run_and_build(project)
    texts = [(site(project) / f"{stem}.html").read_text(encoding="utf-8") for stem in ("10_model", "20_tool")]
    assert [text.count('<details class="code">') for text in texts] == [1, 2]


def test_the_command_builds_no_site_if_nothing_was_begun(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    write_page(project, "60_untagged", code(PARAMETERS))
    assert cli.main(["run"]) == 2
    write_page(project, "60_untagged", code(PARAMETERS, "parameters"))
    with locked(site(project)):
        assert cli.main(["run"]) == 2
    assert not (site(project) / "index.html").exists()
    capsys.readouterr()


def test_a_dead_kernel_is_a_failed_page(project):
    write_page(project, "00_dies", code("import os\nos._exit(1)"))
    records = runner.run("smoke", root=project, quiet=True)
    assert [(record["status"], "DeadKernelError" in record["error"]) for record in records] == [("failed", True)]
    assert executed(project, "00_dies")["metadata"]["krause_repro"]["status"] == "failed"


def test_the_book_is_executed_in_place_and_clean(project):
    path = write_page(project, "60_experiment", code(PARAMETERS, "parameters"), code("print('a')\nprint('b')\nprofile, train"))
    assert [record["status"] for record in runner.book(root=project)] == ["ok"]
    notebook, first = json.loads(path.read_text(encoding="utf-8")), path.read_bytes()
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}, {"tags": ["parameters"]}, {}]
    assert set(notebook["metadata"]) == {"kernelspec"}
    assert outputs(notebook) == ["a\nb\n", "('desk', 'never')"]
    assert {cell.get("execution_count") for cell in notebook["cells"]} == {None}
    runner.clean(path, project)
    assert path.read_bytes() == first
    path = write_page(project, "60_experiment", code(PARAMETERS, "parameters"), code("1 / 0"))
    write_page(project, "61_after", code(PARAMETERS, "parameters"))
    first = path.read_bytes()
    assert [record["status"] for record in runner.book(root=project)] == ["failed", "ok"]
    assert path.read_bytes() == first


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_finished_and_kills_the_kernel(project, capsys, monkeypatch, number, exit_code):
    started = project / "started"
    write_page(project, "00_finished", code("'done'"))
    write_page(project, "01_long", code("import os, pathlib, time\npathlib.Path('started').write_text(str(os.getpid()))\ntime.sleep(600)"))
    write_page(project, "02_after", code("import time\ntime.sleep(600)"))
    finished = site(project) / "notebooks" / "00_finished.ipynb"

    def interrupt():
        while not (started.is_file() and started.read_text() and finished.is_file()):
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    monkeypatch.chdir(project)
    handlers = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert cli.main(["run"]) == exit_code
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert signal.getsignal(signal.SIGTERM) == handlers[1]
    assert capsys.readouterr().err == "krause-repro: interrupted; finished work is kept\n"
    assert [path.name for path in (site(project) / "notebooks").iterdir()] == ["00_finished.ipynb"]
    text = (site(project) / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'class="status ([a-z ]+)"', text) == ["ok", "not run", "not run"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def command(*arguments):
    "Run the installed command in the project."
    done = subprocess.run([Path(sys.executable).parent / "krause-repro", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_help_and_version_of_the_command(capsys):
    def here(*arguments):
        try:
            code = cli.main([*arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    helped, bare, version = command("--help"), here(), here("--version")
    assert helped == bare == here("--help") and helped[0] == 0 and helped[2] == ""
    commands = ["list", "run", "train", "sample", "data", "report", "site", "book", "bench", "kernels", "evaluate", "summarise"]
    assert re.findall(r"^  (\w+) ", helped[1], re.MULTILINE) == commands
    assert re.fullmatch(r"krause-repro \d+\.\d+\.\d+\n", version[1])
    code, text, _ = here("run", "--help")
    assert code == 0 and all(option in text for option in ("--profile", "--only", "--train", "smoke, desk or paper"))


def test_list_names_recipes_with_published_numbers_and_notebooks(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"kvit_s/cifar10 .*95\.2", text)
    assert re.search(r"58 +runner", text)
    monkeypatch.chdir("/")
    assert cli.main(["list"]) == 0
    out, error = capsys.readouterr()
    assert re.search(r"kvit_s/cifar10 .*95\.2", out) and "in the project's folder" in out and error == ""


@pytest.mark.parametrize("arguments", [["list"], ["run"], ["report"], ["site"], ["book"]])
def test_a_damaged_page_of_the_book_is_named(project, capsys, monkeypatch, arguments):
    monkeypatch.chdir(project)
    path = write_page(project, "70_report", code(PARAMETERS, "parameters"))
    for text in (path.read_text()[:200], "", "[]", '{"cells": [{"source": "a"}], "metadata": {}}', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert cli.main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and re.search(rf"error: {path} is (damaged|not valid JSON) \(.*git checkout", error)


def one_error(capsys, arguments):
    "What the command says, in one line, of bad input."
    assert cli.main(arguments) == 2, arguments
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("krause-repro: error: ") and error.count("\n") == 1 and len(error) > 25, (arguments, error)
    return error


@pytest.mark.parametrize(("arguments", "message"), [
    (["fly"], "command must be one of list, run, "),
    (["trian", "kvit_s/cifar10"], "did you mean train?"),
    (["train", "kvit_s/cifar11"], "such as kvit_s/cifar10"),
    (["train", "kvit_s/cifar10", "--profile", "tiny"], "smoke, desk, paper"),
    (["train", "kvit_s/cifar10", "--sed", "3"], "unrecognized arguments: --sed 3; did you mean --seed?; see krause-repro train --help"),
    (["train", "kvit_s/cifar10", "--re"], "unrecognized arguments: --re"),
    (["train", "kvit_s/cifar10", "--pdb"], "unrecognized arguments: --pdb"),
    (["sample", "karm/mnst"], "karm/mnist"),
    (["data", "fashion_mnits"], "got 'fashion_mnits'; did you mean fashion_mnist?"),
    (["evaluate", "smollm2", "--tasks", "boolqq"], "the nearest is 'boolq'"),
    (["run", "--profile", "tiny"], "smoke, desk, paper"),
    (["run", "--only", "99"], "only='99' is not a notebook; allowed: 0"),
    (["run", "--only", "61_image_clasification"], "did you mean 61_image_classification?"),
    (["run", "--only", "particle"], "did you mean 60_particles?"),
    (["run", "--train", "maybe"], "never, missing, always"),
    (["run", "--speed", "9"], "unrecognized arguments: --speed 9; see krause-repro run --help"),
    (["data"], "required: name; see krause-repro data --help"),
    (["train", "kvit_s/cifar10", "--seed", "x"], "invalid int value: 'x'"),
    (["train", "kvit_s/cifar10", "--seed", "4294967296"], "seed must be an integer from 0 to 4294967295, got 4294967296"),
    (["train", "kvit_s16/photographs", "--unreadable", "maybe"], "unreadable must be one of stop, skip, got 'maybe'"),
    (["report", "--profile", "tiny"], "smoke, desk, paper"),
    (["site", "--profile", "tiny"], "smoke, desk, paper"),
    (["book", "--only", "99"], "only='99' is not a notebook"),
    (["bench", "dynamcs"], "got 'dynamcs'; did you mean dynamics?"),
    (["bench", "dynamics", "--threads", "0"], "threads must be an integer from 1 to 1024, got 0"),
])
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert message in one_error(capsys, arguments)


def every_option():
    "Each command with one of its arguments set to a value that no argument of its type may have."
    for name, function in cli.COMMANDS.items():
        parameters = inspect.signature(function, eval_str=True).parameters
        needed = ["x" for parameter in parameters.values() if parameter.default is inspect.Parameter.empty]
        for option, parameter in parameters.items():
            kinds = {"str": [""], "int": ["-1", "99999999999999999999", "1e3", ""], "float": ["nan", "inf", "-inf", "", "one"], "bool": []}
            for value in kinds[re.sub(r" \| None", "", getattr(parameter.annotation, "__name__", str(parameter.annotation)))]:
                given = [value] if parameter.default is inspect.Parameter.empty else [*needed, f"--{option}={value}"]
                yield pytest.param([name, *given], option, id=f"{name}-{option}={value}")


@pytest.mark.parametrize(("arguments", "option"), every_option())
def test_every_option_has_a_range(capsys, arguments, option):
    assert option in one_error(capsys, arguments)


@pytest.mark.parametrize("arguments", [
    ["run"], ["run", "--profile", "desk"], ["report"], ["book"], ["bench", "dynamics"], ["train", "kvit_t/fashion_mnist"],
    ["sample", "karm/digits"],
], ids=" ".join)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(project, capsys, monkeypatch, arguments):
    from krause_repro import timing, training

    for module, name in ((runner, "execute"), (training, "set_seed"), (timing, "interleave")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.chdir(project)
    write_page(project, "70_report", code(PARAMETERS, "parameters"))
    (project / "runs").write_text("a file where a folder is needed")
    (project / "figures").write_text("another")
    assert re.search(r"/(runs|figures)\b", one_error(capsys, arguments))
    assert sorted(path.name for path in project.iterdir()) == ["figures", "nbs", "runs", "settings.ini"]


@pytest.mark.parametrize(("path", "message"), [
    ("file/a.json", "Not a directory"), ("file/b/a.json", "Not a directory"), ("/proc/a.json", "/proc is not"),
    (f"{'a' * 300}.json", "name too long"), (f"{'a' * 300}/b.json", "name too long"), ("folder", "is a folder"), ("/dev/null", "a device"),
])
def test_what_cannot_be_written_is_named(tmp_path, path, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"^output='/.*{message}"):
        runner.check_output("output", tmp_path / path)
    runner.check_output("output", tmp_path / "new" / "folders" / "a.json")
    runner.check_output("output", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/a/file"), OSError(28, "No space left on device", "/a/file")])
def test_errors_of_the_system_are_one_line(capsys, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setitem(cli.COMMANDS, "list", fail)
    assert f"{error.strerror}: '/a/file'" in one_error(capsys, ["list"])


def test_a_reader_that_goes_away_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([Path(sys.executable).parent / "krause-repro", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_without_home_and_in_another_locale(tmp_path):
    project = new_project(tmp_path / "Größe σ")
    write_page(project, "00_σ", code("print('σ ≥ 1')"))
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii",
            "MPLCONFIGDIR": matplotlib.get_cachedir()}  # or else matplotlib looks for all fonts again
    program = Path(sys.executable).parent / "krause-repro"
    done = subprocess.run([program, "run"], cwd=project, env=bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "00_\\u03c3 ... ok" in done.stdout, done
    assert outputs(executed(project, "00_σ")) == ["σ ≥ 1\n"]


@pytest.mark.parametrize("arguments", [["run"], ["site"], ["book"]])
def test_a_path_that_is_not_text_is_refused(tmp_path, capsys, monkeypatch, arguments):
    project = new_project(tmp_path / "a \udcff")
    write_page(project, "00_lesson", code("1"))
    monkeypatch.chdir(project)
    assert "is a path that is not UTF-8; rename it" in one_error(capsys, arguments)


class Trap:
    "Its pickle makes a folder when it is loaded."

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def set_trap(path, sprung, zipped=True):
    "Write what `torch.load`, or `pickle.load`, would execute."
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        torch.save({"weight": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Trap(sprung)}))
    loaded = sprung.with_name("proof")
    pickle.loads(pickle.dumps(Trap(loaded)))
    assert loaded.is_dir() and loaded.rmdir() is None


def finished_run(project):
    "The folder of a finished run of a generator, without its weights."
    from krause_repro.recipes import get_recipe
    from krause_repro.records import write_json
    from krause_repro.runs import run_path

    recipe = get_recipe("karm/digits").at("smoke")
    folder = run_path(recipe, 0)
    assert project in folder.parents
    write_json(folder / "recipe.json", {"recipe": recipe.to_dict(), "fingerprint": recipe.fingerprint, "seed": 0})
    write_json(folder / "finished.json", {"steps": 1})
    recipe.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.bin", "model.pt"])
def test_the_weights_of_a_run_are_never_unpickled(project, capsys, monkeypatch, name, zipped):
    monkeypatch.chdir(project)
    set_trap(finished_run(project) / name, project / "sprung", zipped)
    assert "model.safetensors" in one_error(capsys, ["sample", "karm/digits", "--images", "1"])
    assert not (project / "sprung").exists()


TINY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
CODE = "import os\nos.mkdir({!r})\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors", "remote code", "adapter_model.bin"])
def test_a_language_model_from_elsewhere_runs_nothing(project, capsys, monkeypatch, kind):
    from krause_repro import language_benchmarks

    sprung, model, adapter = project / "sprung", project / "model", project / "adapter"
    model.mkdir()
    settings = TINY
    if kind == "remote code":
        settings = TINY | {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (model / "code.py").write_text(CODE.format(str(sprung)), encoding="utf-8")
    (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    set_trap((adapter if kind == "adapter_model.bin" else model) / (kind if "." in kind else "pytorch_model.bin"), sprung)
    monkeypatch.setattr(language_benchmarks, "check_language_run", lambda **_: {})
    given = ["--adapter", str(adapter)] if kind == "adapter_model.bin" else []
    error = one_error(capsys, ["evaluate", str(model), "--tasks", "boolq", *given])
    assert str(adapter if given else model) in error and "weights_only" not in error
    assert not sprung.exists()


def test_data_from_elsewhere_are_not_unpickled(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        set_trap(project / "data" / "cifar-10-batches-py" / name, project / "sprung", zipped=False)
    arguments = ["train", "kvit_s/cifar10", "--profile", "smoke", "--source", str(project / "data")]
    assert "does not have the expected MD5" in one_error(capsys, arguments)
    assert not (project / "sprung").exists()


def test_a_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "list", lambda: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["list"])


def test_the_exit_code_says_whether_a_notebook_failed(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    write_page(project, "00_fails", code("raise KeyError('gone')"))
    assert cli.main(["run"]) == 1
    out, error = capsys.readouterr()
    assert re.search(r"^\[ 1/1\] 00_fails \.\.\. failed, [\d.]+ s$", out, re.MULTILINE)
    assert error == "00_fails failed: cell 2 (In [1]: raise KeyError('gone')): KeyError: 'gone'\n"
    assert re.search(r"^page +status +seconds\n00_fails +failed +[\d.]+\n", out, re.MULTILINE) and "Site: " in out
