"""Bits are what the definition says, by whatever batches and processes they are counted; tables of counts equal a loop over the tokens."""

import math
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from accelerate import PartialState
from cases import over
from hypothesis import given, settings
from test_training import by_two

from krause_repro.image_transformer import ATTENTIONS, ImageTransformer, ImageTransformerConfig, image_tokens
from krause_repro.likelihood import (
    DEFAULT_DISCOUNTS,
    ContextModel,
    KneserNey,
    bits_per_dimension,
    context_index,
    count_levels,
    estimate_discounts,
    fit_context_model,
    mean_bits,
    token_bits,
)


def small(attention="krause", start=True):
    torch.manual_seed(2)
    config = ImageTransformerConfig(
        vocab_size=7, image_shape=(3, 4, 1), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        attention_window=5, attention_top_k=3, start_token=start, attention=attention)
    model = ImageTransformer(config).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def pictures(count=11):
    return torch.randint(7, (count, 1, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bits_are_the_definition(attention, start):
    model, images = small(attention, start), pictures()
    tokens = image_tokens(images, model.config)
    with torch.no_grad():
        probabilities = model(tokens).logits.double().softmax(-1)
    bits = [[-math.log2(probabilities[n, t, tokens[n, t + 1]]) for t in range(tokens.shape[1] - 1)] for n in range(len(images))]
    if not start:
        bits = [[math.log2(7), *row] for row in bits]
    each = torch.tensor(bits, dtype=torch.float64)
    assert each.shape == (11, 12)
    torch.testing.assert_close(token_bits(model, images), each, rtol=0, atol=1e-5)
    for batch in (1, 4, 11, 100):
        found = bits_per_dimension(model, images, batch)
        assert found["bits_per_dim"] == pytest.approx(each[:, 1:].mean().item(), abs=1e-5)
        assert found["bits_per_dim_all"] == pytest.approx(each.mean().item(), abs=1e-5) and found["images"] == 11


def test_the_loss_that_is_trained_is_the_bits_that_are_told():
    for start, name in ((True, "bits_per_dim_all"), (False, "bits_per_dim")):
        model, images = small(start=start), pictures()
        tokens = image_tokens(images, model.config)
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
        assert bits_per_dimension(model, images)[name] == pytest.approx(loss / math.log(2), abs=1e-5)


def test_two_processes_count_each_image_once():
    for count in (11, 1):  # of one image, a process has none
        alone = bits_per_dimension(small(), pictures(count), 2)
        found = by_two(lambda count=count: {**bits_per_dimension(small(), pictures(count), 2), "processes": PartialState().num_processes})
        for each in found:
            assert each.pop("processes") == 2 and each["images"] == count
            assert each == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(("images", "options", "message"), [
    (pictures(0), {}, "N ≥ 1"), (pictures().float(), {}, "integers"), (pictures() + 7, {}, "levels 0…6"),
    (pictures(), {"batch": 0}, "batch"),
])
def test_what_cannot_be_counted_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dimension(small(), images, **options)
    with pytest.raises(ValueError, match="model must be an ImageTransformer, got Linear"):
        bits_per_dimension(torch.nn.Linear(1, 1), pictures())


# Tables of counts


def by_hand(train, offsets, levels, pseudo_counts, tokens):
    "The same probabilities, token by token, from dictionaries."
    def context(row, place, length):
        return tuple(row[place - offset] if place >= offset else levels for offset in offsets[:length])

    seen = [Counter() for _ in range(len(offsets) + 1)]
    for row in train.tolist():
        for place, level in enumerate(row):
            for length, counter in enumerate(seen):
                counter[context(row, place, length), level] += 1
    totals = [Counter() for _ in seen]
    for counter, total in zip(seen, totals, strict=True):
        for (key, _), count in counter.items():
            total[key] += count

    def probability(row, place):
        found = 1 / levels
        for length, (counter, total, pseudo_count) in enumerate(zip(seen, totals, pseudo_counts, strict=True)):
            key = context(row, place, length)
            found = (counter[key, row[place]] + pseudo_count * found) / (total[key] + pseudo_count)
        return found

    return torch.tensor([[probability(row, place) for place in range(len(row))] for row in tokens.tolist()], dtype=torch.float64)


OFFSETS = st.sampled_from([(), (1,), (1, 2), (3, 1), (2,), (9,)])


@settings(max_examples=40)
@given(OFFSETS, st.integers(2, 4), st.integers(2, 7), st.integers(0, 99))
def test_tables_equal_a_loop(offsets, levels, length, seed):
    generator = torch.Generator().manual_seed(seed)
    train, tokens = (torch.randint(levels, (count, length), generator=generator) for count in (6, 4))
    pseudo_counts = tuple((0.5, 2.0, 7.0)[:len(offsets) + 1])
    model = ContextModel(offsets, levels, tuple(count_levels(train, offsets[:n], levels) for n in range(len(offsets) + 1)), pseudo_counts)
    want = by_hand(train, offsets, levels, pseudo_counts, tokens)
    torch.testing.assert_close(model.probabilities(tokens), want, rtol=1e-12, atol=0)
    assert model.bits(tokens)["bits_per_dim_all"] == pytest.approx(-want.log2().mean().item())
    assert model.bits(tokens)["bits_per_dim"] == pytest.approx(-want[:, 1:].log2().mean().item())


@settings(max_examples=40)
@given(OFFSETS, st.integers(2, 4), st.integers(0, 99))
def test_probabilities_of_all_levels_sum_to_one(offsets, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    train, start = torch.randint(levels, (6, 6), generator=generator), torch.randint(levels, (1, 5), generator=generator)
    model = fit_context_model(train[:4], train[4:], offsets, levels)
    options = torch.cat([start.expand(levels, -1), torch.arange(levels)[:, None]], 1)
    assert model.probabilities(options)[:, -1].sum().item() == pytest.approx(1)


def test_strengths_are_the_best_for_held_out_images_one_length_at_a_time():
    generator = torch.Generator().manual_seed(0)
    train, held_out = torch.randint(4, (60, 9), generator=generator), torch.randint(4, (40, 9), generator=generator)
    choices = (0.1, 10.0, 1000.0)
    model = fit_context_model(train, held_out, (1,), 4, choices)
    for place in (0, 1):
        counts = model.counts[:place + 1]
        bits = {s: ContextModel((1,), 4, counts, (*model.pseudo_counts[:place], s)).bits(held_out)["bits_per_dim_all"] for s in choices}
        assert model.pseudo_counts[place] == min(bits, key=bits.get)
    assert model.pseudo_counts[1] == 1000.0  # there is nothing to learn from a context of noise


def test_bytes_are_tokens_as_well():
    "255 is a level of 256, although 256 is no byte."
    tokens = torch.randint(256, (5, 6), dtype=torch.uint8)
    model = fit_context_model(tokens, tokens, (1,), 256)
    assert model.bits(tokens) == model.bits(tokens.long())


def test_a_place_before_the_image_is_a_context_of_its_own():
    assert context_index(torch.tensor([[1, 0, 2]]), (1, 2), 3).tolist() == [[3 * 4 + 3, 1 * 4 + 3, 0 * 4 + 1]]


@over(("arguments", "message"), [
    ({"levels": 1}, "levels"), ({"offsets": (0,)}, "offsets"), ({"offsets": (1, 1)}, "different and few"),
    ({"offsets": (1, 2, 3), "levels": 256}, "different and few"), ({"train": torch.full((2, 3), 4)}, "levels 0…3, got 4…4"),
    ({"held_out": torch.zeros(2, 3)}, "tokens must be integers"), ({"train": torch.zeros(0, 3, dtype=torch.long)}, "N ≥ 1"),
    ({"held_out": torch.zeros(2, 1, dtype=torch.long)}, "T ≥ 2"), ({"pseudo_counts": (0.0,)}, "pseudo_counts"),
    ({"pseudo_counts": ()}, "pseudo_counts"),
])
def test_tables_that_cannot_be_are_refused(arguments, message):
    usual = {"train": torch.zeros(2, 3, dtype=torch.long), "held_out": torch.zeros(2, 3, dtype=torch.long), "offsets": (1,), "levels": 4}
    with pytest.raises(ValueError, match=message):
        fit_context_model(**{**usual, **arguments})


def test_what_has_no_likelihood_is_named():
    model, images = small(), pictures(2)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    table = fit_context_model(tokens, tokens, (1,), 4)
    for call, message in (
        (lambda: bits_per_dimension(model, images[:0]), "images must be integers of shape .*, N ≥ 1"),
        (lambda: mean_bits(torch.zeros(3), 0), "images must be an integer ≥ 1"),
        (lambda: mean_bits(torch.tensor([1.0, math.nan]), 1), "sums must be finite bits"),
        (lambda: mean_bits(torch.zeros(1), 1), "at least two positions"),
        (lambda: table.bits(tokens[:0]), "N ≥ 1"), (lambda: table.probabilities(tokens + 4), "tokens must hold levels 0…3"),
        (lambda: table.probabilities(tokens.float()), "tokens must be integers"),
        (lambda: count_levels(tokens - 1, (1,), 4), "levels 0…3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.head.weight.data[3, 2] = math.nan
    with pytest.raises(ValueError, match="model gives NaN for these images: it may have diverged"):
        bits_per_dimension(model, images)


# Texts


def zipf(vocab, length, seed):
    "Tokens of unequal frequency, often repeated, so that all discounts can be estimated."
    generator = np.random.default_rng(seed)
    tokens = generator.integers(vocab, size=length) * generator.integers(vocab, size=length) // vocab
    return np.where(generator.random(length) < 0.5, np.roll(tokens, 3), tokens)


def kneser_ney_by_hand(train, vocab, order):
    "The definition with dictionaries: p(token, the tokens before it)."
    grams = [Counter(tuple(train[i:i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)]
    counts = [Counter(gram[1:] for gram in longer) for longer in grams[1:]] + [grams[-1]]
    discounts = []
    for table in counts:
        m = Counter(table.values())
        if m[1] and m[2] and m[3]:
            y = m[1] / (m[1] + 2 * m[2])
            each = [0, 1 - 2 * y * m[2] / m[1], 2 - 3 * y * m[3] / m[2], 3 - 4 * y * m[4] / m[3]]
        discounts.append(each if m[1] and m[2] and m[3] and min(each[1:]) > 0 else DEFAULT_DISCOUNTS)

    def probability(token, before):
        found = 1 / vocab
        for n in range(min(order, len(before) + 1)):
            context = tuple(before[len(before) - n:])
            followed = [counts[n][(*context, other)] for other in range(vocab)]
            if sum(followed):
                taken = [discounts[n][min(count, 3)] for count in followed]
                found = (followed[token] - taken[token] + sum(taken) * found) / sum(followed)
        return found

    return probability, discounts


@pytest.mark.parametrize(("vocab", "length", "order"), [(9, 800, 5), (30, 600, 3), (5, 40, 4), (4, 4, 4), (6, 300, 1), (1, 9, 2)])
def test_kneser_ney_equals_dictionaries(vocab, length, order):
    train, test = zipf(vocab, length, 0), np.random.default_rng(1).integers(vocab, size=120)
    probability, discounts = kneser_ney_by_hand(train.tolist(), vocab, order)
    test = np.concatenate([test, train[-20:]])  # unseen contexts and seen ones, and the end of the text, which nothing follows
    want = [-math.log2(probability(token, test.tolist()[:place])) for place, token in enumerate(test.tolist())]
    found = KneserNey(train.astype(np.uint16), vocab, order).bits(test.astype(np.uint16))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    if length > 500:
        assert sum(tuple(each) != DEFAULT_DISCOUNTS for each in discounts) >= 2  # both cases are compared


def test_kneser_ney_is_a_distribution_after_seen_and_unseen_contexts():
    train = zipf(8, 500, 3) % 7  # token 7 was never seen
    model = KneserNey(train, 8)
    for before in ([], [7], train[:4], train[-4:], train[200:204], [7, 7, 7, 7], [3, 7, *train[50:52]]):
        each = [2 ** -model.bits(np.array([*before, token], dtype=int))[-1] for token in range(8)]
        assert sum(each) == pytest.approx(1, abs=1e-12) and min(each) > 0


def test_order_one_is_the_discounted_unigram():
    "A token of count N has (N − D(N)) / 20 and its part of the rest."
    train = np.array([0] * 10 + [1] * 3 + [2] * 3 + [3] * 2 + [4] + [5])
    y = 2 / (2 + 2 * 1)
    d1, d2, d3 = 1 - 2 * y * 1 / 2, 2 - 3 * y * 2 / 1, 3 - 0
    assert d2 < 0 and tuple(estimate_discounts(np.bincount(train))) == DEFAULT_DISCOUNTS
    train = np.append(train, [6, 6, 7, 7])  # three tokens twice
    y = 2 / (2 + 2 * 3)
    d1, d2, d3 = 1 - 2 * y * 3 / 2, 2 - 3 * y * 2 / 3, 3 - 0
    np.testing.assert_allclose(estimate_discounts(np.bincount(train)), [0, d1, d2, d3])
    rest = (2 * d1 + 3 * d2 + 3 * d3) / 24 / 9
    want = [(10 - d3) / 24 + rest, (2 - d2) / 24 + rest, (1 - d1) / 24 + rest, rest]
    np.testing.assert_allclose(2 ** -KneserNey(train, 9, 1).bits(np.array([0, 3, 4, 8])), want)


def test_a_text_of_noise_costs_the_bits_of_its_tokens_and_repetition_costs_less():
    noise = np.random.default_rng(0).integers(4, size=60_000)
    assert KneserNey(noise[:50_000], 4).bits(noise[50_000:]).mean() == pytest.approx(2, abs=0.03)
    model = KneserNey(np.tile(np.arange(40), 50), 64)
    assert model.bits(np.tile(np.arange(40), 2))[4:].mean() < 0.1
    unseen = model.bits(np.full(30, 63))  # a token that never was, after contexts that never were
    assert np.isfinite(unseen).all() and unseen.min() > 6


def test_a_token_costs_the_same_whatever_follows_and_whatever_is_five_tokens_before():
    train, test = zipf(9, 800, 0), zipf(9, 60, 5)
    model = KneserNey(train, 9)
    bits = model.bits(test)
    np.testing.assert_array_equal(model.bits(test[:30]), bits[:30])
    np.testing.assert_array_equal(model.bits(test[20:])[4:], bits[24:])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"order": 0}, "order must be an integer ≥ 1"), ({"order": 1.5}, "order"), ({"vocab_size": 0}, "vocab_size must be an integer ≥ 1"),
    ({"vocab_size": 6}, "tokens must be in 0…5, the vocabulary, got 0…6"), ({"tokens": np.arange(7) - 1}, "got -1…5"),
    ({"tokens": np.arange(4)}, "N ≥ 5"), ({"tokens": np.ones(9)}, "integers"), ({"tokens": np.ones((2, 9), int)}, r"shape \(N,\)"),
])
def test_texts_that_cannot_be_counted_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KneserNey(**{"tokens": np.arange(7), "vocab_size": 7, **arguments})
    with pytest.raises(ValueError, match="tokens must be in 0…6"):
        KneserNey(np.arange(7), 7).bits(np.array([7]))
    with pytest.raises(ValueError, match="N ≥ 1"):
        KneserNey(np.arange(7), 7).bits(np.zeros(0, int))
