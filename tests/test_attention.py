"""Krause Attention against its definition: properties, a naive oracle, every implementation, every edge and every refusal."""

import copy
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import over
from hypothesis import given
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close

from krause_repro.attention import (
    KrauseAttention,
    attention_stages,
    banded_attention,
    choose_implementation,
    gathered_attention,
    krause_attention,
    krause_attention_weights,
    mechanism_example,
)
from krause_repro.checks import check_fraction, check_integer, check_positive
from krause_repro.fast_attention import (
    _near_weights,
    candidate_table,
    flex_attention,
    sdpa_attention,
)
from krause_repro.native_kernels import candidate_lists
from krause_repro.reference import (
    SCORES,
    CausalWindow,
    Full,
    GridWindow,
    Neighborhood,
    attention_weights,
    half_square_norm,
    pairwise_energy,
    reference_attention,
    repeat_kv,
)

IMPLEMENTATIONS = {"reference": reference_attention, "banded": banded_attention, "gathered": gathered_attention, "sdpa": sdpa_attention}
EXACT = {"rtol": 0, "atol": 1e-10}


def gathered_weights(query, key, neighborhood, top_k=None, *, score="krause", sigma=None):
    "The patches' rows of `attention_weights`, computed on their candidates only."
    near, _, scatter = _near_weights(query, key, neighborhood, top_k, score, sigma)
    return scatter(near)


def allows(neighborhood, i, j):
    "May query i consider key j? Said once more, by arithmetic on two numbers."
    if isinstance(neighborhood, Full):
        return True
    if isinstance(neighborhood, CausalWindow):
        return i - neighborhood.size < j <= i
    if neighborhood.cls_token:
        if i == 0 or j == 0:
            return True
        i, j = i - 1, j - 1
    rows, columns = (abs(a - b) for a, b in zip(divmod(i, neighborhood.width), divmod(j, neighborhood.width), strict=True))
    return (max(rows, columns) if neighborhood.metric == "chebyshev" else rows + columns) <= neighborhood.radius


def oracle(query, key, neighborhood, top_k=None, *, score="krause", sigma=None, key_mask=None):
    "Weights by loops over rows and keys: score, candidates, the k best with their ties, softmax over them."
    batch, heads, queries, dim = query.shape
    keys, shared = key.shape[2], heads // key.shape[1]
    weights = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    sigmas = torch.as_tensor(1.0 if sigma is None else sigma, dtype=torch.float64).expand(heads).tolist()
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                logits = {}
                for j in range(keys):
                    if not allows(neighborhood, keys - queries + i, j) or (key_mask is not None and not key_mask[b, j]):
                        continue
                    q, k = query[b, h, i].tolist(), key[b, h // shared, j].tolist()
                    if score == "krause":
                        logits[j] = -math.dist(q, k) ** 2 / (2 * sigmas[h] ** 2)
                    else:
                        norm = sum(y * y for y in k) / 2 if score == "softmax_key_norm" else 0
                        logits[j] = (sum(x * y for x, y in zip(q, k, strict=True)) - norm) / dim**0.5
                best = sorted(logits.values(), reverse=True)
                least = best[:top_k][-1] if best else 0
                kept = {j: math.exp(logit - best[0]) for j, logit in logits.items() if logit >= least - 1e-12}
                for j, weight in kept.items():
                    weights[b, h, i, j] = weight / sum(kept.values())
    return weights


def tensors(seed, shape, count=3, dtype=torch.float64, ties=False):
    "Generic inputs; with `ties`, small whole numbers, whose energies are exact and often equal."
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return [torch.randint(-1, 2, shape, generator=generator).to(dtype) for _ in range(count)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


grids = st.builds(
    GridWindow, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.sampled_from(["chebyshev", "manhattan"]), st.booleans()
)
windows = st.builds(CausalWindow, st.integers(1, 9))


@st.composite
def problems(draw, neighborhoods=None, scores=SCORES):
    "A neighbourhood, shapes of queries and keys, k, a score, the names of the implementations that apply, and a seed."
    neighborhood = draw(st.one_of(st.just(Full()), windows, grids) if neighborhoods is None else neighborhoods)
    grid, causal = isinstance(neighborhood, GridWindow), isinstance(neighborhood, CausalWindow)
    keys = neighborhood.length if grid else draw(st.integers(1, 10))
    queries = draw(st.integers(1, keys)) if causal and draw(st.booleans()) else keys  # the past may be cached
    batch, heads, dim = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    top_k = draw(st.none() | st.integers(1, keys + 2))
    applies = {"reference": True, "banded": causal, "gathered": grid, "sdpa": top_k is None}
    return {
        "neighborhood": neighborhood, "queries": queries, "keys": keys, "top_k": top_k, "score": draw(st.sampled_from(scores)),
        "names": [name for name, it_does in applies.items() if it_does], "seed": draw(st.integers(0, 10**6)),
        "query": (batch, heads * draw(st.integers(1, 2)), queries, dim), "key": (batch, heads, keys, dim),
    }


def inputs_of(problem, count=3, ties=False):
    "Query, key and, if there are to be three, value."
    keys = tensors(problem["seed"] + 1, problem["key"], count - 1, ties=ties)
    return [*tensors(problem["seed"], problem["query"], 1, ties=ties), *keys]


def sigma_of(problem):
    "A bandwidth for each head, for the Krause score only."
    heads = problem["query"][1]
    return torch.linspace(0.8, 1.5, heads, dtype=torch.float64) if problem["score"] == "krause" else None


def weights_by(name, query, key, neighborhood, top_k=None, **score):
    "The weights of one implementation: what it makes of the unit vectors."
    units = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:3], -1)
    return IMPLEMENTATIONS[name](query, key, units, neighborhood, top_k, **score)


def weights_of(problem, query, key, name="reference"):
    "The weights of a problem by one implementation."
    return weights_by(name, query, key, problem["neighborhood"], problem["top_k"], score=problem["score"], sigma=sigma_of(problem))


def support(neighborhood, length):
    "Who may consider whom, as a mask."
    return torch.tensor([[allows(neighborhood, i, j) for j in range(length)] for i in range(length)])


def support_of(problem):
    "The rows of a problem's queries in that mask."
    return support(problem["neighborhood"], problem["keys"])[-problem["queries"]:]


# Properties


@given(problems())
def test_rows_sum_to_one_on_k_candidates(problem):
    query, key = inputs_of(problem, 2)
    allowed = support_of(problem)
    expected = allowed.sum(-1).clamp_max(problem["top_k"] or problem["keys"])
    for name in problem["names"]:
        weights = weights_of(problem, query, key, name)
        assert_close(weights.sum(-1), torch.ones(problem["query"][:3], dtype=torch.float64), **EXACT)
        assert (weights >= 0).all() and not weights[..., ~allowed].any()
        assert ((weights > 0).sum(-1) == expected).all()


@given(problems())
def test_neighbourhood_mask_is_its_definition(problem):
    mask = problem["neighborhood"].mask(problem["keys"])
    assert mask.dtype == torch.bool and torch.equal(mask, support(problem["neighborhood"], problem["keys"]))
    assert mask.diagonal().all()


@given(grids, st.integers(0, 99))
def test_random_places_are_as_many_as_in_the_window(grid, seed):
    scattered = replace(grid, random_seed=seed)
    mask, window, hub = scattered.mask(grid.length), grid.mask(grid.length), int(grid.cls_token)
    assert torch.equal(mask.sum(-1), window.sum(-1)) and mask.diagonal().all()
    assert mask[:hub].all() and mask[:, :hub].all()
    assert torch.equal(replace(grid, random_seed=seed).build(grid.length), mask)
    patches = window[hub:, hub:].sum(-1)
    if ((patches > 1) & (patches < len(patches))).any():  # there is a choice
        assert any(not torch.equal(replace(grid, random_seed=other).mask(grid.length), mask) for other in range(seed + 1, seed + 40))


@given(problems())
def test_naive_oracle_agrees(problem):
    query, key = inputs_of(problem, 2)
    expected = oracle(query, key, problem["neighborhood"], problem["top_k"], score=problem["score"], sigma=sigma_of(problem))
    for name in problem["names"]:
        assert_close(weights_of(problem, query, key, name), expected, **EXACT)


