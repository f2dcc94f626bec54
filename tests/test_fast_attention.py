"""Every implementation against the dense reference in float64: values, gradients, edges, locality, dropout, memory, refusals.

The bound. What is computed in a low precision is compared with the reference in float64 on the same, already rounded, inputs. Its
error may be twice what the dense reference itself loses in that precision, and a few float32 roundings of the result's scale (the
reference may have been lucky; so its loss is the worst of three orders of the coordinates, which are one problem in exact arithmetic).

Top-k. A candidate near the k-th place may be in or out when energies are rounded. So on generic data only the rows are compared
whose gap at the k-th place is wider than all rounding (`clear_rows`; the gradient that comes in is zero on the others). Ties are
tested on small whole numbers, whose energies are exact in every precision: there the survivors must be the same.

Memory that an operator leaves uninitialised is NaN in these tests (`uninitialised_memory_is_nan`).
`KRAUSE_TEST_EXAMPLES=10 pytest --timeout 0 tests/test_fast_attention.py` tries ten times as many examples.
"""

import itertools
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
from cases import over
from fresh import run_fresh
from hypothesis import HealthCheck, given, settings
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from krause_repro import native_kernels
from krause_repro.attention import banded_attention, gathered_attention, krause_attention
from krause_repro.fast_attention import (
    augment,
    banded_tiles,
    flex_attention,
    gathered_rows,
    relative_energy,
    row_thresholds,
    sdpa_attention,
)
from krause_repro.native_decode import (
    DecodeLinear,
    gate_applies,
    linear_applies,
    native_branch_step,
    native_gate,
    native_linear,
    native_rotation,
    rotation_applies,
)
from krause_repro.native_kernels import (
    MAX_DECODE_ROWS,
    build_kernels,
    candidate_lists,
    kernels_available,
    library_is_whole,
    library_path,
    native_band,
    native_lists,
)
from krause_repro.reference import (
    METRICS,
    SCORES,
    CausalWindow,
    Full,
    GridWindow,
    attention_weights,
    band_mask,
    pairwise_energy,
    reference_attention,
    repeat_kv,
    score_temperature,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    NATIVE = kernels_available()
needs_kernels = pytest.mark.skipif(not NATIVE, reason="the C++ kernels could not be built")

WAYS = {
    "reference": reference_attention, "banded_tiles": banded_tiles, "native_band": native_band, "gathered_rows": gathered_rows,
    "native_lists": native_lists, "sdpa": sdpa_attention, "flex": flex_attention,
}
CAUSAL = [*(["native_band"] if NATIVE else []), "banded_tiles", "sdpa"]
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


@pytest.fixture(autouse=True)
def flex_attention_runs_at_once(monkeypatch):
    "FlexAttention traces each call before it runs it eagerly, half a second each; this flag of PyTorch's spares the tracing."
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


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
def problems(draw, kinds=("window",) * 3 + ("grid", "full"), dtypes=(32, 32, "bf16", 16, 64), ties=False, padded=True, most=400):
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32, 40]))
    if kind == "grid":
        height, width, radius = draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)))
        places = draw(st.none() | st.integers(0, 9))
        neighborhood = GridWindow(height, width, radius, draw(st.sampled_from(METRICS)), draw(st.booleans()), places)
        queries = keys = neighborhood.length
    else:
        queries = draw(st.one_of(*[st.integers(1, 30)] * 8, *[st.integers(30, 70)] * 4, st.integers(70, most)))
        past = draw(st.sampled_from([0, 0, 1, 5, 20, 100])) if kind == "window" else 0
        keys = queries + past
        sizes = st.one_of(st.integers(1, keys + 3), st.integers(1, 8), st.integers(max(1, keys - 1), keys + 1))
        neighborhood = CausalWindow(draw(sizes)) if kind == "window" else Full()
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
    query, key = precise((query, repeat_kv(key, query.shape[1])))
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
    exact = reference_attention(*precise(tensors), *rest, **options)
    clear = clear_rows(problem, *tensors[:2], options["key_mask"])
    dense = dense_results(problem, lambda *x: reference_attention(*x, *rest, **options), *tensors)
    limit = bound(problem, [largest((x.double() - exact)[clear]) for x in dense], largest(tensors[2]))
    before = [x.clone() for x in tensors]
    for name in names:
        output = attend_by(name, *tensors, *rest, **options)
        assert output.dtype == problem.dtype and output.shape == exact.shape, name
        error = largest((output.double() - exact)[clear])
        assert error <= limit, f"{name} is off by {error:.3g}, allowed are {limit:.3g}"
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@examples(200)
@given(problems())
def test_no_implementation_loses_more_than_twice_the_dense_one(problem):
    check_forward(problem, problem.ways())


@examples(40)
@given(problems(padded=False, most=100))
def test_flex_loses_no_more_either(problem):
    query = (*problem.query[:2], *problem.key[2:])  # it has no past
    check_forward(Problem(**{**vars(problem), "query": query}), ["flex"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("neighborhood", "top_k"), [(CausalWindow(9), 1), (CausalWindow(9), 3), (Full(), 3)])
def test_flex_never_loses_the_kth_key(neighborhood, top_k, dtype):
    "Its threshold comes from another product than the energies it is compared with: one rounding apart must not matter."
    query, key, _ = three(0, (1, 2, 130, 16), dtype=dtype)
    units = torch.eye(130, dtype=dtype).expand(1, 2, -1, -1)
    kept = (flex_attention(query, key, units, neighborhood, top_k, sigma=10.0) > 0).sum(-1)
    assert torch.equal(kept, neighborhood.mask(130).sum(-1).clamp_max(top_k).expand(1, 2, -1))


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


@examples(120)
@given(problems(ties=True, most=100))
def test_ties_are_selected_exactly(problem):
    check_selection(problem, problem.ways())


@examples(25)
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


def gradient_scales(problem, fused, query, key, value, incoming, sigma=None, **options):
    """The sizes of the gradients' terms, before they cancel; without them a gradient of zero would have to be exact.

    A weight of logit x counts 1 + |x| times, for that is what the exponential makes of the logit's rounding. Logits are relative to
    the largest in their row, except in fused kernels, whose backward pass starts from the products themselves."""
    query, key, value, incoming = precise((query, key, value, incoming))
    heads, group = query.shape[1], (-1, query.shape[1] // key.shape[1])
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    weights = attention_weights(query, key, problem.neighborhood, problem.top_k, sigma=sigma, **options)
    energy = pairwise_energy(query, key, problem.score)
    tau = score_temperature(energy, problem.score, sigma, query.shape[3])
    if fused:
        logits = (query.abs() @ key.abs().mT + key.square().sum(-1).unsqueeze(-2) / 2) / tau
    else:
        logits = (energy - energy.masked_fill(weights == 0, torch.inf).amin(-1, keepdim=True)).where(weights > 0, 0) / tau
    sized = weights * (1 + logits)
    terms = sized * (incoming.abs() @ value.abs().mT + (incoming * (weights @ value)).abs().sum(-1, keepdim=True))
    by_query = (terms @ key.abs() + terms.sum(3).unsqueeze(-1) * query.abs()) / tau
    by_key = (terms.mT @ query.abs() + terms.sum(2).unsqueeze(-1) * key.abs()) / tau
    by_sigma = (terms * logits).sum((0, 2, 3)) * 2 / torch.as_tensor(tau).reshape(-1).sqrt()
    by_key, by_value = (x.unflatten(1, group).sum(2) for x in (by_key, sized.mT @ incoming.abs()))
    return [largest(x) for x in (by_query, by_key, by_value, by_sigma)]


@examples(70)
@given(problems(dtypes=(32, 32, 32, 64), most=150))
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
    for name in problem.ways():
        scales = gradient_scales(problem, name == "sdpa", *tensors, incoming, sigma, **options)
        gradients = gradients_of(by(name), tensors, sigma, incoming)
        for n, (gradient, true) in enumerate(zip(gradients, exact, strict=True)):
            what = f"{name}: the gradient of {('query', 'key', 'value', 'sigma')[n]}"
            assert gradient.shape == true.shape and (n == 3 or gradient.dtype == problem.dtype), what
            error, limit = largest(gradient.double() - true), bound(problem, losses[n], scales[n])
            if n == 3:  # it has σ's precision, which may be less than that of the tensors
                limit += torch.finfo(gradient.dtype).eps * largest(true)
            assert error <= limit, f"{what} is off by {error:.3g}, allowed are {limit:.3g}"


EACH_WAY = [  # implementation, neighbourhood of twelve tokens, top-k; without FlexAttention
    (name, neighborhood, top_k)
    for neighborhood in (CausalWindow(5), GridWindow(3, 4, 1, cls_token=False), Full()) for top_k in (None, 3)
    for name, applies in {
        "reference": True, "banded_tiles": isinstance(neighborhood, CausalWindow), "native_band": isinstance(neighborhood, CausalWindow),
        "gathered_rows": isinstance(neighborhood, GridWindow), "native_lists": isinstance(neighborhood, GridWindow), "sdpa": top_k is None,
    }.items() if applies and (NATIVE or not name.startswith("native"))
]
each_way = over(("name", "neighborhood", "top_k"), EACH_WAY)
fast_ways = over(("name", "neighborhood", "top_k"), [way for way in EACH_WAY if way[0] != "reference"])
AS_FLEX = [("flex", neighborhood, top_k) for neighborhood in (CausalWindow(5), Full()) for top_k in (None, 3)]
with_flex = over(("name", "neighborhood", "top_k"), [*EACH_WAY, *AS_FLEX])
with_key_mask = over(("name", "neighborhood", "top_k"), [
    way for way in EACH_WAY if way[0] not in ("gathered_rows", "native_lists")
])
each_way_that_drops = over(("name", "neighborhood", "top_k"), [way for way in EACH_WAY if way[0] != "sdpa"])


@over("dtype", [torch.bfloat16, torch.float16])
@over("sigma", [0.5, 2.0])
@fast_ways
def test_gradients_in_half_precision_lose_no_more_than_twice_the_dense_ones(name, neighborhood, top_k, sigma, dtype):
    tensors, incoming = three(0, (2, 4, 12, 32), dtype=dtype), normal(9, 2, 4, 12, 32, dtype=dtype)
    if top_k is not None:
        problem = Problem(neighborhood, top_k, "krause", 0, "", dtype, (2, 4, 12, 32), (2, 4, 12, 32), 32, None, "", (), 0)
        assert clear_rows(problem, *tensors[:2], None).all()

    def gradients(way, tensors):
        return gradients_of(lambda q, k, v, s: attend_by(way, q, k, v, neighborhood, top_k, sigma=s), tensors, sigma, incoming)

    exact = gradients("reference", precise(tensors))
    for what, true, dense, found in zip(
        ("query", "key", "value"), exact, gradients("reference", tensors), gradients(name, tensors), strict=True
    ):
        loss, dense_loss = ((x.double() - true).norm().item() for x in (found, dense))
        assert loss <= 2 * dense_loss, what


@over("score", SCORES)
@over(("name", "neighborhood", "top_k"), [
    *itertools.product(["banded_tiles"], [CausalWindow(4)], [None, 3]),
    *itertools.product(["gathered_rows"], [GridWindow(2, 3, 1), GridWindow(1, 7, 2, cls_token=False)], [None, 3]),
    *itertools.product(["sdpa"], [CausalWindow(4), GridWindow(2, 3, 1), Full()], [None]),
])
def test_gradcheck(name, neighborhood, top_k, score):
    queries = 5 if isinstance(neighborhood, CausalWindow) else 7
    leaves = [normal(n, 1, heads, tokens, dim, dtype=torch.float64).requires_grad_()
              for n, (heads, tokens, dim) in enumerate(((2, queries, 2), (1, 7, 2), (1, 7, 3)))]
    sigma = torch.tensor([0.9, 1.4], dtype=torch.float64, requires_grad=score == "krause")

    def output(query, key, value, sigma):
        return WAYS[name](query, key, value, neighborhood, top_k, score=score, sigma=sigma)

    assert torch.autograd.gradcheck(output, (*leaves, sigma), check_forward_ad=True, fast_mode=True)  # along random directions


@over("score", ["krause", "softmax"])
@fast_ways
def test_second_derivatives_are_those_of_the_reference(name, neighborhood, top_k, score):
    found = []
    for way in ("reference", name):
        leaves = [x.requires_grad_() for x in (*three(0, (1, 2, 12, 4)), torch.tensor([1.5, 1.2]))]
        output = attend_by(way, *leaves[:3], neighborhood, top_k, score=score, sigma=leaves[3] if score == "krause" else None)
        leaves = leaves if score == "krause" else leaves[:3]
        slopes = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        found.append([*slopes, *torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves)])
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "neighborhood"), [
    pytest.param("native_band", CausalWindow(5), marks=needs_kernels), pytest.param("native_lists", GridWindow(3, 4, 1, cls_token=False),
                                                                                    marks=needs_kernels), ("sdpa", Full()),
])
def test_second_derivatives_with_dropout_are_refused(name, neighborhood):
    leaves = [x.requires_grad_() for x in three(0, (1, 2, 12, 16))]
    output = attend_by(name, *leaves, neighborhood, sigma=1.5, dropout=0.5)
    assert all(gradient.any() for gradient in torch.autograd.grad(output.sum(), leaves, retain_graph=True))
    with pytest.raises(RuntimeError, match='no second derivatives with dropout; use implementation="reference"'):
        torch.autograd.grad(output.sum(), leaves, create_graph=True)


