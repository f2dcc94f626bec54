"""The Triton kernels against the dense reference, in Triton's interpreter; what they need on a GPU, compiled ahead of time; on a GPU.

The interpreter executes each operation with NumPy, some milliseconds for a tile; so the cases are small and few.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from krause_repro.attention import krause_attention
from krause_repro.bench_attention import _Build, _kernel_resources
from krause_repro.reference import SCORES, CausalWindow, Full, GridWindow, attention_weights, reference_attention
from krause_repro.triton_kernels import _KERNELS, INTERPRETED, _blocks, triton, triton_applies, triton_attention

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
THOROUGH = int(os.environ.get("KRAUSE_TEST_EXAMPLES", "1")) > 1
works = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a CUDA device, or TRITON_INTERPRET=1 before triton is imported")
gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True, scope="module")
def the_interpreter_patches_the_language_once():
    "It does so at each call of a function inside a kernel, some milliseconds each."
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched, before = set(), interpreter.InterpretedFunction.__call__

    def call(self, *arguments, **named):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = before


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dataclass(frozen=True)
class Case:
    "A small problem; query heads share key heads, and there may be a past."

    neighborhood: object = CausalWindow(9)
    top_k: int | None = 4
    score: str = "krause"
    dtype: torch.dtype = torch.float32
    heads: tuple = (2, 1)
    lengths: tuple = (13, 15)
    dims: tuple = (20, 10)
    padded: bool = False
    offset: float = 0.0
    packed: bool = False

    def tensors(self):
        query, key = (normal(n, 1, h, t, self.dims[0]) + self.offset for n, (h, t) in enumerate(zip(self.heads, self.lengths, strict=True)))
        value = normal(2, 1, self.heads[1], self.lengths[1], self.dims[1])
        return [x.to(self.dtype) for x in (query, key, value)]

    def options(self):
        real = torch.arange(self.lengths[1], device=DEVICE) % 5 != 1
        marks = {"segment_ids": torch.arange(self.lengths[1], device=DEVICE)[None] // 6} if self.packed else {}  # a grid takes none
        return {"score": self.score, "key_mask": real[None] if self.padded else None, **marks}


CASES = {
    "window": Case(),
    "padding": Case(padded=True, score="softmax_key_norm", lengths=(10, 12)),
    "softmax": Case(score="softmax", top_k=None),
    "long": Case(CausalWindow(33), 20, lengths=(34, 40), heads=(1, 1)), "grid": Case(GridWindow(2, 3, 1), 3, lengths=(7, 7)),
    "packed": Case(packed=True, padded=True, offset=100.0, lengths=(13, 16)), "one packed query": Case(lengths=(1, 15), packed=True),
    "one query": Case(lengths=(1, 15), padded=True), "far": Case(offset=1000.0),
    "float16": Case(dtype=torch.float16, offset=100.0, heads=(1, 1), lengths=(10, 12)),
    "bfloat16": Case(dtype=torch.bfloat16), "window of one": Case(CausalWindow(1), None, dims=(1, 1), lengths=(5, 5)),
}
QUICK = ("padding", "grid", "one query", "float16", "packed")


def outcome(compute, tensors, sigma, case, incoming):
    leaves = [*(x.detach().requires_grad_() for x in tensors), sigma.detach().requires_grad_()]
    named = case.options() | ({"sigma": leaves[3]} if case.score == "krause" else {})
    output = compute(*leaves[:3], case.neighborhood, case.top_k, **named)
    leaves = leaves if case.score == "krause" else leaves[:3]
    return [output, *torch.autograd.grad(output, leaves, incoming.to(output.dtype))]


@works
@pytest.mark.parametrize("case", [case for name, case in CASES.items() if THOROUGH or name in QUICK])
def test_output_and_gradients_lose_no_more_than_twice_what_the_dense_formula_loses(case):
    tensors, sigma = case.tensors(), torch.linspace(2, 3, case.heads[0], device=DEVICE)
    incoming = normal(3, 1, case.heads[0], case.lengths[0], case.dims[1], dtype=case.dtype)
    exact = outcome(reference_attention, [x.double() for x in tensors], sigma.double(), case, incoming)
    dense = outcome(reference_attention, tensors, sigma, case, incoming)
    for what, true, usual, found in zip(("output", *"qkv", "sigma"), exact, dense,
                                        outcome(triton_attention, tensors, sigma, case, incoming), strict=False):
        error, allowed = ((x.double() - true).abs().max() for x in (found, usual))
        assert error <= 2 * allowed + 16 * torch.finfo(torch.float32).eps * (1 + true.abs().max()), f"{what}: {error:.2g}"


@works
def test_ties_are_all_kept(top_k=3):
    "Small whole numbers, whose energies are exact; the unit vectors as values give the weights."
    query, key = (torch.randint(-1, 2, (1, 1, 12, 3), generator=torch.Generator().manual_seed(n)).float().to(DEVICE) for n in range(2))
    units = torch.eye(12, device=DEVICE)[None, None]
    exact = attention_weights(query.double(), key.double(), CausalWindow(9), top_k, sigma=1.0)
    weights = triton_attention(query, key, units, CausalWindow(9), top_k, sigma=1.0)
    assert torch.equal(weights > 0, exact > 0)
    assert_close(weights.double(), exact, rtol=0, atol=1e-6)
    assert ((weights > 0).sum(-1) > top_k).any()


@works
def test_the_future_and_what_is_out_of_the_window_change_no_bit():
    case = Case(offset=50.0, heads=(1, 1), lengths=(12, 12), neighborhood=CausalWindow(6), top_k=3)  # two blocks
    tensors, sigma = case.tensors(), torch.tensor([3.0], device=DEVICE)
    for rows, hidden in ((slice(None, 8), slice(8, None)), (slice(9, None), slice(None, 4))):
        incoming = torch.zeros(1, 1, 12, 10, device=DEVICE)
        incoming[:, :, rows] = 1
        changed = [x.clone() for x in tensors]
        for n, x in enumerate(changed):
            x[:, :, hidden] = 50 * normal(9 + n, *x[:, :, hidden].shape)
        before, after = (outcome(triton_attention, x, sigma, case, incoming) for x in (tensors, changed))
        assert torch.equal(before[0][:, :, rows], after[0][:, :, rows])
        for one, other in zip(before[1:4], after[1:4], strict=True):
            assert not one[:, :, hidden].any() and not other[:, :, hidden].any()
            shown = torch.ones(12, dtype=torch.bool)
            shown[hidden] = False
            assert torch.equal(one[:, :, shown], other[:, :, shown])


@works
def test_nothing_of_a_packed_sequence_reaches_another():
    segment_ids = torch.tensor([[0] * 4 + [1] * 4 + [2] * 3], device=DEVICE)
    here, others, results = slice(4, 8), [0, 1, 2, 3, 8, 9, 10], []
    for by in (1.0, -3.0, torch.nan):
        leaves = [normal(n, 1, 1, 11, 16) + 2 for n in range(3)]
        for x in leaves:
            x[:, :, here] *= by
            x.requires_grad_()
        output = triton_attention(*leaves, CausalWindow(6), 3, sigma=2.0, segment_ids=segment_ids)[:, :, others]
        results.append([output, *(x[:, :, others] for x in torch.autograd.grad(output.square().sum(), leaves))])
    for plain, *changed in zip(*results, strict=True):
        assert all(torch.equal(plain, x) for x in changed)


@works
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_vector_spoils_the_rows_that_consider_it_and_a_bad_value_those_that_keep_it(bad):
    query, key, value = (normal(n, 1, 1, 12, 16) for n in range(3))
    good = triton_attention(query, key, value, CausalWindow(6), 3, sigma=2.0)
    broken = key.clone()
    broken[:, :, 6, 3] = bad
    output = triton_attention(query, broken, value, CausalWindow(6), 3, sigma=2.0)
    spoiled = CausalWindow(6).mask(12, DEVICE)[:, 6]
    assert torch.equal(output[0, 0].isnan().all(-1), spoiled) and torch.equal(output[0, 0, ~spoiled], good[0, 0, ~spoiled])
    broken = value.clone()
    broken[:, :, 6] = bad
    broken.requires_grad_()
    output = triton_attention(query, key, broken, CausalWindow(6), 3, sigma=2.0)
    kept = attention_weights(query, key, CausalWindow(6), 3, sigma=2.0)[0, 0, :, 6] > 0
    assert torch.equal(~output[0, 0].isfinite().all(-1), kept) and torch.equal(output[0, 0, ~kept], good[0, 0, ~kept])
    (gradient,) = torch.autograd.grad(output[0, 0, ~kept].sum(), broken)
    assert gradient.isfinite().all()


@works
def test_sigma_tiny_and_huge():
    query, key, value = (normal(n, 1, 2, 6, 4) for n in range(3))
    weights = attention_weights(query.double(), key.double(), CausalWindow(6), 2, sigma=1.0)
    nearest, kept = (weights == weights.amax(-1, keepdim=True))[:, :1], (weights > 0)[:, 1:]
    expected = torch.cat([nearest, kept / kept.sum(-1, keepdim=True)], 1)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.tensor([1e-30, 1e30], device=DEVICE))]
    output = triton_attention(*leaves[:3], CausalWindow(6), 2, sigma=leaves[3])
    assert_close(output.double(), expected.double() @ value.double(), rtol=0, atol=1e-6)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.square().sum(), leaves))


@works
def test_rows_without_candidates_are_zero_and_strides_do_not_matter():
    query, key, value = (normal(n, 2, 1, 4, 12) for n in range(3))
    real = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    real[0], real[1, :2] = False, False
    def results(move):
        leaves = [move(x).detach().requires_grad_() for x in (query, key, value)]
        output = triton_attention(*leaves, CausalWindow(4), 2, sigma=1.5, key_mask=real)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]
    plain = results(lambda x: x)
    assert not plain[0][0].any() and not plain[0][1, :, :2].any() and plain[0][1, :, 2:].any(-1).all()
    assert all(x.isfinite().all() for x in plain)
    for one, other in zip(plain, results(lambda x: x.mT.repeat_interleave(2, -1)[..., ::2].mT), strict=True):
        assert torch.equal(one, other)


@works
def test_the_operator_is_one_for_pytorch():
    tensors = [x.requires_grad_() for x in (normal(0, 1, 1, 3, 4), normal(1, 1, 1, 3, 4), normal(2, 1, 1, 3, 4))]
    tau = torch.ones(1, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.krause_repro.triton_forward, (*tensors, tau, None, None, 3, 2, 0),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    compiled = torch.compile(lambda *x: triton_attention(*x, CausalWindow(3), 2, sigma=1.5), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), triton_attention(*tensors, CausalWindow(3), 2, sigma=1.5), rtol=0, atol=0)
    slopes = []
    for compute in (triton_attention, reference_attention):
        output = compute(*tensors, CausalWindow(3), 2, sigma=1.5)
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        slopes.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))
    for one, other in zip(*slopes, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="do not support torch.func transforms"):
        torch.func.vmap(lambda q: torch.ops.krause_repro.triton_forward(q, *tensors[1:], tau, None, None, 3, 2, 0)[0])(
            torch.stack([tensors[0].detach()] * 2))


@works
@pytest.mark.parametrize(("arguments", "options", "message"), [
    ((torch.float64, 4, 5, CausalWindow(3)), {}, "needs float32, float16 or bfloat16"),
    ((torch.float32, 257, 5, CausalWindow(3)), {}, "needs head dimensions up to 256"),
    ((torch.float32, 4, 1100, CausalWindow(1025)), {}, "needs a window of at most 1,024 tokens"),
    ((torch.float32, 4, 5, CausalWindow(3)), {"dropout": 0.1}, "needs dropout = 0"),
    ((torch.float32, 4, 5, Full()), {}, "needs a CausalWindow or a GridWindow"),
])
def test_what_the_kernels_cannot_do_is_refused_by_name(arguments, options, message):
    dtype, dim, length, neighborhood = arguments
    x = normal(0, 1, 1, length, dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        krause_attention(x, x, x, 1.0, neighborhood, 2, implementation="triton", **options)


def test_auto_takes_the_kernels_for_tensors_of_a_gpu():
    "Fake tensors, which need no device."
    with FakeTensorMode():
        tensors = [torch.empty(1, 2, 7, 16, device="cuda", requires_grad=True) for _ in range(3)]
        for options, taken in (({}, True), ({"implementation": "triton"}, True), ({"dropout": 0.1}, False)):
            output = krause_attention(*tensors, 8.0, CausalWindow(4), 2, **options)
            assert ("triton_forward" in output.grad_fn.name()) == taken
        assert triton_applies(*tensors, GridWindow(2, 3, 1)) and not triton_applies(*tensors, Full())
        assert not triton_applies(*(x.double() for x in tensors), CausalWindow(4))


def test_without_triton_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr("krause_repro.triton_kernels.triton", None)
    x = normal(0, 1, 1, 4, 4)
    with pytest.raises(ImportError, match="pip install triton"):
        triton_attention(x, x, x, CausalWindow(2))


# Ahead of time

SHARED = {80: 166_912, 90: 232_448}  # bytes a program may have on an A100 and an H100


def check_resources(builds):
    for build, (registers, spilled, shared) in zip(builds, _kernel_resources(builds), strict=True):
        print(build, registers, spilled, shared)
        assert registers <= 255 and shared <= SHARED[build.target], (build, registers, shared)
        wide = build.dim * build.dtype.itemsize  # bytes of a vector
        assert spilled <= (16 if build.dim < 64 else 0 if wide <= 256 else 400 if wide <= 512 else 4096), (build, spilled)


def test_kernels_compile_for_gpus_without_spills(tmp_path, monkeypatch):
    "The two with most numbers in registers: all energies of a block, and two sums for each key."
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_resources([_Build("select", 90), _Build("key_gradients", 80, dim=128, mask=torch.int32)])


@pytest.mark.skipif(not THOROUGH, reason="a quarter of an hour; make test-thorough")
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", _KERNELS)
def test_every_kernel_compiles_for_gpus_without_spills(name, dim, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one = _Build(name, target, dim)
    jobs = [replace(one, window=window) for window in (32, 256, 512, 1024)] + [replace(one, mask=torch.int32)]
    jobs += [replace(one, dtype=torch.float32, window=window) for window in (256, 1024)]
    if dim in (64, 128):
        changes = [{"mask": torch.bool}, {"mask": torch.int32}, {"grid": True}, {"group": 2}, {"score": 2},
                   {"mask": torch.int32, "group": 4}]
        jobs += [replace(one, window=window, **change) for change in changes for window in (256, 1024)]
        jobs += [replace(one, score=1), replace(one, score=2, mask=torch.int32),
                 replace(one, length=4095), replace(one, dtype=torch.float16)]
    if name == "select":  # all its numbers of chunks
        reached = {str(_blocks(n, True)[:2]): n for n in range(32, 1025)} if dim in (64, 128) else {}
        jobs += [replace(one, window=n) for n in reached.values()] + [replace(one, selects=False)]
    if name in ("select", "forward"):
        jobs += [replace(one, single_row=True, window=window) for window in (256, 1024)]
    check_resources(list(dict.fromkeys(jobs)))


def test_tiles_hold_every_energy_of_a_block():
    for reach in range(1, 1025):
        for windowed, single in ((True, False), (False, False), (True, True)):
            tile, groups, chunks = _blocks(reach, windowed, single)
            columns = (groups["A"] + groups["B"]) * tile["N"]
            assert columns >= chunks * tile["N"] >= reach + (tile["ROWS"] - 1) * windowed
            assert tile["ROWS"] <= min(reach, tile["M"]) and all(n & (n - 1) == 0 for n in (tile["M"], tile["N"], *groups.values()))


# On a GPU


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("neighborhood", [CausalWindow(64), CausalWindow(256), CausalWindow(1024), GridWindow(14, 14, 2)])
def test_on_a_gpu_the_bound_holds_at_real_sizes(neighborhood, dtype, score):
    length = neighborhood.length if isinstance(neighborhood, GridWindow) else 1500
    case = Case(neighborhood, None, score, dtype, heads=(4, 2), lengths=(length, length), dims=(64, 64))
    test_output_and_gradients_lose_no_more_than_twice_what_the_dense_formula_loses(case)


@gpu
@pytest.mark.gpu
def test_on_a_gpu_auto_takes_the_kernels_and_two_runs_are_equal():
    leaves = [x.requires_grad_() for x in (normal(n, 2, 4, 700, 64, dtype=torch.bfloat16) for n in range(3))]
    runs = []
    for _ in range(2):
        output = krause_attention(*leaves, 8.0, CausalWindow(256), 192)
        assert "triton_forward" in str(output.grad_fn.name())
        runs.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@gpu
@pytest.mark.gpu
def test_on_a_gpu_gradients_are_the_slopes_of_the_output():
    "In float32, whose differences need large steps; without top-k, whose selection such a step may change."
    leaves = [x.requires_grad_() for x in (*(normal(n, 1, 2, 12, 8) for n in range(3)), torch.tensor([2.0, 3.0], device=DEVICE))]
    torch.autograd.gradcheck(lambda q, k, v, sigma: triton_attention(q, k, v, CausalWindow(5), sigma=sigma), leaves,
                             eps=1e-2, atol=1e-2, rtol=1e-2)