@given(problems())
def test_ties_are_all_kept(problem):
    query, key = inputs_of(problem, 2, ties=True)
    expected = oracle(query, key, problem["neighborhood"], problem["top_k"], score=problem["score"], sigma=sigma_of(problem))
    candidates = support_of(problem).sum(-1)
    for name in problem["names"]:
        weights = weights_of(problem, query, key, name)
        assert_close(weights, expected, **EXACT)
        assert ((weights > 0).sum(-1) >= candidates.clamp_max(problem["top_k"] or problem["keys"])).all()


@given(problems(scores=["krause"]), st.floats(-5, 5))
def test_moving_queries_and_keys_together_changes_nothing(problem, step):
    query, key = inputs_of(problem, 2)
    step = step * torch.linspace(-1, 2, key.shape[-1], dtype=torch.float64)
    for name in problem["names"]:
        assert_close(weights_of(problem, query + step, key + step, name), weights_of(problem, query, key, name), **EXACT)


@given(problems(scores=["krause"]), st.floats(0.1, 10))
def test_only_distance_over_sigma_counts(problem, scale):
    query, key = inputs_of(problem, 2)
    sigma, rest = sigma_of(problem), (problem["neighborhood"], problem["top_k"])
    for name in problem["names"]:
        scaled = weights_by(name, scale * query, scale * key, *rest, sigma=scale * sigma)
        assert_close(scaled, weights_by(name, query, key, *rest, sigma=sigma), **EXACT)


@given(problems())
def test_rotating_queries_and_keys_together_changes_nothing(problem):
    query, key = inputs_of(problem, 2)
    dim = key.shape[-1]
    rotation = torch.linalg.qr(tensors(problem["seed"], (dim, dim), 1)[0]).Q
    for name in problem["names"]:
        assert_close(weights_of(problem, query @ rotation, key @ rotation, name), weights_of(problem, query, key, name), **EXACT)


@given(problems(neighborhoods=st.just(Full()), scores=["krause"]))
def test_the_order_of_keys_does_not_matter(problem):
    query, key, value = inputs_of(problem)
    order = torch.randperm(problem["keys"], generator=torch.Generator().manual_seed(problem["seed"]))
    rest = (sigma_of(problem), Full(), problem["top_k"])
    assert_close(krause_attention(query, key[:, :, order], value[:, :, order], *rest), krause_attention(query, key, value, *rest), **EXACT)


@given(problems(neighborhoods=windows), st.data())
def test_the_future_cannot_leak(problem, data):
    inputs = inputs_of(problem)
    past = problem["keys"] - problem["queries"]
    now = data.draw(st.integers(past, problem["keys"] - 1), label="now")
    future = [slice(now + 1 - past, None), slice(now + 1, None), slice(now + 1, None)]  # of the queries, the keys and the values
    changed = [tensor.clone() for tensor in inputs]
    for tensor, later in zip(changed, future, strict=True):
        tensor[:, :, later] = 1e3 * (1 + tensor[:, :, later].abs())

    def until_now(query, key, value):
        rest = (problem["neighborhood"], problem["top_k"])
        return reference_attention(query, key, value, *rest, score=problem["score"], sigma=sigma_of(problem))[:, :, : now + 1 - past]

    assert torch.equal(until_now(*inputs), until_now(*changed))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    gradients = torch.autograd.grad(until_now(*leaves).sum(), leaves)
    assert not any(gradient[:, :, later].any() for gradient, later in zip(gradients, future, strict=True))


@given(problems(neighborhoods=grids))
def test_gathered_is_the_reference_with_its_gradients(problem):
    leaves = [tensor.requires_grad_() for tensor in inputs_of(problem)]
    sigma = sigma_of(problem)
    if sigma is not None:
        leaves.append(sigma.requires_grad_())
    rest, score = (problem["neighborhood"], problem["top_k"]), {"score": problem["score"], "sigma": sigma}
    found = {}
    for name in ("reference", "gathered"):
        output = IMPLEMENTATIONS[name](*leaves[:3], *rest, **score)
        found[name] = [output, *torch.autograd.grad(output.square().sum(), leaves)]
    assert_close(found["gathered"], found["reference"], **EXACT)
    hub = int(problem["neighborhood"].cls_token)
    query, key = leaves[0], repeat_kv(leaves[1], leaves[0].shape[1])
    patches = gathered_weights(query[:, :, hub:], key, *rest, **score)
    assert_close(patches, attention_weights(query, key, *rest, **score)[:, :, hub:], **EXACT)


@given(problems(scores=["krause"]))
def test_each_image_and_head_stands_alone(problem):
    query, key = inputs_of(problem, 2)
    for name in problem["names"]:
        weights = weights_of(problem, query, key, name)
        rest = (problem["neighborhood"], problem["top_k"])
        alone = weights_by(name, query[-1:, -1:], key[-1:, -1:], *rest, sigma=sigma_of(problem)[-1].item())
        assert_close(weights[-1:, -1:], alone, **EXACT)


@given(problems(scores=["krause"]), st.data())
def test_padding_is_never_attended(problem, data):
    query, key, value = inputs_of(problem)
    batch, length = key.shape[0], problem["keys"]
    flags = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    key_mask = torch.tensor(data.draw(flags, label="key_mask")).reshape(batch, length)
    rest = (sigma_of(problem), problem["neighborhood"], problem["top_k"])
    weights = krause_attention_weights(query, key, *rest, key_mask)
    expected = oracle(query, key, problem["neighborhood"], problem["top_k"], sigma=rest[0], key_mask=key_mask)
    assert_close(weights, expected, **EXACT)
    padded = ~key_mask[:, None, :, None].expand(key.shape)
    other = [torch.where(padded, 7 - tensor, tensor) for tensor in (key, value)]
    exact = expected @ repeat_kv(value, query.shape[1])
    for name in set(problem["names"]) - {"gathered"} | {"auto"}:
        output = krause_attention(query, key, value, *rest, key_mask=key_mask, implementation=name)
        assert torch.equal(krause_attention(query, *other, *rest, key_mask=key_mask, implementation=name), output)
        assert_close(output, exact, **EXACT)
        assert not output[expected.sum(-1) == 0].any()


@given(problems(scores=["krause"]))
def test_a_shared_head_is_a_repeated_head(problem):
    query, key, value = inputs_of(problem)
    heads = query.shape[1]
    rest = (sigma_of(problem), problem["neighborhood"], problem["top_k"])
    repeated = (torch.stack([x[:, h * key.shape[1] // heads] for h in range(heads)], 1) for x in (key, value))
    assert_close(krause_attention(query, key, value, *rest), krause_attention(query, *repeated, *rest), **EXACT)


@given(problems(neighborhoods=windows, scores=["krause"]))
def test_a_past_gives_the_last_rows_of_the_whole(problem):
    query, (key, value) = tensors(problem["seed"], (*problem["query"][:2], *problem["key"][2:]), 1)[0], inputs_of(problem)[1:]
    rest = (sigma_of(problem), problem["neighborhood"], problem["top_k"])
    recent = slice(-problem["queries"], None)
    for name in problem["names"]:
        whole = krause_attention(query, key, value, *rest, implementation=name)
        assert_close(krause_attention(query[:, :, recent], key, value, *rest, implementation=name), whole[:, :, recent], **EXACT)


# Every implementation that selects, on every neighbourhood it is for, with seven tokens.
EACH_WAY = [
    (Full(), "reference"), (CausalWindow(3), "reference"), (CausalWindow(3), "banded"), (GridWindow(2, 3, 1), "reference"),
    (GridWindow(2, 3, 1), "gathered"),
]


# Gradients


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(("neighborhood", "implementation"), EACH_WAY)
def test_gradcheck(neighborhood, implementation, top_k):
    leaves = [tensor.requires_grad_() for tensor in tensors(3, (1, 2, 7, 2))]
    sigma = torch.tensor([0.9, 1.4], dtype=torch.float64, requires_grad=True)

    def output(query, key, value, sigma):
        return krause_attention(query, key, value, sigma, neighborhood, top_k, implementation=implementation)

    assert torch.autograd.gradcheck(output, (*leaves, sigma))


def test_gradients_with_empty_rows_are_finite():
    leaves = [tensor.requires_grad_() for tensor in tensors(0, (3, 2, 6, 4), dtype=torch.float32)]
    sigma = torch.ones(2, requires_grad=True)
    key_mask = torch.ones(3, 6, dtype=torch.bool)
    key_mask[0], key_mask[1, :2] = False, False
    for neighborhood, top_k in ((Full(), None), (CausalWindow(2), None), (CausalWindow(3), 2), (GridWindow(2, 3, 1, cls_token=False), 2)):
        output = krause_attention(*leaves, sigma, neighborhood, top_k, key_mask=key_mask)
        assert not output[0].any() and output[2].any()
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, sigma])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not any(gradient[0].any() for gradient in gradients[:3])


# Edges


@over("top_k", [None, 1, 3, 4, 9])
@over("length", [1, 3, 4, 5])
def test_lengths_around_the_window(length, top_k):
    query, key, value = tensors(length, (2, 2, length, 3))
    expected = oracle(query, key, CausalWindow(4), top_k, sigma=1.2) @ value
    assert_close(krause_attention(query, key, value, 1.2, CausalWindow(4), top_k), expected, **EXACT)
    single = krause_attention(*(tensor.float() for tensor in (query, key, value)), 1.2, CausalWindow(4), top_k)
    assert single.dtype == torch.float32
    assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "gathered"])
