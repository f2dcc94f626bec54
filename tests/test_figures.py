"""Figures: saving is whole, labelled and repeatable; every plot function draws small data and refuses wrong data."""

import base64
import copy
import html
import io
import itertools
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from cases import over
from matplotlib.figure import Figure
from PIL import Image

from krause_repro import drawing, figures, result_figures
from krause_repro.checks import PROFILES
from krause_repro.results import check_fields

CURVE = {"mean": [0.2, 0.5, 0.6], "sd": [0.1, 0.0, 0.05]}
ONE_CURVE = {"mean": [0.2, 0.5, 0.6], "sd": [None, None, None]}
MIDDLE = {"median": [1, 2, 3], "low": [0, 1, 2], "high": [1, 2, 4]}
NAMED = {"label": "KViT", "kind": "krause"}
SHOWN = {"image": [[0.0, 1.0], [0.5, 0.2]], "query": [0, 1]}
GRID = {"score": [0.1, 0.9, 0.5, 0.3], "window": [True, True, True, False], "selected": [False, True, True, False],
        "weights": [0, 0.64, 0.36, 0]}
EXAMPLES = {
    "plot_bifurcation": {"radii": [0.1, 0.3], "opinions": [[0.2, 0.2, 0.8], [0.5, 0.5, 0.5]], "agents": 3},
    "plot_particles": {"panels": [
        {"title": "circle", "kind": "krause", "dimension": 2, "times": [0, 1], "groups": [2, 1],
         "snapshots": [[[1, 0], [0, 1]], [[1, 0], [1, 0]]]},
        {"title": "sphere", "kind": "softmax", "dimension": 3, "times": [0], "groups": [2], "snapshots": [[[1, 0, 0], [-1, 0, 0]]]}]},
    "plot_particle_statistics": {"starts": 3, "series": [
        {**NAMED, "times": [0, 1, 2], "order": MIDDLE, "clusters": MIDDLE, "diameter": MIDDLE}]},
    "plot_mechanism": {"height": 2, "width": 2, "query": 0, "sigma": 2.5, "top_k": 2, **GRID},
    "plot_training_curves": {"seeds": 1, "series": [
        {**NAMED, "epochs": [1, 2, 3], "validation_accuracy": CURVE, "train_loss": {"epochs": [0.5, 1, 2], **ONE_CURVE}},
        {"label": "ViT", "kind": "softmax", "epochs": [1, 2, 3], "validation_accuracy": {"mean": [0.1, None, 0.3], "sd": None},
         "train_loss": {"epochs": [0.5, 1, 2], **CURVE}}]},
    "plot_accuracy": {"metric": "test accuracy", "chance": 0.1, "rows": [
        {**NAMED, "values": [0.8, 0.82], "mean": 0.81, "sd": 0.014}, {**NAMED, "values": [0.7], "mean": 0.7, "sd": None}]},
    "plot_factors": {"metric": "test accuracy", "places": ["full", "window", "other"], "joined": ["full", "window"], "rows": [
        {**NAMED, "place": place, "values": [0.8, 0.9], "mean": 0.8} for place in ("full", "window", "other")]},
    "plot_differences": {"counts": 0.01, "rows": [
        {"label": "A − B", "values": [0.01, 0.03], "mean": 0.02, "interval": [0.0, 0.04]},
        {"label": "A − C", "values": [0.03, 0.05], "mean": 0.04, "interval": [0.01, 0.07]}]},
    "plot_sigma": {"layers": [1, 2, 3], "seeds": 2, "series": [{**NAMED, "initial": 2.5, **CURVE}]},
    "plot_attention_maps": {"grid": [2, 2], "columns": ["head 1", "head 2"], "rows": [
        {**NAMED, **SHOWN, "maps": [[0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]], "cls_weight": [0.0, 0.1]},
        {**NAMED, **SHOWN, "maps": [[0.1, 0.2, 0.3, 0.4]]}]},
    "plot_depth": {"seeds": 2, "panels": [
        {"quantity": "entropy", "first": 1, "parts": {
            "trained": [{**NAMED, **CURVE}], "untrained": [{**NAMED, "mean": [5, 6, 7], "sd": None}]}},
        {"quantity": "cosine", "first": 0, "parts": {"trained": [{**NAMED, **CURVE}, {"label": "ViT", "kind": "softmax", **ONE_CURVE}]}}]},
    "plot_scaling": {"xlabel": "tokens", "ylabel": "seconds", "symbol": "T", "panels": [
        {"title": "forward", "series": [{**NAMED, "x": [1024, 1536], "y": [0.1, 0.2], "exponent": -0.001}]},
        {"title": "both", "series": [{**NAMED, "x": [1024], "y": [0.1], "exponent": None}]}]},
    "plot_ratios": {"marks": ["forward", "both"], "baseline": "full attention", "panels": [
        {"title": "short", "rows": [{**NAMED, "points": [{"ratio": 0.5, "low": 0.4, "high": 0.6}, {"ratio": 2, "low": 2, "high": 2}]},
                                    {"label": "ViT", "kind": "softmax", "points": [None, {"ratio": 9, "low": 8, "high": 10}]}]},
        {"title": "long", "rows": [{"label": "ViT", "kind": "softmax", "points": [{"ratio": 1, "low": 1, "high": 1}, None]}]},
        {"title": "longer", "rows": [{**NAMED, "points": [{"ratio": 1, "low": 1, "high": 1}, None]}]}]},
    "plot_bits": {"baselines": [{"label": "order 1", "value": 3.9}], "rows": [
        {**NAMED, "values": [3.3, 3.4], "mean": 3.35, "sd": 0.07}, {**NAMED, "values": [3.5], "mean": 3.5, "sd": None}]},
    "plot_bits_curves": {"seeds": 2, "series": [
        {**NAMED, "held_out": {"epochs": [1, 2, 3], **CURVE}, "training": {"epochs": [0.5, 1, 2], **ONE_CURVE}}]},
    "plot_sinks": {"ylabel": "attention", "passages": 2, "rows": {
        "before": [{"title": "all", "series": [{"label": "base", "kind": "softmax", "layers": CURVE},
                                               {"label": "cut", "kind": "softmax", "layers": ONE_CURVE, "control": True}]},
                   {"title": "near", "series": [{**NAMED, "layers": {"mean": [0, 0], "sd": None}}]}],
        "after": [{"title": "all", "series": [{**NAMED, "layers": CURVE}]}]}},
    "plot_fine_tuning": {"seeds": 2, "contrast": "A − B", "differences": [
        {"label": "answers", "values": [0.1, 0.2], "mean": 0.15, "interval": [0.1, 0.2]},
        {"label": "plays", "values": [0.1], "mean": 0.1, "interval": None}],
        "panels": [{"title": "answers", "ylabel": "nats", "baselines": [{"label": "base", "value": 3}], "series": [
            {**NAMED, "steps": [0, 5, 9], **CURVE}]},
                   {"title": "plays", "ylabel": "nats", "baselines": [{"label": "base", "value": 2}], "series": [
                       {"label": "LoRA", "kind": "mixed", "steps": [0, 5, 9], **ONE_CURVE}, {**NAMED, "steps": [1, 2, 3], **CURVE}]}]},
    "plot_gate": {"layers": [1, 2, 3], "over": "2 seeds", "series": [{**NAMED, "initial": 0.8, **CURVE}]},
    "plot_by_position": {"length": 2, "seeds": 2, "series": [{**NAMED, "positions": [1, 2, 4], **CURVE}]},
    "plot_groups": {"groups": ["binding", "ellipsis"], "items": [100, 25], "chance": 0.5, "metric": "accuracy", "series": [
        {**NAMED, "values": [0.5, 0.7]}, {"label": "ARM", "kind": "softmax", "values": [0.6, 0.4]}]},
    "plot_token_time": {"made": "medians", "cases": [
        {"title": "short", "series": [{**NAMED, "positions": [1, 2], "milliseconds": [3, 4]}]},
        {"title": "long", "series": [{"label": "ARM", "kind": "softmax", "positions": [9], "milliseconds": [3]}]}]},
    "plot_samples": {"levels": 17, "rows": [
        {**NAMED, "images": [[[[0, 16], [8, 4]]], [[[1, 2], [3, 4]]]]},
        {"label": "ARM", "kind": "softmax", "images": [[[[0, 1], [2, 3]]]]}]},
    "plot_completions": {"levels": 256, "given": 1, "originals": [[[[0, 255], [9, 8]]] * 3] * 2, "models": [
        {**NAMED, "completed": [[[[[0, 255], [1, 2]]] * 3] * 2] * 2}]},
}
SAVE = {"caption": "Opinions ‖x‖ · an example.", "notebook": "56_figures", "seeds": 3}

