"""`attn_implementation="krause"`: no leak, equal to a dense pass, with every cache, padding, generation, and what is refused."""

import copy
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import over
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    StaticCache,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_overlay,
)

from krause_repro.language_model import LanguageModelConfig
from krause_repro.reference import Neighborhood, attention_weights, reference_attention
from krause_repro.ring_cache import RingCache, cache_bytes, ring_positions
from krause_repro.transformers_attention import (
    _UNSUPPORTED,
    KrauseSettings,
    configure_krause,
    krause_attention_forward,
    krause_mask,
    krause_settings,
    load_krause,
)

NAMES = ("llama", "qwen2", "gpt2")
WINDOW, TOP_K, SIGMA, VOCABULARY = 5, 3, 3.0, 60
CLOSE = {"rtol": 0, "atol": 1e-5}
SIZE = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
        "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}

each_model = pytest.mark.parametrize("name", NAMES)


def tiny_config(name, **options):
    "Two layers, four heads of eight dimensions; Llama and Qwen2 with two key heads."
    if name == "gpt2":
        return GPT2Config(**SIZE, **options)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[name](**SIZE, num_key_value_heads=2, intermediate_size=48, **options)


def make(config, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.fixture(scope="module")
def models():
    return {name: make(configure_krause(tiny_config(name), SIGMA, WINDOW, TOP_K)) for name in NAMES}


@dataclass(frozen=True)
class Band(Neighborhood):
    "The causal window once more, as a mask written by two loops."

    size: int

    def build(self, length):
        return torch.tensor([[j <= i < j + self.size for j in range(length)] for i in range(length)])


def explicit(module, query, key, value, attention_mask, **options):
    "The dense reference under an explicit mask, on all tokens at once."
    assert query.shape[2] == key.shape[2]
    return reference_attention(query, key, value, Band(WINDOW), TOP_K, sigma=SIGMA, key_mask=attention_mask).transpose(1, 2), None


AttentionInterface.register("explicit", explicit)
AttentionMaskInterface.register("explicit", lambda attention_mask=None, **options: attention_mask)


def text(length=26, batch=2, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def dense_logits(model, tokens, **options):
    "Logits of the same model with the attention written out."
    model = copy.deepcopy(model)
    model.set_attn_implementation("explicit")
    with torch.no_grad():
        return model(tokens, use_cache=False, **options).logits


def padded_left(tokens, lengths):
    "The first tokens of each row, moved to the right, with the arguments that say so."
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    moved = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        moved[row, width - length:] = tokens[row, :length]
    return moved, {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}


# --- what the attention sees ---

@each_model
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_no_earlier_output_moves_when_a_token_is_exchanged(models, name, masked, options):
    tokens = text()
    if masked:
        options = {**options, "attention_mask": torch.arange(26).ge(torch.tensor([[0], [7]])).long()}
    with torch.no_grad():
        before = models[name](tokens, **options).logits
        for position in (25, 24, 11):
            other = tokens.clone()
            other[:, position] = other[:, position] % (VOCABULARY - 1) + 1
            after = models[name](other, **options).logits
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position], after[:, position])


@each_model
def test_what_has_left_the_window_is_not_seen(models, name):
    "Two layers of a window of 5 reach 8 tokens back, and no further."
    tokens = text(length=26, batch=1)
    with torch.no_grad():
        before = models[name](tokens).logits
        tokens[:, 10] = tokens[:, 10] % (VOCABULARY - 1) + 1
        after = models[name](tokens).logits
    moved = (before - after).abs().amax(-1)[0] > 0
    assert moved[10] and not moved[10 + 2 * (WINDOW - 1) + 1:].any()


@each_model
def test_the_model_equals_one_with_the_attention_written_out(models, name):
    with torch.no_grad():
        assert_close(models[name](text()).logits, dense_logits(models[name], text()), **CLOSE)
        tokens, options = padded_left(text(batch=3), [26, 3, 15])
        assert_close(models[name](tokens, **options).logits, dense_logits(models[name], tokens, **options), **CLOSE)


@each_model
def test_padding_on_the_right_changes_nothing_before_it(models, name):
    mask = (torch.arange(26) < torch.tensor([[26], [9]])).long()
    with torch.no_grad():
        logits = models[name](text(), attention_mask=mask).logits
        assert_close(logits[1, :9], models[name](text()[1:, :9]).logits[0], **CLOSE)
        assert_close(logits, dense_logits(models[name], text(), attention_mask=mask), **CLOSE)


@each_model
def test_padding_on_the_left_changes_nothing_after_it(models, name):
    lengths = [26, 3, 15]
    tokens, options = padded_left(text(batch=3), lengths)
    with torch.no_grad():
        logits = models[name](tokens, **options).logits
        for row, length in enumerate(lengths):
            alone = models[name](text(batch=3)[row:row + 1, :length]).logits
            assert_close(logits[row, 26 - length:], alone[0], **CLOSE)
    assert logits.isfinite().all()


# --- caches ---

CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "ring": RingCache,
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}
each_cache = over("kind", CACHES)
STEPS = {"token by token": [1] * 26, "prompt, then tokens": [14] + [1] * 12, "pieces": [3, 1, 7, 2, 1, 1, 11],
         "short prompt": [2] + [1] * 24, "one piece": [26], "exactly the window": [5, 1, 5, 5, 1, 1, 8]}


