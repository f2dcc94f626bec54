"""One model for ViT, KViT and the controls: counts, saving, torchvision, hand-computed blocks, schedules and refusals."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import over
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTModel

from krause_repro.author_checkpoints import convert_vit, load_author_checkpoint, load_into, recognise, swin_config, vit_config
from krause_repro.recipes import RECIPES
from krause_repro.reference import SCORES, Full, GridWindow
from krause_repro.swin import SwinClassifier
from krause_repro.vision_transformer import (
    SIZES,
    VisionTransformer,
    VisionTransformerConfig,
    largest_radius,
    resize_positions,
    rotary_table,
    rotate,
    top_k_schedule,
    vision_neighborhood,
)

PUBLISHED = [name for name, recipe in RECIPES.items() if "parameters" in recipe.published]


def tiny(**changes):
    "Settings of a model of 1 + 4×4 tokens."
    settings = {
        "image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
        "num_labels": 5, "drop_path": 0.0,
    }
    return VisionTransformerConfig(**settings | changes)


def build(seed=0, **changes):
    "A tiny model in eval mode, with every parameter away from its initial value."
    torch.manual_seed(seed)
    model = VisionTransformer(tiny(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(batch=2, seed=1, size=8):
    "Random images."
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_every_row_of_tables_1_to_3_states_its_parameters():
    assert len(PUBLISHED) == 8 + 8 + 10


@over("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = VisionTransformer(RECIPES[name].config)
    assert sum(parameter.numel() for parameter in model.parameters()) == RECIPES[name].published["parameters"]


def test_defaults_are_the_small_model_and_sizes_are_the_papers():
    config = VisionTransformerConfig()
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == tuple(SIZES["S"].values()) == (384, 6, 1536)
    for size in SIZES.values():
        assert size["hidden_size"] == 64 * size["num_attention_heads"] and size["intermediate_size"] == 4 * size["hidden_size"]


# Saving


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "norm": "pre", "attention_metric": "chebyshev", "attention_radius": 2},
                                     {"attention_score": "softmax", "attention_radius": None, "attention_top_k": None}])
def test_saved_model_is_found_again_by_the_auto_class(tmp_path, changes):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is VisionTransformer and not again.training
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert vision_neighborhood(again.config) == vision_neighborhood(model.config)
    assert [block.attention.top_k for block in again.blocks] == [block.attention.top_k for block in model.blocks]
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys() and all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    if "attention_score" not in changes:
        sigma = [block.attention.sigma.item() for block in again.blocks]
        assert len(set(sigma)) == 3 and 2.5 not in sigma
    with torch.no_grad():
        assert torch.equal(again(images()).logits, model(images()).logits)


def test_initial_values():
    torch.manual_seed(0)
    model = VisionTransformer(tiny(hidden_size=128, intermediate_size=256, sigma=3.5, num_labels=40))
    for weight in (model.cls_token, model.position_embedding, model.head.weight):
        assert 0.015 < weight.std() < 0.025
    for block in model.blocks:
        assert_close(block.attention.sigma, torch.tensor([3.5]))
        for layer in (block.attention.q_proj, block.attention.o_proj, block.mlp[0]):
            limit = math.sqrt(6 / sum(layer.weight.shape))
            assert layer.weight.abs().max() <= limit and layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
            assert not layer.bias.any()


# Other implementations


def test_softmax_vit_is_torchvisions():
    torch.manual_seed(0)
    other = TorchvisionViT(image_size=12, patch_size=4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=40, num_classes=7).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model = VisionTransformer(vit_config(img_size=12, patch_size=4, num_classes=7, d_model=16, n_heads=2, n_layers=3, d_ff=40)).eval()
    load_into(model, convert_vit(other.state_dict()), "vit_baseline")
    pixels = images(3, size=12)
    with torch.no_grad():
        expected = other(pixels)
        assert_close(model(pixels).logits, expected, rtol=0, atol=1e-5)
        assert_close(model(pixels, output_attentions=True).logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


PARITY = Path(__file__).parent / "parity"
ARCHITECTURES = {  # a file of the authors' tensors: what it is said to be
    "kvit_4neighbour": "a KViT, kind kvit_4neighbour or kvit_5x5", "kvit_5x5": "a KViT, kind kvit_4neighbour or kvit_5x5",
    "vit_baseline": "torchvision's ViT, kind vit_baseline",
    "kswin_attention_shifted": "one attention of a KSwin, kind kswin_attention_plain or kswin_attention_shifted or kswin_attention_small",
}
NAMES = {  # names of the released autoregressive and language models
    "karm": (["token_emb.weight", "layers.0.attn.log_sigma"], "a KARM, kind karm"),
    "larm": (["token_emb.weight", "layers.0.attn.q_proj.weight"], "an ARM or LARM, kind arm or larm"),
    "llama": (["model.layers.0.self_attn.q_proj_krause.weight"], "a language model with a Krause branch, for which there is no kind"),
}


@over("asked", ["kvit_5x5", "vit_baseline", "kswin", "swin_baseline"])
@over("given", ARCHITECTURES)
def test_a_checkpoint_of_another_architecture_is_told_what_it_is(given, asked):
    said = ARCHITECTURES[given]
    state = {f"module.{key.removeprefix('state.')}": t for key, t in load_file(PARITY / f"{given}.safetensors").items() if "state." in key}
    swin, vit = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4]}, {"d_model": 24, "n_heads": 2, "n_layers": 6, "d_ff": 8}
    with pytest.raises(ValueError, match=f"does not fit kind '{asked}' with this configuration.*: missing") as error:
        load_author_checkpoint(asked, state, **swin if "swin" in asked else vit)
    assert (f"(its names are those of {said})" in str(error.value)) == (asked not in said.split())


@pytest.mark.parametrize("given", NAMES)
def test_a_checkpoint_of_another_kind_of_model_is_told_what_it_is(given):
    names, said = NAMES[given]
    with pytest.raises(ValueError) as error:
        load_author_checkpoint("kvit_5x5", {name: torch.zeros(1) for name in names})
    assert f"does not fit kind 'kvit_5x5' with this configuration (its names are those of {said}): missing" in str(error.value)


@pytest.mark.parametrize(("score", "kind"), [("krause", "kswin"), ("softmax", "swin_baseline")])
def test_a_swin_is_told_what_it_is(score, kind):
    shape = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "num_classes": 5}
    state = SwinClassifier(swin_config(score, **shape)).state_dict()
    assert not recognise({}) and recognise(state)[1] == (kind,)
    for asked in {"kswin", "swin_baseline"} - {kind}:
        with pytest.raises(ValueError, match=f"does not fit kind '{asked}' .*{recognise(state)[0]}, kind {kind}.: "):
            load_author_checkpoint(asked, state, **shape)
    with pytest.raises(ValueError, match=f"does not fit kind '{kind}' with this configuration: missing"):
        load_author_checkpoint(kind, state, **shape | {"depths": [1, 2]})


def layer_norm(x, layer):
    "Layer norm, spelled out."
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def reference_attention(x, attention, mask, krause):
    "Attention of one block from its definition, one head after the other."
    dim, heads = x.shape[-1] // attention.heads, []
    query, key, value = (x @ layer.weight.T + layer.bias for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    for h in range(attention.heads):
        q, k, v = (t[..., h * dim: (h + 1) * dim] for t in (query, key, value))
        logits = -torch.cdist(q, k).square() / (2 * attention.log_sigma.exp() ** 2) if krause else q @ k.mT / dim**0.5
        logits = logits.masked_fill(~mask, -torch.inf)
        if attention.top_k is not None:
            logits = logits.masked_fill(logits < logits.sort(-1, descending=True).values[..., attention.top_k - 1, None], -torch.inf)
        heads.append((logits.exp() / logits.exp().sum(-1, keepdim=True)) @ v)
    return torch.cat(heads, -1) @ attention.o_proj.weight.T + attention.o_proj.bias


def mlp(x, layers):
    "Two linear maps around the exact GELU."
    hidden = x @ layers[0].weight.T + layers[0].bias
    return hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)) @ layers[3].weight.T + layers[3].bias


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("score", ["krause", "softmax"])
def test_block_by_hand(norm, score):
    block = build(norm=norm, attention_score=score).double().blocks[1]
    x = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask, krause = GridWindow(4, 4, 1, "manhattan").mask(17), score == "krause"
    if norm == "post":
        middle = layer_norm(x + reference_attention(x, block.attention, mask, krause), block.norm1)
        expected = layer_norm(middle + mlp(middle, block.mlp), block.norm2)
    else:
        middle = x + reference_attention(layer_norm(x, block.norm1), block.attention, mask, krause)
        expected = middle + mlp(layer_norm(middle, block.norm2), block.mlp)
    assert_close(block(x)[0], expected, rtol=0, atol=1e-10)
    assert block.attention.top_k == 3


def test_model_is_embedding_blocks_norm_and_head():
    model, pixels = build(), images()
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        tiles = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, 16, 12), row-major
        patches = tiles @ model.patch_embedding.weight.flatten(1).T + model.patch_embedding.bias
        x = torch.cat([model.cls_token.expand(2, 1, 16), patches], 1) + model.position_embedding
        assert_close(output.hidden_states[0], x, rtol=0, atol=1e-5)
        for block in model.blocks:
            x = block(x)[0]
        assert_close(output.logits, model.head(model.norm(x)[:, 0]), rtol=0, atol=1e-5)


# Schedules and supports


def test_top_k_schedule():
    assert top_k_schedule(2, 4, 12) == [2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4]
    assert top_k_schedule(8, 16, 12) == [8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15, 16]
    assert top_k_schedule(4, 2, 3) == [4, 3, 2]
    assert top_k_schedule(5, 5, 4) == [5] * 4
    assert top_k_schedule(2, 4, 1) == [2]


def test_each_layer_keeps_its_own_k_inside_the_window():
    model = build(attention_top_k=(2, 6), attention_radius=1, attention_metric="manhattan")
    with torch.no_grad():
        attentions = model(images(), output_attentions=True).attentions
    mask = GridWindow(4, 4, 1, "manhattan").mask(17)
    for k, block, weights in zip((2, 4, 6), model.blocks, attentions, strict=True):
        assert block.attention.top_k == k
        assert torch.equal((weights > 0).sum(-1), mask.sum(-1).clamp_max(k).expand(2, 2, 17))
        assert not weights[..., ~mask].any()
    assert [block.attention.top_k for block in build(attention_top_k=None).blocks] == [None] * 3


def test_neighbourhood_of_a_config():
    assert vision_neighborhood(tiny()) == GridWindow(4, 4, 1, "manhattan")
    assert vision_neighborhood(tiny(attention_radius=2, attention_metric="chebyshev", patch_size=1)) == GridWindow(8, 8, 2)
    assert vision_neighborhood(tiny(attention_radius=None)) == Full()


@pytest.mark.parametrize("metric", ["manhattan", "chebyshev"])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_the_largest_radius_is_the_smallest_that_reaches_everything(side, metric):
    radius = largest_radius(side, side, metric)
    assert GridWindow(side, side, radius, metric).mask(1 + side**2).all()
    assert radius == 0 or not GridWindow(side, side, radius - 1, metric).mask(1 + side**2).all()
    shape = {"image_size": 2 * side, "attention_metric": metric}
    assert vision_neighborhood(tiny(**shape, attention_radius=radius)) == GridWindow(side, side, radius, metric)
    with pytest.raises(ValueError, match=f"attention_radius must be at most {radius} on a grid of {side}×{side}"):
        tiny(**shape, attention_radius=radius + 1)


@pytest.mark.parametrize("score", SCORES)
def test_channels_last_is_the_same_model(score):
    "The layout of pixels and filters in memory may change the order of a sum, and nothing else."
    model, pixels = build(attention_score=score), images(4)
    moved = build(attention_score=score).to(memory_format=torch.channels_last)
    laid = pixels.contiguous(memory_format=torch.channels_last)
    assert moved.patch_embedding.weight.is_contiguous(memory_format=torch.channels_last) and not laid.is_contiguous()
    with torch.no_grad():
        assert_close(moved(laid).logits, model(pixels).logits, rtol=0, atol=1e-5)


def test_rotary_scores_depend_on_the_offset_alone():
    side, dim = 5, 8
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = [rotate(x.expand(1, 1, 1 + side**2, dim), (side, side))[0, 0] for x in (query, key)]
    for one, x in zip(turned, (query, key), strict=True):
        assert_close(one.norm(dim=-1), x.norm().expand(1 + side**2), rtol=1e-6, atol=0)
        assert torch.equal(one[0], x)  # the CLS token is not turned
        assert torch.equal(one[1], x)  # nor is the first patch
    scores = (turned[0][1:] @ turned[1][1:].T).reshape(side, side, side, side)
    found = {}
    for r in range(side):
        for c in range(side):
            for other_r in range(side):
                for other_c in range(side):
                    found.setdefault((other_r - r, other_c - c), []).append(scores[r, c, other_r, other_c].item())
    for values in found.values():
        assert values == pytest.approx([values[0]] * len(values), abs=1e-5)
    assert max(abs(found[offset][0] - found[0, 0][0]) for offset in ((0, 1), (1, 0), (1, 2))) > 1e-3
    assert abs(found[1, 0][0] - found[0, 1][0]) > 1e-3


def test_rotary_model_trains_after_predicting():
    model = build(positions="rotary", hidden_size=24)
    with torch.inference_mode():
        predicted = model(images()).logits
    assert not rotary_table(4, 4, 12, torch.device("cpu")).is_inference()
    logits = model(images()).logits
    assert_close(logits, predicted, rtol=0, atol=1e-6)
    logits.sum().backward()
    plain = VisionTransformer(tiny(hidden_size=24)).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(images()).logits, logits, atol=1e-4)


# Forward


def test_labels_as_indices_and_as_probabilities():
    model, labels = build(), torch.tensor([3, 0])
    with torch.no_grad():
        logits = model(images()).logits
        indices, one_hot = model(images(), labels=labels), model(images(), labels=F.one_hot(labels, 5).float())
        soft = torch.tensor([[0.7, 0.1, 0.1, 0.1, 0.0], [0.2] * 5])
        mixed = model(images(), labels=soft)
    log_probability = logits - logits.exp().sum(-1, keepdim=True).log()
    assert_close(indices.loss, -log_probability[[0, 1], labels].mean())
    assert_close(one_hot.loss, indices.loss)
    assert_close(mixed.loss, -(soft * log_probability).sum(-1).mean())
    assert model(images()).loss is None


def test_problem_types_have_their_losses():
    "As in 🤗 Transformers; binary cross-entropy by its formula."
    x, classes = images(), torch.tensor([3, 0])
    several, numbers = torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]), torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    for problem, labels in (("multi_label_classification", several), ("regression", numbers), ("single_label_classification", classes)):
        model = build(problem_type=problem)
        assert model.config.problem_type == problem
        found = model(x, labels=labels)
        logits = found.logits.detach()
        wanted = {
            "multi_label_classification": -(several * logits.sigmoid().log() + (1 - several) * (1 - logits.sigmoid()).log()).mean(),
            "regression": (logits - numbers).square().mean(), "single_label_classification": F.cross_entropy(logits, classes),
        }
        assert_close(found.loss, wanted[problem])
        found.loss.backward()
        assert_close(model(x, labels=labels.double() if labels.is_floating_point() else labels.to(torch.int32)).loss, found.loss)
        half = build(problem_type=problem).bfloat16()(x.bfloat16(), labels=labels)
        assert half.loss.dtype == torch.float32 and abs(half.loss - found.loss) < 0.1
    one, height = build(num_labels=1), torch.tensor([0.3, -1.2])
    assert_close(one(x, labels=height).loss, (one(x).logits[:, 0] - height).square().mean())  # as in 🤗: one output is a number
    assert_close(one(x, labels=height.unsqueeze(1)).loss, one(x, labels=height).loss)


@over(("problem", "labels", "message"), [
    (None, torch.tensor([5, 0]), "labels must be classes from 0 to 4, or −100 for none, got 5"), (None, torch.tensor([-1, 0]), "got -1"),
    (None, torch.tensor([[3], [0]]), r"labels must be integers of shape \(2,\) or floating point of shape \(2, 5\) for single_label"),
    (None, torch.tensor([0.0, 1.0]), "got torch.float32"), (None, torch.tensor([True, False]), "got torch.bool"),
    (None, torch.zeros(2, 4), r"\(2, 4\)"), (None, torch.tensor([0, 1, 2]), r"\(3,\)"),
    ("multi_label_classification", torch.tensor([3, 0]), r"floating point of shape \(2, 5\) for multi_label_class.*, got torch.int64"),
    ("multi_label_classification", torch.ones(2, 5, dtype=torch.long), "got torch.int64"), ("regression", torch.zeros(2), "regression"),
    ("regression", torch.zeros(2, 5, dtype=torch.complex64), "got torch.complex64"),
])
def test_labels_of_another_kind_are_refused(problem, labels, message):
    with pytest.raises(ValueError, match=message):
        build(problem_type=problem)(images(), labels=labels)


def test_losses_that_are_not_finite_are_not_hidden():
    model = build()
    assert model(images(), labels=torch.full((2, 5), torch.nan)).loss.isnan()
    assert model(images(), labels=torch.tensor([-100, -100])).loss.isnan()
    assert_close(model(images(), labels=torch.tensor([2, -100])).loss, model(images()[:1], labels=torch.tensor([2])).loss)


@pytest.mark.parametrize("score", SCORES)
def test_shapes_of_what_is_asked_for(score):
    model = build(attention_score=score, attention_radius=None, attention_top_k=None)
    with torch.no_grad():
        plain, full = model(images()), model(images(), output_attentions=True, output_hidden_states=True)
        listed = model(images(), labels=torch.tensor([0, 1]), return_dict=False)
    assert plain.hidden_states is None and plain.attentions is None
    assert_close(plain.logits, full.logits)
    assert [tuple(state.shape) for state in full.hidden_states] == [(2, 17, 16)] * 4
    assert [tuple(weights.shape) for weights in full.attentions] == [(2, 2, 17, 17)] * 3
    for weights in full.attentions:
        assert_close(weights.sum(-1), torch.ones(2, 2, 17))
    assert isinstance(listed, tuple) and [tuple(part.shape) for part in listed] == [(), (2, 5)]


def test_drop_path_is_for_training_alone():
    model, never = build(drop_path=0.5), build(drop_path=0.0)
    assert [block.drop_path.p for block in model.blocks] == [0, 0.25, 0.5]
    with torch.no_grad():
        assert torch.equal(model(images()).logits, never(images()).logits)
        model.train(), never.train()
        assert torch.equal(never(images()).logits, never(images()).logits)
        torch.manual_seed(0)
        drawn = torch.stack([model(images()).logits for _ in range(8)])
    assert len({tuple(logits.flatten().tolist()) for logits in drawn}) > 1


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_reach_every_parameter(score, norm):
    model = build(attention_score=score, norm=norm)
    model(images(4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    parameters = dict(model.named_parameters())
    assert ("blocks.2.attention.log_sigma" in parameters) == (score == "krause")
    for name, parameter in parameters.items():
        assert parameter.grad.isfinite().all(), name
        if score != "softmax" or not name.endswith("k_proj.bias"):  # a constant added to all dot products of a row is no change
            assert parameter.grad.any(), name


def test_a_fixed_sigma_gets_no_gradient():
    model = build(learn_sigma=False)
    model(images(), labels=torch.tensor([0, 1])).loss.backward()
    assert not any("log_sigma" in name for name, _ in model.named_parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {f"blocks.{i}.attention.log_sigma" for i in range(3)} <= set(model.state_dict())


def test_a_fixed_sigma_stays_fixed_when_loaded(tmp_path):
    model = build(learn_sigma=False, sigma=3.0)
    model.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path)
    assert not any("log_sigma" in name for name, _ in loaded.named_parameters())
    assert_close(loaded.blocks[0].attention.sigma, torch.tensor([3.0]))


@over(
    ("changes", "message"),
    [
        ({"attention_score": "cosine"}, "attention_score must be one of krause, softmax, softmax_key_norm, got 'cosine'"),
        ({"attention_metric": "euclid"}, "attention_metric must be one of"),
        ({"norm": "sandwich"}, "norm must be one of post, pre"),
        ({"positions": "alibi"}, "positions must be one of learned, rotary"),
        ({"attention_radius": -1}, "attention_radius must be an integer ≥ 0"),
        ({"attention_radius": 1.5}, "attention_radius must be"),
        ({"attention_radius": 7}, "attention_radius must be at most 6 on a grid of 4×4 patches with the manhattan metric, or None .*got 7"),
        ({"attention_radius": 4, "attention_metric": "chebyshev"}, "attention_radius must be at most 3 on a grid of 4×4 patches"),
        ({"attention_radius": 4, "attention_metric": "chebyshev", "attention_random_seed": 0}, "attention_radius must be at most 3"),
        ({"sigma": math.inf}, "sigma must be a number > 0, got inf"),
        ({"attention_top_k": (2,)}, "attention_top_k must be None or"),
        ({"attention_top_k": (0, 4)}, "attention_top_k must be an integer ≥ 1"),
        ({"image_size": 9}, "image_size must be a multiple of patch_size = 2, got 9"),
        ({"image_size": 0}, "image_size must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"hidden_size": 15}, "num_attention_heads must divide hidden_size = 15, got 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_attention_heads": True}, "num_attention_heads must be"),
        ({"num_labels": 0}, "num_labels must be"),
        ({"positions": "rotary", "hidden_size": 12}, "rotary positions need a head dimension divisible by 4"),
        ({"sigma": 0}, "sigma must be"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"dropout": -0.5}, r"dropout must be in \[0, 1\)"),
        ({"learn_sigma": "no"}, "learn_sigma must be True or False"),
        ({"initializer_range": 0}, "initializer_range must be a number > 0"),
        ({"hidden_size": -16}, "hidden_size must be an integer ≥ 1"),
        ({"attention_random_seed": 2**64}, "attention_random_seed must be an integer below"),
        ({"attention_random_seed": -1}, "attention_random_seed must be an integer ≥ 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# Images of another size


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "hidden_size": 24, "attention_radius": 2},
                                     {"attention_radius": None, "attention_top_k": None}, {"attention_random_seed": 3}])
@pytest.mark.parametrize("size", [16, (6, 14)])
def test_a_model_of_another_size(size, changes, tmp_path):
    "By the call, by loading and by the auto class, to a model built at that size with resized positions, and saved again."
    model, sides = build(**changes), size if isinstance(size, tuple) else (size, size)
    pixels = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(5))
    model.save_pretrained(tmp_path)
    table = model.position_embedding.detach()[0, 1:].T.unflatten(1, (4, 4))[None]
    table = F.interpolate(table, size=[side // 2 for side in sides], mode="bicubic").flatten(2).mT
    wanted = VisionTransformer(tiny(**changes, image_size=size)).eval()
    wanted.load_state_dict(model.state_dict() | {"position_embedding": torch.cat([model.position_embedding.detach()[:, :1], table], 1)})
    logits = wanted(pixels).logits
    assert_close(model(pixels, interpolate_pos_encoding=True).logits, logits, rtol=0, atol=1e-6)
    for kind in (VisionTransformer, AutoModelForImageClassification):
        again = kind.from_pretrained(tmp_path, image_size=size)
        assert again(pixels).logits.equal(logits) and vision_neighborhood(again.config) == vision_neighborhood(wanted.config)
    again.save_pretrained(tmp_path / "again")
    saved = VisionTransformer.from_pretrained(tmp_path / "again")
    assert saved(pixels).logits.equal(logits) and saved.config.image_size == again.config.image_size
    assert again.set_image_size([8, 8]).config.image_size == 8 and again(images()).logits.shape == (2, 5)
    assert model(images(), interpolate_pos_encoding=True).logits.equal(model(images()).logits)


def test_positions_are_resized_as_in_transformers_vit():
    settings = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = ViTModel(ViTConfig(**settings)).embeddings
    for height, width in ((16, 16), (6, 14), (8, 8)):
        found = resize_positions(theirs.position_embeddings, (4, 4), (height // 2, width // 2))
        tokens = torch.zeros(1, 1 + height * width // 4, 16)
        assert_close(found, theirs.interpolate_pos_encoding(tokens, height, width), rtol=0, atol=1e-6)


def test_sizes_that_cannot_be_are_named(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    for size, message in ((9, "image_size must be a multiple of patch_size = 2"), ((8, 9), "got \\[8, 9\\]"), ((8, 8, 8), "one side or"),
                          ("8", "image_size must be"), (2, "attention_radius must be at most 0 on a grid of 1×1")):
        with pytest.raises(ValueError, match=message):
            VisionTransformer.from_pretrained(tmp_path, image_size=size)
        with pytest.raises(ValueError, match=message):
            model.set_image_size(size)
    assert model.config.image_size == 8 and model(images()).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"sides that are multiples of patch_size = 2, got \(2, 3, 8, 9\)"):
        model(torch.zeros(2, 3, 8, 9), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True takes images of other sizes"):
        model(torch.zeros(2, 3, 8, 10))
    for wrong in ({"image_mean": [0.5] * 3}, {"image_mean": [0.5], "image_std": [0.5]}, {"image_mean": [0.5] * 3, "image_std": [0, 1, 1]},
                  {"image_mean": [float("nan")] * 3, "image_std": [1] * 3}):
        with pytest.raises(ValueError, match="image_mean|image_std"):
            tiny(**wrong)
    assert tiny(image_mean=[0, -0.1, 0.5], image_std=[1] * 3).image_mean == [0, -0.1, 0.5]
    offloaded = VisionTransformer(tiny()).to("meta")
    with pytest.raises(ValueError, match="image_size must be changed before weights are offloaded"):
        offloaded.set_image_size(16)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 10), (2, 3, 16, 16), (2, 8, 8, 3)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 8, 8\), got"):
        build()(torch.zeros(shape))
    with pytest.raises(ValueError, match="pixel_values must be floating point, got torch.uint8"):
        build()(torch.zeros(shape, dtype=torch.uint8))
