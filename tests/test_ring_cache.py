"""The ring: what it returns at every step, in which order, for how much memory, and what it refuses."""

import copy
import random

import hypothesis.strategies as st
import pytest
import torch
from cases import over
from hypothesis import given
from torch.testing import assert_close
from transformers import DynamicCache, GPT2Config, LlamaConfig

from krause_repro.attention import krause_attention
from krause_repro.reference import CausalWindow, reference_attention
from krause_repro.ring_cache import RingCache, RingLayer, cache_bytes, ring_positions

SINGLE = {"rtol": 0, "atol": 1e-5}


def states(batch=2, heads=2, length=24, dim=8, seed=0, dtype=torch.float32):
    "Keys and values of a sequence."
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def pieces(steps):
    "The slice of the sequence that each step brings."
    start = 0
    for length in steps:
        yield slice(start, start + length)
        start += length


def feed(layer, keys, values, steps):
    "What the layer returns at each step."
    return [layer.update(keys[:, :, new], values[:, :, new]) for new in pieces(steps)]


@given(st.integers(0, 40), st.integers(1, 12))
def test_positions_are_those_of_a_ring_that_is_written_slot_by_slot(length, window):
    slots = {}
    for position in range(length):
        slots[position % window] = position
    assert ring_positions(length, window).tolist() == [slots[s] for s in sorted(slots)]


steps_of = st.lists(st.integers(1, 9), min_size=1, max_size=10)


@given(steps_of, st.integers(1, 7))
def test_every_step_returns_what_its_tokens_may_consider(steps, window):
    keys, values = states(length=sum(steps))
    layer = RingLayer(window)
    with torch.no_grad():
        for new in pieces(steps):
            count, offset = layer.get_mask_sizes(new.stop - new.start)
            got = layer.update(keys[:, :, new], values[:, :, new])
            if new.stop - new.start == 1:
                positions = ring_positions(new.stop, window)
                assert offset == 0
            else:
                positions = torch.arange(max(0, new.start - window + 1), new.stop)
                assert offset == positions[0]
            assert torch.equal(got[0], keys[:, :, positions]) and torch.equal(got[1], values[:, :, positions])
            assert count == len(positions)
            assert (offset + count < new.stop) == (positions.tolist() != list(range(offset, offset + count)))
            assert layer.get_seq_length() == new.stop


@given(steps_of, st.integers(1, 7), st.sampled_from([None, 1, 3]))
def test_attention_with_the_ring_is_attention_with_all_keys(steps, window, top_k):
    keys, values = states(length=sum(steps))
    query = states(heads=4, length=sum(steps), seed=1)[0]
    layer = RingLayer(window)
    with torch.no_grad():
        outputs = []
        for new in pieces(steps):
            returned = layer.update(keys[:, :, new], values[:, :, new])
            outputs.append(krause_attention(query[:, :, new], *returned, 2.0, CausalWindow(window), top_k))
        assert_close(torch.cat(outputs, 2), reference_attention(query, keys, values, CausalWindow(window), top_k, sigma=2.0), **SINGLE)


def test_decoding_writes_in_place_and_copies_nothing():
    keys, values = states(length=60)
    layer, places = RingLayer(8), set()
    with torch.no_grad():
        feed(layer, keys, values, [12])
        for returned in feed(layer, keys, values, [1] * 48):
            places.add((returned[0].data_ptr(), returned[1].data_ptr()))
            assert returned[0].shape[2] == 8
    assert places == {(layer.keys.data_ptr(), layer.values.data_ptr())}


