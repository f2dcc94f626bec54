"""Every published row has its recipe: exact where the paper is known, marked as ours where it is not."""

import pickle
import re
from copy import deepcopy
from dataclasses import FrozenInstanceError, asdict, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import over
from torch.optim import AdamW
from transformers import AutoModelForImageClassification

from krause_repro.checks import PROFILES
from krause_repro.generation_recipes import generation_recipes
from krause_repro.image_data import Collator
from krause_repro.image_recipes import (
    CIFAR_CONTROLS,
    IMAGE_DATA,
    PIXELS,
    UNPUBLISHED,
    UNPUBLISHED_SWIN,
    ImageClassificationRecipe,
    PixelRecipe,
    SwinRecipe,
    baseline_recipes,
    parse_row,
    photograph_recipes,
    row_name,
    swin_recipes,
)
from krause_repro.language_model import MIXERS, LanguageModel
from krause_repro.language_recipes import (
    LM_DATASETS,
    LM_ROWS,
    LanguageModelRecipe,
    fine_tuning_recipes,
    language_model_recipes,
)
from krause_repro.recipe_base import Recipe, published_tables
from krause_repro.recipes import PARTICLE_FIELDS, RECIPES, ParticleRecipe, create_model, get_recipe, list_models
from krause_repro.tasks import check_process_batch

IMAGE_RECIPES = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, ImageClassificationRecipe)}
ROWS = [(dataset, row) for dataset, data in IMAGE_DATA.items() for row in published_tables()[data["table"]]["rows"]]
KNOWN = {
    "kvit_s/cifar10", "vit_s/cifar10", "kvit_s16/imagenet", "vit_s16/imagenet", "kvit_b16/imagenet", "vit_b16/imagenet",
    "kvit_s_local/cifar10", "kvit_s_full/cifar10", "kswin_t/cifar10", "swin_t/cifar10",
}
TRAINING = {  # of every released script
    "epochs": 300, "warmup_epochs": 10, "weight_decay": 0.05, "max_grad_norm": 1.0, "label_smoothing": 0.1, "cutmix_probability": 0.8,
    "cutmix_alpha": 1.0, "mixup_alpha": 0.8, "dropout": 0.0, "seeds": (3407,), "depth": 12, "positions": "learned", "learn_sigma": True,
    "train_images": None, "test_images": None,
}
CIFAR_S = {
    "dataset": "cifar10", "classes": 10, "channels": 3, "image_size": 32, "patch_size": 4, "width": 384, "heads": 6, "mlp_width": 1536,
    "batch_size": 256, "lr": 3e-4, "augmentation": "crop_flip", "crop_padding": 4,
}
IMAGENET = {
    "dataset": "imagenet", "classes": 1000, "channels": 3, "image_size": 224, "patch_size": 16, "batch_size": 1024, "bf16": True,
}
S16 = IMAGENET | {"width": 384, "heads": 6, "mlp_width": 1536, "augmentation": "imagenet"}
B16 = IMAGENET | {"width": 768, "heads": 12, "mlp_width": 3072, "augmentation": "imagenet_jitter"}
KVIT = {"score": "krause", "norm": "post", "drop_path": 0.1}
FIVE = {"radius": 2, "metric": "chebyshev", "top_k": (8, 16), "lr": 5e-4}
VIT = {"score": "softmax", "norm": "pre", "drop_path": 0.0, "radius": None, "top_k": None, "layer_norm_eps": 1e-6}
EXACT = {
    "kvit_s/cifar10": CIFAR_S | KVIT | {"radius": 1, "metric": "manhattan", "top_k": (2, 4), "sigma": 2.5},
    "vit_s/cifar10": CIFAR_S | VIT,
    "kvit_s16/imagenet": S16 | KVIT | FIVE | {"sigma": 4.5},
    "vit_s16/imagenet": S16 | VIT | {"lr": 1e-3},
    "kvit_b16/imagenet": B16 | KVIT | FIVE | {"sigma": 9.0},
    "vit_b16/imagenet": B16 | VIT | {"lr": 1e-3},
}
SWIN = TRAINING | {
    "dataset": "cifar10", "classes": 10, "channels": 3, "image_size": 32, "patch_size": 4, "batch_size": 256, "lr": 2e-3,
    "weight_decay": 0.01, "warmup_epochs": 20, "drop_path": 0.1, "augmentation": "crop_flip_erase", "crop_padding": 4, "window": 4,
    "width": 96, "heads": 3, "mlp_width": 384, "sigma": 4.0, "radius": None, "top_k": None, "positions": "relative", "bf16": False,
}


