"""What transformers' own test mixins check, as far as it applies to these models, and what other tools ask of a saved folder."""

import copy
import json
from functools import partial

import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from krause_repro.branched_models import add_krause_branch, load_with_branch
from krause_repro.image_transformer import ImageTransformer, ImageTransformerConfig
from krause_repro.language_model import LanguageModel, LanguageModelConfig
from krause_repro.swin import SwinClassifier, SwinClassifierConfig
from krause_repro.transformers_attention import configure_krause, load_krause
from krause_repro.vision_transformer import VisionTransformer, VisionTransformerConfig

SIZE = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.2}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {"llama": lambda **o: LlamaConfig(**{**SIZE, **GROUPED, **o}), "qwen2": lambda **o: Qwen2Config(**{**SIZE, **GROUPED, **o}),
           "gpt2": lambda **o: GPT2Config(**{**SIZE, **o})}
MIXED = {"krause": "krause", "krause only": "krause_only"}  # our language model's mixers
KINDS = (*CONFIGS, "branch", *MIXED)
IMAGES = {
    "kvit": lambda: VisionTransformer(VisionTransformerConfig(
        image_size=8, patch_size=2, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=5,
        drop_path=0.0)),
    "vit": lambda: VisionTransformer(VisionTransformerConfig(
        image_size=8, patch_size=2, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=5,
        drop_path=0.0, attention_radius=None, attention_top_k=None, attention_score="softmax")),
    "kswin": lambda: SwinClassifier(SwinClassifierConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 4), num_labels=5, drop_path=0.0)),
}
CLOSE = {"rtol": 0, "atol": 2e-5}
NOT_APPLICABLE = {  # of all models also: slow and fast initialisation, torchscript, sdpa and flash kernels, head masks
    ("branch", "attentions"): "its layers return the base's weights; recorded_branches gives the branch's",
    **{(kind, "embedded"): "it takes tokens only, whose range is checked" for kind in MIXED},
    **{(kind, "exported"): "its attention is Qwen2's, which is exported; with one length in test_transformers_attention"
       for kind in ("llama", "gpt2")},
    ("krause only", "exported"): "krause, which is exported, contains it",
    ("qwen2", "assisted"): "its code is Llama's",
    **{(kind, "padded"): "it has no padding; an attention_mask with zeros is refused" for kind in MIXED},
}


def build(kind, **options):
    torch.manual_seed(0)
    if kind in IMAGES:
        return IMAGES[kind]().eval()
    if kind in MIXED:
        return LanguageModel(LanguageModelConfig(
            vocab_size=60, positions=64, hidden_size=32, num_attention_heads=4, intermediate_size=48, mixer=MIXED[kind],
            attention_window=5, attention_top_k=3, initializer_range=0.2, dropout=0.0, **{"num_hidden_layers": 2, **options})).eval()
    if kind == "branch":
        return add_krause_branch(AutoModelForCausalLM.from_config(CONFIGS["llama"](**options)), window=5, top_k=3).eval()
    return AutoModelForCausalLM.from_config(configure_krause(CONFIGS[kind](**options), 3.0, 5, 3)).eval()


def text(length=14, batch=2):
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(0))


def pixels(model, batch=3):
    return torch.randn(batch, 3, *[model.config.image_size] * 2, generator=torch.Generator().manual_seed(0))


def load(kind, folder, **options):
    if kind in IMAGES:
        return AutoModelForImageClassification.from_pretrained(folder, **options)
    return {"branch": load_with_branch, **dict.fromkeys(MIXED, AutoModelForCausalLM.from_pretrained)}.get(kind, load_krause)(folder)


def saved(kind, folder):
    model = build(kind)
    model.save_pretrained(folder)
    x = pixels(model) if kind in IMAGES else text()
    assert torch.equal(load(kind, folder)(x).logits, model(x).logits)


def resized(kind, folder):
    model = build(kind)
    before = model(text()).logits
    model.resize_token_embeddings(70)
    after = model(text()).logits
    assert after.shape[-1] == model.config.vocab_size == 70
    assert_close(after[..., :60], before, **CLOSE)