@torch.no_grad()
@given(steps_of, st.integers(1, 40), st.none() | st.integers(1, 9), st.sampled_from([8, 16, 32, 80]), st.integers(1, 2), st.booleans())
def test_storing_and_attending_in_one_is_attention_with_all_keys(steps, window, top_k, dim, group, reordered):
    "Also with shared keys, with dimensions that no operator takes, and after a choice of sequences, which changes the layout."
    steps = [*steps, *[1] * 12]
    keys, values = states(length=sum(steps), dim=dim)
    queries = states(heads=2 * group, length=sum(steps), dim=dim, seed=1)[0]
    sigma, layer = torch.linspace(1, 2, 2 * group) * dim**0.5 / 2, RingLayer(window)
    outputs = []
    for number, new in enumerate(pieces(steps)):
        if reordered and number:
            layer.batch_select_indices(torch.arange(2))
        outputs.append(layer.attend(queries[:, :, new], keys[:, :, new], values[:, :, new], top_k, sigma))
    assert layer.get_seq_length() == sum(steps)
    assert_close(torch.cat(outputs, 2), reference_attention(queries, keys, values, CausalWindow(window), top_k, sigma=sigma), **SINGLE)


def test_storing_and_attending_in_one_leaves_the_ring_as_an_update_does():
    keys, values = states(dim=16)
    one, two = RingLayer(5), RingLayer(5)
    with torch.no_grad():
        for new in pieces([1] * 13):
            one.attend(keys[:, :, new], keys[:, :, new], values[:, :, new], 3, 1.5)
            two.update(keys[:, :, new], values[:, :, new])
            assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
        with pytest.raises(ValueError, match="a cache serves one batch of one model"):
            one.attend(*(x[:1, :, :1] for x in (keys, keys, values)), 3, 1.5)
    assert one.get_seq_length() == 13


def test_storing_and_attending_in_one_has_gradients_and_spares_an_earlier_graph():
    keys, values = states(dim=16, length=8)
    leaf = keys.clone().requires_grad_()
    layer = RingLayer(3)
    kept = [layer.attend(leaf[:, :, t:t + 1], leaf[:, :, t:t + 1], values[:, :, t:t + 1], 2, 1.5) for t in range(7)]
    with torch.no_grad():
        layer.attend(keys[:, :, 7:], keys[:, :, 7:], values[:, :, 7:], 2, 1.5)
    (got,) = torch.autograd.grad(torch.cat(kept, 2).square().sum(), leaf)
    whole = reference_attention(leaf[:, :, :7], leaf[:, :, :7], values[:, :, :7], CausalWindow(3), 2, sigma=1.5)
    (want,) = torch.autograd.grad(whole.square().sum(), leaf)
    assert_close(got, want, **SINGLE)


def test_memory_does_not_depend_on_the_position():
    config = LlamaConfig(num_hidden_layers=2, krause_window=16)
    ring, growing, sizes = RingCache(config), DynamicCache(), []
    keys, values = states(length=100)
    with torch.no_grad():
        for new in pieces([30, *[1] * 70]):
            for layer in range(2):
                for cache in (ring, growing):
                    cache.update(keys[:, :, new], values[:, :, new], layer)
            sizes.append(cache_bytes(ring))
    assert set(sizes) == {2 * 2 * 2 * 2 * 16 * 8 * 4}  # layers, keys and values, batch, heads, slots, dimension, bytes
    assert cache_bytes(growing) == 2 * 2 * 2 * 2 * 100 * 8 * 4
    assert cache_bytes(RingCache(config)) == 0


def test_keys_and_values_may_differ_in_dimension_and_dtype():
    keys, values = states()[0], states(dim=5, dtype=torch.bfloat16)[1]
    layer = RingLayer(4)
    returned = feed(layer, keys, values, [3, 1, 1, 1, 7])[-2:]
    assert torch.equal(returned[0][1], values[:, :, ring_positions(6, 4)])
    assert torch.equal(returned[1][0], keys[:, :, 3:13]) and returned[1][1].dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 3, 1, 1], [2, 10], [1, 6, 1, 1, 1, 1, 1]])
