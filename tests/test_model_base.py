"""What all models share: names, flags, values, graphs, meta tensors, weights that are never a pickle; what all image models share."""

import json
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchvision.transforms.v2.functional import rgb_to_grayscale
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    pipeline,
)

from krause_repro.baselines import PixelClassifier
from krause_repro.checks import check_names, check_weights, nearest_name
from krause_repro.image_transformer import ImageTransformer
from krause_repro.language_model import LanguageModel
from krause_repro.model_base import COMMON_SETTINGS, CheckedConfig, token_loss
from krause_repro.swin import SwinClassifier
from krause_repro.vision_transformer import VisionTransformer

VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "num_labels": 5, "drop_path": 0.0}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "num_labels": 5, "drop_path": 0.0}
PIXELS = {"vocab_size": 17, "image_shape": (5, 4, 1), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 16, "attention_window": 6, "attention_top_k": 4, "dropout": 0.0}
FULL = {"attention_radius": None, "attention_top_k": None}
CASES = {  # every class with every attention: class, settings
    "kvit": (VisionTransformer, VIT), "kvit 5×5": (VisionTransformer, VIT | {"attention_radius": 2, "attention_metric": "chebyshev"}),
    "kvit without top-k": (VisionTransformer, VIT | {"attention_top_k": None, "positions": "rotary", "norm": "pre"}),
    "kvit full": (VisionTransformer, VIT | {"attention_radius": None}),
    "kvit random": (VisionTransformer, VIT | {"attention_random_seed": 5}),
    "vit": (VisionTransformer, VIT | FULL | {"attention_score": "softmax"}),
    "vit with key norm": (VisionTransformer, VIT | FULL | {"attention_score": "softmax_key_norm"}),
    "kswin": (SwinClassifier, SWIN), "swin": (SwinClassifier, SWIN | {"attention_score": "softmax"}),
    "swin with key norm": (SwinClassifier, SWIN | {"attention_score": "softmax_key_norm"}),
    "karm": (ImageTransformer, PIXELS), "karm with start": (ImageTransformer, PIXELS | {"start_token": True}),
    "karm whole past": (ImageTransformer, PIXELS | {"attention_window": None, "attention_top_k": None}),
    "arm": (ImageTransformer, PIXELS | {"attention": "softmax"}),
    "arm with a window": (ImageTransformer, PIXELS | {"attention": "softmax_window"}),
    "larm": (ImageTransformer, PIXELS | {"attention": "linear"}),
}
CLASSES = {"vit": CASES["kvit"], "swin": CASES["kswin"], "pixels": CASES["karm"]}
each_class = pytest.mark.parametrize(("kind", "settings"), CLASSES.values(), ids=CLASSES)
each_case = pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)


def build(kind, settings, seed=0):
    torch.manual_seed(seed)
    return kind(kind.config_class(**settings)).eval()


def inputs(model, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ImageTransformer):
        return torch.randint(model.config.vocab_size, (batch, model.config.positions), generator=generator)
    return torch.randn(batch, 3, model.config.image_size, model.config.image_size, generator=generator)


def targets(model, x):
    return x if isinstance(model, ImageTransformer) else torch.arange(len(x)) % 5


def auto(kind):
    return AutoModelForCausalLM if kind is ImageTransformer else AutoModelForImageClassification


# Names


@pytest.mark.parametrize(("name", "nearest"), [
    ("hiden_size", "hidden_size"), ("score", "attention_score"), ("radius", "attention_radius"), ("atention_score", "attention_score"),
    ("size", "hidden_size"), ("sigmas", "sigma"),
])
def test_an_unknown_name_is_told_the_nearest(name, nearest):
    known = ["attention_score", "attention_radius", "hidden_size", "sigma"]
    assert nearest_name(name, known) == nearest
    with pytest.raises(TypeError, match=rf"^a model takes no '{name}'; the nearest name is '{nearest}' \(there are .*, sigma\)$"):
        check_names("a model", [*known, name], known)
    check_names("a model", known, known)