def test_rows_with_fewer_candidates_than_k_keep_them_all(implementation):
    query, key = tensors(0, (1, 1, 9, 4), 2)
    weights = weights_by(implementation, query, key, GridWindow(3, 3, 1, "manhattan", cls_token=False), 4, sigma=2.0)
    assert (weights > 0).sum(-1).flatten().tolist() == [3, 4, 3, 4, 4, 4, 3, 4, 3]


@over("dtype", [torch.float32, torch.float64])
@over("top_k", [None, 3])
@over(("neighborhood", "implementation"), EACH_WAY)
@over("as_tensor", [False, True])
def test_sigma_tiny_and_huge(neighborhood, implementation, top_k, dtype, as_tensor):
    leaves = [tensor.requires_grad_() for tensor in tensors(1, (2, 2, 7, 4), dtype=dtype)]
    reference = oracle(*(leaf.double() for leaf in leaves[:2]), neighborhood, top_k, sigma=1.0)
    nearest = F.one_hot(reference.argmax(-1), 7).double()
    survivors = (reference > 0).double()
    for sigma, expected in ((1e-30, nearest), (1e30, survivors / survivors.sum(-1, keepdim=True))):
        given_sigma = torch.full((2,), sigma, dtype=dtype, requires_grad=True) if as_tensor else sigma
        output = krause_attention(*leaves, given_sigma, neighborhood, top_k, implementation=implementation)
        assert_close(output.double(), expected @ leaves[2].double(), rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, *([given_sigma] if as_tensor else [])])
        assert all(gradient.isfinite().all() for gradient in gradients)


