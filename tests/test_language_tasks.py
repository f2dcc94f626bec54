"""Language benchmarks: prompts to the letter, labels, scores in closed form, baselines beside scikit-learn, and bad input."""
import io
import json
import math
import random
import re
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import httpx
import huggingface_hub.constants as hub
import lm_eval.evaluator
import pytest
import torch
from cases import over
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from krause_repro import adapters, cli, language_benchmarks, language_tasks
from krause_repro.fine_tuning_evaluation import choice_accuracy, choice_baselines
from krause_repro.language_benchmarks import (
    answer_token,
    chance_scores,
    check_answers,
    check_ifeval,
    check_language_run,
    constant_scores,
    count_scores,
    evaluate_language,
    language_table,
    macro_f1,
    run_model,
)
from krause_repro.language_data import EOS
from krause_repro.language_model import LanguageModel, LanguageModelConfig
from krause_repro.language_model_evaluation import sample_text
from krause_repro.language_tasks import (
    CONTINUATION_TASKS,
    LANGUAGE_TASKS,
    check_items,
    hub_answers,
    hub_items,
    language_items,
    read_task_items,
    task_choices,
    task_config,
    task_file,
    task_prompt,
)
from krause_repro.recipes import get_recipe
from krause_repro.records import write_json
from krause_repro.runs import Run, run_path
from krause_repro.statistics import summarise
from krause_repro.tasks import recipe_corpus, save_model, task_of

ROOT = Path(__file__).resolve().parents[1]
CHOICE_TASKS = LANGUAGE_TASKS[:-1]
ITEMS = ROOT / "krause_repro" / "tasks" / "items"
OWN = {task: read_task_items(ITEMS, task) for task in LANGUAGE_TASKS}
ANSWERS = {"boolq": ["No", "Yes"], "piqa": ["A", "B"], "mmlu_pro": list("ABCDEFGHIJ"),
           **dict.fromkeys(("cb", "anli_r1", "anli_r2", "anli_r3", "mnli"), ["A", "B", "C"])}
# What each label of the data set means, and the letter that the prompt gives to this meaning.
MEANINGS = {"cb": ("entailment", "contradiction", "neutral"),
            **dict.fromkeys(("anli_r1", "anli_r2", "anli_r3", "mnli"), ("entailment", "neutral", "contradiction"))}
LETTERS = {"entailment": "A", "contradiction": "B", "neutral": "C"}
PAIR = "Premise: {premise}\nHypothesis: {hypothesis}\nA. entailment\nB. contradiction\nC. neutral\n\n### Response:\n"
RAIN = {"premise": "It rains.", "hypothesis": "The street is wet."}


def right_answer(task, item):
    "The token that is right, by the data set's own words."
    if task in MEANINGS:
        return LETTERS[MEANINGS[task][item["label"]]]
    return ANSWERS[task][item["answer_index" if task == "mmlu_pro" else "label"]]


@pytest.fixture(scope="module")
def tokenizer():
    "A word is a token, so is a line break, and so is each answer."
    split = pre_tokenizers.Split(Regex(r"\w+|\n|[^\w\s]| "), "isolated")
    texts = [task_prompt(task, item) for task, items in OWN.items() for item in items]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)} | {"Yes", "No", *"ABCDEFGHIJ"}
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "<unk>", *sorted(words)])}, "<unk>"))
    plain.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


class Told(LlamaForCausalLM):
    "Answers each prompt with the token it was told, right after the prompt's last token, and knows nothing of other texts."

    def tell(self, tokenizer, answers):
        "Prompts and the answers to them."
        self.told = {tuple(tokenizer.encode(prompt)): tokenizer.convert_tokens_to_ids(answer) for prompt, answer in answers.items()}
        return self

    def forward(self, input_ids, **_):
        "Logits of 0, but for the answer."
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            (prompt,) = [prompt for prompt in self.told if tuple(ids[:len(prompt)]) == prompt and not any(ids[len(prompt):])]
            logits[row, len(prompt) - 1, self.told[prompt]] = 1
        return types.SimpleNamespace(logits=logits)


def build(kind, tokenizer, **options):
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, **options))


@pytest.fixture
def tiny(tokenizer):
    return build(LlamaForCausalLM, tokenizer)


@pytest.fixture(scope="module")
def random_weights(tokenizer):
    "A model of random weights and its results."
    model = build(LlamaForCausalLM, tokenizer)
    return model, evaluate_language(model, tokenizer, CHOICE_TASKS, "local", batch_size=4)


@pytest.fixture
def told(tokenizer):
    "A model that gives the answers of a rule: from task, number and item to a token."
    def make(rule, tasks=CHOICE_TASKS):
        answers = {task_prompt(task, item): rule(task, i, item) for task in tasks for i, item in enumerate(OWN[task])}
        return build(Told, tokenizer).tell(tokenizer, answers)
    return make


@over(("task", "item", "prompt"), [
    ("boolq", {"passage": "Ice floats.", "question": "does ice float"},
     "Passage: Ice floats.\nQuestion: does ice float?\n\n### Response:\n"),
    *((task, RAIN, PAIR.format(**RAIN)) for task in MEANINGS),
    ("piqa", {"goal": "To cool tea,", "sol1": "wait.", "sol2": "boil it."},
     "Question: To cool tea,\nA. wait.\nB. boil it.\n\n### Response:\n"),
    ("mmlu_pro", {"question": "Which is even?", "options": list("1234567890")},
     "Question: Which is even?\nA. 1\nB. 2\nC. 3\nD. 4\nE. 5\nF. 6\nG. 7\nH. 8\nI. 9\nJ. 0\n\n### Response:\n"),
    ("mmlu_pro", {"question": "Which is even?", "options": ["1", "{{2}}"]}, "Question: Which is even?\nA. 1\nB. {{2}}\n\n### Response:\n"),
    ("ifeval", {"prompt": "Write in capitals."}, "Write in capitals.\n\n### Response:\n"),
])
def test_prompts_are_the_papers_to_the_letter(task, item, prompt):
    assert task_prompt(task, item) == prompt


def test_task_files_name_the_usual_data():
    assert sorted(path.stem for path in task_file("cb").parent.glob("*.yaml")) == sorted((*CHOICE_TASKS, *CONTINUATION_TASKS))
    found = {task: task_config(task) for task in LANGUAGE_TASKS}
    assert {config["num_fewshot"] for config in found.values()} == {0}
    assert {config["target_delimiter"] for task, config in found.items() if task != "ifeval"} == {""}
    assert [(found[task]["dataset_path"], found[task]["dataset_name"]) for task in LANGUAGE_TASKS] == [
        ("aps/super_glue", "boolq"), ("aps/super_glue", "cb"), *[("facebook/anli", None)] * 3, ("nyu-mll/glue", "mnli"),
        ("baber/piqa", None), ("TIGER-Lab/MMLU-Pro", None), ("google/IFEval", None)]


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_own_items_hold_every_label_and_are_all_different(task):
    prompts = [task_prompt(task, item) for item in OWN[task]]
    assert 8 <= len(prompts) == len(set(prompts)) <= 12
    assert {right_answer(task, item) for item in OWN[task]} == set(ANSWERS[task])
    if task == "mmlu_pro":
        whole = json.loads((ITEMS / "mmlu_pro.json").read_text(encoding="utf-8"))
        assert all("ABCDEFGHIJ"[item["answer_index"]] == item["answer"] for item in whole)


def test_a_model_that_is_always_right_scores_one(told, tokenizer):
    results = evaluate_language(told(lambda task, i, item: right_answer(task, item)), tokenizer, CHOICE_TASKS, "local")
    assert list(results) == list(CHOICE_TASKS)
    for task, result in results.items():
        assert (result["accuracy"], result["items"], result["answers"]) == (1.0, len(OWN[task]), ANSWERS[task])
        assert result["macro_f1"] == (1.0 if task in MEANINGS else None)
        assert [sum(row) for row in result["counts"]] == [sum(right_answer(task, item) == a for item in OWN[task]) for a in ANSWERS[task]]


