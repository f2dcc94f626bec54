"""The interactive pages, run in headless Chromium: their arithmetic is the library's, their controls work, and nothing overflows."""

import html
import json
import re
import shutil
import subprocess
from importlib.resources import files

import pytest
import torch

from krause_repro.attention import attention_stages, krause_attention
from krause_repro.attention_analysis import row_entropy
from krause_repro.dynamics import cluster_count, flow, interaction_graph, interaction_weights, order_parameter
from krause_repro.reference import GridWindow
from krause_repro.results import load_result

PAGES = files("krause_repro").joinpath("templates", "interactive")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")

PARTICLES = """
const cases = [];
for (const d of [2, 3]) for (const [beta, radius, topK] of [[1, null, null], [9, null, null], [1, 0.7, null], [2, null, 8], [1, 0.9, 8]]) {
  const x = krause.start(40, d, 7), rule = { beta, radius, topK }, graph = krause.graph(x, d, radius, topK);
  let y = x;
  for (let i = 0; i < 5; i++) y = krause.step(y, d, rule, 0.1);
  cases.push({ d, beta, radius, topK, x: [...x], y: [...y], weights: [...krause.weights(x, d, beta, graph)],
               clusters: krause.clusters(x, d), order: krause.order(x, d) });
}
const late = beta => {
  let x = krause.start(60, 2, 1);
  for (let i = 0; i < 250; i++) x = krause.step(x, 2, { beta, radius: null, topK: null }, 0.1);
  return krause.clusters(x, 2);
};
const pressed = [...document.querySelectorAll("#presets button")].map(button => {
  button.click();
  return document.getElementById("beta-value").value;
});
document.getElementById("surface").value = "3";
document.getElementById("surface").onchange();
answer = { cases, late: [late(1), late(9)], pressed };
"""
MECHANISM = """
const features = krause.features(7, 7, 4, 3), cases = [];
for (const [query, sigma, radius, topK] of [[24, 1, 1, 4], [0, 0.5, 2, 3], [10, 3, 6, 49], [48, 1, 0, 1], [30, 2, 6, 7]])
  cases.push({ query, sigma, radius, topK, ...krause.stages(features, 7, 7, query, sigma, radius, topK) });
document.querySelector("#stages button").click();
const corner = document.getElementById("summary").textContent;
document.querySelector(".grid").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
const query = [...document.querySelectorAll("#stages button")].findIndex(cell => cell.classList.contains("query"));
answer = { features, cases, corner, query };
"""
ATTENTION = """
const maps = window.attentionMaps.maps, shown = [];
for (const button of document.querySelectorAll("#images button")) {
  button.click();
  for (const list of document.querySelectorAll("select")) for (const option of [...list.options].map(each => each.value)) {
    list.value = option;
    list.onchange();
    shown.push(document.getElementById("what").textContent);
  }
}
answer = { maps, images: window.attentionMaps.images, shown, entropies: maps.map(map => krause.entropy(map[6].map(w => w / 1e4))) };
"""


def run(page, script, folder):
    "What `script` answers at the end of a page in a window 400 pixels wide, after checking for errors and for what is too wide."
    for path in PAGES.iterdir():
        shutil.copy(path, folder)
    listener = '<head><script>window.errors = []; addEventListener("error", e => errors.push(e.message || e.target.src), true);</script>'
    ending = f'<pre id="answer"></pre><script>(() => {{ let answer; {script}\n' \
             'const wide = document.documentElement.scrollWidth > innerWidth;\n' \
             'document.getElementById("answer").textContent = JSON.stringify({ ...answer, errors, wide }); })();</script></body>'
    text = (folder / page).read_text(encoding="utf-8").replace("<head>", listener).replace("</body>", ending)
    (folder / page).write_text(text, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900", f"--user-data-dir={folder}/profile")
    dom = subprocess.run([CHROMIUM, *options, "--dump-dom", (folder / page).as_uri()], capture_output=True, text=True, timeout=120).stdout
    answer = json.loads(html.unescape(re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert answer["errors"] == [] and not answer["wide"]
    return answer


@in_browser
def test_particles_move_as_in_the_library(tmp_path):
    answer = run("particles.html", PARTICLES, tmp_path)
    for case in answer["cases"]:
        x, y = (torch.tensor(case[name], dtype=torch.float64).unflatten(0, (-1, case["d"])) for name in ("x", "y"))
        rule = {"beta": case["beta"], "radius": case["radius"], "top_k": case["topK"]}
        torch.testing.assert_close(y, flow(x, **rule, step=0.1, steps=5).states[-1], rtol=0, atol=1e-12)
        weights = torch.tensor(case["weights"], dtype=torch.float64).unflatten(0, (40, 40))
        torch.testing.assert_close(weights, interaction_weights(x, **rule), rtol=0, atol=1e-12)
        assert ((weights > 0) == interaction_graph(x, case["radius"], case["topK"])).all()
        assert case["clusters"] == cluster_count(x, 0.1) and abs(case["order"] - order_parameter(x)) < 1e-12
    assert answer["late"][0] == 1 < answer["late"][1]  # the preset: softmax at β = 9 clusters, too
    assert [text[:3] for text in answer["pressed"]] == ["1.0", "1.0", "1.0", "9.0"]


@in_browser
def test_the_stages_of_the_mechanism_are_those_of_the_library(tmp_path):
    answer = run("mechanism.html", MECHANISM, tmp_path)
    features = torch.tensor(answer["features"], dtype=torch.float64)
    for case in answer["cases"]:
        window, query = GridWindow(7, 7, case["radius"], cls_token=False), case["query"]
        stages = attention_stages(features, features, case["sigma"], window, case["topK"])
        for name, stage in stages.items():
            torch.testing.assert_close(torch.tensor(case[name], dtype=stage.dtype), stage[query], rtol=0, atol=1e-12)
        x = features[None, None]
        output = krause_attention(x, x, x, case["sigma"], window, case["topK"])[0, 0, query]
        torch.testing.assert_close(torch.tensor(case["weights"], dtype=torch.float64) @ features, output, rtol=0, atol=1e-9)
    assert answer["corner"].startswith("4 tokens in the window, 4 selected") and answer["query"] == 7


@in_browser
def test_the_explorer_shows_the_committed_maps(tmp_path):
    answer, committed = run("attention.html", ATTENTION, tmp_path), load_result("attention_maps", "desk")
    maps = {tuple(entry[:6]): torch.tensor(entry[6], dtype=torch.float64) / 1e4 for entry in answer["maps"]}
    rows = [row for part in committed["heads"].values() for row in part]
    for i, row in enumerate(rows):
        for head, (weights, on_cls) in enumerate(zip(row["maps"], row["cls_weight"], strict=True), 1):
            found = maps[row["label"].replace("\n", " "), "trained", i // 2, "cls", 4, head]
            torch.testing.assert_close(found, torch.tensor([on_cls, *weights], dtype=torch.float64))
    assert len(answer["images"]) == 6 and {entry[1] for entry in answer["maps"]} == {"trained", "untrained"}
    for weights, entropy in zip(maps.values(), answer["entropies"], strict=True):
        assert abs(weights.sum() - 1) < 0.004 and abs(row_entropy(weights) - entropy) < 1e-9
    means = [key for key in maps if key[1] == "untrained" and key[5] == 0]
    assert len(means) == 3 * 4 * 7  # models, layers, and the CLS query of six images and the centre of one
    for key in means:
        heads = torch.stack([maps[*key[:5], head] for head in range(1, 5)])
        torch.testing.assert_close(maps[key], heads.mean(0))
    assert len(set(answer["shown"])) >= 20
