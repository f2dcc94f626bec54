"""The language model from scratch: no look into the future, caches equal to the whole pass, references, counts, and named errors."""
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import over
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, TrainerCallback, pipeline

from krause_repro import cli, sinks, training
from krause_repro import corpus as corpora
from krause_repro import tasks as training_tasks
from krause_repro.attention import fused_attention
from krause_repro.attention_patterns import Centroids, check_global_tokens, global_mask, routing_mask, routing_window
from krause_repro.corpus import load_corpus, read_tokenizer, train_tokenizer
from krause_repro.evaluation import add_seeds
from krause_repro.language_benchmarks import run_model
from krause_repro.language_model import (
    MIXERS,
    UNPACKED,
    WINDOWED,
    LanguageModel,
    LanguageModelConfig,
    language_cache,
    mixer_weights,
)
from krause_repro.language_model_evaluation import (
    binned,
    evaluate_language_models,
    ngram_baselines,
    position_edges,
    position_table,
    sample_text,
    with_further_positions,
)
from krause_repro.language_model_evaluation import test_text as measure_text
from krause_repro.likelihood import position_nats
from krause_repro.llm_branch import branches
from krause_repro.recipes import get_recipe
from krause_repro.records import write_json
from krause_repro.ring_cache import RingLayer, cache_bytes
from krause_repro.runs import open_run
from krause_repro.sinks import evaluate_text_sinks, text_sink_profile, text_sink_table
from krause_repro.tasks import document_positions
from krause_repro.training import cpu_has_bf16, train

PARITY = Path(__file__).parent / "parity" / "krause_lm_attention.safetensors"
SIZES = {"vocab_size": 19, "positions": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "attention_window": 6, "attention_top_k": 4, "clusters": 4, "global_tokens": (0, 5)}
each_mixer = pytest.mark.parametrize("mixer", MIXERS)


def small(mixer, **settings):
    torch.manual_seed(1)
    model = LanguageModel(LanguageModelConfig(**{**SIZES, "mixer": mixer, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch=3, length=24, seed=0):
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_parts(model, ids, cuts):
    "Logits of the parts of a sequence, one after the other through a cache."
    cache = language_cache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.tensor_split(cuts, 1) if part.numel()]
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(parts, 1)


# Causality and caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@each_mixer
def test_a_later_token_changes_no_bit_of_an_earlier_row(mixer, training, dtype):
    ids = tokens()
    found = []
    for cut in (0, 9, 23):
        model = small(mixer, dropout=0.0).to(dtype).train(training)
        changed = torch.cat([ids[:, :24 - cut], (ids[:, 24 - cut:] + 7) % 19], 1) if cut else ids
        found.append((24 - cut, model(changed).logits))
    (_, whole), *others = found
    for kept, logits in others:
        assert torch.equal(logits[:, :kept], whole[:, :kept]) and not torch.equal(logits[:, kept:], whole[:, kept:])


@each_mixer
def test_a_token_that_is_not_finite_reaches_no_earlier_row(mixer):
    model, ids = small(mixer), tokens() % 17
    ids[:2, 15] = torch.tensor([17, 18])
    poisoned = LanguageModel(model.config).eval()
    poisoned.load_state_dict(model.state_dict())
    poisoned.head.weight = nn.Parameter(poisoned.head.weight.detach().clone())  # no longer the embeddings'
    with torch.no_grad():
        poisoned.token_embedding.weight[17:] = torch.tensor([[torch.nan], [torch.inf]])
        for cuts in ([], [7], [14, 15, 16], [16, 20]):
            clean, found = (in_parts(each, ids, cuts) for each in (model, poisoned))
            assert torch.equal(found[:, :15], clean[:, :15]) and torch.equal(found[2], clean[2])
            assert not found[:2, 15].isfinite().any()
        assert torch.equal(poisoned(ids).logits[:, :15], model(ids).logits[:, :15])
        if mixer in ("krause", "routing", "longformer", "top_k"):  # the others are made of the same parts
            compiled = torch.compile(poisoned, backend="eager")
            assert torch.equal(compiled(ids).logits[:, :15], model(ids).logits[:, :15])


@pytest.mark.parametrize("cuts", [list(range(1, 24)), [7, 8, 19]])
@each_mixer
def test_cached_decoding_equals_the_whole_pass(mixer, cuts):
    model, ids = small(mixer).double(), tokens()
    with torch.no_grad():
        assert_close(in_parts(model, ids, cuts), model(ids).logits, rtol=0, atol=1e-10)
    with torch.no_grad():
        model = model.float()
        assert_close(in_parts(model, ids, cuts), model(ids).logits, rtol=0, atol=2e-5)


@each_mixer
def test_generate_is_greedy_search(mixer):
    model, ids = small(mixer), tokens(2, 6)
    made = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(made, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    with torch.no_grad():
        assert torch.equal(made[:, 6:], model(made[:, :-1]).logits[:, 5:].argmax(-1))


@pytest.mark.parametrize("mixer", ["standard", "longformer", "routing"])
def test_a_cropped_cache_is_that_of_the_kept_tokens(mixer):
    model, ids, cache = small(mixer), tokens(2), language_cache(small(mixer).config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        kept = model(ids[:, 9:12], past_key_values=cache).logits
        for start, draft in ((12, ids[:, :5]), (9, ids[:, :4]), (9, ids[:, 9:12])):  # the last draft is what was there
            cache.crop(start - cache.get_seq_length())
            assert cache.get_seq_length() == start
            found = model(draft, past_key_values=cache).logits
        assert torch.equal(found, kept) and cache.get_seq_length() == 12
        with pytest.raises(ValueError, match="tokens_to_remove must be in −12…0, got -13"):
            cache.crop(-13)
        cache.crop(0)
        assert_close(model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:], rtol=0, atol=2e-5)
    asked = {"max_new_tokens": 12, "do_sample": False}
    made = model.generate(ids[:1, :6], assistant_model=small("standard", num_hidden_layers=1), **asked)
    assert torch.equal(made, model.generate(ids[:1, :6], **asked))


@each_mixer
def test_generate_asks_for_the_logits_of_the_last_token_alone(mixer):
    model, ids, made = small(mixer), tokens(2, 12), []
    with torch.no_grad():
        whole = model(ids).logits
        for count in (1, 5, 30):
            assert_close(model(ids, logits_to_keep=count).logits, whole[:, -count:], rtol=0, atol=1e-6)
        model.head.register_forward_hook(lambda head, args, logits: made.append(logits.shape[1]))
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made == [1, 1, 1]
    with pytest.raises(ValueError, match="logits_to_keep must be 0 with labels"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="logits_to_keep must be an integer ≥ 0, got -1"):
        model(ids, logits_to_keep=-1)


def test_without_a_limit_as_many_new_tokens_as_fit():
    model, ids = small("standard"), tokens(2, 24)
    assert model.generate(ids[:, :10], do_sample=False).shape == (2, 24) and model.generate(ids[:, :2], do_sample=False).shape == (2, 22)
    with pytest.raises(ValueError, match="prompt and new tokens must fit into the model's 24 positions, got 25"):
        model.generate(ids)


@each_mixer
def test_drafts_change_nothing_whoever_makes_them(mixer):
    model, other = small(mixer).double(), small("standard", num_hidden_layers=1).double()
    ids, options = tokens(1, 8), {"max_new_tokens": 12, "do_sample": False}
    made, of_other = model.generate(ids, **options), other.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **options), made)
    assert torch.equal(model.generate(ids, assistant_model=other, **options), made)
    assert torch.equal(other.generate(ids, assistant_model=model, **options), of_other) and not torch.equal(made, of_other)


