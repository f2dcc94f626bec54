"The Krause branch of language models: against a formula written down apart from it, cached against uncached, saved against loaded."

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
from cases import over
from fresh import run_fresh
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from krause_repro import branched_models
from krause_repro.adapters import (
    add_adapter,
    base_fingerprint,
    check_base,
    load_language_model,
    lora_config,
    parameter_counts,
    save_adapter,
)
from krause_repro.branched_models import (
    add_krause_branch,
    branch_sigmas,
    load_with_branch,
    mean_gates,
    recorded_branches,
    remove_krause_branch,
)
from krause_repro.image_transformer import ImageTransformer, ImageTransformerConfig
from krause_repro.language_model import LanguageModel, LanguageModelConfig
from krause_repro.llm_branch import BranchSettings, KrauseBranch, attention_layers, branches, padding_of_keys
from krause_repro.native_kernels import kernels_available
from krause_repro.reference import CausalWindow

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
OWN = {"vocab_size": 61, "positions": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "smollm": lambda: LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_attention_heads": 6, "hidden_size": 96}, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=11)),
    # heads of whole vectors, whose single tokens one operator takes
    "wide llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=32, attention_bias=True)),
    "wide qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, head_dim=64)),
    "wide mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=32, sliding_window=11)),
}
WIDE = [family for family in FAMILIES if family.startswith("wide")]
BRANCH = {"window": 6, "top_k": 3, "sigma": 1.5, "gate_init": 0.7}


