"""Generators end to end: the paper's recipes, small data, training by held-out bits, images that are kept, and their numbers."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from cases import over
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm

from krause_repro import cli, generation_evaluation
from krause_repro.bench_generation import _generation_row, bench_generation, generation_speed_table
from krause_repro.evaluation import FLAT_LOSS, learned_sigma, undertrained_mark
from krause_repro.generation_evaluation import (
    GENERATOR_LABELS,
    bits_table,
    class_features,
    classifier_run,
    context_baselines,
    evaluate_generators,
    first_frequencies,
    frechet_distance,
    frechet_sentence,
    sample_run,
    samples_folder,
    save_image_grid,
    test_bits,
)
from krause_repro.generation_recipes import (
    CLASSIFIERS,
    GENERATION_DATA,
    GENERATOR_VARIANTS,
    GENERATORS,
    ImageGenerationRecipe,
    generation_recipes,
)
from krause_repro.image_data import ImageSet, Splits, TokenCollator, load, load_splits
from krause_repro.image_files import find_source
from krause_repro.image_transformer import ImageTransformer
from krause_repro.likelihood import bits_per_dimension
from krause_repro.recipe_base import published_tables
from krause_repro.recipes import GENERATION_SPEED, RECIPES, GenerationCase, get_recipe
from krause_repro.records import InUse, file_digest, locked, write_digests
from krause_repro.results import pack_images, unpack_images
from krause_repro.runs import Run, TrainingDiverged, run_path
from krause_repro.swin import SwinClassifier, SwinClassifierConfig
from krause_repro.tasks import save_model, task_of
from krause_repro.training import build_trainer, train, training_arguments
from krause_repro.vision_transformer import VisionTransformer, VisionTransformerConfig

MNIST = {
    "image_shape": (28, 28, 1), "levels": 256, "width": 256, "depth": 12, "heads": 8, "mlp_width": 1024, "window": 128, "top_k": 96,
    "sigma": 2.5, "dropout": 0.1, "epochs": 30, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.01, "max_grad_norm": None,
    "warmup_share": 0.05, "final_lr_share": 1e-6, "start_token": False, "samples": 50_000, "seeds": (3407,), "profile": "paper",
    "train_images": None, "test_images": None,
}
CIFAR = MNIST | {
    "image_shape": (32, 32, 3), "width": 512, "depth": 16, "mlp_width": 2048, "window": 256, "top_k": 192, "batch_size": 8,
    "samples": 10_000,
}


@pytest.fixture(scope="module")
def tiny():
    "KARM on few digits."
    return replace(get_recipe("karm/digits").at("smoke"), train_images=64, held_out=40, test_images=30, epochs=1, samples=6, batch_size=16)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    "A finished run; do not change its directory."
    return train(tiny, 0, runs=tmp_path_factory.mktemp("runs"), progress=False)


# Recipes


@pytest.mark.parametrize(("data", "expected", "table"), [
    ("mnist", MNIST, "table4_mnist_generation"), ("cifar10", CIFAR, "table5_cifar10_generation"),
])
@pytest.mark.parametrize("model", GENERATORS)
def test_published_settings_are_exact(model, data, expected, table):
    recipe = get_recipe(f"{model}/{data}")
    found = asdict(recipe)
    assert {key: found[key] for key in expected} == expected and recipe.unpublished == ("held_out",)
    row = next(row for row in published_tables()[table]["rows"] if row[0] == model.upper())
    assert recipe.published == {"table": table, **dict(zip(published_tables()[table]["columns"], row, strict=True))}
    assert recipe.config.attention == GENERATORS[model] and recipe.config.tokens == math.prod(expected["image_shape"])


@over("profile", ["smoke", "desk", "paper"])
@over("data", GENERATION_DATA)
def test_models_of_one_data_set_differ_by_their_attention_alone(data, profile):
    ours = {name: asdict(recipe.at(profile)) for name, recipe in generation_recipes().items() if name.endswith(f"/{data}")}
    karm = ours[f"karm/{data}"]
    for name, recipe in ours.items():
        model = name.partition("/")[0]
        changed = {key for key in karm if recipe[key] != karm[key]} - {"name", "published"}
        allowed = {"attention"} if model in GENERATORS else set(GENERATOR_VARIANTS[model][1])
        assert changed == (set() if model == "karm" else allowed)
        assert RECIPES[name].at(profile).config.start_token == (profile != "paper")


def test_table_16_is_attached_to_what_it_prints():
    assert get_recipe("karm_no_window_no_top_k/mnist").published["bits_per_dim"] == 0.5593
    assert get_recipe("karm_no_window/mnist").published == {} and get_recipe("karm_no_top_k/mnist").published == {}


def test_the_desk_keeps_the_papers_window():
    for name in ("karm/fashion_mnist", "karm/photograph_tiles"):
        paper, desk = get_recipe(name), get_recipe(name).at("desk")
        assert (desk.window, desk.top_k, desk.levels, desk.image_shape) == (paper.window, paper.top_k, 256, paper.image_shape)
        assert desk.config.attention_window == paper.window and desk.test_images is None
    assert len(get_recipe("karm/fashion_mnist").at("desk").seeds) == 3


# Data


def test_digits_and_tiles_come_with_scikit_learn(tmp_path):
    for name, shape, levels in (("digits", (1, 8, 8), 17), ("photograph_tiles", (3, 32, 32), 256)):
        train_part, test_part = load(name, "train"), load(name, "test")
        assert train_part.images.shape[1:] == test_part.images.shape[1:] == shape
        assert train_part.images.max().item() < levels and set(train_part.labels.tolist()) == set(test_part.labels.tolist())
        assert train_part.images.float().std() > 0.2 * levels
        with pytest.raises(ValueError, match=f"source must not be given for {name}"):
            find_source(name, tmp_path)


def test_tiles_are_squares_of_the_photographs_and_do_not_overlap():
    from sklearn.datasets import load_sample_image

    china = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    parts = load("photograph_tiles", "train").images, load("photograph_tiles", "test").images
    assert torch.equal(parts[0][16 + 2], china[:, 32:64, 64:96])  # second row, third column
    assert torch.equal(parts[1][4 + 1], china[:, 32:64, 17 * 32:18 * 32])  # the last four columns are for testing
    whole = torch.cat(parts).flatten(1)
    assert len(whole) == 13 * 20 * 2 and len(torch.unique(whole, dim=0)) > 0.99 * len(whole)  # some of the sky may be alike


def test_mnist_is_not_fashion_mnist(source, no_downloads):
    raw = no_downloads / "MNIST" / "raw"
    raw.parent.mkdir()
    raw.symlink_to(source)
    assert find_source("mnist") == raw
    with pytest.raises(ValueError, match="another data set"):
        load("mnist", "test")


def test_a_batch_is_its_own_label():
    recipe = get_recipe("karm/digits").at("smoke")
    data = load("digits", "train")
    batch = TokenCollator(recipe)([data[i] for i in range(3)])
    assert batch["input_ids"] is batch["labels"] and batch["input_ids"].shape == (3, 65)
    assert torch.equal(batch["input_ids"][1, 1:], data.images[1].flatten().long()) and (batch["input_ids"][:, 0] == 17).all()


# Training


def test_a_generator_is_chosen_by_held_out_bits(run, tiny):
    losses = {line["epoch"]: line["eval_loss"] for line in run.metrics() if "eval_loss" in line}
    assert len(losses) >= 4
    end = run.summary()
    assert end["held_out_loss"] == min(losses.values()) and losses[end["chosen_epoch"]] == min(losses.values())
    model = run.model()
    assert isinstance(model, ImageTransformer) and not model.training and model.config.image_shape == [8, 8, 1]
    held_out = bits_per_dimension(model, load_splits(tiny).held_out.images)
    assert held_out["bits_per_dim_all"] == pytest.approx(end["held_out_loss"] / math.log(2), abs=1e-4)
    assert load_file(run.path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_generator_continued_is_a_generator_uninterrupted(run, tiny, tmp_path):
    from test_training import Killed, Stop

    with pytest.raises(Killed):
        train(tiny, 0, runs=tmp_path, progress=False, callbacks=(Stop(3),))
    again = train(tiny, 0, runs=tmp_path, progress=False)
    one, two = (load_file(r.path / "model.safetensors") for r in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_papers_schedule(tmp_path):
    recipe = get_recipe("karm/mnist")
    arguments = training_arguments(recipe, tmp_path, 7, 860, progress=False)
    assert arguments.max_grad_norm == 0 and arguments.warmup_steps == round(0.05 * 30 * 860)
    assert (arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 1e-6})
    assert (arguments.metric_for_best_model, arguments.greater_is_better, arguments.eval_steps) == ("loss", False, 860)
    images = ImageSet(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    small = replace(get_recipe("karm/digits"), batch_size=2, epochs=5, width=16, depth=1, heads=2, mlp_width=16)
    trainer = build_trainer(small, ImageTransformer(small.config), Splits(images, images, images), tmp_path, progress=False)
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-3) == rates[1]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-9)
    decayed = [group for group in trainer.optimizer.param_groups if group["weight_decay"]]
    sigmas = {id(p) for name, p in trainer.model.named_parameters() if name.endswith("log_sigma")}
    assert sigmas and not sigmas & {id(p) for group in decayed for p in group["params"]}
    assert not trainer.model_accepts_loss_kwargs  # a mean is not to be divided by numbers of tokens


def test_data_that_do_not_fit_are_refused_before_anything_is_written(tiny, tmp_path):
    for change, message in (({"levels": 16}, "levels 0…15, got 0…16"), ({"image_shape": (8, 4, 1)}, r"shape \(N, 1, 8, 4\)"),
                            ({"dataset": "photographs"}, "dataset must be one of digits, photograph_tiles, the small data sets")):
        with pytest.raises(ValueError, match=message):
            train(replace(tiny, **change), 0, runs=tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_a_generator_that_diverges_says_so(tiny, tmp_path):
    bad = replace(tiny, lr=1e30, max_grad_norm=None, warmup_share=0.0)
    for message in ("training diverged at step 1: eval_loss is nan", "the same settings would diverge again"):
        with pytest.raises(TrainingDiverged, match=message):
            train(bad, 0, runs=tmp_path, progress=False)
    run = Run(run_path(bad, 0, tmp_path), bad, 0)
    assert not run.finished and not (run.path / "model.safetensors").exists() and not list((run.path / "checkpoints").iterdir())
    assert math.isnan(run.metrics()[-1]["eval_loss"])


def test_more_samples_are_no_other_run(tiny):
    assert replace(tiny, samples=1000).fingerprint == tiny.fingerprint != replace(tiny, lr=1.0).fingerprint


# Numbers and images


def test_test_bits_are_of_the_test_images_and_computed_once(run, tiny):
    found = test_bits(run)
    assert found == bits_per_dimension(run.model(), load_splits(tiny).test.images) and found["images"] == 30
    assert json.loads((run.path / "test.json").read_text()) == found | {"model": file_digest(run.path / "model.safetensors")}
    kept = (run.path / "test.json").stat().st_mtime_ns
    assert cli.run_scores(run) == test_bits(run) == found and (run.path / "test.json").stat().st_mtime_ns == kept


@pytest.fixture
def moved(run, tmp_path):
    "A copy of the run, to be spoiled."
    import shutil

    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "samples"))
    return Run(tmp_path / "run", run.recipe, 0)


def test_images_are_kept_and_an_interrupted_sampling_goes_on(moved, monkeypatch):
    whole = sample_run(moved, 7, batch=7, seed=3, progress=False)
    folder = samples_folder(moved, 3, 1.0, 1.0)
    for path in folder.glob("images-*"):
        path.unlink()
    written, real = [], generation_evaluation.generate_batches

    def interrupted(*arguments):
        for batch in real(*arguments):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(batch[0])
            yield batch

    monkeypatch.setattr(generation_evaluation, "generate_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_run(moved, 7, batch=2, seed=3, progress=False)
    assert written == [[0, 1], [2, 3]] and len(list(folder.glob("images-*"))) == 2
    monkeypatch.setattr(generation_evaluation, "generate_batches", real)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("images-*")}
    assert torch.equal(sample_run(moved, 7, batch=2, seed=3, progress=False), whole)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("images-*")}.items()
    assert torch.equal(sample_run(moved, 5, seed=3, progress=False), whole[:5])
    assert not torch.equal(sample_run(moved, 7, seed=4, progress=False), whole)


def test_gaps_and_torn_files_are_made_again(moved):
    whole = sample_run(moved, 6, batch=2, progress=False)
    folder = samples_folder(moved, 0, 1.0, 1.0)
    (folder / "images-000004.safetensors").unlink()
    assert torch.equal(sample_run(moved, 6, batch=4, progress=False), whole)
    torn = folder / "images-000002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert torch.equal(sample_run(moved, 6, batch=3, progress=False), whole)
    (folder / "images-abc.safetensors").touch()
    for wrong in ({"x": whole}, {"images": whole[:, :, :4].contiguous()}, {"images": whole.int()}, {"images": whole + 17}):
        save_file(wrong, folder / "images-000000.safetensors")
        assert len(generation_evaluation._saved_images(folder, moved.recipe)) == 0
    grey = get_recipe("karm/mnist").at("smoke")  # 256 levels, as many as uint8 has
    save_file({"images": torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)}, folder / "images-000000.safetensors")
    assert len(generation_evaluation._saved_images(folder, grey)) == 2
    assert torch.equal(sample_run(moved, 6, batch=6, progress=False), whole)


def test_images_of_another_state_of_the_model_are_not_mixed(moved):
    sample_run(moved, 2, progress=False)
    change(moved)
    with pytest.raises(ValueError, match="another state of this model"):
        sample_run(moved, 3, progress=False)


def change(run):
    "Another state of the model."
    model = run.model()
    with torch.no_grad():
        model.head.bias[0] += 5.0
    save_model(model, run.path)
    write_digests(run.path, task_of(run.recipe).files)


def test_images_without_a_record_of_their_settings_are_made_again(moved):
    before = sample_run(moved, 4, batch=2, progress=False)
    folder = samples_folder(moved, 0, 1.0, 1.0)
    (folder / "settings.json").unlink()
    (folder / ".images-000000.safetensors.x1.safetensors").touch()
    assert torch.equal(sample_run(moved, 4, progress=False), before)
    (folder / "settings.json").unlink()
    change(moved)
    after = sample_run(moved, 3, progress=False)
    assert not torch.equal(after, before[:3]) and torch.equal(sample_run(moved, 3, progress=False), after)
    assert {path.name for path in folder.iterdir()} == {"settings.json", "images-000000.safetensors"}
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is not valid JSON"):
        sample_run(moved, 3, progress=False)


def test_bits_of_another_state_of_the_model_are_measured_again(moved):
    before = test_bits(moved)
    change(moved)
    assert test_bits(moved) != before and test_bits(moved) == bits_per_dimension(moved.model(), load_splits(moved.recipe).test.images)
    for content in ("[]", "{}"):
        (moved.path / "test.json").write_text(content)
        with pytest.raises(ValueError, match="test.json must hold the results of a model"):
            test_bits(moved)
    model = file_digest(moved.path / "model.safetensors")
    for wrong in ({"bits_per_dim": -3}, {"bits_per_dim_all": math.nan}, {"bits_per_dim": "x"}, {"images": None}):
        (moved.path / "test.json").write_text(json.dumps(before | wrong | {"model": model}))
        with pytest.raises(ValueError, match=f"test.json: {next(iter(wrong))} must be .*; delete it to evaluate again"):
            test_bits(moved)


def test_one_process_makes_the_images_of_a_folder(moved):
    made = sample_run(moved, 2, progress=False)
    with locked(samples_folder(moved, 0, 1.0, 1.0)):
        with pytest.raises(InUse, match="samples/seed-0_temperature-1.0_top_p-1.0 is in use by process"):
            sample_run(moved, 3, progress=False)
        assert torch.equal(sample_run(moved, 2, progress=False), made)  # nothing has to be made
    assert len(sample_run(moved, 3, progress=False)) == 3
    assert [path.name for path in (moved.path / "samples").iterdir()] == ["seed-0_temperature-1.0_top_p-1.0"]


@pytest.mark.parametrize(("options", "message"), [
    ({"count": 0}, "count"), ({"temperature": 0.0}, "temperature"), ({"top_p": 2.0}, "top_p"), ({"batch": 0}, "batch"),
    ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": 10**20 - 1}, "seed"), ({"temperature": 1e-50}, "logits must be finite"),
    ({"source": "/nowhere"}, "source must be a file or folder that is there"), ({"source": "/"}, "source must not be given for digits"),
])
def test_sampling_settings_are_refused_before_anything_is_written(moved, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample_run(moved, **{"count": 2, "progress": False, **options})
    assert not [path for path in (moved.path / "samples").rglob("*") if path.is_file()]


def test_an_unfinished_run_makes_nothing(tmp_path, tiny):
    empty = Run(tmp_path / "none", tiny, 0)
    for ask in (lambda: sample_run(empty, 2), lambda: test_bits(empty)):
        with pytest.raises(ValueError, match="not finished; finish it with: krause-repro train karm/digits --profile smoke --seed 0"):
            ask()


def test_models_without_a_start_token_begin_as_the_training_images_do(tmp_path, tiny):
    plain = replace(tiny, start_token=False)
    made = sample_run(train(plain, 0, runs=tmp_path, progress=False), 4, progress=False)
    images = load_splits(plain).train.images
    assert set(made[:, 0, 0, 0].tolist()) <= set(images[:, 0, 0, 0].tolist())
    assert torch.equal(first_frequencies(images, 17), torch.bincount(images[:, 0, 0, 0].long(), minlength=17))


def test_a_summary_of_generators(run, tiny):
    found = json.loads(json.dumps(evaluate_generators([run, replace(run, seed=1)]), allow_nan=False))
    assert found["bits_per_dim"]["values"] == [test_bits(run)["bits_per_dim"]] * 2 and found["test_images"] == 30
    assert found["held_out_bits"]["mean"] == pytest.approx(run.summary()["held_out_loss"] / math.log(2))
    assert np.array_equal(unpack_images(found["samples"]), sample_run(run, tiny.samples, progress=False)[:8])
    assert found["completions"]["completed"]["shape"] == [6, 4, 1, 8, 8]
    assert np.array_equal(unpack_images(found["completions"]["originals"]), load_splits(tiny).test.images[:6])
    assert found["frechet"]["n"] == 2 and found["frechet"]["real"] > 0 and found["frechet"]["classifier"] == "vit_t/digits"
    assert (found["frechet"]["images"], found["frechet"]["real_images"]) == (6, 6)
    assert (run_path(get_recipe("vit_t/digits").at("smoke"), 0, run.runs) / "finished.json").is_file()
    assert found["sigma"]["mean"] == pytest.approx(learned_sigma(run)) and len(found["sigma"]["mean"]) == tiny.depth
    curve = found["curves"]["held_out"]
    assert min(curve["mean"]) == pytest.approx(found["held_out_bits"]["mean"]) and curve["sd"] == [0.0] * len(curve["mean"])
    table = bits_table({"karm/digits": found, "arm/digits": None}, {"order 1": {"bits_per_dim": 2.7, "bits_per_dim_all": 2.71}})
    assert f"| KARM (Krause) | {found['bits_per_dim']['mean']:.3f} ± 0.000{undertrained_mark(found['curves'], FLAT_LOSS)} |" in table
    assert frechet_sentence({"karm/digits": found, "arm/digits": None}).endswith(f"; of 6 held-out images {found['frechet']['real']:.3f}.")
    assert "Not finished: ARM (softmax)" in table and "| counts, bigram | 2.700 | 2.710 |" in table


def test_every_generator_has_a_label_and_every_data_set_but_the_tiles_a_judge():
    models = {name.partition("/")[0] for name in generation_recipes()}
    assert set(GENERATOR_LABELS) == models and set(CLASSIFIERS) == set(GENERATION_DATA) - {"photograph_tiles"}
    assert classifier_run("photograph_tiles", "smoke") is None
    for dataset, name in CLASSIFIERS.items():
        assert get_recipe(name).dataset == dataset


def test_baselines_are_of_the_same_images(tiny):
    found = context_baselines(tiny)
    assert list(found) == ["order 0", "order 1", "order 2", "above and left"]
    assert found["order 1"]["bits_per_dim"] < found["order 0"]["bits_per_dim"] < math.log2(17) and found["order 1"]["images"] == 30


# Packed images, sheets, the command, the benchmark


def test_packed_images_are_the_images():
    images = torch.randint(256, (3, 2, 3, 5, 4), dtype=torch.uint8).numpy()
    packed = json.loads(json.dumps(pack_images(images)))
    assert np.array_equal(unpack_images(packed), images) and unpack_images(packed).dtype == np.uint8
    assert np.array_equal(unpack_images(pack_images(images.transpose(4, 0, 1, 2, 3))), images.transpose(4, 0, 1, 2, 3))
    for damaged in ({**packed, "bytes": packed["bytes"][:-8]}, {**packed, "shape": [7]}, {**packed, "bytes": "ö"}):
        with pytest.raises(ValueError, match="packed images are damaged"):
            unpack_images(damaged)
    with pytest.raises(ValueError, match="images must be uint8, got int64"):
        pack_images(images.astype("int64"))


def test_a_sheet_shows_every_image_from_black_to_white(tmp_path):
    images = torch.stack([torch.full((1, 4, 4), level, dtype=torch.uint8) for level in range(17)])
    picture = Image.open(save_image_grid(images, 17, tmp_path / "sheet.png")).convert("L")
    assert picture.size == (4 * (8 * 5 + 1), 4 * (3 * 5 + 1))
    assert [picture.getpixel((4 * (2 + 5 * (n % 8)), 4 * (2 + 5 * (n // 8)))) for n in (0, 8, 16)] == [0, 128, 255]


def test_the_command_makes_images(run, tiny, monkeypatch, capsys, tmp_path):
    import shutil

    monkeypatch.setitem(RECIPES, "karm/digits", replace(tiny, profile="paper"))
    monkeypatch.setattr(ImageGenerationRecipe, "at", lambda self, profile: tiny)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.path, run_path(tiny, 0, tmp_path / "runs"), ignore=shutil.ignore_patterns("samples"))
    assert cli.main(["sample", "karm/digits", "--images", "3", "--top_p", "0.9"]) == 0
    sheet = capsys.readouterr().out.strip().removeprefix("Images: ")
    assert sheet.endswith("seed-0_temperature-1.0_top_p-0.9/sheet.png") and Image.open(sheet).size[0] > 8


@pytest.mark.parametrize(("arguments", "message"), [
    (["sample", "kvit_t/fashion_mnist"], "recipe must be of an image generator or of a language model from scratch"),
    (["sample", "karm/nothing"], "recipe must be one of"),
    (["sample", "karm_no_window/digits", "--profile", "desk", "--seed", "77"], "is not finished; finish it with: krause-repro train"),
])
def test_the_command_names_what_is_wrong(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_times_every_model_on_the_same_tokens():
    case = GenerationCase("digits", "digits", "smoke", 2)
    settings = replace(GENERATION_SPEED.at("smoke"), cases=(case, replace(case, title="late", start=40, stop=60)), budget=0.1)
    result = bench_generation(settings)
    found = [(row["case"], row["name"]) for row in result["rows"][:6]]
    assert found == [(title, name) for title in ("digits", "late") for name in ("KARM", "ARM", "LARM")]
    whole, late = result["rows"][:3], result["rows"][3:6]
    assert {row["rounds"] for row in whole} == {63} and {row["rounds"] for row in late} == {19}
    assert all(row["ratio"] == 1 for row in result["rows"] if row["name"] == "ARM")
    assert all("images_per_second" in row for row in whole) and not any("images_per_second" in row for row in late)
    assert {row["pass"] for row in result["rows"][6:]} == {"training step"} and len(result["notes"]) == 6
    assert "images per second" in result["notes"][0] and "tokens per second" in result["notes"][3]
    lines = generation_speed_table(result).splitlines()
    assert len(lines) == 2 + 9 and lines[3].startswith("| digits, one token | ARM | ") and " | 1.00 | 1.00 (1.00 to 1.00) | " in lines[3]


def test_speeds_are_counts_over_seconds():
    seconds = {"KARM": [0.1] * 10 + [0.2] * 10, "ARM": [0.4] * 20}
    row = _generation_row(GenerationCase("case", "digits", "smoke", 4), "KARM", seconds, 20)
    assert row["ratio"] == pytest.approx(3 / 8) and row["tokens_per_second"] == pytest.approx(4 * 20 / 3)
    assert row["images_per_second"] == pytest.approx(4 / 3) and row["growth"] == pytest.approx(2)
    assert row["ratio_quartiles"] == [pytest.approx(0.25), pytest.approx(0.5)]
    assert row["curve"]["positions"] == [at + 1.5 for at in range(20)]
    assert row["curve"]["milliseconds"] == pytest.approx([100] * 10 + [200] * 10)


# The Fréchet distance is the formula's, and features are what the last layer sees


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
    pixels = torch.randn(300, 1, 8, 8)  # two batches
    features = class_features(model.train(), pixels)
    assert model.training and not model.head._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(model.head(features), model.eval()(pixels).logits)