@pytest.mark.parametrize("name", EXACT)
def test_published_settings_are_exact(name):
    found = asdict(RECIPES[name])
    expected = EXACT[name] | TRAINING
    assert {key: found[key] for key in expected} == expected
    assert set(RECIPES[name].unpublished) == {"held_out"}


@over(("dataset", "row"), ROWS)
def test_every_row_has_a_recipe_with_its_numbers(dataset, row):
    recipe = RECIPES[row_name(dataset, row[0])]
    assert (recipe.name, recipe.profile, recipe.dataset) == (row_name(dataset, row[0]), "paper", dataset)
    assert recipe.published["table"] == IMAGE_DATA[dataset]["table"] and list(recipe.published.values())[1:] == row
    assert (recipe.score == "krause") == row[0].startswith("KViT")
    assert (recipe.positions == "rotary") == row[0].endswith("(RoPE)")
    assert recipe.config.attention_score == recipe.score
    assert recipe.classes == {"cifar10": 10, "cifar100": 100, "imagenet": 1000, "fashion_mnist": 10}[dataset]


@pytest.mark.parametrize("row", published_tables()["table14_swin"]["rows"], ids=lambda row: row[0])
def test_swin_settings_are_exact(row):
    recipe, tiny = RECIPES[row_name("cifar10", row[0])], row[0].endswith("T")
    expected = SWIN | {"score": "krause" if row[0].startswith("K") else "softmax", "depth": 12 if tiny else 24}
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.published == {"table": "table14_swin", "model": row[0], "accuracy": row[1]}
    assert set(recipe.unpublished) == ({"held_out"} if tiny else set(UNPUBLISHED_SWIN))
    config = recipe.config
    assert (config.depths, config.num_heads) == ([2, 2, 6 if tiny else 18, 2], [3, 6, 12, 24])
    assert (config.embed_dim, config.window_size, config.mlp_ratio, config.sigma) == (96, 4, 4.0, 4.0)
    assert config.pad_small_maps == (config.attention_score == "softmax")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("data", ["t/cifar10", "s/cifar10", "t/fashion_mnist"])
def test_swin_and_kswin_differ_by_their_score(data, profile):
    one, two = (asdict(RECIPES[f"{family}_{data}"].at(profile)) for family in ("kswin", "swin"))
    assert {key for key in one if one[key] != two[key]} - {"published"} == {"name", "score"}


def test_swin_is_trained_on_the_desk_as_kvit_is():
    "Every field that is not of the model is the same, but for Table 14's weight decay."
    model = {"name", "patch_size", "width", "heads", "mlp_width", "radius", "top_k", "sigma", "norm", "positions", "weight_decay",
             "published", "unpublished"}
    kswin, kvit = (asdict(RECIPES[f"{name}/fashion_mnist"].at("desk")) for name in ("kswin_t", "kvit_t"))
    assert {key for key in kvit if kswin[key] != kvit[key]} == model and set(kswin) - set(kvit) == {"depths", "window"}


def test_swin_cuts_its_maps_without_padding():
    for profile in PROFILES:
        for name, recipe in swin_recipes().items():
            recipe = recipe.at(profile)
            side = recipe.image_size // recipe.patch_size
            assert side % recipe.window == 0 and side > recipe.window, name
    with pytest.raises(ValueError, match=r"depth must be the sum of depths = \(2, 2, 6, 2\), got 13"):
        replace(RECIPES["kswin_t/cifar10"], depth=13)


def test_photographs_are_a_model_of_table_3_on_other_data():
    for name, recipe in photograph_recipes().items():
        imagenet = asdict(RECIPES[name.replace("photographs", "imagenet")])
        changed = {key for key, value in asdict(recipe).items() if value != imagenet[key]}
        assert changed == {"name", "published", "unpublished", *recipe.unpublished} and recipe.published == {}
        for profile in PROFILES:
            small = recipe.at(profile)
            assert (small.image_size, small.train_images, small.test_images) == (224, None, None) and 0 < small.held_out < 48