@pytest.mark.parametrize(("kind", "name", "nearest"), [
    (VisionTransformer, "score", "attention_score"), (VisionTransformer, "radius", "attention_radius"), (VisionTransformer, "depth", ""),
    (VisionTransformer, "top_k", "attention_top_k"), (VisionTransformer, "hiden_size", "hidden_size"),
    (VisionTransformer, "num_label", "num_labels"), (ImageTransformer, "windw", "attention_window"),
    (ImageTransformer, "top_k", "attention_top_k"),
    (ImageTransformer, "temperature", ""), (SwinClassifier, "score", "attention_score"), (SwinClassifier, "depth", "depths"),
])
def test_a_misspelt_setting_is_refused_wherever_it_is_given(kind, name, nearest, tmp_path):
    model, slip = build(*next(case for case in CLASSES.values() if case[0] is kind)), {name: 3}
    config, told = type(model.config), f"{kind.config_class.__name__} takes no '{name}'; the nearest name is '{nearest}"
    model.save_pretrained(tmp_path)
    for way in (
        lambda: config(**slip), lambda: config.from_dict(slip), lambda: config.from_dict({}, **slip), lambda: model.config.update(slip),
        lambda: config.from_pretrained(tmp_path, **slip), lambda: AutoConfig.from_pretrained(tmp_path, **slip),
        lambda: AutoConfig.for_model(config.model_type, **slip), lambda: kind(model.config, **slip),
        lambda: kind.from_pretrained(tmp_path, **slip), lambda: auto(kind).from_pretrained(tmp_path, **slip),
        lambda: auto(kind).from_config(model.config, **slip), lambda: setattr(model.config, name, 3),
    ):
        with pytest.raises(TypeError, match=told):
            way()
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | slip))
    with pytest.raises(TypeError, match=told):
        kind.from_pretrained(tmp_path)


@each_class
def test_a_misspelt_argument_of_a_call_is_refused(kind, settings):
    model = build(kind, settings)
    x = inputs(model)
    for name, nearest in (("label", "labels"), ("output_attention", "output_attentions"), ("return_dic", "return_dict")):
        with pytest.raises(TypeError, match=f"{kind.__name__}.forward takes no '{name}'; the nearest name is '{nearest}'"):
            model(x, **{name: x})
    assert model(x, inputs_embeds=None).logits.isfinite().all()  # wrappers hand over None for what they do not have
    with pytest.raises(TypeError, match="settings from its configuration alone, got dropout"):
        kind(model.config, dropout=0.5)
    with pytest.raises(TypeError, match=f"config of {kind.__name__} must be of class"):
        kind(PreTrainedConfig())


@each_class
def test_what_every_configuration_may_contain_is_still_taken(kind, settings):
    "Whatever the library, today's or an earlier one, writes into a config.json or takes for every model."
    values = {
        "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "problem_type": "multi_label_classification",
        "architectures": [kind.__name__], "transformers_version": "4.57.0", "model_type": kind.config_class.model_type, "dtype": "float32",
        "return_dict": True, "output_hidden_states": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
        "_name_or_path": "x", "_attn_implementation_autoset": True, "_commit_hash": None,
    }
    common = dict.fromkeys(COMMON_SETTINGS) | {
        "attn_implementation": "eager", "output_attentions": True, "torch_dtype": "bfloat16", "use_cache": False}
    given = {name: value for name, value in settings.items() if name != "num_labels"}
    config = kind.config_class(**{**common, **given, **values})
    assert config.id2label == {0: "a", 1: "b", 2: "c"} and config.num_labels == 3 and config.dtype == torch.float32
    assert config.output_attentions and kind.config_class(torch_dtype="bfloat16").dtype == torch.bfloat16
    again = kind.config_class.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert kind.config_class.from_dict({}, attn_implementation="eager", num_labels=7).num_labels == 7
    assert {field.name for field in fields(PreTrainedConfig)} <= {field.name for field in fields(kind.config_class)}


