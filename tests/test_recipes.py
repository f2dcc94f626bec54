"""Every published row has its recipe: exact where the paper is known, marked as ours where it is not."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForImageClassification

from krause_repro.attention import SCORES
from krause_repro.data import Collator
from krause_repro.recipes import (
    IMAGE_DATA,
    PARTICLE_FIELDS,
    PROFILES,
    RECIPES,
    SUPPORTS,
    UNPUBLISHED,
    UNPUBLISHED_SWIN,
    ImageClassificationRecipe,
    ParticleRecipe,
    SwinRecipe,
    ablation_name,
    ablation_recipes,
    fine_tuning_recipes,
    generation_recipes,
    get_recipe,
    parse_row,
    photograph_recipes,
    published_tables,
    row_name,
    swin_recipes,
)

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


@pytest.mark.parametrize("row", published_tables()["table14_swin"]["rows"], ids=lambda row: row[0])
def test_swin_settings_are_exact(row):
    recipe, tiny = RECIPES[row_name("cifar10", row[0])], row[0].endswith("T")
    expected = SWIN | {"score": "krause" if row[0].startswith("K") else "softmax", "depth": 12 if tiny else 24}
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.published == {"table": "table14_swin", "model": row[0], "accuracy": row[1]}
    assert set(recipe.ours) == ({"held_out"} if tiny else {"held_out", *UNPUBLISHED_SWIN})
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
             "published", "ours"}
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
        assert changed == {"name", "published", "ours", *recipe.ours} and recipe.published == {}
        for profile in PROFILES:
            small = recipe.at(profile)
            assert (small.image_size, small.train_images, small.test_images) == (224, None, None) and 0 < small.held_out < 48


def test_rows_are_all_and_have_names_of_their_own():
    assert len(ROWS) == 8 + 8 + 10 + 2 == len({row_name(dataset, row[0]) for dataset, row in ROWS})
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert set(RECIPES) - {row_name(dataset, row[0]) for dataset, row in ROWS} - set(ablation_recipes()) == {
        "particles/circle", "particles/sphere", "vit_t_post/fashion_mnist", "kvit_s_local/cifar10", "kvit_s_full/cifar10",
        "kswin_t/cifar10", "swin_t/cifar10", "kswin_s/cifar10", "swin_s/cifar10", "kswin_t/fashion_mnist", "swin_t/fashion_mnist",
        "kvit_s16/photographs", "vit_s16/photographs", "vit_t/mnist", "vit_t/digits",
    } | set(generation_recipes()) | set(fine_tuning_recipes())


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


@pytest.mark.parametrize("name", sorted(set(IMAGE_RECIPES) - KNOWN - set(photograph_recipes())))
def test_what_is_not_published_is_ours(name):
    assert set(RECIPES[name].ours) >= {*(UNPUBLISHED_SWIN if isinstance(RECIPES[name], SwinRecipe) else UNPUBLISHED), "held_out"}
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