PLOTS = {name: getattr(module, name) for module in (figures, result_figures) for name in module.__all__ if name.startswith("plot_")}


def draw(name="plot_bifurcation"):
    "A fresh figure of one plot function on its example."
    return PLOTS[name](copy.deepcopy(EXAMPLES[name]))


def pixels(source):
    "The pixels of a figure or a saved PNG."
    if isinstance(source, Figure):
        buffer = io.BytesIO()
        source.savefig(buffer, format="png", dpi=50)
        source = buffer
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB")).copy()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_plot_is_drawn_in_the_house_style(name, monkeypatch):
    tops, new_figure = [], drawing.new_figure

    def watched(*arguments, **options):
        tops.append(matplotlib.rcParams["axes.spines.top"])
        return new_figure(*arguments, **options)

    for module in (figures, result_figures):
        monkeypatch.setattr(module, "new_figure", watched)
    draw(name)
    assert tops == [False]


def test_examples_cover_every_plot_function():
    assert set(EXAMPLES) == set(PLOTS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_plot_draws_labels_its_axes_and_changes_nothing_global(name, monkeypatch):
    monkeypatch.setattr(drawing, "INLINE_DPI", 20)  # a pixel costs more than a label
    data, settings = copy.deepcopy(EXAMPLES[name]), dict(matplotlib.rcParams)
    fig = PLOTS[name](data)
    assert isinstance(fig, Figure)
    assert data == EXAMPLES[name]
    assert dict(matplotlib.rcParams) == settings
    assert Image.open(io.BytesIO(fig._repr_png_())).size[0] == drawing.WIDTH * drawing.INLINE_DPI
    for ax in (ax for ax in fig.axes if ax.axison):
        labels = [axis.get_label_text() for axis in (ax.xaxis, ax.yaxis) if any(t.get_text() for t in axis.get_majorticklabels())]
        assert all(labels), f"{name}: an axis with ticks has no label"


@over("name", EXAMPLES)
def test_plot_names_each_missing_key(name):
    for key in EXAMPLES[name]:
        data = {k: v for k, v in EXAMPLES[name].items() if k != key}
        with pytest.raises(ValueError, match=f"data has no .*{key}"):
            PLOTS[name](data)
    with pytest.raises(TypeError, match="data is list"):
        PLOTS[name]([1, 2])


@over(
    ("name", "path", "value", "message"),
    [
        ("plot_bifurcation", ["opinions"], [[0.1]], r"data has lists of different lengths.*radii"),
        ("plot_bifurcation", ["radii"], [], r"nothing in radii"),
        ("plot_particles", ["panels", 0, "dimension"], 4, r"data\['panels'\]\[0\] has dimension 4; allowed are 2"),
        ("plot_particles", ["panels", 1, "snapshots", 0], [[1, 0]], r"panels'\]\[1\].*shape \(1, 2\); give \(particles, 3\)"),
        ("plot_particles", ["panels", 0, "times"], [0], r"panels'\]\[0\] has lists of different lengths"),
        ("plot_particles", ["panels", 0, "kind"], "quantum", r"kind 'quantum'; allowed are krause, softmax"),
        ("plot_particle_statistics", ["series", 0, "order"], {"median": [1, 2, 3]}, r"series'\]\[0\]\['order'\] has no low, high"),
        ("plot_particle_statistics", ["series", 0, "times"], [0, 1], r"different lengths.*'times': 2, 'median': 3"),
        ("plot_mechanism", ["score"], [0.1], r"different lengths.*'score': 1"),
        ("plot_training_curves", ["series", 1, "train_loss"], {}, r"series'\]\[1\]\['train_loss'\] has no epochs"),
        ("plot_bits", ["rows", 0, "kind"], "best", r"rows'\]\[0\] has kind 'best'"),
        ("plot_bits_curves", ["series", 0, "training"], {}, r"series'\]\[0\]\['training'\] has no epochs"),
        ("plot_token_time", ["cases", 0, "series", 0, "positions"], [1], r"different lengths.*'positions': 1, 'milliseconds': 2"),
        ("plot_samples", ["rows", 1, "images"], [], r"rows'\]\[1\] has nothing in images"),
        ("plot_completions", ["models", 0, "kind"], "best", r"models'\]\[0\] has kind 'best'"),
        ("plot_accuracy", ["rows", 0, "kind"], "best", r"rows'\]\[0\] has kind 'best'"),
        ("plot_accuracy", ["rows", 1, "values"], [], r"rows'\]\[1\] has nothing in values"),
        ("plot_sigma", ["layers"], [1, 2], r"different lengths"),
        ("plot_sigma", ["series", 0], {**NAMED, **CURVE}, r"series'\]\[0\] has no initial"),
        ("plot_gate", ["layers"], [1, 2], r"different lengths"),
        ("plot_gate", ["series", 0], {**NAMED, **CURVE}, r"series'\]\[0\] has no initial"),
        ("plot_sinks", ["rows", "before", 1], {"title": "near"}, r"rows'\]\['before'\]\[1\] has no series; it needs"),
        ("plot_sinks", ["rows", "before", 1, "series", 0], {**NAMED}, r"\['before'\]\[1\]\['series'\]\[0\] has no layers"),
        ("plot_sinks", ["rows", "before", 0, "series", 0, "layers"], {"mean": [1]}, r"\['series'\]\[0\]\['layers'\] has no sd"),
        ("plot_sinks", ["rows", "before", 0, "series", 0, "kind"], "best", r"\['series'\]\[0\] has kind 'best'"),
        ("plot_factors", ["rows", 0, "place"], "nowhere", r"rows'\]\[0\] has place 'nowhere'; allowed are full, window, other"),
        ("plot_factors", ["rows", 0, "kind"], "best", r"rows'\]\[0\] has kind 'best'"),
        ("plot_fine_tuning", ["panels", 0, "series", 0, "steps"], [1], r"panels'\]\[0\]\['series'\]\[0\] has lists of different lengths"),
        ("plot_fine_tuning", ["panels", 1, "baselines", 0], {"label": "base"}, r"panels'\]\[1\]\['baselines'\]\[0\] has no value"),
        ("plot_fine_tuning", ["panels", 1, "series"], [], r"panels'\]\[1\] has nothing in series"),
        ("plot_attention_maps", ["rows", 0, "image"], [0.0, 1.0], r"image has shape \(2,\)"),
        ("plot_attention_maps", ["rows", 0, "query"], [2, 0], r"query is \[2, 0\]; give 'cls'"),
        ("plot_attention_maps", ["rows", 0, "maps", 0], [1.0], r"rows'\]\[0\] has maps of \[1, 4\] weights"),
        ("plot_attention_maps", ["columns"], ["head 1"], r"'columns'\] has 1 titles for rows of up to 2 maps"),
        ("plot_attention_maps", ["rows", 0, "cls_weight"], [0.1], r"rows'\]\[0\] has lists of different lengths"),
        ("plot_scaling", ["panels", 0, "series", 0, "y"], [0.1], r"panels'\]\[0\]\['series'\]\[0\] has lists of different lengths"),
        ("plot_scaling", ["panels", 1, "series"], [], r"panels'\]\[1\] has nothing in series"),
        ("plot_ratios", ["marks"], ["forward"], r"rows'\]\[0\] has lists of different lengths.*'points': 2, 'marks': 1"),
        ("plot_ratios", ["marks"], list("abcd"), r"data has 4 marks; give at most 3"),
        ("plot_ratios", ["panels", 0, "rows", 0, "points", 1], {"ratio": 1}, r"\['points'\]\[1\] has no low, high"),
    ],
)
def test_plot_refuses_wrong_values(name, path, value, message):
    data = copy.deepcopy(EXAMPLES[name])
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        PLOTS[name](data)


def test_one_seed_has_no_spread_and_a_gap_stays_a_gap():
    accuracy = draw("plot_accuracy").axes[0]
    assert [text.get_text() for text in accuracy.texts] == ["81.00 ± 1.40", "70.00"]
    assert accuracy.get_xlabel() == "test accuracy (%), shown from 68 to 84; chance is 10"
    linear = {**NAMED, "kind": "neutral", "values": [0.4], "mean": 0.4, "sd": None}  # an arrow at the axis, its number beside it
    far = result_figures.plot_accuracy({**EXAMPLES["plot_accuracy"], "rows": [*EXAMPLES["plot_accuracy"]["rows"], linear]}).axes[0]
    assert far.get_xlim() == accuracy.get_xlim() and [text.get_text() for text in far.texts][-1] == "40.00"
    assert [(*line.get_xdata(), *line.get_ydata()) for line in far.lines if line.get_marker() == "<"] == [(68, 2)]
    _, gap = (line.get_ydata() for line in draw("plot_training_curves").axes[0].lines)
    np.testing.assert_array_equal(np.isnan(gap), [False, True, False])


def test_growth_is_drawn_at_the_sizes_measured():
    ax = draw("plot_scaling").axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1k", "1536"] and ax.get_xscale() == ax.get_yscale() == "log"
    assert [text.get_text() for axes in draw("plot_scaling").axes for text in axes.texts] == ["KViT\n$\\propto T^{0.00}$", "KViT"]


def test_ratios_have_no_empty_rows_and_leave_gaps():
    short, long, longer, empty = draw("plot_ratios").axes
    assert [tick.get_text() for tick in short.get_yticklabels()] == ["KViT", "ViT"] and len(long.get_yticklabels()) == 1  # no empty row
    assert [text.get_text() for text in short.texts] == ["0.50", "2.00", "9.00"] and [t.get_text() for t in long.texts] == ["1.00"]
    assert [round(text.get_position()[1]) for text in (*short.texts, *long.texts)] == [0, 0, 1, 0]
    assert longer.axison and not empty.axison


def test_a_dot_stands_for_its_share():
    places, shares = figures._merged(np.array([[0.2], [0.201], [0.8], [0.2]]))
    assert places.tolist() == [[0.2], [0.8]] and shares.tolist() == [0.75, 0.25]


def test_view_keeps_lengths_and_tells_front_from_back():
    points = np.random.default_rng(0).normal(size=(20, 3))
    places, nearness = figures._view(points)
    np.testing.assert_allclose((places**2).sum(1) + nearness**2, (points**2).sum(1))
    toward = np.array([np.cos(0.4) * np.cos(0.6), np.cos(0.4) * np.sin(0.6), np.sin(0.4)])
    np.testing.assert_allclose(figures._view(toward[None])[1], [1])


def test_a_sphere_is_turned_so_that_consensus_is_in_front():
    rng = np.random.default_rng(0)
    for place in rng.normal(size=(20, 3)):
        place /= np.linalg.norm(place)
        panels = [{"dimension": 3, "snapshots": [rng.normal(size=(5, 3)), [place] * 5]}]
        assert figures._view(place[None], *figures._facing(panels))[1] > 0.8
    assert figures._facing([{"dimension": 2, "snapshots": [[[1, 0]]]}]) == (0.4, 0.6)


def test_an_animation_has_a_frame_for_each_time(tmp_path):
    panels = copy.deepcopy(EXAMPLES["plot_particles"]["panels"][:1])
    path = figures.animate_particles({"panels": panels}, tmp_path / "new" / "a.webp")
    with Image.open(path) as image:
        assert image.format == "WEBP" and image.n_frames == 2 and image.size[0] == 640
    panels[0]["times"] = [0]
    with pytest.raises(ValueError, match="lists of different lengths"):
        figures.animate_particles({"panels": panels}, path)


def test_the_far_side_is_faint():
    dots = draw("plot_particles").axes[2].collections[0]
    nearness = figures._view(figures._merged(np.array(EXAMPLES["plot_particles"]["panels"][1]["snapshots"][0]))[0])[1]
    assert dots.get_alpha().tolist() == [0.25 if near < 0 else 0.8 for near in nearness] and set(dots.get_alpha()) == {0.25, 0.8}


def test_cls_query_and_colour_image_are_drawn():
    data = copy.deepcopy(EXAMPLES["plot_attention_maps"])
    data["rows"][0] |= {"query": "cls", "image": np.zeros((4, 4, 3)).tolist()}
    axes = figures.plot_attention_maps(data).axes
    assert axes[0].get_xlabel() == "query: CLS" and not axes[0].patches and not axes[1].patches
    assert axes[3].get_xlabel() == "" and len(axes[3].patches) == len(axes[4].patches) == 1


def test_depth_starts_where_the_quantity_does():
    axes = [ax for ax in figures.plot_depth(copy.deepcopy(EXAMPLES["plot_depth"])).axes if ax.axison]
    assert [list(ax.lines[0].get_xdata()) for ax in axes] == [[1, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_ylim()[1] > 7  # one scale, which holds all parts


def test_long_quantities_are_wrapped_and_a_model_of_one_part_is_named():
    data = copy.deepcopy(EXAMPLES["plot_depth"])
    data["panels"][0]["quantity"] = "distance between heads"
    data["panels"][0]["parts"]["untrained"].append({"label": "control", "kind": "softmax_local", "mean": [5, 6, 7], "sd": None})
    fig = figures.plot_depth(data)
    assert fig.axes[0].get_ylabel() == "distance\nbetween heads" and legend(fig)[0] == ["KViT", "control", "ViT"]


def test_a_legend_that_is_too_wide_gets_fewer_columns():
    one = {"kind": "krause", "initial": 2.5, "mean": [1, 2], "sd": [0, 0]}
    series = [one | {"label": f"{name} " * 12} for name in ("one", "two", "three")]
    fig = figures.plot_sigma({"layers": [1, 2], "seeds": 2, "series": series})
    assert fig.legends[0].get_window_extent().width <= fig.bbox.width and len(fig.legends) == 1 and len(legend(fig)[0]) == 4


def legend(fig):
    "What the legend below a figure says, and its title."
    return [text.get_text() for text in fig.legends[0].get_texts()], fig.legends[0].get_title().get_text()


def test_sinks_are_read_with_their_means_and_the_control_is_dotted():
    fig = draw("plot_sinks")
    first, near, after, _ = fig.axes
    assert [text.get_text() for ax in fig.axes for text in ax.texts] == ["0.43 base", "0.43 cut", "0.00 KViT", "0.43 KViT"]
    base, cut = first.lines
    assert base.get_color() == cut.get_color() and (base.get_linestyle(), cut.get_linestyle()) == ("-", ":")
    assert first.get_ylim() == near.get_ylim() == after.get_ylim() == (0, 1)
    assert first.get_ylabel() == "before\nattention" and not near.get_ylabel() and after.get_ylabel().startswith("after")


def test_fine_tuning_has_labelled_curves_and_paired_differences():
    fig = draw("plot_fine_tuning")
    _, plays, differences = fig.axes
    assert {text.get_text() for text in plays.texts} == {"LoRA", "KViT", "base"}
    assert [tick.get_text() for tick in differences.get_yticklabels()] == ["answers", "plays"] and differences.get_xlabel() == "A − B"
    _, interval, seeds, mean, *_ = differences.lines
    assert [line.get_ydata()[0] for line in (interval, seeds, mean)] == [0, -0.26, 0]  # no seed behind the mean
    wide = [{"label": "answers", "values": [0.1, 0.2], "mean": 0.15, "interval": [-5, 5]}]
    cut = result_figures.plot_fine_tuning({**EXAMPLES["plot_fine_tuning"], "differences": wide}).axes[-1]
    assert cut.get_xlim() == (-0.2, 0.4)


def test_a_gate_shows_its_range_and_its_value_for_zero():
    assert draw("plot_gate").axes[0].get_ylim()[0] > 0
    wide = {**EXAMPLES["plot_gate"]["series"][0], "mean": [0.9, 0.8, 0.1], "sd": [0.3, 0.1, 0.3]}
    band = result_figures.plot_gate({**EXAMPLES["plot_gate"], "series": [wide]}).axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 1)
    assert [text.get_text() for text in draw("plot_gate").axes[0].texts] == ["KViT", "untrained, input zero: 0.8"]
    two = EXAMPLES["plot_gate"]["series"] * 2
    assert legend(figures.plot_sigma({"layers": [1, 2, 3], "seeds": 2, "series": [{**s, "label": str(i)} for i, s in enumerate(two)]})) == (
        ["0", "1", "at the start: 0.8"], "mean, and band of one standard deviation, over 2 seeds")


def test_only_differences_that_count_are_black():
    (ax,) = draw("plot_differences").axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["A − B", "A − C"]
    assert [line.get_color() for line in ax.lines[1::3]] == ["#8A8A8A", "#000000"]  # the interval of A − B touches zero
    assert [line.get_ydata()[0] for line in ax.lines[1:4]] == [0, -0.26, 0]  # no seed behind the mean
    few = {"counts": 0.01, "rows": [{"label": "C − D", "values": [0.01], "mean": 0.01, "interval": None}]}
    notes = [fig.get_supxlabel() for fig in (draw("plot_differences"), result_figures.plot_differences(few))]
    assert [note.rpartition("; ")[2] for note in notes] == ["black: counts", "none counts"] and "corrected 95% interval" in notes[0]


def test_only_the_places_named_are_joined():
    (ax,) = draw("plot_factors").axes
    assert [line for line in ax.lines if line.get_label() == "KViT"][0].get_xdata().tolist() == [0, 1] and len(ax.get_xticks()) == 3


def test_groups_show_the_standard_error_of_their_items():
    fig = draw("plot_groups")
    bands = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in fig.axes[0].patches]
    np.testing.assert_allclose(bands, [(55 - 4.975, 55 + 4.975), (55 - 9.95, 55 + 9.95)], atol=0.001)  # means of 55%, 100 and 25 items
    assert "seed" not in legend(fig)[1]


def test_a_cut_axis_is_named():
    assert draw("plot_factors").get_supxlabel().endswith("the axis does not begin at zero")


def test_seeds_in_a_row_can_show_another_quantity_than_bits():
    assert draw("plot_bits").axes[0].get_xlabel() == "bits per dimension of the test images, less is better"
    other = result_figures.plot_bits(EXAMPLES["plot_bits"] | {"quantity": "held-out loss (nats)", "dashed": "no training"})
    assert other.axes[0].get_xlabel() == "held-out loss (nats), less is better"
    assert other.get_supxlabel().endswith("\ndashed line, or arrow if beyond the axis: no training")


def test_a_distant_baseline_is_an_arrow_and_a_near_one_a_line():
    rows = EXAMPLES["plot_bits"]["rows"]  # up to 3.5
    lines = [{"label": name, "value": value} for name, value in (("far", 9.0), ("near", 3.6), ("least", 1.0))]
    ax = result_figures.plot_bits({"rows": rows, "baselines": lines}).axes[0]
    low, high = ax.get_xlim()
    assert 3 < low < 3.3 and 3.6 < high < 4
    assert [(line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in ax.lines if line.get_marker() in ("<", ">")] == [
        (">", high, 2), ("<", low, 4)]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [3.6]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["KViT", "KViT", "far", "near", "least"]
    assert [text.get_text() for text in ax.texts][2:] == ["9.000", "3.600", "1.000"]


def test_numbers_beside_lines_keep_their_order_and_their_distance():
    rng = np.random.default_rng(0)
    for values in (rng.random(5), np.zeros(5), np.ones(5), np.array([0.4]), rng.random(5) / 10 + 0.4):
        places = drawing.spread_labels(values.tolist(), 0.06)
        assert places.min() >= 0 and places.max() <= 1
        assert (np.diff(places[np.argsort(values, kind="stable")]) > 0.06 - 1e-9).all()
    np.testing.assert_allclose(drawing.spread_labels([0.9, 0.1, 0.5], 0.06), [0.9, 0.1, 0.5])


def linear(colour):
    "Linear RGB of a colour."
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lightness_and_hue(rgb):
    "CIE L*a*b* of linear RGB."
    xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]) @ rgb.clip(0, 1)
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_stay_apart_without_red_green_vision_and_text_is_legible():
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])  # Machado et al. (2009)
    for seen in (np.eye(3), deuteranopia):
        colours = [lightness_and_hue(seen @ linear(colour)) for colour in drawing.COLOURS.values()]
        apart = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]]
        assert min(apart) > 20  # ten times what can just be seen side by side
    for colour in drawing.COLOURS.values():
        assert 1.05 / (linear(drawing.readable_text_colour(colour)) @ (0.2126, 0.7152, 0.0722) + 0.05) >= 4.5  # contrast of text with white
        assert 1.05 / (linear(colour) @ (0.2126, 0.7152, 0.0722) + 0.05) > 2


