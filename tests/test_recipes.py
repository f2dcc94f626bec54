"""Every published row has its recipe: exact where the paper is known, marked as ours where it is not."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from krause_repro.attention import SCORES
from krause_repro.recipes import (
    IMAGE_DATA,
    PARTICLE_FIELDS,
    PROFILES,
    RECIPES,
    SUPPORTS,
    UNPUBLISHED,
    ImageClassificationRecipe,
    ParticleRecipe,
    ablation_name,
    ablation_recipes,
    get_recipe,
    parse_row,
    published_tables,
    row_name,
)

IMAGE_RECIPES = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, ImageClassificationRecipe)}
ROWS = [(dataset, row) for dataset, data in IMAGE_DATA.items() for row in published_tables()[data["table"]]["rows"]]
KNOWN = {
    "kvit_s/cifar10", "vit_s/cifar10", "kvit_s16/imagenet", "vit_s16/imagenet", "kvit_b16/imagenet", "vit_b16/imagenet",
    "kvit_s_local/cifar10", "kvit_s_full/cifar10",
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


@pytest.mark.parametrize("name", EXACT)
def test_published_settings_are_exact(name):
    found = asdict(RECIPES[name])
    expected = EXACT[name] | TRAINING
    assert {key: found[key] for key in expected} == expected
    assert set(RECIPES[name].ours) == {"held_out"}


@pytest.mark.parametrize(("dataset", "row"), ROWS)
def test_every_row_has_a_recipe_with_its_numbers(dataset, row):
    recipe = RECIPES[row_name(dataset, row[0])]
    assert (recipe.name, recipe.profile, recipe.dataset) == (row_name(dataset, row[0]), "paper", dataset)
    assert recipe.published["table"] == IMAGE_DATA[dataset]["table"] and list(recipe.published.values())[1:] == row
    assert (recipe.score == "krause") == row[0].startswith("KViT")
    assert (recipe.positions == "rotary") == row[0].endswith("(RoPE)")
    assert recipe.config.attention_score == recipe.score
    assert recipe.classes == {"cifar10": 10, "cifar100": 100, "imagenet": 1000, "fashion_mnist": 10}[dataset]


def test_rows_are_all_and_have_names_of_their_own():
    assert len(ROWS) == 8 + 8 + 10 + 2 == len({row_name(dataset, row[0]) for dataset, row in ROWS})
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert set(RECIPES) - {row_name(dataset, row[0]) for dataset, row in ROWS} - set(ablation_recipes()) == {
        "particles/circle", "particles/sphere", "vit_t_post/fashion_mnist", "kvit_s_local/cifar10", "kvit_s_full/cifar10",
    }


def test_ablation_varies_one_thing_at_a_time():
    grid = {(score, support, norm): RECIPES[ablation_name(score, support, norm)]
            for score in SCORES for support in SUPPORTS for norm in ("post", "pre")}
    assert len({recipe.name for recipe in grid.values()}) == 18 and len(ablation_recipes()) == 16 + 3
    common = {"score", "radius", "top_k", "norm", "name", "ours", "published"}
    for (score, support, norm), recipe in grid.items():
        assert (recipe.score, recipe.norm) == (score, norm)
        assert (recipe.radius is None, recipe.top_k is None) == (support == "full", support != "local_top_k")
        desk, kvit = recipe.at("desk"), RECIPES["kvit_t/fashion_mnist"].at("desk")
        changed = {f.name for f in fields(desk) if getattr(desk, f.name) != getattr(kvit, f.name)}
        assert changed <= common
    for name, field in {"random_local_top_k": "random_support", "fixed_sigma": "learn_sigma"}.items():
        recipe = RECIPES[f"ablation_{name}/fashion_mnist"]
        assert {f.name for f in fields(recipe) if getattr(recipe, f.name) != getattr(RECIPES["kvit_t/fashion_mnist"], f.name, None)} == {
            field, "name", "ours", "published"}
    random, kvit = (RECIPES[name].config.to_dict() for name in ("ablation_random_local_top_k/fashion_mnist", "kvit_t/fashion_mnist"))
    assert {key for key in random if random[key] != kvit[key]} == {"attention_random_seed"}


def test_published_ablation_has_its_rows():
    assert [RECIPES[name].published["accuracy"] for name in ("kvit_s_local/cifar10", "kvit_s_full/cifar10")] == [95.59, 94.06]
    assert RECIPES["kvit_s_full/cifar10"].radius is None and RECIPES["kvit_s_local/cifar10"].radius == 1


def test_parse_row():
    assert parse_row("KViT-S/16") == ("kvit", "S", 16, False)
    assert parse_row("ViT-B/16 (RoPE)") == ("vit", "B", 16, True)
    assert parse_row("ViT-B (RoPE)") == ("vit", "B", None, True)
    assert row_name("imagenet", "ViT-B/16 (RoPE)") == "vit_b16_rope/imagenet"


@pytest.mark.parametrize("name", sorted(set(IMAGE_RECIPES) - KNOWN))
def test_what_is_not_published_is_ours(name):
    assert set(RECIPES[name].ours) >= {*UNPUBLISHED, "held_out"}
    assert {"radius", "metric", "top_k", "sigma", "lr", "batch_size", "drop_path"} <= set(UNPUBLISHED)


@pytest.mark.parametrize("name", RECIPES)
def test_ours_names_fields(name):
    recipe = RECIPES[name]
    assert set(recipe.ours) <= {field.name for field in fields(recipe)}
    if isinstance(recipe, ParticleRecipe):
        assert set(recipe.ours) == set(PARTICLE_FIELDS) >= {"particles", "sigma", "radius", "step", "duration", "integrator", "starts"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_frozen(name):
    with pytest.raises(FrozenInstanceError):
        RECIPES[name].seeds = (1,)
    assert hash(RECIPES[name]) == hash(replace(RECIPES[name]))


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_every_profile_makes_a_model_that_fits_its_data(name):
    for profile in PROFILES:
        recipe = RECIPES[name].at(profile)
        config = recipe.config  # raises when the settings do not fit together
        assert (config.image_size, config.num_channels, config.num_labels) == (recipe.image_size, recipe.channels, recipe.classes)
        assert (config.hidden_size, config.num_hidden_layers, config.attention_radius) == (recipe.width, recipe.depth, recipe.radius)
        assert config.attention_top_k == (None if recipe.top_k is None else list(recipe.top_k))


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_profile_keeps_what_makes_the_model_its_own(name):
    recipe = RECIPES[name]
    kept = {"name", "published", "ours", "dataset", "score", "radius", "metric", "top_k", "norm", "positions", "sigma", "classes",
            "image_size", "patch_size", "dimension", "step"}
    for profile in ("smoke", "desk"):
        before, after = asdict(recipe), asdict(recipe.at(profile))
        assert {key: after[key] for key in kept & set(after)} == {key: before[key] for key in kept & set(before)}


def test_particles_are_fewer_in_smoke_alone():
    recipe = get_recipe("particles/circle")
    desk, smoke = recipe.at("desk"), recipe.at("smoke")
    assert asdict(desk) == asdict(recipe) | {"profile": "desk"}
    assert smoke.particles < recipe.particles and smoke.duration < recipe.duration and smoke.starts < recipe.starts
    assert (get_recipe("particles/circle").dimension, get_recipe("particles/sphere").dimension) == (2, 3)


@pytest.mark.parametrize("other", ["vit_t/fashion_mnist", "vit_t_post/fashion_mnist"])
def test_desk_rivals_are_trained_alike(other):
    "The comparison on the desk is of models: every field that is not of the model is the same."
    model = {"name", "score", "radius", "metric", "top_k", "sigma", "learn_sigma", "norm", "layer_norm_eps", "published", "ours"}
    one, two = (asdict(get_recipe(name).at("desk")) for name in ("kvit_t/fashion_mnist", other))
    assert {key for key in one if one[key] != two[key]} <= model
    assert one["drop_path"] == two["drop_path"] and one["lr"] == two["lr"] and one["seeds"] == two["seeds"]


def test_the_control_differs_from_the_baseline_by_its_norm():
    control, baseline = (asdict(get_recipe(name)) for name in ("vit_t_post/fashion_mnist", "vit_t/fashion_mnist"))
    differing = {key for key in control if control[key] != baseline[key]}
    assert differing == {"name", "norm", "layer_norm_eps", "published", "ours"} and control["norm"] == "post"
    assert control["published"] == {}


# Fingerprints


@pytest.mark.parametrize("name", ["kvit_t/fashion_mnist", "particles/sphere"])
def test_fingerprint_is_of_the_deciding_fields(name):
    recipe = RECIPES[name]
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x", tuple: lambda v: (*v, 7),
             dict: lambda v: {**v, "x": 1}, type(None): lambda v: 3}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        changed = replace(recipe, **{field.name: other[type(value)](value)})
        same = changed.fingerprint == recipe.fingerprint
        assert same == (field.name in ("seeds", "ours", "published")), field.name
    assert replace(recipe).fingerprint == recipe.fingerprint


def test_fingerprints_tell_all_recipes_and_profiles_apart():
    found = [recipe.at(profile).fingerprint for recipe in RECIPES.values() for profile in PROFILES]
    assert len(set(found)) == len(found)


def test_plain_data():
    data = get_recipe("kvit_s/cifar10").to_dict()
    assert data["top_k"] == [2, 4] and data["seeds"] == [3407] and data["published"]["accuracy"] == 95.2


@pytest.mark.parametrize(("name", "near"), [("kvit_s/cifar", "kvit_s/cifar10"), ("vit_t/fashionmnist", "vit_t/fashion_mnist"), ("", ""),
                                            (None, "")])
def test_unknown_names_suggest_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"recipe must be one of .*{near}.*got {name!r}"):
        get_recipe(name)