def small(family="llama", branch=True, **changes):
    "A model whose parameters are all away from their start, so that none is zero, one or equal to another."
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    if branch:
        add_krause_branch(model, **{**BRANCH, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(length=29, batch=2, seed=1):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_pieces(model, ids, sizes, cache=None, mask=None):
    "Logits of a sequence that is given to the model in pieces."
    logits, past = [], 0
    for size in sizes:
        seen = None if mask is None else mask[:, :past + size]
        step = model(ids[:, past:past + size], attention_mask=seen, cache=cache, use_cache=True)
        logits, cache, past = [*logits, step.logits], step.cache, past + size
    return torch.cat(logits, 1)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen2", "mistral"])
def test_layer_is_the_mixture_written_down_in_full(family):
    "Projections, rotation, distances, window, top-k and gate from the weights alone, in float64."
    model = small(family).double()
    layer, ids = next(iter(attention_layers(model).values())), tokens()
    seen = {}
    layer.register_forward_hook(lambda m, args, kwargs, out: seen.update(hidden=kwargs["hidden_states"], mixed=out[0],
                                cos=kwargs["position_embeddings"][0][:, None], sin=kwargs["position_embeddings"][1][:, None]),
                                with_kwargs=True)
    with torch.no_grad():
        model(ids)
        branch, hidden, mixed = layer.krause_branch, seen["hidden"], seen["mixed"]
        own, heads = branch.attention, layer.config.num_attention_heads
        q, k, v = (p(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
        q, k = rotate(q, seen["cos"], seen["sin"]), rotate(k, seen["cos"], seen["sin"])
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        sigma, window = branch.bandwidth.log_sigma.exp(), CausalWindow(branch.window)
        squared = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
        score = (-squared / (2 * sigma[:, None, None] ** 2)).masked_fill(~window.mask(ids.shape[1]), -torch.inf)
        kept = score >= score.topk(branch.top_k, -1).values[..., -1:]
        weights = score.masked_fill(~kept, -torch.inf).softmax(-1)
        krause = own.o_proj((weights @ v).transpose(1, 2).flatten(2))
        remove_krause_branch(model)
        standard = {}
        layer.register_forward_hook(lambda m, args, out: standard.update(output=out[0]))
        model(ids)
        logits = branch.token_gate.proj(torch.cat([standard["output"], krause], -1))
        share = torch.sigmoid(logits[..., :1] - logits[..., 1:])
    assert_close(mixed, share * standard["output"] + (1 - share) * krause, rtol=0, atol=1e-10)
    assert 0.1 < share.mean() < 0.95 and share.std() > 1e-3


def test_at_the_start_it_is_the_base_model_but_for_the_gate():
    model = small(branch=False)
    layer = next(iter(attention_layers(model).values()))
    base = {name: p.clone() for name, p in model.state_dict().items()}
    add_krause_branch(model, window=32, top_k=16, sigma=5.5, gate_init=0.8)
    state = model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in base.items())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        copied = getattr(layer.krause_branch.attention, name)
        assert torch.equal(copied.weight, getattr(layer, name).weight) and copied.weight is not getattr(layer, name).weight
    added = sum(p.numel() for p in branches(model)[0].parameters())
    width, heads = 32, 4
    assert added == 2 * width * width + 2 * width * 16 + heads + 2 * 2 * width + 2
    parts = []
    for each in attention_layers(model).values():
        each.krause_branch.token_gate.proj.weight.data.zero_()  # what is left is the bias, 0.8
        each.krause_branch.token_gate.register_forward_hook(lambda gate, args, output: parts.append((*args, output)))
    with torch.no_grad():
        model(tokens())
    assert len(parts) == 2
    for standard, krause, mixed in parts:
        assert (standard - krause).abs().max() > 1e-3
        assert_close(mixed, 0.8 * standard + 0.2 * krause, rtol=0, atol=1e-6)


def test_gate_starts_where_it_is_told():
    torch.manual_seed(0)
    model = add_krause_branch(FAMILIES["llama"]().eval(), gate_init=0.8)
    with torch.no_grad(), recorded_branches() as records:
        model(tokens())
    assert [r["layer"] for r in records] == [0, 1]
    for record in records:
        assert_close(record["gate"], torch.full((2, 29), 0.8), rtol=0, atol=0.01)
        assert_close(record["weights"].sum(-1), torch.ones(2, 4, 29), rtol=0, atol=1e-5)
        rows, columns = torch.arange(29)[:, None], torch.arange(29)
        assert not record["weights"][..., (columns > rows) | (columns <= rows - 32)].any()
        assert ((record["weights"] > 0).sum(-1) == (torch.arange(29) + 1).clamp(max=16)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_of_one_begins_at_the_base_model_and_leaves_it(family, tmp_path):
    base = FAMILIES[family]().eval()
    branched = add_krause_branch(copy.deepcopy(base), **{**BRANCH, "gate_init": 1})
    with torch.no_grad(), recorded_branches() as records:
        assert torch.equal(branched(tokens()).logits, base(tokens()).logits)
    assert all((record["gate"] == 1).all() for record in records)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(branched.generate(tokens(), **greedy), base.generate(tokens(), **greedy))
    model = get_peft_model(branched, lora_config(branched, rank=4, dropout=0.0)).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    factors = [branch.token_gate.branch_factor for branch in branches(model)]
    assert all(factor != 0 for factor in factors)
    save_adapter(model.eval(), tmp_path / "adapter")
    loaded = add_adapter(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, cache = model(tokens()).logits, loaded(tokens()[:, :-1], use_cache=True).cache
        assert torch.equal(loaded(tokens()).logits, expected)
        assert_close(loaded(tokens()[:, -1:], cache=cache).logits, expected[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_gates_are_averaged_over_all_forward_passes(grad):
    model, (first, second) = small(), tokens().split(1)
    with torch.no_grad():
        branches(model)[0].token_gate.proj.weight.normal_()
        with recorded_branches() as records:
            model(first), model(second)
    with torch.set_grad_enabled(grad), mean_gates(model) as gates:
        model(first), model(second)
    own = [torch.stack([record["gate"] for record in records if record["layer"] == layer]).mean().item() for layer in (0, 1)]
    assert gates == pytest.approx(own, abs=1e-6) and abs(gates[0] - gates[1]) > 1e-3
    assert branch_sigmas(model) == [branch.bandwidth(torch.empty(0)).mean().item() for branch in branches(model)]
    with mean_gates(remove_krause_branch(model)) as gates:
        model(first)
    assert gates == branch_sigmas(model) == []


@pytest.mark.parametrize(("family", "attention"), [
    *((family, "sdpa") for family in FAMILIES), ("llama", "eager"), ("mistral", "eager"), ("wide llama", "eager")])
def test_cached_equals_uncached_at_every_position(family, attention):
    model, ids = small(family), tokens()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        whole = model(ids).logits
    static = StaticCache(model.config, max_cache_len=40)
    for sizes, cache in (([9, 1, 1, 7, 11], None), ([1] * 29, DynamicCache()), ([4, 3] + [1] * 22, static)):
        assert_close(in_pieces(model, ids, sizes, cache), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "wide llama"])
def test_left_padding_changes_nothing(family, attention):
    model, ids, pad = small(family), tokens(17), 5
    model.set_attn_implementation(attention)
    padded = torch.cat([torch.full((2, pad), 7), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :pad] = 0
    with torch.no_grad():
        alone, other = model(ids[:1]).logits, model(padded[1:]).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(padded, attention_mask=mask, position_ids=positions).logits
    assert_close(together[:1, pad:], alone, rtol=0, atol=1e-5)
    assert_close(together[1:], other, rtol=0, atol=1e-5)
    cached = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    by_itself = model.generate(ids[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(cached[:1, pad:], by_itself)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3, "num_return_sequences": 2},
                                     {"cache_implementation": "static", "num_beams": 2}])
@pytest.mark.parametrize("family", ["llama", "mistral", "wide qwen2"])
def test_generate_is_the_same_with_and_without_a_cache(family, options):
    model, prompt = small(family), tokens(9)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    common = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    without = model.generate(prompt, use_cache=False, **common, **{k: v for k, v in options.items() if k != "cache_implementation"})
    assert torch.equal(model.generate(prompt, **common, **options), without)


def test_a_later_token_changes_nothing_before_it():
    model, ids = small(), tokens()
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 61
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax((0, 2))
    assert not difference[:20].any() and difference[20] > 1e-3


def test_without_its_ring_cached_decoding_is_another_function():
    model, ids = small(ignore_cache=True), tokens()
    with torch.no_grad():
        whole = model(ids).logits
    assert (in_pieces(model, ids, [1] * 29) - whole).abs().max() > 1e-3
    assert_close(in_pieces(model, ids, [29]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_gives_the_base_model_back(family):
    model = small(family, branch=False)
    generation = copy.deepcopy(model.generation_config)
    names, config, ids = set(model.state_dict()), model.config.to_dict(), tokens()
    with torch.no_grad():
        before = model(ids).logits
        add_krause_branch(model, **BRANCH)
        assert not torch.equal(model(ids).logits, before) and len(branches(model)) == 2
        remove_krause_branch(model)
        assert torch.equal(model(ids).logits, before)
    assert set(model.state_dict()) == names and model.config.to_dict() == config and not branches(model)
    assert model.generation_config.to_dict() == generation.to_dict()
    add_krause_branch(model, **BRANCH)  # and again


def test_a_copy_is_independent():
    model, ids = small(), tokens()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        branches(twin)[0].token_gate.proj.bias += 1
        changed = twin(ids).logits
        mixed = model(ids).logits
        assert not torch.equal(changed, mixed)
        remove_krause_branch(twin)
        assert torch.equal(model(ids).logits, mixed)
        assert len(branches(model)) == 2 and not branches(twin)
        assert torch.equal(twin(ids).logits, remove_krause_branch(model)(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = small().train(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 25:] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)
    assert all(plain[name].any() for name in plain if "krause_branch" in name)


def test_attentions_are_the_base_models_and_the_branchs_apart():
    model, ids = small(), tokens()
    model.set_attn_implementation("eager")
    with torch.no_grad(), recorded_branches() as records:
        output = model(ids, output_attentions=True)
    assert len(output.attentions) == len(records) == 2
    for weights, record in zip(output.attentions, records, strict=True):
        assert weights.shape == record["weights"].shape and (weights[:, :, -1] > 0).all()
    layer = branches(model)[0]
    assert layer.window == 6 and ((records[0]["weights"][:, :, -1] > 0).sum(-1) == 3).all()


def test_bfloat16_stays_near_float32():
    model, ids = small(), tokens()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact, rounded, plain = model(ids).logits, half(ids).logits, remove_krause_branch(copy.deepcopy(half))(ids).logits
        base = remove_krause_branch(copy.deepcopy(model))(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() < 3 * (plain - base).abs().mean()


def test_sigma_and_gate_are_trained_and_saved(tmp_path):
    branched = add_krause_branch(small(branch=False), **BRANCH)
    model = get_peft_model(branched, lora_config(branched, rank=4, dropout=0.0)).train()
    start = {name: p.clone() for name, p in model.named_parameters()}
    counts = parameter_counts(model)
    assert counts["trainable"] + counts["frozen"] == counts["total"] == sum(p.numel() for p in model.parameters())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    for end in ("bandwidth.modules_to_save.default.log_sigma", "token_gate.modules_to_save.default.proj.weight",
                "krause_branch.attention.q_proj.lora_B.default.weight", "self_attn.q_proj.lora_B.default.weight"):
        assert sum(name.endswith(end) for name in moved) == 2, end
    assert not any("base_layer" in name for name in moved)
    save_adapter(model, tmp_path / "adapter")
    small(branch=False).save_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
    torch.save(expected, tmp_path / "expected.pt")
    run_fresh(
        "import torch; from transformers import LlamaForCausalLM; from krause_repro.adapters import add_adapter; "
        "model = add_adapter(LlamaForCausalLM.from_pretrained(folder + '/base'), folder + '/adapter').eval(); "
        "ids = torch.randint(61, (2, 29), generator=torch.Generator().manual_seed(1)); "
        "torch.testing.assert_close(model(ids).logits, torch.load(folder + '/expected.pt', weights_only=True), rtol=0, atol=1e-5)",
        folder=str(tmp_path))


def test_frozen_sigma_and_random_biases_are_what_the_released_code_does():
    model = small(freeze_sigma=True, random_biases=True)
    lora = get_peft_model(model, lora_config(model, rank=4))
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert not any("bandwidth" in name for name in trained) and any("token_gate" in name for name in trained)
    biases = [p for name, p in lora.named_parameters() if name.endswith("bias") and "krause_branch.attention" in name]
    assert len(biases) == 6 and not any(p.requires_grad for p in biases)
    assert all(p.any() for p in biases)


def test_a_model_saved_with_its_branch_loads_with_it(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    loaded, _ = load_language_model(tmp_path)
    assert type(loaded) is LlamaForCausalLM and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert len(branches(remove_krause_branch(loaded))) == 0


def test_a_branch_saved_in_float64_is_loaded_in_float64(tmp_path):
    model = small().double()
    model.save_pretrained(tmp_path)
    loaded = load_with_branch(str(tmp_path), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def without_mark(folder):
    "Write `config.json` as it was before a branch was told by the model type."
    saved = json.loads((folder / "config.json").read_text())
    base = saved["base_config"] | {"model_type": saved["base_model_type"], "krause_branch": saved["krause_branch"]}
    (folder / "config.json").write_text(json.dumps(base))


def test_a_folder_of_an_earlier_version_loads_with_its_branch(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    without_mark(tmp_path)
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    with torch.no_grad():
        assert torch.equal(load_language_model(tmp_path)[0](tokens()).logits, model(tokens()).logits)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)  # knows of no branch
    save_adapter(get_peft_model(plain, lora_config(plain)), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "krause_branch.json").read_text())["settings"] is None


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3", "mistral"])
def test_no_reader_takes_a_saved_model_for_its_base(tmp_path, family, monkeypatch):
    model = small(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="read it with krause_repro.adapters.load_language_model"):
        type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        for options in ({}, {"config": model.config}):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
            assert type(loaded) is type(model) and torch.equal(loaded.eval()(tokens()).logits, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=True, dtype=torch.bfloat16)
    assert loaded.config._attn_implementation == "eager" and loaded.config.output_hidden_states and loaded.dtype == torch.bfloat16
    assert len(branches(loaded)) == 2 and {branch.bandwidth.log_sigma.dtype for branch in branches(loaded)} == {torch.float32}
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})  # as where this package is not imported
    with pytest.raises(ValueError, match="has model type `krause_repro_branch` but Transformers does not recognize"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_keeps_the_branch_wherever_it_goes(tmp_path):
    model = small()
    AutoConfig.from_pretrained(small().save_pretrained(tmp_path) or tmp_path).save_pretrained(tmp_path)
    copied, pickled = copy.deepcopy(model).config, pickle.loads(pickle.dumps(model.config))
    for config in (model.config, copied, pickled, AutoConfig.from_pretrained(tmp_path)):
        assert len(branches(AutoModelForCausalLM.from_config(config))) == 2
        config.save_pretrained(tmp_path / "again")
        with pytest.raises(Exception, match="krause_repro.adapters"):
            LlamaConfig.from_pretrained(tmp_path / "again")
    removed = remove_krause_branch(model).config
    assert type(removed) is LlamaConfig and not branches(AutoModelForCausalLM.from_config(removed))


def test_a_model_shares_no_configuration_with_one_that_gets_a_branch(tmp_path):
    config = LlamaConfig(**SMALL)
    plain, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    add_krause_branch(other)
    assert plain.config is config and not hasattr(config, "krause_branch") and type(config) is LlamaConfig
    assert {id(m.config) for m in (other, other.get_decoder(), *attention_layers(other.get_decoder()).values())} == {id(other.config)}


@pytest.mark.parametrize("change", [{"krause_branch": None}, {"base_config": []}, {"base_model_type": "x"}, {"krause_branch": {"windo": 3}},
                                    {"krause_branch": {"window": 3, "top_k": 4}}])
def test_a_damaged_configuration_of_a_saved_model_is_named(tmp_path, change):
    small().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | change))
    with pytest.raises(ValueError, match="model: .*krause_branch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@over(("arguments", "message"), [
    ({"window": 0}, "window must be an integer ≥ 1, got 0"), ({"window": 2.5}, "window must be an integer"),
    ({"top_k": 0}, "top_k must be an integer ≥ 1, got 0"), ({"window": 8, "top_k": 9}, "top_k must be at most window = 8, got 9"),
    ({"sigma": 0.0}, "sigma"), ({"sigma": float("nan")}, "sigma"), ({"gate_init": 1.1}, "gate_init must be above 0 and at most 1"),
    ({"gate_init": "0.8"}, "gate_init must be above 0 and at most 1"), ({"gate_init": float("nan")}, "gate_init must be above 0"),
    ({"freeze_sigma": "no"}, "freeze_sigma must be True or False"), ({"random_biases": 1}, "random_biases must be True or False"),
    ({"ignore_cache": None}, "ignore_cache must be True or False"),
])
def test_settings_are_refused_before_anything_is_changed(arguments, message):
    model = small(branch=False)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_krause_branch(model, **arguments)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: add_krause_branch(model, windw=8), "add_krause_branch takes no 'windw'; the nearest name is 'window'"),
    (lambda model: add_krause_branch(model, 8, topk=4), "takes no 'topk'; the nearest name is 'top_k'"),
    (lambda model: lora_config(model, rnk=8), "lora_config takes no 'rnk'; the nearest name is 'rank'"),
    (lambda model: add_adapter(model, "nowhere", trainible=True), "add_adapter takes no 'trainible'; the nearest name is 'trainable'"),
    (lambda model: save_adapter(model, "nowhere", bas={}), "save_adapter takes no 'bas'; the nearest name is 'base'"),
])
def test_a_misspelt_name_is_told_with_the_nearest(call, message):
    model = small(branch=False)
    names = set(model.state_dict())
    with pytest.raises(TypeError, match=message):
        call(model)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 0}, "rank must be an integer ≥ 1"), ({"alpha": 0}, "alpha must be a number > 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
])
def test_lora_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(small(branch=False), **options)


def test_what_cannot_have_a_branch_is_refused():
    with pytest.raises(ValueError, match="q_proj, k_proj, v_proj, o_proj, and GPT2Model has none"):
        add_krause_branch(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match="already has a Krause branch"):
        add_krause_branch(small())
    with pytest.raises(ValueError, match="model has no Krause branch"):
        remove_krause_branch(small(branch=False))
    base = small(branch=False)
    with pytest.raises(ValueError, match="add the Krause branch to the base model first"):
        add_krause_branch(get_peft_model(base, lora_config(base)))
    own = LanguageModel(LanguageModelConfig(**OWN, mixer="standard"))
    image = ImageTransformer(ImageTransformerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    for model, ids in ((own, tokens(4)), (image, tokens(4))):
        before = model.eval()(ids).logits
        with pytest.raises(ValueError, match=f"model must be a pretrained one .* and {type(model).__name__} has its attention"):
            add_krause_branch(model, 4, 2)
        assert torch.equal(model(ids).logits, before) and not branches(model)


@pytest.mark.parametrize("grad", [True, False])
def test_packed_rows_are_the_sequences_alone(grad):
    model, ids, cuts = small(), tokens(20)[:1], (6, 7, 16)
    positions = torch.cat([torch.arange(len(part)) for part in torch.arange(20).tensor_split(cuts)])[None]
    with torch.set_grad_enabled(grad), recorded_branches() as records:
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.tensor_split(cuts, 1)]
        assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)
        both = model(ids.expand(2, -1), position_ids=torch.cat([positions, torch.arange(20)[None]]), use_cache=False).logits
        assert_close(both, torch.cat([packed, model(ids, use_cache=False).logits]), rtol=0, atol=1e-5)
    assert not records[0]["weights"][:, :, 6:, :6].any()
    if grad:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for one, other in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (packed, torch.cat(alone, 1))), strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_masks_and_caches_that_do_not_fit_are_refused():
    model, ids = small(), tokens(12)
    for options in ({}, {"attention_mask": torch.ones(2, 12), "use_cache": False}):
        with pytest.raises(ValueError, match="position_ids must increase by one .* need use_cache=False and no attention_mask"):
            model(ids, position_ids=torch.arange(6).repeat(2)[None].expand(2, -1), **options)
    documents = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    documents[:, :, :6, :6] = documents[:, :, 6:, 6:] = torch.ones(6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask must be causality plus padding"):
        model(ids, attention_mask=documents)
    with pytest.raises(ValueError, match="attention_mask must have 12 columns, one per token so far, got 9"):
        model(ids, attention_mask=torch.ones(2, 9, dtype=torch.long))
    for mask, message in ((torch.ones(2, 1, 12, 12), "0 and at most −10⁴"), (torch.zeros(2, 1, 12, 12).fill_(torch.nan), "at most −10⁴"),
                          (torch.zeros(2, 4, 12, 12), r"T must be 12, columns 12 or more, got \(2, 4, 12, 12\)"),
                          (torch.zeros(2, 1, 11, 12), "T must be 12"), (torch.zeros(2, 1, 12, 11), "columns 12 or more")):
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask)
    filled = remove_krause_branch(copy.deepcopy(model))(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="past_key_values was filled without this Krause branch"):
        model(ids[:, :1], cache=filled)
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    with torch.no_grad():
        for mask in (causal, torch.zeros(causal.shape).masked_fill(~causal, -1e9)):
            assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, rtol=0, atol=1e-5)


