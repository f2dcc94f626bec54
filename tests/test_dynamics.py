"""Properties of the opinion and particle dynamics (00_dynamics): closed forms, symmetries, convergence, refusals."""

import math

import pytest
import torch
from cases import over

from krause_repro.dynamics import (
    INTEGRATORS,
    closed_groups,
    cluster_count,
    diameter,
    distances,
    flow,
    hk_bifurcation,
    hk_run,
    hk_step,
    interaction_graph,
    interaction_weights,
    order_parameter,
    tangent,
    uniform_sphere,
)

RULES = {
    "softmax": {"beta": 4.0},
    "gaussian": {"sigma": 0.5},
    "radius": {"sigma": 0.5, "radius": 0.8},
    "top-k": {"sigma": 0.5, "top_k": 6},
    "both": {"sigma": 0.5, "radius": 0.8, "top_k": 6},
    "softmax on the Krause graph": {"beta": 4.0, "radius": 0.8, "top_k": 6},
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance):
    assert (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() <= tolerance


def opinions(n, dim=1, batch=(), seed=0):
    return torch.rand(*batch, n, dim, generator=seeded(seed), dtype=torch.float64)


def two_groups(n=15, spread=0.1, seed=0):
    "Two groups around opposite poles, (2n, 3)."
    noise = spread * torch.randn(2, n, 3, generator=seeded(seed), dtype=torch.float64)
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return torch.nn.functional.normalize(torch.cat([pole + noise[0], -pole + noise[1]]), dim=-1)


# Bounded confidence


@pytest.mark.parametrize(("gap", "expected"), [(0.3, [0.15, 0.15]), (0.7, [0.0, 0.7])])
def test_two_agents_meet_inside_the_radius_and_stay_outside(gap, expected):
    x = torch.tensor([[0.0], [gap]], dtype=torch.float64)
    close(hk_step(x, 0.5).flatten(), torch.tensor(expected, dtype=torch.float64), 1e-15)


def test_an_agent_exactly_at_the_radius_is_heard():
    x = torch.tensor([[0.0], [0.5]])
    assert hk_step(x, 0.5).flatten().tolist() == [0.25, 0.25]


def test_radius_zero_moves_nobody_and_a_huge_radius_agrees_at_once():
    x = opinions(20, 3)
    assert torch.equal(hk_step(x, 0.0), x)
    close(hk_step(x, 10.0), x.mean(0).expand(20, 3), 1e-14)


def test_averaging_is_simultaneous():
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    close(hk_step(x, 1.0).flatten(), torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64), 1e-15)


def test_order_on_the_line_is_preserved_and_the_range_shrinks():
    x = opinions(80).sort(0).values
    for _ in range(15):
        new = hk_step(x, 0.15)
        assert (new.diff(dim=0) >= -1e-12).all()
        assert new.min() >= x.min() - 1e-12 and new.max() <= x.max() + 1e-12
        x = new


def test_a_run_stops_in_finite_time_at_a_fixed_point():
    x, steps = hk_run(opinions(60, batch=(5,)), 0.12)
    assert steps.shape == (5,) and steps.max() < 200
    close(hk_step(x, 0.12), x, 1e-6)
    gaps = x.squeeze(-1).sort(-1).values.diff()
    assert ((gaps < 1e-5) | (gaps > 0.12)).all()


def test_a_batch_is_its_runs_one_by_one_and_radii_may_differ():
    x, radii = opinions(30, 2, batch=(4,)), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    alone = torch.stack([hk_step(run, r.item()) for run, r in zip(x, radii, strict=True)])
    close(hk_step(x, radii), alone, 1e-14)


def test_bifurcation_ends_in_one_opinion_for_a_wide_radius_and_in_many_for_a_narrow_one():
    diagram = hk_bifurcation(60, 0.05, 0.30)
    groups = [1 + sum(b - a > 1e-3 for a, b in zip(run, run[1:], strict=False)) for run in diagram["opinions"]]
    assert groups[-1] == 1 and groups[0] >= 5
    assert all(len(run) == 60 for run in diagram["opinions"]) and len(diagram["radii"]) == len(groups)
    for run in diagram["opinions"]:  # the even start is symmetric
        assert max(abs(1 - a - b) for a, b in zip(run, reversed(run), strict=True)) < 2e-4


def test_too_few_steps_is_an_error_and_not_a_result():
    with pytest.raises(RuntimeError, match="max_steps=2"):
        hk_run(opinions(50), 0.1, max_steps=2)


# Weights


def test_on_the_sphere_the_gaussian_is_softmax_with_beta_one_over_sigma_squared():
    x = uniform_sphere(100, 3, seeded(), batch=(2,))
    for sigma in (0.3, 1.0, 2.0):
        close(interaction_weights(x, sigma=sigma), interaction_weights(x, beta=1 / sigma**2), 1e-12)