def test_a_ring_does_not_grow():
    for mixer in WINDOWED:
        model, sizes = small(mixer, positions=64, clusters=4), []
        for length in (8, 48):
            cache = language_cache(model.config)
            with torch.no_grad():
                model(tokens(1, length), past_key_values=cache)
                model(tokens(1, 1), past_key_values=cache)
            sizes.append(cache_bytes(cache))
        assert sizes[0] == sizes[1] == 2 * 2 * 6 * 32 * 4  # layers, keys and values, W, d, bytes
        assert {type(layer) for layer in cache.layers} == {RingLayer}


def test_a_branch_adds_its_ring_to_the_memory_of_the_cache():
    sizes = {}
    for mixer in ("standard", "krause"):
        model, cache = small(mixer), language_cache(small(mixer).config)
        with torch.no_grad():
            model(tokens(1, 20), past_key_values=cache)
        sizes[mixer] = cache_bytes(cache)
    assert sizes["krause"] - sizes["standard"] == 2 * 2 * model.config.attention_window * model.config.hidden_size * 4


# Packed sequences


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in UNPACKED])
def test_packed_rows_are_the_sequences_alone(mixer):
    model, ids, cuts = small(mixer), tokens(1), (9, 10, 17)
    alone = ids.tensor_split(cuts, 1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in alone])[None]
    packed = model(ids, position_ids=positions)
    assert_close(packed.logits, torch.cat([model(part).logits for part in alone], 1), rtol=0, atol=2e-5)
    both = model(ids.expand(2, -1), position_ids=torch.cat([positions, torch.arange(24)[None]]), output_attentions=True)
    assert_close(both.logits, torch.cat([packed.logits, model(ids).logits]), rtol=0, atol=2e-5)
    assert not both.attentions[1][0, :, 9:, :9].any() and both.attentions[1][1, :, 10, :10].any()
    with pytest.raises(ValueError, match="position_ids must count from 0 with a cache"):
        model(ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize(("mixer", "positions", "message"), [
    ("longformer", [[0, 1, 0]], "mixer='longformer', which does not keep packed sequences apart"),
    ("window", [[0, 1, 3]], "position_ids must start at 0 and grow by one"), ("krause", [[1, 2, 3]], "position_ids must start at 0"),
    ("krause", [[0, 1]], r"position_ids must be integers of shape \(1, 3\)"), ("krause", [[0.0, 1.0, 0.0]], "must be integers"),
])
def test_positions_that_cannot_be(mixer, positions, message):
    with pytest.raises(ValueError, match=message):
        small(mixer)(tokens(1, 3), position_ids=torch.tensor(positions))


# References


class PlainBlock(nn.Module):
    "A pre-norm block of PyTorch's own modules."

    def __init__(self, block, mask):
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.mask = block.norm1, block.norm2, block.mlp, mask
        layer = block.attention
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.attention.in_proj_weight.data = torch.cat([p.weight for p in projections])
        self.attention.in_proj_bias.data = torch.cat([p.bias for p in projections])
        self.attention.out_proj.load_state_dict(layer.o_proj.state_dict())

    def forward(self, x):
        hidden = self.norm1(x)
        x = x + self.attention(hidden, hidden, hidden, attn_mask=self.mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("mixer", ["standard", "standard_wide", "window", "longformer"])
def test_masked_mixers_equal_pytorchs_own_modules(mixer):
    model, ids = small(mixer).double(), tokens()
    i, j = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    near, is_global = i - j < 6, torch.tensor([k in (0, 5) for k in range(24)])
    allowed = {"window": near, "longformer": near | is_global | is_global[:, None]}.get(mixer, j == j) & (j <= i)
    x = F.embedding(ids, model.token_embedding.weight) + model.position_embedding.weight[:24]
    with torch.no_grad():
        for block in model.blocks:
            x = PlainBlock(block, ~allowed).eval()(x)
        assert_close(model(ids).logits, model.norm(x) @ model.token_embedding.weight.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mixer", ["top_k", "routing", "krause_only"])
def test_other_mixers_equal_their_equations(mixer):
    model = small(mixer).double()
    layer, x = model.blocks[0].attention, torch.randn(2, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        query, key, value = layer.project(x)
        scores = query @ key.mT / 8**0.5
        if mixer == "krause_only":
            sigma = layer.bandwidth(query).double().view(4, 1, 1)
            scores = -(query.unsqueeze(3) - key.unsqueeze(2)).square().sum(-1) / (2 * sigma**2)
        allowed = torch.ones(2, 4, 24, 24, dtype=torch.bool).tril()
        if mixer != "top_k":
            allowed &= ~allowed.tril(-6)  # W, and w of routing's local heads
        if mixer == "routing":
            distance = (key[:, 2:].unsqueeze(3) - layer.clusters.centroids.double().unsqueeze(1)).norm(dim=-1)
            own = distance.argmin(-1)
            for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(24)).tolist():
                same = [j for j in range(i + 1) if own[b, h, j] == own[b, h, i]][-6:]
                allowed[b, 2 + h, i] = torch.zeros(24, dtype=torch.bool).index_fill(0, torch.tensor(same), True)
        else:
            kth = scores.masked_fill(~allowed, -torch.inf).topk(4).values[..., -1:]
            allowed &= scores >= kth
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        expected = layer.o_proj((weights @ value).transpose(1, 2).flatten(2))
        assert_close(layer(x)[0], expected, rtol=0, atol=1e-10)
        assert_close(mixer_weights(layer, x), weights, rtol=0, atol=1e-10)


def test_the_branch_beside_the_attention_gives_the_authors_numbers():
    with safe_open(PARITY, "pt") as file:
        tensors, config = load_file(PARITY), json.loads(file.metadata()["config"])
    settings = LanguageModelConfig(**{**SIZES, "mixer": "krause", "hidden_size": config["hidden_size"], "positions": 128,
                                      "num_attention_heads": config["num_heads"], "attention_window": config["window_size"],
                                      "attention_top_k": config["top_k"], "dropout": 0.0})
    block = LanguageModel(settings).eval().blocks[0]
    names = {"gate_proj_krause.": "branch.token_gate.proj.", "log_sigma": "branch.bandwidth.log_sigma"}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        names |= {f"{name}_krause.": f"branch.attention.{name}.", f"{name}.": f"attention.{name}."}
    own, loaded = block.state_dict(), []
    for name, tensor in tensors.items():
        if name.startswith("state."):
            name = name.removeprefix("state.")
            start = next(start for start in names if name.startswith(start))
            own[names[start] + name.removeprefix(start)].copy_(tensor.reshape(own[names[start] + name.removeprefix(start)].shape))
            loaded.append(names[start] + name.removeprefix(start))
    assert set(own) - set(loaded) == {name for name in own if name.startswith(("norm", "mlp"))}
    x, (cache,) = tensors["input"], [language_cache(settings)]
    with torch.no_grad():
        assert_close(block.branch(block.attention(x)[0], x), tensors["output"], rtol=0, atol=1e-5)
        steps = [block.branch(block.attention(part, cache=cache)[0], part, cache=cache) for part in x.split(1, 1)]
    assert_close(torch.cat(steps, 1), tensors["output"], rtol=0, atol=1e-5)


# Routing and global tokens


def test_centroids_follow_their_tokens_by_the_closed_form():
    torch.manual_seed(0)
    clusters = Centroids(2, 3, 4, 0.9).double()
    clusters.centroids[1, 2] = 1e3
    x = clusters.normalise(torch.randn(5, 2, 7, 4, dtype=torch.float64))
    before, labels = clusters.centroids.clone(), clusters.labels(x)
    assert torch.equal(labels, torch.cdist(x, before.expand(5, -1, -1, -1)).argmin(-1))
    clusters.update(x, labels)
    for h, m in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        members = x[:, h][labels[:, h] == m]
        mean = 0.9 * before[h, m] + 0.1 * members.mean(0) if len(members) else before[h, m]
        assert_close(clusters.centroids[h, m], mean, rtol=0, atol=1e-12)
    assert torch.equal(clusters.centroids[1, 2], before[1, 2])
    whole, clusters.centroids = clusters.centroids, before.clone()
    for part, share in ((x[:2], 1), (x[:1], 0), (x[2:], 1)):  # a step of two batches; the one without a share does not count
        clusters.share = share
        clusters.update(part, clusters.labels(part))
        assert torch.equal(clusters.centroids, before)
    clusters.move()
    assert_close(clusters.centroids, whole, rtol=0, atol=1e-12)


def test_centroids_are_kept_compared_and_moved_in_float32():
    x, found = Centroids(2, 3, 4, 0.999).normalise(torch.randn(5, 2, 300, 4, generator=torch.Generator().manual_seed(0))), []
    for autocast in (False, True):
        torch.manual_seed(0)
        clusters = Centroids(2, 3, 4, 0.999)
        labels, before = clusters.labels(x), clusters.centroids.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(clusters.labels(x), labels)
            clusters.update(x, labels)
        found.append(clusters.centroids)
    assert torch.equal(*found)
    torch.manual_seed(0)
    clusters = Centroids(2, 3, 4, 0.999)
    assert torch.equal(clusters.labels(x.bfloat16()), clusters.labels(x.bfloat16().float()))  # centroids are not rounded
    clusters.centroids.data = before.bfloat16()  # as FSDP casts buffers before the first pass
    clusters.update(x.bfloat16(), labels)
    assert clusters.centroids.dtype == torch.float32
    assert_close(clusters.centroids - before.bfloat16(), found[0] - before, rtol=0.02, atol=1e-4)
    config = LanguageModelConfig(**{**SIZES, "mixer": "routing"})
    for model in (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LanguageModel(config).to(torch.bfloat16)):
        assert model.dtype == torch.bfloat16 and model.blocks[0].attention.clusters.centroids.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_centroids_move_in_training_alone_and_after_they_were_used():
    model, ids = small("routing", dropout=0.0), tokens()
    before = [block.attention.clusters.centroids.clone() for block in model.blocks]
    with torch.no_grad():
        logits = model(ids).logits
        assert all(torch.equal(a, block.attention.clusters.centroids) for a, block in zip(before, model.blocks, strict=True))
        assert torch.equal(model.train()(ids).logits, logits)
    assert not any(torch.equal(a, block.attention.clusters.centroids) for a, block in zip(before, model.blocks, strict=True))
    assert all("centroids" not in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="gradient_checkpointing must be off for routing"):
        model.gradient_checkpointing_enable()


def test_routing_and_global_masks():
    labels = torch.tensor([[[0, 1, 0, 0, 1, 0]]])
    assert [row.nonzero().flatten().tolist() for row in routing_mask(labels, 2, 2, 6)[0, 0]] == [[0], [1], [0, 2], [2, 3], [1, 4], [3, 5]]
    assert torch.equal(routing_mask(labels, 2, 2, 1), routing_mask(labels, 2, 2, 6)[:, :, -1:])
    mask = global_mask(2, [1], 5, 5)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4]]
    assert torch.equal(global_mask(2, [3], 1, 4)[0], torch.ones(4, dtype=torch.bool)) and torch.equal(global_mask(2, [], 5, 5)[4].nonzero(),
                                                                                                       torch.tensor([[3], [4]]))


# The model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_mixer
def test_saved_and_loaded_by_the_auto_class(mixer, dtype, tmp_path):
    model, ids = small(mixer), tokens()
    model(ids, labels=ids).loss.backward()
    model = model.to(dtype)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    for tensor in model.state_dict().values():
        tensor.mul_(1 + 1e-12)  # of float64 alone, to a value that float32 does not have
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LanguageModel and loaded.config.mixer == mixer and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert all(t.dtype == model.state_dict()[name].dtype for name, t in loaded.state_dict().items())
    assert loaded.head.weight is loaded.token_embedding.weight and "head.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_parameter_counts_at_the_papers_size():
    with torch.device("meta"):
        counts = {mixer: LanguageModel(LanguageModelConfig(mixer=mixer)).num_parameters() for mixer in MIXERS}
    block = 4 * 768 * 769 + 768 * 2048 * 2 + 2048 + 768 + 4 * 768
    plain = 8 * block + (50_257 + 1024 + 2) * 768
    branch = 8 * (4 * 768 * 769 + 2 * (2 * 768 + 1) + 12)
    assert counts["standard"] == counts["window"] == counts["top_k"] == counts["longformer"] == plain
    assert counts["krause"] == plain + branch and counts["krause_only"] == plain + 8 * 12
    assert counts["routing"] == plain - 8 * 384 * 769
    assert (round(plain / 1e6, 1), round(counts["krause"] / 1e6, 1)) == (83.5, 102.4)
    assert abs(counts["standard_wide"] - counts["krause"]) <= 8 * (2 * 768 + 1) / 2


def test_initial_weights():
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**{**SIZES, "mixer": "krause", "gate_init": 0.7, "sigma": 3.0}))
    for block, branch in zip(model.blocks, branches(model), strict=True):
        assert_close(branch.token_gate.proj.bias.softmax(0), torch.tensor([0.7, 0.3]))
        assert 0.005 < branch.token_gate.proj.weight.std() < 0.015 and branch.bandwidth.log_sigma.exp().allclose(torch.tensor(3.0))
        assert not torch.equal(branch.attention.q_proj.weight, block.attention.q_proj.weight)
    assert 0.018 < model.token_embedding.weight.std() < 0.022
    reset = LanguageModel(LanguageModelConfig(**{**SIZES, "mixer": "krause", "reset_gate": True}))
    assert not branches(reset)[0].token_gate.proj.bias.any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@each_mixer