@over("inputs", [{}, {"input_ids": [[1, 2]]}, {"input_ids": torch.tensor(3)}])
def test_inputs_that_cannot_be_are_refused_as_without_a_branch(inputs):
    found = []
    for branch in (False, True):
        with pytest.raises(Exception) as error:  # noqa: PT011, B017
            small(branch=branch)(**inputs)
        found.append((type(error.value), str(error.value)))
    assert found[0] == found[1]


def test_adapters_and_models_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub is not to be waited for
    adapter_on(small(branch=False), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is of another base model: its hidden_size is 32, this model's is 96"):
        add_adapter(small("smollm", branch=False), tmp_path / "adapter")
    other = small(branch=False)
    with torch.no_grad():
        next(iter(attention_layers(other).values())).q_proj.weight *= 1.1
    with pytest.raises(ValueError, match="its weights and this model's are 10.0% apart in the layer 0 q_proj, where 2% is allowed"):
        add_adapter(other, tmp_path / "adapter")
    assert not branches(other)
    (tmp_path / "adapter" / "krause_branch.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no krause_branch.json"):
        add_adapter(small(branch=False), tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="there is no folder or file .*nowhere/at-all"):
        load_language_model("nowhere/at-all")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(LlamaConfig(**SMALL).to_dict()))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has pickled weights, pytorch_model.bin, which could run code and are not read"):
        load_language_model(pickled)
    with pytest.raises(FileNotFoundError, match="neither config.json nor a .gguf file"):
        load_language_model(tmp_path)