def test_off_the_sphere_it_is_not():
    x = opinions(30, 3) * 2
    assert (interaction_weights(x, sigma=0.5) - interaction_weights(x, beta=4.0)).abs().max() > 0.01


def test_the_weights_are_the_formula():
    x = opinions(25, 4)
    score = (-distances(x).square() / (2 * 0.4**2)).exp()
    close(interaction_weights(x, sigma=0.4), score / score.sum(-1, keepdim=True), 1e-12)
    inside = score * (distances(x) <= 0.6)
    close(interaction_weights(x, sigma=0.4, radius=0.6), inside / inside.sum(-1, keepdim=True), 1e-12)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_sum_to_one_on_the_graph_and_are_zero_outside(rule, dtype):
    x = uniform_sphere(40, 3, seeded(), batch=(2,), dtype=dtype)
    weights = interaction_weights(x, **rule)
    graph = interaction_graph(x, rule.get("radius"), rule.get("top_k"))
    assert weights.dtype == dtype and weights.shape == (2, 40, 40)
    close(weights.sum(-1), torch.ones(2, 40, dtype=dtype), 1e-6 if dtype == torch.float32 else 1e-14)
    assert (weights[~graph] == 0).all() and (weights[graph] > 0).all()


def test_an_infinitely_wide_gaussian_on_a_radius_is_the_opinion_model():
    x = opinions(40, 2)
    close(interaction_weights(x, sigma=math.inf, radius=0.3) @ x, hk_step(x, 0.3), 1e-14)


def test_a_narrow_gaussian_does_not_underflow():
    weights = interaction_weights(opinions(20, 2), sigma=1e-4)
    assert weights.isfinite().all()
    close(weights, torch.eye(20), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 7, 39, 40, 100])
def test_top_k_keeps_k_nearest_without_ties(k):
    x = uniform_sphere(40, 3, seeded())
    graph = interaction_graph(x, top_k=k)
    assert (graph.sum(-1) == min(k, 40)).all()
    nearest = distances(x).argsort(-1)[:, : min(k, 40)]
    assert graph.gather(-1, nearest).all()


def test_ties_at_the_kth_place_all_stay():
    line = torch.arange(6.0, dtype=torch.float64)[:, None]
    assert interaction_graph(line, top_k=2).sum(-1).tolist() == [2, 3, 3, 3, 3, 2]
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert interaction_graph(square, top_k=2).sum(-1).tolist() == [3, 3, 3, 3]
    assert interaction_graph(torch.zeros(5, 2), top_k=1).all()


def test_radius_comes_before_top_k_and_short_rows_keep_all():
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3], [5.0], [5.1]], dtype=torch.float64)
    graph = interaction_graph(x, radius=0.5, top_k=3)
    assert graph.sum(-1).tolist()[4:] == [2, 2]
    assert not graph[4:, :4].any() and (graph[:4].sum(-1) >= 3).all()
    assert torch.equal(graph, interaction_graph(x, radius=0.5) & interaction_graph(x, top_k=3))


# The flow


@each_rule
def test_the_flow_moves_by_its_weights(rule):
    x = uniform_sphere(30, 3, seeded())
    step = 1e-3
    moved = flow(x, **rule, step=step, steps=1, integrator="euler").states[-1]
    expected = torch.nn.functional.normalize(x + step * tangent(x, interaction_weights(x, **rule) @ x), dim=-1)
    close(moved, expected, 1e-13)


@each_rule
@pytest.mark.parametrize("integrator", sorted(INTEGRATORS))
def test_particles_stay_on_the_sphere(rule, integrator):
    x = uniform_sphere(30, 3, seeded(), batch=(3,), dtype=torch.float32)
    run = flow(x, **rule, step=0.5, steps=40, integrator=integrator, record_every=10)
    assert run.states.shape == (5, 3, 30, 3) and run.states.dtype == torch.float32
    assert torch.equal(run.times, torch.arange(5) * 5.0)
    close(run.states.norm(dim=-1), torch.ones(5, 3, 30), 1e-6)


@each_rule
def test_rotating_the_start_rotates_the_flow(rule):
    x = uniform_sphere(30, 3, seeded(3))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=seeded(1), dtype=torch.float64)).Q
    plain, turned = (flow(start, **rule, steps=20).states for start in (x, x @ rotation))
    assert (plain[-1] - plain[0]).abs().max() > 0.01
    close(turned, plain @ rotation, 1e-10)


@each_rule
def test_renaming_the_particles_renames_the_flow(rule):
    x, names = uniform_sphere(30, 3, seeded(3)), torch.randperm(30, generator=seeded(1))
    plain, renamed = (flow(start, **rule, steps=20).states for start in (x, x[names]))
    close(renamed, plain[:, names], 1e-10)


