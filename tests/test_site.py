"""The site in headless Chromium: opened from disk, its links lead somewhere, nothing is wider than a phone, and the search finds."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from krause_repro import website
from krause_repro.website import module_api

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
PAGES = ("00_dynamics", "06_attention", "40_statistics", "68_claims")
SCRIPT = """
const answers = {};
addEventListener("load", async () => {
  for (const page of PAGES) {
    const frame = document.createElement("iframe"), errors = [];
    frame.width = 400; frame.height = 900;
    const loaded = new Promise(done => { frame.onload = done; });
    frame.src = page;
    document.body.append(frame);
    frame.contentWindow.addEventListener("error", event => errors.push(event.message || String(event.target.src)), true);
    await loaded;
    const inner = frame.contentWindow, text = frame.contentDocument, root = text.documentElement;
    if (inner.MathJax) await new Promise(done => inner.MathJax.Hub.Queue(done));
    const grounds = [0, 1].map(() => {
      text.getElementById("theme").click();
      return [root.dataset.theme, inner.getComputedStyle(text.body).backgroundColor];
    });
    const search = text.getElementById("search");
    if (search) {
      search.value = "top-k";
      search.dispatchEvent(new inner.Event("input"));
    }
    answers[page] = { errors, grounds, width: root.scrollWidth,
      found: [...text.querySelectorAll("#found a")].map(link => link.getAttribute("href")),
      folded: !text.getElementById("pages")?.open, contents: text.querySelectorAll("#contents a").length };
    frame.remove();
  }
  document.getElementById("answer").textContent = JSON.stringify(answers);
});
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The site of a few committed pages, with the README and two modules."
    root = tmp_path_factory.mktemp("project")
    for name in ("nbs", "krause_repro"):
        (root / name).mkdir()
    for stem in PAGES:
        shutil.copy(ROOT / "nbs" / f"{stem}.ipynb", root / "nbs")
    for name in ("settings.ini", "README.md", "krause_repro/attention.py", "krause_repro/dynamics.py"):
        shutil.copy(ROOT / name, root / name)
    return website.site("desk", root).parent


def test_every_link_of_the_site_leads_somewhere(folder):
    texts = {page: page.read_text(encoding="utf-8") for page in [*folder.glob("*.html"), *folder.glob("interactive/*.html")]}
    committed = {f"{path.stem}.html" for path in ROOT.glob("nbs/*.ipynb")}
    names = {page: {html.unescape(name) for name in re.findall(r'\bid="([^"]+)"', text)} for page, text in texts.items()}
    missing = []
    for page, text in texts.items():
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', text):
            target, _, name = html.unescape(link).partition("#")
            target = unquote(target)
            if re.match(r"https?:|mailto:", target) or target in committed and not (folder / target).exists():
                continue
            to = (page.parent / target.split("?")[0]).resolve() if target else page
            if not to.is_file() or name and to in names and name not in names[to]:
                missing.append((page.name, link))
    assert missing == []
    assert len(texts) == len(PAGES) + 2 + 2 + 3  # the index, the reference and two modules, interactive pages
    assert not [page.name for page, text in texts.items() if "data:image" in text]


def test_the_index_opens_on_the_findings_of_the_readme(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"^- \*\*(.+?)\*\*", readme.partition("<!-- findings")[2].partition("<!-- end")[0], re.MULTILINE)
    assert len(said) >= 5 and all(f"<strong>{html.escape(finding)}</strong>" in text for finding in said)
    assert text.index('id="Findings"') < text.index('id="Claims"') < text.index('id="notebooks"')
    assert len(text) < 300_000


def test_a_page_shows_the_parameters_it_was_executed_with(tmp_path):
    copied = {"tags": ["injected-parameters"]}
    cells = [nbformat.v4.new_code_cell('profile = "desk"', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell('# Parameters\nprofile = "smoke"\n', metadata=copied)]
    shown = website.page_cells(nbformat.v4.new_notebook(cells=cells), tmp_path / "60_page.ipynb", tmp_path)
    assert len(shown) == 1 and "smoke" in shown[0]["html"] and "desk" not in shown[0]["html"] and "# Parameters" not in shown[0]["html"]


def test_the_reference_says_what_a_parameter_means():
    entries = {entry["name"]: entry for entry in module_api(ROOT / "krause_repro" / "attention.py")["entries"]}
    assert {"krause_attention", "KrauseAttention"} <= set(entries)
    assert "bandwidth of the RBF" in entries["krause_attention"]["code"] and "RBF score" in entries["krause_attention"]["doc"]
    assert [method["name"] for method in entries["KrauseAttention"]["methods"]][0] == "__init__"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")
def test_the_site_works_from_disk_in_a_narrow_window(folder):
    pages = ["index.html", "00_dynamics.html", "68_claims.html", "api_attention.html"]
    interactive = ["interactive/particles.html", "interactive/mechanism.html", "interactive/attention.html"]
    page = folder / "all.html"
    script = f"const PAGES = {json.dumps(pages + interactive)};{SCRIPT}"
    page.write_text(f'<!doctype html><body><pre id="answer"></pre><script>{script}</script></body>')
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=60000",
               "--window-size=1000,900", f"--user-data-dir={folder}/profile")
    try:
        dom = subprocess.run([CHROMIUM, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    finally:
        page.unlink()
    answers = json.loads(html.unescape(re.search(r'<pre id="answer">(.*?)</pre>', dom.stdout, re.DOTALL)[1]))
    assert set(answers) == {*pages, *interactive}
    for page, answer in answers.items():
        assert answer["errors"] == [] and answer["width"] <= 400 and answer["folded"], (page, answer)
        assert {theme for theme, _ in answer["grounds"]} == {"light", "dark"} and len({ground for _, ground in answer["grounds"]}) == 2
        assert page in interactive or {"06_attention.html", "api_attention.html"} <= set(answer["found"]), page
    assert answers["00_dynamics.html"]["contents"] > 3 and "CONSOLE" not in dom.stderr
