"""The Fréchet distance is the formula's, and features are what the last layer sees."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from krause_repro.frechet import class_features, frechet_distance
from krause_repro.swin import SwinClassifier, SwinClassifierConfig
from krause_repro.vision_transformer import VisionTransformer, VisionTransformerConfig


@given(st.integers(1, 5), st.integers(8, 30), st.integers(8, 30), st.integers(0, 99))  # enough images for scipy's root
def test_the_distance_is_the_formula(dim, many, others, seed):
    random = np.random.default_rng(seed)
    first = random.normal(size=(many, dim)) @ random.normal(size=(dim, dim))
    second = random.normal(size=(others, dim)) + random.normal(size=dim)
    covs = [np.cov(x, rowvar=False).reshape(dim, dim) for x in (first, second)]
    want = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1]) - 2 * np.trace(sqrtm(covs[0] @ covs[1])).real
    assert frechet_distance(torch.tensor(first), torch.tensor(second)) == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_shift_scale_and_symmetry():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 4, rel=1e-9)
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * features.T.cov().trace().item(), rel=1e-9)
    other = features[:20] ** 2
    assert frechet_distance(features, other) == pytest.approx(frechet_distance(other, features), rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5, 3))])
def test_features_that_cannot_be_compared_are_refused(first, second):
    with pytest.raises(ValueError, match="first and second must be"):
        frechet_distance(torch.zeros(first), torch.zeros(second))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="second must be finite features"):
            frechet_distance(torch.zeros(5, 3), torch.full((5, 3), bad))


@pytest.mark.parametrize("model", [
    VisionTransformer(VisionTransformerConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1,
                                              num_attention_heads=2, intermediate_size=32)),
    SwinClassifier(SwinClassifierConfig(image_size=8, patch_size=2, num_channels=1, embed_dim=8, depths=(2,), num_heads=[2],
                                        window_size=2)),
], ids=["vit", "swin"])
def test_features_are_what_the_last_layer_sees(model):
    pixels = torch.randn(7, 1, 8, 8)
    features = class_features(model.train(), pixels, batch=3)
    assert model.training and not model.head._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), model.eval()(pixels).logits)