def ties(kind, folder):
    model = build(kind, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(folder)
    loaded = load(kind, folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def checkpointed(kind, folder):
    plain = build(kind).train()
    other = copy.deepcopy(plain)
    other.gradient_checkpointing_enable()
    for model in (plain, other):
        torch.manual_seed(1)  # GPT-2 has dropout
        if kind in IMAGES:
            model(pixels(model), labels=torch.arange(3)).loss.backward()
        else:
            model(text(), labels=text(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def attentions(kind, folder):
    got = build(kind)(text(), output_attentions=True, output_hidden_states=True, use_cache=False)
    assert [x.shape for x in got.attentions] == [(2, 4, 14, 14)] * 2 and len(got.hidden_states) == 3
    assert_close(got.attentions[0].sum(-1), torch.ones(2, 4, 14), **CLOSE)


def embedded(kind, folder):
    model = build(kind)
    embeddings = model.get_input_embeddings()(text())
    assert_close(model(inputs_embeds=embeddings).logits, model(text()).logits, **CLOSE)
    tokens = model.generate(text(batch=1), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeddings[:1], max_new_tokens=6, do_sample=False), tokens[:, 14:])


def padded(kind, folder):
    model, short = build(kind), text(9, 1)
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)
    mask = (torch.arange(14) >= 5).long()[None]
    got = model.generate(left, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(got[:, 14:], model.generate(short, max_new_tokens=6, do_sample=False)[:, 9:])


def beams(kind, folder):
    model, options = build(kind), {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(text(), **options), model.generate(text(), **options, use_cache=False))


def assisted(kind, folder):
    "In float64: a near-tie of the k-th key may be decided otherwise by a step of several tokens."
    model, draft, options = build(kind).double(), build("llama").double(), {"max_new_tokens": 12, "do_sample": False}
    for length in (3, 14):
        ids = text(length, 1)
        for way in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft}):
            assert torch.equal(model.generate(ids, **options, **way), model.generate(ids, **options))


def tuple_output(kind, folder):
    model = build(kind)
    x = pixels(model) if kind in IMAGES else text()
    assert torch.equal(model(x, return_dict=False)[0], model(x).logits)


def exported(kind, folder):
    "With a length that may differ; another than the program allows is named."
    model, tokens = build(kind, num_hidden_layers=1), torch.export.Dim("tokens", min=9, max=40)
    shapes, masked = {"input_ids": {1: tokens}, "use_cache": None}, kind not in MIXED

    def options(length):
        mask = {"attention_mask": torch.arange(length).ge(torch.tensor([[0], [4]])).long()} if masked else {}
        return {"input_ids": text(length), "use_cache": False, **mask}

    shapes |= {"attention_mask": {1: tokens}} if masked else {}
    program = torch.export.export(model, (), options(14), dynamic_shapes=shapes, strict=False).module()
    for length in (9, 14, 23):
        assert_close(program(**options(length)).logits, model(**options(length)).logits, **CLOSE)
    for length in (8, 41):
        with pytest.raises(AssertionError, match=r"input_ids\.size\(\)\[1\]"):
            program(**options(length))


CHECKS = (saved, resized, ties, checkpointed, attentions, embedded, padded, beams, assisted, tuple_output, exported)


APPLICABLE = [(kind, check) for kind in KINDS for check in CHECKS if (kind, check.__name__) not in NOT_APPLICABLE]


@pytest.mark.parametrize(("kind", "check"), APPLICABLE, ids=[f"{kind}-{check.__name__}" for kind, check in APPLICABLE])
def test_a_model_is_as_transformers_expects(kind, check, tmp_path):
    with torch.enable_grad() if check is checkpointed else torch.no_grad():
        check(kind, tmp_path)


# Image models


def attention_maps(kind, folder):
    model = build(kind).requires_grad_(False)
    x = pixels(model).requires_grad_()
    with torch.enable_grad():
        got = model(x, output_attentions=True, output_hidden_states=True)
        # KViT's maps and Swin's states are copies, made for the caller
        kept = [*(got.hidden_states if kind != "kswin" else ()), *(got.attentions if kind != "kvit" else ())]
        for each in kept:
            each.retain_grad()
        got.logits.sum().backward()
    assert len(got.hidden_states) == len(got.attentions) + 1 == 3 and all(each.grad.any() for each in kept)
    for each in got.attentions:
        assert_close(each.sum(-1), torch.ones(each.shape[:-1]), **CLOSE)


def another_head(kind, folder):
    model = build(kind)
    model.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(kind, folder, num_labels=7)
    other = load(kind, folder, num_labels=7, ignore_mismatched_sizes=True)
    assert other.head.out_features == other.config.num_labels == 7 and other.norm.weight.equal(model.norm.weight)


def each_alone(kind, folder):
    model = build(kind)
    x = pixels(model)
    assert_close(torch.cat([model(each[None]).logits for each in x]), model(x).logits, **CLOSE)


# Not applicable, as they are about tokens and generation: resized, ties, embedded, padded, beams, assisted.
IMAGE_CHECKS = (saved, checkpointed, attention_maps, another_head, each_alone, tuple_output)  # export and flags: test_model_base


@pytest.mark.parametrize("check", IMAGE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_model_is_as_transformers_expects(kind, check, tmp_path):
    with torch.enable_grad() if check is checkpointed else torch.no_grad():
        check(kind, tmp_path)


def step_gradients(model, data, size, folder):
    "Gradients of one step of Trainer, in one batch of five or in three parts of two, the last of which is smaller."
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=3 if size == 2 else 1, max_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=0, learning_rate=0.0, logging_steps=1)
    trainer, found = Trainer(model, arguments, train_dataset=data), []
    assert trainer.model_accepts_loss_kwargs
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in model.parameters()))
    trainer.train()
    return found