def test_rows_are_all_and_have_names_of_their_own():
    assert len(ROWS) == 8 + 8 + 10 + 2 == len({row_name(dataset, row[0]) for dataset, row in ROWS})
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert set(RECIPES) - {row_name(dataset, row[0]) for dataset, row in ROWS} == {
        "particles/circle", "particles/sphere", "vit_t_post/fashion_mnist", "softmax_t_local_top_k/fashion_mnist",
        "kvit_s_local/cifar10", "kvit_s_full/cifar10",
        "kswin_t/cifar10", "swin_t/cifar10", "kswin_s/cifar10", "swin_s/cifar10", "kswin_t/fashion_mnist", "swin_t/fashion_mnist",
        "kvit_s16/photographs", "vit_s16/photographs", "vit_t/mnist", "vit_t/digits",
        *CIFAR_CONTROLS, *baseline_recipes(),
    } | set(generation_recipes()) | set(fine_tuning_recipes()) | set(language_model_recipes())


def test_published_ablation_has_its_rows():
    assert [RECIPES[name].published["accuracy"] for name in ("kvit_s_local/cifar10", "kvit_s_full/cifar10")] == [95.59, 94.06]
    assert RECIPES["kvit_s_full/cifar10"].radius is None and RECIPES["kvit_s_local/cifar10"].radius == 1


def test_parse_row():
    assert parse_row("KViT-S/16") == ("kvit", "S", 16, False)
    assert parse_row("ViT-B/16 (RoPE)") == ("vit", "B", 16, True)
    assert parse_row("ViT-B (RoPE)") == ("vit", "B", None, True)
    assert row_name("imagenet", "ViT-B/16 (RoPE)") == "vit_b16_rope/imagenet"


@over("name", sorted(set(IMAGE_RECIPES) - KNOWN - set(photograph_recipes())))
def test_what_is_not_published_is_ours(name):
    assert set(RECIPES[name].unpublished) >= set(UNPUBLISHED_SWIN if isinstance(RECIPES[name], SwinRecipe) else UNPUBLISHED)
    assert {"radius", "metric", "top_k", "sigma", "lr", "batch_size", "drop_path", "held_out"} <= set(UNPUBLISHED)


def test_ours_names_fields():
    for name, recipe in RECIPES.items():
        assert set(recipe.unpublished) <= {field.name for field in fields(recipe)}, name
        if isinstance(recipe, ParticleRecipe):
            fields_of_ours = {"particles", "sigma", "radius", "step", "duration", "integrator", "starts"}
            assert set(recipe.unpublished) == set(PARTICLE_FIELDS) >= fields_of_ours


def test_recipes_are_frozen():
    for name, recipe in RECIPES.items():
        with pytest.raises(FrozenInstanceError):
            recipe.seeds = (1,)
        assert hash(recipe) == hash(replace(recipe)), name


@over("name", IMAGE_RECIPES)
def test_every_profile_makes_a_model_that_fits_its_data(name):
    for profile in PROFILES:
        recipe = RECIPES[name].at(profile)
        config = recipe.config  # raises when the settings do not fit together
        assert (config.image_size, config.num_channels, config.num_labels) == (recipe.image_size, recipe.channels, recipe.classes)
        if isinstance(recipe, PixelRecipe):
            assert config.stages == (recipe.stages and list(recipe.stages))
            continue
        assert (config.attention_score, config.sigma, config.drop_path) == (recipe.score, recipe.sigma, recipe.drop_path)
        if isinstance(recipe, SwinRecipe):
            stages = range(len(recipe.depths))
            assert (config.embed_dim, config.depths, config.window_size) == (recipe.width, list(recipe.depths), recipe.window)
            assert config.num_heads == [recipe.heads * 2**stage for stage in stages] and recipe.depth == sum(config.depths)
            assert [int(config.mlp_ratio * config.embed_dim * 2**stage) for stage in stages] == [recipe.mlp_width * 2**s for s in stages]
            continue
        assert (config.hidden_size, config.num_hidden_layers, config.attention_radius) == (recipe.width, recipe.depth, recipe.radius)
        assert config.attention_top_k == (None if recipe.top_k is None else list(recipe.top_k))