@each_rule
def test_a_batch_flows_as_its_runs_one_by_one(rule):
    x = uniform_sphere(25, 2, seeded(), batch=(3,))
    together = flow(x, **rule, steps=15).states
    close(together, torch.stack([flow(run, **rule, steps=15).states for run in x], 1), 1e-10)


def test_two_particles_follow_the_closed_form():
    beta, start, end = 2.0, 2.5, 0.4
    theta = torch.linspace(end, start, 20001, dtype=torch.float64)
    duration = torch.trapezoid((1 + (beta * (1 - theta.cos())).exp()) / (2 * theta.sin()), theta).item()
    x = torch.tensor([[1.0, 0.0], [math.cos(start), math.sin(start)]], dtype=torch.float64)
    a, b = flow(x, beta=beta, step=duration / 200, steps=200, record_every=200).states[-1]
    assert math.acos(a @ b) == pytest.approx(end, abs=1e-6)


def test_only_truncation_separates():
    x = uniform_sphere(100, 3, seeded(2))
    softmax, gaussian, cut, selected = (
        flow(x, **rule, step=0.2, steps=200, integrator="euler", record_every=200).states[-1]
        for rule in ({"beta": 1.0}, {"sigma": 1.0}, {"sigma": 1.0, "radius": 0.6}, {"sigma": 1.0, "top_k": 12})
    )
    close(softmax, gaussian, 1e-9)
    assert cluster_count(softmax, 0.1) == 1 and order_parameter(softmax) > 1 - 1e-9
    assert cluster_count(cut, 0.1) > 2 and cluster_count(selected, 0.1) > 2


# Theory


@pytest.mark.parametrize("rule", [{"sigma": 0.5, "radius": 1.0}, {"sigma": 0.5, "top_k": 8}], ids=["radius", "top-k"])
def test_separate_groups_are_exactly_independent(rule):
    x = two_groups()
    pushed = x.clone()
    pushed[15:] = torch.nn.functional.normalize(x[15:] + torch.tensor([0.2, 0.1, 0.0]), dim=-1)
    plain, other = flow(x, **rule, steps=50).states, flow(pushed, **rule, steps=50).states
    assert torch.equal(plain[:, :15], other[:, :15])
    assert not torch.equal(plain[:, 15:], other[:, 15:])


def test_softmax_groups_are_not_independent():
    x = two_groups()
    pushed = x.clone()
    pushed[15:] = torch.nn.functional.normalize(x[15:] + torch.tensor([0.2, 0.1, 0.0]), dim=-1)
    assert (flow(x, beta=4.0, steps=50).states - flow(pushed, beta=4.0, steps=50).states)[:, :15].abs().max() > 1e-6


def test_with_a_radius_closed_groups_are_clusters():
    x = two_groups()
    assert closed_groups(interaction_weights(x, sigma=0.5, radius=1.0)) == 2
    assert closed_groups(interaction_weights(x, sigma=0.5)) == 1
    for seed in range(5):
        start = uniform_sphere(40, 2, seeded(seed))
        assert closed_groups(interaction_weights(start, sigma=0.5, radius=0.2)) == cluster_count(start, 0.2)


def test_a_listener_is_not_a_group_of_its_own():
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0.3, 0.3, 0, 0.4]])
    assert closed_groups(weights) == 2
    assert closed_groups(torch.eye(5)) == 5
    ring = torch.eye(7).roll(1, 0)  # strongly connected and periodic
    assert closed_groups(ring) == 1


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_a_group_contracts_at_rate_one(sigma):
    run = flow(two_groups(), sigma=sigma, radius=1.2, steps=150)
    rates = -diameter(run.states[50:, :15]).log().diff() / run.times[50:].diff()
    close(rates, torch.ones(100), 0.02)


# Measures


def test_clusters_by_chains_and_not_by_centres():
    x = torch.tensor([[0.0], [3.0], [1.0], [2.0], [8.0], [7.5]], dtype=torch.float64)
    assert cluster_count(x, 1.0) == 2 and cluster_count(x, 0.9) == 5 and cluster_count(x, 0.4) == 6 and cluster_count(x, 100.0) == 1
    long = torch.arange(150.0)[torch.randperm(150, generator=seeded())][:, None]
    assert cluster_count(long, 1.0) == 1
    assert cluster_count(torch.stack([x, 2 * x]), 1.0).tolist() == [2, 5]


def test_order_and_diameter():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert order_parameter(opposite) == 0 and diameter(opposite) == 2
    same = torch.tensor([[0.6, 0.8]]).expand(5, 2)
    assert order_parameter(same).item() == pytest.approx(1) and diameter(same) == 0