OLD_FILES = {  # written by `save_pretrained` of this package's first version
    VisionTransformer: {
        "architectures": ["VisionTransformer"], "attention_metric": "manhattan", "attention_radius": 1, "attention_score": "krause",
        "attention_top_k": [2, 4], "drop_path": 0.1, "dropout": 0.0, "dtype": "float32", "hidden_size": 24, "id2label": {"0": "LABEL_0"},
        "image_size": 8, "initializer_range": 0.02, "intermediate_size": 16, "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-05,
        "learn_sigma": True, "model_type": "krause_vision_transformer", "norm": "post", "num_attention_heads": 2, "num_channels": 3,
        "num_hidden_layers": 1, "patch_size": 2, "positions": "learned", "sigma": 2.5, "transformers_version": "5.23.0",
        "torch_dtype": "float32"},
    SwinClassifier: {
        "architectures": ["SwinClassifier"], "attention_score": "softmax", "depths": [1, 1], "drop_path": 0.0, "dropout": 0.0,
        "dtype": "float32", "embed_dim": 8, "image_size": 16, "layer_norm_eps": 1e-05, "learn_sigma": True, "mlp_ratio": 4.0,
        "model_type": "krause_swin", "num_channels": 3, "num_heads": [2, 4], "pad_small_maps": True, "patch_size": 2, "sigma": 4.0,
        "transformers_version": "5.23.0", "window_size": 4},
    ImageTransformer: {
        "architectures": ["ImageTransformer"], "attention": "krause", "attention_top_k": 4, "attention_window": 6, "bos_token_id": None,
        "dropout": 0.1, "dtype": "float32", "eos_token_id": None, "hidden_size": 16, "image_shape": [5, 4, 1], "initializer_range": 0.02,
        "intermediate_size": 16, "layer_norm_eps": 1e-05, "model_type": "krause_image_transformer", "num_attention_heads": 2,
        "num_hidden_layers": 1, "pad_token_id": None, "sigma": 2.5, "start_token": False, "transformers_version": "5.23.0",
        "use_cache": False, "vocab_size": 17},
}


@pytest.mark.parametrize("kind", OLD_FILES, ids=lambda kind: kind.__name__)
def test_a_configuration_of_an_older_version_loads(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_FILES[kind]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is kind.config_class
    model = kind(config).eval()
    assert model(inputs(model)).logits.isfinite().all()


# Values


@each_class
@pytest.mark.parametrize(("change", "message"), [
    ({"num_labels": "ten"}, "num_labels must be an integer ≥ 1"), ({"num_labels": -1}, "num_labels must be"),
    ({"id2label": ["a"]}, "id2label must be None or a dictionary"), ({"id2label": {"cat": 0}}, "id2label must be"),
    ({"problem_type": "several"}, "problem_type must be None or one of regression"), ({"dtype": "load"}, "dtype must be one of torch's"),
    ({"torch_dtype": "float33"}, "dtype must be one of torch's"), ({"output_attentions": "yes"}, "output_attentions must be True or False"),
    ({"output_hidden_states": 1}, "output_hidden_states must be"), ({"return_dict": 0}, "return_dict must be"),
    ({"layer_norm_eps": -1e-5}, "layer_norm_eps must be a number > 0"), ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be"),
    ({"sigma": float("nan")}, "sigma must be"), ({"dropout": float("nan")}, r"dropout must be in \[0, 1\)"),
    ({"dropout": "0.1"}, "dropout must be"),
])
def test_common_values_that_cannot_be_are_named(kind, settings, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kind.config_class(**settings | change)
    with pytest.raises(ValueError, match=message):
        kind.config_class.from_dict(dict(settings), **change)
    config = kind.config_class(**settings)
    with pytest.raises(ValueError, match=message):
        config.update(change)
    assert config.to_dict() == kind.config_class(**settings).to_dict()


@pytest.mark.parametrize("kind", [VisionTransformer, ImageTransformer, LanguageModel])
@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 0}, "hidden_size must be an integer ≥ 1"), ({"num_hidden_layers": 1.5}, "num_hidden_layers must be an integer"),
    ({"num_attention_heads": True}, "num_attention_heads must be an integer"), ({"intermediate_size": -4}, "intermediate_size must be"),
    ({"hidden_size": 10, "num_attention_heads": 4}, "num_attention_heads must divide hidden_size = 10, got 4"),
    ({"layer_norm_eps": 0}, "layer_norm_eps must be a number > 0"), ({"initializer_range": "0.02"}, "initializer_range must be"),
])
def test_sizes_that_no_transformer_can_have_are_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind.config_class(**change)


