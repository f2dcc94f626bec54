"""The image transformer: the authors' numbers, caches that equal the whole pass, no look into the future, and errors with a name."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import over
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from krause_repro.attention import CausalWindow
from krause_repro.author_checkpoints import load_author_checkpoint, raster_shape
from krause_repro.image_transformer import (
    ATTENTIONS,
    LINEAR_EPS,
    ImageTransformer,
    ImageTransformerConfig,
    PixelAttention,
    PreallocatedLayer,
    image_cache,
    linear_attention,
)
from krause_repro.native_decode import DecodeLinear

FOLDER = Path(__file__).parent / "parity"
CIFAR = {"image_shape": (32, 32, 3), "hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 2048}


def small(attention, **settings):
    torch.manual_seed(1)
    sizes = {"vocab_size": 17, "image_shape": (5, 4, 1), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "attention_window": 6, "attention_top_k": 4}
    model = ImageTransformer(ImageTransformerConfig(**{**sizes, "attention": attention, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch=3, length=20, levels=17, seed=0):
    return torch.randint(levels, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_parts(model, images, cuts):
    "Logits of the parts of a sequence, one after the other through a cache."
    cache = image_cache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in images.tensor_split(cuts, 1) if part.numel()]
    assert cache.get_seq_length() == images.shape[1]
    return torch.cat(parts, 1)


# The authors' numbers


@pytest.mark.parametrize("kind", ["karm", "arm", "larm"])
def test_logits_are_the_authors(kind):
    path = FOLDER / f"{kind}.safetensors"
    with safe_open(path, "pt") as file:
        tensors, config = load_file(path), json.loads(file.metadata()["config"])
    model = load_author_checkpoint(kind, path, **config)
    with torch.no_grad():
        assert_close(model(tensors["input"]).logits, tensors["logits"], rtol=0, atol=1e-5)
    assert_close(in_parts(model, tensors["input"], list(range(1, 63))), tensors["step_logits"], rtol=0, atol=1e-5)
    assert_close(in_parts(model, tensors["input"], [20, 21, 50]), tensors["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "other"), [("karm", "arm"), ("larm", "karm")])
def test_another_kind_is_named(kind, other):
    with safe_open(FOLDER / f"{other}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    with pytest.raises(ValueError, match=rf"attn_type must be '(krause|linear)' for this kind, got '{config['attn_type']}'"):
        load_author_checkpoint(kind, FOLDER / f"{other}.safetensors", **config)
    config.pop("attn_type")
    with pytest.raises(ValueError, match=r"its names are those of (an ARM or LARM|a KARM)"):
        load_author_checkpoint(kind, FOLDER / f"{other}.safetensors", **config)


@pytest.mark.parametrize(("length", "shape"), [(784, (28, 28, 1)), (3072, (32, 32, 3)), (64, (8, 8, 1)), (50, (1, 50, 1))])
def test_sequences_are_square_images_where_they_can_be(length, shape):
    assert raster_shape(length) == shape


@pytest.mark.parametrize(("attention", "mnist", "cifar"), [
    ("krause", 9_809_664 + 96, 52_274_432 + 128), ("softmax", 9_809_664, 52_274_432), ("linear", 9_809_664, 52_274_432),
])
def test_parameters_are_as_many_as_the_papers(attention, mnist, cifar):
    with torch.device("meta"):
        models = [ImageTransformer(ImageTransformerConfig(attention=attention, **sizes)) for sizes in ({}, CIFAR)]
    assert [model.num_parameters() for model in models] == [mnist, cifar]


# Attention


def spelled_out(query, key, value):
    "Linear attention by a loop over tokens, in float64."
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    query, key, value = (x.double() for x in (query, key, value))
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (query, key))
    for t in range(query.shape[2]):
        weights = (phi_q[:, :, t:t + 1] * phi_k[:, :, :t + 1]).sum(-1)
        out[:, :, t] = (weights.unsqueeze(-1) * value[:, :, :t + 1]).sum(2) / (weights.sum(-1, keepdim=True) + LINEAR_EPS)
    return out


@given(length=st.integers(1, 40), chunk=st.integers(1, 48), cut=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_linear_attention_is_the_loop_whatever_the_chunk_and_the_cut(length, chunk, cut, seed):
    query, key, value = torch.randn(3, 2, 2, length, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, wanted, cut = value[..., :3], spelled_out(query, key, value[..., :3]), min(cut, length)
    assert_close(linear_attention(query, key, value, chunk=chunk)[0], wanted, rtol=1e-10, atol=1e-10)
    parts, sums = [], None
    for part in (slice(0, cut), slice(cut, length)):
        if part.stop > part.start:
            found, sums = linear_attention(query[:, :, part], key[:, :, part], value[:, :, part], sums, chunk)
            parts.append(found)
    assert_close(torch.cat(parts, 2), wanted, rtol=1e-10, atol=1e-10)


def test_linear_attention_has_gradients():
    inputs = [torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, chunk=3)[0], inputs)
    with pytest.raises(ValueError, match="chunk"):
        linear_attention(*inputs, chunk=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_token_sees_a_later_one(attention):
    model, images = small(attention), tokens()
    changed = images.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 17
    with torch.no_grad():
        before, after = model(images).logits, model(changed).logits
    assert torch.equal(before[:, :13], after[:, :13]) and not torch.allclose(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize(("width", "bad"), [(16, torch.nan), (64, torch.inf)])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_token_that_is_not_finite_reaches_no_earlier_one(attention, width, bad):
    "Whole, in parts, token by token and with weights; the other images of the batch are as they were. Width 64: the C++ step."
    model, images, place = small(attention, hidden_size=width, image_shape=(10, 10, 1), attention_window=40), tokens(2, 100, 16), 70
    images[0, place] = 16
    poisoned = ImageTransformer(model.config).eval()
    poisoned.load_state_dict(model.state_dict())
    with torch.no_grad():
        poisoned.token_embedding.weight[16] = bad
        for cuts in ([], [30], [65, 66, 90], list(range(60, 100))):
            clean, found = (in_parts(m, images, cuts) for m in (model, poisoned))
            assert torch.equal(found[0, :place], clean[0, :place]) and torch.equal(found[1], clean[1])
            assert not found[0, place:].isfinite().any()
        states = poisoned(images, output_hidden_states=True).hidden_states
        assert all(state[0, :place].isfinite().all() and state[1].isfinite().all() for state in states)
        if attention != "linear":
            weighed = poisoned(images, output_attentions=True).logits
            assert_close(weighed[0, :place], clean[0, :place], rtol=1e-5, atol=1e-5)
            assert not weighed[0, place:].isfinite().any()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_last_bits_of_a_token_do_not_depend_on_later_ones(attention):
    "Not even where a sum over a later token is large."
    query, key, value = torch.randn(3, 1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    loud = value.clone()
    loud[:, :, 150] *= 1e6
    layer = PixelAttention(small(attention, hidden_size=32).config, 0)
    with torch.no_grad():
        plain, other = (layer.attend(query, key, v, None) for v in (value, loud))
    assert torch.equal(plain[:, :, :150], other[:, :, :150]) and not torch.allclose(plain[:, :, 150:], other[:, :, 150:])


@pytest.mark.parametrize("attention", ["krause", "softmax_window"])
def test_a_window_forgets_what_has_left_it_in_all_layers(attention):
    model, images = small(attention), tokens()
    changed = images.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 17
    with torch.no_grad():
        before, after = model(images).logits, model(changed).logits
    reach = 2 * (6 - 1)  # two layers with a window of 6
    assert torch.equal(before[:, reach + 1:], after[:, reach + 1:]) and not torch.equal(before[:, :reach + 1], after[:, :reach + 1])


def test_softmax_on_a_window_is_masked_softmax():
    windowed, whole, images = small("softmax_window", attention_window=None), small("softmax"), tokens()
    with torch.no_grad():
        assert_close(windowed(images).logits, whole(images).logits, rtol=1e-5, atol=1e-6)
    query, key, value = torch.randn(3, 2, 2, 20, 8, dtype=torch.float64)
    found = PixelAttention(small("softmax_window").config, 0).attend(query, key, value, None)
    assert_close(found, F.scaled_dot_product_attention(query, key, value, CausalWindow(6).mask(20)), rtol=0, atol=1e-12)


# Caches


@over("settings", [
    {}, {"attention_window": None}, {"attention_top_k": None}, {"attention_window": None, "attention_top_k": None}, {"start_token": True},
])
@over("attention", ATTENTIONS)
@over("cuts", [list(range(1, 20)), [7], [3, 4, 11], [10, 11, 12, 13]])
def test_parts_through_a_cache_equal_the_whole(attention, cuts, settings):
    model, images = small(attention, **settings), tokens()
    with torch.no_grad():
        assert_close(in_parts(model, images, cuts), model(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_operators_of_a_step_change_nothing(attention):
    "With heads and layers of whole vectors, which the C++ operators take."
    model, images = small(attention, hidden_size=64, intermediate_size=128, vocab_size=20), tokens()
    assert sum(isinstance(module, DecodeLinear) for module in model.modules()) == 2 * 6 + 1
    with torch.no_grad():
        assert_close(in_parts(model, images, list(range(1, 20))), model(images).logits, rtol=1e-5, atol=1e-5)
    assert_close(model(images[:, :1]).logits, in_parts(model, images[:, :1], []), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_is_the_greedy_continuation(attention):
    model, images = small(attention), tokens()
    wanted = images[:, :9]
    with torch.no_grad():
        while wanted.shape[1] < 20:
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 11, "do_sample": False}
    assert torch.equal(model.generate(images[:, :9], **options), wanted)
    assert torch.equal(model.generate(images[:, :9], use_cache=False, **options), wanted)
    beams = model.generate(images[:, :9], num_beams=3, **options)
    assert torch.equal(beams, model.generate(images[:, :9], num_beams=3, use_cache=False, **options))


@over("attention", ATTENTIONS)
def test_drafts_change_nothing_or_are_refused(attention):
    model, images, options = small(attention).double(), tokens(1, 8), {"max_new_tokens": 12, "do_sample": False}
    other = small("softmax", num_hidden_layers=1).double()
    ways = [(model, {"prompt_lookup_num_tokens": 2}), (model, {"assistant_model": other}), (other, {"assistant_model": model})]
    for target, way in ways:
        if attention == "linear":
            with pytest.raises(ValueError, match="assisted decoding .* takes tokens back, which this model's cache cannot"):
                target.generate(images, **way, **options)
        else:
            assert torch.equal(target.generate(images, **way, **options), target.generate(images, **options))
    with pytest.raises(ValueError, match="cache_implementation must be None: the model makes a cache of its own kind"):
        model.generate(images, cache_implementation="static")
    with pytest.raises(ValueError, match="continuous batching .* keeps keys in pages"):
        model.generate_batch([[1, 2]])


def test_sampling_draws_from_all_levels():
    model = small("softmax", vocab_size=200)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()  # all levels are equally likely
    asked = {"do_sample": True}
    for options in (asked, {"generation_config": GenerationConfig(**asked, max_new_tokens=15)}):
        torch.manual_seed(0)
        drawn = model.generate(tokens(200, 5), **({"max_new_tokens": 15} if options is asked else {}), **options)
        assert len(drawn[:, 5:].unique()) == 200
    with torch.no_grad():
        model.head.bias.copy_(0.01 * torch.arange(len(model.head.bias)))
    few = model.generate(tokens(1, 5).expand(200, -1), generation_config=GenerationConfig(**asked, top_k=3, max_new_tokens=1))
    assert len(few[:, 5:].unique()) == 3


@torch.no_grad()
def test_a_preallocated_layer_neither_grows_nor_takes_others():
    layer = PreallocatedLayer(4)
    new = torch.ones(2, 3, 3, 5)
    keys, _ = layer.update(new, 2 * new)
    place = layer.keys.data_ptr()
    assert keys.shape == (2, 3, 3, 5) and keys.data_ptr() == place
    keys, values = layer.update(3 * new[:, :, :1], 4 * new[:, :, :1])
    assert keys.data_ptr() == place and keys[:, :, -1].unique().tolist() == [3] and values[:, :, 0].unique().tolist() == [2]
    with pytest.raises(ValueError, match="this cache holds 4 tokens; 4 are there, and 1 more do not fit"):
        layer.update(new[:, :, :1], new[:, :, :1])
    with pytest.raises(ValueError, match="key_states must have .* as in the cache"):
        layer.update(new[:1, :, :1], new[:1, :, :1])


# The model


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_saved_model_is_the_same(attention, tmp_path):
    model, images = small(attention, start_token=True), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, ImageTransformer) and again.config.image_shape == [5, 4, 1] and again.config.bos_token_id == 17
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_loss_is_the_mean_over_all_but_the_first_token_and_trains_everything(attention):
    model, images = small(attention), tokens()
    found = model(images, labels=images)
    log_probabilities = found.logits.log_softmax(-1)
    wanted = -sum(log_probabilities[b, t, images[b, t + 1]] for b in range(3) for t in range(19)) / (3 * 19)
    assert_close(found.loss, wanted)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@over(("settings", "message"), [
    ({"attention": "sparse"}, "attention must be one of krause, softmax, linear, softmax_window"),
    ({"image_shape": (28, 28)}, "image_shape must be"),
    ({"image_shape": (28, 0, 1)}, "image_shape must be"), ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size = 256"),
    ({"attention_window": 0}, "attention_window must be"), ({"attention_top_k": 0}, "attention_top_k must be"),
    ({"sigma": 0.0}, "sigma must be"), ({"dropout": 1.5}, "dropout must be"), ({"start_token": 1}, "start_token must be True or False"),
    ({"use_cache": "no"}, "use_cache must be"), ({"initializer_range": float("nan")}, "initializer_range must be"),
    ({"vocab_size": -1}, "vocab_size must be"), ({"hidden_size": float("nan")}, "hidden_size must be"),
    ({"attention_window": 4, "attention_top_k": 9}, "attention_top_k must be at most attention_window = 4, or None, got 9"),
])
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTransformerConfig(**settings)


def test_a_smaller_window_alone_keeps_all_of_it():
    assert ImageTransformerConfig(attention_window=5).attention_top_k == 96
    assert ImageTransformerConfig(attention="softmax", attention_window=4, attention_top_k=9).attention_window == 4
    with pytest.raises(ValueError, match="at most attention_window = 5"):
        ImageTransformerConfig(attention_window=5, attention_top_k=95)


@pytest.mark.parametrize(("labels", "message"), [
    (torch.zeros(3, 20), "labels must be integers of the shape"), (torch.zeros(3, 19, dtype=torch.long), r"got torch.int64 \(3, 19\)"),
    ([[1]], "labels must be integers of the shape .* got list"),
    (torch.full((3, 20), 17), "labels must be classes from 0 to 16, or −100 for none, got 17"), (torch.full((3, 20), -1), "got -1"),
])
def test_labels_that_cannot_be_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        small("krause")(tokens(), labels=labels)


def test_labels_of_one_token_have_nothing_to_predict():
    with pytest.raises(ValueError, match="must be two tokens or more"):
        small("krause")(tokens(length=1), labels=tokens(length=1))


def test_labels_that_do_not_count_and_labels_of_few_bits():
    model, images = small("softmax", start_token=True), tokens()
    ignored = images.clone()
    ignored[:, 10:] = -100
    with torch.no_grad():
        assert_close(model(images, labels=ignored).loss, model(images[:, :10], labels=images[:, :10]).loss)
        assert_close(model(images, labels=images.to(torch.uint8)).loss, model(images, labels=images).loss)
        started = torch.cat([torch.full((3, 1), 17), images], 1)
        assert model(started, labels=started).loss.isfinite()  # the start token is no grey level, and nobody predicts it


@pytest.mark.parametrize("attention", ["krause", "softmax"])
@pytest.mark.parametrize("cuts", [[], [7], list(range(1, 20)), [10, 11, 15]])
def test_weights_through_a_cache_are_those_of_the_whole(attention, cuts):
    "Of the keys that the cache still holds, the oldest first."
    model, images, cache, start = small(attention), tokens(), image_cache(small(attention).config), 0
    with torch.no_grad():
        whole = model(images, output_attentions=True)
        assert [weights.shape for weights in whole.attentions] == [(3, 2, 20, 20)] * 2
        assert_close(whole.logits, model(images).logits, rtol=1e-5, atol=1e-5)
        for part in images.tensor_split(cuts, 1):
            end = start + part.shape[1]
            output = model(part, past_key_values=cache, output_attentions=True)
            assert_close(output.logits, whole.logits[:, start:end], rtol=1e-5, atol=1e-5)
            for found, wanted in zip(output.attentions, whole.attentions, strict=True):
                assert_close(found, wanted[:, :, start:end, end - found.shape[-1]:end], rtol=1e-5, atol=1e-6)
                assert not wanted[:, :, start:end, :end - found.shape[-1]].any()
            start = end


@pytest.mark.parametrize("attention", ["krause", "softmax"])
def test_generate_returns_weights_and_states(attention):
    found = small(attention).generate(tokens()[:, :9], max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                                      output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == len(found.hidden_states) == 4
    assert found.attentions[0][0].shape == (3, 2, 9, 9) and found.attentions[3][1].shape[:3] == (3, 2, 1)
    assert found.hidden_states[0][2].shape == (3, 9, 16)


@pytest.mark.parametrize(("input_ids", "message"), [
    (torch.full((1, 3), 17), "input_ids must be tokens of the vocabulary, 0 to 16, got 17 to 17"),
    (torch.full((1, 3), -1), "input_ids must be tokens of the vocabulary"), ([[1, 2]], "input_ids must be integers of shape .* got list"),
    (torch.zeros(1, 21, dtype=torch.long), "input_ids must end within the model's 20 positions, got 21 tokens after 0"),
    (torch.zeros(1, 0, dtype=torch.long), "input_ids must be integers of shape"), (torch.zeros(3), "input_ids must be integers of shape"),
    (torch.zeros(1, 3, dtype=torch.uint8), "input_ids must be integers of shape .*, int32 or int64"),
])
def test_tokens_that_cannot_be_are_refused(input_ids, message):
    with pytest.raises(ValueError, match=message):
        small("krause")(input_ids)


def test_the_start_token_is_a_token_and_no_grey_level():
    model = small("krause", start_token=True)
    sequence = torch.cat([torch.full((3, 1), 17), tokens()], 1)
    with torch.no_grad():
        logits = model(sequence).logits
    assert logits.shape == (3, 21, 17)
    with pytest.raises(ValueError, match="0 to 17, got 0 to 18"):
        model(torch.tensor([[0, 18]]))


@pytest.mark.parametrize(("attention", "cache"), [
    ("linear", DynamicCache()), ("softmax", image_cache(small("krause").config)), ("krause", image_cache(small("softmax").config)),
    ("krause", image_cache(small("krause", num_hidden_layers=3).config)),
])
def test_a_cache_of_another_model_is_refused(attention, cache):
    with pytest.raises(ValueError, match=r"past_key_values must be image_cache\(model.config\), 2 of"):
        small(attention)(tokens(), past_key_values=cache)


@pytest.mark.parametrize(("attention", "settings", "message"), [
    ("krause", {"attention_window": 5}, "of window 6, got 2 of RingLayer of window 5"),
    ("softmax", {"image_shape": (4, 4, 1)}, "of length 20, got 2 of PreallocatedLayer of length 16"),
])
def test_a_cache_of_another_size_is_refused(attention, settings, message):
    with pytest.raises(ValueError, match=message):
        small(attention)(tokens(), past_key_values=image_cache(small(attention, **settings).config))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_goes_on_with_its_own_images_only(attention):
    model, cache = small(attention), image_cache(small(attention).config)
    with torch.no_grad():
        model(tokens(length=3), past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values must hold 2 sequences of 2 heads of dimension 8"):
            model(tokens(2, 1), past_key_values=cache)
        cache = image_cache(model.config)
        small(attention, num_attention_heads=4)(tokens(length=3), past_key_values=cache)
        with pytest.raises(ValueError, match="got 3, 4 and 4; a cache serves one batch of one model"):
            model(tokens(length=1), past_key_values=cache)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_ends_with_the_image(attention):
    model = small(attention)
    for unset in ({}, {"max_new_tokens": None}, {"max_new_tokens": None, "max_length": None, "generation_config": None}):
        assert model.generate(tokens(2, 5), do_sample=False, **unset).shape == (2, 20)
    assert model.generate(tokens(2, 5), max_new_tokens=None, max_length=7).shape == (2, 7)
    with pytest.raises(ValueError, match="max_new_tokens must be at most 15, what is left of the image, got 16"):
        model.generate(tokens(2, 5), max_new_tokens=16)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_that_is_reset_takes_other_images(attention):
    model, cache = small(attention), image_cache(small(attention).config)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
        cache.reset()
        assert_close(model(tokens(2), past_key_values=cache).logits, model(tokens(2)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sequences_of_a_cache_are_chosen_and_repeated_and_its_graph_is_kept(attention):
    model, cache, x = small(attention), image_cache(small(attention).config), tokens()
    def gradient(call):
        model.zero_grad()
        call().square().sum().backward()
        return model.blocks[0].attention.k_proj.weight.grad.clone()

    cached = gradient(lambda: torch.cat([model(part, past_key_values=cache).logits for part in x.split((8, 1, 1, 10), 1)], 1))
    assert_close(cached, gradient(lambda: model(x).logits), rtol=1e-4, atol=3e-6)
    cache.reset()
    with torch.no_grad():
        model(x[:, :9], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 3]))
        chosen = x[[2, 0, 1]]
        assert_close(model(chosen[:, 9:], past_key_values=cache).logits, model(chosen).logits[:, 9:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="past_key_values must hold fewer tokens than the prompt, 12, got 20; crop it, or leave it out"):
        model.generate(chosen[:, :12], past_key_values=cache)


def test_padding_is_refused():
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        small("krause")(tokens(), attention_mask=torch.tensor([[0] + 19 * [1]] * 3))