@over("dtype", [torch.float16, torch.bfloat16])
@over("top_k", [None, 3])
@over(
    ("neighborhood", "implementation"),
    [(Full(), "reference"), (CausalWindow(5), "reference"), (CausalWindow(5), "banded"), (GridWindow(3, 4, 1), "reference"),
     (GridWindow(3, 4, 1), "gathered")],
)
def test_half_precision_loses_no_more_than_the_formula_does(neighborhood, implementation, top_k, dtype):
    query, key, value = tensors(2, (2, 2, 13, 16), dtype=dtype)
    exact = oracle(query, key, neighborhood, top_k, sigma=2.0) @ value.double()
    distance = (query.unsqueeze(3) - key.unsqueeze(2)).square().sum(-1)
    logits = (-distance / 8).masked_fill(~support(neighborhood, 13), -torch.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    eager = logits.softmax(-1) @ value
    output = krause_attention(query, key, value, 2.0, neighborhood, top_k, implementation=implementation)
    assert output.dtype == eager.dtype == dtype
    assert (output.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


@pytest.mark.parametrize("compute", [attention_weights, gathered_weights])
@pytest.mark.parametrize("score", SCORES)
def test_autocast_leaves_the_scores_in_single_precision(compute, score):
    query, key = tensors(0, (2, 2, 12, 16), 2, dtype=torch.bfloat16)
    rest = {"score": score, "sigma": 2.0 if score == "krause" else None}
    exact = compute(query, key, GridWindow(3, 4, 1, cls_token=False), 4, **rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = compute(query, key, GridWindow(3, 4, 1, cls_token=False), 4, **rest)
    assert weights.dtype == torch.float32
    assert_close(weights, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("neighborhood", [Full(), CausalWindow(3), GridWindow(2, 3, 1)])
def test_inputs_need_not_be_contiguous(neighborhood):
    query, key = (tensor.transpose(1, 2) for tensor in tensors(0, (2, 7, 2, 4), 2))
    value = tensors(1, (1, 1, 7, 10), 1)[0][..., ::2].expand(2, 2, 7, 5)
    assert not any(tensor.is_contiguous() for tensor in (query, key, value))
    output = krause_attention(query, key, value, 1.0, neighborhood, 3)
    assert output.shape == (2, 2, 7, 5)
    assert_close(output, krause_attention(query.contiguous(), key.contiguous(), value.contiguous(), 1.0, neighborhood, 3), **EXACT)
    assert_close(output, oracle(query, key, neighborhood, 3, sigma=1.0) @ value, **EXACT)


@over("offset", [30, 300, 10_000])
@over(("neighborhood", "implementation"), [each for each in EACH_WAY if each[1] != "sdpa" or each[0] == Full()])
def test_an_outlier_as_first_token_does_not_spoil_the_others(neighborhood, implementation, offset):
    query, key, value = tensors(1, (1, 4, 7, 8), dtype=torch.float32)
    query[:, :, 0] += offset
    key[:, :, 0] += offset
    exact = krause_attention(query.double(), key.double(), value.double(), 1.0, neighborhood, implementation="reference")
    if implementation in ("auto", "reference", "sdpa"):
        found = krause_attention(query, key, value, 1.0, neighborhood, implementation=implementation)
        assert_close(found.double(), exact, rtol=0, atol=1e-5)
    weights = krause_attention_weights(query, key, 1.0, neighborhood)
    assert_close(weights.double(), krause_attention_weights(query.double(), key.double(), 1.0, neighborhood), rtol=0, atol=1e-6)


@over(("neighborhood", "implementation"), EACH_WAY)
@over("top_k", [None, 2])
def test_huge_and_zero_vectors(neighborhood, implementation, top_k):
    query, key, value = tensors(0, (1, 2, 7, 4), dtype=torch.float32)
    query, key = 1e4 * query, 1e4 * key
    query[:, :, 2], key[:, :, 3:5] = 0, 0
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = krause_attention(*leaves, 1.0, neighborhood, top_k, implementation=implementation)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.square().sum(), leaves))
    weights = weights_by(implementation, query, key, neighborhood, top_k, sigma=1.0)
    assert_close(weights.sum(-1), torch.ones(1, 2, 7))


@pytest.mark.parametrize(("neighborhood", "implementation"), EACH_WAY)
def test_zeros_tie_and_have_no_sign(neighborhood, implementation):
    zeros, (value,) = torch.zeros(1, 1, 7, 4), tensors(0, (1, 1, 7, 4), 1, dtype=torch.float32)
    allowed = support(neighborhood, 7).float()
    for query, key in ((zeros, zeros), (-zeros, zeros), (zeros, -zeros)):
        output = krause_attention(query, key, value, 1.0, neighborhood, 1, implementation=implementation)
        assert_close(output[0, 0], allowed @ value[0, 0] / allowed.sum(-1, keepdim=True))


def test_dropout():
    query, key, value = tensors(0, (1, 1, 5, 3))
    rest = (1.5, CausalWindow(4), 3)
    exact = krause_attention(query, key, value, *rest)
    assert torch.equal(krause_attention(query, key, value, *rest, dropout=0.0), exact)
    torch.manual_seed(0)
    many = krause_attention(*(tensor.expand(4000, -1, -1, -1) for tensor in (query, key, value)), *rest, dropout=0.3)
    assert_close(many.mean(0, keepdim=True), exact, rtol=0, atol=0.06)
    alone = many[:, 0, 0]  # the first token has one candidate: dropped, or scaled to keep the mean
    dropped = (alone == 0).all(-1)
    assert 0.25 < dropped.double().mean() < 0.35
    assert_close(alone[~dropped], (value[0, 0, 0] / 0.7).expand(int((~dropped).sum()), -1), **EXACT)


@pytest.mark.parametrize("neighborhood", [CausalWindow(61), GridWindow(5, 7, 2)])
def test_a_mask_made_while_predicting_serves_training(neighborhood):
    length = getattr(neighborhood, "length", 67)
    with torch.inference_mode():
        predicted = krause_attention(*tensors(0, (1, 1, length, 3)), 1.0, neighborhood, 4)
    leaves = [tensor.requires_grad_() for tensor in tensors(0, (1, 1, length, 3))]
    output = krause_attention(*leaves, 1.0, neighborhood, 4)
    assert torch.equal(output, predicted)
    assert all(gradient.any() for gradient in torch.autograd.grad(output.square().sum(), leaves))
    assert not neighborhood.mask(length).is_inference()
    if isinstance(neighborhood, GridWindow):
        assert not any(table.is_inference() for table in candidate_table(neighborhood, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_square_norm_is_a_number_or_nan(dtype):
    rows = [[3.0, 4.0], [0.0, -0.0], [math.inf, 1.0], [-math.inf, 1.0], [math.nan, 1.0], [1e200, 1.0]]
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    norm = half_square_norm(x)
    assert norm.dtype == dtype and norm[:2].tolist() == [12.5, 0]
    assert norm[2:].isnan().all()  # 10^200 is infinite in single precision, and its square in double


@pytest.mark.parametrize("score", SCORES)
def test_energy_is_its_formula(score):
    query, key = tensors(0, (2, 3, 4, 5), 2)
    formula = {
        "krause": torch.cdist(query, key).square() / 2, "softmax": -query @ key.mT,
        "softmax_key_norm": key.norm(dim=-1).square().unsqueeze(-2) / 2 - query @ key.mT,
    }[score]
    assert_close(pairwise_energy(query, key, score), formula, **EXACT)
    assert pairwise_energy(query.half(), key.half(), score).dtype == torch.float32


def test_output_follows_the_value():
    query, key, _ = tensors(0, (2, 3, 4, 5), dtype=torch.float32)
    assert krause_attention(query, key, torch.randn(2, 3, 4, 7), 1.0, Full()).shape == (2, 3, 4, 7)
    half = [tensor.bfloat16() for tensor in (query, key, key)]
    assert krause_attention(*half, torch.ones(3), Full()).dtype == torch.bfloat16
    assert krause_attention_weights(*half[:2], 1.0, Full()).dtype == torch.float32


@pytest.mark.parametrize("sigma", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0, 2.0])])
def test_sigma_may_be_a_number_or_one_per_head(sigma):
    query, key, value = tensors(0, (1, 2, 4, 3))
    assert_close(krause_attention(query, key, value, sigma, Full()), oracle(query, key, Full(), sigma=2.0) @ value, **EXACT)


def test_stages_lead_from_score_to_weights():
    query, key = tensors(0, (10, 3), 2)
    for neighborhood, top_k in ((GridWindow(3, 3, 1), 4), (GridWindow(3, 3, 1), None), (Full(), 2)):
        stages = attention_stages(query, key, 1.3, neighborhood, top_k)
        assert_close(stages["score"], (-torch.cdist(query, key).square() / (2 * 1.3**2)).exp(), **EXACT)
        assert torch.equal(stages["window"], support(neighborhood, 10))
        kept = stages["score"] * stages["selected"]
        assert torch.equal(stages["selected"], stages["weights"] > 0) and not (stages["selected"] & ~stages["window"]).any()
        assert_close(stages["weights"], kept / kept.sum(-1, keepdim=True), **EXACT)


def test_mechanism_example_is_plain_and_repeatable():
    example = mechanism_example(top_k=3)
    assert example == mechanism_example(top_k=3) != mechanism_example(top_k=3, seed=1)
    assert sum(example["window"]) == 9 and sum(example["selected"]) == 3
    assert example["window"][12] and math.isclose(sum(example["weights"]), 1, abs_tol=1e-3)


# Derivatives of other kinds


def forward_derivative(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def second_derivative(function, x):
    x = x.clone().requires_grad_()
    slope, = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


DERIVATIVES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x), "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])), "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "forward": forward_derivative, "second": second_derivative,
    "vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@over("derivative", DERIVATIVES)
@over(
    ("neighborhood", "top_k"), [(CausalWindow(3), None), (CausalWindow(3), 2), (GridWindow(2, 2, 1), 3), (Full(), None), (Full(), 3)]
)
def test_every_kind_of_derivative_is_that_of_the_reference(neighborhood, top_k, derivative):
    query, key, value = tensors(0, (1, 2, 5, 3), dtype=torch.float32)
    sigma = torch.tensor([0.9, 1.4])
    for position, x in ((0, query), (3, sigma)):
        found = []
        for implementation in ("auto", "reference"):
            def attention(x, position=position, implementation=implementation):
                given = [query, key, value, sigma]
                given[position] = x
                return krause_attention(*given, neighborhood, top_k, implementation=implementation)

            found.append(DERIVATIVES[derivative](attention, x))
        assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        assert found[1].any()


def test_forward_derivatives_have_the_right_size():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    for window, norm in ((CausalWindow(4), 9.467436), (GridWindow(2, 4, 1, cls_token=False), 14.681105)):
        tangent = DERIVATIVES["jvp"](lambda q, window=window: krause_attention(q, key, value, 1.0, window, 3), query)
        assert math.isclose(tangent.norm(), norm, rel_tol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("neighborhood", [CausalWindow(4), GridWindow(2, 3, 1), Full()])
def test_the_module_has_forward_derivatives(neighborhood, score):
    torch.manual_seed(0)
    module, hidden = KrauseAttention(8, 2, neighborhood, score=score), torch.randn(1, 7, 8)
    backward = torch.autograd.functional.jacobian(lambda x: module(x)[0].sum(), hidden)
    assert_close(torch.func.jacfwd(lambda x: module(x)[0].sum())(hidden), backward, rtol=1e-4, atol=1e-5)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    many = {name: torch.stack([x, x]) for name, x in parameters.items()}
    output = torch.func.vmap(lambda p: torch.func.functional_call(module, p, (hidden,))[0])(many)
    assert_close(output[1], module(hidden)[0], rtol=1e-4, atol=1e-5)


# Constants, whoever asks for them first


def in_fake_tensors(module, hidden):
    with FakeTensorMode():
        assert all(isinstance(table, FakeTensor) for table in constants_of(module.neighborhood))


def on_meta(module, hidden):
    with torch.device("meta"):
        assert copy.deepcopy(module).to("meta")(hidden.to("meta"))[0].is_meta
        assert not any(table.is_meta for table in constants_of(module.neighborhood))


def while_predicting(module, hidden):
    with torch.inference_mode():
        module(hidden)


FIRST = {
    "export": lambda module, hidden: torch.export.export(module.eval(), (hidden,)), "fake": in_fake_tensors, "meta": on_meta,
    "inference": while_predicting, "grad": lambda module, hidden: torch.func.grad(lambda x: module(x)[0].sum())(hidden),
    "vmap": lambda module, hidden: torch.func.vmap(lambda x: module(x)[0])(hidden.unsqueeze(0)),
    "compile": lambda module, hidden: torch.compile(module, backend="eager", fullgraph=True)(hidden),
}


def constants_of(neighborhood):
    "All that is remembered of a grid."
    length = neighborhood.length
    return [neighborhood.mask(length), *candidate_table(neighborhood, torch.device("cpu")), *candidate_lists(neighborhood)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", FIRST)
def test_constants_are_plain_tensors_whoever_asks_first(first, dtype):
    torch._dynamo.reset()
    grid = GridWindow(2, 3, 1, random_seed=10 * list(FIRST).index(first) + dtype.itemsize)  # of no other test
    torch.manual_seed(0)
    module, hidden = KrauseAttention(8, 2, grid, 3).to(dtype), torch.randn(2, 7, 8, dtype=dtype)
    FIRST[first](module, hidden)
    again = KrauseAttention(8, 2, grid, 3).to(dtype)
    again.load_state_dict(module.state_dict())
    output = again(hidden)[0]
    expected = again(hidden, output_weights=True)[0]
    assert type(output) is torch.Tensor
    assert_close(output, expected, rtol=0, atol=1e-5)
    output.sum().backward()
    assert all(parameter.grad.any() for parameter in (again.q_proj.weight, again.v_proj.weight, again.log_sigma))
    for table in constants_of(grid):
        assert type(table) is torch.Tensor and not table.is_inference() and table.device.type == "cpu"
    assert torch.equal(constants_of(grid)[0], grid.build(7))


# Devices, compilers

PROGRAMS = pytest.mark.parametrize(
    ("neighborhood", "top_k", "dtype"),
    [(CausalWindow(3), 2, torch.float32), (CausalWindow(3), None, torch.float64), (GridWindow(2, 3, 1), 3, torch.float32),
     (GridWindow(2, 3, 1), 3, torch.float64), (Full(), None, torch.float32), (Full(), 3, torch.float32)],
)


@PROGRAMS
def test_on_the_meta_device_there_are_shapes(neighborhood, top_k, dtype):
    module = KrauseAttention(8, 2, neighborhood, top_k).to("meta", dtype)
    hidden = torch.empty(3, 7, 8, device="meta", dtype=dtype)
    output = module(hidden)[0]
    assert output.is_meta and output.shape == hidden.shape and output.dtype == dtype
    heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
    for sigma in (1.0, module.sigma):
        output = krause_attention(heads, heads, heads[..., :3], sigma, neighborhood, top_k)
        assert output.is_meta and output.shape == (3, 2, 7, 3)


@PROGRAMS
def test_a_layer_is_compiled_into_one_graph(neighborhood, top_k, dtype):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module, hidden = KrauseAttention(8, 2, neighborhood, top_k).to(dtype), torch.randn(5, 7, 8, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(compiled(hidden)[0], module(hidden)[0], rtol=0, atol=1e-5)


def test_dropout_can_be_compiled():
    torch._dynamo.reset()
    module, hidden = KrauseAttention(8, 2, CausalWindow(3), 2, dropout=0.5), torch.randn(2, 7, 8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert not torch.equal(compiled(hidden)[0], compiled(hidden)[0])


# Numbers and tensors of other types


def test_numpy_numbers_are_numbers():
    query, key, value = tensors(0, (1, 2, 7, 4), dtype=torch.float32)
    expected = krause_attention(query, key, value, 1.5, CausalWindow(3), 2)
    for integer, real in ((np.int64, np.float32), (np.int32, np.float64), (np.uint8, np.float16)):
        assert CausalWindow(integer(3)) == CausalWindow(3) and type(CausalWindow(integer(3)).size) is int
        grid = GridWindow(integer(2), integer(3), integer(1), random_seed=integer(4), cls_token=np.True_)
        assert grid == GridWindow(2, 3, 1, random_seed=4) and repr(grid) == repr(GridWindow(2, 3, 1, random_seed=4))
        assert torch.equal(krause_attention(query, key, value, real(1.5), CausalWindow(integer(3)), integer(2)), expected)
        for window, top_k in ((CausalWindow(3), integer(2)), (grid, integer(2)), (Full(), integer(2)), (Full(), None)):
            krause_attention(query, key, value, real(1.5), window, top_k, dropout=real(0.25))
        module = KrauseAttention(integer(8), integer(2), Full(), integer(3), sigma=real(1.5), dropout=real(0.25))
        assert type(module.top_k) is int and type(module.initial_sigma) is type(module.dropout) is float
    assert type(check_integer("n", np.int64(3), 1)) is int and type(check_positive("x", np.float32(2))) is float
    assert type(check_fraction("x", np.float32(0.5))) is float


@over("change", [
    {"top_k": np.True_}, {"top_k": np.float64(2)}, {"top_k": np.int64(0)}, {"top_k": torch.tensor(2)}, {"sigma": np.float32("nan")},
    {"sigma": np.True_}, {"sigma": np.array([1.0, 1.0])}, {"sigma": torch.tensor([1, 2])}, {"sigma": 1j}, {"dropout": np.float32("nan")},
    {"dropout": np.float64(1)},
])
def test_what_is_no_number_is_named(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        krause_attention(**BASE | change)


@over("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool])
@over("neighborhood", [Full(), CausalWindow(2), GridWindow(2, 2, 1)])
def test_the_type_of_a_tensor_is_named(neighborhood, dtype):
    tensor = torch.zeros(1, 2, 5, 4, dtype=dtype)
    with pytest.raises(ValueError, match=f"query must be a floating tensor.*got {dtype}"):
        krause_attention(tensor, tensor, tensor, 1.0, neighborhood)
    with pytest.raises(ValueError, match=f"query must be a floating tensor.*got {dtype}"):
        krause_attention_weights(tensor, tensor, 1.0, neighborhood)
    with pytest.raises(ValueError, match=f"hidden must be a floating tensor.*got {dtype}"):
        KrauseAttention(8, 2, neighborhood)(torch.zeros(1, 5, 8, dtype=dtype))


def test_what_is_no_tensor_is_named():
    array = np.zeros((1, 2, 5, 3), dtype=np.float32)
    for name in ("query", "key", "value", "key_mask"):
        with pytest.raises(TypeError, match=f"{name} must be a .*tensor.*got ndarray"):
            krause_attention(**BASE | {name: array})


@over("top_k", [None, 2])
@over("dtype", [torch.float32, torch.bfloat16, torch.float64])
@over("neighborhood", [Full(), CausalWindow(3), CausalWindow(70), GridWindow(2, 2, 1)])
def test_an_empty_batch_is_a_result(neighborhood, dtype, top_k):
    query = torch.zeros(0, 4, 5, 8, dtype=dtype, requires_grad=True)
    key, value = torch.zeros(0, 2, 5, 8, dtype=dtype), torch.zeros(0, 2, 5, 3, dtype=dtype)
    for key_mask in (None, torch.zeros(0, 5, dtype=torch.bool)):
        output = krause_attention(query, key, value, torch.ones(4), neighborhood, top_k, key_mask=key_mask)
        assert output.shape == (0, 4, 5, 3) and output.dtype == dtype
        assert torch.autograd.grad(output.sum(), query)[0].shape == query.shape
    assert krause_attention_weights(query, key, 1.0, neighborhood, top_k).shape == (0, 4, 5, 5)
    module = KrauseAttention(8, 2, neighborhood, top_k).to(dtype)
    for output_weights in (False, True):
        assert module(torch.zeros(0, 5, 8, dtype=dtype), output_weights=output_weights)[0].shape == (0, 5, 8)


@pytest.mark.parametrize("shape", [(5, 8), (1, 0, 8), (1, 5, 7), (1, 2, 5, 8)])
def test_the_module_names_the_shape_it_takes(shape):
    with pytest.raises(ValueError, match=r"hidden must be of shape \(B, T ≥ 1, 8\)"):
        KrauseAttention(8, 2, Full())(torch.zeros(shape))



# Refusals

BASE = dict(zip(("query", "key", "value"), tensors(0, (1, 2, 5, 3), dtype=torch.float32), strict=True)) | {
    "sigma": 1.0, "neighborhood": GridWindow(2, 2, 1),
}


WINDOWED = {"neighborhood": CausalWindow(3)}


@over(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 5, 3)}, r"query must have four dimensions.*\(2, 5, 3\)"),
        ({"key": torch.randn(1, 2, 5)}, "key must have four dimensions"),
        ({"value": torch.randn(5)}, "value must have four dimensions"),
        ({"query": torch.ones(1, 2, 5, 3, dtype=torch.int64)}, "query must be a floating tensor.*int64"),
        ({"key": torch.randn(1, 2, 5, 3).double()}, "key must be .*float32.*got torch.float64"),
        ({"value": torch.randn(1, 2, 5, 3).half()}, "value must be .*float32.*got torch.float16"),
        ({"key": torch.empty(1, 2, 5, 3, device="meta")}, "key must be .*device.*cpu.*meta"),
        ({"value": torch.empty(1, 2, 5, 3, device="meta")}, "value must be .*device.*cpu.*meta"),
        ({"key": torch.randn(1, 2, 5, 4)}, r"query .*, key .* must agree and have no zeros, .*\(1, 2, 5, 4\)"),
        ({"key": torch.randn(1, 1, 5, 3)}, r"key .* and value .* must agree .*\(1, 1, 5, 3\)"),
        ({"value": torch.randn(1, 2, 4, 3)}, r"value .* must agree .*\(1, 2, 4, 3\)"),
        ({"query": torch.randn(2, 2, 5, 3)}, r"must agree .*got \(2, 2, 5, 3\)"),
        ({name: torch.empty(1, 2, 0, 3) for name in ("query", "key", "value")}, "have no zeros"),
        ({name: torch.randn(1, 3, 5, 3) for name in ("key", "value")}, "heads of key and value must divide the 2 heads of query"),
        ({name: torch.randn(1, 4, 5, 3) for name in ("key", "value")}, "heads of key and value must divide the 2 heads of query"),
        ({"query": torch.randn(1, 2, 4, 3)}, r"query and key must have one length T \(a CausalWindow also takes the last queries"),
        ({"query": torch.randn(1, 2, 4, 3), "neighborhood": Full()}, "query and key must have one length T"),
        ({"query": torch.randn(1, 2, 6, 3), "neighborhood": CausalWindow(2)}, "query and key must have one length T"),
        ({"sigma": math.nan}, "sigma must be.*nan"),
        ({"sigma": 0}, "sigma must be.*0"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"sigma": True}, "sigma must be.*True"),
        ({"sigma": "2"}, "sigma must be"),
        ({"sigma": None}, "sigma must be"),
        ({"sigma": torch.ones(3)}, r"sigma must be a number or have shape \(2,\).*\(3,\)"),
        ({"sigma": torch.ones(2, 1, 1)}, "sigma must be"),
        ({"sigma": torch.tensor([1.0, math.nan])}, "sigma must be"),
        ({"sigma": torch.tensor([1.0, 0.0])}, "sigma must be"),
        ({"sigma": torch.tensor([-1.0, 1.0])}, "sigma must be"),
        ({"sigma": torch.ones(2, device="meta")}, "sigma must be on query's device cpu, got meta"),
        ({"top_k": 0}, "top_k must be an integer ≥ 1, got 0"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_k": True}, "top_k must be.*True"),
        ({"top_k": 1.5}, "top_k must be.*1.5"),
        ({"top_k": "2"}, "top_k must be"),
        ({**WINDOWED, "segment_ids": torch.zeros(1, 5)}, "segment_ids must be an int32 or int64 tensor.*float32"),
        ({**WINDOWED, "segment_ids": torch.zeros(1, 4, dtype=torch.int32)}, r"segment_ids must be .*\(1, 5\).*\(1, 4\)"),
        ({**WINDOWED, "segment_ids": torch.zeros(5, dtype=torch.int64)}, r"segment_ids must be .*\(1, 5\).*\(5,\)"),
        ({**WINDOWED, "segment_ids": torch.tensor([[0, 0, 2, 1, 1]])}, "segment_ids must not decrease"),
        ({"segment_ids": torch.zeros(1, 5, dtype=torch.int64), "neighborhood": GridWindow(2, 2, 1)},
         "segment_ids must be None with GridWindow"),
        ({"key_mask": torch.ones(1, 5)}, "key_mask must be a bool tensor.*float32"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, r"key_mask must be .*\(1, 5\).*\(1, 4\)"),
        ({"key_mask": torch.ones(1, 5, 5, dtype=torch.bool)}, "key_mask must be"),
        ({"key_mask": torch.ones(1, 5, dtype=torch.bool, device="meta")}, "key_mask must be .*cpu.*meta"),
        ({"neighborhood": GridWindow(2, 3, 1)}, "GridWindow of 2×3 patches needs 7 tokens, got 5"),
        ({"neighborhood": GridWindow(2, 2, 1, cls_token=False)}, "GridWindow of 2×2 patches needs 4 tokens, got 5"),
        ({"implementation": "flash"}, "implementation must be one of auto, reference, banded, gathered, sdpa, flex, triton, got 'flash'"),
        ({"implementation": None}, "implementation must be one of .*got None"),
        ({"implementation": "banded"}, "implementation 'banded' needs a CausalWindow, got GridWindow"),
        ({"implementation": "banded", "neighborhood": Full()}, "implementation 'banded' needs a CausalWindow, got Full"),
        ({"implementation": "sdpa", "top_k": 2}, "implementation 'sdpa' cannot select; top_k must be None, .*top_k=2"),
        ({"implementation": "flex"}, "implementation 'flex' .*needs CUDA tensors, .*device cpu"),
        ({"implementation": "gathered", "neighborhood": CausalWindow(2)}, "implementation 'gathered' needs a GridWindow"),
        ({"implementation": "gathered", "key_mask": torch.ones(1, 5, dtype=torch.bool)}, "implementation 'gathered' needs .*no key_mask"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"top_k": 10**30}, r"top_k must be an integer below 2\^63"),
        ({"sigma": 10**400}, "sigma must be a number > 0"),
    ],
)
def test_attention_names_the_bad_argument(change, message):
    with pytest.raises(ValueError, match=message):
        krause_attention(**BASE | change)


@pytest.mark.parametrize("neighborhood", ["causal", None, Neighborhood()])
def test_attention_wants_a_neighbourhood(neighborhood):
    with pytest.raises(TypeError, match="neighborhood|neighbourhood"):
        krause_attention(**BASE | {"neighborhood": neighborhood})


def test_auto_is_the_fastest_that_can():
    grid, key_mask = GridWindow(2, 2, 1), torch.ones(1, 5, dtype=torch.bool)
    for expected, request in (
        (banded_attention, (CausalWindow(3),)), (banded_attention, (CausalWindow(3), 2, key_mask)), (gathered_attention, (grid,)),
        (gathered_attention, (grid, 2)), (sdpa_attention, (grid, None, key_mask)), (reference_attention, (grid, 2, key_mask)),
        (sdpa_attention, (Full(),)), (sdpa_attention, (Full(), None, key_mask)), (reference_attention, (Full(), 2)),
    ):
        assert choose_implementation("auto", *request) is expected, request
    assert choose_implementation("flex", grid, 2, device="cuda") is flex_attention


def test_weights_check_their_arguments_too():
    with pytest.raises(ValueError, match="sigma must be"):
        krause_attention_weights(BASE["query"], BASE["key"], -1.0, Full())
    with pytest.raises(ValueError, match="score must be one of krause, softmax, softmax_key_norm, got 'cosine'"):
        attention_weights(BASE["query"], BASE["key"], Full(), score="cosine")


@over(
    ("build", "message"),
    [
        (lambda: CausalWindow(0), "size must be an integer ≥ 1, got 0"),
        (lambda: CausalWindow(True), "size must be"),
        (lambda: CausalWindow(2.5), "size must be"),
        (lambda: CausalWindow(2**63), r"size must be an integer below 2\^63"),
        (lambda: GridWindow(2, 2, 1, random_seed=2**64), r"random_seed must be an integer below 2\^63"),
        (lambda: GridWindow(0, 2, 1), "height must be an integer ≥ 1"),
        (lambda: GridWindow(2, 0, 1), "width must be"),
        (lambda: GridWindow(2, 2, -1), "radius must be an integer ≥ 0, got -1"),
        (lambda: GridWindow(2, 2, 0.5), "radius must be"),
        (lambda: GridWindow(2, 2, 1, random_seed=-1), "random_seed must be an integer ≥ 0, got -1"),
        (lambda: GridWindow(2, 2, 1, random_seed=True), "random_seed must be"),
        (lambda: GridWindow(2, 2, 1, "euclid"), "metric must be one of chebyshev, manhattan, got 'euclid'"),
        (lambda: Full().mask(0), "length must be an integer ≥ 1"),
        (lambda: GridWindow(2, 3, 1).check(6), "GridWindow of 2×3 patches needs 7 tokens, got 6"),
        (lambda: GridWindow(2, 3, 1).mask(8), "GridWindow of 2×3 patches needs 7 tokens, got 8"),
        (lambda: KrauseAttention(7, 2, Full()), "heads must divide dim = 7, got 2"),
        (lambda: KrauseAttention(8, 0, Full()), "heads must be"),
        (lambda: KrauseAttention(0, 1, Full()), "dim must be"),
        (lambda: KrauseAttention(8, 2, Full(), score="cosine"), "score must be one of .*'cosine'"),
        (lambda: KrauseAttention(8, 2, Full(), sigma_per="token"), "sigma_per must be"),
        (lambda: KrauseAttention(8, 2, Full(), 0), "top_k must be"),
        (lambda: KrauseAttention(8, 2, Full(), sigma=0.0), "sigma must be"),
        (lambda: KrauseAttention(8, 2, Full(), sigma=math.nan), "sigma must be"),
        (lambda: KrauseAttention(8, 2, Full(), sigma=math.inf), "sigma must be a number > 0, got inf"),
        (lambda: KrauseAttention(8, 2, Full(), sigma=1e-60), "sigma must be from 1e-18 to 1e18, got 1e-60"),
        (lambda: KrauseAttention(8, 2, Full(), dropout=1.0), "dropout must be"),
        (lambda: KrauseAttention(8, 2, Full(), bias="no"), "bias must be True or False"),
        (lambda: KrauseAttention(8, 2, Full(), learn_sigma=None), "learn_sigma must be True or False"),
        (lambda: KrauseAttention(8, 2, Full())(torch.zeros(1, 3, 8).double()), "hidden must have the layer's dtype, torch.float32"),
    ],
)
def test_parts_name_the_bad_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_module_wants_a_neighbourhood():
    with pytest.raises(TypeError, match="neighborhood must be"):
        KrauseAttention(8, 2, "full")
    with pytest.raises(TypeError, match="neighborhood must be"):
        KrauseAttention(8, 2, Full())(torch.zeros(1, 3, 8), neighborhood=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert KrauseAttention(8, 2, Full())(torch.zeros(1, 3, 8).bfloat16())[0].isfinite().all()


@pytest.mark.parametrize("length", [4, 6, 12])
@pytest.mark.parametrize("score", SCORES)
def test_module_refuses_tokens_that_do_not_fit_its_grid(length, score):
    module = KrauseAttention(8, 2, GridWindow(2, 2, 1), 2, score=score)
    with pytest.raises(ValueError, match=f"needs 5 tokens, got {length}"):
        module(torch.randn(1, length, 8))


# Packed sequences


@pytest.mark.parametrize(("implementation", "neighborhood", "top_k"), [
    ("reference", CausalWindow(4), 2), ("banded", CausalWindow(4), 2), ("sdpa", CausalWindow(4), None), ("sdpa", Full(), None),
    ("auto", Full(), 2),
])
def test_packed_sequences_are_the_sequences_alone(implementation, neighborhood, top_k):
    tensors, segment_ids = tensors_far(), torch.tensor([[0, 0, 0, 5, 5, 6, 6, 6, 6, 6], [1] * 10])
    packed = krause_attention(*tensors, 1.5, neighborhood, top_k, segment_ids=segment_ids, implementation=implementation)
    for row, cuts in ((0, (3, 5)), (1, ())):
        parts = zip(*(x[row:row + 1].tensor_split(cuts, 2) for x in tensors), strict=True)
        alone = [krause_attention(*part, 1.5, neighborhood, top_k) for part in parts]
        assert_close(packed[row:row + 1], torch.cat(alone, 2), **EXACT)
    weights = krause_attention_weights(*tensors[:2], 1.5, neighborhood, top_k, segment_ids=segment_ids)
    assert_close(weights @ tensors[2], packed, **EXACT)


def tensors_far():
    "Query, key and value of two rows; each sequence of the first row has a place of its own, far from the others."
    places = torch.tensor([0, 0, 0, 50, 50, -80, -80, -80, -80, -80]).view(1, 1, 10, 1)
    return [x + places for x in tensors(0, (2, 2, 10, 4))]


@pytest.mark.parametrize("output_weights", [False, True])
def test_the_module_takes_packed_sequences(output_weights):
    torch.manual_seed(0)
    module, hidden = KrauseAttention(8, 2, CausalWindow(3), 2).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    packed, _ = module(hidden, segment_ids=torch.tensor([[0] * 4 + [1] * 5]), output_weights=output_weights)
    assert_close(packed, torch.cat([module(part)[0] for part in hidden.split([4, 5], 1)], 1), **EXACT)
    with pytest.raises(ValueError, match="segment_ids must not decrease"):
        module(hidden, segment_ids=torch.arange(9).flip(0)[None])
    with pytest.raises(ValueError, match="segment_ids must be None with GridWindow"):
        KrauseAttention(8, 2, GridWindow(3, 3, 1, cls_token=False))(hidden.float(), segment_ids=torch.zeros(1, 9, dtype=torch.long))


# The module


def project(layer, hidden, heads):
    "A projection, split into heads."
    return F.linear(hidden, layer.weight, layer.bias).unflatten(-1, (heads, -1)).transpose(1, 2)


@over("sigma_per", ["head", "layer"])
@over("score", SCORES)
@over("neighborhood", [Full(), CausalWindow(3), GridWindow(2, 3, 1)])
def test_module_is_projections_around_attention(neighborhood, score, sigma_per):
    torch.manual_seed(0)
    module = KrauseAttention(8, 2, neighborhood, 3, score=score, sigma=1.7, sigma_per=sigma_per).double()
    if score == "krause":
        torch.nn.init.normal_(module.log_sigma, std=0.3)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    query, key, value = (project(layer, hidden, 2) for layer in (module.q_proj, module.k_proj, module.v_proj))
    sigma = module.log_sigma.exp().detach() if score == "krause" else None
    expected = oracle(query, key, neighborhood, 3, score=score, sigma=sigma)
    output, weights = module(hidden, output_weights=True)
    assert_close(weights, expected, **EXACT)
    attended = (expected @ value).transpose(1, 2).flatten(2)
    assert_close(output, F.linear(attended, module.o_proj.weight, module.o_proj.bias), **EXACT)
    plain, nothing = module(hidden)
    assert nothing is None
    assert_close(plain, output, **EXACT)


@pytest.mark.parametrize("neighborhood", [Full(), CausalWindow(3), GridWindow(2, 3, 1)])
def test_fused_softmax_is_the_dense_one(neighborhood):
    torch.manual_seed(0)
    module = KrauseAttention(8, 2, neighborhood, score="softmax").double()
    hidden = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for output_weights in (False, True):
        output, weights = module(hidden, output_weights=output_weights)
        assert (weights is None) != output_weights
        found.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *module.parameters()])])
    assert_close(found[0], found[1], **EXACT)