@each_model
@each_cache
@over("steps", STEPS.values())
def test_a_cache_changes_nothing(models, name, kind, steps):
    model, tokens = models[name], text()
    cache, outputs, start = CACHES[kind](model.config), [], 0
    with torch.no_grad():
        for length in steps:
            outputs.append(model(tokens[:, start:start + length], cache=cache).logits)
            start += length
        assert_close(torch.cat(outputs, 1), model(tokens, use_cache=False).logits, **CLOSE)


@each_model
@each_cache
@over("padding", ["left", "anywhere"])
@over("steps", [[9] + [1] * 17, [3, 1, 7, 2, 1, 1, 11], [1] * 26])
def test_a_cache_changes_nothing_under_padding(models, name, kind, steps, padding):
    model = models[name]
    tokens, options = padded_left(text(batch=3), [26, 13, 20])
    if padding == "anywhere":  # between the turns of a conversation, and after it
        mask = torch.ones(3, 26, dtype=torch.long)
        mask[0, 8:10] = mask[1, 3:12] = mask[1, 24:] = mask[2, :4] = mask[2, 17] = 0
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    cache, outputs, start = CACHES[kind](model.config), [], 0
    with torch.no_grad():
        for length in steps:
            new = slice(start, start + length)
            positions, mask = options["position_ids"][:, new], options["attention_mask"][:, :new.stop]
            outputs.append(model(tokens[:, new], attention_mask=mask, position_ids=positions, cache=cache).logits)
            start += length
        assert_close(torch.cat(outputs, 1), model(tokens, **options, use_cache=False).logits, **CLOSE)


@each_model
def test_the_ring_stays_as_large_as_it_was_made(models, name):
    model = models[name]
    cache, sizes = RingCache(model.config), set()
    with torch.no_grad():
        for length in (11, 1, 1, 40, *[1] * 30):
            model(text(length), cache=cache)
            sizes.add(cache_bytes(cache))
    heads = 4 if name == "gpt2" else 2
    assert sizes == {2 * 2 * 2 * heads * WINDOW * 8 * 4}  # layers, keys and values, batch, heads, slots, dimension, bytes


@pytest.mark.parametrize("other", [3, 9])
def test_a_ring_of_another_window_is_exact_or_refused(models, other):
    model, tokens = models["llama"], text(30)
    config = configure_krause(tiny_config("llama"), SIGMA, other)
    expected = model(tokens).logits
    for steps in ([1] * 30, [12] + [1] * 18, [4, 6, 5, 5, 5, 5]):
        cache, start, refused = RingCache(config), 0, False
        with torch.no_grad():
            for length in steps:
                new = slice(start, start + length)
                if start >= other and (length == 1 or other < WINDOW):
                    with pytest.raises(ValueError, match=f"config.krause_window = {WINDOW}"):
                        model(tokens[:, new], cache=cache)
                    refused = True
                    break
                assert_close(model(tokens[:, new], cache=cache).logits, expected[:, new], **CLOSE)
                start += length
        assert refused or other > WINDOW


def test_a_ring_for_another_attention_is_refused():
    config = configure_krause(tiny_config("llama"), SIGMA, WINDOW)
    model = make(config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"attends with 'krause', got 'sdpa'; use DynamicCache\(\)"):
        RingCache(model.config)


def test_a_ring_of_another_model_is_refused(models):
    model, tokens = models["llama"], text(4)
    for config in (tiny_config("llama", head_dim=16), tiny_config("gpt2")):
        cache = RingCache(configure_krause(config, SIGMA, WINDOW))
        make(cache_owner := configure_krause(config, SIGMA, WINDOW))(tokens, cache=cache)
        assert cache_owner.num_hidden_layers == 2
        with pytest.raises(ValueError, match="a cache serves one batch of one model"):
            model(tokens[:, :1], cache=cache)
    cache = RingCache(model.config)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="must have 2 sequences"):
        model(tokens[:1, :1], cache=cache)
    small = tiny_config("llama")
    small.num_hidden_layers = 1
    with pytest.raises(ValueError, match="this RingCache belongs to another model: it has 1 layers"):
        model(tokens, cache=RingCache(configure_krause(small, SIGMA, WINDOW)))


# --- NaN ---

PAD = VOCABULARY - 1


def with_nan(model):
    "The model, whose embedding of `PAD` was never trained."
    model = copy.deepcopy(model)
    model.get_input_embeddings().weight.data[PAD] = math.nan
    return model


@torch.no_grad()
def by_cache(model, kind, tokens, mask=None):
    "Logits, but of `PAD`, of a prompt of 9, then token by token; or of all tokens at once."
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    if kind == "none":
        return model(tokens, use_cache=False, attention_mask=mask, position_ids=positions).logits[..., :PAD]
    cache, outputs = CACHES[kind](model.config), []
    for new in (slice(0, 9), *(slice(t, t + 1) for t in range(9, tokens.shape[1]))):
        seen = {} if mask is None else {"attention_mask": mask[:, :new.stop], "position_ids": positions[:, new]}
        outputs.append(model(tokens[:, new], cache=cache, **seen).logits[..., :PAD])
    return torch.cat(outputs, 1)