def test_a_known_rule_scores_what_follows_from_it(told, tokenizer):
    def rule(task, i, item):
        choices = ANSWERS[task][:len(item.get("options", ANSWERS[task]))]
        return choices[(i // 2) % len(choices)]

    results = evaluate_language(told(rule), tokenizer, CHOICE_TASKS, "local", batch_size=3)
    for task, result in results.items():
        right = [right_answer(task, item) for item in OWN[task]]
        given = [rule(task, i, item) for i, item in enumerate(OWN[task])]
        share, n = sum(a == b for a, b in zip(right, given, strict=True)) / len(right), len(right)
        assert result["accuracy"] == pytest.approx(share, abs=1e-12)
        assert result["accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)), abs=1e-12)
        expected = f1_score(right, given, average="macro")
        assert count_scores(result["counts"])["macro_f1"] == pytest.approx(expected, abs=1e-12)
        assert result["macro_f1"] == (pytest.approx(expected, abs=1e-12) if task in MEANINGS else None)
        assert 0 < share < 1


def test_a_model_of_random_weights_agrees_with_its_own_logits(random_weights, tokenizer):
    model, results = random_weights
    model.eval()
    for task, result in results.items():
        pairs = []
        for item in OWN[task]:
            choices = ANSWERS[task][:len(item.get("options", ANSWERS[task]))]
            with torch.no_grad():
                last = model(torch.tensor([tokenizer.encode(task_prompt(task, item))])).logits[0, -1]
            given = last[tokenizer.convert_tokens_to_ids(choices)].argmax().item()
            pairs.append((ANSWERS[task].index(right_answer(task, item)), given))
        assert result["counts"] == confusion_matrix(*zip(*pairs, strict=True), labels=range(len(ANSWERS[task]))).tolist()
        assert result["accuracy"] == pytest.approx(count_scores(result["counts"])["accuracy"], abs=1e-12)


def test_swapped_labels_deny_a_model_that_is_always_right(told, tokenizer):
    rounds = ("anli_r1", "anli_r2", "anli_r3")
    perfect = told(lambda task, i, item: right_answer(task, item), (*rounds, "mnli"))
    correct, swapped = (evaluate_language(perfect, tokenizer, (*rounds, "mnli"), "local", anli_labels=labels)
                        for labels in ("correct", "swapped"))
    for task in rounds:
        assert (correct[task]["accuracy"], correct[task]["macro_f1"]) == (1.0, 1.0)
        assert swapped[task]["accuracy"] == swapped[task]["macro_f1"] == pytest.approx(1 / 3)  # entailment is right, all else wrong
    assert swapped["mnli"] == correct["mnli"]


def test_constant_answers_score_what_scikit_learn_says(random_weights):
    for task, result in random_weights[1].items():
        right = [right_answer(task, item) for item in OWN[task]]
        assert list(result["constant"]) == ANSWERS[task]
        for answer, scores in result["constant"].items():
            given = [answer] * len(right)
            assert scores["accuracy"] == pytest.approx(accuracy_score(right, given), abs=1e-12)
            assert scores["macro_f1"] == pytest.approx(f1_score(right, given, average="macro", zero_division=0), abs=1e-12)
        options = [len(item.get("options", ANSWERS[task])) for item in OWN[task]]
        assert result["chance"]["accuracy"] == pytest.approx(sum(1 / n for n in options) / len(options))


def test_constant_answers_are_the_papers_base_model():
    def rounded(right):
        scores = constant_scores(right)[0]
        return round(100 * scores["accuracy"], 2), round(100 * scores["macro_f1"], 2)

    assert rounded([23, 28, 5]) == (41.07, 19.41)
    assert rounded([334, 333, 333]) == (33.40, 16.69)


def test_macro_f1_is_scikit_learns():
    draw = random.Random(0)
    for _ in range(40):
        labels = draw.sample(range(5), draw.randint(1, 5))
        pairs = [(draw.choice(labels), draw.choice(labels)) for _ in range(draw.randint(1, 12))]
        assert macro_f1(pairs) == pytest.approx(f1_score(*zip(*pairs, strict=True), average="macro", zero_division=0), abs=1e-12)


def test_chance_is_the_mean_over_many_even_guesses():
    right, options, draw = [0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3], random.Random(0)
    many = [(a, draw.randrange(n)) for _ in range(4000) for a, n in zip(right, options, strict=True)]
    found, expected = count_scores(confusion_matrix(*zip(*many, strict=True))), chance_scores(right, options)
    assert expected["accuracy"] == pytest.approx(1 / 3)
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=0.01)
    assert chance_scores([0, 1], [2, 4])["accuracy"] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_an_answer_must_be_one_token_after_the_prompt(tokenizer, tiny):
    prompt = task_prompt("boolq", OWN["boolq"][0])
    before, token = answer_token(tokenizer.encode, prompt, "Yes")
    assert before == tokenizer.encode(prompt) and tokenizer.convert_ids_to_tokens([before[-1], token]) == ["\n", "Yes"]
    characters = [ord(letter) for letter in prompt]
    assert answer_token(lambda text: [ord(letter) for letter in text], prompt, "A") == (characters, ord("A"))
    with pytest.raises(ValueError, match="'Yes' must be exactly one token"):
        answer_token(lambda text: [ord(letter) for letter in text], prompt, "Yes")
    with pytest.raises(ValueError, match="'A' must be exactly one token"):  # here it melts into the line break
        answer_token(lambda text: [hash(text[i:i + 2]) for i in range(0, len(text), 2)], "odd\n\n", "A")
    plain = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(["?", *map(chr, range(32, 127)), "\n"])}, "?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="?", unk_token="?", pad_token="?")
    with pytest.raises(ValueError, match="answer 'No' must be exactly one token"):
        evaluate_language(tiny, letters, "boolq", "local")


def test_prompts_that_do_not_fit_are_counted(tokenizer):
    lengths = [len(tokenizer.encode(task_prompt("boolq", item))) for item in OWN["boolq"]]
    longest = sorted(lengths)[4]
    short = build(LlamaForCausalLM, tokenizer, max_position_embeddings=longest)
    result = evaluate_language(short, tokenizer, "boolq", "local")
    assert 0 < result["boolq"]["truncated"] == sum(length > longest for length in lengths) < len(lengths)
    assert f"| boolq | short | 10 ({result['boolq']['truncated']} cut) |" in language_table({"short": result})


def test_an_evaluation_leaves_no_trace(tiny, tokenizer, capsys):
    tiny.train()
    tokenizer.padding_side = "right"
    state, drawn, special = torch.get_rng_state(), random.getstate(), dict(tokenizer.special_tokens_map)
    first, second = (evaluate_language(tiny, tokenizer, "piqa,cb", "local") for _ in range(2))
    assert first == second
    assert tiny.training and tokenizer.padding_side == "right" and tokenizer.special_tokens_map == special
    assert torch.equal(state, torch.get_rng_state()) and random.getstate() == drawn
    assert capsys.readouterr() == ("", "")


def test_limit_draws_items_by_their_seed_and_one_has_no_error(tiny, tokenizer):
    result = evaluate_language(tiny, tokenizer, "cb", "local", limit=1)["cb"]
    assert (result["items"], result["accuracy_stderr"], result["item_seed"]) == (1, None, 0)
    drawn = [language_items(["cb"], "local", 4, seed)["cb"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(item in OWN["cb"] for item in drawn[2])
    places = [OWN["cb"].index(item) for item in drawn[0]]
    assert places == sorted(places) and len(set(places)) == 4 and language_items(["cb"], "local", 999)["cb"] == OWN["cb"]


def test_items_may_come_from_a_file_or_a_folder(tiny, tokenizer, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(OWN["piqa"][:3]), encoding="utf-8")
    scored = evaluate_language(tiny, tokenizer, ["piqa"], tmp_path / "mine.json")["piqa"]
    assert (scored["items"], scored["source"]) == (3, "mine.json")  # a result names the file, not the user's folders
    (tmp_path / "piqa.json").write_text(json.dumps(OWN["piqa"][:2]), encoding="utf-8")
    assert {task: len(items) for task, items in language_items(["piqa"], tmp_path).items()} == {"piqa": 2}
    with pytest.raises(ValueError, match="is one file, but 2 tasks"):
        language_items(["piqa", "cb"], tmp_path / "mine.json")
    with pytest.raises(FileNotFoundError, match="cb.json"):
        language_items(["piqa", "cb"], tmp_path)


PIQA, MMLU, IFEVAL = OWN["piqa"][0], OWN["mmlu_pro"][0], OWN["ifeval"][0]


@pytest.mark.parametrize(("task", "content", "message"), [
    ("piqa", "[", "items.json is not valid JSON"), ("piqa", "[" * 99_999, "items.json is not valid JSON"),
    ("piqa", "{}", "must hold a list of items of piqa"),
    ("piqa", "[]", "must hold a list of items of piqa"),
    ("piqa", [PIQA, 3], "item 2 of 2: must be an object with the fields goal, sol1, sol2, label"),
    ("piqa", [PIQA, {key: value for key, value in PIQA.items() if key != "sol2"}], "item 2 of 2: field 'sol2' is missing"),
    ("piqa", [{**PIQA, "label": 2}], "item 1 of 1: field 'label' must be an integer from 0 to 1, got 2"),
    ("piqa", [{**PIQA, "label": -1}], "must be an integer from 0 to 1, got -1"),
    ("piqa", [{**PIQA, "label": True}], "must be an integer from 0 to 1, got True"),
    ("piqa", [{**PIQA, "label": "0"}], "must be an integer from 0 to 1, got '0'"),
    ("piqa", [{**PIQA, "goal": None}], "field 'goal' must be of type str, got None"),
    ("piqa", [{**PIQA, "goal": "\ud800"}], "field 'goal' must be text in UTF-8, got '\\ud800'"),
    ("piqa", [{**PIQA, "sol1": PIQA["sol2"]}], "fields 'sol1' and 'sol2' must differ"),
    ("ifeval", [{**IFEVAL, "kwargs": [{"keywords": ["\udfff"]}]}], "field 'kwargs' must be text in UTF-8"),
    ("mmlu_pro", [{**MMLU, "options": ["1"]}], "field 'options' must hold 2 to 10 strings"),
    ("mmlu_pro", [{**MMLU, "options": list("12345678901")}], "field 'options' must hold 2 to 10 strings"),
    ("mmlu_pro", [{**MMLU, "options": ["1", 2]}], "field 'options' must hold 2 to 10 strings"),
    ("mmlu_pro", [{**MMLU, "answer_index": 4}], "field 'answer_index' must be below 4, the number of options, got 4"),
    ("blimp", [{"sentence_good": " ", "sentence_bad": "b", "UID": "u", "linguistics_term": "t"}], "field 'sentence_good' must not be"),
    ("blimp", [{"sentence_good": "a b", "sentence_bad": "a b", "UID": "u", "linguistics_term": "t"}], "must differ, but do not in 1 of 1"),
    ("arc_easy", [{"query": "q", "choices": ["a", "b", "b"], "gold": 2}], "field 'choices' must hold the right choice once"),
    ("cbt", [{"sentences": ["s"], "question": "XXXXX", "options": ["u", "u"], "answer": "u"}], "field 'options' must hold the answer once"),
    ("lambada", [{"text": "the dog ran "}], "field 'text' must hold at least two words, and no white space around them"),
    ("hellaswag", [{"query": "q", "choices": ["", "x"], "gold": 1}], "field 'choices' must hold at least 2 strings, none empty"),
    ("hellaswag", [{"query": "2024", "choices": ["a", "b"], "gold": 1}], "field 'query' must not make a prompt of digits only"),
    ("hellaswag", [{"query": "²", "choices": ["a", "b"], "gold": 1}], "field 'query' must not make a prompt of digits only"),
    ("cbt", [{"sentences": ["s"], "question": "XXXXX", "options": ["u", 3], "answer": "u"}], "fields 'options', at least 2"),
    ("cbt", [{"sentences": [], "question": " 7 XXXXX", "options": ["u", "v"], "answer": "u"}], "field 'question' must not make a prompt"),
    ("ifeval", [{**IFEVAL, "kwargs": []}], "field 'kwargs' must hold one object for each entry"),
    ("ifeval", [{**IFEVAL, "kwargs": [{}, {}]}], "field 'kwargs' must hold one object for each entry"),
    ("ifeval", [{**IFEVAL, "kwargs": ["num_words"]}], "field 'kwargs' must hold one object for each entry"),
    ("ifeval", [{**IFEVAL, "instruction_id_list": [["x"]]}], "field 'instruction_id_list' must hold strings"),
    ("ifeval", [{**IFEVAL, "key": True}], "field 'key' must be of type int"),
])
def test_malformed_items_are_refused_by_name(task, content, message, tmp_path):
    path = tmp_path / "items.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_task_items(path, task)
    assert message in str(error.value) and "items.json" in str(error.value)


def test_fields_of_the_users_own_do_no_harm(tiny, tokenizer, tmp_path):
    "Values of mixed types in one field could not be put into a table."
    items = [{**item, "note": note} for item, note in zip(OWN["piqa"], (1, "two", [3], None), strict=False)]
    (tmp_path / "piqa.json").write_text(json.dumps(items), encoding="utf-8")
    assert read_task_items(tmp_path, "piqa") == OWN["piqa"][:4]
    assert evaluate_language(tiny, tokenizer, "piqa", tmp_path)["piqa"]["items"] == 4


def test_items_that_were_checked_are_not_loaded_again(tiny, tokenizer, monkeypatch):
    items = check_language_run("cb,piqa", "local", 8, 2, "correct", 1280)
    monkeypatch.setattr(language_benchmarks, "language_items", lambda *_: pytest.fail("they are here"))
    results = evaluate_language(tiny, tokenizer, "piqa", "local", limit=2, items=items)
    assert list(results) == ["piqa"] and results["piqa"]["items"] == 2


def test_answers_of_all_tasks_are_looked_at_before_the_first_is_asked(tiny, tokenizer, monkeypatch):
    check_answers(tokenizer.encode, OWN)

    def encode(text):
        return [ord(letter) for letter in text.removesuffix("J")] + [0, 0] * text.endswith("\nJ")

    asked = {task: items for task, items in OWN.items() if task != "boolq"}
    with pytest.raises(ValueError, match="the answer 'J' must be exactly one token"):
        check_answers(encode, asked)
    check_answers(encode, {**asked, "mmlu_pro": [item for item in OWN["mmlu_pro"] if len(item["options"]) < 10]})
    monkeypatch.setattr(language_benchmarks, "_run_lm_eval", lambda *_: pytest.fail("nothing may be asked"))
    monkeypatch.setattr(language_benchmarks, "answer_token", lambda *_: (_ for _ in ()).throw(ValueError("no token")))
    with pytest.raises(ValueError, match="no token"):
        evaluate_language(tiny, tokenizer, "cb", "local")


@over(("options", "message"), [
    ({"tasks": "boolq,winogrande"}, "'winogrande' is not a language benchmark, the nearest is"),
    ({"tasks": "bolq"}, "'bolq' is not a language benchmark, the nearest is 'boolq'; allowed: boolq, cb, anli_r1"),
    ({"tasks": ["mmlu-pro"]}, "'mmlu-pro' is not a language benchmark, the nearest is 'mmlu_pro'"),
    ({"tasks": ["cb", None]}, "None is not a language benchmark; allowed"),
    ({"tasks": []}, "tasks must name at least one"),
    ({"tasks": ""}, "tasks: '' is not a language benchmark"),
    ({"anli_labels": "mnli"}, "anli_labels must be one of correct, swapped, got 'mnli'"),
    ({"limit": 0}, "limit must be an integer ≥ 1"),
    ({"limit": 1.5}, "limit must be an integer ≥ 1"),
    ({"batch_size": 0}, "batch_size must be an integer ≥ 1"),
    ({"max_gen_toks": "many"}, "max_gen_toks must be an integer ≥ 1"),
    ({"batch_size": 2**31}, "batch_size must be an integer from 1 to 2,147,483,647"),
    ({"limit": 2**63}, "limit must be an integer below 2^63"),
])
def test_bad_arguments_are_refused_before_the_model_is_touched(options, message):
    with pytest.raises(ValueError) as error:
        evaluate_language(None, None, **{"tasks": "cb", "source": "local", **options})
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"anli_labels": "mnli"}, {"limit": -1}, {"max_gen_toks": 1.5}])
def test_bad_arguments_are_refused_with_items_at_hand(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate_language(None, None, "cb", "local", items={"cb": OWN["cb"]}, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"tasks": 3}, "tasks must be a list of names"), ({"source": None}, "source must be hub, local, or the path"),
    ({"batchsize": 3}, "evaluate_language takes no 'batchsize'; the nearest name is 'batch_size'"),
    ({"task": "cb"}, "evaluate_language takes no 'task'; the nearest name is 'tasks'"),
])
def test_arguments_of_another_kind_or_name_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        evaluate_language(None, None, **{"tasks": "cb", "source": "local", **options})