def test_module_keeps_one_sigma_per_head_or_layer():
    for sigma_per, shape in (("head", (4,)), ("layer", (1,))):
        module = KrauseAttention(8, 4, Full(), sigma=3.5, sigma_per=sigma_per)
        assert module.log_sigma.shape == shape and module.log_sigma.requires_grad
        assert_close(module.sigma, torch.full(shape, 3.5))
        module.log_sigma.data += 1
        module.reset_sigma()
        assert_close(module.sigma, torch.full(shape, 3.5))
    for score in ("softmax", "softmax_key_norm"):
        module = KrauseAttention(8, 4, Full(), score=score)
        assert module.sigma is None and "log_sigma" not in module.state_dict()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sigma_learns_or_stays(learn_sigma):
    torch.manual_seed(0)
    module = KrauseAttention(8, 2, CausalWindow(4), 3, learn_sigma=learn_sigma)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    module(torch.randn(2, 5, 8))[0].square().sum().backward()
    optimizer.step()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name == "log_sigma" and not learn_sigma), name


@pytest.mark.parametrize("score", SCORES)
def test_module_state_goes_round(score):
    torch.manual_seed(0)
    first, second = (KrauseAttention(8, 2, CausalWindow(3), 2, score=score, bias=False) for _ in range(2))
    if score == "krause":
        torch.nn.init.normal_(first.log_sigma)
    second.load_state_dict(first.state_dict())
    hidden = torch.randn(1, 5, 8)
    assert torch.equal(first(hidden)[0], second(hidden)[0])
    names = {f"{letter}_proj.weight" for letter in "qkvo"} | ({"log_sigma"} if score == "krause" else set())
    assert set(first.state_dict()) == names