@fast_ways
@over("needed", range(4))
def test_one_gradient_may_be_asked_for_alone(name, neighborhood, top_k, needed):
    leaves = [*three(0, (1, 2, 12, 5)), torch.tensor([0.9, 1.4])]

    def gradient(*leaves):
        return torch.autograd.grad(attend_by(name, *leaves[:3], neighborhood, top_k, sigma=leaves[3]).square().sum(), leaves[needed])[0]

    every = gradient(*[x.clone().requires_grad_() for x in leaves])
    assert torch.equal(gradient(*[x.clone().requires_grad_(n == needed) for n, x in enumerate(leaves)]), every)
    with torch.no_grad():
        assert not attend_by(name, *leaves[:3], neighborhood, top_k, sigma=leaves[3]).requires_grad


# Layouts

PERMUTATIONS = list(itertools.permutations(range(4)))[::3]  # each dimension is the last one in some of them


def laid_out(x, order):
    "`x` with its dimensions in another order in memory."
    return x.permute(order).contiguous().permute([order.index(n) for n in range(4)])


@over(("dim", "dtype"), [(10, torch.float32), (16, torch.bfloat16)])
@fast_ways
def test_the_layout_in_memory_does_not_matter(name, neighborhood, top_k, dim, dtype):
    tensors, incoming = three(0, (2, 3, 12, dim), dtype=dtype), normal(9, 2, 3, 12, dim, dtype=dtype)

    def results(tensors, incoming):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = attend_by(name, *leaves, neighborhood, top_k, sigma=2.0)
        return [output, *torch.autograd.grad(output, leaves, incoming)]

    exact, tolerance = results(tensors, incoming), {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-5}
    for number, order in enumerate(PERMUTATIONS):  # of one of query, key, value and gradient in turn, and of all
        moved = [laid_out(x, order) if n == number % 4 else x for n, x in enumerate((*tensors, incoming))]
        assert_close(results(moved[:3], moved[3]), exact, **tolerance)
        assert_close(results([laid_out(x, order) for x in tensors], laid_out(incoming, order)), exact, **tolerance)


@each_way
def test_repeated_memory_is_read_as_it_is(name, neighborhood, top_k):
    small = three(0, (1, 1, 12, 16))
    views = [x.expand(2, 3, -1, -1) for x in small]
    incoming = torch.ones(()).expand(2, 3, 12, 16)
    found = []
    for tensors, upper in ((views, incoming), ([x.contiguous() for x in views], incoming.contiguous())):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = attend_by(name, *leaves, neighborhood, top_k, sigma=2.0)
        found.append([output, *torch.autograd.grad(output, leaves, upper)])
    assert_close(found[0], found[1], rtol=0, atol=1e-6)


# Edges: what can be said without computing


@with_flex
def test_one_candidate_is_copied(name, neighborhood, top_k):
    query, key, value = three(0, (2, 2, 12, 5))
    if isinstance(neighborhood, CausalWindow):
        alone = attend_by(name, query, key, value, CausalWindow(1), top_k, sigma=1.0)
        assert_close(alone, value, rtol=0, atol=1e-6)
    token = (x[:, :, :1] for x in (query, key, value))
    one = GridWindow(1, 1, 1, cls_token=False) if isinstance(neighborhood, GridWindow) else neighborhood
    assert_close(attend_by(name, *token, one, top_k, sigma=1.0), value[:, :, :1], rtol=0, atol=1e-6)


@over(("name", "neighborhood", "top_k"), [way for way in [*EACH_WAY, *AS_FLEX] if way[2]])
def test_k_of_one_is_the_nearest_and_k_of_all_is_no_choice(name, neighborhood, top_k):
    query, key, value = three(0, (2, 2, 12, 5))
    distance = torch.cdist(query.double(), key.double()).masked_fill(~neighborhood.mask(12), torch.inf)
    nearest = value.gather(2, distance.argmin(-1, keepdim=True).expand(-1, -1, -1, 5))
    assert_close(attend_by(name, query, key, value, neighborhood, 1, sigma=1.0), nearest, rtol=0, atol=1e-6)
    every = attend_by(name, query, key, value, neighborhood, None, sigma=1.0)
    for many in (12, 13, 10**6):
        assert_close(attend_by(name, query, key, value, neighborhood, many, sigma=1.0), every, rtol=0, atol=1e-6)


@over(("name", "neighborhood", "top_k"), [way for way in EACH_WAY if isinstance(way[1], CausalWindow)])
def test_a_window_may_be_longer_than_the_sequence(name, neighborhood, top_k):
    tensors = three(0, (1, 2, 12, 5))
    whole = attend_by(name, *tensors, CausalWindow(12), top_k, sigma=1.0)
    assert torch.equal(attend_by(name, *tensors, CausalWindow(10**9), top_k, sigma=1.0), whole)


@over("dtype", [torch.float32, torch.bfloat16])
@over("as_tensor", [False, True])
@each_way
def test_sigma_tiny_and_huge(name, neighborhood, top_k, as_tensor, dtype):
    tensors = three(1, (2, 2, 12, 4), dtype=dtype)
    survivors = (attention_weights(*precise(tensors[:2]), neighborhood, top_k, sigma=1e3) > 0).double()
    distance = torch.cdist(*precise(tensors[:2])).masked_fill(survivors == 0, torch.inf)
    for sigma, expected in ((1e-30, F.one_hot(distance.argmin(-1), 12).double()), (1e30, survivors / survivors.sum(-1, keepdim=True))):
        given_sigma = torch.full((2,), sigma, requires_grad=True) if as_tensor else sigma
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = attend_by(name, *leaves, neighborhood, top_k, sigma=given_sigma)
        assert_close(output.double(), expected @ tensors[2].double(), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, *([given_sigma] if as_tensor else [])])
        assert all(gradient.isfinite().all() for gradient in gradients)