def diverged(tokenizer, wrapped):
    model = build(LlamaForCausalLM, tokenizer)
    model.get_decoder().norm.weight.data.fill_(math.nan)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("task", ["cb", "ifeval"])
def test_a_diverged_model_has_no_score(task, wrapped, checkers, tokenizer):
    model = diverged(tokenizer, wrapped)
    with pytest.raises(ValueError, match="model gives NaN logits, so its answers cannot be scored; has it diverged"):
        evaluate_language(model, tokenizer, task, "local", limit=2, max_gen_toks=4)
    assert not model._forward_hooks and not model.get_output_embeddings()._forward_hooks
    with pytest.raises(ValueError, match="model gives NaN logits"):
        choice_accuracy(model, tokenizer, [{"inputs": "Which? (A) one (B) two", "answer": "A"}])


def test_logits_that_are_infinite_choose_nothing():
    with pytest.raises(ValueError, match="logits that are not finite to the answers"):
        language_benchmarks._given({"filtered_resps": [(-math.inf, False), (-math.inf, False)]})


@over("call", [
    lambda: count_scores([[0, 0], [0, 0]]), lambda: count_scores([[math.nan, 1], [0, 1]]), lambda: count_scores([[-1, 3], [0, 1]]),
    lambda: macro_f1([]), lambda: chance_scores([], []), lambda: constant_scores([0, 0]), lambda: language_table({}),
    lambda: language_table({"none": {}}), lambda: choice_accuracy(None, None, []),
    lambda: choice_baselines([], [{"inputs": "(A) (B)", "answer": "A"}]), lambda: choice_baselines([{"answer": "A"}], []),
])
def test_nothing_is_scored_of_nothing(call):
    with pytest.raises(ValueError, match="must (be|hold)"):
        call()


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'krause_repro\[eval\]'"):
        evaluate_language(None, None, "cb", "local")