def test_gradients_flow_through_the_ring_as_without_it(steps):
    def gradients(through_ring):
        leaves = [x.requires_grad_() for x in (*states(length=12, dtype=torch.float64), states(heads=4, length=12, seed=1)[0].double())]
        keys, values, query = leaves
        if through_ring:
            layer = RingLayer(4)
            outputs = []
            for new in pieces(steps):
                returned = layer.update(keys[:, :, new], values[:, :, new])
                outputs.append(krause_attention(query[:, :, new], *returned, 2.0, CausalWindow(4), 3))
            output = torch.cat(outputs, 2)
        else:
            output = reference_attention(query, keys, values, CausalWindow(4), 3, sigma=2.0)
        return torch.autograd.grad(output.square().sum(), leaves)

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_step_without_gradients_leaves_an_earlier_graph_intact():
    keys, values = states(length=10)
    query = torch.ones(2, 2, 1, 8, requires_grad=True)  # a model of which only the queries are trained
    layer = RingLayer(4)
    feed(layer, keys, values, [5])
    returned = layer.update(keys[:, :, 5:6], values[:, :, 5:6])
    output = krause_attention(query, *returned, 2.0, CausalWindow(4))
    with torch.no_grad():
        later = layer.update(keys[:, :, 6:7], values[:, :, 6:7])[0]
    output.sum().backward()
    assert torch.equal(returned[0], keys[:, :, ring_positions(6, 4)])
    assert torch.equal(later, keys[:, :, ring_positions(7, 4)])
    assert query.grad.abs().sum() > 0


def test_a_ring_made_in_inference_mode_can_be_used_after_it():
    keys, values = states(length=8)
    layer = RingLayer(4)
    with torch.inference_mode():
        feed(layer, keys, values, [6])
    assert torch.equal(layer.update(keys[:, :, 6:7], values[:, :, 6:7])[0], keys[:, :, ring_positions(7, 4)])


def test_a_ring_rearranged_in_inference_mode_can_be_used_after_it():
    keys, values = states(length=8)
    layer = RingLayer(4)
    with torch.inference_mode():
        feed(layer, keys, values, [6])
        layer.reorder_cache(torch.tensor([1, 0]))
    got = layer.update(keys[[1, 0], :, 6:7], values[[1, 0], :, 6:7])[0]
    assert torch.equal(got, keys[[1, 0]][:, :, ring_positions(7, 4)]) and not got.is_inference()