@pytest.mark.parametrize("kind", ["kvit", "kswin"])
@pytest.mark.parametrize("problem", ["classes", "probabilities"])
def test_trainer_accumulates_the_gradient_of_the_whole_batch(kind, problem, tmp_path):
    labels = torch.tensor([1, 4, 0, 2, 2])
    labels = labels if problem == "classes" else torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels(build(kind), 5), labels, strict=True)]
    for one, other in zip(*(step_gradients(build(kind), data, size, tmp_path) for size in (5, 2)), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["krause", "image tokens"])
def test_trainer_accumulates_the_gradient_of_all_tokens(kind, tmp_path):
    "Only two sequences count, with unequal numbers of tokens, so that at least one of the parts has none."
    def model():
        torch.manual_seed(0)
        return ImageTransformer(ImageTransformerConfig(
            vocab_size=60, image_shape=(2, 7, 1), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            dropout=0.0)) if kind == "image tokens" else build(kind)

    ids, whole = text(batch=5), model()
    labels = ids.masked_fill(torch.arange(14) < torch.tensor([0, 9, 14, 14, 14])[:, None], -100)
    whole(input_ids=ids, labels=labels).loss.backward()
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    for size in (5, 2):
        for one, other in zip(step_gradients(model(), data, size, tmp_path), whole.parameters(), strict=True):
            assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["kvit", "kswin"])
@pytest.mark.parametrize(("size", "message"), [
    (7, "image_size must be a multiple of patch_size = 2, got 7"), ("8", "image_size must be"), (0, "image_size must be"),
    ([8, 8, 8], r"image_size must be one side or \(height, width\)"), (8.5, "image_size must be"), (True, "image_size must be"),
])
def test_an_image_size_that_cannot_be_is_named_before_weights_are_read(kind, size, message, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    for load_it in (type(model).from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load_it(tmp_path, image_size=size)


# lm_eval


TASK = """task: offline
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def test_the_command_of_lm_eval_reads_a_saved_folder(tmp_path, monkeypatch):
    "The command of page 08, lm_eval's own after the import that registers the attention."
    model, folder = build("llama"), tmp_path / "model"
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 60)}}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    model.save_pretrained(folder)
    (tmp_path / "items.jsonl").write_text(json.dumps({"context": "w5 w9 w3 w7 w4 w8 w20", "answers": ["w11 w12", "w13"]}))
    (tmp_path / "offline.yaml").write_text(TASK.format(path=tmp_path / "items.jsonl"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # lm_eval would read its thousands of tasks and run pip: 15 s that are not ours
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("sys.argv", [
        "-c", "--model", "hf", "--model_args", f"pretrained={folder},attn_implementation=krause", "--tasks", "offline", "--include_path",
        str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"])
    cli_evaluate()
    sample = json.loads(next((tmp_path / "out").rglob("samples_*.jsonl")).read_text())
    for answer, (score, _) in zip(("w11 w12", "w13"), sample["filtered_resps"], strict=True):
        ids = torch.tensor([[int(word[1:]) for word in f"w5 w9 w3 w7 w4 w8 w20 {answer}".split()]])
        with torch.no_grad():
            known = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        assert float(score) == pytest.approx(float(known[-len(answer.split()):].sum()), abs=1e-4)