def test_the_gate_of_a_block_is_that_of_an_input_of_zero():
    assert figures.draw_llm_block(32, 16, 0.8).axes[0].texts[-1].get_text().endswith("$g_t = 0.8$ if its input is zero")


def test_committed_figures_are_small_and_come_in_pairs():
    folder = drawing.figure_folder("desk")
    names = {ending: {path.stem for path in folder.glob(f"*.{ending}")} for ending in ("png", "svg")}
    assert names["png"] == names["svg"] and all(path.stat().st_size < 300_000 for path in folder.glob("*.svg"))
    assert {path.stem for path in folder.glob("*.webp") if path.stat().st_size < 2_000_000} == {"particles_circle", "particles_sphere"}


def test_same_numbers_give_the_same_bytes(tmp_path):
    fig, shown = draw("plot_bifurcation"), draw("plot_bifurcation")
    shown._repr_png_()
    saved = [[path.read_bytes() for path in drawing.save_figure(one, "a_name", profile="smoke", root=tmp_path, **SAVE)]
             for one in (fig, fig, shown)]
    assert saved[0] == saved[1] == saved[2]


def test_a_saved_figure_is_shown_with_its_caption(tmp_path):
    from IPython.core.interactiveshell import InteractiveShell

    from krause_repro.website import output_html

    fig, caption = draw(), SAVE["caption"] + " <b> & more."
    shown = []
    for _ in range(2):
        data, _ = InteractiveShell.instance().display_formatter.format(fig, include=["image/png", "text/plain"])
        output = {"data": {**data, "image/png": base64.b64encode(data["image/png"]).decode()}}
        shown.append(output_html(output, tmp_path / "images" / "page-1.png"))
        drawing.save_figure(fig, "a_name", profile="smoke", root=tmp_path, **SAVE | {"caption": caption})
    assert "figcaption" not in shown[0] and "Drawing" not in shown[0]
    assert f"<figcaption>{html.escape(caption)}</figcaption>" in shown[1] and f'alt="{html.escape(caption)}"' in shown[1]
    assert (tmp_path / "images" / "page-1.png").is_file()