@each_model
@pytest.mark.parametrize("kind", ["none", *CACHES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_in_padding_reaches_no_real_token(models, name, kind, side):
    tokens, mask = text(20) % PAD, torch.ones(2, 20, dtype=torch.long)
    mask[0, :11 if side == "left" else None] = 0 if side == "left" else 1
    mask[1, 13:] = 1 if side == "left" else 0
    tokens[mask == 0] = PAD
    expected = by_cache(models[name], "none", tokens, mask)
    assert_close(by_cache(with_nan(models[name]), kind, tokens, mask)[mask.bool()], expected[mask.bool()], **CLOSE)


@each_model
@pytest.mark.parametrize("kind", ["none", *CACHES])
def test_nan_reaches_no_earlier_token_and_leaves_with_the_window(models, name, kind):
    tokens = text(30) % PAD
    tokens[0, 10] = PAD
    expected, got = by_cache(models[name], "none", tokens), by_cache(with_nan(models[name]), kind, tokens)
    assert_close(got[0, :10], expected[0, :10], **CLOSE)
    assert_close(got[1], expected[1], **CLOSE)
    reached = range(10, 10 + 2 * (WINDOW - 1) + 1)  # by two layers
    assert got[0].isnan().all(-1).nonzero().flatten().tolist()[0] == 10
    assert set(got[0].isnan().any(-1).nonzero().flatten().tolist()) <= set(reached)


@pytest.mark.parametrize("kind", ["none", "dynamic", "ring"])
def test_forward_derivatives_are_those_of_the_dense_model(models, kind):
    model, tokens = models["llama"], text(12)
    embedded = model.get_input_embeddings()(tokens).detach()
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("explicit")

    def logits(embeddings, model=model, kind=kind):
        if kind == "none":
            return model(inputs_embeds=embeddings, use_cache=False).logits
        cache = CACHES[kind](model.config)
        return torch.cat([model(inputs_embeds=part, cache=cache).logits for part in (embeddings[:, :11], embeddings[:, 11:])], 1)

    expected = torch.func.jvp(lambda x: logits(x, dense, "none"), (embedded,), (direction,))[1]
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embedded, direction)
        assert_close(torch.autograd.forward_ad.unpack_dual(logits(dual)).tangent, expected, rtol=1e-4, atol=1e-4)


# --- generate ---

def continued(model, prompt, new=5 * WINDOW, **options):
    return model.generate(prompt, max_new_tokens=new, pad_token_id=0, **{"do_sample": False, **options})


@each_model
def test_greedy_generation_far_beyond_the_window_is_the_same_with_every_cache(models, name):
    model, prompt = models[name], text(9)
    expected = continued(model, prompt, use_cache=False)
    assert expected.shape[1] == 9 + 5 * WINDOW and len(expected[:, 9:].unique()) > 4
    assert torch.equal(continued(model, prompt), expected)
    assert torch.equal(continued(model, prompt, cache_implementation="static"), expected)
    for options in ({}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}):
        assert torch.equal(continued(model, prompt, cache=RingCache(model.config), **options), expected)


@each_model
def test_a_padded_batch_generates_as_each_prompt_alone(models, name):
    model, lengths = models[name], [12, 2, 7]
    tokens, options = padded_left(text(batch=3), lengths)
    told = {"output_logits": True, "return_dict_in_generate": True}
    alone = [continued(model, text(batch=3)[row:row + 1, :length], use_cache=False, **told) for row, length in enumerate(lengths)]
    for caching in ({"use_cache": False}, {}, {"cache": RingCache(model.config)}, {"cache_implementation": "static"}):
        together = continued(model, tokens, attention_mask=options["attention_mask"], **told, **caching)
        for row, length in enumerate(lengths):
            assert torch.equal(together.sequences[row, 12:], alone[row].sequences[0, length:])
            assert_close(torch.stack(together.logits)[:, row], torch.stack(alone[row].logits)[:, 0], **CLOSE)


@each_model
def test_beam_search_with_a_ring_is_beam_search(models, name):
    model, prompt = models[name], padded_left(text(), [9, 4])
    options = {"attention_mask": prompt[1]["attention_mask"], "num_beams": 4, "num_return_sequences": 2,
               "return_dict_in_generate": True, "output_scores": True}
    expected = continued(model, prompt[0], use_cache=False, **options)
    for caching in ({}, {"cache": RingCache(model.config)}):
        got = continued(model, prompt[0], **options, **caching)
        assert torch.equal(got.sequences, expected.sequences)
        assert_close(got.sequences_scores, expected.sequences_scores, **CLOSE)