def test_settings_are_the_papers():
    assert BranchSettings() == BranchSettings(32, 16, 5.5, 0.8, False, False, False)
    config = lora_config(small())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert lora_config(small(branch=False)).modules_to_save is None
    assert isinstance(get_peft_model(small(), config), PeftModel)


def adapter_on(base, folder, **changes):
    "Save an adapter for a base model, with every trained number away from its start."
    add_krause_branch(base, **{**BRANCH, **changes})
    model = get_peft_model(base, lora_config(base, rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, folder)
    return model.eval()


# Half precision


def test_gate_and_sigma_are_trained_in_float32_on_a_bfloat16_base():
    base = add_krause_branch(small(branch=False).bfloat16(), **BRANCH)
    model = get_peft_model(base, lora_config(base, rank=4)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and ("bandwidth" in name or "token_gate" in name)}
    assert len(trained) == 6 and {p.dtype for p in trained.values()} == {torch.float32}
    start = {name: p.clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=5e-5, weight_decay=0.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimiser.step()
    for name, p in trained.items():
        assert p.grad.any(), name
        assert_close((p - start[name]).abs().max(), torch.tensor(5e-5), rtol=0.02, atol=0, msg=name)


def test_a_bfloat16_model_loads_as_it_was_saved(tmp_path, monkeypatch):
    small(branch=False).save_pretrained(tmp_path)
    model = add_krause_branch(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), **BRANCH)
    with torch.no_grad():
        for branch in branches(model):
            branch.bandwidth.log_sigma += 1e-3  # lost in bfloat16
            branch.token_gate.proj.bias += 1e-3
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded, _ = load_language_model(tmp_path, **options)
        saved, state = model.state_dict(), loaded.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(state[name], p) and state[name].dtype == p.dtype for name, p in saved.items())
        assert {p.dtype for name, p in state.items() if "bandwidth" in name or "token_gate" in name} == {torch.float32}
        assert state["model.layers.0.self_attn.krause_branch.attention.q_proj.weight"].dtype == torch.bfloat16
        assert loaded.generation_config.disable_compile and torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_missing_weights_of_a_branch_are_an_error(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.self_attn.krause_branch.bandwidth.log_sigma"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    with pytest.raises(ValueError, match="lacks 1 weights, such as model.layers.1.self_attn.krause_branch.bandwidth.log_sigma"):
        load_language_model(tmp_path)


# NaN and derivatives


@pytest.fixture
def steps(monkeypatch):
    "What `native_branch_step` has returned so far."
    seen, step = [], branched_models.native_branch_step
    monkeypatch.setattr(branched_models, "native_branch_step", lambda *arguments: seen.append(step(*arguments)) or seen[-1])
    return seen


@pytest.mark.parametrize("family", ["llama", "wide llama", "qwen3"])
@pytest.mark.parametrize("cached", [False, True])
def test_nan_in_padding_or_in_a_later_token_does_not_reach_the_branch(family, cached):
    "What the first layer's branch gives; the base model's own softmax lets a NaN in padding through."
    model, ids, pad = small(family), tokens(15) % 60, 60
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4], ids[1, 9] = 0, pad, pad
    positions, outputs = (mask.cumsum(1) - 1).clamp(min=0), []
    gate = branches(model)[0].token_gate
    gate.register_forward_pre_hook(lambda gate, args: outputs.append(args[1]))

    @torch.no_grad()
    def krause():
        outputs.clear()
        cache = DynamicCache() if cached else None
        for new in ((slice(0, 7), *(slice(t, t + 1) for t in range(7, 15))) if cached else (slice(0, 15),)):
            model(ids[:, new], attention_mask=mask[:, :new.stop], position_ids=positions[:, new], cache=cache, use_cache=cached)
        return torch.cat(outputs, 1)

    expected = krause()
    model.get_input_embeddings().weight.data[pad] = float("nan")
    got = krause()
    for row, real in ((0, slice(4, 15)), (1, slice(0, 9)), (1, slice(15, 15))):
        assert_close(got[row, real], expected[row, real], rtol=0, atol=1e-5)
    assert got[1, 9].isnan().all()


@pytest.mark.parametrize("family", ["llama", "wide llama"])
@pytest.mark.parametrize("cached", [False, True])
def test_forward_derivatives_go_through_a_branch(steps, family, cached):
    "In float32, where operators of our own are used otherwise, as in float64."
    ids, tangents = tokens(9), []
    for dtype in (torch.float32, torch.float64):
        model = small(family).to(dtype)
        model.set_attn_implementation("eager")
        embedded = model.get_input_embeddings()(ids).detach()
        direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            dual, cache = torch.autograd.forward_ad.make_dual(embedded, direction), DynamicCache() if cached else None
            for part in (dual[:, :8], dual[:, 8:]) if cached else (dual,):
                logits = model(inputs_embeds=part, cache=cache, use_cache=cached).logits
            tangents.append(torch.autograd.forward_ad.unpack_dual(logits).tangent[:, -1].double())
    assert_close(*tangents, rtol=1e-3, atol=1e-4)
    assert tangents[1].abs().max() > 0.01 and not any(out is not None for out in steps)