@pytest.mark.parametrize(("score", "top_k"), [("krause", 3), ("softmax", None), ("softmax", 3)])
def test_module_drops_only_while_training(score, top_k):
    torch.manual_seed(0)
    module = KrauseAttention(8, 2, Full(), top_k, score=score, dropout=0.5)
    hidden = torch.randn(1, 6, 8)
    assert not torch.equal(module(hidden)[0], module(hidden)[0])
    module.eval()
    assert torch.equal(module(hidden)[0], module(hidden)[0])


def test_module_rotates_queries_and_keys_alone():
    torch.manual_seed(0)
    module = KrauseAttention(8, 2, CausalWindow(4), 2).double()
    hidden = torch.randn(1, 6, 8, dtype=torch.float64)
    rotation, seen = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q, []

    def rotary(x):
        seen.append(tuple(x.shape))
        return x @ rotation

    assert_close(module(hidden, rotary)[0], module(hidden)[0], **EXACT)
    assert seen == [(1, 2, 6, 4)] * 2
    assert not torch.allclose(module(hidden, lambda x: 3 * x)[0], module(hidden)[0])


# What no implementation may get wrong in silence


GRID = GridWindow(2, 4, 1, cls_token=False)
SUPPORTS = [(CausalWindow(4), None), (CausalWindow(4), 2), (GRID, None), (GRID, 2), (Full(), None), (Full(), 3)]
WAYS = ("auto", "reference")