@each_class
def test_values_are_checked_again_when_a_model_is_built_or_loaded(kind, settings, tmp_path):
    model = build(kind, settings)
    model.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path, dropout=0.5).config.dropout == 0.5
    for way in (kind.from_pretrained, auto(kind).from_pretrained, kind.config_class.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="dropout must be in"):
            way(tmp_path, dropout=1.5)
    model.config.dropout = 1.5
    with pytest.raises(ValueError, match="dropout must be in"):
        kind(model.config)


@each_class
def test_numpys_numbers_are_saved_as_numbers(kind, settings, tmp_path):
    def numpys(value):
        if isinstance(value, tuple):
            return tuple(map(numpys, value))
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    config = kind.config_class(**{name: numpys(value) for name, value in settings.items()})
    config.save_pretrained(tmp_path)
    assert kind.config_class.from_pretrained(tmp_path).to_dict() == kind.config_class(**settings).to_dict()


# Flags


@each_case
def test_flags_of_the_configuration_and_of_the_call(kind, settings, tmp_path):
    model, linear = build(kind, settings), settings.get("attention") == "linear"
    x = inputs(model)
    model.save_pretrained(tmp_path)
    states = kind.from_pretrained(tmp_path, output_hidden_states=True)
    with torch.no_grad():
        plain, full = model(x), states(x)
        assert plain.hidden_states is None and plain.attentions is None and model(x, return_dict=None).logits.equal(plain.logits)
        assert full.logits.equal(plain.logits) and states(x, output_hidden_states=False).hidden_states is None
        blocks = sum(settings["depths"]) if kind is SwinClassifier else 1
        assert len(full.hidden_states) == 1 + blocks and all(one.equal(two) for one, two in zip(
            full.hidden_states, model(x, output_hidden_states=True).hidden_states, strict=True))
        assert type(kind.from_pretrained(tmp_path, return_dict=False)(x)) is tuple is type(model(x, return_dict=False))
        weighing = auto(kind).from_pretrained(tmp_path, output_attentions=True)
        if linear:
            for call in (lambda: weighing(x), lambda: model(x, output_attentions=True)):
                with pytest.raises(ValueError, match="output_attentions must be False for linear attention"):
                    call()
            return
        output = weighing(x)
        assert_close(output.logits, plain.logits, rtol=0, atol=1e-5)
        assert len(output.attentions) == blocks == len(model(x, output_attentions=True).attentions)
        for weights in output.attentions:
            assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        model.config.output_attentions = True
        model.save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path)(x).attentions is not None


# Graphs and tensors without values


@pytest.mark.parametrize("name", ["kswin", "karm with start", "larm"])  # of a KViT, onnx is made below
def test_exported_with_a_dynamic_batch_by_a_model_that_never_ran(name):
    "And what is remembered for the next eager model of this shape are tensors with values."
    kind, settings = CASES[name]
    sizes = {"image_shape": (3, 7, 1)} if kind is ImageTransformer else {"image_size": 12}  # of no other test: nothing is remembered yet
    model = build(kind, settings | sizes)
    x = inputs(model, 2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = inputs(model, 5, seed=2)
    for fresh in (model, build(kind, settings | sizes)):
        logits = fresh(other).logits
        assert type(logits) is torch.Tensor
        logits.sum().backward()
        assert all(type(p.grad) is torch.Tensor and p.grad.isfinite().all() for p in fresh.parameters() if p.grad is not None)
    assert_close(program.module()(other).logits, logits.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["kvit", "kswin", "karm with start"])
def test_compiled_into_one_graph_with_its_loss(name):
    kind, settings = CASES[name]
    model = build(kind, settings)
    x = inputs(model, 3)
    mask = {"attention_mask": torch.ones_like(x)} if kind is ImageTransformer else {}
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(x, labels=targets(model, x), **mask)
    found.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    wanted = model(x, labels=targets(model, x))
    wanted.loss.backward()
    assert_close(found.logits, wanted.logits, rtol=0, atol=1e-6)
    for n, p in model.named_parameters():
        assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["krause", "linear"])
def test_steps_through_a_cache_compile_into_one_graph(attention):
    model = build(ImageTransformer, PIXELS | {"attention": attention, "hidden_size": 32})  # heads that the C++ step takes
    x, cache = inputs(model, 3), None
    torch.compiler.reset()
    step, parts = torch.compile(model, fullgraph=True, backend="eager"), []
    with torch.no_grad():
        for part in x.split([19, 1], 1):
            output = step(part, past_key_values=cache, use_cache=True)
            cache = output[1]
            parts.append(output.logits)
        assert_close(torch.cat(parts, 1), model(x).logits, rtol=0, atol=1e-5)


