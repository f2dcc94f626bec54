"""What transformers' own test mixins check, as far as it applies to these models, and what other tools ask of a saved folder."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from krause_repro.branched_models import add_krause_branch, load_with_branch
from krause_repro.transformers_attention import configure_krause, load_krause

SIZE = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0, "initializer_range": 0.2}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {"llama": lambda **o: LlamaConfig(**SIZE, **GROUPED, **o), "qwen2": lambda **o: Qwen2Config(**SIZE, **GROUPED, **o),
           "gpt2": lambda **o: GPT2Config(**SIZE, **o)}
KINDS = (*CONFIGS, "branch")
CLOSE = {"rtol": 0, "atol": 2e-5}
NOT_APPLICABLE = {
    ("branch", "attentions"): "its layers return the base's weights; recorded_branches gives the branch's",
    ("llama", "exported"): "in test_transformers_attention",
}


def build(kind, **options):
    torch.manual_seed(0)
    if kind == "branch":
        return add_krause_branch(AutoModelForCausalLM.from_config(CONFIGS["llama"](**options)), window=5, top_k=3).eval()
    return AutoModelForCausalLM.from_config(configure_krause(CONFIGS[kind](**options), 3.0, 5, 3)).eval()


def text(length=14, batch=2):
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(0))


def saved(kind, folder):
    model = build(kind)
    model.save_pretrained(folder)
    loaded = (load_with_branch if kind == "branch" else load_krause)(folder)
    assert torch.equal(loaded(text()).logits, model(text()).logits)


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
    loaded = (load_with_branch if kind == "branch" else load_krause)(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def checkpointed(kind, folder):
    plain = build(kind).train()
    other = copy.deepcopy(plain)
    other.gradient_checkpointing_enable()
    for model in (plain, other):
        torch.manual_seed(1)  # GPT-2 has dropout
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


def tuple_output(kind, folder):
    model = build(kind)
    assert torch.equal(model(text(), return_dict=False)[0], model(text()).logits)


def exported(kind, folder):
    mask = torch.arange(14).ge(torch.tensor([[0], [4]])).long()
    model, options = build(kind), {"input_ids": text(), "attention_mask": mask, "use_cache": False}
    assert_close(torch.export.export(model, (), options, strict=False).module()(**options).logits, model(**options).logits, **CLOSE)


CHECKS = (saved, resized, ties, checkpointed, attentions, embedded, padded, beams, tuple_output, exported)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_as_transformers_expects(kind, check, tmp_path):
    if reason := NOT_APPLICABLE.get((kind, check.__name__)):
        pytest.skip(reason)
    with torch.enable_grad() if check is checkpointed else torch.no_grad():
        check(kind, tmp_path)


def test_lm_eval_reads_a_saved_folder(tmp_path):
    "`lm_eval --model hf --model_args pretrained=FOLDER,attn_implementation=krause`"
    model = build("llama")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 60)}}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    lm = HFLM.create_from_arg_string(f"pretrained={tmp_path},attn_implementation=krause", {"device": "cpu", "batch_size": 2})
    asked = [("w5 w9 w3 w7 w4 w8 w20", " w11 w12"), ("w6", " w13")]
    scores = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)], disable_tqdm=True)
    for (context, answer), (score, _) in zip(asked, scores, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in (context + answer).split()]])
        with torch.no_grad():
            known = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        assert score == pytest.approx(float(known[-len(answer.split()):].sum()), abs=1e-4)