def test_a_step_trains_every_parameter_and_checkpointing_changes_nothing(mixer):
    ids, gradients = tokens(), []
    for checkpointing in (False, True)[:1 + (mixer != "routing")]:
        model = small(mixer, dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(gradient is not None and gradient.any() for name, gradient in gradients[0].items() if "position" not in name)
    assert all(torch.equal(gradient, gradients[-1][name]) for name, gradient in gradients[0].items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "routing"])
def test_gradient_checkpointing_leaves_no_cache(mixer, use_reentrant):
    ids, gradients = tokens(), []
    for checkpointing in (False, True):
        model = small(mixer, dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(ids, labels=ids, use_cache=checkpointing).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=0, atol=1e-7)
    cache = language_cache(model.config)
    with torch.no_grad():
        assert_close(model(ids[:, :9], past_key_values=cache).logits, model(ids).logits[:, :9])
    with pytest.raises(ValueError, match="past_key_values must hold no tokens in training with gradient checkpointing"):
        model(ids[:, 9:], past_key_values=cache)


def test_the_loss_is_of_the_next_token_and_ignores_what_is_marked():
    model, ids = small("standard"), tokens()
    labels = ids.masked_fill(ids == 3, -100)
    with torch.no_grad():
        out = model(ids, labels=labels)
        picked = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[ids[:, 1:] != 3]
    assert_close(out.loss, -picked.mean())