@over(("name", "neighborhood", "top_k", "dtype"), [
    (*way, dtype)
    for way in EACH_WAY for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if way[0] not in ("gathered_rows", "native_lists") and (way[0], dtype) != ("native_band", torch.float64)
])
def test_rows_without_candidates_are_zero(name, neighborhood, top_k, dtype):
    key_mask = torch.ones(3, 12, dtype=torch.bool)
    key_mask[0], key_mask[1, :3], key_mask[2, 4:11] = False, False, False
    empty = ~(neighborhood.mask(12) & key_mask[:, None, :]).any(-1)
    leaves = [x.requires_grad_() for x in three(0, (3, 2, 12, 6), dtype=dtype)]
    sigma = torch.ones(2, requires_grad=True)
    output = attend_by(name, *leaves, neighborhood, top_k, sigma=sigma, key_mask=key_mask)
    assert not output.transpose(1, 2)[empty].any() and output.transpose(1, 2)[~empty].any(-1).all()
    gradients = torch.autograd.grad(output.square().sum(), [*leaves, sigma])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0].transpose(1, 2)[empty].any() and not any(x.transpose(1, 2)[~key_mask].any() for x in gradients[1:3])


@over(("where", "bad"), [("query", math.nan), ("query", math.inf), ("key", math.nan), ("key", -math.inf)])
@with_flex
def test_a_bad_vector_spoils_the_rows_that_consider_it(name, neighborhood, top_k, where, bad):
    tensors = three(0, (2, 2, 12, 16))
    good = attend_by(name, *tensors, neighborhood, top_k, sigma=2.0)
    tensors[("query", "key").index(where)][1, 0, 6, 3] = bad
    spoiled = torch.zeros(2, 2, 12, dtype=torch.bool)
    spoiled[1, 0] = torch.arange(12) == 6 if where == "query" else neighborhood.mask(12)[:, 6]
    output = attend_by(name, *tensors, neighborhood, top_k, sigma=2.0)
    found = output.isnan()
    assert found.any(-1).nonzero().tolist() == found.all(-1).nonzero().tolist() == spoiled.nonzero().tolist()
    assert_close(output[~spoiled], good[~spoiled], rtol=0, atol=0 if name.startswith("native") else 1e-6)


@over("bad", [math.nan, math.inf, -math.inf])
@with_key_mask
def test_a_bad_key_that_is_padding_does_not_matter(name, neighborhood, top_k, bad):
    query, key, value = three(0, (2, 2, 12, 16))
    key_mask = torch.ones(2, 12, dtype=torch.bool)
    key_mask[1, 6] = False
    good = attend_by(name, query, key, value, neighborhood, top_k, sigma=2.0, key_mask=key_mask)
    key[1, :, 6] = bad
    assert torch.equal(attend_by(name, query, key, value, neighborhood, top_k, sigma=2.0, key_mask=key_mask), good)


@needs_kernels
@pytest.mark.parametrize(("compute", "neighborhood"), [(native_band, CausalWindow(5)), (native_lists, GridWindow(1, 11, 3))])
def test_a_common_offset_costs_the_native_operators_nothing_at_all(compute, neighborhood):
    query, key, value = three(0, (1, 2, 12, 16))
    far = [query + 100, key + 100]
    near = [x - 100 for x in far]  # exact: what was lost, was lost in adding
    output = compute(*far, value, neighborhood, 3, sigma=1.0)
    exact = reference_attention(*precise((*far, value)), neighborhood, 3, sigma=1.0)
    assert torch.equal(output, compute(*near, value, neighborhood, 3, sigma=1.0))
    assert largest(output - exact) < 5e-6 and largest(reference_attention(*far, value, neighborhood, 3, sigma=1.0) - exact) < 2e-6


@fast_ways
def test_minus_zero_is_zero(name, neighborhood, top_k):
    zeros, value = torch.zeros(1, 1, 12, 16), normal(0, 1, 1, 12, 16)
    allowed = neighborhood.mask(12).float()
    for query, key in itertools.product((zeros, -zeros), repeat=2):
        output = attend_by(name, query, key, value, neighborhood, 1 if top_k else None, sigma=1.0)
        assert_close(output[0, 0], allowed @ value[0, 0] / allowed.sum(-1, keepdim=True))


@over("shift", [0.0, 3.0])
@with_flex
def test_autocast_costs_no_more_than_it_costs_the_reference(name, neighborhood, top_k, shift):
    "Scores stay in single precision under autocast; what a model's projections give it is in half precision."
    query, key, value = three(0, (2, 4, 12, 16))
    tensors = [(query + shift).bfloat16(), (key + shift).bfloat16(), value.bfloat16()]
    exact = reference_attention(*precise(tensors), neighborhood, top_k, sigma=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [largest(attend_by(way, *tensors, neighborhood, top_k, sigma=2.0) - exact) for way in (name, "reference")]
    assert errors[0] <= 2 * errors[1]


# Who can change what


@st.composite
def bands(draw, most=90):
    "Queries, keys and window of a causal band, k or none, and one of the keys."
    queries, past = draw(st.integers(1, most)), draw(st.sampled_from([0, 0, 3, 40]))
    keys = queries + past
    return queries, keys, draw(st.integers(1, keys + 2)), draw(st.none() | st.integers(1, 5)), draw(st.integers(0, keys - 1))


def change(tensors, queries, keys, tokens):
    "The tensors with other vectors in the place of some tokens."
    changed = [x.clone() for x in tensors]
    for n, x in enumerate(changed):
        here = tokens[keys - queries:] if n == 0 else tokens
        x[:, :, here] = 50 * normal(77 + n, *x[:, :, here].shape, dtype=x.dtype)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
@examples(40)
@given(bands(), st.integers(0, 10**6))
def test_the_future_and_what_is_out_of_the_window_change_nothing(name, dtype, band, seed):
    queries, keys, window, top_k, token = band
    top_k = None if name == "sdpa" else top_k
    tensors = [normal(seed, 1, 2, queries, 6, dtype=dtype), normal(seed + 1, 1, 1, keys, 6, dtype=dtype),
               normal(seed + 2, 1, 1, keys, 3, dtype=dtype)]
    past, now = keys - queries, torch.arange(keys)

    def run(tensors, rows):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = attend_by(name, *leaves, CausalWindow(window), top_k, sigma=2.0)[:, :, rows[past:]]
        return output, torch.autograd.grad(output.sum(), leaves)

    for rows, hidden in ((now < token, now >= token), (now >= token + window, now <= token)):
        if not rows[past:].any():
            continue
        output, gradients = run(tensors, rows)
        after, others = run(change(tensors, queries, keys, hidden), rows)
        assert torch.equal(output, after)
        for n, (gradient, other) in enumerate(zip(gradients, others, strict=True)):
            here = hidden[past:] if n == 0 else hidden
            assert not gradient[:, :, here].any() and torch.equal(gradient[:, :, ~here], other[:, :, ~here])


@examples(40)
@given(bands(most=100), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.booleans())
def test_chunks_are_the_whole(band, sizes, padded):
    queries, keys, window, top_k, token = band
    query, key, value = normal(token, 2, 2, queries, 20), normal(token + 1, 2, 1, keys, 20), normal(token + 2, 2, 1, keys, 7)
    key_mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(token)) < 0.8 if padded else None
    for name in ("native_band", "banded_tiles") if NATIVE else ("banded_tiles",):
        whole = attend_by(name, query, key, value, CausalWindow(window), top_k, sigma=2.0, key_mask=key_mask)
        start, parts, turns = 0, [], itertools.cycle(sizes)
        while start < queries:
            stop = min(start + next(turns), queries)
            known = keys - queries + stop
            mask = None if key_mask is None else key_mask[:, :known]
            parts.append(attend_by(name, query[:, :, start:stop], key[:, :, :known], value[:, :, :known], CausalWindow(window), top_k,
                                   sigma=2.0, key_mask=mask))
            start = stop
        # the vector units of some processors round a block of rows in another order than single rows
        assert_close(torch.cat(parts, 2), whole, rtol=0, atol=2e-6 if name == "native_band" else 1e-5)


@needs_kernels
@given(st.sampled_from(SCORES), st.integers(1, 70), st.integers(0, 9), st.integers(1, 75), st.sampled_from([8, 16, 24, 32, 64, 96, 136]),
       st.sampled_from([1, 2, 3]), st.none() | st.integers(1, 70))
def test_one_query_reads_a_ring_of_transposed_keys_and_nothing_beside_them(score, held, unused, window, dim, group, top_k):
    "As in a step of generation; the slots that are not yet in use hold NaN."
    query, key, value = normal(0, 2, 2 * group, 1, dim), normal(1, 2, 2, dim, held + unused), normal(2, 2, 2, held + unused, dim + 8)
    key[..., held:], value[:, :, held:] = math.nan, math.nan
    tensors = query, key.mT[:, :, :held], value[:, :, :held]
    sigma = torch.linspace(1, 2, 2 * group) * dim**0.5 if score == "krause" else None
    got = native_band(*tensors, CausalWindow(window), top_k, score=score, sigma=sigma)
    sigma = None if sigma is None else sigma.double()
    want = reference_attention(*(x.double() for x in tensors), CausalWindow(window), top_k, score=score, sigma=sigma)
    assert_close(got.double(), want, rtol=0, atol=2e-5)


