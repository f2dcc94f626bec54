"""A run is chosen on held-out images, can be stopped anywhere and continued to the same bits, and is never overwritten in silence."""

import json
import math
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from cases import over
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from krause_repro import tasks, training
from krause_repro.checks import UserError
from krause_repro.corpus import load_corpus
from krause_repro.image_data import Collator, ImageSet, Splits, load_splits, photograph_folder
from krause_repro.image_files import DATA
from krause_repro.image_recipes import ImageClassificationRecipe
from krause_repro.language_data import EOS
from krause_repro.language_model import LanguageBlock
from krause_repro.recipes import RECIPES, get_recipe
from krause_repro.records import InUse, damage, lock_path, locked, read_json, write_digests, write_json
from krause_repro.runs import (
    Run,
    TrainingDiverged,
    check_data,
    check_diverged,
    check_run,
    checkpoint_problem,
    checkpoints,
    drop_damaged,
    last_checkpoint,
    open_run,
    run_path,
)
from krause_repro.swin import SwinBlock, SwinClassifier
from krause_repro.tasks import process_count, save_model
from krause_repro.training import PartCollator, build_trainer, device_options, dry_run, part_of, train, training_arguments
from krause_repro.vision_transformer import Block, VisionTransformer

STEPS = 4  # in an epoch of the `recipe` fixture


class Killed(Exception):
    "Stands for the end of the process."


class Stop(TrainerCallback):
    "Raises at one event of one step."

    def __init__(self, step, event="on_step_end", error=Killed):
        self.step, self.error = step, error
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **_):
        if state.global_step == self.step:
            raise self.error


def lines(run):
    "What was logged, without what depends on the clock or on where training was continued."
    def timeless(line):
        if "train_runtime" in line:  # Trainer's summary of one call of its own
            return {key: line[key] for key in ("epoch", "step", "total_flos") if key in line}
        return {key: value for key, value in line.items() if not key.endswith(("runtime", "_per_second")) and key != "seconds"}

    return [timeless(line) for line in run.metrics()]


def same(one, two):
    "Do two runs hold the same weights, bit for bit, the same log and the same choice?"
    weights = [load_file(run.path / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert lines(one) == lines(two)
    ends = [{key: value for key, value in run.summary().items() if key != "seconds"} for run in (one, two)]
    assert ends[0] == ends[1]
    return True


def contents(folder):
    "Every file below a folder: its bytes and its time."
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def load_with(load, monkeypatch):
    "Let image classification read its data with `load`."
    monkeypatch.setitem(tasks.TASKS, ImageClassificationRecipe, replace(tasks.TASKS[ImageClassificationRecipe], load=load))


read_once = cache(load_splits)  # the shared finished run is trained on what was read anew


@pytest.fixture
def start(recipe, source, tmp_path, monkeypatch):
    "Trains `recipe` under this test's folder."
    def begin(seed=0, of=recipe, runs=tmp_path, **options):
        return train(of, seed, runs=runs, progress=False, source=source, **options)

    load_with(read_once, monkeypatch)
    return begin


@pytest.fixture
def spoil(recipe, source):
    "After the last step the model names the rarest held-out class whatever it sees: the first epoch is the best."
    rarest = read_once(recipe, source).held_out.labels.bincount(minlength=10).argmin()

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 2 * STEPS:
                with torch.no_grad():
                    model.head.weight.zero_()
                    model.head.bias.copy_(torch.arange(10) == rarest)

    return Spoil()


# A finished run


def test_a_finished_run_is_whole(finished, recipe):
    assert finished.finished and finished.path.parts[-4:] == ("smoke", "kvit_t", "fashion_mnist", "seed-0")
    names = {path.name for path in finished.path.iterdir()}
    assert names == {"recipe.json", "environment.json", "metrics.jsonl", "config.json", "model.safetensors", "README.md",
                     "preprocessor_config.json", "digests.json", "checkpoints", "finished.json"}
    assert damage(finished.path) is None and not lock_path(finished.path).exists()
    saved = json.loads((finished.path / "recipe.json").read_text(encoding="utf-8"))
    assert saved == {"fingerprint": recipe.fingerprint, "seed": 0, "recipe": recipe.to_dict()}
    assert {"commit", "dirty", "device", "threads", "versions"} <= set(finished.environment())
    summary = finished.summary()
    assert summary["steps"] == 2 * STEPS and summary["seconds"] > 0 and summary["threads"] == torch.get_num_threads()
    assert summary["parameters"] == finished.model().num_parameters() == sum(p.numel() for p in finished.model().parameters())
    assert sum("seconds" in line for line in finished.metrics()) == 2
    assert not finished.model().training


def test_the_choice_is_the_best_epoch_on_held_out_images(finished, recipe, source):
    scores = {line["epoch"]: line["eval_accuracy"] for line in finished.metrics() if "eval_accuracy" in line}
    assert list(scores) == [1.0, 2.0]
    summary = finished.summary()
    assert summary["held_out_accuracy"] == max(scores.values())
    assert summary["chosen_epoch"] == min(epoch for epoch, score in scores.items() if score == max(scores.values()))
    held_out = load_splits(recipe, source).held_out
    batch = Collator(recipe, training=False)([held_out[i] for i in range(len(held_out))])
    with torch.no_grad():
        right = finished.model()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    assert right.double().mean().item() == pytest.approx(summary["held_out_accuracy"])


def test_the_model_is_the_best_checkpoint(finished):
    step = round(finished.summary()["chosen_epoch"] * STEPS)
    best = load_file(finished.path / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
    state = finished.model().state_dict()
    assert state.keys() == best.keys() and all(torch.equal(state[name], best[name]) for name in best)


def chose_the_first(run):
    "Is the first epoch's checkpoint the chosen model?"
    first, second = (line["eval_accuracy"] for line in run.metrics() if "eval_accuracy" in line)
    assert first > second
    assert (run.summary()["chosen_epoch"], run.summary()["held_out_accuracy"]) == (1.0, first)
    best = load_file(run.path / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors")
    state = run.model().state_dict()
    return all(torch.equal(state[name], best[name]) for name in best) and bool(state["head.weight"].any())


def test_a_worse_last_epoch_is_not_chosen(start, spoil):
    assert chose_the_first(start(callbacks=(spoil,)))


def test_training_never_looks_at_a_test_image(start, finished, monkeypatch):
    reads = {"train": 0, "held_out": 0, "test": 0}

    class Counting(ImageSet):
        def __init__(self, part, data):
            super().__init__(data.images, data.labels)
            self.part = part

        def __getitem__(self, index):
            reads[self.part] += 1
            return super().__getitem__(index)

    def counted(*arguments):
        splits = load_splits(*arguments)
        return Splits(*(Counting(part, getattr(splits, part)) for part in reads))

    load_with(counted, monkeypatch)
    assert same(start(), finished)
    assert reads == {"train": 2 * 32, "held_out": 2 * 64, "test": 0}


def test_a_finished_run_is_returned_untouched(finished, recipe, tmp_path):
    before = contents(finished.path)
    runs = finished.path.parents[3]
    again = train(recipe, 0, runs=runs, progress=False)
    assert again == finished and contents(finished.path) == before
    remarked = replace(recipe, seeds=(5,), unpublished=(), published={})
    assert train(remarked, 0, runs=runs, progress=False).path == finished.path and contents(finished.path) == before


def test_seeds(start, finished):
    other = start(1)
    one, two = (load_file(run.path / "model.safetensors") for run in (finished, other))
    assert all(not torch.equal(one[name], two[name]) for name in one if "norm" not in name and "bias" not in name)
    assert lines(finished) != lines(other) and (finished.path.name, other.path.name) == ("seed-0", "seed-1")


def test_learning_rate_warms_up_and_falls_as_a_cosine(finished, recipe):
    warm, total = recipe.warmup_epochs * STEPS, 2 * STEPS
    logged = [line for line in finished.metrics() if "learning_rate" in line]
    assert [line["step"] for line in logged] == list(range(1, total + 1))
    for line in logged:
        done = line["step"] - 1  # the rate that this step was taken with
        share = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (total - warm))) / 2
        assert line["learning_rate"] == pytest.approx(recipe.lr * share, abs=1e-12), line
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged)


# The trainer


def splits_of(count=8):
    "A few random images."
    generator = torch.Generator().manual_seed(0)
    images = ImageSet(torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator), torch.arange(count) % 10)
    return Splits(images, images, images)