def test_padding_is_refused_inside_a_graph_as_well():
    model = build(ImageTransformer, PIXELS | {"attention": "softmax"})
    x = inputs(model)
    program = torch.export.export(model, (x,), {"attention_mask": torch.ones_like(x)}).module()
    assert program(x, attention_mask=torch.ones_like(x)).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="attention_mask must be all ones"):
        program(x, attention_mask=torch.zeros_like(x))


@each_case
def test_on_the_meta_device_and_filled_later(kind, settings):
    real = build(kind, settings)
    x = inputs(real)
    expected = real(x)
    with torch.device("meta"):
        model = kind(kind.config_class(**settings)).eval()
        output = model(x.to("meta"), labels=targets(model, x).to("meta"))
    assert output.logits.is_meta and output.loss.is_meta and output.logits.shape == expected.logits.shape
    for started in (model, real):  # a model without values, and one that had some
        started.to_empty(device="cpu")
        for tensor in (*started.parameters(), *started.buffers()):
            tensor.data.fill_(100)
        torch.manual_seed(0)
        started.init_weights()
        state = started.state_dict()
        for name, tensor in build(kind, settings).state_dict().items():
            assert not (state[name] == 100).any() and state[name].float().abs().max() <= 1.5 * tensor.abs().max() + 0.1, name
            if name.endswith(("index", "log_sigma")):
                assert state[name].equal(tensor)
        assert started(x).logits.isfinite().all()


# Weights


class Malice:
    "Writes a file when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@each_class
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", "a.ckpt"])
def test_a_pickle_is_refused_by_us_and_never_opened(kind, settings, name, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    build(kind, settings).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"head.weight": Malice(mark)}))
    for way in (kind.from_pretrained, auto(kind).from_pretrained):
        with pytest.raises(ValueError, match=rf"model has pickled weights, {name}, which could run code and are not read") as error:
            way(folder)
        assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        kind.from_pretrained(folder, use_safetensors=False)
    assert not mark.exists()