@needs_kernels
@torch.no_grad()
@given(st.integers(1, MAX_DECODE_ROWS), st.sampled_from([16, 48, 256]), st.sampled_from([4, 20, 128]), st.booleans(), st.booleans())
def test_a_product_of_few_rows_is_the_product(count, size, outputs, biased, strided):
    "As exact as PyTorch's, and each row the same whatever stands beside it."
    x, weight, bias = normal(0, count, 1, size), normal(1, outputs, size), normal(2, outputs) if biased else None
    x = normal(0, 1, size, count).transpose(0, 2).transpose(1, 2) if strided else x
    assert linear_applies(x, weight)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    got = native_linear(x, weight, bias)
    assert_close(got.double(), exact, rtol=0, atol=1e-6 * size)
    assert torch.equal(native_linear(x[-1:], weight, bias), got[-1:])


@needs_kernels
def test_a_product_of_few_rows_is_taken_where_it_is_right():
    x, weight = normal(0, MAX_DECODE_ROWS, 32), normal(1, 8, 32)
    assert not linear_applies(x, weight)  # gradients are recorded
    with torch.no_grad():
        assert linear_applies(x, weight) and linear_applies(x.unsqueeze(1), weight)
        assert not linear_applies(normal(0, MAX_DECODE_ROWS + 1, 32), weight) and not linear_applies(x[:0], weight)
        assert not linear_applies(x.double(), weight.double()) and not linear_applies(x.bfloat16(), weight)
        assert not linear_applies(x[:, :24], weight[:, :24]) and not linear_applies(x, weight[:6])
        with torch.autocast("cpu", torch.bfloat16):
            assert not linear_applies(x, weight)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            native_linear(x, normal(1, 8, 48))


@needs_kernels
@torch.no_grad()
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.sampled_from([32, 64, 96]), st.booleans())
def test_rotary_positions_are_a_rotation(batch, length, heads, dim, own):
    "Against complex numbers: the halves are real and imaginary parts, turned by the angle; values of other strides, too."
    query, key = normal(0, length, batch, 2 * heads, dim).transpose(0, 1), normal(1, batch, length, heads, dim)
    angle = normal(2, batch if own else 1, length, dim // 2) * 9
    cosine, sine = (f(angle).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    assert rotation_applies(query, key, cosine)
    for x, got in zip((query, key), native_rotation(query, key, cosine, sine), strict=True):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones(()).double(), angle.double())[:, :, None]
        assert_close(got.double(), torch.cat([turned.real, turned.imag], -1).transpose(1, 2), rtol=0, atol=1e-5)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("shape", [(16,), (3, 1, 48), (2, 40, 576)])
def test_the_gate_is_a_softmax_of_two(shape, scale):
    standard, other, weight, bias = normal(0, *shape), normal(1, *shape), normal(2, 2, 2 * shape[-1]) * scale, normal(3, 2)
    assert gate_applies(standard, other, weight)
    logits = torch.nn.functional.linear(torch.cat([standard, other], -1).double(), weight.double(), bias.double())
    share = logits.softmax(-1)[..., :1]
    exact = share * standard + (1 - share) * other
    single = torch.nn.functional.linear(torch.cat([standard, other], -1), weight, bias).softmax(-1)[..., :1]
    allowed = 2 * (single * standard + (1 - single) * other - exact).abs().max().item() + 1e-6  # what float32 itself costs
    assert_close(native_gate(standard, other, weight, bias).double(), exact, rtol=0, atol=allowed)


@needs_kernels
def test_a_gate_that_is_open_gives_back_what_comes_in():
    standard, other = torch.full((1, 16), 1.5), torch.full((1, 16), 1e8)
    with torch.no_grad():
        for bias, expected in ((99.0, standard), (-99.0, other)):
            assert torch.equal(native_gate(standard, other, torch.zeros(2, 32), torch.tensor([bias, 0.0])), expected)


@needs_kernels
def test_no_tokens_at_all():
    empty = torch.zeros(2, 3, 0, 8)
    assert native_band(empty, empty, empty, CausalWindow(4), 2, sigma=1.0).shape == empty.shape


@needs_kernels
def test_rotation_and_gate_are_for_float32_without_gradients():
    query, key, cosine, weight = normal(0, 1, 3, 2, 32), normal(1, 1, 3, 1, 32), normal(2, 1, 3, 32), normal(3, 2, 64)
    assert not rotation_applies(query, key, cosine) and not gate_applies(query, query, weight)  # gradients are recorded
    with torch.no_grad():
        assert not rotation_applies(query.double(), key, cosine) and not rotation_applies(query, key, cosine[..., :16])
        assert not rotation_applies(query[..., :16], key[..., :16], cosine[..., :16])
        assert not gate_applies(query.bfloat16(), query, weight) and not gate_applies(query[..., :8], query[..., :8], weight[:, :16])
        for bad in ((query[:, :2], key, cosine, cosine), (query, key, cosine, cosine[:, :2]), (query, key, cosine.double(), cosine)):
            with pytest.raises(RuntimeError, match="rotate: "):
                native_rotation(*bad)
        for bad in ((query, query[:, :2], weight, weight[:, 0]), (query, query, weight[:, :32], weight[:, 0])):
            with pytest.raises(RuntimeError, match="gate: shapes do not fit"):
                native_gate(*bad)


@needs_kernels
@torch.no_grad()
def test_a_branchs_step_writes_all_or_nothing():
    "Two heads of 32 with one key head, width 16, a ring of four; each argument in turn is one that does not fit."
    weights = [normal(0, 64, 16), normal(1, 32, 16), normal(2, 32, 16), normal(3, 16, 64)]
    positions = normal(4, 1, 1, 32), normal(5, 1, 1, 32)
    good = {"standard": normal(6, 3, 1, 16), "hidden": normal(7, 3, 1, 16), "weights": weights, "biases": [None, normal(8, 32), None, None],
            "positions": positions, "log_sigma": normal(9, 2), "gate": torch.nn.Linear(32, 2), "top_k": 2,
            "keys": normal(10, 3, 1, 32, 4).mT, "values": normal(11, 3, 1, 4, 32)}
    for name, bad in (("standard", normal(6, 3, 1, 32)), ("hidden", good["hidden"].double()), ("weights", [weights[0].T, *weights[1:]]),
                      ("weights", [*weights[:3], weights[3].bfloat16()]), ("biases", [normal(8, 32), None, None, None]),
                      ("positions", (positions[0], positions[1][..., :16])), ("log_sigma", normal(9, 2).double()),
                      ("gate", torch.nn.Linear(16, 2)), ("keys", good["keys"].contiguous()), ("values", normal(11, 2, 1, 4, 32))):
        call = {**good, name: bad}
        keys, values = call["keys"].clone(), call["values"].clone()
        assert native_branch_step(**call, slot=1, held=3) is None, name
        assert torch.equal(call["keys"], keys) and torch.equal(call["values"], values)
    with pytest.raises(RuntimeError, match="the slot must be one of those held"):
        native_branch_step(**good, slot=3, held=3)
    keys = good["keys"].clone()
    assert native_branch_step(**good, slot=1, held=3).shape == (3, 1, 16)
    changed = (good["keys"] != keys).any(-1)
    assert changed[:, :, 1].all() and changed.sum() == 3


@needs_kernels
@pytest.mark.parametrize(("window", "top_k"), [(1, None), (17, 9), (64, None), (64, 9), (500, 9), (2000, None)])
def test_many_segments_of_work(window, top_k):
    "Longer than the pieces the native operator works in, several of them, with a past and shared heads."
    query, key, value = normal(0, 1, 2, 1100, 8), normal(1, 1, 1, 1237, 8), normal(2, 1, 1, 1237, 8)
    problem = Problem(CausalWindow(window), top_k, "krause", 0, "", torch.float32, query.shape, key.shape, 8, None, "", (), 0)
    incoming = normal(3, *query.shape) * clear_rows(problem, query, key, None).unsqueeze(-1)
    tensors, sigma = (query, key, value), torch.tensor(2.0)

    def by(way):
        return lambda q, k, v, s: attend_by(way, q, k, v, CausalWindow(window), top_k, sigma=s)

    exact = gradients_of(by("reference"), precise(tensors), sigma, incoming)
    for gradient, true in zip(gradients_of(by("native_band"), tensors, sigma, incoming), exact, strict=True):
        assert largest(gradient.double() - true) <= 2e-5 * (1 + largest(true))
    output = reference_attention(*precise(tensors), CausalWindow(window), top_k, sigma=sigma)
    for way in ("native_band", "banded_tiles"):
        assert largest((by(way)(*tensors, sigma) - output) * (incoming != 0)) < 1e-5


@needs_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("name", "neighborhood"), [("native_band", CausalWindow(40)), ("native_lists", GridWindow(24, 25, 3))])
def test_the_number_of_threads_changes_nothing(name, neighborhood, dropout, one_and_two_threads):
    tensors = [*three(0, (2, 4, 601, 20)), torch.linspace(1, 2, 4)]
    found = []
    for threads in (*one_and_two_threads, *one_and_two_threads):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = attend_by(name, *leaves[:3], neighborhood, 9, sigma=leaves[3], dropout=dropout)
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@each_way
def test_the_same_again(name, neighborhood, top_k):
    found = []
    for _ in range(3):
        leaves = [x.requires_grad_() for x in (*three(0, (2, 2, 12, 20)), torch.tensor([1.0, 2.0]))]
        output = attend_by(name, *leaves[:3], neighborhood, top_k, sigma=leaves[3])
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