@pytest.mark.parametrize("mixer", ["standard", "krause"])
def test_compiled_once_for_sequences_of_any_length(mixer):
    torch.compiler.reset()
    model = small(mixer, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (9, 14, 20):
            assert torch.equal(compiled(tokens(2, length)).logits, model(tokens(2, length)).logits)


# What is refused


@pytest.mark.parametrize(("settings", "message"), [
    ({"mixer": "krauze"}, "mixer must be one of standard, window"),
    ({"mixer": "longformer", "global_tokens": [0, 24]}, "each of global_tokens must be a position of the sequence, 0 to 23, got 24"),
    ({"mixer": "longformer", "global_tokens": [1, 1]}, "global_tokens must be different"),
    ({"mixer": "routing", "clusters": 5}, "clusters must divide the 24 positions of the sequence, got 5"),
    ({"mixer": "routing", "num_attention_heads": 1}, "num_attention_heads of mixer='routing'"),
    ({"mixer": "krause", "attention_top_k": 7}, "top_k must be at most window = 6, got 7"),
    ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 32, got 5"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{**SIZES, **settings})


def test_the_libraries_name_of_the_positions_is_a_setting_too():
    renamed = {("max_position_embeddings" if name == "positions" else name): value for name, value in SIZES.items()}
    for config in (LanguageModelConfig(**renamed), LanguageModelConfig.from_dict({}, **renamed)):
        assert config.to_dict() == LanguageModelConfig(**SIZES).to_dict()
    with pytest.raises(ValueError, match="positions must be an integer ≥ 1, got 0"):
        LanguageModelConfig(max_position_embeddings=0)


@over(("arguments", "message"), [
    ({"input_ids": torch.tensor([[0, 19]])}, "input_ids must be tokens of the vocabulary, 0 to 18, got 0 to 19"),
    ({"input_ids": torch.tensor([[-1, 2]])}, "input_ids must be tokens of the vocabulary"),
    ({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, "input_ids must end within the model's 24 positions, got 25 tokens after 0"),
    ({"input_ids": torch.zeros(1, 3)}, r"input_ids must be integers of shape \(B, T\)"),
    ({"input_ids": [[1, 2]]}, "got list"),
    ({"input_ids": torch.ones(1, 3).bool()}, "int32 or int64 and not empty, got torch.bool"),
    ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)}, r"attention_mask must be a tensor of shape \(1, 3\)"),
    ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "attention_mask must be all ones"),
    ({"input_ids": torch.ones(1, 3).long(), "labels": torch.tensor([[1, 2, 19]])}, "labels must be classes from 0 to 18"),
    ({"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 2).long()}, "labels must be integers of the shape"),
    ({"input_ids": torch.ones(1, 3).long(), "labels": [[1, 2, 3]]}, "labels must be integers of the shape .* got list"),
    ({"input_ids": torch.ones(1, 3).long(), "past_key_values": DynamicCache()}, "past_key_values must be language_cache"),
    ({"input_ids": torch.ones(1, 3).long(), "use_cache": True, "output_attentions": True}, "output_attentions must be False with a cache"),
])
def test_calls_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        small("krause")(**arguments)


@over(("options", "name"), [
    ({"inputs_embeds": torch.zeros(1, 3, 32), "max_new_tokens": 3}, "inputs_embeds"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"generation_config": GenerationConfig(cache_implementation="paged")}, "cache_implementation"),
    ({"assistant_early_exit": 1}, "assistant_early_exit"),
])
def test_options_of_generation_that_a_model_cannot_follow(options, name):
    for inputs in (None, tokens(1, 6)):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            small("krause").generate(inputs, **options)
    with pytest.raises(ValueError, match="continuous batching .* keeps keys in pages"):
        small("krause").generate_batch([[1, 2]])


def test_prompts_that_cannot_be_continued():
    model, ids = small("krause_only"), tokens(2, 10)
    for options in ({"max_new_tokens": 15}, {"max_length": 25}):
        with pytest.raises(ValueError, match="prompt and new tokens must fit into the model's 24 positions, got 25"):
            model.generate(ids, **options)
    none = GenerationConfig(max_length=0)
    for options in ({"max_new_tokens": "5"}, {"max_new_tokens": 2.5}, {"max_length": "5"}, {"generation_config": none}):
        with pytest.raises(ValueError, match="max_(new_tokens|length) must be an integer ≥ 1"):
            model.generate(ids, **options)
    for options in ({"inputs": ids[:, :0]}, {"input_ids": ids[:, :0], "max_new_tokens": 3}, {"inputs": ids[:0]}):
        with pytest.raises(ValueError, match=r"input_ids must hold a prompt of at least one token, got shape \([20], (0|10)\)"):
            model.generate(**options)
    for mask in (torch.full((2, 10), 0.5), torch.full((2, 10), 2), torch.full((2, 10), torch.nan)):
        with pytest.raises(ValueError, match="attention_mask must be all ones"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="input_ids must be a tensor of integers"):
        model.generate([[1, 2]], max_new_tokens=2)
    for labels in (torch.full_like(ids, -100), torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], -100)], 1)):
        with pytest.raises(ValueError, match="labels must count at least one token after the first"):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match="position_ids must be integers .* int32 or int64"):
        model(ids, position_ids=torch.arange(10, dtype=torch.uint8)[None])
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        model.generate(ids, attention_mask=(torch.arange(10) > 2).expand(2, -1).long(), max_new_tokens=2)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(ids, attention_mask=torch.ones(2, 10)).logits, model(ids).logits)
    with pytest.raises((ValueError, RuntimeError), match="attention_mask must be all ones"):
        compiled(ids, attention_mask=(torch.arange(10) > 2).expand(2, -1).float())
    cache = language_cache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must hold 3 sequences"):
        model(tokens(3, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must be language_cache"):
        small("standard")(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must hold fewer tokens than the prompt, 10, got 10"):
        model.generate(ids, past_key_values=cache)
    cache = language_cache(small("krause").config)
    with torch.no_grad():  # a layer with a ring beside it
        small("krause")(ids[:, :8], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 1]))
        assert_close(small("krause")(ids.flip(0)[:, 8:], past_key_values=cache).logits, small("krause")(ids.flip(0)).logits[:, 8:])
    for filler, reader in (("standard", "krause"), ("krause", "standard"), ("standard", "standard_wide"), ("window", "krause_only")):
        cache = language_cache(small(filler).config)
        small(filler)(ids[:, :8], past_key_values=cache)
        with pytest.raises(ValueError, match=f"of mixer '{reader}', got one of '{filler}'"):
            small(reader)(ids[:, 8:], past_key_values=cache)


def test_helpers_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="global_tokens must be a list of positions, got 3"):
        check_global_tokens(3, 8)
    with pytest.raises(ValueError, match="clusters must be an integer ≥ 1"):
        routing_window(0, 8)
    x = torch.randn(1, 2, 5, 4)
    assert_close(fused_attention(x[:, :, -2:], x, x), fused_attention(x, x, x)[:, :, -2:])
    whole, mask = F.scaled_dot_product_attention(x, x, x, is_causal=True), torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    assert torch.equal(fused_attention(x, x, x), whole)
    query = x.index_fill(2, torch.tensor([1]), torch.nan)
    assert fused_attention(query, x, x).isnan().all(-1)[0, 0].tolist() == [False, True, False, False, False]
    assert torch.equal(fused_attention(x, x, x, mask), F.scaled_dot_product_attention(x, x, x, mask))