def test_saved_files_say_what_they_show(tmp_path):
    for name in ("second", "first"):
        png, svg = drawing.save_figure(draw(), name, profile="desk", root=tmp_path, **SAVE)
        assert (png, svg) == (tmp_path / "figures" / f"{name}.png", tmp_path / "figures" / f"{name}.svg")
    index = [drawing.read_figure(png) for png in drawing.figure_files("desk", root=tmp_path)]
    assert [entry["name"] for entry in index] == ["first", "second"]
    folder = tmp_path / "figures"
    assert index[0] == {"name": "first", "caption": SAVE["caption"], "notebook": "56_figures", "profile": "desk",
                        "png": folder / "first.png", "svg": folder / "first.svg"}
    text = svg.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert SAVE["caption"] in text and "56_figures" in text and "dc:date" not in text
    assert Image.open(png).size[0] == drawing.WIDTH * drawing.DPI
    assert drawing.figure_files("smoke", root=tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another's"])
def test_a_damaged_figure_is_named(tmp_path, damage):
    png, _ = drawing.save_figure(Figure(figsize=(1, 1)), "example", profile="smoke", root=tmp_path, **SAVE)
    texts = {"cut": png.read_bytes()[:-200], "empty": b"", "text": b"no picture"}
    if damage in texts:
        png.write_bytes(texts[damage])
    else:
        Image.new("L", (2, 2)).save(png)
    with pytest.raises(ValueError, match=f"^{png} (is not a PNG, or damaged|carries no Title)"):
        drawing.read_figure(png)


def numbers(value, path=()):
    "Where the numbers in nested lists and dicts are."
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


@over("name", EXAMPLES)
def test_no_plot_draws_what_is_no_number(name):
    for path, wrong in zip([*numbers(EXAMPLES[name])][:40], itertools.cycle((float("nan"), float("-inf"))), strict=False):
        data = copy.deepcopy(EXAMPLES[name])
        part = data
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = wrong
        with pytest.raises(ValueError, match="numbers that are not finite in"):
            PLOTS[name](data)


def test_a_plot_of_a_result_names_its_file():
    data = check_fields({"series": [{"label": "KViT", "kind": "krause", "initial": 2.5, "mean": [1, 2]}]}, "a.json", "")
    with pytest.raises(ValueError, match=r"^a\.json: series\[0\] has no sd; it needs mean, sd$"):
        figures.plot_sigma({"layers": [1, 2], "seeds": 1, **data})
    with pytest.raises(ValueError, match=r"^a\.json: the result has no seeds"):
        figures.plot_sigma(data)


def test_index_names_a_stranger(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "figures" / "stranger.png")
    with pytest.raises(ValueError, match="stranger.png carries no Title, Description, Source, Comment"):
        drawing.read_figure(tmp_path / "figures" / "stranger.png")


def test_only_smoke_is_stamped(tmp_path, monkeypatch):
    fig, words = draw(), []
    savefig = fig.savefig
    monkeypatch.setattr(fig, "savefig", lambda *a, **k: (words.append([t.get_text() for t in fig.texts]), savefig(*a, **k)))
    saved = {profile: drawing.save_figure(fig, "a_name", profile=profile, root=tmp_path, **SAVE)[0]
             for profile in PROFILES}
    assert words == 2 * [["smoke profile · 3 seeds", drawing.SMOKE_STAMP]] + 2 * [["desk profile · 3 seeds"]] + 2 * [
        ["paper profile · 3 seeds"]]
    assert saved["smoke"] == tmp_path / "runs" / "smoke" / "figures" / "a_name.png"
    drawn = {profile: pixels(path)[40:] for profile, path in saved.items()}  # below the line that names the profile
    np.testing.assert_array_equal(drawn["desk"], drawn["paper"])
    assert (drawn["desk"] != drawn["smoke"]).any(axis=2).mean() > 0.01


def test_saving_leaves_the_figure_as_it_was_once_its_layout_is_fixed(tmp_path):
    fig = draw("plot_sigma")
    drawing.fix_layout(fig)
    before, artists = pixels(fig), list(fig.get_children())
    state = (fig.get_dpi(), tuple(fig.get_size_inches()))
    drawing.save_figure(fig, "a_name", profile="smoke", root=tmp_path, **SAVE)
    assert list(fig.get_children()) == artists
    assert (fig.get_dpi(), tuple(fig.get_size_inches())) == state
    np.testing.assert_array_equal(pixels(fig), before)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("breaks", ["png", "svg"])
def test_a_failed_save_leaves_whole_files_or_none(tmp_path, monkeypatch, earlier, breaks):
    fig, saved = draw(), {}
    if earlier:
        saved = {path: path.read_bytes() for path in drawing.save_figure(fig, "a_name", profile="desk", root=tmp_path, **SAVE)}
    savefig = fig.savefig

    def half(path, format, **options):
        if format == breaks:
            path.write_bytes(b"half of a fig")
            raise OSError("no space left on device")
        savefig(path, format=format, **options)

    monkeypatch.setattr(fig, "savefig", half)
    with pytest.raises(OSError, match="no space"):
        drawing.save_figure(fig, "a_name", profile="desk", root=tmp_path, **SAVE | {"caption": "Another."})
    assert {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == saved
    assert fig.texts == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Two Words"}, "name is 'Two Words'"),
        ({"name": "../escape"}, "name is"),
        ({"profile": "test"}, "profile must be one of smoke, desk, paper, got 'test'"),
        ({"caption": "  "}, "caption is"),
        ({"caption": None}, "caption is None"),
        ({"notebook": "figures.ipynb"}, "notebook is 'figures.ipynb'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": (0, 3)}, r"seeds is \(0, 3\)"),
        ({"fig": "a figure"}, "fig is str"),
    ],
)
def test_save_refuses_what_could_not_be_found_again(tmp_path, change, message):
    arguments = {"fig": Figure(), "name": "a_name", "profile": "desk", "root": tmp_path, **SAVE} | change
    with pytest.raises(TypeError if "fig" in change else ValueError, match=message):
        drawing.save_figure(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_colours_are_distinct_and_the_style_ends_with_its_block():
    assert len(set(drawing.COLOURS.values())) == len(drawing.COLOURS)
    with matplotlib.rc_context({"font.size": 31, "axes.grid": False}):
        with drawing.house_style():
            assert matplotlib.rcParams["font.size"] == drawing.STYLE["font.size"]
        assert matplotlib.rcParams["font.size"] == 31