def test_a_model_with_a_branch_is_exported_and_leaves_nothing_behind():
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 1})
    model = add_krause_branch(LlamaForCausalLM(config).eval(), window=7, top_k=3)  # a window that nothing else has used
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    options = {"input_ids": tokens(12), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), options, strict=False).module()(**options).logits
        expected = model(**options).logits
        assert type(expected) is torch.Tensor
        assert_close(exported, expected, rtol=0, atol=1e-5)


def test_a_model_with_a_branch_on_the_meta_device_has_shapes():
    with torch.device("meta"):
        model = add_krause_branch(LlamaForCausalLM(LlamaConfig(**SMALL)), **BRANCH)
        first = model(torch.zeros(2, 9, dtype=torch.long), use_cache=True)
        with torch.no_grad():
            assert model(torch.zeros(2, 1, dtype=torch.long), cache=first.cache).logits.shape == (2, 1, 61)


# Which base model


def test_facts_know_a_base_model_by_its_weights():
    base = small(branch=False)
    facts = json.loads(json.dumps(base_fingerprint(base)))
    check_base(copy.deepcopy(base).bfloat16(), facts, "a")
    check_base(get_peft_model(copy.deepcopy(base), lora_config(base)).get_base_model(), facts, "a")
    check_base(add_krause_branch(copy.deepcopy(base)), facts, "a")
    for part in ("embed_tokens", "layers.0", "layers.1", ""):
        sibling = copy.deepcopy(base)
        with torch.no_grad():
            for name, p in sibling.named_parameters():
                p += (0.1 * p.std() * torch.randn_like(p)) if part in name and p.ndim == 2 else 0
        with pytest.raises(ValueError, match="adapter a is of another base model: its weights and this model's are .*% apart in the "):
            check_base(sibling, facts, "a")


def test_facts_of_packed_weights_are_unknown():
    base = small(branch=False)
    packed = copy.deepcopy(base)
    layer = next(iter(attention_layers(packed).values()))
    layer.q_proj.weight = torch.nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    facts = base_fingerprint(packed)
    assert facts["weights"]["layer 0 q_proj"] is None and len(facts["weights"]["layer 1 q_proj"]) == 9
    check_base(base, facts, "a")
    check_base(packed, base_fingerprint(base), "a")


# All or nothing


def test_a_branch_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    model, ids, made = small(branch=False), tokens(), []
    before, names, attributes = model(ids).logits, set(model.state_dict()), set(vars(model.get_decoder()))

    def fails_at_the_second(self, *args, init=KrauseBranch.__init__, **kwargs):
        made.append(self)
        if len(made) == 2:
            raise MemoryError
        init(self, *args, **kwargs)

    monkeypatch.setattr(KrauseBranch, "__init__", fails_at_the_second)
    with pytest.raises(MemoryError):
        add_krause_branch(model)
    assert set(model.state_dict()) == names and set(vars(model.get_decoder())) == attributes
    assert not hasattr(model.config, "krause_branch") and torch.equal(model(ids).logits, before)


def test_a_configuration_that_takes_no_branch_leaves_the_model_as_it_was(monkeypatch):
    class Closed(LlamaConfig):
        def __setattr__(self, name, value):
            if name == "krause_branch":
                raise TypeError(name)
            super().__setattr__(name, value)

    model, ids = LlamaForCausalLM(Closed(**SMALL)).eval(), tokens()
    before = model(ids).logits
    with pytest.raises(TypeError, match="krause_branch"):
        add_krause_branch(model)
    assert torch.equal(model(ids).logits, before) and not branches(model)


def test_a_partly_branched_model_gets_rid_of_its_branches():
    model, ids = small(branch=False), tokens()
    before = model(ids).logits
    add_krause_branch(model, **BRANCH)
    first, second = attention_layers(model).values()
    second._krause_hook.remove()
    del second._krause_hook, second.krause_branch, model.get_decoder().krause_window
    remove_krause_branch(model)
    assert torch.equal(model(ids).logits, before) and not branches(model)
    assert not hasattr(first, "_krause_hook") and not hasattr(model.config, "krause_branch")


def test_an_adapter_that_fails_leaves_the_base_model(tmp_path):
    adapter_on(small(branch=False), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model, ids = small(branch=False), tokens()
    before, names, attributes = model(ids).logits, list(model.state_dict()), set(vars(model))

    def refused(changed, error, message):
        save_file(changed, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(error, match=message):
            add_adapter(model, tmp_path / "adapter")
        assert list(model.state_dict()) == names and set(vars(model)) == attributes and torch.equal(model(ids).logits, before)
        assert all(p.requires_grad for p in model.parameters()) and not hasattr(model.config, "krause_branch")

    for end in ("token_gate.proj.bias", "bandwidth.log_sigma"):
        one = next(name for name in tensors if name.endswith(end))
        refused({name: p for name, p in tensors.items() if name != one}, ValueError, f"lacks krause_branch.{end} for some of 2")
    refused({name: p for name, p in tensors.items() if "lora_B" not in name}, ValueError, "lacks lora_B.weight")
    one = next(name for name in tensors if "lora_A" in name)
    refused({**tensors, one: tensors[one][:2].clone()}, RuntimeError, "size mismatch")  # found while it is loaded
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        add_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {"width": 3}, "base": {}}',
                                  '{"settings": null, "base": {"weights": [0.1, 0.2]}}'])
def test_a_damaged_or_old_branch_file_is_named(tmp_path, text):
    adapter_on(small(branch=False), tmp_path)
    (tmp_path / "krause_branch.json").write_text(text)
    with pytest.raises(ValueError, match="krause_branch.json is damaged or of another version"):
        add_adapter(small(branch=False), tmp_path)


@pytest.mark.parametrize("count", range(1, 4))
def test_a_half_written_adapter_is_refused(tmp_path, monkeypatch, count):
    model = adapter_on(small(branch=False), tmp_path)
    moved = []

    def fails(source, target, replace=os.replace):
        moved.append(target)
        if len(moved) == count:
            raise OSError
        replace(source, target)

    monkeypatch.setattr("krause_repro.adapters.os.replace", fails)
    with pytest.raises(OSError):
        save_adapter(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no krause_branch.json"):
        add_adapter(small(branch=False), tmp_path)
    monkeypatch.undo()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(add_adapter(small(branch=False), tmp_path).eval()(tokens()).logits, model(tokens()).logits)


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    model = adapter_on(small(branch=False), tmp_path / "adapter")
    with torch.no_grad():
        before = model(tokens()).logits
    before_files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    (tmp_path / "adapter" / ".adapter-left").mkdir()  # by a process that was killed
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda *args, **options: (_ for _ in ()).throw(OSError("No space left")))
    for folder in ("adapter", "new"):
        with pytest.raises(OSError, match="No space left"):
            save_adapter(model, tmp_path / folder)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before_files
    with torch.no_grad():
        assert torch.equal(add_adapter(small(branch=False), tmp_path / "adapter").eval()(tokens()).logits, before)


def several(names, branch=True):
    "A model with adapters of these names, all different, the last one active."
    base = small(branch=False)
    if branch:
        add_krause_branch(base, **BRANCH)
    model = get_peft_model(base, lora_config(base, rank=4), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora_config(base, rank=2))
    model.set_adapter(names[-1])
    torch.manual_seed(len(names))
    change(model)
    return model.eval()


def change(model):
    "Move whatever the adapters hold."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def by_adapter(model):
    "Logits of each adapter, and of the active one."
    active, found = model.active_adapter, {"": model(tokens()).logits}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = model(tokens()).logits
    model.set_adapter(active)
    return found