# Every row starts


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_every_row_starts(name):
    "At the paper's size a model with the published number of parameters; in smoke a training step on random images."
    with torch.device("meta"):
        whole = AutoModelForImageClassification.from_config(RECIPES[name].config)
    if "parameters" in RECIPES[name].published:
        assert whole.num_parameters() == RECIPES[name].published["parameters"]
    recipe = RECIPES[name].at("smoke")
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(recipe.config).train()
    shape = (recipe.channels, recipe.image_size, recipe.image_size)
    images, labels = torch.randint(0, 256, (4, *shape), dtype=torch.uint8), torch.arange(4) % recipe.classes
    given = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    batch = Collator(recipe, training=True)(given)
    optimizer = AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and 0 < loss
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    moved = [not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters()]
    assert sum(moved) >= 0.9 * len(moved)  # a few have no gradient: drop-path may leave out a branch


def test_language_models_are_the_papers():
    recipes, tables = language_model_recipes(), published_tables()
    assert set(recipes) == {f"lm_{mixer}_100m/{data}" for mixer in MIXERS for data in LM_DATASETS} | {
        f"lm_{mixer}_200m/fineweb_edu" for mixer in MIXERS}
    exact = {"vocab_size": 50_257, "context": 1024, "width": 768, "depth": 8, "heads": 12, "mlp_width": 2048, "dropout": 0.1, "lr": 6e-4,
             "betas": (0.9, 0.95), "weight_decay": 0.1, "warmup_share": 0.05, "final_lr_share": 0.1, "bf16": True, "gate_init": 0.8,
             "sigma": 2.5, "window": 32, "top_k": 16, "reset_gate": False, "seeds": (3407,)}
    krause = recipes["lm_krause_100m/fineweb_edu"]
    assert {name: getattr(krause, name) for name in exact} == exact and not set(krause.unpublished) & set(exact)
    assert krause.batch_size * krause.context == 999_424 and krause.batch_size == 2 * (500_000 // 1024)
    for mixer, row in LM_ROWS.items():
        for size in ("100m", "200m"):
            published = dict(recipes[f"lm_{mixer}_{size}/fineweb_edu"].published)
            (numbers,) = (r for r in tables[f"lm_{size}"]["rows"] if r[0] == row)
            assert [published.pop("table"), *published.values()] == [f"lm_{size}", *numbers]
    assert recipes["lm_krause_only_100m/fineweb_edu"].published == recipes["lm_krause_100m/openstax"].published == {}
    for mixer in MIXERS:  # of the larger size only accuracies are published, by mixer
        marked, known = set(recipes[f"lm_{mixer}_200m/fineweb_edu"].unpublished), {"dataset", *(["mixer"] if mixer in LM_ROWS else [])}
        assert marked == {field.name for field in fields(LanguageModelRecipe)} - {field.name for field in fields(Recipe)} - known
    for profile, trained in (("smoke", 512), ("desk", 4096)):  # the tokenizer of FineWeb-Edu is finished
        assert (krause.at(profile).vocab_size, recipes["lm_krause_100m/text"].at(profile).vocab_size) == (50_257, trained)


def test_language_models_start_in_several_processes(monkeypatch):
    for profile, counts in (("paper", (1, 2, 4, 8, 16)), ("smoke", (1, 2))):
        for recipe, processes in product(language_model_recipes().values(), counts):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            assert check_process_batch(recipe.at(profile)) == processes, recipe.name


@pytest.mark.parametrize("profile", PROFILES)
def test_language_models_differ_by_their_mixer_alone(profile):
    recipes = [language_model_recipes()[f"lm_{mixer}_100m/openstax"].at(profile) for mixer in MIXERS]
    for recipe in recipes:
        differing = {name for name, value in asdict(recipe).items() if value != asdict(recipes[0])[name]}
        assert differing <= {"name", "mixer", "window", "top_k", "unpublished"}
    with torch.device("meta"):
        counts = {recipe.mixer: LanguageModel(recipe.config).num_parameters() for recipe in recipes}
    assert abs(counts["standard_wide"] / counts["krause"] - 1) < 2e-3 and counts["standard"] < counts["krause"]
    assert profile != "desk" or 1.4e6 < counts["standard"] < counts["krause"] < 2e6


# Profiles


def test_at():
    recipe = get_recipe("kvit_t/fashion_mnist")
    assert recipe.at("paper") is recipe
    desk, smoke = recipe.at("desk"), recipe.at("smoke")
    assert desk.at("desk") is desk
    assert (desk.profile, smoke.profile, recipe.profile) == ("desk", "smoke", "paper")
    assert len(desk.seeds) >= 3 and len(smoke.seeds) == 2
    assert desk.published == smoke.published == recipe.published
    for profile, other in ((desk, "smoke"), (smoke, "paper"), (smoke, "desk")):
        with pytest.raises(ValueError, match=r"start from RECIPES\['kvit_t/fashion_mnist'\]"):
            profile.at(other)
    with pytest.raises(ValueError, match="profile must be one of smoke, desk, paper, got 'full'"):
        recipe.at("full")


def test_a_profile_keeps_what_makes_the_model_its_own():
    always = {"name", "published", "unpublished", "dataset", "score", "radius", "metric", "norm", "positions", "sigma", "classes",
              "image_size", "patch_size", "dimension", "step"}
    for name, recipe in RECIPES.items():
        kept = always if isinstance(recipe, LanguageModelRecipe) else always | {"top_k"}  # there, a share of the context
        for profile in ("smoke", "desk"):
            before, after = asdict(recipe), asdict(recipe.at(profile))
            assert {key: after[key] for key in kept & set(after)} == {key: before[key] for key in kept & set(before)}, name


def test_particles_are_fewer_in_smoke_alone():
    recipe = get_recipe("particles/circle")
    desk, smoke = recipe.at("desk"), recipe.at("smoke")
    assert asdict(desk) == asdict(recipe) | {"profile": "desk"}
    assert smoke.particles < recipe.particles and smoke.duration < recipe.duration and smoke.starts < recipe.starts
    assert (get_recipe("particles/circle").dimension, get_recipe("particles/sphere").dimension) == (2, 3)


@pytest.mark.parametrize("other", ["vit_t/fashion_mnist", "vit_t_post/fashion_mnist"])
def test_desk_rivals_are_trained_alike(other):
    "The comparison on the desk is of models: every field that is not of the model is the same."
    model = {"name", "score", "radius", "metric", "top_k", "sigma", "learn_sigma", "norm", "layer_norm_eps", "published", "unpublished"}
    one, two = (asdict(get_recipe(name).at("desk")) for name in ("kvit_t/fashion_mnist", other))
    assert {key for key in one if one[key] != two[key]} <= model
    assert one["drop_path"] == two["drop_path"] and one["lr"] == two["lr"] and one["seeds"] == two["seeds"]


def test_the_control_differs_from_the_baseline_by_its_norm():
    control, baseline = (asdict(get_recipe(name)) for name in ("vit_t_post/fashion_mnist", "vit_t/fashion_mnist"))
    differing = {key for key in control if control[key] != baseline[key]}
    assert differing == {"name", "norm", "layer_norm_eps", "published", "unpublished"} and control["norm"] == "post"
    assert control["published"] == {}


# Fingerprints


@pytest.mark.parametrize("name", ["kvit_t/fashion_mnist", "particles/sphere"])
def test_fingerprint_is_of_the_deciding_fields(name):
    recipe = RECIPES[name]
    other = {bool: lambda v: not v, int: lambda v: 2 * v, float: lambda v: v / 2 or 0.5, tuple: lambda v: v[:1] * 2,
             dict: lambda v: {**v, "x": 1}, type(None): lambda v: 3}
    words = {"name": "x/y", "profile": "desk", "dataset": "mnist", "score": "softmax", "metric": "chebyshev", "norm": "pre",
             "integrator": "euler", "positions": "rotary", "augmentation": "imagenet", "seeds": (1, 2), "unpublished": ()}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        changed = replace(recipe, **{field.name: words.get(field.name) if field.name in words else other[type(value)](value)})
        same = changed.fingerprint == recipe.fingerprint
        assert same == (field.name in ("seeds", "unpublished", "published")), field.name
    assert replace(recipe).fingerprint == recipe.fingerprint


def test_a_field_of_a_later_version_changes_no_earlier_recipe():
    recipe = get_recipe("lm_krause_100m/openstax").at("desk")
    masked = replace(recipe, document_mask=True)
    assert "document_mask" not in recipe.to_dict() and masked.to_dict() == recipe.to_dict() | {"document_mask": True}
    assert recipe.fingerprint == "e827067495ffc4df" != masked.fingerprint


def test_fingerprints_tell_all_recipes_and_profiles_apart():
    found = [recipe.at(profile).fingerprint for recipe in RECIPES.values() for profile in PROFILES]
    assert len(set(found)) == len(found)


def test_plain_data():
    data = get_recipe("kvit_s/cifar10").to_dict()
    assert data["top_k"] == [2, 4] and data["seeds"] == [3407] and data["published"]["accuracy"] == 95.2


@pytest.mark.parametrize(("name", "near"), [("kvit_s/cifar", "kvit_s/cifar10"), ("vit_t/fashionmnist", "vit_t/fashion_mnist"), ("", ""),
                                            (None, ""), (["kvit_s/cifar"], "")])
def test_unknown_names_suggest_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"recipe must be one of .*{near}.*got {re.escape(repr(name))}"):
        get_recipe(name)