# Evaluation

def test_positions_are_repeated_from_the_last_trained_one_and_nothing_before_changes():
    model, ids = small("window"), tokens(2, 24)
    longer = with_further_positions(model, 40)
    assert torch.equal(longer(ids[:, :23]).logits, model(ids[:, :23]).logits) and model.config.positions == 24
    weight = longer.position_embedding.weight
    assert weight.shape == (40, 32) and torch.equal(weight[22:], weight[22].expand(18, -1))
    assert longer(tokens(1, 40)).logits.shape == (1, 40, 19)
    with pytest.raises(ValueError, match="positions must be an integer ≥ 24, got 10"):
        with_further_positions(model, 10)


def test_bits_by_position_are_means_of_the_models_own_loss():
    model, ids = small("krause"), tokens(5, 24)
    nats = position_nats(model, [{"input_ids": row} for row in ids], batch=2)
    assert_close(nats.mean().float(), model(ids, labels=ids).loss)
    edges = position_edges(24)
    assert edges == sorted(set(edges)) and edges[-1] == 47 and {23, 26} <= set(edges)
    assert_close(torch.tensor(binned(torch.arange(1.0, 48), [1, 3, 47])), torch.tensor([1.0, 2.5, 25.5]))


def test_packed_documents_are_measured_as_if_each_were_alone():
    model, documents = small("krause"), F.pad(tokens(2, 11) % 18, (1, 0), value=18)
    nats = position_nats(model, [{"input_ids": documents.flatten()}], positions=partial(document_positions, eos=18))
    first, second = (position_nats(model, [{"input_ids": document}]) for document in documents)
    assert_close(nats[:11].float(), first.float())
    assert_close(nats[12:].float(), second.float())