@pytest.mark.parametrize("kind", ["none", "dynamic", "ring"])
def test_other_ways_of_generation_are_the_same_or_refused(models, kind):
    "Each way either continues a prompt as it is continued without a cache, or says by name that it cannot."
    model, prompt = models["llama"], text(9, batch=1)
    expected = continued(model, prompt, use_cache=False)

    def ring():
        return {"cache": RingCache(model.config)} if kind == "ring" else {}

    goes_back = {"prompt_lookup_num_tokens": 3}, {"assistant_model": make(tiny_config("llama"))}, {"assistant_early_exit": 1}
    if kind == "none":
        for options in ({"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beams": 4, "num_beam_groups": 2}):
            with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
                continued(model, prompt, **options)
        for call in (lambda: model.generate_batch(prompt.tolist(), max_new_tokens=2),
                     lambda: continued(model, prompt, cache_implementation="paged")):
            with pytest.raises(ValueError, match="Implementation krause is not supported for continuous batching"):
                call()
        return
    for options in goes_back:
        assert torch.equal(continued(model, prompt, **options, **ring()), expected)
    for options in ({"repetition_penalty": 1.3}, {"guidance_scale": 1.5, "negative_prompt_ids": prompt[:, :4]}):
        without = continued(model, prompt, use_cache=False, **options)
        assert torch.equal(continued(model, prompt, **options, **ring()), without)
    vectors = model.get_input_embeddings()(prompt)
    embedded = model.generate(inputs_embeds=vectors, max_new_tokens=5 * WINDOW, do_sample=False, pad_token_id=0,
                              **ring())
    assert torch.equal(embedded, expected[:, 9:])


@each_model
def test_sampling_with_a_ring_is_sampling(models, name):
    def sampled(**options):
        torch.manual_seed(3)
        return continued(models[name], text(9), do_sample=True, top_k=20, **options)

    assert torch.equal(sampled(cache=RingCache(models[name].config)), sampled())


@each_model
def test_a_conversation_goes_on_from_the_ring(models, name):
    model, cache = models[name], RingCache(models[name].config)
    first = continued(model, text(9), new=8, cache=cache)
    both = torch.cat([first, text(6, seed=5)], 1)
    assert torch.equal(continued(model, both, cache=cache), continued(model, both, use_cache=False))
    cache.reset()
    assert torch.equal(continued(model, text(9)[:1], cache=cache), continued(model, text(9)[:1]))


# --- training and precision ---

@each_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_has_the_gradients_of_the_dense_model(name, checkpointing):
    def gradients(attention):
        model = make(configure_krause(tiny_config(name, **drop), SIGMA, WINDOW, TOP_K), attn_implementation=attention).train()
        if checkpointing and attention == "krause":
            model.activation_checkpointing_enable()
        model(text(), labels=text(), use_cache=False).loss.backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    got, expected = gradients("krause"), gradients("explicit")
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in got.values())
    for key, gradient in expected.items():
        assert_close(got[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_dropout_is_that_of_the_configuration():
    model = make(configure_krause(tiny_config("llama", attention_dropout=0.5), SIGMA, WINDOW, TOP_K))
    with torch.no_grad():
        still, again = model(text()).logits, model(text()).logits
        model.train()
        moved = model(text()).logits
    assert torch.equal(still, again) and not torch.allclose(still, moved)


@each_model
def test_half_precision_is_close(models, name):
    expected = models[name](text()).logits
    half = copy.deepcopy(models[name]).to(torch.bfloat16)
    with torch.no_grad():
        logits = half(text()).logits
        ring = half(text(), cache=RingCache(half.config)).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(ring, logits)
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@each_model
def test_autocast_with_a_ring(models, name):
    model, cache = models[name], RingCache(models[name].config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(text(), use_cache=False).logits
        outputs = [model(text()[:, new], cache=cache).logits for new in (slice(0, 9), *(slice(i, i + 1) for i in range(9, 26)))]
    assert (torch.cat(outputs, 1) - expected).abs().mean() < 0.05 * expected.abs().mean()


# --- settings ---

@each_model
def test_settings_are_saved_and_loaded_with_the_model(models, name, tmp_path):
    models[name].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [saved[f"krause_{key}"] for key in KrauseSettings._fields] == [SIGMA, WINDOW, TOP_K]
    with torch.no_grad():
        expected = models[name](text()).logits
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="krause"), load_krause(tmp_path),
                      AutoModelForCausalLM.from_pretrained(tmp_path)):
            assert krause_settings(model.config) == (SIGMA, WINDOW, TOP_K)
            assert torch.equal(model(text()).logits, expected)
        other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert not torch.allclose(other(text()).logits, expected)


def test_a_model_that_was_loaded_and_ran_is_saved_as_a_krause_model(models, tmp_path):
    for generation in range(3):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(generation - 1)) if generation else models["llama"]
        assert model.config._attn_implementation == "krause"
        model(text())
        model.save_pretrained(tmp_path / str(generation))