@pytest.mark.parametrize("failure", [
    ConnectionError("no network"), httpx.ConnectError("no network"), datasets.exceptions.DatasetNotFoundError("no network"),
    ValueError("no network")])
def test_without_the_hub_the_error_says_where_it_looked(failure, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    seen = []

    def load(*arguments, **options):
        seen.append((hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(FileNotFoundError) as error:
        evaluate_language(None, None, "cb")
    for part in ("aps/super_glue (cb, validation)", "http://127.0.0.1:9", str(tmp_path), "source 'local'", "no network"):
        assert part in str(error.value)
    assert seen == [(True, True)] and (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == before


def test_the_hub_is_there_if_it_answers_at_all(monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)

    def answer(error):
        def urlopen(request, timeout):
            if error:
                raise error
            return io.BytesIO()
        return urlopen

    refused = urllib.error.HTTPError("https://hub", 403, "forbidden", None, None)
    for error, there in ((None, True), (refused, True), (urllib.error.URLError("nothing"), False), (TimeoutError(), False)):
        monkeypatch.setattr(urllib.request, "urlopen", answer(error))
        assert hub_answers() is there
    monkeypatch.setattr(urllib.request, "urlopen", answer(None))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert hub_answers() is False


def test_items_of_the_hub_are_asked_for_by_name_and_checked(monkeypatch, tiny, tokenizer):
    asked, sets = [], {"aps/super_glue": OWN["cb"], "facebook/anli": OWN["anli_r3"], "google/IFEval": [{**IFEVAL, "prompt": None}]}

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(sets[path])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(language_tasks, "hub_answers", lambda: True)
    results = evaluate_language(tiny, tokenizer, ["cb", "anli_r3"])
    assert asked == [("aps/super_glue", "cb", "validation"), ("facebook/anli", None, "test_r3")]
    local = evaluate_language(tiny, tokenizer, ["cb", "anli_r3"], "local")
    assert {result["source"] for result in results.values()} == {"hub"}
    assert results == {task: {**result, "source": "hub"} for task, result in local.items()}
    with pytest.raises(ValueError, match=r"google/IFEval \(default, train\), item 1 of 1: field 'prompt'"):
        hub_items("ifeval")


IFEVAL_MODULES = ["lm_eval.tasks.ifeval", *(f"lm_eval.tasks.ifeval.{name}"
                  for name in ("instructions", "instructions_registry", "instructions_util", "utils"))]


@pytest.fixture
def checkers(monkeypatch):
    "IFEval's checks, without their packages and without NLTK's data: own items need neither."
    import nltk

    immutable, detect = types.ModuleType("immutabledict"), types.ModuleType("langdetect")
    immutable.immutabledict, detect.DetectorFactory = dict, types.SimpleNamespace(seed=None)
    monkeypatch.setitem(sys.modules, "immutabledict", immutable)
    monkeypatch.setitem(sys.modules, "langdetect", detect)
    for name in IFEVAL_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(nltk, "download", lambda *names: False)
    monkeypatch.setattr(nltk.data, "path", [])


def test_ifeval_counts_prompts_and_instructions_strictly(checkers, monkeypatch, tiny, tokenizer):
    answers = [
        "It rained and we walked.", "one, two, three", "The ladder is back. Thanks!", "A bridge, and no stream.", '{"monday": "9 to 5"}',
        "* a\n* b\n* c", '"Ash"', "<<a quiet day>>\nGo to the museum. See you there.",
    ]  # the fourth has a comma but no river, the sixth one bullet too few
    replies, asked = {f"{item['prompt']}\n\n### Response:\n": answer for item, answer in zip(OWN["ifeval"], answers, strict=True)}, []

    def generate_until(self, requests, **_):
        asked.extend(request.args[1] for request in requests)
        return [replies[request.args[0]] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    result = evaluate_language(tiny, tokenizer, "ifeval", "local", max_gen_toks=50)["ifeval"]
    assert (result["items"], result["instructions"], result["accuracy"]) == (8, 10, 6 / 8)
    assert result["instruction_accuracy"] == pytest.approx(8 / 10)
    assert {kwargs["max_gen_toks"] for kwargs in asked} == {50} and {kwargs["do_sample"] for kwargs in asked} == {False}
    table = language_table({"tiny": {"ifeval": result}})
    assert "| ifeval | tiny | 8 | 75.00 ± 16.37 | — |\n| ifeval, by instruction | tiny | 10 | 80.00 | — |" in table


class Writes(LlamaForCausalLM):
    "Writes the same word again and again."

    def forward(self, input_ids, **_):
        "Logits of 0, but for the word."
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., self.word] = 1
        self.asked.append(len(input_ids))
        return CausalLMOutputWithPast(logits=logits)


@pytest.mark.parametrize(("word", "accuracy"), [(",", 1 / 2), ("rain", 1), ("<eos>", 0)])
def test_ifeval_lets_a_model_write(word, accuracy, checkers, tokenizer):
    "Two items: one forbids commas, one more than 40 words. An empty answer follows neither."
    model = build(Writes, tokenizer)
    model.word, model.asked = tokenizer.convert_tokens_to_ids(word), []
    items = {"ifeval": OWN["ifeval"][:2]}
    result = evaluate_language(model, tokenizer, "ifeval", "local", max_gen_toks=4, batch_size=2, items=items)["ifeval"]
    assert (result["items"], result["instructions"], result["truncated"]) == (2, 2, 0)
    assert result["accuracy"] == result["instruction_accuracy"] == accuracy
    assert model.asked == [2] * (1 if word == "<eos>" else 4)


def test_ifeval_needs_room_to_write(checkers, tiny, tokenizer):
    with pytest.raises(ValueError, match="max_gen_toks=2048 must be below 2048"):
        evaluate_language(tiny, tokenizer, "ifeval", "local", max_gen_toks=2048)


@pytest.mark.parametrize(("name", "given", "message"), [
    ("length_constraints:number_words", {"relation": "less than"}, "argument 'num_words' is missing, and lm-eval would draw it at random"),
    ("length_constraints:number_words", {"num_words": None, "relation": "less than"}, "argument 'num_words' is missing"),
    ("length_constraints:number_words", {"num_words": 5}, "argument 'relation' is missing"),
    ("length_constraints:number_words", {"num_words": 0, "relation": "less than"}, "argument 'num_words' must be an integer ≥ 1, got 0"),
    ("length_constraints:number_words", {"num_words": "5", "relation": "less than"}, "'num_words' must be an integer ≥ 1, got '5'"),
    ("length_constraints:number_words", {"num_words": 5, "relation": "about"}, "ValueError: The supported relation"),
    ("keywords:existence", {"keywords": "ladder"}, "argument 'keywords' must be a list of strings, got 'ladder'"),
    ("keywords:existence", {"keywords": []}, "argument 'keywords' must be a list of strings"),
    ("language:response_language", {"language": "Elvish"}, "KeyError: 'Elvish'"),
    ("combination:repeat_prompt", {"prompt_to_repeat": ""}, "'prompt_to_repeat' must be a string that is not empty"),
    ("punctuation:no_comma", {"num_words": 5}, "argument 'num_words' is unknown; allowed: none"),
])
def test_arguments_of_instructions_are_checked_before_the_model_writes(name, given, message, checkers):
    items = [IFEVAL, {**IFEVAL, "key": 77, "instruction_id_list": ["punctuation:no_comma", name], "kwargs": [{}, given]}]
    with pytest.raises(ValueError) as error:
        check_ifeval(items)
    assert f"item with key 77, instruction '{name}': " in str(error.value) and message in str(error.value)


def test_what_ifeval_draws_is_always_the_same(checkers, monkeypatch, tiny, tokenizer, tmp_path):
    "The data set has letters that are none, for which lm-eval draws another."
    asked = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
    items = [{**IFEVAL, "key": key, "instruction_id_list": ["keywords:letter_frequency"], "kwargs": [asked]} for key in range(40)]
    (tmp_path / "ifeval.json").write_text(json.dumps(items), encoding="utf-8")
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: ["eeee tttt aaaa"] * len(requests))
    found = []
    for seed in (1, 2):
        random.seed(seed)
        state = random.getstate()
        found.append(evaluate_language(tiny, tokenizer, "ifeval", tmp_path)["ifeval"]["accuracy"])
        assert random.getstate() == state
    assert found[0] == found[1] and 0 < found[0] < 0.5
    assert sys.modules["langdetect"].DetectorFactory.seed == 0


def test_ifeval_says_what_it_lacks(checkers, monkeypatch):
    check_ifeval(OWN["ifeval"])
    with pytest.raises(FileNotFoundError, match="number_sentences needs NLTK's punkt_tab.*python -m nltk.downloader punkt_tab"):
        check_ifeval([{**IFEVAL, "instruction_id_list": ["length_constraints:number_sentences"],
                       "kwargs": [{"num_sentences": 3, "relation": "at least"}]}])
    with pytest.raises(ValueError, match="unknown instruction 'startend:middle'"):
        check_ifeval([{**IFEVAL, "instruction_id_list": ["startend:middle"]}])
    for name in IFEVAL_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ImportError, match=r"ifeval needs the package langdetect.*pip install 'lm-eval\[ifeval\]'"):
        check_ifeval(OWN["ifeval"])


def test_the_table_shows_scores_beside_chance_and_constant_answers(told, tokenizer):
    constant = told(lambda task, i, item: "No" if task == "boolq" else "A")
    results = evaluate_language(constant, tokenizer, "boolq,cb,mmlu_pro", "local")
    caption, empty, *lines = language_table({"constant": results}).splitlines()
    assert (caption, empty) == ("items: local; local items were written for testing and mean nothing", "")
    assert lines[2:] == [
        "| boolq | constant | 10 | 50.00 ± 16.67 | — |", "| boolq | chance | 10 | 50.00 | — |",
        "| boolq | always No | 10 | 50.00 | — |", "| boolq | always Yes | 10 | 50.00 | — |",
        "| cb | constant | 10 | 40.00 ± 16.33 | 19.05 |", "| cb | chance | 10 | 33.33 | 33.17 |", "| cb | always A | 10 | 40.00 | 19.05 |",
        "| cb | always B | 10 | 30.00 | 15.38 |", "| cb | always C | 10 | 30.00 | 15.38 |",
        "| mmlu_pro | constant | 10 | 10.00 ± 10.00 | — |", "| mmlu_pro | chance | 10 | 12.60 | — |",
        "| mmlu_pro | always A | 10 | 10.00 | — |",
    ]


def test_the_table_says_what_the_items_were(told, tokenizer):
    answers = told(lambda task, i, item: "A", ("anli_r1", "cb"))
    results = evaluate_language(answers, tokenizer, "anli_r1,cb", "local", limit=4, anli_labels="swapped")
    assert [(r["source"], r["limit"], r.get("anli_labels")) for r in results.values()] == [("local", 4, "swapped"), ("local", 4, None)]
    assert language_table({"A": results}).splitlines()[0] == (
        "items: local; at most 4 of each task, drawn at random; ANLI labels: swapped; "
        "local items were written for testing and mean nothing")
    mine = {task: {**result, "source": "mine.json", "limit": None} for task, result in results.items()}
    assert language_table({"A": mine}).splitlines()[0] == "items: mine.json; ANLI labels: swapped"


def test_a_table_of_models_on_different_items_is_refused(told, tokenizer):
    answers = told(lambda task, i, item: "A", ("anli_r1",))
    whole, part, swapped = (evaluate_language(answers, tokenizer, "anli_r1", "local", **options)
                            for options in ({}, {"limit": 5}, {"limit": 5, "anli_labels": "swapped"}))
    assert "| anli_r1 | two | 5 |" in language_table({"one": part, "two": part})
    for other in (whole, swapped):
        with pytest.raises(ValueError, match="models must be scored on the same items, but on anli_r1 'other' was not"):
            language_table({"one": part, "other": other})


@pytest.fixture
def branch(monkeypatch, tiny, tokenizer):
    "The loader of language models, which notes what it is asked for."
    loaded = []

    def load_language_model(model, adapter=None):
        loaded.append((model, adapter))
        return tiny, tokenizer

    monkeypatch.setattr(adapters, "load_language_model", load_language_model)
    return loaded


def test_the_command_writes_and_shows_its_results(branch, tiny, tokenizer, tmp_path, capsys, monkeypatch):
    output, tuned = tmp_path / "made" / "scores.json", tmp_path / "tuned"
    tuned.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "krause_branch.json"):
        (tuned / name).touch()
    loads, load = [], language_tasks.language_items
    monkeypatch.setattr(language_benchmarks, "language_items", lambda *given: loads.append(given) or load(*given))
    arguments = ["evaluate", "some/model", "--tasks", "piqa,anli_r1", "--adapter", str(tuned), "--source", "local", "--limit", "5",
                 "--anli_labels", "swapped", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert branch == [("some/model", str(tuned))] and len(loads) == 1
    record = json.loads(output.read_text(encoding="utf-8"))
    expected = evaluate_language(tiny, tokenizer, "piqa,anli_r1", "local", limit=5, anli_labels="swapped")
    assert record["results"] == json.loads(json.dumps(expected))
    assert [record[key] for key in ("model", "adapter", "tasks", "source", "limit", "anli_labels")] == [
        "some/model", str(tuned), ["piqa", "anli_r1"], "local", 5, "swapped"]
    assert {"versions", "commit", "device"} <= set(record)
    shown = capsys.readouterr().out
    assert shown == f"{language_table({'model + tuned': expected})}\nResults: {output}\n"


def test_a_task_that_fails_does_not_lose_the_others(branch, monkeypatch, tmp_path, capsys):
    evaluate, output = language_benchmarks.evaluate_language, tmp_path / "scores.json"

    def fail(*given, tasks, **options):
        if tasks == "cb":
            raise RuntimeError("out of memory")
        return evaluate(*given, tasks=tasks, **options)

    monkeypatch.setattr(language_benchmarks, "evaluate_language", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["evaluate", ".", "--tasks", "piqa,cb,boolq", "--source", "local", "--limit", "2", "--output", str(output)])
    assert list(json.loads(output.read_text(encoding="utf-8"))["results"]) == ["piqa"]
    assert f"| piqa | {Path().resolve().name} | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "boolq,winogrande"], "'winogrande' is not a language benchmark"),
    (["--tasks", "cb", "--source", "nowhere.json"], "there is no file nowhere.json"),
    (["--tasks", "cb", "--source", "local", "--limit", "0"], "limit must be an integer"),
    (["--limit", "few"], "krause-repro evaluate --help"),
    (["--tasks", ""], "tasks must not be empty"),
    (["--tasks", "cb", "--source", "local", "--adapter", "/nowhere"],
     "has no adapter_config.json and no adapter_model.safetensors and no krause_branch.json"),
])
def test_the_command_refuses_before_it_loads_a_model(arguments, message, branch, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert cli.main(["evaluate", "model", *arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert branch == [] and not output.exists()


def test_the_command_looks_for_the_model_before_the_items(branch, capsys):
    for missing in ("/nowhere/model", "./nowhere"):
        assert cli.main(["evaluate", missing, "--tasks", "piqa"]) == 2
        assert f"model={missing!r} does not exist; give a folder" in capsys.readouterr().err
    assert cli.main(["evaluate", "lm_krause_100m/text", "--tasks", "blimp"]) == 2
    assert "model must be the directory of a run of lm_krause_100m/text, such as runs/desk/" in capsys.readouterr().err
    assert branch == []


def test_checked_items_keep_the_fields_of_their_task():
    assert check_items("cb", OWN["cb"], "here") == OWN["cb"]
    pairs = [{"sentence_good": "a", "sentence_bad": bad, "UID": "u", "linguistics_term": "t"} for bad in "a" + "b" * 99]
    assert check_items("blimp", pairs, "here") == pairs  # as few of the published ones are alike
    assert check_items("cb", [{**OWN["cb"][0], "idx": 0}], "here") == OWN["cb"][:1]


@pytest.mark.parametrize(("output", "message"), [
    ("", "must be a file, but is a folder"), ("file/scores.json", "must be in a writable folder"),
    ("file/deeper/scores.json", "must be in a writable folder, but"),
])
def test_the_command_refuses_an_output_before_it_loads_a_model(output, message, branch, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["evaluate", "model", "--tasks", "cb", "--source", "local", "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err and branch == []


# Continuations

TEXTS = language_items(list(CONTINUATION_TASKS), "local")


class Letters:
    "A tokenizer of letters, with a start token."

    def __new__(cls):
        letters = ["<s>", *sorted({letter for items in TEXTS.values() for letter in json.dumps(items, ensure_ascii=False)} | {"\n"})]
        plain = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, "<s>"))
        plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", unk_token="<s>")


@pytest.fixture(scope="module")
def speller():
    "A language model from scratch over letters, and its tokenizer."
    tokenizer = Letters()
    torch.manual_seed(2)
    config = LanguageModelConfig(vocab_size=len(tokenizer), positions=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16, mixer="window", initializer_range=0.5)
    return LanguageModel(config).eval(), tokenizer


@torch.no_grad()
def summed(model, ids, first):
    "Log-probability of the tokens from the index `first` on."
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_texts_are_scored_by_their_summed_log_probability(speller):
    model, tokenizer = speller
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    found = evaluate_language(model, tokenizer, CONTINUATION_TASKS, "local", batch_size=3)
    pairs = [[encode(item[f"sentence_{kind}"]) for kind in ("good", "bad")] for item in TEXTS["blimp"]]
    for field, start in (("accuracy", []), ("standard_accuracy", [0])):  # from the second token on; whole, after the start token
        right = [summed(model, start + good, 1) > summed(model, start + bad, 1) for good, bad in pairs]
        assert found["blimp"][field] == pytest.approx(sum(right) / len(right))
    assert found["blimp"]["phenomena"].keys() == {"anaphor_agreement", "subject_verb_agreement"}
    assert {name: score["items"] for name, score in found["blimp"]["paradigms"].items()}.popitem()[1] == 2
    for task in ("hellaswag", "cbt", "piqa_continuation"):
        right, right_by_character = [], []
        for item in TEXTS[task]:
            prompt, choices = encode(task_prompt(task, item)), task_choices(task, item)
            sums = [summed(model, prompt + encode(f" {choice}"), len(prompt)) for choice in choices]
            gold = item["options"].index(item["answer"]) if task == "cbt" else item.get("gold", item.get("label"))
            right.append(max(range(len(sums)), key=sums.__getitem__) == gold)
            by_character = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
            right_by_character.append(max(range(len(sums)), key=by_character.__getitem__) == gold)
        assert found[task]["accuracy"] == pytest.approx(sum(right) / len(right))
        assert found[task]["standard_accuracy"] == pytest.approx(sum(right_by_character) / len(right_by_character))
        chance = sum(1 / len(task_choices(task, item)) for item in TEXTS[task]) / len(TEXTS[task])
        assert found[task]["chance"]["accuracy"] == pytest.approx(chance)
    table = language_table({"letters": found})
    assert "| blimp, lm-eval's scoring | letters | 4 |" in table and "| lambada | chance | 3 | 0.00 | — |" in table


@over("task", ["boolq_continuation", "piqa_continuation", "hellaswag", "arc_easy"])
def test_continuations_have_the_metrics_of_lm_eval(task):
    folders = {"boolq_continuation": "super_glue/boolq/default", "piqa_continuation": "piqa/piqa", "arc_easy": "arc/arc_easy"}
    theirs = Path(lm_eval.__file__).parent / "tasks" / f"{folders.get(task, 'hellaswag/hellaswag')}.yaml"
    metrics = [re.findall(r"metric: (\w+)", path.read_text(encoding="utf-8")) for path in (task_file(task), theirs)]
    assert metrics[0] == metrics[1]


def test_of_two_equally_probable_sentences_half_counts_as_right(tmp_path):
    tokenizer, kinds = Letters(), {"tie": ("a fox", "a dog"), "right": ("fox", "a dog"), "wrong": ("a dog", "fox")}
    model = LanguageModel(LanguageModelConfig(vocab_size=len(tokenizer), positions=64, hidden_size=16, num_hidden_layers=1,
                                              num_attention_heads=2, intermediate_size=16, mixer="standard")).eval()
    with torch.no_grad():
        model.norm.weight.zero_()  # all tokens are equally probable, a text the less the longer it is
    for counts, stderr in (({"tie": 3, "right": 2, "wrong": 1}, math.sqrt((2 + 3 / 4 - 6 * (3.5 / 6) ** 2) / 5 / 6)),
                           ({"right": 2, "wrong": 1}, 1 / 3), ({"tie": 1}, None)):
        items = [{"sentence_good": kinds[kind][0], "sentence_bad": kinds[kind][1], "UID": kind, "linguistics_term": "t"}
                 for kind, count in counts.items() for _ in range(count)]
        (tmp_path / "blimp.json").write_text(json.dumps(items), encoding="utf-8")
        found, total = evaluate_language(model, tokenizer, "blimp", tmp_path)["blimp"], sum(counts.values())
        share = (counts.get("right", 0) + counts.get("tie", 0) / 2) / total
        assert found["accuracy"] == found["standard_accuracy"] == pytest.approx(share)
        assert found["accuracy_stderr"] == found["standard_stderr"] == (stderr and pytest.approx(stderr))
        assert found["phenomena"]["t"]["accuracy"] == pytest.approx(share)
        assert {name: score["accuracy"] for name, score in found["paradigms"].items()} == {
            kind: {"tie": 0.5, "right": 1, "wrong": 0}[kind] for kind in counts}


def test_standard_scores_are_by_character_not_by_byte(speller, tmp_path):
    (model, tokenizer), choices = speller, ["日本", "dry"]
    prompt, *texts = (tokenizer.encode(text, add_special_tokens=False) for text in ("A fox", *(f" {choice}" for choice in choices)))
    sums = [summed(model, prompt + text, len(prompt)) for text in texts]
    (tmp_path / "hellaswag.json").write_text(json.dumps([{"query": "A fox", "choices": choices, "gold": 0}]), encoding="utf-8")
    by_character, by_byte = ([total / size for total, size in zip(sums, sizes, strict=True)]
                             for sizes in (map(len, choices), (len(choice.encode()) for choice in choices)))
    assert by_character[0] < by_character[1] and by_byte[0] > by_byte[1]
    assert evaluate_language(model, tokenizer, "hellaswag", tmp_path)["hellaswag"]["standard_accuracy"] == 0


@pytest.mark.parametrize(("task", "item", "cut"), [
    ("lambada", {"text": "the river was dry"}, [0, 0, 1]),
    ("blimp", {"sentence_good": "the river was dry", "sentence_bad": "the river", "UID": "u", "linguistics_term": "t"}, [0, 1, 1]),
])
def test_a_text_is_cut_if_it_is_longer_than_the_context_and_one_token(speller, tmp_path, task, item, cut):
    "Of BLiMP with the start token."
    model, tokenizer = speller
    (tmp_path / f"{task}.json").write_text(json.dumps([item]), encoding="utf-8")
    ids, found = tokenizer.encode("the river was dry", add_special_tokens=False), []
    try:
        for model.config.positions in (len(ids), len(ids) - 1, len(ids) - 2):
            found.append(evaluate_language(model, tokenizer, task, tmp_path)[task])
    finally:
        model.config.positions = 512
    assert [each["truncated"] for each in found] == cut
    if task == "lambada":
        assert found[1]["perplexity"] == pytest.approx(math.exp(-summed(model, ids, len(ids) - 4)), rel=1e-4)


def test_a_perplexity_that_no_number_holds_is_none(speller):
    model, tokenizer = speller
    weight = model.norm.weight.detach().clone()
    try:
        with torch.no_grad():
            model.norm.weight.mul_(1e4)
        assert evaluate_language(model, tokenizer, "lambada", "local")["lambada"]["perplexity"] is None
    finally:
        with torch.no_grad():
            model.norm.weight.copy_(weight)


def test_the_last_word_must_be_the_most_likely_one_token_by_token(speller):
    model, tokenizer = speller
    found = evaluate_language(model, tokenizer, "lambada", "local")["lambada"]
    totals = []
    for item in TEXTS["lambada"]:
        text, word = item["text"].rsplit(" ", 1)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        totals.append(summed(model, prompt + tokenizer.encode(f" {word}", add_special_tokens=False), len(prompt)))
    assert found["perplexity"] == pytest.approx(math.exp(-sum(totals) / len(totals)), rel=1e-4) and found["accuracy"] == 0
    model.config.positions = 8  # longer texts are cut from the left
    try:
        assert evaluate_language(model, tokenizer, "lambada", "local")["lambada"]["truncated"] == 3
    finally:
        model.config.positions = 512


def test_a_model_from_scratch_answers_prompts_of_unequal_length(speller, checkers):
    answers = [evaluate_language(*speller, "ifeval", "local", batch_size, max_gen_toks=4)["ifeval"] for batch_size in (1, 8)]
    assert answers[0] == answers[1]


def test_prompts_are_cut_to_the_positions_of_a_model_from_scratch(speller, checkers):
    model, tokenizer = speller
    model.config.positions = 64
    try:
        found = evaluate_language(model, tokenizer, "mmlu_pro", "local", batch_size=2)["mmlu_pro"]
        with pytest.raises(ValueError, match="max_gen_toks=64 must be below 64, the context length of this model"):
            evaluate_language(model, tokenizer, "ifeval", "local", max_gen_toks=64)
    finally:
        model.config.positions = 512
    answers = tokenizer.convert_tokens_to_ids(ANSWERS["mmlu_pro"])
    right = []
    for item in OWN["mmlu_pro"]:
        with torch.no_grad():
            last = model(torch.tensor([tokenizer.encode(task_prompt("mmlu_pro", item), add_special_tokens=False)[-64:]])).logits[0, -1]
        right.append(last[answers[:len(item["options"])]].argmax().item() == item["answer_index"])
    assert (found["accuracy"], found["truncated"]) == (pytest.approx(sum(right) / len(right)), len(right))


def test_the_rest_of_the_sentence_belongs_to_each_candidate():
    item = TEXTS["cbt"][0]
    assert task_choices("cbt", item)[1] == "fox went back thirsty ."
    assert task_prompt("cbt", item).endswith(" to drink. One day the river was dry , and the")


def test_choices_may_hold_any_character(speller, tmp_path):
    item = {"sentences": ["A fox ."], "question": "the XXXXX's \"🦊\" <b>\\n & 'x' .", "options": ["🦊", "日本", "it's"], "answer": "日本"}
    assert task_choices("cbt", item) == [option + "'s \"🦊\" <b>\\n & 'x' ." for option in item["options"]]
    (tmp_path / "cbt.json").write_text(json.dumps([item]), encoding="utf-8")
    assert evaluate_language(*speller, "cbt", tmp_path)["cbt"]["items"] == 1


def write_paradigms(folder):
    "Two pairs of each paradigm, in files as published."
    (folder / "blimp").mkdir()
    names = sorted(path.stem for path in (Path(lm_eval.__file__).parent / "tasks" / "blimp").glob("*.yaml") if path.stem[0] != "_")
    pairs = [{**item, "UID": name} for name in names for item in TEXTS["blimp"][:2]]
    for name in names:
        lines = [json.dumps({**pair, "pairID": "0"}) for pair in pairs if pair["UID"] == name]
        (folder / "blimp" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pairs


def test_a_folder_must_have_the_whole_of_blimp(tmp_path, monkeypatch):
    monkeypatch.setattr(language_tasks, "PARADIGM_PAIRS", 2)
    pairs, folder = write_paradigms(tmp_path), tmp_path / "blimp"
    assert len(pairs) == 2 * 67 and read_task_items(tmp_path, "blimp") == pairs
    for name in ("wh_island", "passive_1"):
        (folder / f"{name}.jsonl").unlink()
    message = f"{folder} must hold 2 pairs of each of BLiMP's 67 paradigms; missing: passive_1, wh_island; of another number: "
    with pytest.raises(ValueError, match=message + "none;"):
        read_task_items(tmp_path, "blimp")
    half = folder / "causative.jsonl"
    half.write_text(half.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(ValueError, match=message + "causative with 1;"):
        language_items("blimp", tmp_path, limit=1)


def test_files_as_published_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(language_tasks, "PARADIGM_PAIRS", 2)
    (tmp_path / "piqa").mkdir()
    pairs = write_paradigms(tmp_path)
    plain = [{name: value for name, value in item.items() if name != "label"} for item in OWN["piqa"]]
    (tmp_path / "piqa" / "valid.jsonl").write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    (tmp_path / "piqa" / "valid-labels.lst").write_text("\n".join(str(item["label"]) for item in OWN["piqa"]), encoding="utf-8")
    (tmp_path / "boolq.jsonl").write_text("\n".join(json.dumps({
        "query": f"Passage: {item['passage']}\nQuestion: {item['question']}?", "choices": ["no", "yes"], "gold": item["label"]})
        for item in OWN["boolq"]), encoding="utf-8")
    assert language_items(["blimp", "piqa", "piqa_continuation", "boolq"], tmp_path) == {
        "blimp": pairs, "piqa": OWN["piqa"], "piqa_continuation": OWN["piqa"], "boolq": OWN["boolq"]}
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="valid-labels.lst must hold a label for each of"):
        language_items(["piqa"], tmp_path)
    with pytest.raises(FileNotFoundError, match="lambada.json or lambada_test.jsonl"):
        language_items(["lambada"], tmp_path)


def test_hellaswag_is_read_as_its_authors_publish_it(tmp_path):
    item = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using [1] wrap\u2028", "b", "c", "d [title] e"]}
    lines = [item, {name: value for name, value in item.items() if name not in ("ctx_a", "ctx_b")} | {"label": "1"}]
    (tmp_path / "hellaswag_val.jsonl").write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    wanted = {"query": "Roof shingle removal: A man is sitting on a roof. He", "choices": ["is using wrap", "b", "c", "d. e"], "gold": 3}
    assert language_items(["hellaswag"], tmp_path)["hellaswag"] == [
        wanted, {**wanted, "query": "Roof shingle removal: A man is sitting on a roof. he", "gold": 1}]


@pytest.mark.parametrize(("task", "line", "message"), [
    ("piqa", [1], "item 1 of 1: must be an object with the fields goal"), ("piqa", {**PIQA, "goal": 5}, "field 'goal' must be of type str"),
    ("boolq", [1], "item 1 of 1: must be an object with the fields passage"), ("boolq", {"query": 5}, "field 'passage' is missing"),
    ("hellaswag", [1], "must be an object with the fields query"), ("hellaswag", {"endings": ["a"]}, "field 'query' is missing"),
    ("hellaswag", {"endings": ["a", "b"], "ctx": "c", "activity_label": "l", "label": ""}, "field 'gold' must be an integer"),
    ("hellaswag", {"endings": ["a", "b"], "ctx": "c", "activity_label": "l", "label": True}, "field 'gold' must be an integer"),
    ("hellaswag", {"endings": ["a", "b"], "ctx": "c", "activity_label": "l", "label": "9" * 5000}, "field 'gold' must be an integer"),
    ("hellaswag", {"endings": ["a", "b"], "ctx": None, "activity_label": None, "label": 1}, "field 'query' is missing"),
])
def test_damaged_lines_of_published_files_are_named(tmp_path, task, line, message):
    place = tmp_path / {"piqa": "piqa/valid.jsonl", "hellaswag": "hellaswag_val.jsonl"}.get(task, f"{task}.jsonl")
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(line), encoding="utf-8")
    (place.parent / "valid-labels.lst").write_text("0", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        language_items([task], tmp_path)
    assert message in str(error.value) and place.name in str(error.value)
    if task == "piqa":
        place.write_text(json.dumps(PIQA), encoding="utf-8")
        (place.parent / "valid-labels.lst").write_text("x", encoding="utf-8")
        with pytest.raises(ValueError, match="field 'label' must be an integer from 0 to 1, got 'x'"):
            language_items([task], tmp_path)
        (place.parent / "valid-labels.lst").write_bytes(b"\xff")
        with pytest.raises(ValueError, match="valid-labels.lst is not text in UTF-8"):
            language_items(task, tmp_path)
    for damage in (b"x", b"\xff", b"[" * 99_999):
        place.write_bytes(json.dumps(line).encode() + b"\n\n" + damage)
        with pytest.raises(ValueError, match=f"{place}, line 3, is not valid JSON .*; correct it, or name another file as source"):
            language_items([task], tmp_path)


def test_a_run_of_the_users_text_needs_the_text_only_to_compare_it(no_downloads, tmp_path, monkeypatch):
    words = [f"w{draw}{'aeiou'[draw % 5]}{draw * 7 % 31}" for draw in range(400)]
    for name in ("one", "other", "third"):
        documents = [" ".join(random.Random(f"{name}{number}").choices(words, k=90)) for number in range(80)]
        (tmp_path / name).write_text(f"\n{EOS}\n".join(documents), encoding="utf-8")
    recipe = get_recipe("lm_krause_100m/text").at("smoke")
    corpus, _ = (recipe_corpus(recipe, tmp_path / name) for name in ("one", "other"))
    run = Run(run_path(recipe, 0, tmp_path / "runs"), recipe, 0)
    corpus.tokenizer.save_pretrained(run.path)
    save_model(task_of(recipe).build(recipe), run.path)
    for name, content in (("environment", {"commit": None, "device": "CPU", "versions": {}, "corpus": corpus.digest}),
                          ("recipe", {"fingerprint": recipe.fingerprint, "seed": 0, "recipe": recipe.to_dict()}),
                          ("finished", {"seconds": 1, "steps": 1, "chosen_epoch": 1, "threads": 1, "parameters": 1, "held_out_loss": 1})):
        write_json(run.path / f"{name}.json", content)
    (run.path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1}\n', encoding="utf-8")
    monkeypatch.setattr(language_benchmarks, "provenance", lambda runs: {})
    scores = language_benchmarks.evaluate_zero_shot([run], tmp_path / "one", "piqa_continuation", "local", 2)
    assert scores["tasks"]["piqa_continuation"]["items"] == 2
    assert sample_text(run, "w1", 3) == sample_text(run, "w1", 3, source=tmp_path / "one") and len(run_model(run)[1]) == 512
    for name, error, message in (("other", ValueError, "source must be the corpus of the run"),
                                 ("third", FileNotFoundError, "no corpus was built of .*third, .* give no other text, as .*seed-0")):
        with pytest.raises(error, match=message):
            sample_text(run, "w1", 3, source=tmp_path / name)
        with pytest.raises(error, match=message):
            language_benchmarks.evaluate_zero_shot([run], tmp_path / name, "piqa_continuation", "local", 3)
    scores = language_benchmarks.evaluate_zero_shot([run], None, "piqa_continuation", "local", 3)  # two texts are built
    assert scores["tasks"]["piqa_continuation"]["items"] == 3
    assert len(list((no_downloads / "language" / "corpora").iterdir())) == 2  # nothing is built of a text to refuse it


def test_a_base_model_and_a_run_are_scored_alike(monkeypatch, checkers, tiny, tokenizer):
    asked = {"tasks": ("lambada", "piqa_continuation", "ifeval"), "max_gen_toks": 4}
    for name, value in (("FINE_TUNED", asked), ("base_model", lambda recipe: tiny), ("base_source", lambda recipe: None),
                        ("load_tokenizer", lambda source: tokenizer), ("run_model", lambda run, source: (tiny, tokenizer)),
                        ("cached_test", lambda run, measure, file, reads_data, fields: measure()), ("provenance", lambda runs: {})):
        monkeypatch.setattr(language_benchmarks, name, value)
    base = language_benchmarks.evaluate_base_zero_shot(None, "local", 2)
    assert language_benchmarks.evaluate_zero_shot([None], items="local", limit=2, **asked) == base
    direct = evaluate_language(tiny, tokenizer, asked["tasks"], "local", limit=2, max_gen_toks=4)
    assert {task: found["accuracies"]["values"] for task, found in base["tasks"].items()} == {
        task: [found["accuracy"]] for task, found in direct.items()}
    assert {task: found["perplexities"]["values"] for task, found in base["tasks"].items() if "perplexities" in found} == {
        "lambada": [direct["lambada"]["perplexity"]]}
    table = language_benchmarks.zero_shot_table({"base": {"label": "base model", **base}})
    assert "| chance | — | 0.00 | 50.00 | — |" in table and "IFEval, 2 items" in table and "most frequent" not in table


def test_each_scoring_has_its_own_standard_error():
    both = {"stderr": 0.03, "accuracies": summarise([0.8]), "standard_accuracies": summarise([0.5]), "items": 101, "chance": 0.5}
    models = {"a": {"label": "A", "tasks": {"blimp": both}}}
    for scoring, error in (("accuracies", "3.00"), ("standard_accuracies", "5.00")):  # √(0.5 · 0.5 / 100)
        assert f"| standard error, A | — | {error} |" in language_benchmarks.zero_shot_table(models, scoring)


@pytest.mark.parametrize("limit", [3, 10])
def test_boolq_is_shown_beside_its_most_frequent_answer(monkeypatch, checkers, tiny, tokenizer, limit):
    for name, value in (("FINE_TUNED", {"tasks": ("boolq_continuation",), "max_gen_toks": 4}), ("base_model", lambda recipe: tiny),
                        ("base_source", lambda recipe: None), ("load_tokenizer", lambda source: tokenizer)):
        monkeypatch.setattr(language_benchmarks, name, value)
    base = language_benchmarks.evaluate_base_zero_shot(None, "local", limit)
    items = language_tasks.language_items("boolq_continuation", "local", limit)["boolq_continuation"]
    share = sum(item["label"] for item in items) / limit
    assert base["tasks"]["boolq_continuation"]["constant"] == {
        "no": {"accuracy": pytest.approx(1 - share)}, "yes": {"accuracy": share}}
    assert f"| most frequent answer | — | {100 * max(share, 1 - share):.2f} |" in language_benchmarks.zero_shot_table(
        {"base": {"label": "base model", **base}})