@pytest.mark.parametrize(("names", "branch"), [
    (["mine"], False), (["default", "b"], True), (["b", "default"], False), (["one", "two", "three"], True)])
def test_adapters_of_any_name_are_saved_again_and_again(tmp_path, names, branch):
    model = several(names, branch)
    for _ in range(2):
        expected = by_adapter(model)
        assert save_adapter(model, tmp_path) == tmp_path
        loaded = add_adapter(small(branch=False), tmp_path).eval()
        assert set(loaded.peft_config) == set(names) and loaded.active_adapter == names[-1]
        for name, logits in by_adapter(loaded).items():
            assert torch.equal(logits, expected[name]), name
        for name in set(names) - {"default"}:  # and each by itself
            alone = add_adapter(small(branch=False), tmp_path / name).eval()
            assert list(alone.peft_config) == [name]
            with torch.no_grad():
                assert torch.equal(alone(tokens()).logits, expected[name])
        change(model)
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == len(names)


def test_what_an_adapter_was_saved_over_is_gone(tmp_path):
    (tmp_path / "README.md").write_text("My own words.\n")
    save_adapter(several(["default", "b"]), tmp_path)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    other = several(["mine"])
    loaded = add_adapter(small(branch=False), save_adapter(other, tmp_path)).eval()
    assert list(loaded.peft_config) == ["mine"] and torch.equal(by_adapter(loaded)["mine"], by_adapter(other)["mine"])
    assert not (tmp_path / "adapter_model.safetensors").exists() and [file.name for file in (tmp_path / "b").iterdir()] == ["notes.txt"]
    assert "My own words." in (tmp_path / "README.md").read_text()


def test_the_adapter_that_goes_on_training_is_the_active_one(tmp_path):
    save_adapter(several(["default", "b"]), tmp_path)
    for trainable in (True, False):
        model = add_adapter(small(branch=False), tmp_path, trainable)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(trains) is trainable and all(".b." in name for name in trains)