def test_weight_decay_is_for_matrices(recipe, tmp_path):
    model = VisionTransformer(recipe.config)
    trainer = build_trainer(recipe, model, splits_of(), tmp_path, progress=False)
    trainer.create_optimizer()
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, recipe.weight_decay}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if "log_sigma" in name or "norm" in name or name.endswith("bias"):
            assert id(parameter) not in decayed, name
        elif parameter.ndim == 2:
            assert id(parameter) in decayed, name


def test_recipe_in_the_trainers_words(tmp_path):
    recipe = get_recipe("kvit_s/cifar10")
    arguments = training_arguments(recipe, tmp_path, 7, 176, progress=False)
    assert (arguments.num_train_epochs, arguments.learning_rate, arguments.weight_decay) == (300, 3e-4, 0.05)
    assert (arguments.max_grad_norm, arguments.warmup_steps, arguments.lr_scheduler_type) == (1.0, 1760, "cosine")
    assert (arguments.seed, arguments.data_seed, arguments.bf16) == (7, 7, False)
    assert arguments.per_device_train_batch_size == 256 and arguments.metric_for_best_model == "accuracy"


def test_the_papers_gpu_setting_is_for_imagenet_on_a_gpu():
    plain = {"bf16": False, "torch_compile": False, "optim": "adamw_torch", "channels_last": False}
    paper = {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused", "channels_last": True}
    recipes = [recipe for recipe in RECIPES.values() if isinstance(recipe, ImageClassificationRecipe)]
    assert {DATA[recipe.dataset].folders for recipe in recipes} == {True, False}
    for recipe in recipes:
        for profile in ("paper", "desk", "smoke"):
            assert device_options(recipe.at(profile), cuda=False) == plain, recipe.name
        for profile in ("desk", "smoke"):
            assert device_options(recipe.at(profile), cuda=True) == plain, recipe.name
        assert device_options(recipe, cuda=True) == (paper if DATA[recipe.dataset].folders else plain), recipe.name


def test_arguments_are_those_of_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: False)
    plain = training_arguments(get_recipe("kvit_s16/imagenet"), tmp_path, 7, 176, progress=False)
    assert (plain.bf16, plain.torch_compile, str(plain.optim), plain.use_cpu) == (False, False, "OptimizerNames.ADAMW_TORCH", True)
    given = {}
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training, "TrainingArguments", lambda **words: given.update(words))
    training_arguments(get_recipe("kvit_s16/imagenet"), tmp_path, 7, 176, progress=False)
    found = {key: given[key] for key in ("bf16", "torch_compile", "optim", "use_cpu", "dataloader_pin_memory")}
    assert found == {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused", "use_cpu": False, "dataloader_pin_memory": True}


@pytest.mark.parametrize("name", ["kvit_t/fashion_mnist", "kswin_t/fashion_mnist"])
def test_channels_last_trains_the_same_model(name, tmp_path, monkeypatch):
    "On a CPU the layout alone can be tried: the batches are equal, the logits but for rounding."
    recipe, splits, found = get_recipe(name).at("smoke"), splits_of(), []
    for channels_last in (False, True):
        monkeypatch.setattr(training, "device_options", lambda *_, on=channels_last: device_options(recipe, False) | {"channels_last": on})
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(recipe.config)
        trainer = build_trainer(recipe, model, splits, tmp_path, progress=False)
        (batch,) = trainer.get_eval_dataloader()
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last) or not channels_last
        with torch.no_grad():
            found.append((batch["pixel_values"], model.eval()(**batch).logits))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    assert filters and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in filters)