def test_without_this_package_a_saved_model_is_an_error_and_not_softmax(models, tmp_path, monkeypatch):
    models["llama"].save_pretrained(tmp_path)
    monkeypatch.delitem(AttentionInterface._global_mapping, "krause")
    with pytest.raises(ValueError, match="krause"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_load_krause_wants_krause_settings(tmp_path):
    make(tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no krause_sigma and no krause_window"):
        load_krause(tmp_path)
    configure_krause(tiny_config("llama"), SIGMA, WINDOW).save_pretrained(tmp_path)
    load_krause(tmp_path).save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config._attn_implementation == "krause"


@each_model
def test_a_softmax_model_can_be_switched(name):
    model = make(tiny_config(name))
    model.set_attn_implementation("krause")
    with pytest.raises(ValueError, match=r"no krause_sigma and no krause_window; set .*configure_krause\(config, sigma, window, top_k\)"):
        model(text())
    assert configure_krause(model.config, SIGMA, WINDOW, TOP_K) is model.config
    with torch.no_grad():
        krause = model(text()).logits
        assert_close(krause, dense_logits(model, text()), **CLOSE)
        model.set_attn_implementation("sdpa")
        assert not torch.allclose(model(text()).logits, krause)


@over(("name", "value", "message"), [
    ("sigma", 0, "sigma must be a number > 0"), ("sigma", float("nan"), "sigma must be a number > 0"), ("sigma", True, "sigma"),
    ("sigma", float("inf"), "sigma must be"), ("sigma", "2.5", "sigma must be"), ("sigma", -1.0, "sigma must be"),
    ("window", 0, "window must be an integer ≥ 1"), ("window", 2.0, "window must be"), ("window", True, "window must be"),
    ("top_k", 0, "top_k must be an integer ≥ 1"), ("top_k", 1.5, "top_k must be"),
    ("top_k", WINDOW + 1, rf"(config.krause_)?top_k must be at most (config.krause_)?window = {WINDOW}, or None for all keys"),
])
def test_wrong_settings_are_named(name, value, message):
    settings = {"sigma": SIGMA, "window": WINDOW, "top_k": TOP_K, name: value}
    config = tiny_config("llama")
    with pytest.raises(ValueError, match=message):
        configure_krause(config, **settings)
    assert not hasattr(config, "krause_sigma")
    model = make(configure_krause(config, SIGMA, WINDOW, TOP_K))
    setattr(model.config, f"krause_{name}", value)
    with pytest.raises(ValueError, match=f"config.krause_{name} must be"):
        model(text())


@pytest.mark.parametrize(("wrong", "right"), [("windw", "window"), ("topk", "top_k"), ("sgma", "sigma")])
def test_a_misspelt_setting_is_told_with_the_nearest(wrong, right):
    with pytest.raises(TypeError, match=f"configure_krause takes no '{wrong}'; the nearest name is '{right}'"):
        configure_krause(tiny_config("llama"), **{"sigma": SIGMA, "window": WINDOW, wrong: 3})
    for call in (lambda: configure_krause({}, SIGMA, WINDOW), lambda: RingCache({"krause_window": 3})):
        with pytest.raises(TypeError, match="config must be a model's configuration.*got dict"):
            call()
    config = LanguageModelConfig()
    with pytest.raises(ValueError, match=r"config must be .* LanguageModelConfig\(mixer='krause_only'\)"):
        configure_krause(config, SIGMA, WINDOW)
    assert not hasattr(config, "krause_sigma")


def test_settings_of_numpy_are_saved(tmp_path):
    config = configure_krause(tiny_config("llama"), np.float32(SIGMA), np.int64(WINDOW), np.int32(TOP_K))
    assert [type(value) for value in krause_settings(config)] == [float, int, int]
    config.save_pretrained(tmp_path)
    assert RingCache(config).layers[0].window == WINDOW


def test_top_k_may_be_absent():
    model = make(configure_krause(tiny_config("llama"), SIGMA, WINDOW))
    expected = model(text()).logits
    del model.config.krause_top_k
    assert krause_settings(model.config).top_k is None and torch.equal(model(text()).logits, expected)


def test_only_safetensors_are_read_and_no_code(models, tmp_path):
    models["llama"].save_pretrained(tmp_path)
    for options in ({"trust_remote_code": True}, {"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises(ValueError, match="load_krause runs no code from model folders and reads no pickled weights"):
            load_krause(tmp_path, **options)
    with pytest.raises(ValueError, match="attn_implementation must be 'krause' for load_krause"):
        load_krause(tmp_path, attn_implementation="sdpa")
    with pytest.raises(TypeError, match="load_krause takes no 'dtpe'; the nearest name is 'dtype'"):
        load_krause(tmp_path, dtpe=torch.bfloat16)
    assert load_krause(tmp_path, dtype=torch.bfloat16, krause_window=WINDOW + 1).config.krause_window == WINDOW + 1
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load_krause(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has pickled weights, pytorch_model.bin, which could run code and are not read"):
        load_krause(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(ValueError, match="requires custom code .* which is never run"):
        load_krause(tmp_path)


# --- attentions, on request ---

@each_model
def test_attention_weights_are_those_of_the_reference(models, name):
    tokens, options = padded_left(text(batch=3), [26, 3, 15])
    with torch.no_grad():
        output = models[name](tokens, **options, output_attentions=True)
        assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 4, 26, 26)
        assert torch.equal(output.logits, models[name](tokens, **options).logits)
    real = options["attention_mask"].bool()
    for weights in output.attentions:
        assert_close(weights.sum(-1), real[:, None].expand(-1, 4, -1).float(), **CLOSE)
        assert not weights[:, :, ~Band(WINDOW).build(26)].any()
        assert ((weights > 0).sum(-1) <= TOP_K).all()
    cache = DynamicCache()
    models[name](tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match="output_attentions needs all tokens in one step"):
        models[name](tokens[:, 20:], cache=cache, output_attentions=True)


def test_weights_agree_with_the_tensors_that_were_attended():
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    module = SimpleNamespace(config=configure_krause(tiny_config("llama"), SIGMA, WINDOW, TOP_K), is_causal=True, layer_idx=0)
    output, weights = krause_attention_forward(module, query, key, value, None, scaling=123.0)
    assert weights is None and output.shape == (1, 9, 2, 8)
    wanted = attention_weights(query, key, Band(WINDOW), TOP_K, sigma=SIGMA) @ value
    assert_close(output, wanted.transpose(1, 2), **CLOSE)


def test_values_of_lower_precision_do_not_lower_that_of_the_scores():
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    value = value.bfloat16()
    module = SimpleNamespace(config=configure_krause(tiny_config("llama"), SIGMA, WINDOW, TOP_K), is_causal=True, layer_idx=0)
    got, expected = (krause_attention_forward(module, query, key, x, None)[0] for x in (value, value.float()))
    assert got.dtype == torch.float32 and torch.equal(got, expected)


# --- compiled and exported ---

@pytest.fixture
def one_layer():
    "A model that is compiled soon, on a compiler that remembers nothing."
    torch.compiler.reset()
    config = configure_krause(tiny_config("llama"), SIGMA, WINDOW + 1, TOP_K)  # a window that nothing else has used
    config.num_hidden_layers = 1
    yield make(config)
    torch.compiler.reset()


MASK = torch.arange(14).ge(torch.tensor([[0], [4]])).long()
PADDED = {"attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp_min(0)}


def test_a_compiled_model_needs_no_mask(one_layer):
    model, tokens = one_layer, text(14)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(input_ids=tokens, labels=tokens, use_cache=False)
    got.loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    expected = model(tokens, labels=tokens, use_cache=False)
    assert_close(got.logits, expected.logits, **CLOSE)
    expected.loss.backward()
    for key, parameter in model.named_parameters():
        assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-6, msg=key)
    packed = torch.tensor([[*range(9), *range(5)]]).expand(2, -1)
    got, expected = (function(tokens, position_ids=packed, use_cache=False).logits for function in (compiled, model))
    assert_close(got, expected, **CLOSE)


def packed_by_transformers(positions):
    "The mask function that transformers makes while a model is compiled."
    packed = packed_sequence_mask_function((positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1))
    return and_masks(remap_positions_for_packed_sequence(causal_mask_function, positions), packed)


ALONE = packed_by_transformers(torch.arange(12).expand(2, -1)), and_masks(causal_mask_function, sliding_window_overlay(WINDOW))


@pytest.mark.parametrize(("pattern", "segments"), [
    *((pattern, [0] * 12) for pattern in ALONE),
    (packed_by_transformers(torch.arange(12).remainder(7).expand(2, -1)), [0] * 7 + [1] * 5),
    (packed_by_transformers(torch.stack([torch.arange(12), torch.arange(12).remainder(11)])), [0] * 12),
    (chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.long)), [0] * 6 + [1] * 6),
    (and_masks(causal_mask_function, sliding_window_overlay(WINDOW - 1)), None), (bidirectional_mask_function, None),
    (or_masks(causal_mask_function, blockwise_overlay(torch.arange(24).view(2, 12) // 2)), None),
])
def test_a_mask_function_is_a_pattern_of_packed_sequences_or_refused(pattern, segments, monkeypatch):
    def mask(**options):
        return mask_of(q_length=12, kv_length=12, mask_function=pattern, **options)

    if segments is None or pattern in ALONE:
        with pytest.raises(ValueError, match="supports no other pattern"):
            mask()
    else:
        assert mask()[0].tolist() == segments
    with pytest.raises(ValueError, match="supports no other pattern"):  # one of the user's own, which may be anything
        mask(use_vmap=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if segments is None:
        with pytest.raises(RuntimeError, match="supports no other pattern"):
            mask()
    else:
        assert mask()[0].tolist() == segments


def test_an_exported_model_is_the_model_and_leaves_nothing_behind(one_layer):
    "Without a mask; with one, in test_ecosystem."
    options = {"input_ids": text(14), "use_cache": False}
    program = torch.export.export(one_layer, (), options, strict=False).module()
    with torch.no_grad():
        logits = make(one_layer.config)(**options).logits
        assert type(logits) is torch.Tensor and logits.isfinite().all()
        assert_close(program(**options).logits, logits, **CLOSE)


def test_a_model_on_the_meta_device_has_shapes():
    with torch.device("meta"):
        model = make(configure_krause(tiny_config("llama"), SIGMA, WINDOW, TOP_K))
        first = model(torch.zeros(2, 9, dtype=torch.long))
        assert first.logits.shape == (2, 9, VOCABULARY)
        with torch.no_grad():
            for cache in (first.cache, RingCache(model.config)):
                assert model(torch.zeros(2, 1, dtype=torch.long), cache=cache).logits.shape == (2, 1, VOCABULARY)


# --- packed sequences ---

LENGTHS = (7, 12, 1, 5)


@each_model
def test_packed_rows_are_the_sequences_alone(models, name):
    model, rows = models[name], [{"input_ids": row, "labels": row} for row in (text(n, batch=1)[0].tolist() for n in LENGTHS)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    packed = model(**batch, use_cache=False)
    alone = [model(torch.tensor([row["input_ids"]]), use_cache=False).logits for row in rows]
    assert_close(packed.logits, torch.cat(alone, 1), rtol=0, atol=1e-5)
    losses = [F.cross_entropy(x[0, :-1], torch.tensor(row["labels"][1:]).long(), reduction="sum")
              for x, row in zip(alone, rows, strict=True)]
    parameters = [*model.parameters()]
    expected = torch.autograd.grad(sum(losses) / (sum(LENGTHS) - len(rows)), parameters)
    for one, other in zip(torch.autograd.grad(packed.loss, parameters), expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # two rows, packed in different ways, and the weights
        positions = torch.cat([batch["position_ids"], torch.arange(25)[None]])
        both = model(batch["input_ids"].expand(2, -1), position_ids=positions, use_cache=False, output_attentions=True)
        assert_close(both.logits[0], packed.logits[0], **CLOSE)
        assert_close(both.logits[1:], model(batch["input_ids"], use_cache=False).logits, **CLOSE)
        assert not both.attentions[0][0, :, 7:, :7].any() and both.attentions[0][1, :, 7, :7].any()


def test_lengths_of_sequences_say_the_same_as_positions(models):
    model, tokens = models["llama"], text(25, batch=1)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        assert_close(model(tokens, cu_seq_lens_q=ends, use_cache=False).logits, packed, rtol=0, atol=1e-5)
    for wrong, message in ((ends[:-1], "must grow from 0 to the number of tokens, 25"), (ends.flip(0), "must grow from 0")):
        with pytest.raises(ValueError, match=message):
            model(tokens, cu_seq_lens_q=wrong, use_cache=False)
    for rows, options in ((tokens, {}), (tokens.expand(2, -1), {"use_cache": False})):
        with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of one row and use_cache=False"):
            model(rows, cu_seq_lens_q=ends, **options)


# --- the mask function ---

def mask_of(config=None, **options):
    config = config or configure_krause(tiny_config("llama"), SIGMA, WINDOW)
    options = {"batch_size": 2, "q_offset": 0, "kv_offset": 0, "mask_function": causal_mask_function, "config": config, **options}
    return krause_mask(**options)


def test_there_is_no_mask_without_padding_in_reach():
    ones = torch.ones(2, 12, dtype=torch.bool)
    assert mask_of(q_length=12, kv_length=12) is None
    assert mask_of(q_length=12, kv_length=12, attention_mask=ones) is None
    far = torch.arange(12).ge(torch.tensor([[0], [3]]))
    assert mask_of(q_length=1, kv_length=12, q_offset=11, attention_mask=far) is None
    near = torch.arange(12).ge(torch.tensor([[0], [8]]))
    assert torch.equal(mask_of(q_length=1, kv_length=12, q_offset=11, attention_mask=near), near)


def test_a_static_cache_is_cut_to_what_is_filled():
    mask = mask_of(q_length=3, kv_length=40, q_offset=torch.tensor(4))
    assert mask.shape == (2, 7) and mask.all()
    assert torch.equal(mask_of(q_length=3, kv_length=40, q_offset=4, attention_mask=mask), mask)
    assert mask_of(q_length=3, kv_length=7, q_offset=torch.tensor(4)) is None


def test_a_full_ring_is_masked_slot_by_slot():
    padding = torch.arange(9).ge(torch.tensor([[0], [6]]))
    mask = mask_of(q_length=1, kv_length=WINDOW, q_offset=8, attention_mask=padding)
    assert torch.equal(mask, padding[:, ring_positions(9, WINDOW)])
    assert mask[1].tolist() == [False, True, True, True, False]  # slots 0–3 hold 5–8, slot 4 holds 4


@pytest.mark.parametrize("shape", [(2, 11), (2, 13), (1, 12), (2, 1)])
def test_a_mask_has_one_column_for_each_token(models, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \(2, 12\)"):
        models["llama"](text(12), attention_mask=torch.ones(shape))


@each_model
def test_a_mask_for_the_new_tokens_only_is_refused(models, name):
    for cache in (DynamicCache(), RingCache(models[name].config)):
        models[name](text(12), cache=cache)
        with pytest.raises(ValueError, match=r"attention_mask must be of shape \(2, 13\)"):
            models[name](text(1), attention_mask=torch.ones(2, 1), cache=cache)


# --- refusals ---

@each_model
@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.ones(2, 26), "use_cache": False}], ids=["cache", "mask"])
def test_packed_sequences_are_refused_where_a_later_step_could_not_tell_them_apart(models, name, options):
    packed = torch.cat([torch.arange(16), torch.arange(10)]).expand(2, -1)
    for positions in (packed, packed[:1]):
        with pytest.raises(ValueError, match="packed sequences, .* need use_cache=False"):
            models[name](text(), position_ids=positions, **options)


@each_model
@pytest.mark.parametrize("kind", [None, *CACHES])
def test_masks_of_four_dimensions_are_refused(models, name, kind):
    triangle = torch.ones(26, 26).tril().expand(2, 1, -1, -1)
    for mask in (torch.ones(2, 1, 26, 26), triangle, triangle.bool()):
        options = {"cache": CACHES[kind](models[name].config)} if kind else {"use_cache": False}
        with pytest.raises(ValueError, match="no masks of 4 dimensions"):
            models[name](text(), attention_mask=mask, **options)


def test_cross_attention_is_refused():
    model = make(configure_krause(tiny_config("gpt2", add_cross_attention=True), SIGMA, WINDOW))
    with pytest.raises(ValueError, match="no cross-attention"):
        model(text(), encoder_hidden_states=torch.zeros(2, 7, 32))
    assert model(text()).logits.shape == (2, 26, VOCABULARY)


@each_model
def test_attention_in_both_directions_is_refused(name):
    config = configure_krause(tiny_config(name), SIGMA, WINDOW)
    config.is_causal = False
    with pytest.raises(ValueError, match="no bidirectional layers"):
        make(config)(text())


def explicit_smaller(module, query, key, value, attention_mask, sliding_window=None, **options):
    "As `explicit`, in the smaller of the two windows."
    window = Band(min(WINDOW, sliding_window or WINDOW))
    return reference_attention(query, key, value, window, TOP_K, sigma=SIGMA, key_mask=attention_mask).transpose(1, 2), None


AttentionInterface.register("explicit_smaller", explicit_smaller)
AttentionMaskInterface.register("explicit_smaller", lambda attention_mask=None, **options: attention_mask)
SLIDING = {
    "qwen2": lambda sliding: tiny_config("qwen2", use_sliding_window=True, sliding_window=sliding, max_window_layers=1),
    "mistral": lambda sliding: MistralConfig(**SIZE, num_key_value_heads=2, intermediate_size=48, sliding_window=sliding),
    "gemma3": lambda sliding: Gemma3TextConfig(**SIZE, head_dim=8, num_key_value_heads=2, intermediate_size=48, sliding_window=sliding,
                                               layer_types=["sliding_attention", "full_attention"]),
}


@pytest.mark.parametrize("sliding", [2, 4, 16])
@pytest.mark.parametrize("name", SLIDING)
def test_the_smaller_window_holds(name, sliding):
    model = make(configure_krause(SLIDING[name](sliding), SIGMA, WINDOW, TOP_K))
    other = copy.deepcopy(model)
    other.set_attn_implementation("explicit_smaller")
    tokens, padded = padded_left(text(), (14, 9))
    with torch.no_grad():
        for ids, options in ((text(), {}), (tokens, padded)):
            expected = other(ids, use_cache=False, **options).logits
            real = options.get("attention_mask", torch.ones_like(ids)).bool()
            assert_close(model(ids, use_cache=False, **options).logits[real], expected[real], **CLOSE)
            for kind in ("dynamic", "static", "ring"):
                cache, got = CACHES[kind](model.config), []
                for new in (slice(0, 7), slice(7, 8), slice(8, 11), *(slice(i, i + 1) for i in range(11, ids.shape[1]))):
                    part = {} if not options else {"attention_mask": options["attention_mask"][:, :new.stop],
                                                   "position_ids": options["position_ids"][:, new]}
                    got.append(model(ids[:, new], cache=cache, **part).logits)
                assert_close(torch.cat(got, 1)[real], expected[real], **CLOSE, msg=kind)


def test_a_sliding_window_that_the_attention_is_not_told_is_refused():
    config = configure_krause(SLIDING["mistral"](3), SIGMA, WINDOW)
    with pytest.raises(ValueError, match="has a sliding window that it does not pass"):
        krause_attention_forward(SimpleNamespace(config=config, is_causal=True, layer_idx=1), *torch.zeros(3, 1, 2, 7, 8), None)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_slides_by_itself_must_keep_enough(kind):
    "Llama has no sliding layers, but the caches of transformers believe the entry in its configuration."
    for sliding, fine in ((4, False), (5, True), (9, True)):
        model = make(configure_krause(tiny_config("llama", sliding_window=sliding), SIGMA, WINDOW))
        cache, outputs = CACHES[kind](model.config), []
        with torch.no_grad():
            if not fine:
                model(text()[:, :7], cache=cache)
                with pytest.raises(ValueError, match="the cache keeps other tokens"):
                    model(text()[:, 7:8], cache=cache)
                continue
            for new in (slice(0, 7), *(slice(i, i + 1) for i in range(7, 20)), slice(20, 26)):
                outputs.append(model(text()[:, new], cache=cache).logits)
            assert_close(torch.cat(outputs, 1), model(text(), use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("name", _UNSUPPORTED)
def test_arguments_that_would_change_the_attention_are_refused(name):
    module = SimpleNamespace(config=configure_krause(tiny_config("llama"), SIGMA, WINDOW), is_causal=True, layer_idx=1)
    tensors = torch.randn(3, 1, 2, 9, 8)
    krause_attention_forward(module, *tensors, None, **{name: None})
    with pytest.raises(ValueError, match=f"cannot take {name}"):
        krause_attention_forward(module, *tensors, None, **{name: 1})


def test_modules_that_are_not_causal_are_refused():
    config, tensors = configure_krause(tiny_config("llama"), SIGMA, WINDOW), torch.randn(3, 1, 2, 9, 8)
    for module, options in ((SimpleNamespace(config=config, is_causal=False), {}), (SimpleNamespace(config=config), {"is_causal": False})):
        with pytest.raises(ValueError, match="is causal self-attention"):
            krause_attention_forward(module, *tensors, None, **options)


def test_options_for_the_scale_of_softmax_do_nothing():
    config = configure_krause(tiny_config("gpt2"), SIGMA, WINDOW, TOP_K)
    expected = make(config)(text()).logits
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        other = copy.deepcopy(config)
        setattr(other, option, True)
        assert torch.equal(make(other)(text()).logits, expected)