# What a field may hold

ONE_OF_EACH = ["particles/circle", "kvit_t/fashion_mnist", "kswin_t/fashion_mnist",
               "kvit_s16/photographs", "karm/mnist", "karm/digits", "krause_smollm2/questions", "lm_krause_100m/fineweb_edu"]
NAN, INF = float("nan"), float("inf")
WRONG = {  # by field, in every kind of recipe that has it
    "name": ["", "../x", "/etc", "a//b", 3, None], "profile": ["tiny", "", None, ("smoke",)],
    "seeds": [(), (1, 1), (-1,), (2**32,), (1.5,), ("0",), 3, (True,)], "unpublished": ["lr", (3,)], "published": [None, ()],
    "epochs": [0, -1, NAN, INF, "3", True, None], "lr": [0, -1, NAN, INF, "1e-3", None], "weight_decay": [-5, NAN, "0", None],
    "batch_size": [0, -8, 2.5, 16.0, True, None], "max_grad_norm": [0, -1, NAN, "1"], "sigma_lr": [0, NAN], "held_out": [0, -1, 1.5, None],
    "warmup_epochs": [-1, 99_999, NAN, None], "warmup_share": [-0.1, 1, 2, None], "label_smoothing": [2, 1, -0.1, None],
    "cutmix_probability": [1.5, -0.1, NAN, "0.5"], "cutmix_alpha": [0, -1, None], "mixup_alpha": [0, NAN], "crop_padding": [-1, 0.5, None],
    "augmentation": ["crop", None], "train_images": [0, -1, 1.5], "test_images": [0, "all"], "classes": [1, 0, 2.0], "channels": [0, None],
    "image_size": [0, -28, 28.0], "patch_size": [0], "width": [0, 1.5], "depth": [0], "heads": [0, 5, 7], "mlp_width": [0],
    "score": ["cosine", None], "radius": [-1, "1"], "metric": ["euclid"], "top_k": [0, -1, 1.5, (2,), (1, 2, 3), (0, 4)],
    "sigma": [0, -1, NAN, None], "learn_sigma": ["no", 1, None], "norm": ["none"], "positions": ["sine"], "layer_norm_eps": [0, -1e-5],
    "drop_path": [1, -0.1], "dropout": [1, "0"], "bf16": ["yes", 0], "dataset": ["svhn", None, "imagenets"],
    "depths": [(), (2, 0), 4], "window": [0, -1, 2.5], "image_shape": [(28, 28), (28, 28, 0), 28], "levels": [1, 0], "attention": ["flash"],
    "start_token": ["yes", 1], "final_lr_share": [-0.1, 2], "samples": [0], "base": ["", 3, None], "base_layers": [0], "branch": ["no"],
    "gate_init": [0, 1.5, NAN], "rank": [0], "alpha": [0, 1.5], "lora_dropout": [1.0], "per_device_batch_size": [0, 2.0], "max_length": [1],
    "gradient_checkpointing": [None], "train_items": [0, -1], "dimension": [1], "particles": [1], "step": [0, 2], "duration": [0],
    "integrator": ["rk5"], "starts": [0], "vocab_size": [0], "context": [1, 2.0], "mixer": ["flash", None], "reset_gate": ["no"],
    "global_tokens": [3, (-1,)], "clusters": [0], "betas": [(0.9,), (0.9, 1.0)], "train_blocks": [0], "document_mask": [0, None],
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name):
    recipe = RECIPES[name]
    for field in fields(recipe):
        for value in WRONG[field.name]:
            with pytest.raises(ValueError, match=rf"^{field.name} (=|must)"):
                replace(recipe, **{field.name: value})