def test_routing_maps_do_not_depend_on_the_size_of_the_batch():
    model, ids = small("routing"), tokens(9, 8)  # more sequences than tokens
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    alone = model(ids[:1], output_attentions=True, use_cache=False).attentions
    assert maps[0].shape == (9, 4, 8, 8)
    for many, one in zip(maps, alone, strict=True):
        assert_close(many[:1], one)


@each_mixer
def test_the_first_tokens_attention_is_the_maps_own_and_its_baseline_the_supports(mixer):
    model, ids = small(mixer), tokens(3, 24)
    profile, uniform = text_sink_profile(model, ids, window=6, batch=2)
    kinds = {"krause": {"softmax", "krause", "mixed"}, "krause_only": {"krause"}}.get(mixer, {"softmax"})
    assert profile.keys() == kinds and profile[next(iter(kinds))]["first_all"].shape == (2, 3)
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    one = "krause" if mixer == "krause_only" else "softmax"
    assert_close(profile[one]["first_all"], torch.stack([each[..., 0].mean(1)[:, 1:].mean(1) for each in maps]))
    share = 1 / torch.arange(2, 25) if mixer in ("standard", "standard_wide", "top_k", "krause") else None
    share = (1 / torch.arange(2, 7)).sum().div(23).expand(23) if mixer in WINDOWED else share
    if share is not None:
        assert abs(uniform["first_all"] - share.mean().item()) < 1e-6


def test_attention_of_routing_is_joined_over_seeds_whose_clusters_differ(monkeypatch):
    models = [small("routing") for _ in range(2)]
    with torch.no_grad():
        for module in models[1].modules():
            if isinstance(module, Centroids):
                module.centroids.neg_()
    ids = tokens(4, 24)
    for name, value in (("run_corpus", lambda *_: SimpleNamespace(verified=lambda split: None)), ("TEXT_PASSAGES", 4),
                        ("text_blocks_of", lambda *_: [{"input_ids": each} for each in ids]),
                        ("finished_model", lambda run: models[run.seed]),
                        ("provenance", lambda runs: {"seeds": [run.seed for run in runs]})):
        monkeypatch.setattr(sinks, name, value)
    runs = [SimpleNamespace(seed=seed, recipe=SimpleNamespace(document_mask=False, window=6)) for seed in (0, 1)]
    first, second = (evaluate_text_sinks([run]) for run in runs)
    flat = [each["uniform"]["support"]["first_all"]["mean"] for each in (first, second)]
    assert flat[0] != flat[1]
    assert add_seeds(first, second)["uniform"] == evaluate_text_sinks(runs)["uniform"] and flat == [
        text_sink_profile(model, ids, 6)[1]["first_all"] for model in models]


# Training


class RandomCorpus:
    "Random tokens in the place of a corpus."

    path, digest, manifest = Path("corpus"), "0" * 64, {"splits": {"train": {"tokens": 72 * 64}}}

    def __init__(self, vocab_size=512):
        self.vocab_size, self.tokenizer = vocab_size, train_tokenizer(["the other then"], 257)

    def bytes_per_token(self, split):
        return 4.0

    def verified(self, *splits):
        return self

    def tokens(self, split):
        return np.concatenate([block["input_ids"].numpy() for block in self.blocks(split, 64, int(split != "train"))])

    def blocks(self, split, length, overlap=0):
        assert overlap == (split != "train")
        generator = torch.Generator().manual_seed(len(split))
        return [{"input_ids": torch.randint(512, (length,), generator=generator)} for _ in range(72)]


class Stop(TrainerCallback):
    "Stops a run as Ctrl-C does."

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


@each_mixer
def test_padding_at_the_end_changes_nothing_before_it(mixer):
    model, ids = small(mixer), tokens(2, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 7:], labels[1, 7:] = 0, -100
    padded, short = model(ids, attention_mask=mask, labels=labels), model(ids[1:, :7])
    assert_close(padded.logits[1:, :7], short.logits, rtol=0, atol=1e-5)
    whole = F.cross_entropy(torch.cat([padded.logits[0, :-1], padded.logits[1, :6]]), torch.cat([ids[0, 1:], ids[1, 1:7]]))
    assert_close(padded.loss, whole)
    for wrong, options in ((mask, {"use_cache": True}), (mask.flip(1), {}), (torch.zeros_like(mask), {})):
        with pytest.raises(ValueError, match="attention_mask must be all ones, (since|but)"):
            model(ids, attention_mask=wrong, **options)
    if mixer == "routing":
        with pytest.raises(ValueError, match="attention_mask must be all ones, since"):
            model.train()(ids, attention_mask=mask)


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setattr(training_tasks, "load_corpus", lambda *_, **__: RandomCorpus())
    monkeypatch.setattr(training, "open_corpus", lambda *_, **__: None)
    return lambda name: replace(get_recipe(name).at("smoke"), train_blocks=64, held_out=8, depth=1)


@pytest.mark.parametrize("mixer", ["krause", "routing"])
def test_training_stopped_and_resumed_gives_the_bits_of_an_unbroken_run(mixer, smoke, tmp_path, monkeypatch):
    recipe = smoke(f"lm_{mixer}_100m/shakespeare")
    whole = train(recipe, 0, runs=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, 0, runs=tmp_path / "broken", progress=False, callbacks=(Stop(),))
    warned = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: warned.append(text))
    resumed = train(recipe, 0, runs=tmp_path / "broken", progress=False)
    assert not [text for text in warned if "missing keys" in text]
    one, two = whole.model(), resumed.model()
    assert type(one) is LanguageModel and one.config.mixer == mixer and whole.summary()["steps"] == 4
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert AutoTokenizer.from_pretrained(whole.path).get_vocab() == RandomCorpus().tokenizer.get_vocab()
    held_out = torch.stack([block["input_ids"] for block in RandomCorpus().blocks("validation", 64, 1)])[[i * 9 for i in range(8)]]
    with torch.no_grad():
        assert abs(one(held_out, labels=held_out).loss.item() - whole.summary()["held_out_loss"]) < 1e-5
    rates = [line["learning_rate"] for line in whole.metrics() if "learning_rate" in line]
    assert rates[0] == recipe.lr and recipe.lr / 10 < rates[-1] < rates[1] < recipe.lr  # no warm-up: 5% of four steps is none
    assert whole.summary()["parameters"] == one.num_parameters() and whole.summary()["data"]["train"] == {"items": 64, "tokens": 4096}
    if mixer == "krause":
        check_evaluation(whole, one, monkeypatch)