def small_three(length=8, dtype=torch.float32):
    return torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(("support", "top_k"), SUPPORTS)
def test_forward_derivatives_are_those_of_the_definition(support, top_k):
    query, key, value = small_three()
    def tangent(way):
        return torch.func.jvp(lambda q: krause_attention(q, key, value, 1.0, support, top_k, implementation=way), (query,), (key,))[1]
    assert_close(tangent("auto"), tangent("reference"), rtol=1e-4, atol=1e-5)
    assert tangent("auto").norm() > 1
    def slope(way):
        return torch.func.grad(lambda s: krause_attention(query, key, value, s, support, top_k, implementation=way).square().sum())
    sigmas = torch.tensor([0.7, 1.3])
    assert_close(torch.func.vmap(slope("auto"))(sigmas), torch.func.vmap(slope("reference"))(sigmas), rtol=1e-4, atol=1e-4)


@over("way", WAYS)
@over(("support", "top_k"), SUPPORTS)
def test_a_value_that_is_no_number_reaches_those_who_weigh_it_and_no_gradient_of_others(support, top_k, way):
    query, key, value = small_three()
    weights = krause_attention_weights(query, key, 1.0, support, top_k)
    for bad in (torch.nan, torch.inf):
        broken = value.clone()
        broken[:, :, 5] = bad
        broken.requires_grad_()
        output = krause_attention(query, key, broken, 1.0, support, top_k, implementation=way)
        assert torch.equal(~output.isfinite().all(-1), weights[..., 5] > 0)
        clean = krause_attention(query, key, value, 1.0, support, top_k, implementation=way)
        spared = weights[..., 5] == 0
        assert_close(output[spared], clean[spared], rtol=0, atol=1e-6)
        output[spared].sum().backward()
        assert broken.grad[:, :, :5].isfinite().all() and broken.grad[:, :, 6:].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("support", "top_k"), [case for case in SUPPORTS if not isinstance(case[0], GridWindow)])