def test_every_field_of_every_recipe_has_its_rule():
    assert all(set(recipe.allowed) == {field.name for field in fields(recipe)} for recipe in RECIPES.values())


@over(("name", "change", "message"), [
    ("kvit_t/fashion_mnist", {"epochs": 2, "warmup_epochs": 3}, "warmup_epochs must be at most epochs = 2, got 3"),
    ("kvit_t/fashion_mnist", {"width": 192, "heads": 5}, "heads must divide width = 192, got 5"),
    ("particles/circle", {"top_k": 201}, "top_k must be at most particles = 200, got 201"),
    ("krause_smollm2/questions", {"top_k": 33}, "top_k must be at most window = 32, got 33"),
    ("kswin_t/fashion_mnist", {"top_k": (2, 4)}, "top_k must be None: a Swin's support is its window"),
    ("kswin_t/fashion_mnist", {"norm": "post"}, "norm must be one of pre, got 'post'"),
    ("karm/mnist", {"dataset": "imagenet"}, "dataset must be one of .*none that comes as folders"),
    ("karm/digits", {"dataset": "mnist"}, "dataset must be one of digits, photograph_tiles"),
    ("lm_krause_100m/openstax", {"batch_size": 975}, "batch_size = 975 must be a multiple of per_device_batch_size, 61"),
    ("lm_krause_100m/openstax", {"width": 760}, "heads must divide width = 760, got 12"),
    ("lm_routing_100m/openstax", {"gradient_checkpointing": True}, "gradient_checkpointing must be False for routing"),
    ("lm_krause_100m/openstax", {"top_k": 33}, "top_k must be at most window = 32, got 33"),
    ("lm_longformer_100m/openstax", {"global_tokens": (0, 1024)}, "global_tokens must be a position of the sequence, 0 to 1023, got 1024"),
    ("lm_longformer_100m/openstax", {"global_tokens": (1, 1)}, "global_tokens must be different"),
    ("lm_routing_100m/openstax", {"clusters": 7}, "clusters must divide the 1024 positions of the sequence, got 7"),
    ("lm_routing_100m/openstax", {"heads": 1}, "half of which are local, must be an integer ≥ 2, got 1"),
    ("lm_longformer_100m/openstax", {"document_mask": True}, "document_mask must be False for longformer"),
    ("krause_smollm2/questions", {"batch_size": 6}, "batch_size = 6 must be a multiple of per_device_batch_size, 4"),
])
def test_fields_that_do_not_fit_together_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPES[name], **change)