@pytest.mark.parametrize("seen", [0, 3, 11])
@pytest.mark.parametrize(("change", "chosen"), [
    (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
    (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
])
def test_sequences_of_the_batch_are_chosen(change, chosen, seen):
    keys, values = states(batch=3)
    layer, expected = RingLayer(4), RingLayer(4)
    with torch.no_grad():
        if seen:
            feed(layer, keys, values, [seen - 1, 1])
            feed(expected, keys[chosen], values[chosen], [seen - 1, 1])
        change(layer)
        assert not seen or layer.keys.stride() == expected.keys.stride()
        for new in (slice(seen, seen + 1), slice(seen + 1, seen + 6), slice(seen + 6, seen + 7)):
            for got, wanted in zip(layer.update(keys[chosen][:, :, new], values[chosen][:, :, new]),
                                   expected.update(keys[chosen][:, :, new], values[chosen][:, :, new]), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("dim", [8, 16])  # the second is for an operator
def test_what_a_ring_no_longer_holds_has_no_effect(dim):
    "NaN in a token that has left the window, or was taken back, or was of an earlier text."
    keys, values = states(length=20, dim=dim)
    query, layer = states(heads=4, length=20, dim=dim, seed=1)[0], RingLayer(6)
    spoilt = [x.clone() for x in (keys, values)]

    def attended(new, k, v):
        return layer.attend(query[:, :, new], k[:, :, new], v[:, :, new], 3, 2.0)

    with torch.no_grad():
        expected = reference_attention(query, keys, values, CausalWindow(6), 3, sigma=2.0)
        for x in spoilt:
            x[:, :, :3] = torch.nan
        for new in pieces([4, *[1] * 16]):
            got = attended(new, *spoilt)
            assert new.stop <= 8 or torch.equal(got.isnan().any(-1), torch.zeros_like(got[..., 0], dtype=torch.bool))
            assert new.start < 8 or torch.allclose(got, expected[:, :, new], atol=1e-5)
        for forget in (layer.reset, lambda: layer.crop(-3)):
            forget()
            for new in pieces([2] if layer.get_seq_length() == 0 else [1, 2]):
                attended(new, *spoilt)
            layer.crop(-layer.get_seq_length())
            for new in pieces([2, 1, 1]):
                assert torch.allclose(attended(new, keys, values), expected[:, :, new], atol=1e-5)


def test_a_ring_can_be_reset_and_used_for_another_batch():
    cache = RingCache(GPT2Config(n_layer=2, krause_window=4))
    for batch in (2, 3):
        keys, values = states(batch=batch, seed=batch)
        for layer in range(2):
            returned = [cache.update(keys[:, :, new], values[:, :, new], layer) for new in pieces([6, 1])]
            assert torch.equal(returned[1][0], keys[:, :, ring_positions(7, 4)])
        assert cache.get_seq_length() == 7 and len(cache) == 2
        cache.reset()
        assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


def test_the_last_tokens_can_be_taken_back_while_nothing_is_forgotten():
    keys, values = states()
    layer = RingLayer(6)
    feed(layer, keys, values, [4, 1])
    layer.crop(0)
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    wanted = torch.cat([keys[:, :, :3], keys[:, :, 10:14]], 2)
    assert torch.equal(layer.update(keys[:, :, 10:14], values[:, :, 10:14])[0], wanted)
    layer.crop(0)
    for remove in (-1, 1, -8):
        with pytest.raises(ValueError, match="cannot remove|tokens_to_remove"):
            layer.crop(remove)
    assert not layer.is_croppable


@pytest.mark.parametrize("dim", [8, 16])  # the second is for an operator
@pytest.mark.parametrize("window", [1, 4, 6])
def test_recorded_tokens_can_be_taken_back_at_any_length(window, dim):
    "Drafts of random lengths, of which random parts are rejected, against a ring that never saw the rejected ones."
    draw, (keys, values) = random.Random(window), states(length=60, dim=dim)
    query, wrong = states(heads=4, length=60, dim=dim, seed=1)[0], torch.full((2, 2, 1, dim), 9.0)
    layer, length = RingLayer(window), 0
    layer.activate_past_recording()
    expected = reference_attention(query, keys, values, CausalWindow(window), 3, sigma=2.0)
    with torch.no_grad():
        while length < 45:
            good, bad, by_one = draw.randint(1, 9), draw.randint(0, 9), draw.random() < 0.5
            got = [layer.attend(query[:, :, new], keys[:, :, new], values[:, :, new], 3, 2.0)
                   for new in ([slice(i, i + 1) for i in range(length, length + good)] if by_one else [slice(length, length + good)])]
            assert_close(torch.cat(got, 2), expected[:, :, length:length + good], **SINGLE)
            for draft in [1] * bad if by_one else [bad] * (bad > 0):
                layer.update(*[wrong.expand(-1, -1, draft, -1)] * 2)
            again = draw.randint(0, good)
            layer.crop(-bad - again)
            length += good - again
            assert layer.is_croppable and layer.get_seq_length() == length
    layer.update(*[wrong.expand(-1, -1, 3, -1)] * 2)
    layer.crop(-3)
    with pytest.raises(ValueError, match="recorded 0 overwritten"):
        layer.crop(-1)
    layer.reset()
    assert not layer.is_croppable


def test_what_the_base_class_does_to_layers_works_on_a_ring():
    keys, values = states()
    cache = RingCache(LlamaConfig(num_hidden_layers=1, krause_window=4))
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0 and cache.is_sliding == [True]
    assert (cache.is_compileable, cache.is_croppable, cache.get_max_length()) == (False, False, 4)
    feed(cache.layers[0], keys, values, [5])
    twin = copy.deepcopy(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    new = (keys[:, :, 5:6], values[:, :, 5:6])
    assert torch.equal(cache.update(*new, 0)[0], keys[:, :, ring_positions(6, 4)])
    assert torch.equal(twin.update(*new, 0)[0], keys[:, :, ring_positions(6, 4)])
    assert repr(cache) == "RingCache(layers=[RingLayer(window=4)])"


@pytest.mark.parametrize(("keys", "values", "message"), [
    ((1, 2, 1, 8), (1, 2, 1, 8), "key_states must have 2 sequences, 2 heads, dimension 8 and torch.float32"),
    ((2, 4, 1, 8), (2, 4, 1, 8), "a cache serves one batch of one model"),
    ((2, 2, 1, 16), (2, 2, 1, 8), "got .2, 2, 1, 16. of torch.float32"),
    ((2, 2, 1, 8), (2, 2, 1, 16), "value_states must have"),
    ((2, 2, 2, 8), (2, 2, 1, 8), "must agree"),
    ((2, 2, 8), (2, 2, 8), "must agree"),
])
def test_what_does_not_belong_to_the_batch_is_refused(keys, values, message):
    layer = RingLayer(4)
    feed(layer, *states(), [3])
    before = layer.keys.clone()
    with pytest.raises(ValueError, match=message):
        layer.update(torch.zeros(keys), torch.zeros(values))
    assert torch.equal(layer.keys, before) and layer.get_seq_length() == 3


def test_another_dtype_is_refused():
    layer = RingLayer(4)
    feed(layer, *states(), [3])
    with pytest.raises(ValueError, match="of torch.bfloat16"):
        feed(layer, *states(dtype=torch.bfloat16), [1])


@over(("change", "message"), [
    ({"sigma": 0.0}, "sigma must be a number > 0"), ({"sigma": -torch.ones(4)}, "sigma must be a number > 0"),
    ({"sigma": torch.ones(3)}, r"sigma must be a number or have shape \(4,\)"), ({"top_k": 0}, "top_k must be an integer ≥ 1, got 0"),
    ({"top_k": -1}, "top_k must be an integer"), ({"query": torch.zeros(2, 3, 1, 16)}, "must divide the 3 heads of query"),
    ({"query": torch.zeros(1, 4, 1, 16)}, "must agree"), ({"query": torch.zeros(2, 4, 1, 32)}, "must agree"),
    ({"query": torch.zeros(2, 4, 1, 16).long()}, "query must be a floating tensor"), ({"query": [1]}, "query must be a tensor, got list"),
    ({"key_states": torch.zeros(2, 2, 3, 16), "value_states": torch.zeros(2, 2, 3, 16)}, "must be of the same new tokens, got 1 and 3"),
    ({"key_states": [1]}, "must be a tensor, got list"), ({"value_states": torch.zeros(2, 2, 1, 16).int()}, "must be a floating tensor"),
])
@over("seen", [0, 3])
def test_arguments_of_attend_are_those_of_krause_attention(change, message, seen):
    layer, call = RingLayer(4), {"query": torch.zeros(2, 4, 1, 16), "top_k": 2, "sigma": 1.5}
    call |= dict(zip(("key_states", "value_states"), states(dim=16, length=1), strict=True))
    with torch.no_grad():
        for _ in range(seen):
            layer.attend(**call)
        with pytest.raises((ValueError, TypeError), match=message):
            layer.attend(**call | change)
    assert layer.get_seq_length() == seen and layer.is_initialized == (seen > 0)


def test_what_is_no_floating_tensor_or_position_is_refused():
    with pytest.raises(TypeError, match="key_states must be a tensor, got list"):
        RingLayer(4).update([1], [1])
    with pytest.raises(ValueError, match="value_states must be a floating tensor"):
        RingLayer(4).update(*(x.to(dtype) for x, dtype in zip(states(), (torch.float32, torch.int64), strict=True)))
    for arguments, name in (((-1, 3), "length"), ((3, 0), "window"), ((2.0, 3), "length")):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            ring_positions(*arguments)


@pytest.mark.parametrize("window", [0, None, 2.0, True])
def test_a_window_is_a_whole_number(window):
    with pytest.raises(ValueError, match="window must be an integer ≥ 1"):
        RingLayer(window)
    with pytest.raises(ValueError, match="config.krause_window must be an integer ≥ 1"):
        RingCache(LlamaConfig(krause_window=window))


def test_a_layer_too_many_is_refused():
    cache = RingCache(LlamaConfig(num_hidden_layers=2, krause_window=4))
    with pytest.raises(ValueError, match="it has 2 layers, got layer 2"):
        cache.update(*states(), 2)