TRIED = {  # paper recipes of every class, score and mixer; smaller only where the size does not matter for what could break
    **dict.fromkeys(("kvit_b_rope/cifar10", "vit_t/cifar100", "kvit_s32/imagenet", "vit_s_post/cifar10", "softmax_s_local_top_k/cifar10",
                     "convolution/cifar10"), {"depth": 1}),
    "kswin_t/cifar10": {"depths": (1, 1, 1, 1), "depth": 4, "width": 24, "heads": 3, "mlp_width": 96},
    **dict.fromkeys(("karm/mnist", "larm/mnist", "arm/mnist"), {"depth": 1, "width": 32, "mlp_width": 64, "heads": 2}),
    **{f"lm_{mixer}_{size}/fineweb_edu": {"depth": 1, "width": 48, "heads": 2, "mlp_width": 64, "context": 64, "vocab_size": 256}
       for mixer, size in (("krause", "200m"), ("routing", "100m"), ("longformer", "100m"), ("top_k", "100m"))},
}


def test_paper_recipes_take_two_steps_on_random_data_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, change in TRIED.items():
        recipe = replace(get_recipe(name).at("paper"), **change)
        tried = dry_run(recipe, steps=2, batch_size=2)
        assert len(tried["losses"]) == len(tried["seconds"]) == 2 and all(map(math.isfinite, tried["losses"])), name
        assert tried["parameters"] == sum(p.numel() for p in tasks.task_of(recipe).build(recipe).parameters()), name
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_fine_tuning_uses_the_base_model(tmp_path):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    base.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")), eos_token="</s>",
                            pad_token="</s>").save_pretrained(tmp_path)
    recipe = replace(get_recipe("krause_llama3_8b/flan").at("paper"), base=str(tmp_path), dataset="openstax", max_length=16)
    tried = dry_run(recipe, batch_size=2)
    assert all(map(math.isfinite, tried["losses"])) and tried["parameters"] > base.num_parameters()


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 1.5}, {"batch_size": 0}])
def test_a_dry_run_of_nothing_is_refused(recipe, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be an integer"):
        dry_run(recipe, **given)
    with pytest.raises(ValueError, match="recipe 'particles/circle' has nothing to train"):
        dry_run(get_recipe("particles/circle"), **given)


@pytest.mark.parametrize("given", [{"steps": 2**40}, {"steps": 1, "batch_size": 2**60}, {"steps": 2**62}])
def test_a_dry_run_that_memory_does_not_hold_names_its_numbers(recipe, given):
    with pytest.raises(UserError, match=f"steps and batch_size must leave .* got {given['steps']} and {given.get('batch_size', 8)} "):
        dry_run(recipe, **given)


@pytest.mark.parametrize(("name", "auto", "block"), [
    ("kvit_s16/imagenet", AutoModelForImageClassification, Block), ("kswin_t/cifar10", AutoModelForImageClassification, SwinBlock),
    ("lm_krause_100m/fineweb_edu", AutoModelForCausalLM, LanguageBlock),
])
def test_fsdp_wraps_each_block(name, auto, block):
    from accelerate.utils import FullyShardedDataParallelPlugin

    recipe = get_recipe(name)
    with torch.device("meta"):
        model = auto.from_config(recipe.config)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = [part for part in model.modules() if plugin.auto_wrap_policy(module=part, recurse=False, nonwrapped_numel=0)]
    assert len(wrapped) == recipe.depth and {type(part) for part in wrapped} == {block}


def test_weights_gathered_from_elsewhere_are_the_ones_saved(recipe, tmp_path):
    torch.manual_seed(0)
    model, whole = VisionTransformer(recipe.config), VisionTransformer(recipe.config)
    save_model(model, tmp_path, whole.state_dict())
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == whole.state_dict().keys() and all(torch.equal(saved[name], t) for name, t in whole.state_dict().items())


@pytest.mark.parametrize("name", ["kvit_t/fashion_mnist", "vit_t_post/fashion_mnist"])
@pytest.mark.parametrize("profile", ["smoke", "desk"])
def test_a_config_gives_the_initial_weights_of_its_class(name, profile):
    config = get_recipe(name).at(profile).config
    torch.manual_seed(3)
    direct = VisionTransformer(config).state_dict()
    torch.manual_seed(3)
    built = AutoModelForImageClassification.from_config(get_recipe(name).at(profile).config).state_dict()
    assert direct.keys() == built.keys() and all(torch.equal(direct[key], built[key]) for key in direct)


# Other models and data


def test_a_killed_swin_ends_with_the_bits_of_an_unbroken_one(start, tmp_path):
    recipe = replace(get_recipe("kswin_t/fashion_mnist").at("smoke"), train_images=32, held_out=16, test_images=16, batch_size=8)
    with pytest.raises(Killed):
        start(of=recipe, runs=tmp_path / "killed", callbacks=(Stop(STEPS + 2),))
    run = start(of=recipe)
    assert same(start(of=recipe, runs=tmp_path / "killed"), run)
    model = run.model()
    assert run.finished and type(model) is SwinClassifier and run.summary()["steps"] == 2 * STEPS
    assert run.summary()["parameters"] == model.num_parameters()
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in run.metrics() if "loss" in line)
    sigmas = [p for key, p in model.named_parameters() if key.endswith("log_sigma")]
    assert len(sigmas) == 3 and all((sigma != math.log(4.0)).any() for sigma in sigmas)
    assert start(of=recipe) == run


def test_images_left_out_are_in_the_runs_files_and_shown(tmp_path, capsys):
    folder = photograph_folder(tmp_path / "photographs")
    for split, name, file in (("train", "china", "000_000.jpg"), ("val", "flower", "026_400.jpg")):
        (folder / split / name / file).write_bytes(b"damaged")
    recipe = replace(get_recipe("kvit_s16/photographs").at("smoke"), epochs=1)
    options = {"runs": tmp_path / "runs", "progress": False, "source": folder}
    with pytest.raises(ValueError, match="1 of 48 images in .*--unreadable skip"):
        train(recipe, 0, **options)
    assert not (tmp_path / "runs").exists()
    run = train(recipe, 0, unreadable="skip", **options)
    told = {"images": 2, "first": ["train/china/000_000.jpg", "val/flower/026_400.jpg"]}
    assert run.environment()["left_out"] == run.summary()["left_out"] == told
    assert "2 images cannot be decoded and are left out, such as train/china/000_000.jpg, val/flower" in capsys.readouterr().out
    assert run.summary()["steps"] == math.ceil((47 - 8) / 8)