@pytest.mark.parametrize(("name", "wrong", "nearest"), [
    ("kvit_t/fashion_mnist", "learning_sigma", "learn_sigma"), ("kvit_t/fashion_mnist", "batchsize", "batch_size"),
    ("karm/mnist", "windw", "window"), ("krause_smollm2/questions", "per_device_batch", "per_device_batch_size"),
    ("particles/circle", "sigam", "sigma"),
])
def test_a_misspelt_field_is_a_type_error_with_the_nearest_name(name, wrong, nearest):
    recipe = RECIPES[name]
    for make in (lambda: replace(recipe, **{wrong: 1}), lambda: type(recipe)(**{**asdict(recipe), wrong: 1})):
        with pytest.raises(TypeError, match=f"{type(recipe).__name__} takes no '{wrong}'; the nearest name is '{nearest}' "):
            make()


def test_numpy_numbers_and_lists_are_taken_as_pythons():
    recipe = RECIPES["kvit_t/fashion_mnist"]
    same = replace(recipe, top_k=np.array([2, 4]), batch_size=np.int64(256), lr=np.float64(3e-4), learn_sigma=np.bool_(True), seeds=[3407])
    assert same == recipe and same.fingerprint == recipe.fingerprint and type(same.batch_size) is int and type(same.learn_sigma) is bool
    for kind in RECIPES.values():
        assert type(kind)(**kind.to_dict()) == kind  # as read from a run's recipe.json
    assert replace(RECIPES["krause_smollm2/questions"], base=Path("some") / "where").base == "some/where"
    assert pickle.loads(pickle.dumps(recipe)) == deepcopy(recipe) == recipe


