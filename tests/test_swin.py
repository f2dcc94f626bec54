"""Swin and KSwin: torchvision's model with our attention, a window by its definition, layouts, masks, saving and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import over
from torch.testing import assert_close
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, swin_s, swin_t
from transformers import AutoConfig, AutoModelForImageClassification

from krause_repro.reference import SCORES
from krause_repro.swin import (
    SWIN_SIZES,
    SwinClassifier,
    SwinClassifierConfig,
    WindowAttention,
    join_windows,
    position_index,
    shift_mask,
    split_windows,
    window_layout,
    window_weights,
)


def tiny(**changes):
    "Settings of a model with two stages, on maps of 8×8 and 4×4 tokens."
    settings = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "num_labels": 5, "drop_path": 0.0}
    return SwinClassifierConfig(**settings | changes)


def perturb(module, scale=0.1):
    "Every parameter away from its initial value."
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module.eval()


def build(seed=0, **changes):
    "A tiny model in eval mode."
    torch.manual_seed(seed)
    return perturb(SwinClassifier(tiny(**changes)))


def layer(window=4, shift=0, score="krause", seed=0, dim=8, heads=2, **options):
    "One attention in eval mode, with weights large enough for its softmax to be far from uniform."
    torch.manual_seed(seed)
    return perturb(WindowAttention(dim, [window] * 2, [shift] * 2, heads, score=score, **options), 0.3)


def noise(*shape, seed=1, dtype=torch.float32):
    "Random numbers."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# torchvision


@over("size", [(8, 8), (12, 8), (10, 7), (5, 9), (4, 4), (4, 8), (3, 2), (1, 1)])
@over("shift", [0, 2])
def test_softmax_layer_is_torchvisions(shift, size):
    ours = layer(shift=shift, score="softmax", pad_small_maps=True)
    theirs = ShiftedWindowAttention(8, [4, 4], [shift, shift], 2).eval()
    theirs.load_state_dict(ours.state_dict())
    x = noise(3, *size, 8)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_size", [32, 40, 28])
def test_softmax_model_is_torchvisions(image_size):
    "On maps of 8, 4 and 2; of 10, 5 and 3; of 7, 4 and 2 tokens a side: all of them padded somewhere."
    torch.manual_seed(0)
    theirs = perturb(SwinTransformer([4, 4], 16, [2, 2, 2], [2, 4, 8], [4, 4], num_classes=7), 0.05)
    settings = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "num_labels": 7}
    ours = SwinClassifier(SwinClassifierConfig(image_size=image_size, attention_score="softmax", **settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = noise(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = theirs(pixels)
        assert_close(ours(pixels).logits, expected, rtol=0, atol=1e-6)
        assert_close(ours(pixels, output_attentions=True).logits, expected, rtol=0, atol=1e-6)
        assert expected.std() > 0.1
        ours.train(), theirs.train()
        for model in (ours, theirs):  # the same blocks are dropped
            torch.manual_seed(3)
            model.trained = model(pixels)
        assert_close(ours.trained.logits, theirs.trained, rtol=0, atol=1e-6)
        assert not torch.allclose(theirs.trained, expected)


@pytest.mark.parametrize(("size", "torchvision", "krause_heads"), [("T", swin_t, 138), ("S", swin_s, 282)])
def test_sizes_are_torchvisions_and_one_sigma_for_each_head(size, torchvision, krause_heads):
    with torch.device("meta"):
        for window, image_size, labels, theirs in (
            (7, 224, 1000, torchvision()),
            (4, 32, 10, SwinTransformer([4, 4], 96, list(SWIN_SIZES[size]["depths"]), [3, 6, 12, 24], [4, 4], num_classes=10)),
        ):
            settings = {"window_size": window, "image_size": image_size, "num_labels": labels, **SWIN_SIZES[size]}
            swin, kswin = (SwinClassifier(SwinClassifierConfig(attention_score=score, **settings)) for score in ("softmax", "krause"))
            shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
            assert {name: tensor.shape for name, tensor in swin.state_dict().items()} == shapes
            more = {name: tensor.shape for name, tensor in kswin.state_dict().items() if name not in shapes}
            assert all(name.endswith("attn.log_sigma") for name in more) and len(more) == sum(SWIN_SIZES[size]["depths"])
            assert kswin.num_parameters() - swin.num_parameters() == sum(shape.numel() for shape in more.values()) == krause_heads
    assert kswin.num_parameters() == {"T": 27_510_622, "S": 48_811_390}[size]


def test_initial_values_are_torchvisions():
    torch.manual_seed(0)
    theirs = SwinTransformer([4, 4], 32, [1, 1], [2, 4], [4, 4], num_classes=50)
    settings = {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4), "num_labels": 50}
    for channels in (3, 1):
        ours = SwinClassifier(SwinClassifierConfig(sigma=3.0, num_channels=channels, **settings))
        assert ours.features[0][0].weight.shape == (32, channels, 4, 4)
        own = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if channels == 3 or not name.startswith("features.0.0"):
                spread = parameter.std().item()
                assert own[name].mean().item() == pytest.approx(parameter.mean().item(), abs=6 * spread / parameter.numel() ** 0.5)
                assert own[name].std().item() == pytest.approx(spread, rel=0.35)
        assert_close(ours.features[1][0].attn.sigma, torch.tensor([3.0, 3.0]))


# One window by its definition


def by_definition(x, attention, window, shift):
    "Krause window attention of one map (H, W, C), pixel by pixel, in Python's double precision."
    height, width, dim = x.shape
    heads, size = attention.num_heads, dim // attention.num_heads
    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias).reshape(height, width, 3, heads, size).unbind(2)
    table = attention.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, heads)
    attended = torch.zeros(height, width, heads, size, dtype=torch.float64)
    pixels = [(r, c) for r in range(height) for c in range(width)]
    moved = {(r, c): ((r - shift) % height, (c - shift) % width) for r, c in pixels}
    for pixel in pixels:
        row, column = moved[pixel]
        for h in range(heads):
            weight, sigma = {}, attention.log_sigma[h].exp().item()
            for other in pixels:
                other_row, other_column = moved[other]
                if (row // window, column // window) != (other_row // window, other_column // window):
                    continue
                difference = (query[pixel][h] - key[other][h]) / size**0.5
                logit = -difference.square().sum().item() / (2 * sigma**2)
                logit += table[row - other_row + window - 1, column - other_column + window - 1, h].item()
                carried = [place < shift for place in pixel], [place < shift for place in other]
                weight[other] = math.exp(logit - 100 * (shift > 0 and carried[0] != carried[1]))
            for other, w in weight.items():
                attended[pixel][h] += w / sum(weight.values()) * value[other][h]
    return attended.flatten(2) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize(("window", "shift", "size"), [(2, 0, (4, 2)), (2, 1, (4, 4)), (3, 1, (6, 6)), (4, 2, (8, 4 * 2))])
@torch.no_grad()
def test_krause_window_by_definition(window, shift, size):
    attention = layer(window, shift, sigma=0.5).double()
    x = noise(2, *size, 8, dtype=torch.float64)
    for one, found in zip(x, attention(x), strict=True):
        assert_close(found, by_definition(one, attention, window, shift), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_small_map_is_attended_whole_without_shift_and_bias():
    attention = layer(4, 2).double()
    plain = layer(3, 0).double()
    own = {name: tensor for name, tensor in attention.state_dict().items() if not name.startswith("relative")}
    plain.load_state_dict(own | {name: tensor for name, tensor in plain.state_dict().items() if name.startswith("relative")})
    plain.relative_position_bias_table.zero_()
    x = noise(2, 3, 3, 8, dtype=torch.float64)
    assert_close(attention(x), plain(x), rtol=0, atol=1e-12)
    output, weights = attention(x[:, :2], output_weights=True)  # smaller in one direction more
    assert output.shape == (2, 2, 3, 8) and weights.shape == (2, 2, 6, 6)
    one = attention(x[:, :1, :1])  # a token alone is its own average
    value = x[:, :1, :1] @ attention.qkv.weight[16:].T + attention.qkv.bias[16:]
    assert_close(one, attention.proj(value))


@torch.no_grad()
def test_padded_small_maps_see_the_padding():
    x = noise(2, 2, 2, 8)
    for score in SCORES:
        whole, padded = (layer(4, 2, score, pad_small_maps=pad) for pad in (False, True))
        assert whole(x, output_weights=True)[1].shape == (2, 2, 4, 4)
        assert padded(x, output_weights=True)[1].shape == (2, 2, 16, 16)
        larger = F.pad(x, (0, 0, 0, 2, 0, 2))
        assert_close(padded(x), padded(larger)[:, :2, :2])


@torch.no_grad()
def test_scaled_distance_is_a_larger_temperature():
    query, key = noise(2, 3, 2, 5, 8, dtype=torch.float64)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    literal = (-torch.cdist(query / 8**0.5, key / 8**0.5).square() / (2 * sigma**2).view(2, 1, 1)).softmax(-1)
    assert_close(window_weights(query, key, "krause", sigma), literal, rtol=0, atol=1e-12)
    assert_close(window_weights(query, key, "softmax", None), (query @ key.mT / 8**0.5).softmax(-1))
    penalty = key.square().sum(-1).unsqueeze(-2) / 2
    assert_close(window_weights(query, key, "softmax_key_norm", None), ((query @ key.mT - penalty) / 8**0.5).softmax(-1))
    # with σ² = 1/√D the Krause score is the control with the key norm
    assert_close(window_weights(query, key, "softmax_key_norm", None), window_weights(query, key, "krause", torch.tensor(8**-0.25)))


@torch.no_grad()
@pytest.mark.parametrize("sigma", [1e-30, 1e-6, 1e30])
def test_limits_of_sigma_are_finite(sigma):
    query, key = noise(2, 3, 2, 5, 8)
    weights = window_weights(query, key, "krause", torch.tensor([sigma, sigma]))
    expected = torch.full_like(weights, 0.2) if sigma > 1 else F.one_hot(torch.cdist(query, key).argmin(-1), 5).float()
    assert_close(weights, expected)


# Windows and masks


@pytest.mark.parametrize(("size", "window"), [((4, 6), (2, 3)), ((3, 3), (1, 1)), ((8, 8), (4, 4)), ((2, 5), (2, 5))])
def test_windows_are_cut_and_joined(size, window):
    x = noise(2, *size, 3)
    windows = split_windows(x, window)
    assert torch.equal(join_windows(windows, size, window), x)
    assert torch.equal(windows[0], x[0, : window[0], : window[1]].flatten(0, 1))
    assert torch.equal(windows[-1], x[1, -window[0]:, -window[1]:].flatten(0, 1))


def test_layouts():
    assert window_layout((8, 8), (4, 4), (2, 2), False) == ((4, 4), (8, 8), (2, 2))
    assert window_layout((7, 9), (4, 4), (2, 2), False) == window_layout((7, 9), (4, 4), (2, 2), True) == ((4, 4), (8, 12), (2, 2))
    assert window_layout((4, 4), (4, 4), (2, 2), False) == ((4, 4), (4, 4), (0, 0))
    assert window_layout((4, 8), (4, 4), (2, 2), False) == ((4, 4), (4, 8), (0, 2))
    assert window_layout((2, 2), (4, 4), (2, 2), False) == ((2, 2), (2, 2), (0, 0))
    assert window_layout((2, 2), (4, 4), (2, 2), True) == ((4, 4), (4, 4), (0, 0))
    assert window_layout((2, 6), (4, 4), (2, 2), False) == ((2, 6), (2, 6), (0, 0))


@pytest.mark.parametrize("shift", [(2, 2), (0, 2), (1, 0)])
def test_mask_keeps_opposite_edges_apart(shift):
    mask = shift_mask((8, 8), (4, 4), shift)
    for place, one in enumerate(mask):
        pixels = [(4 * (place // 2) + r, 4 * (place % 2) + c) for r in range(4) for c in range(4)]
        for i, first in enumerate(pixels):
            for j, second in enumerate(pixels):
                carried = any((a >= 8 - s) != (b >= 8 - s) for a, b, s in zip(first, second, shift, strict=True))
                assert one[i, j].item() == (-100.0 if carried else 0.0)


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_a_change_stays_in_its_window_and_region(score):
    "The first two rows of a shifted map share a window with the last two, and the mask keeps them apart."
    for shift, reached_rows in ((0, range(4)), (2, range(2))):
        attention, x = layer(4, shift, score), noise(1, 8, 8, 8)
        changed = x.clone()
        changed[:, 0, 0] += 3.0
        moved = (attention(x) != attention(changed)).any(-1)[0]
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[: len(reached_rows), : len(reached_rows)] = True
        assert torch.equal(moved, expected)


# The model


@pytest.mark.parametrize("changes", [{}, {"attention_score": "softmax"}, {"image_size": 24, "window_size": 5, "learn_sigma": False},
                                     {"attention_score": "softmax", "pad_small_maps": False, "num_channels": 1}])
def test_saved_model_is_found_again_by_the_auto_class(tmp_path, changes):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is SwinClassifier and not again.training
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert again.config.pad_small_maps is model.config.pad_small_maps
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys() and all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    pixels = noise(2, model.config.num_channels, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_a_softmax_checkpoint_becomes_krause_with_the_initial_sigma(tmp_path):
    swin = build(attention_score="softmax")
    swin.save_pretrained(tmp_path)
    kswin = SwinClassifier.from_pretrained(tmp_path, config=tiny(sigma=3.0))
    for name, parameter in kswin.named_parameters():
        if name.endswith("log_sigma"):
            assert_close(parameter.exp(), torch.full_like(parameter, 3.0))
        else:
            assert torch.equal(parameter, swin.get_parameter(name))


@pytest.mark.parametrize("window", [(2, 2), (4, 4), (2, 3), (1, 5)])
def test_the_index_of_positions_is_torchvisions(window):
    assert torch.equal(position_index(window), ShiftedWindowAttention(8, list(window), [0, 0], 2).relative_position_index)


def test_the_index_of_positions_is_made_for_another_window(tmp_path):
    "All memory that nobody wrote would have to hold these numbers by chance."
    build(window_size=2).save_pretrained(tmp_path)
    for window in (4, 3):
        model = SwinClassifier.from_pretrained(tmp_path, window_size=window, ignore_mismatched_sizes=True)
        for stage in (1, 3):
            for block in model.features[stage]:
                assert torch.equal(block.attn.relative_position_index, position_index((window, window)))
                assert block.attn.relative_position_bias_table.shape[0] == (2 * window - 1) ** 2
                assert 0 < block.attn.relative_position_bias_table.abs().max() < 0.2
        assert model(noise(2, 3, 16, 16)).logits.isfinite().all()


def test_problem_types_have_their_losses():
    pixels, several = noise(2, 3, 16, 16), torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 0, 0]])
    for problem, loss in (("multi_label_classification", F.binary_cross_entropy_with_logits), ("regression", F.mse_loss)):
        found = build(problem_type=problem)(pixels, labels=several)
        assert_close(found.loss, loss(found.logits, several))
    with pytest.raises(ValueError, match="labels must be classes from 0 to 4"):
        build()(pixels, labels=torch.tensor([5, 0]))


def test_other_sizes_of_images_are_torchvisions():
    "Nothing depends on the size: the model trained at one size is that of another; torchvision's takes any size."
    torch.manual_seed(0)
    theirs = perturb(SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5), 0.05)
    settings = {"patch_size": 4, "embed_dim": 16, "attention_score": "softmax", "image_size": 32}
    ours = SwinClassifier(tiny(**settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = noise(2, 3, 24, 40)
    other = SwinClassifier(tiny(**settings | {"image_size": (24, 40)})).eval()
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for found in (ours(pixels, interpolate_pos_encoding=True), other(pixels)):
            assert_close(found.logits, theirs(pixels), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True takes images of other sizes"):
        ours(pixels)
    with pytest.raises(ValueError, match="multiples of patch_size = 4"):
        ours(pixels[..., 1:], interpolate_pos_encoding=True)


def test_another_number_of_classes_changes_the_head_alone(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    other = SwinClassifier.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.head.weight.shape == (7, 16) and 0 < other.head.weight.std() < 0.04
    assert all(torch.equal(other.get_parameter(name), p) for name, p in model.named_parameters() if not name.startswith("head"))


def test_attentions_of_each_block():
    model, pixels = build(depths=(2, 2, 2), num_heads=(2, 4, 4)), noise(2, 3, 16, 16)
    labels = torch.tensor([3, 0])
    with torch.no_grad():
        plain, full = model(pixels, labels=labels), model(pixels, output_attentions=True)
        listed = model(pixels, labels=labels, return_dict=False)
    assert plain.attentions is None and torch.equal(plain.logits, full.logits)
    shapes = [(8, 2, 16, 16)] * 2 + [(2, 4, 16, 16)] * 2 + [(2, 4, 4, 4)] * 2
    assert [tuple(weights.shape) for weights in full.attentions] == shapes
    for weights in full.attentions:
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    last = full.attentions[1].view(2, 4, 2, 16, 16)[:, 3]  # of the shifted block: four regions of four tokens
    assert ((last > 1e-30).sum(-1) == 4).all()
    assert_close(plain.loss, F.cross_entropy(plain.logits, labels))
    assert_close(model(pixels, labels=F.one_hot(labels, 5).float()).loss, plain.loss)
    assert isinstance(listed, tuple) and [tuple(part.shape) for part in listed] == [(), (2, 5)]


@pytest.mark.parametrize("score", SCORES)
def test_gradients_reach_every_parameter(score):
    model = build(attention_score=score)
    model(noise(4, 3, 16, 16), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    parameters = dict(model.named_parameters())
    assert ("features.3.1.attn.log_sigma" in parameters) == (score == "krause")
    for name, parameter in parameters.items():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_are_those_of_finite_differences():
    attention = layer(2, 1, sigma=0.7, dim=4).double()
    names = [name for name, _ in attention.named_parameters()]
    x = noise(1, 4, 4, 4, dtype=torch.float64).requires_grad_()

    def call(x, *parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), x)

    assert "log_sigma" in names
    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in attention.parameters())), fast_mode=True)


def test_a_fixed_sigma_is_saved_and_stays_fixed(tmp_path):
    model = build(learn_sigma=False)
    for stage in (1, 3):
        model.features[stage][0].attn.log_sigma += 0.5
    model.save_pretrained(tmp_path)
    fixed, free = SwinClassifier.from_pretrained(tmp_path), SwinClassifier.from_pretrained(tmp_path, config=tiny())
    assert "features.1.0.attn.log_sigma" in fixed.state_dict() and not any("log_sigma" in name for name, _ in fixed.named_parameters())
    assert free.num_parameters() == fixed.num_parameters() + 2 * (2 + 4)
    assert_close(fixed.features[1][0].attn.sigma, torch.full((2,), 4 * math.exp(0.5)))
    assert torch.equal(fixed(noise(2, 3, 16, 16)).logits, free(noise(2, 3, 16, 16)).logits)
    SwinClassifier(tiny(attention_score="softmax")).save_pretrained(tmp_path)
    again = SwinClassifier.from_pretrained(tmp_path, config=tiny(learn_sigma=False))
    assert_close(again.features[1][0].attn.sigma, torch.full((2,), 4.0))


@pytest.mark.parametrize("score", SCORES)
def test_bfloat16_autocast(score):
    "Weights are taken in float32, so the error is bfloat16's rounding in a few products."
    model, pixels = build(attention_score=score), noise(2, 3, 16, 16)
    exact = model(pixels, output_attentions=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(pixels, labels=torch.tensor([0, 1]), output_attentions=True)
    assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    assert {weights.dtype for weights in half.attentions} == {torch.float32}
    for weights in half.attentions:
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (half.logits.float() - exact.logits).abs().max() < 8 * 2**-8 * exact.logits.abs().max()
    half.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_is_for_training_alone():
    model, never = build(dropout=0.3, drop_path=0.5), build()
    pixels = noise(2, 3, 16, 16)
    assert [block.stochastic_depth.p for stage in (1, 3) for block in model.features[stage]] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, never(pixels).logits)
        model.train()
        assert not torch.equal(model(pixels).logits, model(pixels).logits)
    attention, x = layer(attention_dropout=0.9).train(), noise(1, 4, 4, 8)
    assert not torch.equal(attention(x), attention(x)) and torch.equal(attention.eval()(x), attention(x))


def test_defaults_are_the_small_window_model_of_cifar():
    config = SwinClassifierConfig()
    assert (config.image_size, config.patch_size, config.window_size, config.embed_dim) == (32, 4, 4, 96)
    assert (config.depths, config.num_heads, config.sigma, config.drop_path) == ([2, 2, 6, 2], [3, 6, 12, 24], 4.0, 0.1)
    assert [SwinClassifierConfig(attention_score=score).pad_small_maps for score in SCORES] == [False, True, False]
    assert SwinClassifierConfig(attention_score="softmax", pad_small_maps=False).pad_small_maps is False


# Refusals


@over(
    ("changes", "message"),
    [
        ({"attention_score": "cosine"}, "attention_score must be one of krause, softmax, softmax_key_norm, got 'cosine'"),
        ({"image_size": 17}, "image_size must be a multiple of patch_size = 2, got 17"),
        ({"image_size": 0}, "image_size must be an integer ≥ 1"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"window_size": 0}, "window_size must be an integer ≥ 1, got 0"),
        ({"window_size": 2.0}, "window_size must be"),
        ({"embed_dim": 0}, "embed_dim must be"),
        ({"num_labels": 0}, "num_labels must be"),
        ({"num_channels": 0}, "num_channels must be"),
        ({"num_heads": (3, 4)}, "num_heads must divide the width 8, got 3"),
        ({"num_heads": (2, 5)}, "num_heads must divide the width 16, got 5"),
        ({"num_heads": (2, 0)}, "num_heads must be an integer ≥ 1"),
        ({"num_heads": 2}, "num_heads must be a list"),
        ({"num_heads": (2,)}, "depths must be as many as num_heads"),
        ({"depths": (2, True)}, "depths must be an integer"),
        ({"depths": ()}, "depths must be a list"),
        ({"depths": (1,), "num_heads": (2,)}, "at least two blocks in all"),
        ({"mlp_ratio": 0}, "mlp_ratio must be"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be"),
        ({"sigma": 0}, "sigma must be a number > 0"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"sigma": math.inf}, "sigma must be"),
        ({"pad_small_maps": "yes"}, "pad_small_maps must be"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"dropout": -0.5}, r"dropout must be in \[0, 1\)"),
        ({"mlp_ratio": math.inf}, "mlp_ratio must be a number > 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must be a number ≥ 1/embed_dim"),
        ({"learn_sigma": 1}, "learn_sigma must be True or False"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, [4, 4], [4, 4], 2), "shift_size must be smaller than window_size = 4, got 4"),
        ((8, [4, 4], [-1, 0], 2), "shift_size must be an integer ≥ 0"),
        ((8, [4, 0], [0, 0], 2), "window_size must be an integer ≥ 1"),
        ((9, [4, 4], [0, 0], 2), "num_heads must divide the width 9, got 2"),
    ],
)
def test_bad_arguments_of_a_layer_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(*arguments)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 18), (2, 3, 32, 32), (2, 16, 16, 3)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 16, 16\), got"):
        build()(torch.zeros(shape))
