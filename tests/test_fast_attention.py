"""Every implementation against the dense reference in float64: values, gradients, edges, locality, dropout, memory, refusals.

The bound. What is computed in a low precision is compared with the reference in float64 on the same, already rounded, inputs. Its
error may be twice what the dense reference itself loses in that precision, and a few float32 roundings of the result's scale (the
reference may have been lucky; so its loss is the worst of three orders of the coordinates, which are one problem in exact arithmetic).

Top-k. A candidate near the k-th place may be in or out when energies are rounded. So on generic data only the rows are compared
whose gap at the k-th place is wider than all rounding (`clear_rows`; the gradient that comes in is zero on the others). Ties are
tested on small whole numbers, whose energies are exact in every precision: there the survivors must be the same.

Memory that an operator leaves uninitialised is NaN in these tests (`uninitialised_memory_is_nan`).
`KRAUSE_TEST_EXAMPLES=10 pytest tests/test_fast_attention.py` tries ten times as many examples.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from krause_repro.attention import (
    METRICS,
    SCORES,
    CausalWindow,
    Full,
    GridWindow,
    attend,
    attention_weights,
    krause_attention,
    match_heads,
    pairwise_energy,
    score_temperature,
)
from krause_repro.fast_attention import (
    augment,
    band_mask,
    banded_attention,
    banded_tiles,
    flex_attention,
    gathered_attention,
    gathered_rows,
    relative_energy,
    row_thresholds,
    sdpa_attention,
)
from krause_repro.native_kernels import build_kernels, candidate_lists, kernels_available, library_path, native_band, native_lists

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    NATIVE = kernels_available()
needs_kernels = pytest.mark.skipif(not NATIVE, reason="the C++ kernels could not be built")

WAYS = {
    "reference": attend, "banded_tiles": banded_tiles, "native_band": native_band, "gathered_rows": gathered_rows,
    "native_lists": native_lists, "sdpa": sdpa_attention, "flex": flex_attention,
}
CAUSAL = [pytest.param(name, marks=needs_kernels) if name.startswith("native") else name for name in ("native_band", "banded_tiles", "sdpa")]
ROUNDINGS = 8  # of the result's scale


def examples(count):
    "`count` examples, or a multiple of them."
    return settings(max_examples=count * int(os.environ.get("KRAUSE_TEST_EXAMPLES", "1")), suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_and_two_threads():
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def ways(neighborhood, top_k=None, key_mask=None, dtype=torch.float32):
    "The names of the implementations that can do it (without FlexAttention, which has tests of its own)."
    native = NATIVE and dtype != torch.float64
    grid = isinstance(neighborhood, GridWindow) and key_mask is None
    applies = {
        "banded_tiles": isinstance(neighborhood, CausalWindow), "native_band": isinstance(neighborhood, CausalWindow) and native,
        "gathered_rows": grid, "native_lists": grid and native, "sdpa": top_k is None,
    }
    return [name for name, it_does in applies.items() if it_does]


def attend_by(name, query, key, value, neighborhood, top_k=None, **options):
    "One implementation; those on a grid do not take a mask."
    if options.get("key_mask") is None:
        options.pop("key_mask", None)
    return WAYS[name](query, key, value, neighborhood, top_k, **options)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def three(seed, shape=(1, 2, 7, 16), value_dim=None, dtype=torch.float32):
    "Query, key and value."
    value = (*shape[:3], value_dim or shape[3])
    return normal(seed, *shape, dtype=dtype), normal(seed + 1, *shape, dtype=dtype), normal(seed + 2, *value, dtype=dtype)


# Random problems

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "split": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # heads split from (B, T, H·D)
    "transposed": lambda x: x.mT.contiguous().mT,  # as in a ring cache
    "sliced": lambda x: F.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
PADDINGS = {  # of (B, Tk) keys, from a generator
    "left": lambda b, t, g: torch.arange(t) >= torch.randint(t + 1, (b, 1), generator=g),
    "right": lambda b, t, g: torch.arange(t) < torch.randint(t + 1, (b, 1), generator=g),
    "any": lambda b, t, g: torch.rand(b, t, generator=g) < 0.7,
    "batch": lambda b, t, g: (torch.rand(b, 1, generator=g) < 0.5).expand(b, t).clone(),
}


@dataclass(frozen=True)
class Problem:
    "All that defines an attention; the tensors follow from the seed."

    neighborhood: object
    top_k: int | None
    score: str
    sigma: float  # in units of the data
    sigma_as: str  # "number", "scalar" tensor or one per "head"
    dtype: torch.dtype
    query: tuple  # shape (B, H, Tq, D)
    key: tuple  # shape (B, Hk, Tk, D)
    value_dim: int
    padding: str | None  # one of PADDINGS
    data: str  # "normal", "offset", "huge", "zeros" or "ties"
    layouts: tuple  # of query, key and value
    seed: int

    def tensors(self):
        "Query, key and value in their layouts; all numbers are in float32 before they are rounded to the dtype."
        if self.data == "ties":
            drawn = [torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(self.seed + n)).float()
                     for n, shape in enumerate((self.query, self.key))]
        else:
            scale, offset = (1e4 if self.data == "huge" else 1), (2 if self.data == "offset" else 0)
            drawn = [normal(self.seed + n, *shape) * scale + offset for n, shape in enumerate((self.query, self.key))]
        if self.data == "zeros":
            for x in drawn:
                x[:, :, ::2] = 0
            drawn[1][:, :, ::4] *= -1  # −0.0
        drawn.append(normal(self.seed + 2, *self.key[:3], self.value_dim))
        return [LAYOUTS[layout](x.to(self.dtype)) for layout, x in zip(self.layouts, drawn, strict=True)]

    def options(self):
        "Score, sigma and key_mask."
        heads, sigma = self.query[1], self.sigma * self.query[3] ** 0.5 * (1e4 if self.data == "huge" else 1)
        if self.sigma_as != "number":
            sigma = torch.tensor(sigma) if self.sigma_as == "scalar" else sigma * torch.linspace(1, 1.6, heads)
        generator = torch.Generator().manual_seed(self.seed)
        key_mask = None if self.padding is None else PADDINGS[self.padding](self.key[0], self.key[2], generator)
        return {"score": self.score, "sigma": sigma if self.score == "krause" else None, "key_mask": key_mask}

    def ways(self):
        return ways(self.neighborhood, self.top_k, self.padding, self.dtype)


@st.composite
def problems(draw, kinds=("window", "window", "window", "grid", "full"), dtypes=(32, 32, "bf16", 16, 64), ties=False, padded=True, most=400):
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32, 40]))
    if kind == "grid":
        height, width, radius = draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)))
        neighborhood = GridWindow(height, width, radius, draw(st.sampled_from(METRICS)), draw(st.booleans()))
        queries = keys = neighborhood.length
    else:
        queries = draw(st.one_of(*[st.integers(1, 30)] * 8, *[st.integers(30, 70)] * 4, st.integers(70, most)))
        past = draw(st.sampled_from([0, 0, 1, 5, 20, 100])) if kind == "window" else 0
        keys = queries + past
        neighborhood = CausalWindow(draw(st.integers(1, keys + 3) | st.integers(1, 8))) if kind == "window" else Full()
    small = keys > 70  # few heads then
    batch, heads, shared = (1, draw(st.integers(1, 2)), 1) if small else draw(st.tuples(*[st.integers(1, 2)] * 2, st.integers(1, 3)))
    top_k = draw(st.one_of(st.none(), st.integers(1, 4), st.integers(1, keys + 2)))
    score = draw(st.sampled_from(("krause", *SCORES)))
    return Problem(
        neighborhood=neighborhood, top_k=top_k, score=score,
        sigma=draw(st.sampled_from([1.0, 2.0] if ties else [0.3, 1.0, 4.0])),
        sigma_as=draw(st.sampled_from(["number", "scalar", "head"])),
        dtype={32: torch.float32, "bf16": torch.bfloat16, 16: torch.float16, 64: torch.float64}[draw(st.sampled_from(dtypes))],
        query=(batch, heads * shared, queries, dim), key=(batch, heads, keys, dim),
        value_dim=keys if ties else draw(st.sampled_from([dim, dim, 1, 5, 16, 24])),
        padding=draw(st.sampled_from([None, None, *PADDINGS])) if padded else None,
        data="ties" if ties else draw(st.sampled_from(["normal", "normal", "offset", "zeros", *["huge"] * (score == "krause")])),
        layouts=tuple(draw(st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3))), seed=draw(st.integers(0, 10**6)),
    )


def precise(tensors):
    return [x.double() for x in tensors]


def clear_rows(problem, query, key, key_mask):
    "Rows whose survivors no rounding can change, (B, H, Tq) bool: the gap at the k-th place is wider than the energies' errors."
    if problem.top_k is None or problem.top_k >= key.shape[2]:
        return torch.ones(query.shape[:3], dtype=torch.bool)
    query, key = precise((query, match_heads(key, query.shape[1])))
    allowed = problem.neighborhood.mask(key.shape[2])[-query.shape[2]:].expand(*query.shape[:3], -1)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    order = pairwise_energy(query, key, problem.score).masked_fill(~allowed, torch.inf).sort(-1).values
    last, next_ = order[..., problem.top_k - 1], order[..., problem.top_k]
    size = query.square().sum(-1) + key.square().sum(-1).amax(-1, keepdim=True)  # ≥ every term of the energies
    rounding = (query.shape[-1] + 8) * torch.finfo(torch.float64 if problem.dtype == torch.float64 else torch.float32).eps
    return (next_ - last > rounding * size) | next_.isinf()  # infinite: fewer candidates than k, or just as many


REARRANGED = (lambda x: x, lambda x: x.flip(-1), lambda x: x.roll(x.shape[-1] // 2, -1))


def dense_results(problem, compute, query, key, value):
    """What `compute` makes of the dense reference's inputs in the problem's precision, in three orders of the coordinates.

    For float64 in float32, of which the loss is then scaled down: the exact result is itself in float64."""
    dtype = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    for rearrange in REARRANGED[:1] if query.shape[-1] == 1 else REARRANGED:
        yield compute(rearrange(query.to(dtype)), rearrange(key.to(dtype)), value.to(dtype))


def bound(problem, losses, scale):
    "Twice what the dense reference loses, and a few roundings."
    if problem.dtype == torch.float64:
        down = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return (3 * max(losses) + ROUNDINGS * torch.finfo(torch.float32).eps * scale) * down  # one loss more for the exact result
    return 2 * max(losses) + ROUNDINGS * torch.finfo(torch.float32).eps * scale


def largest(x):
    "The largest magnitude; NaN if there is one."
    return x.double().abs().max().item() if x.numel() else 0.0


def check_forward(problem, names):
    "Each implementation keeps the bound, and the dtype, the shape and the inputs."
    tensors, options = problem.tensors(), problem.options()
    rest = (problem.neighborhood, problem.top_k)
    exact = attend(*precise(tensors), *rest, **options)
    clear = clear_rows(problem, *tensors[:2], options["key_mask"])
    dense = dense_results(problem, lambda *x: attend(*x, *rest, **options), *tensors)
    limit = bound(problem, [largest((x.double() - exact)[clear]) for x in dense], largest(tensors[2]))
    before = [x.clone() for x in tensors]
    for name in names:
        output = attend_by(name, *tensors, *rest, **options)
        assert output.dtype == problem.dtype and output.shape == exact.shape, name
        error = largest((output.double() - exact)[clear])
        assert error <= limit, f"{name} is off by {error:.3g}, allowed are {limit:.3g}"
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@examples(1200)
@given(problems())
def test_no_implementation_loses_more_than_twice_the_dense_one(problem):
    check_forward(problem, problem.ways())


@examples(30)
@given(problems(padded=False, most=150))
def test_flex_loses_no_more_either(problem):
    query = (*problem.query[:2], *problem.key[2:])  # it has no past
    check_forward(Problem(**{**vars(problem), "query": query}), ["flex"])


def check_selection(problem, names):
    "The unit vectors as values give the weights: they must be zero, and not zero, in the same places."
    query, key, value = problem.tensors()
    units = torch.eye(key.shape[2], dtype=value.dtype).expand(*key.shape[:3], -1)
    rest, options = (problem.neighborhood, problem.top_k), problem.options()
    exact = attention_weights(query.double(), key.double(), *rest, **options)
    for name in names:
        weights = attend_by(name, query, key, units, *rest, **options)
        assert torch.equal(weights > 0, exact > 0), name
        assert_close(weights.double(), exact, rtol=0, atol=2 * torch.finfo(problem.dtype).eps * 16)


@examples(700)
@given(problems(ties=True, most=100))
def test_ties_are_selected_exactly(problem):
    check_selection(problem, problem.ways())


@examples(20)
@given(problems(ties=True, padded=False, most=80))
def test_flex_selects_ties_exactly_too(problem):
    check_selection(Problem(**{**vars(problem), "query": (*problem.query[:2], *problem.key[2:])}), ["flex"])


def gradients_of(compute, tensors, sigma, incoming):
    "Gradients of query, key, value and, for the Krause score, sigma."
    leaves = [x.detach().requires_grad_() for x in tensors]
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.detach().requires_grad_()
        output = compute(*leaves, sigma)
        return torch.autograd.grad(output, [*leaves, sigma], incoming.to(output.dtype))
    output = compute(*leaves, sigma)
    return torch.autograd.grad(output, leaves, incoming.to(output.dtype))


def gradient_scales(problem, query, key, value, incoming, sigma=None, **options):
    """The sizes of the gradients' terms, before they cancel; without them a gradient of zero would have to be exact.

    A weight of logit −x counts 1 + x times, for that is what the exponential makes of the logit's rounding. The last but one is
    sigma's gradient from energies above the lowest in their row, the last from energies as augmented vectors give them."""
    query, key, value, incoming = precise((query, key, value, incoming))
    heads, group = query.shape[1], (-1, query.shape[1] // key.shape[1])
    key, value = match_heads(key, heads), match_heads(value, heads)
    weights = attention_weights(query, key, problem.neighborhood, problem.top_k, sigma=sigma, **options)
    energy = pairwise_energy(query, key, problem.score)
    tau = score_temperature(energy, problem.score, sigma, query.shape[3])
    above = (energy - energy.masked_fill(weights == 0, torch.inf).amin(-1, keepdim=True)).where(weights > 0, 0) / tau
    sized = weights * (1 + above)
    terms = sized * (incoming.abs() @ value.abs().mT + (incoming * (weights @ value)).abs().sum(-1, keepdim=True))
    by_query = (terms @ key.abs() + terms.sum(3).unsqueeze(-1) * query.abs()) / tau
    by_key = (terms.mT @ query.abs() + terms.sum(2).unsqueeze(-1) * key.abs()) / tau
    by_sigma = (terms * above).sum((0, 2, 3)) * 2 / torch.as_tensor(tau).reshape(-1).sqrt()
    by_key, by_value = (x.unflatten(1, group).sum(2) for x in (by_key, sized.mT @ incoming.abs()))
    absolute = (query.abs() @ key.abs().mT + key.square().sum(-1).unsqueeze(-2) / 2) / tau
    by_augmented = (terms * absolute).sum((0, 2, 3)) * 2 / torch.as_tensor(tau).reshape(-1).sqrt()
    return [largest(x) for x in (by_query, by_key, by_value, by_sigma, by_augmented)]


@examples(400)
@given(problems(dtypes=(32, 32, 32, "bf16", 16, 64), most=150))
def test_gradients_lose_no_more_than_twice_the_dense_ones(problem):
    tensors, options = problem.tensors(), problem.options()
    rest, sigma = (problem.neighborhood, problem.top_k), options.pop("sigma")
    clear = clear_rows(problem, *tensors[:2], options["key_mask"]).unsqueeze(-1)
    incoming = normal(problem.seed + 3, *problem.query[:3], problem.value_dim, dtype=problem.dtype) * clear

    def by(name):
        return lambda q, k, v, sigma: attend_by(name, q, k, v, *rest, sigma=sigma, **options)

    exact = gradients_of(by("reference"), precise(tensors), sigma, incoming)
    losses = [[] for _ in exact]
    orders = REARRANGED[:1] if problem.query[3] == 1 else REARRANGED
    found = dense_results(problem, lambda *x: gradients_of(by("reference"), x, sigma, incoming), *tensors)
    for rearrange, gradients in zip(orders, found, strict=True):
        for n, (gradient, true) in enumerate(zip(gradients, exact, strict=True)):
            losses[n].append(largest(gradient.double() - (rearrange(true) if n < 2 else true)))
    scales = gradient_scales(problem, *tensors, incoming, sigma, **options)
    for name in problem.ways():
        gradients = gradients_of(by(name), tensors, sigma, incoming)
        for n, (gradient, true) in enumerate(zip(gradients, exact, strict=True)):
            what = f"{name}: the gradient of {('query', 'key', 'value', 'sigma')[n]}"
            assert gradient.shape == true.shape and (n == 3 or gradient.dtype == problem.dtype), what
            error, limit = largest(gradient.double() - true), bound(problem, losses[n], scales[4 if n == 3 and name == "sdpa" else n])
            assert error <= limit, f"{what} is off by {error:.3g}, allowed are {limit:.3g}"