# Dropout


def drop(name, seed, tensors, neighborhood, top_k, sigma=1.5, dropout=0.3):
    torch.manual_seed(seed)
    return attend_by(name, *tensors, neighborhood, top_k, sigma=sigma, dropout=dropout)


def dropped_weights(name, seed, tensors, neighborhood, top_k):
    "The weights after dropout: what becomes of the unit vectors."
    return drop(name, seed, [*tensors[:2], torch.eye(12).expand(*tensors[1].shape[:2], -1, -1)], neighborhood, top_k)


@each_way
def test_dropout_is_right_in_the_mean(name, neighborhood, top_k):
    tensors = three(0, (1, 2, 12, 6))
    exact = attend_by(name, *tensors, neighborhood, top_k, sigma=1.5)
    many = drop(name, 1, [x.expand(400, -1, -1, -1) for x in tensors], neighborhood, top_k)
    spread = many.std(0) / 400**0.5
    assert ((many.mean(0) - exact[0]).abs() <= 5 * spread + 1e-6).all()
    seeds = torch.stack([drop(name, seed, tensors, neighborhood, top_k)[0] for seed in range(60)])
    assert ((seeds.mean(0) - exact[0]).abs() <= 5 * seeds.std(0) / 60**0.5 + 1e-6).all()


@each_way
def test_dropout_drops_its_share_everywhere_alike(name, neighborhood, top_k):
    small = three(0, (1, 2, 12, 6))
    weights = attend_by(name, *small[:2], torch.eye(12).expand(1, 2, -1, -1), neighborhood, top_k, sigma=1.5)
    after = dropped_weights(name, 3, [x.expand(1000, -1, -1, -1) for x in small], neighborhood, top_k)
    alive, kept = weights[0] > 0, after > 0
    assert_close(after[kept], (weights / 0.7).expand_as(after)[kept], rtol=1e-5, atol=1e-7)
    shares = kept.double().mean(0)[alive]  # of each weight, over the batch
    assert ((shares - 0.7).abs() < 5 * (0.21 / 1000) ** 0.5).all()
    signs = (kept.double() - 0.7)[:, alive] / 0.21**0.5  # each of variance one; none should know of another
    together = signs.T @ signs / 1000
    assert (together - torch.diag(together.diag())).abs().max() < 6 / 1000**0.5
    next_in_batch = (signs[1:] * signs[:-1]).mean(0)
    assert next_in_batch.abs().max() < 6 / 1000**0.5


@each_way
def test_dropout_follows_the_seed(name, neighborhood, top_k):
    tensors = three(0, (2, 2, 12, 6))
    first = drop(name, 1, tensors, neighborhood, top_k)
    again = attend_by(name, *tensors, neighborhood, top_k, sigma=1.5, dropout=0.3)
    assert torch.equal(drop(name, 1, tensors, neighborhood, top_k), first)
    assert not torch.equal(drop(name, 2, tensors, neighborhood, top_k), first) and not torch.equal(again, first)
    state = torch.get_rng_state()
    assert torch.equal(drop(name, 1, tensors, neighborhood, top_k, dropout=0.0), attend_by(name, *tensors, neighborhood, top_k, sigma=1.5))
    torch.set_rng_state(state)


@over("score", ["krause", "softmax"])
@each_way
def test_gradients_are_of_the_dropped_forward(name, neighborhood, top_k, score):
    "The mask is read off the unit vectors; then the reference in float64 says what the gradients are."
    tokens = 12 if isinstance(neighborhood, GridWindow) else 100  # several tiles
    tensors, incoming = three(0, (2, 2, tokens, 6)), normal(9, 2, 2, tokens, 6)
    sigma = torch.tensor([1.2, 1.9]) if score == "krause" else None

    def run(value):
        torch.manual_seed(4)
        options = {"score": score, "dropout": 0.3}
        return lambda q, k, v, s: attend_by(name, q, k, v if value is None else value, neighborhood, top_k, sigma=s, **options)

    mask = (run(torch.eye(tokens).expand(2, 2, -1, -1))(*tensors, sigma) > 0).double() / 0.7
    assert 0.2 < (mask == 0).double().mean() < 1

    def exact(query, key, value, sigma):
        return (attention_weights(query, key, neighborhood, top_k, score=score, sigma=sigma) * mask) @ value

    assert_close(run(None)(*tensors, sigma).double(), exact(*precise(tensors), sigma), rtol=0, atol=1e-5)
    found, expected = gradients_of(run(None), tensors, sigma, incoming), gradients_of(exact, precise(tensors), sigma, incoming)
    assert_close([x.double() for x in found], [x.double() for x in expected], rtol=1e-5, atol=3e-5)


# The operators in PyTorch


SAMPLES = [  # shape of query and key, value's dimension, padding, top-k, score, dropout
    ((2, 2, 7, 16), (2, 2, 7, 16), 16, False, 2, 0, 0.0), ((1, 4, 5, 10), (1, 2, 9, 10), 3, True, 0, 1, 0.0),
    ((2, 2, 7, 16), (2, 1, 7, 16), 20, True, 3, 2, 0.3),
]


@needs_kernels
@pytest.mark.parametrize(("sample", "dtype"), zip(SAMPLES, [torch.float32, torch.bfloat16, torch.float32], strict=True))
def test_opcheck_of_the_band(sample, dtype):
    query, key, value_dim, padded, top_k, score, dropout = sample
    leaves = [x.to(dtype).requires_grad_() for x in (normal(0, *query), normal(1, *key), normal(2, *key[:3], value_dim))]
    key_mask = torch.arange(key[2]).expand(key[0], -1) > 1 if padded else None
    tau = torch.ones(query[1], requires_grad=True)
    starts = (torch.arange(key[2]) // 2 * 2).expand(key[0], -1).int() if padded else None
    torch.library.opcheck(torch.ops.krause_repro.band.default, (*leaves, tau, key_mask, starts, 3, top_k, score, dropout, 11))


@needs_kernels
@pytest.mark.parametrize(("sample", "dtype"), [
    (SAMPLES[0], torch.float32), (((1, 3, 7, 10), (1, 3, 7, 10), 3, False, 0, 2, 0.3), torch.bfloat16)])
def test_opcheck_of_the_lists(sample, dtype):
    query, key, value_dim, _, top_k, score, dropout = sample
    leaves = [x.to(dtype).requires_grad_() for x in (normal(0, *query), normal(1, *key), normal(2, *key[:3], value_dim))]
    lists, tau = candidate_lists(GridWindow(2, 3, 1)), torch.ones(query[1], requires_grad=True)
    torch.library.opcheck(torch.ops.krause_repro.lists.default, (*leaves, tau, *lists, top_k, score, dropout, 11))


def test_candidate_lists_are_the_mask():
    grids = GridWindow(3, 4, 1), GridWindow(2, 5, 2, "manhattan", False), GridWindow(1, 1, 0), GridWindow(3, 4, 1, random_seed=1)
    for neighborhood in grids:
        begin, token = candidate_lists(neighborhood)
        mask = torch.zeros(neighborhood.length, neighborhood.length, dtype=torch.bool)
        for row in range(neighborhood.length):
            mask[row, token[begin[row]: begin[row + 1]].long()] = True
        assert torch.equal(mask, neighborhood.mask(neighborhood.length)) and begin[-1] == len(token) == mask.sum()


@needs_kernels
def test_compiled_is_eager():
    torch._dynamo.reset()
    leaves = [normal(0, 2, 4, 21, 20), normal(1, 2, 2, 21, 20), normal(2, 2, 2, 21, 12), torch.linspace(1, 2, 4)]
    leaves = [x.requires_grad_() for x in leaves]

    def attention(query, key, value, sigma):
        return krause_attention(query, key, value, sigma, CausalWindow(6), 3, implementation="banded")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        found = []
        for compute in (attention, torch.compile(attention, fullgraph=True)):
            output = compute(*leaves)
            found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert_close(found[1], found[0], rtol=0, atol=1e-6)


# What is not finite, and where it may not go


@over(("sigma", "bad"), [(2.0, math.nan), (2.0, -math.inf), (0.02, math.nan), (0.02, math.inf)])
@with_flex
def test_a_bad_value_reaches_the_rows_that_keep_its_key(name, neighborhood, top_k, sigma, bad):
    "Also with weights that are too small for a float."
    query, key, value = three(0, (2, 2, 12, 16))
    expected = attend_by(name, query, key, value, neighborhood, top_k, sigma=sigma)
    kept = attention_weights(*precise((query, key)), neighborhood, top_k, sigma=1e3)[1, 0, :, 6] > 0
    expected[1, 0, kept, 3] = value[1, 0, 6, 3] = bad
    assert kept.any() and (isinstance(neighborhood, Full) and top_k is None or not kept.all())
    assert_close(attend_by(name, query, key, value, neighborhood, top_k, sigma=sigma), expected, rtol=0, atol=1e-6, equal_nan=True)


@with_flex
def test_opposite_infinities_are_not_a_number(name, neighborhood, top_k):
    query, key, value = torch.zeros(1, 1, 12, 16), torch.zeros(1, 1, 12, 16), normal(0, 1, 1, 12, 16)
    value[..., 5, 0], value[..., 6, 0] = math.inf, -math.inf
    output = attend_by(name, query, key, value, neighborhood, top_k, sigma=1.0)[0, 0, :, 0]  # all keys tie: all are kept
    first, second = neighborhood.mask(12)[:, 5], neighborhood.mask(12)[:, 6]
    assert torch.equal(output.isnan(), first & second)
    assert torch.equal(output == math.inf, first & ~second) and torch.equal(output == -math.inf, second & ~first)


@each_way
def test_no_gradient_passes_through_what_a_bad_value_spoils(name, neighborhood, top_k):
    "What else there is has the gradients of a problem in which the value is zero and the rows that keep it do not count."
    tensors, found = three(0, (2, 2, 12, 16)), []
    tensors[2][1, 0, 6] = math.nan
    kept = attention_weights(*precise(tensors[:2]), neighborhood, top_k, sigma=2.0)[1, 0, :, 6] > 0
    counts = torch.ones(2, 2, 12, 1)
    counts[1, 0, kept] = 0
    for way, value, factor in ((name, tensors[2], 1), ("reference", tensors[2].nan_to_num(0), counts)):
        leaves = [x.clone().requires_grad_() for x in (*tensors[:2], value, torch.tensor([2.0, 2.5]))]
        output = attend_by(way, *leaves[:3], neighborhood, top_k, sigma=leaves[3])
        loss = (output * factor).square().sum()
        gradients = torch.autograd.grad(loss, leaves)
        gradients[2][1, 0, 6] = 0
        found.append(gradients)
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@over("dtype", [torch.float32, torch.bfloat16])
@with_key_mask
def test_padding_that_was_never_written_does_not_matter(name, neighborhood, top_k, dtype):
    key_mask = torch.ones(2, 12, dtype=torch.bool)
    key_mask[0, :3], key_mask[1, 5:8] = False, False
    query, key, value = three(0, (2, 2, 12, 16), dtype=dtype)
    padded, found = ~key_mask[:, None, :, None].expand_as(key), []
    for filler in (0.0, math.nan, math.inf):
        leaves = [query.clone(), key.masked_fill(padded, filler), value.masked_fill(padded, filler)]
        leaves = [x.requires_grad_() for x in (*leaves, torch.tensor([2.0, 2.5]))]
        output = attend_by(name, *leaves[:3], neighborhood, top_k, sigma=leaves[3], key_mask=key_mask)
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert not any(x[padded].any() for x in found[0][2:4])
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=0 if dtype == torch.float32 else 1e-6)