def test_another_word_for_unreadable_is_refused_before_any_work(start, tmp_path):
    for word, message in (("ignore", "must be one of stop, skip, got 'ignore'"), ("skip", "is for folders of images, imagenet and")):
        with pytest.raises(ValueError, match=f"unreadable {message}"):
            start(unreadable=word)
    assert list(tmp_path.iterdir()) == []


def test_batch_is_divided_over_the_processes(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size = 8 must be a multiple of the number of processes, 3"):
        training_arguments(recipe, tmp_path, 0, 4)


def test_evaluation_is_not_augmented(recipe, tmp_path):
    splits = splits_of()
    trainer = build_trainer(recipe, VisionTransformer(recipe.config), splits, tmp_path, progress=False)
    plain = Collator(recipe, training=False)([splits.test[i] for i in range(8)])
    (batch,) = trainer.get_eval_dataloader()
    assert torch.equal(batch["pixel_values"], plain["pixel_values"]) and torch.equal(batch["labels"], plain["labels"])
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].shape == (8, 10)
    assert torch.equal(next(iter(trainer.get_eval_dataloader()))["labels"], plain["labels"])


# Stopped and continued


@pytest.mark.parametrize(
    ("step", "event"),
    [
        (STEPS, "on_epoch_end"),  # at the end of an epoch, before it is evaluated
        (STEPS, "on_save"),  # right after a checkpoint
        (2 * STEPS, "on_train_end"),  # after the last checkpoint
    ],
)
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(start, finished, step, event):
    with pytest.raises(Killed):
        start(callbacks=(Stop(step, event),))
    run = start()
    assert same(run, finished)
    assert sum("seconds" in line for line in run.metrics()) == 2


def test_killed_again_and_again_beside_other_folders_among_the_checkpoints(start, finished, recipe, tmp_path):
    mine = run_path(recipe, 0, tmp_path) / "checkpoints" / "checkpoint-best"
    others = mine, mine.with_name("checkpoint-8.old"), mine.with_name("checkpoint-")
    for step in (1, STEPS + 1, STEPS + 3):
        with pytest.raises(Killed):
            start(callbacks=(Stop(step),))
        for folder in others:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").write_bytes(b"mine")
    path = run_path(recipe, 0, tmp_path) / "environment.json"
    write_json(path, read_json(path) | {"commit": "of another code"})
    run = start()
    (part,) = run.environment()["continued"]
    assert same(run, finished) and part["commit"] == finished.environment()["commit"] and part["device"] == run.environment()["device"]
    assert all((folder / "model.safetensors").read_bytes() == b"mine" for folder in others)


def test_control_c_leaves_a_directory_that_can_be_continued(start, finished, tmp_path, recipe):
    with pytest.raises(KeyboardInterrupt):
        start(callbacks=(Stop(STEPS + 1, error=KeyboardInterrupt),))
    run = Run(run_path(recipe, 0, tmp_path), recipe, 0)
    assert not run.finished and not (run.path / "model.safetensors").exists()
    assert [line["eval_accuracy"] for line in run.metrics() if "eval_accuracy" in line]
    assert same(start(), finished)


@pytest.mark.parametrize(("step", "event"), [(STEPS + 1, "on_step_end"), (2 * STEPS, "on_train_end")])
def test_a_run_may_be_moved_before_it_is_continued(start, spoil, tmp_path, step, event):
    with pytest.raises(Killed):
        start(runs=tmp_path / "here", callbacks=(spoil, Stop(step, event)))
    (tmp_path / "here").rename(tmp_path / "there")
    assert chose_the_first(start(runs=tmp_path / "there", callbacks=(spoil,)))
    assert not (tmp_path / "here").exists()


def test_a_run_that_logged_what_is_no_number_is_continued(start, finished):
    class Overflow(TrainerCallback):
        def on_log(self, args, state, control, **_):
            state.log_history[0]["grad_norm"] = math.inf

    with pytest.raises(Killed):
        start(callbacks=(Overflow(), Stop(STEPS + 1)))
    run = start()
    weights = [load_file(one.path / "model.safetensors") for one in (run, finished)]
    assert run.finished and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert run.metrics()[0]["grad_norm"] == math.inf