def test_missing_and_damaged_weights_are_named(tmp_path):
    model = build(*CLASSES["vit"])
    model.save_pretrained(tmp_path)
    weights, whole = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    for damage in (whole[:len(whole) // 2], b"", whole[:7], pickle.dumps({"a": 1})):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            VisionTransformer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights: there is no \.safetensors file"):
        VisionTransformer.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in ((json.dumps({"weight_map": {"head.weight": "part.bin"}}), "has pickled weights, part.bin"),
                          ("[]", "index.json is not an index"), ("{", "index.json is not an index")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            VisionTransformer.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"head.weight": weights.name, "head.bias": "part-2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"part-2\.safetensors is missing, which the index of the weights lists"):
        VisionTransformer.from_pretrained(tmp_path)
    index.unlink()
    (tmp_path / "optimizer.pt").write_bytes(b"")  # beside whole weights, a trainer's files do not matter
    assert VisionTransformer.from_pretrained(tmp_path).head.weight.equal(model.head.weight)
    assert VisionTransformer.from_pretrained(None, config=model.config, state_dict=model.state_dict()).head.weight.equal(model.head.weight)
    assert check_weights("a name on the hub") is None


@each_class
def test_a_model_in_several_files_loads(kind, settings, tmp_path):
    model = build(kind, settings)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = kind.from_pretrained(tmp_path)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


@each_class
def test_every_tensor_that_a_file_lacks_is_made_as_at_the_start(kind, settings, tmp_path):
    "Parameters and buffers one by one: what the file lacks is made, what it holds is kept."
    model = build(kind, settings | {"learn_sigma": False} if kind is not ImageTransformer else settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(10)
    model.save_pretrained(tmp_path)
    state, start = load_file(tmp_path / "model.safetensors"), build(kind, settings).state_dict()
    for lacking in {name.split(".", 3)[-1]: name for name in state}.values():  # of those that several blocks have, one
        save_file({name: tensor for name, tensor in state.items() if name != lacking}, tmp_path / "model.safetensors", {"format": "pt"})
        again = kind.from_pretrained(tmp_path).state_dict()
        assert all(again[name].equal(tensor) for name, tensor in state.items() if name != lacking)
        assert again[lacking].isfinite().all() and again[lacking].float().abs().max() < max(5, 1.5 * start[lacking].abs().max()), lacking
        if lacking.endswith(("index", "log_sigma")):
            assert again[lacking].equal(start[lacking])


def test_a_subclass_without_checks_of_its_own():
    class Plain(CheckedConfig):
        model_type = "plain"
        width: int = 3

    assert Plain.settings() == ["width"] and Plain(width=4).width == 4 and Plain(num_labels=None).num_labels == 2


# Image models


IMAGES = {name: CASES[name] for name in ("kvit", "kswin")}
each_image_model = pytest.mark.parametrize(("kind", "settings"), IMAGES.values(), ids=IMAGES)


@each_image_model
@pytest.mark.parametrize("channels", [3, 1])
def test_a_pipeline_needs_the_folder_alone(kind, settings, channels, tmp_path):
    "Grey images keep their levels exactly."
    statistics = {"num_channels": channels, "image_mean": [0.4] * channels, "image_std": [0.2] * channels}
    model = build(kind, settings | statistics)
    side = model.config.image_size
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert f"import {kind.__name__}" in (tmp_path / "README.md").read_text()
    level = torch.randint(256, (channels, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(level.expand(3, -1, -1).permute(1, 2, 0).numpy())
    pixels = (level / 255 - 0.4).unsqueeze(0) / 0.2
    assert_close(AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values, pixels)
    found = {each["label"]: each["score"] for each in pipeline("image-classification", str(tmp_path))(image, top_k=5)}
    wanted = model(pixels).logits.softmax(-1)[0]
    assert_close(torch.tensor([found[f"LABEL_{n}"] for n in range(5)]), wanted, rtol=0, atol=1e-6)


def test_colours_become_grey_and_a_processor_of_the_users_stays(tmp_path):
    model = build(VisionTransformer, VIT | {"num_channels": 1})
    model.save_pretrained(tmp_path)
    colours = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = AutoImageProcessor.from_pretrained(tmp_path)(colours, do_rescale=False, return_tensors="pt").pixel_values
    assert_close(found[0], rgb_to_grayscale(colours))
    (tmp_path / "preprocessor_config.json").write_text("the user's")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == "the user's"
    build(VisionTransformer, VIT | {"num_channels": 2}).save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two" / "preprocessor_config.json").exists()


@each_image_model
def test_auto_model_is_the_model_without_its_head(kind, settings, tmp_path):
    model = build(kind, settings)
    x = inputs(model)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert not hasattr(base, "head") and base.get_input_embeddings() is next(m for m in base.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        output, states = base(x, output_hidden_states=True), model(x, output_hidden_states=True).hidden_states
        assert_close(model.head(output.pooler_output), model(x).logits, rtol=0, atol=1e-6)
        assert_close(output.last_hidden_state, model.norm(states[-1]), rtol=0, atol=1e-6)
        assert all(map(torch.equal, output.hidden_states, states)) and isinstance(base(x, return_dict=False), tuple)
    base.save_pretrained(tmp_path / "base")
    again = kind.from_pretrained(tmp_path / "base", num_labels=3)
    assert again.head.out_features == 3 and again.norm.weight.equal(model.norm.weight)


@each_image_model
def test_checkpointing_changes_no_gradient(kind, settings):
    gradients = []
    for checkpointing in (False, True):
        model = build(kind, settings).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert sum(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == sum(settings.get("depths", [1]))
        x = inputs(model)
        model(x, labels=targets(model, x), output_attentions=True).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@each_image_model
def test_parts_of_a_batch_add_up(kind, settings):
    "With the number of all labels, as Trainer counts them, the losses of unequal parts sum to the loss of the whole batch."
    model = build(kind, settings)
    x = inputs(model, 3)
    classes, shares = torch.tensor([1, -100, 4]), torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for problem, labels in ((None, classes), (None, shares / shares.sum(1, keepdim=True)), ("regression", shares),
                            ("multi_label_classification", shares.round())):
        model.config.problem_type = problem
        items = labels.ne(-100).sum()
        parts = [model(x[part], labels=labels[part], num_items_in_batch=items).loss for part in (slice(2), slice(2, 3))]
        assert_close(sum(parts), model(x, labels=labels).loss)
        assert_close(model(x, labels=labels, num_items_in_batch=items.item()).loss, sum(parts))
    model.loss_function = lambda labels, logits, config, num_items_in_batch: logits.sum()
    assert model(x, labels=classes).loss.equal(model(x).logits.sum())


@each_image_model
def test_float32_pixels_enter_a_model_in_half_precision(kind, settings):
    model = build(kind, settings)
    x, exact = inputs(model), model(inputs(model)).logits
    half = model.bfloat16()(x).logits
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.05
    assert_close(model.double()(x).logits.float(), build(kind, settings).bfloat16().double()(x.double()).logits.float())


@each_image_model
def test_a_model_on_several_devices(kind, settings, tmp_path):
    model = build(kind, settings)
    x = inputs(model)
    model.save_pretrained(tmp_path)
    places = {name.split(".")[0]: "cpu" for name, _ in model.named_parameters()} | {"norm": "disk"}
    for device_map in ("auto", places):
        again = auto(kind).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
        assert again(x).logits.equal(model(x).logits)


@pytest.mark.parametrize("name", ["kvit", "vit", "kswin"])
def test_gradients_of_each_image(name):
    kind, settings = CASES[name]
    model = build(kind, settings)
    x = inputs(model, 3)
    y, weights = targets(model, x), dict(model.named_parameters())

    def loss(weights, x, y):
        return torch.func.functional_call(model, weights, (x[None],), {"labels": y[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    for n in range(3):
        wanted = torch.autograd.grad(loss(weights, x[n], y[n]), weights.values())
        for (parameter, gradients), grad in zip(found.items(), wanted, strict=True):
            assert_close(gradients[n], grad, rtol=1e-4, atol=1e-6, msg=lambda text, parameter=parameter: f"{parameter}: {text}")


def test_onnx_gets_standard_operators_alone(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model = build(*CASES["kswin"])
    program = torch.export.export(model, (inputs(model),))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(call.startswith("krause_repro") for call in calls) and not {"aten.fmin.default", "aten.fmax.default"} & calls
    x = inputs(model, seed=3)
    assert_close(program.module()(x).logits, model(x).logits, rtol=0, atol=1e-6)
    with pytest.raises((AssertionError, RuntimeError), match="pixel_values"):  # a program is of one size
        program.module()(x[..., :-2])


def test_a_loss_is_as_precise_as_its_logits():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    exact = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert_close(token_loss(logits, targets), exact, rtol=0, atol=1e-15)
    half = logits.bfloat16()
    assert_close(token_loss(half, targets), token_loss(half.float(), targets), rtol=0, atol=0)
    for name in ("karm", "arm"):
        model = build(*CASES[name]).double()
        tokens = inputs(model)
        assert model(tokens, labels=tokens).loss.dtype == torch.float64


def test_onnxruntime_gives_the_logits_at_any_batch(tmp_path):
    model = build(*CASES["kvit"])
    path, names = tmp_path / "kvit.onnx", {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(model, (inputs(model),), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},), **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = inputs(model, batch, seed=3)
        assert_close(torch.from_numpy(session.run(["logits"], {"pixel_values": x.numpy()})[0]), model(x).logits, rtol=0, atol=1e-5)
    with pytest.raises(Exception, match="pixel_values"):
        session.run(["logits"], {"pixel_values": inputs(model)[..., :-2].numpy()})


def test_a_pixel_classifier_is_an_image_model(tmp_path):
    model = PixelClassifier(PixelClassifier.config_class(image_size=(4, 6), stages=(8,), num_labels=5, image_mean=[0.5] * 3,
                                                         image_std=[0.5] * 3)).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 4, 6)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).bfloat16()(x).logits.shape == (2, 5)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["width"] == 6
    assert_close(model(x, labels=F.one_hot(torch.tensor([1, 2]), 5).float()).loss, model(x, labels=torch.tensor([1, 2])).loss)
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, 4, 6\), got \(2, 3, 6, 4\)$"):
        model(x.mT)
    with pytest.raises(TypeError, match="takes no 'stage'"):
        PixelClassifier.config_class(stage=(8,))