@each_way_that_drops
def test_a_dropped_value_does_not_count(name, neighborhood, top_k):
    "Where the implementation tells what it dropped."
    tensors = three(0, (1, 2, 12, 16))
    kept = dropped_weights(name, 3, tensors, neighborhood, top_k)[..., 6] > 0
    tensors[2][:, :, 6] = math.nan
    output = drop(name, 3, tensors, neighborhood, top_k)
    assert torch.equal(output.isnan().any(-1), kept) and 0 < kept.sum() < kept.numel()


@over("name", ["reference", *CAUSAL])
@over("window", [1, 3, 70, 200])
def test_a_future_of_nan_changes_nothing(name, window):
    now, tensors = 75, three(0, (1, 2, 100, 16))
    later = [x.clone() for x in tensors]
    for x in later:
        x[:, :, now + 1:] = math.nan
    before, after = (attend_by(name, *x, CausalWindow(window), sigma=2.0)[:, :, :now + 1] for x in (tensors, later))
    assert torch.equal(before, after)
    for changed in (1, 2):  # keys and values; a query that is not finite has a row of its own
        leaves = [(later if n == changed else tensors)[n].clone().requires_grad_() for n in range(3)]
        output = attend_by(name, *leaves, CausalWindow(window), sigma=2.0)[:, :, :now + 1]
        assert torch.autograd.grad(output.sum(), leaves[0])[0][:, :, :now + 1].isfinite().all()


@over("far", [0, 10, 100])
@with_flex
def test_a_common_offset_costs_no_precision(name, neighborhood, top_k, far):
    query, key, value = three(0, (1, 2, 12, 16))
    tensors = [query + far, key + far, value]
    exact = reference_attention(*precise(tensors), neighborhood, top_k, sigma=1.0)
    assert largest(attend_by(name, *tensors, neighborhood, top_k, sigma=1.0) - exact) < 5e-5
    if name == "flex":
        return
    gradients = [gradients_of(lambda *x, way=way: attend_by(way, *x[:3], neighborhood, top_k, sigma=x[3]), given_, torch.tensor(1.0), value)
                 for way, given_ in ((name, tensors), ("reference", precise(tensors)))]
    for gradient, true in zip(*gradients, strict=True):
        assert largest(gradient - true) < 4e-4  # sums of products with keys near 100, in float32


@pytest.mark.parametrize("name", ["reference", *CAUSAL])
@pytest.mark.parametrize("padded", [False, True])
def test_an_offset_costs_no_precision_beside_padding_nan_and_outliers(name, padded):
    "The point that distances are measured from is neither padding, nor NaN, nor the one key that is far away."
    query, key, value = three(0, (1, 2, 90, 16))
    query, key, key_mask = query + 100, key + 100, None
    if padded:
        key_mask = torch.arange(90).expand(1, -1) >= 5
        query[:, :, :5], key[:, :, :5], value[:, :, :5] = math.nan, math.nan, math.nan
    else:
        key[:, :, 0, 0], query[:, :, 1], key[:, :, 70] = math.nan, math.inf, 1e4
    output = attend_by(name, query, key, value, CausalWindow(20), sigma=1.0, key_mask=key_mask)
    exact = reference_attention(*precise((query, key, value)), CausalWindow(20), sigma=1.0, key_mask=key_mask)
    rows = ~exact.isnan()
    assert torch.equal(~output.isnan(), rows) and rows.any(-1).sum() > 130
    assert largest((output - exact)[rows]) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "banded_tiles", pytest.param("native_band", marks=needs_kernels), "gathered_rows",
                                  pytest.param("native_lists", marks=needs_kernels), "sdpa"])
def test_sigma_has_no_gradient_where_there_is_no_choice(name, dtype):
    "One candidate weighs one, whatever sigma is."
    tokens, grid = (1, 7), name in ("gathered_rows", "native_lists")
    alone = [(GridWindow(1, n, 0, cls_token=False) if grid else CausalWindow(1), n, None) for n in tokens]
    if not grid:
        alone.append((CausalWindow(7), 7, torch.arange(7).expand(3, -1) == 2))
    if name in ("reference", "sdpa"):
        alone += [(Full(), 1, None), (Full(), 7, torch.arange(7).expand(3, -1) == 2), (GridWindow(1, 7, 0, cls_token=False), 7, None)]
    for neighborhood, length, key_mask in alone:
        sigma = torch.tensor([0.3, 0.4], requires_grad=True)
        output = attend_by(name, *three(0, (3, 2, length, 64), dtype=dtype), neighborhood, sigma=sigma, key_mask=key_mask)
        assert torch.autograd.grad(output.sum(), sigma)[0].tolist() == [0, 0]


# The operators themselves refuse what they cannot do


def raw_operators():
    "A function of one tensor for each operator, and the tensor."
    ops, (query, key, value), tau = torch.ops.krause_repro, three(0, (1, 2, 7, 32)), torch.ones(2)
    weights, row, gate = [normal(n, 64, 64) for n in range(4)], normal(1, 8, 32), (normal(1, 2, 128), normal(2, 2))
    ring = [normal(0, 1, 2, 32, 4).mT, normal(1, 1, 2, 4, 32)]
    angles, token = normal(2, 1, 7, 32), normal(3, 1, 1, 64)
    last = (query[:, :, :1], key[:, :, :1].contiguous(), value[:, :, :1].contiguous())
    return {
        "band": (lambda x: ops.band(x, key, value, tau, None, None, 3, 0, 0, 0.0, 0)[0], query),
        "lists": (lambda x: ops.lists(x, key, value, tau, *candidate_lists(GridWindow(2, 3, 1)), 0, 0, 0.0, 0)[0], query),
        "decode_linear": (lambda x: ops.decode_linear(x, row, None), normal(0, 2, 32)),
        "rotate": (lambda x: ops.rotate(x, x, angles, angles)[0], normal(0, 1, 7, 2, 32)),
        "gate": (lambda x: ops.gate(x, x, *gate), token),
        "ring_step": (lambda x: ops.ring_step(x, *last[1:], *ring, tau, 0, 2, 0), last[0]),
        "branch_step": (lambda x: ops.branch_step(x, token, weights, [None] * 4, *[angles[:, :1]] * 2, *ring, tau, *gate,
                                                  0, 2, 0), token),
    }


@needs_kernels
@pytest.mark.parametrize("name", ["band", "lists", "decode_linear", "rotate", "gate", "ring_step", "branch_step"])
def test_an_operator_refuses_by_name_what_it_cannot_follow(name):
    function, x = raw_operators()[name]
    with torch.no_grad():
        assert function(x).isfinite().all()
    for what in (lambda: torch.func.jvp(function, (x,), (x,)), lambda: torch.func.vmap(function)(torch.stack([x, x])),
                 lambda: torch.func.grad(lambda x: function(x).sum())(x)):
        with pytest.raises(RuntimeError, match=f'krause_repro::{name} .*implementation="reference"'):
            what()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f'krause_repro::{name} .*implementation="reference"'):
        function(forward_ad.make_dual(x, x))
    if name not in ("band", "lists"):
        with pytest.raises(RuntimeError, match=f'krause_repro::{name} has no gradient.*implementation="reference"'):
            function(x.clone().requires_grad_())