def test_names_that_no_folder_can_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="an adapter named 'a/b', which cannot be the name of a folder"):
        save_adapter(several(["a/b"]), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_adapter(several(["default"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "krause_branch.json"
    saved = json.loads(file.read_text())
    for names in (["a/b"], [".."], ["."], [3], "default", []):
        file.write_text(json.dumps(saved | {"adapters": names}))
        with pytest.raises(ValueError, match="krause_branch.json is damaged"):
            add_adapter(small(branch=False), tmp_path / "adapter")


def test_models_of_another_kind_are_named(tmp_path):
    save_adapter(several(["default"]), tmp_path)
    for call, error, message in (
        (lambda: add_krause_branch(torch.nn.Linear(2, 2)), TypeError, "model must be a language model of transformers, got Linear"),
        (lambda: save_adapter(small(), tmp_path / "new"), TypeError, "model must be wrapped by peft.*got LlamaForCausalLM"),
        (lambda: add_adapter(several(["default"]), tmp_path), ValueError, "model already has an adapter"),
        (lambda: add_adapter(small(), tmp_path), ValueError, "model already has a Krause branch"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "new").exists()


def test_an_adapter_that_leaves_out_the_gate_is_not_saved(tmp_path):
    model = get_peft_model(small(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' does not save krause_branch.token_gate.* make it with lora_config"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_plain_peft_does_not_read_an_adapter_with_a_branch(tmp_path):
    small(branch=False).save_pretrained(tmp_path / "base")
    model = adapter_on(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "by peft")  # as Trainer does
    add_adapter(small(branch=False), tmp_path / "adapter").save_pretrained(tmp_path / "read and saved")
    with torch.no_grad():
        expected = model(tokens()).logits
        for name in ("adapter", "by peft", "read and saved"):
            for read in (lambda folder: PeftModel.from_pretrained(small(branch=False), folder), AutoPeftModelForCausalLM.from_pretrained,
                         AutoModelForCausalLM.from_pretrained, lambda folder: small(branch=False).load_adapter(folder)):
                with pytest.raises(ValueError, match="read it with krause_repro.adapters.add_adapter"):
                    read(str(tmp_path / name))
            assert torch.equal(add_adapter(small(branch=False), tmp_path / name).eval()(tokens()).logits, expected)


def test_plain_peft_reads_an_adapter_without_a_branch(tmp_path):
    model = several(["default"], branch=False)
    save_adapter(model, tmp_path)
    assert torch.equal(by_adapter(PeftModel.from_pretrained(small(branch=False), tmp_path).eval())[""], by_adapter(model)[""])


def test_an_adapter_of_an_earlier_version_is_read(tmp_path):
    model = several(["default"])
    PeftModel.save_pretrained(model, tmp_path)
    config, facts = (json.loads((tmp_path / name).read_text()) for name in ("adapter_config.json", "krause_branch.json"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    (tmp_path / "krause_branch.json").write_text(json.dumps({name: facts[name] for name in ("settings", "base")}))
    assert torch.equal(by_adapter(add_adapter(small(branch=False), tmp_path).eval())[""], by_adapter(model)[""])


def test_an_adapter_that_names_the_old_module_is_read(tmp_path):
    model = several(["default"])
    save_adapter(model, tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    assert "krause_repro.adapters.add_adapter" in config
    (tmp_path / "adapter_config.json").write_text(config.replace("krause_repro.adapters", "krause_repro.llm_branch"))
    assert torch.equal(by_adapter(add_adapter(small(branch=False), tmp_path).eval())[""], by_adapter(model)[""])


class Bomb:
    "What runs when it is unpickled."

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("what", ["model", "sharded", "adapter"])
def test_pickled_weights_are_refused_and_not_opened(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    small(branch=False).save_pretrained(tmp_path / "model")
    adapter_on(small(branch=False), tmp_path / "adapter")
    folder, name = (tmp_path / "adapter", "adapter_model") if what == "adapter" else (tmp_path / "model", "model")
    pickled = {"adapter": "adapter_model.bin", "model": "pytorch_model.bin", "sharded": "evil.bin"}[what]
    (folder / pickled).write_bytes(pickle.dumps(Bomb()))
    (folder / f"{name}.safetensors").unlink()
    if what == "sharded":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": pickled}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{folder} has pickled weights, {pickled}, which could run code and are not read"):
        add_adapter(small(branch=False), folder) if what == "adapter" else load_language_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_code_beside_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small(branch=False).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("open('exploded', 'w')\nfrom transformers import LlamaForCausalLM as Evil, LlamaConfig as Evils\n")
    config = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Evils",
                                                                                 "AutoModelForCausalLM": "evil.Evil"}}
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **options: options)
    for model_type in ("llama", "evil"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        if model_type == "llama":
            assert load_language_model(tmp_path)[1]["trust_remote_code"] is False
        else:
            with pytest.raises(ValueError, match="requires custom code .* which is never run"):
                load_language_model(tmp_path)
    with pytest.raises(ValueError, match="load_language_model runs no code .* takes no trust_remote_code"):
        (tmp_path / "config.json").write_text(json.dumps(config))
        load_language_model(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "exploded").exists()


def test_options_of_loading_are_checked_by_name(tmp_path, monkeypatch):
    small(branch=False).save_pretrained(tmp_path)
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    for wrong, right in (("dtpe", "dtype"), ("adaptr", "adapter"), ("revison", "revision")):
        with pytest.raises(TypeError, match=f"load_language_model takes no '{wrong}'; the nearest name is '{right}'"):
            load_language_model(tmp_path, **{wrong: 1})
    loaded, _ = load_language_model(tmp_path, dtype=torch.bfloat16, output_hidden_states=True, use_safetensors=True)
    assert loaded.config.output_hidden_states and loaded.dtype == torch.bfloat16


def test_numbers_of_numpy_are_numbers(tmp_path):
    model = small(branch=False)
    add_krause_branch(model, np.int64(6), np.int32(3), np.float32(1.5), np.float64(0.75))
    assert json.dumps(model.config.krause_branch) and model.config.krause_branch["window"] == 6
    lora = get_peft_model(model, lora_config(model, np.int64(4), np.int64(8), np.float32(0.25)))
    save_adapter(lora, tmp_path)
    assert branches(add_adapter(small(branch=False), tmp_path))[0].window == 6


# Generation that would be silently wrong


@pytest.mark.parametrize("wrapped", [False, True])
def test_continuous_batching_is_refused_before_it_begins(wrapped):
    model = small()
    if wrapped:
        model = get_peft_model(model, lora_config(model))
    ran = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for call in (lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=4), lambda: model.init_continuous_batching(),
                 lambda: model.generate(input_ids=tokens(5), cache_implementation="paged", max_new_tokens=4)):
        with pytest.raises(ValueError, match="continuous batching .* keeps keys in pages"):
            call()
    ran.remove()
    with pytest.raises(ValueError, match="continuous batching"):
        model(input_ids=tokens(5), cache=object())
    plain = small()
    assert "init_continuous_batching" not in vars(remove_krause_branch(plain))


# What a branch is told


def test_layers_that_drop_the_padding_cannot_have_a_branch():
    torch.manual_seed(0)
    model = add_krause_branch(StableLmForCausalLM(StableLmConfig(**SMALL)).eval())
    with pytest.raises(ValueError, match="StableLmAttention was called without krause_padding.*the layers of StableLmModel do not receive"):
        model(tokens())


def test_arguments_may_be_given_by_place():
    model, ids, seen = small(), tokens(17), []
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    layer = next(iter(attention_layers(model).values()))
    layer.register_forward_hook(lambda m, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True)
    decoder, positions = model.get_decoder(), (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        by_name = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        assert_close(decoder(ids, mask, positions, None, use_cache=False)[0], by_name, rtol=0, atol=0)
        kwargs, output = dict(seen[0][0]), seen[0][1]
        places = [kwargs.pop(name) for name in ("hidden_states", "position_embeddings", "attention_mask")]
        assert_close(layer(*places, **kwargs)[0], output, rtol=0, atol=0)
        assert not torch.equal(decoder(ids, use_cache=False)[0], by_name)


def test_columns_of_padding_are_those_of_the_keys():
    padding = torch.arange(11)[None].expand(2, -1)  # the positions themselves
    for past, new, expected in ((0, 11, range(11)), (0, 1, [10]), (10, 1, [8, 9, 10, 7]), (9, 2, range(6, 11)), (2, 9, range(11))):
        assert padding_of_keys(padding, past, new, 4)[0].tolist() == list(expected)
    assert padding_of_keys(padding[:, :3], 2, 1, 4)[0].tolist() == [0, 1, 2]


def test_a_cache_goes_back_as_far_as_its_rings_have_recorded():
    model, ids = small().double(), tokens(16)
    with torch.no_grad():
        whole, cache = model(ids).logits, model(ids[:, :9], use_cache=True).cache
        assert not cache.is_croppable
        with pytest.raises(ValueError, match="cannot remove 1 of 9 tokens: it has recorded 0 overwritten ones"):
            cache.crop(-1)
        cache.activate_past_recording()
        assert cache.is_croppable
        for rejected in (4, 1, 3):
            model(torch.cat([ids[:, 9:10], tokens(rejected)], 1), cache=cache)
            cache.crop(-rejected - 1)
        assert_close(model(ids[:, 9:], cache=cache).logits, whole[:, 9:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "mistral", "wide qwen2"])
def test_a_model_with_a_branch_drafts(family):
    target, draft, ids, options = small("llama").double(), small(family).double(), tokens(9, 1), {"max_new_tokens": 20, "do_sample": False}
    for model, way in ((target, {"assistant_model": draft}), (remove_krause_branch(small("llama")).double(), {"assistant_model": draft}),
                       (draft, {"assistant_early_exit": 1}), (draft, {"prompt_lookup_num_tokens": 2})):
        assert torch.equal(model.generate(ids, **way, **options), model.generate(ids, **options))


def test_assisted_decoding_of_a_branch_without_a_cache_is_refused_before_it_begins():
    model = add_krause_branch(small(branch=False), ignore_cache=True)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="assisted decoding .* is not exact with ignore_cache=True"):
        model.generate(tokens(9, batch=1), prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)


def test_steps_with_a_branch_compile_into_one_graph():
    "The first tokens and one more; without a cache, the model is exported, which needs one graph too."
    torch.manual_seed(0)
    model = add_krause_branch(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval(), **BRANCH)
    ids, cache, parts = tokens(11, batch=1), None, []
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for part in ids.split([10, 1], 1):
            output = step(part, past_key_values=cache, use_cache=True)
            cache = output.get("past_key_values", output.get("cache"))
            parts.append(output.logits)
        assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-5)
    torch.compiler.reset()


def test_a_short_cache_goes_back():
    model, ids = small(), tokens(6)
    cache = model(ids[:, :5], use_cache=True).cache
    cache.crop(-2)
    with torch.no_grad():
        assert_close(model(ids[:, 3:], cache=cache).logits, model(ids).logits[:, 3:], rtol=0, atol=1e-5)


def test_the_former_choice_to_compile_comes_back():
    for former in (None, False, True):
        model = small(branch=False)
        model.generation_config.disable_compile = former
        assert add_krause_branch(model).generation_config.disable_compile is True
        assert remove_krause_branch(model).generation_config.disable_compile is former


def test_sizes_are_not_read_from_packed_weights():
    model = small(branch=False)
    for layer in attention_layers(model).values():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name).weight = torch.nn.Parameter(torch.zeros(100, 1, dtype=torch.uint8), requires_grad=False)
    for branch in branches(add_krause_branch(model, random_biases=True)):
        assert branch.bandwidth.log_sigma.shape == (4,) and branch.token_gate.proj.weight.shape == (2, 64)
        assert branch.attention.k_proj.bias.shape == (16,) and branch.attention.k_proj.bias.dtype == torch.float32


def test_attention_that_is_not_causal_is_refused():
    model = small(branch=False)
    list(attention_layers(model).values())[1].is_causal = False
    with pytest.raises(ValueError, match="causal self-attention, and layers.1.self_attn is not"):
        add_krause_branch(model)
    assert not branches(model)


# Where a model comes from


def test_options_of_the_hub_reach_configuration_tokenizer_and_weights(monkeypatch):
    hub = {"token": "t", "revision": "r", "cache_dir": "c", "local_files_only": True, "subfolder": "s"}
    calls, config = [], LlamaConfig(**SMALL)
    for name, result in (("AutoConfig", config), ("AutoTokenizer", "tokenizer"), ("AutoModelForCausalLM", small(branch=False))):
        monkeypatch.setattr(f"krause_repro.adapters.{name}.from_pretrained",
                            lambda source, result=result, name=name, **options: calls.append((name, options)) or result)
    load_language_model("some/model", dtype=torch.bfloat16, **hub)
    assert {name for name, _ in calls} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert all(hub.items() <= options.items() for _, options in calls)
    assert [name for name, options in calls if "dtype" in options] == ["AutoModelForCausalLM"]
    config.krause_branch = BRANCH
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(
        lambda kind, source, **options: calls.append(("branched", options)) or (small(), {"missing_keys": set()})))
    calls.clear()
    load_language_model("some/model", **hub)
    assert calls[-1][0] == "branched" and all(hub.items() <= options.items() for _, options in calls)


def test_a_subfolder_of_a_folder(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path / "inner")
    monkeypatch.setattr("krause_repro.adapters.AutoTokenizer.from_pretrained", lambda *a, **k: None)
    loaded, _ = load_language_model(tmp_path, subfolder="inner")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(("family", "count"), [("wide llama", 6), ("wide qwen2", 6), ("wide mistral", 6), ("llama", 0), ("qwen3", 0)])
def test_a_step_of_generation_is_one_operator_where_heads_are_wide_enough(steps, family, count):
    "3 tokens in 2 layers."
    with torch.no_grad():
        in_pieces(small(family), tokens(8), (5, 1, 1, 1))
    assert sum(out is not None for out in steps) == (count if kernels_available() else 0)


@pytest.mark.parametrize("family", WIDE)
def test_the_short_way_of_inference_is_the_long_way(family):
    model, ids = small(family), tokens()
    with torch.no_grad():
        short = model(ids).logits
    assert_close(short, model(ids).logits, rtol=0, atol=1e-5)
    for layer in attention_layers(model).values():  # whoever puts another forward on a layer gets it
        own = layer.krause_branch.attention
        own.forward = lambda *args, forward=own.forward, **kwargs: (forward(*args, **kwargs)[0] * 2, None)
    with torch.no_grad():
        assert (model(ids).logits - short).abs().max() > 1e-3


@pytest.mark.parametrize(("batch", "count"), [(1, 6), (16, 6), (17, 0)])
def test_a_step_of_many_sequences(steps, batch, count):
    model, ids = small("wide llama"), tokens(8, batch)
    with torch.no_grad():
        assert_close(in_pieces(model, ids, (5, 1, 1, 1)), model(ids).logits, rtol=0, atol=1e-5)
    assert sum(out is not None for out in steps) == (count if kernels_available() else 0)


def test_each_sequence_of_a_step_has_its_positions(steps):
    model, ids = small("wide llama"), tokens(9)
    where = torch.arange(9) + torch.tensor([[0], [5]])
    with torch.no_grad():
        whole = model(ids, position_ids=where).logits
        first = model(ids[:, :8], position_ids=where[:, :8], use_cache=True)
        last = model(ids[:, 8:], position_ids=where[:, 8:], cache=first.cache).logits
    assert_close(last, whole[:, 8:], rtol=0, atol=1e-5)
    assert len(steps) == (2 if kernels_available() else 0)


def test_dropout_of_a_step_is_that_of_the_layer(steps):
    "A model in training mode, without gradients; all is dropped, so that the branch's output is that of no attention."
    model, ids = small("wide llama").train(), tokens(8)
    for layer in attention_layers(model).values():
        layer.krause_branch.attention.attention_dropout = 1.0
        layer.krause_branch.attention.o_proj.bias.data.zero_()
        layer.krause_branch.attention.o_proj.weight.data.mul_(1e3)
    with torch.no_grad():
        cached = in_pieces(model, ids, (5, 1, 1, 1))
        for layer in attention_layers(model).values():
            layer.krause_branch.attention.o_proj.weight.data.zero_()
        assert_close(cached, in_pieces(model, ids, (5, 1, 1, 1)), rtol=0, atol=1e-5)
    assert not steps


def test_a_patched_class_is_used_as_it_is(monkeypatch):
    model, ids = small("wide llama"), tokens(8)
    with torch.no_grad():
        plain = model(ids).logits
        forward = LlamaAttention.forward
        monkeypatch.setattr(LlamaAttention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 2, None))
        assert (model(ids).logits - plain).abs().max() > 1e-3
    monkeypatch.undo()
    branch = branches(model)[0]
    for name in ("q_proj", "o_proj"):  # as accelerate's hooks do
        proj = getattr(branch.attention, name)
        proj.forward = lambda x, forward=proj.forward: forward(x) * 2
    with torch.no_grad():
        assert_close(in_pieces(model, ids, (5, 1, 1, 1)), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("watched", ["attention.q_proj", "attention.o_proj", "token_gate", "token_gate.proj", "bandwidth"])
def test_a_part_that_is_watched_is_run(steps, watched):
    model, ids, seen = small("wide llama"), tokens(8), []
    branches(model)[0].get_submodule(watched).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert_close(in_pieces(model, ids, (5, 1, 1, 1)), model(ids).logits, rtol=0, atol=1e-5)
    assert len(seen) == 4 + 1


def test_positions_of_one_dimension():
    "As a caller may give them; the base model broadcasts them."
    model, ids = small("wide llama"), tokens(9, 1)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).cache
        step = model(ids[:, 8:], position_ids=torch.tensor([8]), cache=cache).logits
        assert_close(step, model(ids).logits[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["bfloat16", "float64", "transposed weights", "lora", "gradient", "autocast"])
def test_what_is_not_for_the_operator_takes_the_other_way(steps, change):
    model, ids = small("wide llama"), tokens(8)
    if change == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    elif change == "transposed weights":
        for branch in branches(model):
            branch.attention.k_proj.weight.data = branch.attention.k_proj.weight.data.T.contiguous().T
    elif change in ("bfloat16", "float64"):
        model.to(getattr(torch, change))
    in_16_bits = change in ("bfloat16", "autocast")
    with torch.set_grad_enabled(change == "gradient"), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        cache = model(ids[:, :5], use_cache=True).cache
        step = model(ids[:, 5:6], cache=cache).logits
        assert_close(step, model(ids[:, :6]).logits[:, 5:], rtol=0, atol=0.1 if in_16_bits else 1e-5)
    assert all(out is None for out in steps)


def test_a_gate_that_is_wrapped_is_used_with_its_wrapping():
    model = get_peft_model(small(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    gate, (standard, krause) = branches(model)[0].token_gate, torch.randn(2, 1, 5, 32)
    share = gate.proj(torch.cat([standard, krause], -1)).softmax(-1)[..., :1]
    assert type(gate.proj) is not torch.nn.Linear
    assert_close(gate(standard, krause), share * standard + (1 - share) * krause)


def test_an_adapter_is_saved_from_weights_gathered_elsewhere(tmp_path):
    "As under FSDP, where a process holds only a part of the model."
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["bandwidth", "token_gate"])
    part, whole = (get_peft_model(small("wide llama"), config) for _ in range(2))
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    save_adapter(part, tmp_path / "adapter", whole.state_dict(), base=base_fingerprint(remove_krause_branch(small("wide llama"))))
    loaded = add_adapter(remove_krause_branch(small("wide llama")), tmp_path / "adapter").eval()
    assert branches(loaded)[0].bandwidth.log_sigma.mean() > branches(part)[0].bandwidth.log_sigma.mean() + 0.2
    for name, tensor in whole.state_dict().items():
        if "lora" in name or "modules_to_save" in name:
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_fsdp_wraps_each_layer_of_a_language_model_with_its_branch():
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = get_peft_model(small(), lora_config(small()))
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = [part for part in model.modules() if plugin.auto_wrap_policy(module=part, recurse=False, nonwrapped_numel=0)]
    assert [type(part) for part in wrapped] == [LlamaDecoderLayer] * 2 and all(len(branches(part)) == 1 for part in wrapped)
