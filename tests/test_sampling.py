"""Images and tokens are the same thing; an image follows from its seed and number; what is given stays; errors have a name."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close
from transformers import LogitsProcessorList, TopPLogitsWarper

from krause_repro import sampling
from krause_repro.image_transformer import ATTENTIONS, ImageTransformer, ImageTransformerConfig, image_tokens, start_tokens, token_images
from krause_repro.sampling import (
    SeededDraw,
    complete_images,
    continue_tokens,
    first_prompts,
    generate_batches,
    sample_images,
    seeded_uniforms,
)


def small(attention="krause", **settings):
    torch.manual_seed(1)
    sizes = {"vocab_size": 9, "image_shape": (4, 3, 1), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "attention_window": 5, "attention_top_k": 3, "start_token": True}
    model = ImageTransformer(ImageTransformerConfig(**{**sizes, "attention": attention, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pictures(config, count=3, seed=0):
    height, width, channels = config.image_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (count, channels, height, width), generator=generator, dtype=torch.uint8)


# Images and tokens


@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_tokens_and_images_are_each_others_inverse(shape, count, start, seed):
    config = ImageTransformerConfig(image_shape=shape, start_token=start)
    images = pictures(config, count, seed)
    tokens = image_tokens(images, config)
    assert tokens.shape == (count, config.positions) and tokens.dtype == torch.int64
    assert torch.equal(token_images(tokens, config), images)
    for row in range(shape[0]):  # raster order, the channels of a pixel side by side
        for column in range(shape[1]):
            for channel in range(shape[2]):
                place = start + (row * shape[1] + column) * shape[2] + channel
                assert torch.equal(tokens[:, place], images[:, channel, row, column].long())
    assert not start or (tokens[:, 0] == config.vocab_size).all()


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(0, 1, 4, 3, dtype=torch.uint8), r"integers of shape \(N, 1, 4, 3\), N ≥ 1"),
    (torch.zeros(2, 4, 3, dtype=torch.uint8), r"got torch.uint8 \(2, 4, 3\)"),
    (torch.zeros(2, 1, 3, 4, dtype=torch.uint8), "image_shape"),
    (torch.zeros(2, 1, 4, 3), "got torch.float32"),
    (torch.full((2, 1, 4, 3), 9), "levels 0…8, got 9…9"),
    (torch.full((2, 1, 4, 3), -1), "levels 0…8, got -1…-1"),
])
def test_images_that_cannot_be_are_refused(images, message):
    config = small().config
    with pytest.raises(ValueError, match=message):
        image_tokens(images, config)
    with pytest.raises(ValueError, match=message):
        complete_images(small(), images, progress=False)


def test_half_an_image_is_no_image():
    config = small().config
    with pytest.raises(ValueError, match="sequences of 13, got"):
        token_images(torch.zeros(2, 12, dtype=torch.long), config)


# The draw


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_level_at_which_the_cumulated_probabilities_pass_the_number(logits, number):
    scores = torch.tensor([logits])
    drawn = SeededDraw(torch.tensor([[number]], dtype=torch.float64), 0)(torch.zeros(1, 0), scores)
    bounds = np.cumsum(np.exp(np.array(scores[0].double())) / np.exp(np.array(scores[0].double())).sum())
    level = int(drawn.argmax())
    assert (level == 0 or bounds[level - 1] <= number + 1e-12) and bounds[level] > number - 1e-12
    assert drawn[0, level] == 0 and torch.isneginf(drawn[0]).sum() == len(logits) - 1


def test_levels_without_probability_are_never_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    numbers = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert SeededDraw(numbers, 0)(torch.zeros(3, 0), scores).argmax(-1).tolist() == [1, 3, 3]


def test_numbers_belong_to_seed_and_image():
    together = seeded_uniforms([3, 4, 5], 7, seed=2)
    assert together.dtype == torch.float64 and together.shape == (3, 7) and ((together >= 0) & (together < 1)).all()
    assert all(torch.equal(seeded_uniforms([n], 7, seed=2)[0], together[i]) for i, n in enumerate((3, 4, 5)))
    assert torch.equal(seeded_uniforms([3], 4, seed=2)[0], together[0, :4])
    others = torch.stack([together[0], together[1], seeded_uniforms([3], 7, 1)[0], seeded_uniforms([2], 7, 3)[0]])
    assert torch.pdist(others).min() > 0.1


# Writing


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("given", [1, 6])
def test_what_is_written_through_the_cache_is_what_the_whole_pass_would_draw(attention, given):
    model = small(attention)
    prompts = torch.cat([start_tokens(4, model.config), torch.randint(9, (4, given - 1))], 1)
    left = model.config.positions - given
    uniforms, tokens = seeded_uniforms(range(4), left, 0), prompts
    for place in range(left):
        with torch.no_grad():
            bounds = model(tokens).logits[:, -1].double().softmax(-1).cumsum(-1)
        level = (bounds <= uniforms[:, place, None]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, level], 1)
    assert torch.equal(continue_tokens(model, prompts, uniforms), tokens)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_image_does_not_depend_on_its_batch(attention):
    model = small(attention)
    images = sample_images(model, 7, seed=5, batch=7, progress=False)
    for batch in (1, 2, 3):
        assert torch.equal(sample_images(model, 7, seed=5, batch=batch, progress=False), images)
    assert torch.equal(sample_images(model, 3, seed=5, first=4, progress=False), images[4:])
    assert not torch.equal(sample_images(model, 7, seed=6, progress=False), images)
    assert len(torch.unique(images.flatten(1), dim=0)) == 7 and images.dtype == torch.uint8


def test_a_model_whose_config_forbids_the_cache_writes_the_same():
    "🤗 Trainer leaves use_cache = False in what it saves."
    model = small()
    images = sample_images(model, 3, progress=False)
    model.config.use_cache = model.generation_config.use_cache = False
    assert torch.equal(sample_images(model, 3, progress=False), images)


def test_low_temperature_is_greedy_and_top_p_leaves_the_tail_out():
    model = small()
    greedy = model.generate(start_tokens(1, model.config), max_new_tokens=12, do_sample=False)
    cold = sample_images(model, 4, temperature=1e-4, progress=False)
    assert torch.equal(cold, token_images(greedy, model.config).expand(4, -1, -1, -1))
    nucleus = sample_images(model, 40, top_p=0.3, progress=False)
    tokens = image_tokens(nucleus, model.config)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    kept = LogitsProcessorList([TopPLogitsWarper(0.3)])(None, logits.flatten(0, 1))
    assert torch.isfinite(kept.gather(1, tokens[:, 1:].reshape(-1, 1))).all()
    assert not torch.equal(nucleus, sample_images(model, 40, progress=False))


def test_first_levels_are_drawn_by_their_frequencies():
    config = small(start_token=False).config
    frequencies = torch.tensor([0, 3.0, 0, 0, 0, 0, 0, 0, 1.0])
    drawn = first_prompts(config, 0, frequencies)(list(range(2000)))
    assert drawn.shape == (2000, 1) and set(drawn.flatten().tolist()) == {1, 8}
    assert (drawn == 1).double().mean() == pytest.approx(0.75, abs=0.04)
    images = sample_images(small(start_token=False), 5, first_levels=frequencies, progress=False)
    assert set(images[:, 0, 0, 0].tolist()) <= {1, 8} and images.shape == (5, 1, 4, 3)
    for wrong in (None, torch.ones(8)):
        with pytest.raises(ValueError, match=r"first_levels must be \(9,\) frequencies: the model has no start token"):
            sample_images(small(start_token=False), 5, first_levels=wrong, progress=False)
    with pytest.raises(ValueError, match="first_levels must be None: the model has a start token"):
        sample_images(small(start_token=True), 5, first_levels=frequencies, progress=False)


def test_completions_keep_what_is_given():
    for start in (True, False):
        model = small(image_shape=(4, 3, 3), start_token=start)
        images = pictures(model.config)
        for rows, kept in ((None, 2), (1, 1), (3, 3)):
            completed = complete_images(model, images, 4, rows=rows, batch=5, progress=False)
            assert completed.shape == (3, 4, 3, 4, 3) and completed.dtype == torch.uint8
            assert torch.equal(completed[..., :kept, :], images[:, None, :, :kept].expand(-1, 4, -1, -1, -1))
            assert not torch.equal(completed[:, 0], completed[:, 1])
        assert torch.equal(complete_images(model, images, 4, batch=12, progress=False), complete_images(model, images, 4, progress=False))


def test_bars_count_images(capsys):
    assert len(list(generate_batches(small(), first_prompts(small().config, 0), range(5), batch=2))) == 3
    drawn = capsys.readouterr().err
    assert "5.0 of 5 images" in drawn and "0.0 of 5 images" in drawn


def test_the_bar_moves_with_every_token(monkeypatch):
    moves = []
    monkeypatch.setattr(sampling.tqdm, "update", lambda self, n: moves.append(n))
    list(generate_batches(small(), first_prompts(small().config, 0), range(3), batch=2, progress=False))
    assert moves == pytest.approx([2 / 12] * 12 + [1 / 12] * 12)


@pytest.mark.parametrize(("options", "message"), [
    ({"count": 0}, "count must be an integer ≥ 1"), ({"seed": -1}, "seed must be"), ({"temperature": 0}, "temperature must be"),
    ({"temperature": -1.0}, "temperature must be"), ({"temperature": float("nan")}, "temperature must be"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"), ({"top_p": 1.1}, "top_p must be"), ({"batch": 0}, "batch must be"),
    ({"first": -1}, "first must be"), ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295, got 4294967296"),
    ({"seed": 18446744073709551615}, "seed must be"), ({"seed": 10**20 - 1}, "seed must be"), ({"seed": True}, "seed must be"),
    ({"first": 2**32 - 1}, "number of the last image must be an integer from 0 to 4294967295, got 4294967296"),
])
def test_settings_that_cannot_be_are_refused_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(sampling, "continue_tokens", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        sample_images(small(), **{"count": 2, "progress": False, **options})


@pytest.mark.parametrize(("rows", "samples", "message"), [
    (0, 1, "rows must be"), (4, 1, "rows must be between 1 and 3"), (2, 0, "samples must"),
])
def test_completions_that_cannot_be_are_refused(rows, samples, message):
    with pytest.raises(ValueError, match=message):
        complete_images(small(), pictures(small().config), samples, rows=rows, progress=False)


def test_a_completion_follows_from_image_and_sample_alone():
    model = small()
    images = pictures(model.config, 4)
    whole = complete_images(model, images, 3, progress=False)
    assert torch.equal(complete_images(model, images, 5, progress=False)[:, :3], whole)
    assert torch.equal(complete_images(model, images[2:], 3, first=2, progress=False), whole[2:])


def test_no_two_images_share_a_stream():
    "What seeds a generator are four words; those of new images, first tokens and completions at the ends of the range all differ."
    ends = (0, 1, 2, 2**32 - 1)
    streams = [(seed, number, *rest) for seed in ends for number in ends for rest in ((), (1,), *((sample, 2) for sample in ends))]
    first = torch.cat([seeded_uniforms([numbers], 2, seed) for seed, *numbers in streams])
    assert len(torch.unique(first, dim=0)) == len(streams)
    with pytest.raises(ValueError, match="seed and number of an image must be an integer from 0 to 4294967295, got 4294967297"):
        seeded_uniforms([3], 1, 2**32 + 1)
    with pytest.raises(ValueError, match="got 4294967296"):
        seeded_uniforms([2**32], 1, 1)


def test_the_mode_of_the_model_is_left_as_it_was():
    for training in (True, False):
        model = small().train(training)
        sample_images(model, 1, progress=False)
        complete_images(model, pictures(model.config, 1), 1, progress=False)
        assert model.training is training


def test_a_model_that_has_diverged_writes_no_image():
    model = small()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must be finite"):
        sample_images(model, 1, progress=False)
    with pytest.raises(ValueError, match="first_levels must be finite"):
        sample_images(small(start_token=False), 1, first_levels=torch.zeros(9), progress=False)


@pytest.mark.parametrize(("prompts", "columns", "message"), [
    (torch.zeros(2, 3, dtype=torch.long), 10, "after the start token"), (torch.tensor([[9, 9]]), 11, "levels below 9"),
    (torch.tensor([[9, 1]]), 10, r"uniforms must be one number per sampled token, \(1, 11\)"),
])
def test_prompts_that_are_no_beginnings_are_refused(prompts, columns, message):
    with pytest.raises(ValueError, match=message):
        continue_tokens(small(), prompts, torch.zeros(len(prompts), columns))


def test_other_models_and_whole_prompts_are_refused():
    with pytest.raises(ValueError, match="model must be an ImageTransformer, got Linear"):
        sample_images(torch.nn.Linear(2, 2), 1)
    model = small()
    for length in (0, 13, 14):
        with pytest.raises(ValueError, match="fewer than an image"):
            continue_tokens(model, torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1))


def test_the_seeds_of_numpy_are_what_is_used():
    assert_close(seeded_uniforms([7], 3, 2)[0].numpy(), np.random.default_rng([2, 7]).random(3), rtol=0, atol=0)