@needs_kernels
def test_functions_of_the_operators_refuse_too_or_do_without():
    query, key, value = three(0, (1, 2, 7, 32))
    for compute, neighborhood in ((native_band, CausalWindow(3)), (native_lists, GridWindow(2, 3, 1))):
        with pytest.raises(RuntimeError, match='implementation="reference"'):
            torch.func.jvp(lambda q, n=neighborhood, c=compute: c(q, key, value, n, sigma=1.0), (query,), (query,))
    layer, x = DecodeLinear(32, 8), normal(0, 2, 32)
    with torch.no_grad():  # which does not switch forward derivatives off
        assert linear_applies(x, layer.weight)
        tangent = torch.func.jvp(layer, (x,), (x,))[1]
        assert_close(tangent, F.linear(x, layer.weight))
        assert_close(torch.func.vmap(layer)(x.unsqueeze(1)).squeeze(1), layer(x))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [({"key": torch.zeros(1, 2, 7, 24)}, "do not fit together"), ({"value": torch.zeros(1, 2, 6, 16)}, "do not fit together"),
     ({"key": torch.zeros(1, 2, 4, 16), "value": torch.zeros(1, 2, 4, 16)}, "do not fit together"),
     ({"query": torch.zeros(1, 3, 7, 16)}, "must match the existing size"), ({"query": torch.zeros(2, 7, 16)}, "four dimensions"),
     ({"key_mask": torch.ones(1, 6, dtype=torch.bool)}, "key_mask must be"), ({"key_mask": torch.ones(1, 7)}, "key_mask must be"),
     *(({"starts": torch.tensor([starts], dtype=dtype)}, "starts must") for starts, dtype in (
         ([0] * 6, torch.int32), ([0] * 7, torch.int64), ([-1, 0, 0, 0, 0, 0, 0], torch.int32), ([0, 2, 2, 2, 2, 2, 2], torch.int32),
         ([0, 1, 0, 0, 0, 0, 0], torch.int32))),
     ({"window": 0}, "window must be"), ({"top_k": -1}, "out of range"), ({"score": 3}, "out of range"),
     ({"dropout": 1.1}, "out of range")],
)
def test_an_operator_reads_nothing_beside_its_tensors(change, message):
    tensors = dict(zip(("query", "key", "value"), three(0, (1, 2, 7, 16)), strict=True))
    call = {**tensors, "tau": torch.ones(2), "key_mask": None, "starts": None, "window": 3, "top_k": 0, "score": 0, "dropout": 0.0,
            "seed": 0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.krause_repro.band(**call | change)



# Packed sequences


@over("name", ["reference", *CAUSAL])
@over(("window", "keys", "queries", "padded"), [(9, 90, 90, True), (40, 200, 130, False), (300, 90, 90, False)])
def test_packed_sequences_are_the_sequences_alone(name, window, keys, queries, padded):
    "A reference of one sequence after the other, in float64; heads are grouped, and there may be a past and padding."
    generator, past, top_k = torch.Generator().manual_seed(keys), keys - queries, None if name == "sdpa" else 5
    segment_ids = torch.randint(5, (2, keys), generator=generator).sort(1).values
    real = torch.rand(2, keys, generator=generator) > 0.2 if padded else None
    tensors = normal(0, 2, 4, queries, 12), normal(1, 2, 2, keys, 12), normal(2, 2, 2, keys, 20)
    sigma, incoming = torch.linspace(1, 2, 4), normal(3, 2, 4, queries, 20)
    marks = {"key_mask": real, "segment_ids": segment_ids}

    def alone(query, key, value, sigma):
        output = torch.zeros(2, 4, queries, 20, dtype=torch.float64)
        for b, number in itertools.product(range(2), range(5)):
            own = slice(*(torch.searchsorted(segment_ids[b], n).item() for n in (number, number + 1)))
            rows = slice(max(own.start, past) - past, max(own.stop, past) - past)
            if rows.start < rows.stop:
                output[b, :, rows] = reference_attention(
                    query[b:b + 1, :, rows], key[b:b + 1, :, own], value[b:b + 1, :, own], CausalWindow(window), top_k, sigma=sigma,
                    key_mask=None if real is None else real[b:b + 1, own])[0]
        return output

    def packed(query, key, value, sigma):
        return WAYS[name](query, key, value, CausalWindow(window), top_k, sigma=sigma, **marks)

    exact = [x.double() for x in tensors]
    assert_close(packed(*tensors, sigma).double(), alone(*exact, sigma.double()), rtol=0, atol=1e-5)
    expected = gradients_of(alone, exact, sigma.double(), incoming)
    for one, other in zip(gradients_of(packed, tensors, sigma, incoming), expected, strict=True):
        assert_close(one.double(), other, rtol=0, atol=2e-5 * (1 + other.abs().max().item()))


@over("name", ["reference", *CAUSAL])
@over("factor", [-3.0, torch.nan, torch.inf])
def test_nothing_of_a_sequence_reaches_another(name, factor):
    segment_ids, top_k = torch.tensor([[2] * 13 + [3] * 10 + [7] * 17]), None if name == "sdpa" else 4
    here, others = slice(13, 23), [*range(13), *range(23, 40)]
    tensors, results = [x + 2 for x in three(0, (1, 2, 40, 16))], []
    for by in (1.0, factor):
        leaves = [x.clone() for x in tensors]
        for x in leaves:
            x[:, :, here] *= by
            x.requires_grad_()
        output = WAYS[name](*leaves, CausalWindow(7), top_k, sigma=2.0, segment_ids=segment_ids)[:, :, others]
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append([output, *(x[:, :, others] for x in gradients)])
        assert not any(x[:, :, here].any() for x in gradients) or not math.isfinite(by)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_packed_sequences_by_flex_attention(top_k=4):
    tensors, segment_ids = three(0, (2, 2, 40, 16)), torch.stack([torch.arange(40) // 13, torch.arange(40) // 40])
    for neighborhood, k in ((CausalWindow(7), top_k), (CausalWindow(7), None), (Full(), top_k)):
        expected = reference_attention(*tensors, neighborhood, k, sigma=2.0, segment_ids=segment_ids)
        assert_close(flex_attention(*tensors, neighborhood, k, sigma=2.0, segment_ids=segment_ids), expected, rtol=0, atol=1e-5)


# Memory


class Allocations(TorchDispatchMode):
    "Remembers the largest tensor that any operation makes, and which of them, beside the inputs, are alive."

    def __init__(self, inputs):
        super().__init__()
        self.largest, self.made, self.inputs = 0, {}, {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                if storage._cdata not in self.inputs:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def memory_of(name, length, window):
    "Bytes of the largest tensor, those alive between the passes, and those saved by autograd, beside the inputs."
    leaves = [x.requires_grad_() for x in three(0, (1, 1, length, 16))]
    saved, allocations = {}, Allocations(leaves)

    def pack(x):
        if x.untyped_storage()._cdata not in allocations.inputs:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with allocations, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = attend_by(name, *leaves, CausalWindow(window), 16, sigma=2.0)
        alive = allocations.alive()
        output.sum().backward()
    return allocations.largest, alive, sum(saved.values())


@pytest.mark.parametrize("name", CAUSAL[:2])
def test_nothing_of_size_tokens_times_window_is_kept(name):
    length, window, dim = 4096, 64, 16
    largest_, alive, saved = memory_of(name, length, window)
    assert largest_ <= 2 * 4 * length * dim  # in both passes
    assert alive <= 2 * 4 * length * dim < 4 * length * window  # the output, and a few numbers for each row
    assert saved <= 2 * 4 * length * dim


def test_the_dense_reference_would_be_noticed():
    largest_, alive, saved = memory_of("reference", 512, 64)
    assert min(largest_, alive, saved) >= 4 * 512 * 512


# Without a compiler

SCRIPT = """
import warnings
import torch
from krause_repro.attention import krause_attention
from krause_repro.reference import CausalWindow, GridWindow
torch.manual_seed(0)
tensors = [torch.randn(1, 2, 9, 5) for _ in range(3)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs = [krause_attention(*tensors, 1.5, hood, 3) for hood in (CausalWindow(4), CausalWindow(4), GridWindow(2, 4, 1))]
messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
torch.save({"tensors": tensors, "outputs": outputs, "messages": messages}, path)
"""


def run_script(script, path, **environment):
    "Run a script in another process, and load what it saved."
    run_fresh(script, environment, path=path)
    return torch.load(path)


def check_fallback(found):
    "Results equal the reference, and a single warning; its text."
    for output, neighborhood in zip(found["outputs"], (CausalWindow(4), CausalWindow(4), GridWindow(2, 4, 1)), strict=True):
        assert_close(output.double(), reference_attention(*precise(found["tensors"]), neighborhood, 3, sigma=1.5), rtol=0, atol=1e-5)
    assert len(found["messages"]) == 1
    return found["messages"][0]


def test_kernels_may_be_switched_off(tmp_path):
    message = check_fallback(run_script(SCRIPT, tmp_path / "found.pt", KRAUSE_KERNELS="off", TORCH_EXTENSIONS_DIR=str(tmp_path)))
    assert "KRAUSE_KERNELS is off" in message and "slower" in message
    assert [path.name for path in tmp_path.iterdir()] == ["found.pt"]


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_with_a_broken_compiler_it_goes_on_and_says_why(tmp_path):
    compiler, folder = tmp_path / "broken-c++", tmp_path / "extensions"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) echo "fatal error: this compiler is broken" >&2; exit 1;; esac\necho 13.2.0\n')
    compiler.chmod(0o755)
    message = check_fallback(run_script(SCRIPT, tmp_path / "found.pt", CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(folder)))
    assert "this compiler is broken" in message
    assert not files_in(folder) and len(list(folder.rglob("*"))) <= 1  # its own empty folder


COMPILE_FIRST = """
import torch
from krause_repro.attention import krause_attention
from krause_repro.reference import CausalWindow
tensors = [torch.randn(1, 2, 9, 16) for _ in range(3)]
compute = lambda *tensors: krause_attention(*tensors, 1.5, CausalWindow(4), 3, implementation="banded")
outputs = [torch.compile(compute, fullgraph=True, backend="eager")(*tensors), compute(*tensors)]
torch.save(outputs, path)
"""


@needs_kernels
def test_the_first_call_may_be_a_compiled_one(tmp_path):
    assert torch.equal(*run_script(COMPILE_FIRST, tmp_path / "found.pt"))


@needs_kernels
def test_the_library_is_built_once():
    path = library_path()
    assert path.is_file() and build_kernels() == path
    before = path.stat().st_mtime_ns
    build_kernels()
    assert path.stat().st_mtime_ns == before


def test_the_library_is_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    here = library_path()
    assert here.is_relative_to(tmp_path) and here.suffix == ".so"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert library_path().is_relative_to(tmp_path / "cache") and library_path().name == here.name


@pytest.fixture
def own_library(tmp_path, monkeypatch):
    "A copy of the library in a folder of the test's own, and a list that grows with every build; a build takes no time."
    built, good = [], build_kernels()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = library_path()
    shutil.copytree(good.parent, path.parent)

    def compile_at_once(folder, name):
        built.append(name)
        return Path(shutil.copy(good, folder / f"{name}.so"))

    monkeypatch.setattr(native_kernels, "_compile", compile_at_once)
    return path, built


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:50_000]), "empty": lambda path: path.write_bytes(b""),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "gone": lambda path: path.unlink(),
    "without checksum": lambda path: path.with_suffix(".sha256").unlink(),
    "with half a checksum": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff1234"),
}