def test_with_a_document_mask_training_does_not_depend_on_micro_batches(tmp_path):
    recipe, found = replace(get_recipe("lm_krause_100m/shakespeare").at("smoke"), document_mask=True, dropout=0.0), []
    blocks = [{"input_ids": block["input_ids"].clone()} for block in RandomCorpus().blocks("train", 64)[:4]]
    for block in blocks[1::2]:
        block["input_ids"][3::4] = 0  # many short documents
    splits = training_tasks.TextSplits(blocks, blocks, blocks)  # without a tokenizer 0 ends a document
    for size in (4, 2, 1):
        sized = replace(recipe, batch_size=4, per_device_batch_size=size)
        torch.manual_seed(0)
        trainer = training.build_trainer(sized, training_tasks.task_of(sized).build(sized), splits, tmp_path, progress=False, steps=1)
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("grad_norm", "loss")] + [trainer.evaluate()["eval_loss"]])
    for others in found[1:]:
        assert others == pytest.approx(found[0], rel=1e-4)


def test_a_model_with_a_document_mask_is_tested_and_sampled_as_it_was_trained(smoke, tmp_path, monkeypatch):
    run = train(replace(smoke("lm_krause_100m/shakespeare"), document_mask=True), 0, runs=tmp_path, progress=False)
    blocks, eos = RandomCorpus().blocks("test", 64, 1), RandomCorpus().tokenizer.eos_token_id
    for block in blocks:
        block["input_ids"][5::9] = eos
    plain = RandomCorpus.blocks
    monkeypatch.setattr(RandomCorpus, "blocks", lambda self, split, length, overlap=0:
                        blocks if length == 64 else plain(self, split, length, overlap))
    judged = [blocks[i * 72 // 64] for i in range(64)]
    collate = training_tasks.task_of(run.recipe).collators(run.recipe, SimpleNamespace(tokenizer=RandomCorpus().tokenizer), False)[1]
    with torch.no_grad():
        loss = run.model()(**collate(judged)).loss.item()
    assert measure_text(run)["bits_per_token"] == pytest.approx(loss / math.log(2), rel=1e-5)
    asked, generate = [], LanguageModel.generate
    monkeypatch.setattr(LanguageModel, "generate", lambda self, ids, **options: asked.append(ids[0]) or generate(self, ids, **options))
    for prompt in ("the", ""):
        assert sample_text(run, prompt, 5).startswith(prompt)
    assert [ids[0].item() for ids in asked] == [eos, eos] and len(asked[0]) > 1 == len(asked[1])


def check_short_text(run, result, blocks, monkeypatch):
    "Of 106 test tokens there is a block of the training length, but none of twice that."
    (run.path / "test.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(RandomCorpus, "tokens", lambda self, split: np.zeros(106, np.uint16))
        patch.setattr(RandomCorpus, "blocks", lambda self, split, length, overlap: blocks[:{64: 1}[length]])
        short = [evaluate_language_models([run]) for _ in range(2)][1]  # the second time from the cache
    assert short["by_position"]["positions"] == [n for n in position_edges(64) if n < 64] and short["test_blocks"] == 1
    assert len(short["by_position"]["mean"]) == len(short["by_position"]["positions"]) and result["by_position"]["positions"][-1] == 127
    rows = position_table({"short": short | {"label": "short"}, "long": result | {"label": "long"}}).splitlines()[2:]
    assert [row.count("—") for row in rows] == [2, 0]


def check_evaluation(run, model, monkeypatch):
    "The result of a run, from its model's own loss, and a sample of text."
    result, blocks = evaluate_language_models([run]), RandomCorpus().blocks("test", 64, 1)
    cache = run.path / "test.json"
    whole = json.loads(cache.read_text(encoding="utf-8"))
    for wrong in ({"bits_per_token": -3}, {"bits_per_byte": math.nan}, {"tokens": None}, {"gate": [2]}, {"by_position": [1.0]}):
        cache.write_text(json.dumps(whole | wrong), encoding="utf-8")
        with pytest.raises(ValueError, match=f"test.json: {next(iter(wrong))} must be .*; delete it to evaluate again"):
            evaluate_language_models([run])
    check_short_text(run, result, blocks, monkeypatch)
    cache.write_text(json.dumps(whole), encoding="utf-8")
    sinks = evaluate_text_sinks([run])
    assert sinks["passages"] == 32 and sinks["sinks"]["mixed"]["gate"]["n"] == 32 and "| softmax + Krause" not in text_sink_table({})
    ids = torch.stack([blocks[i * 72 // 64]["input_ids"] for i in range(64)])
    assert result["bits_per_token"]["mean"] == pytest.approx(model(ids, labels=ids).loss.item() / math.log(2), rel=1e-5)
    assert (result["test_blocks"], result["test_tokens"]) == (64, 64 * 63) and result["training_speed"]["mean"] > 0
    assert result["bits_per_byte"]["mean"] == pytest.approx(result["bits_per_token"]["mean"] / 4)
    assert {name: result[name]["mean"] for name in ("bits_per_token", "bits_per_byte")}.items() <= cli.run_scores(run).items()
    assert len(result["gate"]["mean"]) == len(result["sigma"]["mean"]) == 1 and abs(result["gate"]["mean"][0] - 0.8) < 0.1
    assert result["curves"]["held_out"]["steps"] == [0, 1, 2, 3, 4]
    baseline = ngram_baselines(run.recipe)
    assert baseline["test_tokens"] == result["test_tokens"] and baseline["seen"]["train_tokens"] == 64 * 64
    assert baseline["all"]["train_tokens"] == 72 * 64 and 0 < baseline["all"]["bits_per_byte"] < baseline["all"]["bits_per_token"]
    text = sample_text(run, "the", 5, seed=3)
    assert text.startswith("the") and text == sample_text(run, "the", 5, seed=3) != sample_text(run, "the", 5, seed=4)
    for wrong, message in (({"temperature": 1e-42}, "temperature is too low"), ({"prompt": "\udcff a"}, "prompt must be a text in UTF-8")):
        with pytest.raises(ValueError, match=message):
            sample_text(run, **{"prompt": "the", "tokens": 5, **wrong})
    again, tokenizer = run_model(run)
    assert torch.equal(again.head.weight, model.head.weight) and len(tokenizer) == 257
    with pytest.raises(ValueError, match="holds a run of another recipe"):  # the recipe of this test has a name, but other settings
        open_run(run.path)
    with pytest.raises(ValueError, match="prompt and tokens must fit into 64 positions"):
        sample_text(run, "the", 64)
    monkeypatch.setattr(RandomCorpus, "digest", "1" * 64)
    for use in (lambda: sample_text(run, "the", 5, source="x"), lambda: run_model(run, "x"), lambda: evaluate_text_sinks([run])):
        with pytest.raises(ValueError, match="source must be the corpus of the run .*, got another text or tokenizer"):
            use()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "A small FineWeb-Edu, streamed from a Parquet file, with a small tokenizer instead of GPT-2's."
    folder = tmp_path_factory.mktemp("text")
    documents = [" ".join(f"the {i * j % 97} of {i}" for j in range(40)) for i in range(6000)]
    (folder / "files").mkdir()
    Dataset.from_dict({"text": documents}).to_parquet(folder / "files" / "000.parquet")
    spec = corpora.CORPORA["fineweb_edu"]
    made = corpora._choose_tokenizer(corpora.TextSource(documents[:300], "text"), spec.weights, 300, None)  # with its training documents
    corpora._save_tokenizer(folder, *made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(corpora.CORPORA, "fineweb_edu", replace(spec, tokenizer=str(folder / "tokenizer")))
        yield load_corpus("fineweb_edu", source=folder / "files", folder=folder / "corpora")


@pytest.fixture
def published():
    "The paper's recipe, smaller."
    return replace(get_recipe("lm_krause_100m/fineweb_edu").at("paper"), vocab_size=300, depth=1, width=32, heads=2, mlp_width=64,
                   batch_size=4, per_device_batch_size=2, train_blocks=12, held_out=2)


def test_the_published_recipe_trains_is_resumed_evaluated_and_loaded_and_stops_at_the_end_token(text, published, tmp_path):
    options = {"runs": tmp_path, "progress": False, "source": text.path}
    with pytest.raises(KeyboardInterrupt):
        train(published, 0, **options, callbacks=(Stop(),))
    run = train(published, 0, **options)
    result, rates = evaluate_language_models([run], text.path), [line["learning_rate"] for line in run.metrics() if "learning_rate" in line]
    assert run.summary()["steps"] == 3 and run.summary()["bf16"] == (cpu_has_bf16() or torch.cuda.is_available())
    assert len(rates) == 3 and rates[0] == published.lr and result["curves"]["held_out"]["steps"] == [0, 1, 2, 3]
    assert 0 < result["bits_per_token"]["mean"] < result["held_out_bits"]["mean"] + 1 and result["test_blocks"] > 1
    assert read_tokenizer(run.path)[1] == read_tokenizer(text.path / "tokenizer")[1] is not None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.path), AutoTokenizer.from_pretrained(run.path)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 1024 and torch.equal(model.head.weight, run.model().head.weight)
    assert model(**tokenizer("the 5", return_tensors="pt")).logits.shape[-1] == 300
    with torch.no_grad():  # the most likely token is now the end token
        model.norm.weight.zero_()
        model.norm.bias.copy_(model.head.weight[tokenizer.eos_token_id] * 1e4)
    prompt = tokenizer("the 5", return_tensors="pt").input_ids
    made = model.generate(prompt), model.generate(prompt, do_sample=True, max_new_tokens=9)
    assert all(each.tolist() == [[*prompt[0].tolist(), tokenizer.eos_token_id]] for each in made)
    model.save_pretrained(run.path)
    (run.path / "digests.json").unlink()  # of the former weights
    for prompt in ("the 5", ""):
        assert sample_text(run, prompt, 9, source=text.path) == prompt
        assert pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt)[0]["generated_text"] == prompt


def test_an_altered_shard_is_found_before_a_run_starts_or_resumes_and_when_it_is_evaluated(text, published, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "VERIFIED_BYTES", 0)  # the corpus is large
    source = shutil.copytree(text.path, tmp_path / "corpus")

    def altered(split, token):
        tokens = np.fromfile(source / f"{split}-00000.bin", "<u2")
        tokens[100] = token
        tokens.tofile(source / f"{split}-00000.bin")

    def trained(runs, **options):
        return train(published, 0, runs=tmp_path / runs, progress=False, source=source, **options)

    run = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("broken", callbacks=(Stop(),))
    altered("test", 5)
    with pytest.raises(ValueError, match="test-00000.bin was altered"):
        measure_text(run, source)
    shutil.copy(text.path / "test-00000.bin", source)
    altered("train", 60_000)  # of no vocabulary: on a GPU an assertion in the middle of training
    for runs in ("broken", "new"):
        with pytest.raises(ValueError, match="train-00000.bin was altered"):
            trained(runs)
    assert not (tmp_path / "new").exists()


def test_the_command_evaluates_a_model_from_scratch_on_continuations(tmp_path):
    recipe = get_recipe("lm_window_100m/openstax").at("desk")
    write_json(tmp_path / "recipe.json", {"fingerprint": recipe.fingerprint, "seed": 0, "recipe": recipe.to_dict()})
    assert cli.default_tasks(str(tmp_path))[0] == "blimp" and cli.default_tasks("smollm2")[0] == "boolq"


def test_a_corpus_that_does_not_fit_is_refused(smoke, tmp_path, monkeypatch):
    recipe = smoke("lm_standard_100m/shakespeare")
    for change, message in (({"batch_size": 80}, "source must have at least 80 training blocks of 64 tokens, one batch, got 72"),
                            ({"vocab_size": 500}, "vocab_size must be that of the corpus in corpus, 512, got 500")):
        with pytest.raises(ValueError, match=message):
            train(replace(recipe, **change), 0, runs=tmp_path, progress=False)
    with pytest.raises(ValueError, match="source must be given for a new run on the corpus text: a text file"):
        train(smoke("lm_standard_100m/text"), 0, runs=tmp_path, progress=False)  # not on the text of an earlier run
    assert not list(tmp_path.iterdir())