def test_on_cifar10_all_models_are_trained_alike_at_a_desk():
    names = ("kvit_s", "vit_s", "kvit_s_local", "kvit_s_full", *(name.partition("/")[0] for name in (*CIFAR_CONTROLS, *baseline_recipes())))
    found = [asdict(RECIPES[f"{name}/cifar10"].at("desk")) for name in names]
    model = {"name", "score", "radius", "metric", "top_k", "norm", "layer_norm_eps", "unpublished", "published", "stages", "blocks"}
    assert {key for recipe in found for key in recipe if recipe[key] != found[0].get(key)} <= model
    kvit = asdict(RECIPES["kvit_s/cifar10"])
    for name, change in CIFAR_CONTROLS.items():
        changed = {key for key, value in asdict(RECIPES[name]).items() if value != kvit[key]}
        assert changed - {"name", "unpublished", "published"} == set(change)


def test_models_are_made_by_name_as_in_timm():
    assert {"kvit_s_cifar10", "kvit_t_fashion_mnist"} <= set(list_models("kvit*")) < set(list_models()) and list_models("kvit") == []
    with torch.device("meta"):
        paper = create_model("kvit_s_cifar10")
        language = next(iter(language_model_recipes())).replace("/", "_")
        names = ("vit_b16_imagenet", "kswin_t_cifar10", "convolution_cifar10", "karm_mnist", language)
        made = [type(create_model(name, profile="smoke")).__name__ for name in names]
    assert paper.num_parameters() == RECIPES["kvit_s/cifar10"].published["parameters"]
    assert made == ["VisionTransformer", "SwinClassifier", "PixelClassifier", "ImageTransformer", "LanguageModel"]
    model = create_model("kvit_s_cifar10", pretrained=False, num_classes=7, profile="smoke", sigma=1.5, image_size=48)
    assert (model.head.out_features, model.config.num_labels, model.config.sigma, model.config.image_size) == (7, 7, 1.5, 48)
    assert [model.config.image_mean, model.config.image_std] == list(map(list, PIXELS["cifar10"]))


@pytest.mark.parametrize(("wrong", "kind", "message"), [
    ({"name": "kvit_s_cifar"}, ValueError, "list_models.* got 'kvit_s_cifar'; did you mean kvit_s_cifar10"),
    ({"name": 3}, ValueError, "got 3"), ({"name": ["kvit_s_cifar10"]}, ValueError, "list_models.* got .'kvit_s_cifar10'"),
    ({"pretrained": True}, ValueError, "pretrained must be False"),
    ({"pretrained": 0}, ValueError, "pretrained must be True or False"), ({"num_classes": 0}, ValueError, "num_classes must be an integer"),
    ({"name": "karm_mnist", "num_classes": 3}, ValueError, "num_classes must be None for karm_mnist"),
    ({"profile": "large"}, ValueError, "profile must be"), ({"sigma": -1}, ValueError, "sigma must be"),
    ({"sigmas": 1}, TypeError, "the nearest name is 'sigma'"),
])
def test_models_that_cannot_be_made(wrong, kind, message):
    with pytest.raises(kind, match=message):
        create_model(**{"name": "kvit_s_cifar10", **wrong})


def test_a_pattern_is_a_string():
    with pytest.raises(ValueError, match="pattern must be a string with wildcards, got 5"):
        list_models(5)