@needs_kernels
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_again(own_library, damage):
    path, built = own_library
    assert library_is_whole(path) and build_kernels() == path and not built
    DAMAGE[damage](path)
    assert not library_is_whole(path)
    assert build_kernels() == path and library_is_whole(path) and len(built) == 1
    assert build_kernels() == path and len(built) == 1
    assert sorted(files_in(path.parents[1])) == sorted([path, path.with_suffix(".sha256")])


@needs_kernels
@pytest.mark.parametrize("damage", [None, "empty", "gone"])
def test_two_processes_may_build_at_once(own_library, damage, monkeypatch):
    path, built = own_library
    if damage is None:
        shutil.rmtree(path.parent)
    else:
        DAMAGE[damage](path)
    compile_at_once = native_kernels._compile

    def meanwhile(folder, name):
        monkeypatch.setattr(native_kernels, "_compile", compile_at_once)
        build_kernels()  # another process
        return compile_at_once(folder, name)

    monkeypatch.setattr(native_kernels, "_compile", meanwhile)
    assert build_kernels() == path and library_is_whole(path) and len(built) == 2
    assert sorted(files_in(path.parents[1])) == sorted([path, path.with_suffix(".sha256")])


@needs_kernels
def test_a_damaged_library_is_never_loaded(own_library, tmp_path):
    path, _ = own_library
    DAMAGE["truncated"](path)
    message = check_fallback(run_script(SCRIPT, tmp_path / "found.pt", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path)))
    assert "no-such-compiler" in message and "\n" not in message


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "extensions"
    message = check_fallback(run_script(SCRIPT, tmp_path / "found.pt", TORCH_EXTENSIONS_DIR=str(folder)))
    assert str(folder) in message and "\n" not in message



# Parts


@examples(60)
@given(problems(kinds=("window",), dtypes=(64,), padded=False, most=70))
def test_augmented_vectors_give_the_energies(problem):
    query, key, _ = problem.tensors()
    options = problem.options()
    tau = score_temperature(query[..., :0], problem.score, options["sigma"], query.shape[3])
    longer = augment(query, key, problem.score, tau)
    assert longer[0].shape[-1] == longer[1].shape[-1] > query.shape[-1] and longer[0].shape[-1] % 8 == 0
    logits = longer[0] @ repeat_kv(longer[1], query.shape[1]).mT
    exact = -pairwise_energy(query, repeat_kv(key, query.shape[1]), problem.score) / tau
    difference = logits - exact  # a constant in each row
    assert largest(difference - difference[..., :1]) <= 1e-10 * (1 + largest(exact))


def test_a_tile_of_the_band_is_a_part_of_its_mask():
    for window, queries, keys in ((1, 1, 1), (3, 4, 4), (3, 4, 6), (5, 2, 9), (100, 3, 7)):
        assert torch.equal(band_mask(window, queries, keys, torch.device("cpu")), CausalWindow(window).mask(keys)[-queries:])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 3, 400])
def test_thresholds_have_k_energies_at_or_below_them(top_k, score):
    query, key, _ = three(0, (1, 2, 300, 6))
    for neighborhood in (CausalWindow(9), Full()):
        energy = relative_energy(query, key, score).masked_fill(~neighborhood.mask(300), torch.inf)
        limit = row_thresholds(query, key, neighborhood, top_k, score)
        expected = neighborhood.mask(300).sum(-1).clamp_max(top_k).expand(1, 2, -1)
        assert torch.equal(((energy <= limit.unsqueeze(-1)) & energy.isfinite()).sum(-1), expected)


# Refusals


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("banded", {"neighborhood": Full()}, "'banded' needs a CausalWindow"),
        ("banded", {"neighborhood": GridWindow(2, 3, 1)}, "'banded' needs a CausalWindow"),
        ("gathered", {"neighborhood": Full()}, "'gathered' needs a GridWindow"),
        ("gathered", {"neighborhood": CausalWindow(3)}, "'gathered' needs a GridWindow"),
        ("gathered", {"neighborhood": GridWindow(2, 3, 1), "key_mask": torch.ones(1, 7, dtype=torch.bool)}, "'gathered' .*no key_mask"),
        ("sdpa", {"top_k": 2}, "'sdpa' .*top_k must be None"),
        ("flex", {}, "'flex' .*CUDA"),
        ("flash", {}, "'flash'"),
    ],
)
def test_what_an_implementation_cannot_do_it_refuses_by_name(name, change, message):
    request = {"neighborhood": CausalWindow(3), "sigma": 1.0, **change, "implementation": name}
    with pytest.raises(ValueError, match=message):
        krause_attention(*three(0, (1, 2, 7, 4)), **request)


def test_what_the_functions_cannot_do_they_refuse_too():
    tensors, mask = three(0, (1, 2, 7, 4)), torch.ones(1, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="top_k must be None for implementation 'sdpa', got 2"):
        sdpa_attention(*tensors, Full(), 2, sigma=1.0)
    with pytest.raises(ValueError, match="key_mask must be None on an image grid"):
        gathered_attention(*tensors, GridWindow(2, 3, 1), sigma=1.0, key_mask=mask)
    with pytest.raises(ValueError, match="needs 5 tokens, got 7"):
        gathered_attention(*tensors, GridWindow(2, 2, 1), sigma=1.0)
    for option in ({"dropout": 0.1}, {"key_mask": mask}):
        with pytest.raises(ValueError, match="'flex' needs dropout = 0, no key_mask"):
            flex_attention(*tensors, CausalWindow(3), sigma=1.0, **option)
    with pytest.raises(ValueError, match="'flex' needs .*as many queries as keys"):
        flex_attention(tensors[0][:, :, 2:], *tensors[1:], CausalWindow(3), sigma=1.0)
    for compute, neighborhood in ((native_band, CausalWindow(3)), (native_lists, GridWindow(2, 3, 1))):
        with pytest.raises(RuntimeError, match="not in float64"):
            compute(*(x.double() for x in tensors), neighborhood, sigma=1.0)


@needs_kernels
def test_dispatchers_take_the_kernels_where_there_are_any():
    tensors = three(0, (1, 2, 7, 4))
    for compute, native, general, neighborhood in (
        (banded_attention, native_band, banded_tiles, CausalWindow(3)),
        (gathered_attention, native_lists, gathered_rows, GridWindow(2, 3, 1)),
    ):
        for dtype, expected in ((torch.float32, native), (torch.bfloat16, native), (torch.float64, general)):
            given_ = [x.to(dtype) for x in tensors]
            assert torch.equal(compute(*given_, neighborhood, 2, sigma=1.0), expected(*given_, neighborhood, 2, sigma=1.0))


def test_pytorchs_counter_sees_the_product_of_few_rows():
    x, layer = torch.randn(2, 3, 32), DecodeLinear(32, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not kernels_available() or linear_applies(x, layer.weight)
        layer(x)
    assert counter.get_total_flops() == 2 * 6 * 32 * 8