def test_padding_that_was_never_written_does_not_count(support, top_k, way):
    query, key, value = small_three()
    real = torch.arange(8)[None] >= 3
    clean = krause_attention(query, key, value, 1.0, support, top_k, key_mask=real, implementation=way)
    key[:, :, :3] = value[:, :, :3] = torch.nan
    padded = krause_attention(query, key, value, 1.0, support, top_k, key_mask=real, implementation=way)
    assert torch.equal(padded[:, :, 3:], clean[:, :, 3:])
    assert clean.isfinite().all()


@over(("support", "top_k"), SUPPORTS)
@over("way", WAYS)
def test_distances_are_as_exact_far_from_the_origin(support, top_k, way):
    query, key, value = small_three(dtype=torch.float64)
    query, key = ((x.float() + 1000).double() - 1000 for x in (query, key))  # what float32 can hold there
    exact = krause_attention(query, key, value, 1.0, support, top_k, implementation="reference")
    far = krause_attention(*((x + 1000).float() for x in (query, key)), value.float(), 1.0, support, top_k, implementation=way)
    assert_close(far.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_an_earlier_row_does_not_depend_on_a_later_key_to_the_last_bit(way):
    query, key, value = small_three(40)
    before = krause_attention(query + 50, key + 50, value, 1.0, CausalWindow(9), 3, implementation=way)
    key[:, :, 25:] = 7 * key[:, :, 25:]
    value[:, :, 25:], query[:, :, 25:] = torch.nan, 1e4
    after = krause_attention(query + 50, key + 50, value, 1.0, CausalWindow(9), 3, implementation=way)
    assert torch.equal(before[:, :, :25], after[:, :, :25])


@pytest.mark.parametrize("sigma", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("support", [CausalWindow(32), GridWindow(8, 8, 2, cls_token=False)])
def test_gradients_at_a_small_sigma_are_as_exact_as_those_of_the_reference(support, sigma):
    exact, weight = small_three(64, torch.float64), small_three(64, torch.float64)[0].flip(-1)
    def gradient(way, dtype):
        query, key, value = exact.to(dtype)
        query.requires_grad_()
        output = krause_attention(query, key, value, sigma, support, 8, implementation=way)
        return torch.autograd.grad((output.double() * weight).sum(), query)[0].double()
    truth = gradient("reference", torch.float64)
    errors = [(gradient(way, torch.float32) - truth).abs().max() for way in WAYS]
    assert errors[0] <= 20 * errors[1] + 1e-9  # of almost all weight on one key, only rounding divided by σ² would be left


@pytest.mark.parametrize("output_weights", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_a_query_and_a_key_that_are_no_numbers_stay_in_their_sequence(score, output_weights):
    layer, hidden = KrauseAttention(8, 2, Full(), score=score), torch.randn(1, 6, 8)
    hidden[0, 1, 0] = torch.nan
    output = layer(hidden, output_weights=output_weights, segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))[0]
    assert output.isnan().all(-1)[0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_row_of_nan_weights_is_not_hidden_by_an_infinite_value(way):
    query, key, value = small_three()
    query[0, 0, 3, 0], value[0, 0, 2] = torch.nan, torch.inf
    output = krause_attention(query, key, value, 1.0, CausalWindow(4), implementation=way)
    assert output[0, 0, 3].isnan().all() and output[0, 0, 2].isposinf().all() and output[0, 0, 4].isposinf().all()


@pytest.mark.parametrize(("support", "top_k"), SUPPORTS)
def test_under_autocast_every_implementation_keeps_the_dtype(support, top_k):
    for dtype in (torch.float32, torch.float16):
        tensors = small_three(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(krause_attention(*tensors, 1.0, support, top_k, implementation=way).dtype == dtype for way in WAYS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("support", [CausalWindow(1), Full()])
def test_a_single_candidate_gives_sigma_no_gradient(support, way):
    query, key, value = torch.randn(3, 3, 9, 1, 64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.3, requires_grad=True)
    krause_attention(query, key, value, sigma, support, implementation=way).sum().backward()
    assert sigma.grad == 0


def test_numbers_of_numpy_are_numbers_and_odd_dtypes_are_named():
    query, key, value = small_three()
    got = krause_attention(query, key, value, np.float32(1), CausalWindow(np.int64(4)), np.int64(2))
    assert torch.equal(got, krause_attention(query, key, value, 1.0, CausalWindow(4), 2))
    for odd in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"query must be .* got {odd}"):
            krause_attention(query.to(odd), key.to(odd), value.to(odd), 1.0, CausalWindow(4))
    assert KrauseAttention(8, 2, CausalWindow(2))(torch.randn(0, 4, 8))[0].shape == (0, 4, 8)


@pytest.mark.parametrize(("support", "top_k"), SUPPORTS)
def test_a_layer_is_exported_and_leaves_no_imitations_behind(support, top_k):
    layer, x = KrauseAttention(16, 2, support, top_k).eval(), torch.randn(2, 8, 16)
    with torch.device("meta"):
        assert KrauseAttention(16, 2, support, top_k)(torch.empty(2, 8, 16))[0].shape == (2, 8, 16)
    graph = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")}, None, None)[:1]).module()
    more = torch.randn(3, 8, 16)
    assert_close(graph(more)[0], layer(more)[0], rtol=0, atol=1e-5)
    assert type(layer(more)[0]) is torch.Tensor and layer(more)[0].requires_grad


def test_a_layer_of_full_support_is_exported_with_any_length():
    layer, length = KrauseAttention(16, 2, Full()).eval(), torch.export.Dim("length")
    graph = torch.export.export(layer, (torch.randn(2, 6, 16),), dynamic_shapes=({1: length}, None, None)[:1]).module()
    hidden = torch.randn(2, 100, 16)
    assert_close(graph(hidden)[0], layer(hidden)[0], rtol=0, atol=1e-6)