@pytest.mark.parametrize("part", ["model", "trainer_state"])  # the first that is written, and the last
def test_a_full_disk_costs_one_epoch(start, finished, monkeypatch, part, recipe, tmp_path):
    method = {"model": "_save", "trainer_state": "_save_rng_state"}[part]
    works = getattr(Trainer, method)

    def full(self, folder=None, *arguments, **keywords):
        if self.state.global_step == 2 * STEPS:
            (tmp_path / "filled").write_text("here", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return works(self, folder, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, full)
        with pytest.raises(OSError, match="No space left on device"):
            start()
    assert (tmp_path / "filled").exists()
    folder = run_path(recipe, 0, tmp_path) / "checkpoints"
    assert last_checkpoint(folder) == folder / f"checkpoint-{STEPS}"
    assert same(start(), finished)


STATE = ["model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "digests.json"]


@pytest.fixture(scope="module")
def killed_once(source, recipe, tmp_path_factory):
    "The directory of a run that was killed after its last checkpoint; do not change it."
    runs = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(recipe, 0, runs=runs, progress=False, source=source, callbacks=(Stop(2 * STEPS, "on_train_end"),))
    return run_path(recipe, 0, runs)


@pytest.fixture
def killed(killed_once, recipe, tmp_path):
    "A copy of it."
    return Path(shutil.copytree(killed_once, run_path(recipe, 0, tmp_path)))


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
@pytest.mark.parametrize("name", STATE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_continued(killed, name, how, capsys):
    folder = killed / "checkpoints"
    file = folder / f"checkpoint-{2 * STEPS}" / name
    assert last_checkpoint(folder) == file.parent
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert last_checkpoint(folder) == folder / f"checkpoint-{STEPS}"
    drop_damaged(folder)
    told = capsys.readouterr().err
    assert str(file) in told and f"training continues from checkpoint-{STEPS}" in told and told.count("\n") == 1
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{STEPS}"]


def test_after_a_damaged_checkpoint_the_bits_are_those_of_an_unbroken_run(killed, start, finished, capsys):
    for step in (STEPS, 2 * STEPS):
        (killed / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
        assert same(start(), finished)
        told = capsys.readouterr().err
        assert "optimizer.pt is missing" in told if step > STEPS else "its best checkpoint is invalid" in told or told == ""
        (killed / "finished.json").unlink()


def test_a_checkpoint_needs_its_best_sibling(start, spoil, recipe, tmp_path):
    with pytest.raises(Killed):
        start(callbacks=(spoil, Stop(2 * STEPS, "on_train_end")))
    folder = run_path(recipe, 0, tmp_path) / "checkpoints"
    weights = folder / f"checkpoint-{STEPS}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert checkpoint_problem(folder / f"checkpoint-{2 * STEPS}").startswith(f"its best checkpoint is invalid: {weights} has")
    assert chose_the_first(start(callbacks=(spoil,)))


def test_the_best_and_the_newest_checkpoint_are_kept(start, recipe):
    long = replace(recipe, epochs=5, lr=1e-3)
    run = start(of=long)
    best = round(run.summary()["chosen_epoch"] * STEPS)
    kept = [int(path.name.rpartition("-")[2]) for path in checkpoints(run.path / "checkpoints")]
    assert kept == sorted({best, 5 * STEPS} | ({4 * STEPS} if best == 5 * STEPS else set()), reverse=True)
    assert all(damage(path) is None for path in checkpoints(run.path / "checkpoints"))


def test_last_checkpoint_counts_as_numbers(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 100, 101):
        state = dict.fromkeys(("best_global_step", "best_model_checkpoint")) if step < 101 else {}
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", state)
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 101):
        write_digests(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "is damaged: it has no best_global_step" in checkpoint_problem(tmp_path / "checkpoint-101")


def test_the_log_survives_a_failed_write(start, monkeypatch, recipe, tmp_path):
    works, calls = os.replace, []

    def full(source, target):
        if str(target).endswith("metrics.jsonl"):
            calls.append(target)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
        return works(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            start()
    run = Run(run_path(recipe, 0, tmp_path), recipe, 0)
    assert [line["step"] for line in run.metrics()] == [1, 2]
    assert not [path.name for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_model_is_saved_whole_or_not_at_all(recipe, tmp_path, monkeypatch):
    torch.manual_seed(0)
    first, second = VisionTransformer(recipe.config), VisionTransformer(recipe.config)
    save_model(first, tmp_path)
    before = contents(tmp_path)
    assert {path.name for path in before} == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}

    def half(self, folder, **_):
        (training.Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VisionTransformer, "save_pretrained", half)
    with pytest.raises(OSError, match="No space left"):
        save_model(second, tmp_path)
    assert contents(tmp_path) == before


# Another recipe, and beginning anew


def test_the_run_of_another_recipe_is_refused(start, finished, recipe, source):
    before, runs = contents(finished.path), finished.path.parents[3]
    for change, message in (({"lr": 0.5}, "lr is 0.001 there and 0.5 here"), ({"top_k": None}, "top_k is .*None here"),
                            ({"epochs": 3, "sigma": 1.0}, "sigma is 2.5 there and 1.0 here, epochs is 2 there and 3 here")):
        with pytest.raises(ValueError, match=f"seed-0 holds a run of another recipe .*{message}.*restart=True"):
            train(replace(recipe, **change), 0, runs=runs, progress=False, source=source)
    assert contents(finished.path) == before
    check_run(finished)


def test_an_unfinished_run_of_another_recipe_is_refused_or_begun_anew(start, finished, recipe):
    other = replace(recipe, lr=0.5)
    with pytest.raises(Killed):
        start(of=other, callbacks=(Stop(STEPS + 1),))
    with pytest.raises(ValueError, match="another recipe .lr is 0.5 there"):
        start()
    assert same(start(restart=True), finished)


def test_restart_keeps_the_finished_run_until_the_new_one_is_finished(start, finished, recipe, tmp_path):
    other = replace(recipe, lr=0.5)
    first = start(of=other)
    before = {path: data for path, (data, _) in contents(first.path).items()}
    aside = first.path.with_name(".seed-0.old")
    for step in (1, STEPS + 1):
        with pytest.raises(Killed):
            start(restart=True, callbacks=(Stop(step),))
        assert {path: data for path, (data, _) in contents(aside).items()} == before
        assert not first.finished
    assert same(start(), finished)
    assert not aside.exists() and [path.name for path in first.path.parent.iterdir()] == ["seed-0"]


def test_restart_of_a_finished_run_gives_the_same_bits_again(start, finished, recipe, tmp_path):
    first = Path(shutil.copytree(finished.path, run_path(recipe, 0, tmp_path)))
    changed = (first / "finished.json").stat().st_mtime_ns
    assert same(start(restart=True), finished) and (first / "finished.json").stat().st_mtime_ns > changed


def test_restart_in_a_linked_directory_begins_anew_where_the_link_leads(copied, tmp_path):
    real, run = tmp_path / "disk" / "first", copied
    real.parent.mkdir()
    run.path.rename(real)
    run.path.symlink_to(real)
    real.with_name(".first.old").symlink_to(tmp_path)  # a link that is in the way is removed, not what it leads to
    training._start(run, True, {})
    assert run.path.is_symlink() and not run.finished and (real.parent / ".first.old" / "finished.json").is_file()
    assert not (tmp_path / "finished.json").exists() and not run.path.with_name(".seed-0.old").exists()
    (real / "checkpoints").mkdir()
    training._start(run, True, {})
    assert sorted(path.name for path in real.iterdir()) == ["environment.json", "recipe.json"]


# Before any work


@pytest.mark.parametrize("seed", [-1, True, 1.5, "0", None, 2**32, -(2**40)])
def test_a_bad_seed_is_refused_before_any_work(start, tmp_path, seed):
    with pytest.raises(ValueError, match=f"seed must be an integer from 0 to 4294967295, got {seed!r}"):
        start(seed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["kvit_t/fashion_mnist", get_recipe("particles/circle"), None])
def test_a_bad_recipe_is_refused_before_any_work(start, tmp_path, wrong):
    with pytest.raises(ValueError, match="recipe .* has nothing to train"):
        start(of=wrong)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_told_before_any_work(recipe, tmp_path, finished):
    for restart in (False, True):
        with pytest.raises(FileNotFoundError, match="no fashion_mnist in"):
            train(recipe, 0, runs=tmp_path / "runs", progress=False, source=tmp_path, restart=restart)
    assert list(tmp_path.iterdir()) == []
    before = contents(finished.path)
    with pytest.raises(FileNotFoundError, match="no fashion_mnist in"):
        train(recipe, 0, runs=finished.path.parents[3], progress=False, source=tmp_path, restart=True)
    assert contents(finished.path) == before


@pytest.mark.parametrize("change", [{"held_out": 0}, {"held_out": 60_000}, {"heads": 3}, {"top_k": (0, 4)}, {"sigma": -1.0}, {"radius": 20},
                                    {"image_size": 32}, {"channels": 3}, {"classes": 9}])
def test_settings_that_cannot_be_are_told_before_any_work(start, recipe, tmp_path, change):
    with pytest.raises(ValueError, match="held_out|heads|top_k|sigma|attention_radius|image_size|channels|classes"):
        start(of=replace(recipe, **change))
    assert list(tmp_path.iterdir()) == []


def test_run_path(recipe, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("lib_name = krause_repro", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_path(recipe, 3) == tmp_path / "runs" / "smoke" / "kvit_t" / "fashion_mnist" / "seed-3"
    assert run_path(recipe, 3, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "smoke" / "kvit_t" / "fashion_mnist" / "seed-3"


@pytest.mark.parametrize("wrong", ["nowhere", "empty"])
def test_a_source_that_is_not_there_is_refused_whether_the_run_is_finished_or_not(finished, recipe, tmp_path, wrong):
    (tmp_path / "empty").mkdir()
    before = contents(finished.path)
    for runs in (finished.path.parents[3], tmp_path / "runs"):
        with pytest.raises(FileNotFoundError, match=f"source must be a file or folder that is there|no fashion_mnist in {tmp_path}/empty"):
            train(recipe, 0, runs=runs, progress=False, source=tmp_path / wrong)
    assert contents(finished.path) == before and not (tmp_path / "runs").exists()
    for wrong in (5, b"data", ["data"]):
        with pytest.raises(UserError, match="source must be a file or folder, got"):
            train(recipe, 0, runs=tmp_path / "runs", progress=False, source=wrong)
    with pytest.raises(UserError, match="recipe 'particles/circle' has nothing to train"):
        training.check_source(get_recipe("particles/circle"), None)


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be an integer, .* got 'abc'"), ({"WORLD_SIZE": ""}, "WORLD_SIZE must be an integer"),
    ({"RANK": "1.5"}, "RANK must be an integer"), ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK must be an integer"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be ≥ 1"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK and LOCAL_RANK below it"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun"),
])
def test_a_launcher_that_makes_no_sense_is_told_before_any_work(start, tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_any_work(start, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file/smoke/.* cannot be made, since this is no folder: '{tmp_path}/file'"):
        start(runs=tmp_path / "file")


# Training that diverges


def wild(recipe):
    "As after a learning rate far too high."
    return replace(recipe, lr=1e30, warmup_epochs=0)


def test_a_diverged_run_is_not_finished_and_says_where(start, recipe, tmp_path):
    bad = wild(recipe)
    with pytest.raises(TrainingDiverged, match=r"seed-0: training diverged at step [12]: (loss|grad_norm) is (nan|inf).*; lower lr, or"):
        start(of=bad)
    run = Run(run_path(bad, 0, tmp_path), bad, 0)
    assert not run.finished and not (run.path / "model.safetensors").exists()
    assert any(not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]) for line in run.metrics() if "loss" in line)
    assert not any(line.get("loss") == 0 for line in run.metrics())
    assert json.loads((run.path / "diverged.json").read_text())["step"] in (1, 2)
    assert not lock_path(run.path).exists()
    with pytest.raises(TrainingDiverged, match="diverged.json: training diverged at .*same settings would diverge again.*restart=True"):
        start(of=bad)
    assert start(of=recipe, restart=True).finished


class Poison(TrainerCallback):
    "Puts NaN into the model, or into its gradient, after one step."

    def __init__(self, step, value, gradient=False):
        self.step, self.value, self.gradient = step, value, gradient

    def on_step_end(self, args, state, control, model, **_):
        if not self.gradient and state.global_step == self.step:
            with torch.no_grad():
                model.head.weight[0, 0] = self.value

    def on_step_begin(self, args, state, control, model, **_):
        if self.gradient and state.global_step == self.step:
            handle = model.head.weight.register_hook(lambda grad: handle.remove() or grad * self.value)


@pytest.mark.parametrize(("step", "value", "gradient"), [
    (1, math.nan, False), (STEPS, math.inf, False), (2 * STEPS - 1, -math.inf, False), (1, math.inf, True), (STEPS - 1, math.nan, True),
])
def test_whatever_is_no_number_ends_the_training_before_the_next_checkpoint(start, recipe, tmp_path, step, value, gradient):
    with pytest.raises(TrainingDiverged, match="training diverged at step"):
        start(callbacks=(Poison(step, value, gradient),))
    run = Run(run_path(recipe, 0, tmp_path), recipe, 0)
    assert not run.finished and all(checkpoint_problem(path) is None for path in checkpoints(run.path / "checkpoints"))
    for path in checkpoints(run.path / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_a_weight_that_no_loss_shows_is_found_before_it_is_saved(recipe, tmp_path):
    model = VisionTransformer(recipe.config)
    trainer = build_trainer(recipe, model, splits_of(), tmp_path, progress=False)
    with torch.no_grad():
        model.head.bias[9] = -math.inf
    with pytest.raises(TrainingDiverged, match="at step 0: head.bias is not finite"):
        trainer._save_checkpoint(model, None)
    assert checkpoints(tmp_path) == []


def test_an_evaluation_that_gives_no_number_says_so(recipe, tmp_path):
    model = VisionTransformer(recipe.config)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    trainer = build_trainer(recipe, model, splits_of(), tmp_path, progress=False)
    with pytest.raises(TrainingDiverged, match="the model's outputs are not finite: test_loss is nan"):
        trainer.evaluate(splits_of().test, metric_key_prefix="test")


# Damaged finished runs


@pytest.fixture
def copied(finished, recipe, tmp_path):
    "A copy of the finished run, to be damaged."
    run = Run(run_path(recipe, 0, tmp_path), recipe, 0)
    shutil.copytree(finished.path, run.path)
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


NOT_A_NUMBER = {"head.weight": torch.full((10, 16), math.nan)}
DAMAGES = {
    "model cut": ("model.safetensors", cut), "model gone": ("model.safetensors", Path.unlink), "model changed": ("model.safetensors", flip),
    "model empty": ("model.safetensors", lambda path: path.write_bytes(b"")), "config cut": ("config.json", cut),
    "config gone": ("config.json", Path.unlink), "end empty": ("finished.json", lambda path: path.write_bytes(b"")),
    "end cut": ("finished.json", cut), "end {}": ("finished.json", lambda path: path.write_text("{}")),
    "end []": ("finished.json", lambda path: path.write_text("[]")), "recipe {}": ("recipe.json", lambda path: path.write_text("{}")),
    "recipe cut": ("recipe.json", cut), "recipe gone": ("recipe.json", Path.unlink),
    "recipe []": ("recipe.json", lambda path: path.write_text("[]")), "digests cut": ("digests.json", cut),
    "environment gone": ("environment.json", Path.unlink), "environment cut": ("environment.json", cut),
    "environment []": ("environment.json", lambda path: path.write_text("[]")),
    "environment deep": ("environment.json", lambda path: path.write_text("[" * 99_999)),
    "digests {}": ("digests.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_finished_run_that_is_damaged_is_an_error_that_names_the_file(copied, start, finished, what):
    name, harm = DAMAGES[what]
    harm(copied.path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{copied.path / name} .*restart=True"):
        start()
    if what == "model cut":  # the remedy that is told
        (copied.path / "finished.json").unlink()
        assert same(start(), finished)


@pytest.mark.parametrize("what", [what for what in DAMAGES if what.startswith(("model", "config"))])
def test_a_damaged_model_is_named_and_no_pickle_is_read_instead(copied, what):
    name, harm = DAMAGES[what]
    torch.save(copied.model().state_dict(), copied.path / "pytorch_model.bin")
    harm(copied.path / name)
    if what == "model changed":  # without digests, only NaN and unknown tensors are detected
        harm(copied.path / name)
        from safetensors.torch import save_file
        save_file(load_file(copied.path / name) | NOT_A_NUMBER, copied.path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=str(copied.path / name)):
        copied.model()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_are_not_of_the_model_are_named(copied, change):
    from safetensors.torch import save_file

    weights = load_file(copied.path / "model.safetensors")
    if change == "missing":
        del weights["head.bias"]
    else:
        weights["other" if change == "extra" else "head.bias"] = torch.zeros(3)
    save_file(weights, copied.path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors does not fit .*config.json"):
        copied.model()


def test_a_run_of_an_earlier_version_that_diverged_is_found_out(copied, start):
    from safetensors.torch import save_file

    save_file(load_file(copied.path / "model.safetensors") | NOT_A_NUMBER, copied.path / "model.safetensors")
    (copied.path / "digests.json").unlink()
    with pytest.raises(TrainingDiverged, match="model.safetensors: training diverged, head.weight is not finite"):
        start()


def test_a_saved_recipe_that_contradicts_its_fingerprint_is_named(copied, start):
    saved = read_json(copied.path / "recipe.json")
    write_json(copied.path / "recipe.json", saved | {"recipe": saved["recipe"] | {"lr": 99.0}})
    with pytest.raises(ValueError, match="holds a run of another recipe .lr is 99.0 there and"):
        start()
    write_json(copied.path / "recipe.json", saved | {"fingerprint": "0"})
    with pytest.raises(ValueError, match="holds a run of another recipe .by its fingerprint."):
        start()


def test_a_damaged_log_is_named(copied):
    path = copied.path / "metrics.jsonl"
    whole = path.read_bytes()
    for wrong in (b'{"loss": ', b"\xff", b"[" * 99_999):
        path.write_bytes(whole + wrong)
        last = len(whole.splitlines()) + 1
        with pytest.raises(UserError, match=f"metrics.jsonl, line {last}, is not valid JSON .*; remove .*restart=True"):
            copied.metrics()


@over(("name", "content", "ask"), [
    *(("diverged.json", content, check_diverged) for content in ([], {})), ("finished.json", 5, Run.summary),
    *(("environment.json", content, lambda run: check_data(run, {"train": {"files": {}}}))
      for content in ([], {}, {"commit": None, "device": "", "versions": {}, "data": {"train": 5}})),
])
def test_a_damaged_record_of_a_run_is_named(recipe, tmp_path, name, content, ask):
    write_json(tmp_path / name, content)
    with pytest.raises(UserError, match=f"^{tmp_path / name} is damaged: .*restart=True"):
        ask(Run(tmp_path, recipe, 0))


def test_only_a_directory_of_a_run_is_opened(tmp_path):
    for wrong, message in ((5, "path must be a file or folder, got 5"), (tmp_path, "recipe.json is missing; path must be the directory")):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            open_run(wrong)


def test_the_run_of_another_seed_is_refused(copied, start):
    copied.path.rename(copied.path.with_name("seed-1"))
    with pytest.raises(ValueError, match="seed-1 holds a run of another seed .0 there and 1 here."):
        start(1)


# Two processes on one directory, and what a killed one leaves


def test_a_directory_in_use_is_refused_by_pid_and_host(start, recipe, tmp_path, finished):
    folder = run_path(recipe, 0, tmp_path)
    with locked(folder):
        for restart in (False, True):
            with pytest.raises(InUse, match=f"{folder} is in use by process {os.getpid()} on "):
                start(restart=restart)
        assert not folder.exists()
    assert same(start(), finished) and not lock_path(folder).exists()
    sampling = folder / "samples" / "seed-0"
    sampling.mkdir(parents=True)
    with locked(sampling):
        with pytest.raises(InUse, match="samples/seed-0 is in use"):
            start(restart=True)


def test_a_run_finished_by_another_process_meanwhile_is_not_trained_again(start, recipe, finished, tmp_path, monkeypatch):
    build = tasks.task_of(recipe).build

    def slowly(found):
        shutil.copytree(finished.path, run_path(recipe, 0, tmp_path))
        return build(found)

    monkeypatch.setattr(tasks, "TASKS", {ImageClassificationRecipe: replace(tasks.task_of(recipe), build=slowly)})
    with pytest.raises(InUse, match="was finished by another process in the meantime"):
        start()
    assert start().finished


def test_what_killed_processes_left_is_removed_at_the_next_start(start, finished, recipe, tmp_path):
    with pytest.raises(Killed):
        start(callbacks=(Stop(STEPS + 1),))
    folder = run_path(recipe, 0, tmp_path)
    for name in (".metrics.jsonl.x1y2.jsonl", ".metrics.jsonl.0a0a0a0a.12.zz.jsonl", ".finished.json.q.json"):
        (folder / name).write_text("{")
    (folder / ".scratch.0a0a0a0a.12.zz").mkdir()
    lock_path(folder).write_text("")
    assert same(start(), finished)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert [path.name for path in folder.parent.iterdir()] == ["seed-0"]


# Several processes


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 32])
def test_parts_are_a_batch_and_weights_make_its_mean(recipe, tmp_path, count, processes):
    parts = [list(range(count))[part_of(count, rank, processes)] for rank in range(processes)]
    assert sum(parts, []) == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    collator = Collator(replace(recipe, crop_padding=2), training=True)
    data = splits_of(max(count, 8)).train
    examples = [data[i] for i in range(count)]
    torch.manual_seed(0)
    whole = collator(examples)
    for rank, part in enumerate(parts):
        torch.manual_seed(0)
        got = PartCollator(collator, rank, processes, by_token=False)(examples)
        wanted = whole["pixel_values"][part or [0]]
        assert torch.equal(got["pixel_values"], wanted) and len(got["labels"]) == len(wanted)


def one_of_two(rank, port, function, pipe):
    "What a launcher makes of a process; it has everything imported already."
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    pipe.send(function())
    torch.distributed.destroy_process_group()
    os._exit(0)


def by_two(function):
    "What a function returns in each of two processes that work together."
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=one_of_two, args=(rank, port, function, theirs)) for rank, (_, theirs) in enumerate(pipes)]
    for process in processes:
        process.start()
    try:
        assert all(ours.poll(200) for ours, _ in pipes)
        return [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def train_by_two(jobs, runs):
    "Train recipes on their sources by two processes; the steps that each of them reads in the summaries."
    return by_two(lambda: [train(recipe, 0, runs=runs, progress=False, source=source).summary()["steps"] for recipe, source in jobs])


def assert_trained_alike(recipe, source, runs, weights, folder="1"):
    "One process comes to the weights, losses and choice of the two that have trained under `runs / '2'`."
    one, two = train(recipe, 0, runs=runs / folder, progress=False, source=source), Run(run_path(recipe, 0, runs / "2"), recipe, 0)
    found = [load_file(run.path / weights) for run in (one, two)]
    assert found[0].keys() == found[1].keys()
    assert max((found[0][name] - found[1][name]).abs().max().item() for name in found[0]) < 1e-6
    key = f"held_out_{tasks.task_of(recipe).metric}"
    assert one.summary()[key] == pytest.approx(two.summary()[key], abs=1e-6)
    losses = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_train_as_one(tmp_path):
    "The last batch of an epoch has 5 examples, or 1; augmentation is random, and of the whole batch; a step may have several batches."
    small = {"train_images": 13, "held_out": 9, "test_images": 8, "batch_size": 8, "epochs": 2, "lr": 1e-3}
    image = replace(get_recipe("vit_t/digits").at("smoke"), score="krause", radius=1, norm="post", drop_path=0.0, **small)
    generator = replace(get_recipe("karm/digits").at("smoke"), dropout=0.0, **{**small, "train_images": 9})
    (tmp_path / "text.txt").write_text(f"\n{EOS}\n".join(f"the {i} of {i * i} and {i * i * i}" for i in range(300)), encoding="utf-8")
    corpus = load_corpus("text", 260, tmp_path / "text.txt", tmp_path / "corpora").path
    language = replace(get_recipe("lm_routing_100m/text").at("smoke"), vocab_size=260, context=16, depth=1, dropout=0.0, lr=3e-4,
                       train_blocks=21, held_out=4, batch_size=8, per_device_batch_size=2)  # 8, 8 and 5 blocks; one process has 2 of the 5
    assert train_by_two([(image, None), (generator, None), (language, corpus)], tmp_path / "2") == [[4, 4, 3]] * 2
    for recipe in (image, generator):
        assert_trained_alike(recipe, None, tmp_path, "model.safetensors")
    for size in (8, 4):
        assert_trained_alike(replace(language, per_device_batch_size=size), corpus, tmp_path, "model.safetensors", f"blocks-{size}")
    assert not list(tmp_path.rglob("*.lock"))


def test_number_of_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert process_count() == 3
