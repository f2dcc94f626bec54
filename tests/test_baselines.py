"""Baselines without attention: a linear map, a convolutional network, nearest neighbours."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

from krause_repro.baselines import PixelClassifier, PixelClassifierConfig, ResidualBlock, nearest_classes
from krause_repro.recipes import RECIPES


def test_without_stages_it_is_a_linear_map_of_all_pixels():
    model = PixelClassifier(PixelClassifierConfig(stages=None, image_size=8, num_labels=4))
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(4, 192), (4,)]
    pixels, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    output = model(pixels, labels)
    assert output.loss.item() == pytest.approx(torch.tensor(4.0).log().item())  # it starts from equal chances
    assert torch.equal(output.logits, pixels.flatten(1) @ model.head.weight.T + model.head.bias)


def test_the_convolutional_networks_have_as_many_parameters_as_the_transformers():
    counts = {name: sum(parameter.numel() for parameter in AutoModelForImageClassification.from_config(RECIPES[name].at("desk").config)
                        .parameters()) for name in ("convolution/cifar10", "residual/cifar10", "kvit_s/cifar10", "vit_s/cifar10")}
    assert all(count == pytest.approx(counts["kvit_s/cifar10"], rel=0.02) for count in counts.values())


def test_a_residual_block_adds_its_convolutions_to_what_it_gets():
    torch.manual_seed(0)
    model, x = PixelClassifier(PixelClassifierConfig(stages=(4, 6), blocks=2, image_size=8, num_labels=3)).eval(), torch.randn(2, 4, 8, 8)
    blocks = [each for each in model.stages if isinstance(each, ResidualBlock)]
    assert len(blocks) == 4 and not [*PixelClassifier(PixelClassifierConfig(stages=None, blocks=2)).stages.parameters()]
    first, second = (each.weight for each in blocks[0].layers if isinstance(each, torch.nn.Conv2d))
    inner = F.conv2d(x, first, padding=1) / (1 + 1e-5) ** 0.5  # batch normalisation before any training
    outer = F.conv2d(inner.relu(), second, padding=1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(blocks[0](x), (x + outer).relu())


def test_each_stage_halves_the_image_and_sees_its_neighbours(tmp_path):
    model = PixelClassifier(PixelClassifierConfig(stages=(4, 8), image_size=8, num_labels=3)).eval()
    assert model.stages[:6](torch.randn(1, 3, 8, 8)).shape == (1, 8, 2, 2)
    model.save_pretrained(tmp_path)
    again, pixels = AutoModelForImageClassification.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 8, 8)
    assert again.config.stages == [4, 8] and torch.equal(again(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"stages": (8,) * 6}, "stages must be at most 5"), ({"stages": (0,)}, "stages must be"), ({"image_size": 0}, "image_size must be"),
    ({"blocks": -1}, "blocks must be"), ({"blocks": 1.5}, "blocks must be"),
])
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        PixelClassifierConfig(**wrong)


def test_nearest_classes_are_those_of_a_plain_search():
    torch.manual_seed(0)
    train, labels, queries = torch.randn(60, 2, 3), torch.randint(0, 4, (60,)), torch.randn(511, 2, 3)  # two chunks
    order = torch.cdist(queries.flatten(1).double(), train.flatten(1).double()).argsort(1)
    for k, found in nearest_classes(train, labels, queries, (1, 5, 60)).items():
        assert found.tolist() == [labels[row[:k]].bincount(minlength=4).argmax().item() for row in order]
    with pytest.raises(ValueError, match="ks must be at most 60"):
        nearest_classes(train, labels, queries, (61,))