def test_starts_are_uniform_reproducible_and_on_the_sphere():
    x = uniform_sphere(4000, 3, seeded(), batch=(2,))
    assert torch.equal(x, uniform_sphere(4000, 3, seeded(), batch=(2,))) and x.shape == (2, 4000, 3)
    close(x.norm(dim=-1), torch.ones(2, 4000), 1e-12)
    close(x.mean(-2), torch.zeros(2, 3), 0.05)
    close((x[0].T @ x[0]) / 4000, torch.eye(3) / 3, 0.03)
    assert not torch.equal(x[0], x[1])


# Refusals


SPHERE = uniform_sphere(6, 3, seeded())
LINE = torch.zeros(4, 1)
REFUSED = {
    "negative radius": (lambda: hk_step(LINE, -0.1), ValueError, "radius"),
    "radius NaN": (lambda: hk_step(LINE, math.nan), ValueError, "radius"),
    "one negative radius of several": (lambda: hk_step(LINE[None], torch.tensor([-1.0])), ValueError, "radius"),
    "opinions NaN": (lambda: hk_step(LINE * math.nan, 0.1), ValueError, "x must be finite"),
    "opinions whole numbers": (lambda: hk_step(LINE.long(), 0.1), TypeError, "x must be a floating-point tensor"),
    "opinions a list": (lambda: hk_run([[0.0], [1.0]], 0.1), TypeError, "x must be a floating-point tensor"),
    "opinions without dimension": (lambda: hk_step(torch.zeros(4), 0.1), TypeError, r"\(\.\.\., N, d\)"),
    "nobody": (lambda: hk_step(torch.zeros(0, 1), 0.1), ValueError, "x must hold at least one particle"),
    "max_steps": (lambda: hk_run(LINE, 0.1, max_steps=0), ValueError, "max_steps"),
    "tol": (lambda: hk_run(LINE, 0.1, tol=-1.0), ValueError, "tol"),
    "agents": (lambda: hk_bifurcation(0), ValueError, "agents"),
    "radii in reverse": (lambda: hk_bifurcation(50, 0.3, 0.1), ValueError, "largest"),
    "graph radius": (lambda: interaction_graph(SPHERE, radius=-1.0), ValueError, "radius"),
    "top_k zero": (lambda: interaction_graph(SPHERE, top_k=0), ValueError, "top_k"),
    "top_k fraction": (lambda: interaction_weights(SPHERE, sigma=1.0, top_k=2.5), ValueError, "top_k"),
    "no score": (lambda: interaction_weights(SPHERE), ValueError, "exactly one of sigma"),
    "two scores": (lambda: interaction_weights(SPHERE, sigma=1.0, beta=1.0), ValueError, "exactly one of sigma"),
    "sigma zero": (lambda: interaction_weights(SPHERE, sigma=0.0), ValueError, "sigma"),
    "sigma NaN": (lambda: interaction_weights(SPHERE, sigma=math.nan), ValueError, "sigma"),
    "beta zero": (lambda: interaction_weights(SPHERE, beta=0.0), ValueError, "beta"),
    "beta negative": (lambda: flow(SPHERE, beta=-1.0), ValueError, "beta"),
    "beta infinite": (lambda: flow(SPHERE, beta=math.inf), ValueError, "beta"),
    "off the sphere": (lambda: flow(2 * SPHERE, beta=1.0), ValueError, "x must lie on the unit sphere"),
    "start NaN": (lambda: flow(SPHERE * math.nan, beta=1.0), ValueError, "x must be finite"),
    "step zero": (lambda: flow(SPHERE, beta=1.0, step=0.0), ValueError, "step"),
    "step negative": (lambda: flow(SPHERE, beta=1.0, step=-0.1), ValueError, "step"),
    "step too long": (lambda: flow(SPHERE, beta=1.0, step=1.5), ValueError, "step must be at most 1"),
    "steps": (lambda: flow(SPHERE, beta=1.0, steps=0), ValueError, "steps"),
    "record_every": (lambda: flow(SPHERE, beta=1.0, steps=10, record_every=3), ValueError, "record_every"),
    "integrator": (lambda: flow(SPHERE, beta=1.0, integrator="leapfrog"), ValueError, "integrator"),
    "gap": (lambda: cluster_count(SPHERE, -0.1), ValueError, "gap"),
    "n": (lambda: uniform_sphere(0, 3), ValueError, "n must"),
    "dim": (lambda: uniform_sphere(5, 0), ValueError, "dim"),
    "weights not square": (lambda: closed_groups(torch.zeros(2, 3)), ValueError, "weights"),
}


@over(("call", "error", "names"), REFUSED.values())
def test_bad_input_is_refused_by_name(call, error, names):
    with pytest.raises(error, match=names):
        call()
