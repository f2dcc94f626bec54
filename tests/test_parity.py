"""The authors' modules and ours give the same numbers, and a checkpoint that does not fit is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from cases import over
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchvision.models import SwinTransformer as TorchvisionSwin

from krause_repro.attention import krause_attention, krause_attention_weights
from krause_repro.author_checkpoints import KINDS, load_author_checkpoint
from krause_repro.reference import CausalWindow, attention_weights
from krause_repro.swin import SwinClassifier, SwinClassifierConfig
from krause_repro.vision_transformer import vision_neighborhood

FOLDER = Path(__file__).parent / "parity"
VISION = [kind for kind in KINDS if "vit" in kind]
WINDOWS = [kind for kind in KINDS if kind.startswith("kswin_attention")]
SWIN = {"img_size": 16, "patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5,
        "window_size": [4, 4]}


def parity(kind):
    "Path, tensors and constructor arguments of a parity file."
    path = FOLDER / f"{kind}.safetensors"
    with safe_open(path, "pt") as file:
        return path, load_file(path), json.loads(file.metadata()["config"])


def author_state(tensors, prefix=""):
    "The state dict inside a parity file."
    return {prefix + name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_functional_causal_band(implementation):
    _, tensors, config = parity("functional_causal_band")
    query, key, value, sigma = (tensors[name] for name in ("query", "key", "value", "sigma"))
    assert sigma.shape == (query.shape[1],)
    window, k = CausalWindow(config["window_size"]), config["top_k"]
    output = krause_attention(query, key, value, sigma, window, k, implementation=implementation)
    assert_close(output, tensors["output"], rtol=0, atol=1e-10)
    assert_close(krause_attention_weights(query, key, sigma, window, k), tensors["weights"], rtol=0, atol=1e-10)
    assert_close(attention_weights(query, key, window, k, sigma=sigma), tensors["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("given", ["path", "str", "dict", "module.", "file with module."])
@pytest.mark.parametrize("kind", VISION)
def test_module_gives_the_authors_numbers(kind, given, tmp_path):
    path, tensors, config = parity(kind)
    if given == "file with module.":
        path = tmp_path / "author.safetensors"
        save_file(author_state(tensors, "module."), path)
    sources = {"str": str(path), "dict": author_state(tensors), "module.": author_state(tensors, "module.")}
    model = load_author_checkpoint(kind, sources.get(given, path), **config)
    assert not model.training
    with torch.no_grad():
        plain, output = model(tensors["input"]), model(tensors["input"], output_attentions=True)
    assert plain.attentions is None and len(output.attentions) == config["n_layers"]
    for logits in (plain.logits, output.logits):
        assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    for name, layer in (("attention_layer0", 0), ("attention_last", -1)):
        if name in tensors:
            assert_close(output.attentions[layer], tensors[name], rtol=0, atol=1e-5)
    assert ("attention_last" in tensors) == kind.startswith("kvit")


def test_every_kind_of_one_module_has_a_parity_file():
    files = {path.stem for path in FOLDER.glob("*.safetensors")}
    assert files == {*KINDS, "functional_causal_band"} - {"kswin", "swin_baseline"} and len(VISION) == len(WINDOWS) == 3


@pytest.mark.parametrize("prefix", [None, "module."])
@pytest.mark.parametrize("kind", ["krause_llama_attention", "krause_lm_attention"])
def test_language_attention_gives_the_authors_numbers(kind, prefix):
    path, tensors, config = parity(kind)
    attention = load_author_checkpoint(kind, path if prefix is None else author_state(tensors, prefix), **config)
    assert not attention.training
    with torch.no_grad():
        output = attention(tensors["input"], output_attentions=True)
        assert_close(attention(tensors["input"]), tensors["output"], rtol=0, atol=1e-5)
        assert_close(output.logits, tensors["output"], rtol=0, atol=1e-5)
        if "standard_branch_weights" in tensors:
            assert_close(output.attentions[0], tensors["standard_branch_weights"], rtol=0, atol=1e-5)
        # the settings are what the numbers need
        for wrong in ({"window_size": 7}, {"top_k": 3}):
            other = load_author_checkpoint(kind, path, **{**config, **wrong})
            assert not torch.allclose(other(tensors["input"]), tensors["output"], atol=1e-5)


def test_a_language_attention_without_biases_loads_with_zeros():
    path, tensors, config = parity("krause_llama_attention")
    state = author_state(tensors)
    zeros = {name: torch.zeros_like(t) if name.endswith("_proj.bias") or name.endswith("_proj_krause.bias") and "gate" not in name else t
             for name, t in state.items()}
    without = {name: t for name, t in state.items() if zeros[name] is t}
    assert len(without) == len(state) - 6
    with torch.no_grad():
        a, b = (load_author_checkpoint("krause_llama_attention", s, **config)(tensors["input"]) for s in (zeros, without))
    assert torch.equal(a, b)


@over("prefix", [None, "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@over("kind", WINDOWS)
def test_window_attention_gives_the_authors_numbers(kind, prefix):
    path, tensors, config = parity(kind)
    attention = load_author_checkpoint(kind, path if prefix is None else author_state(tensors, prefix), **config)
    assert not attention.training and attention.sigma.shape == (config["num_heads"],)
    with torch.no_grad():
        assert_close(attention(tensors["input"]), tensors["output"], rtol=0, atol=1e-5)
        # the settings are what the numbers need: without the shift, or with padding, they are others
        attention.shift_size, attention.pad_small_maps = [2 - config["shift_size"]] * 2, True
        assert not torch.allclose(attention(tensors["input"]), tensors["output"], atol=1e-3)


def author_swin(score="krause"):
    "The state dict of a small Swin as the authors write it: torchvision's names, the index of positions as a matrix."
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "num_labels": 5}
    model = SwinClassifier(SwinClassifierConfig(attention_score=score, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, {name: t.view(16, 16) if name.endswith("position_index") else t for name, t in model.state_dict().items()}


@over("prefix", ["", "state.", "module.", "state._orig_mod.", "_orig_mod.module."])
@over(("kind", "score"), [("kswin", "krause"), ("swin_baseline", "softmax")])
def test_whole_swin_loads_by_torchvisions_names(kind, score, prefix):
    model, state = author_swin(score)
    pixels = torch.randn(2, 3, 16, 16)
    loaded = load_author_checkpoint(kind, {prefix + name: tensor for name, tensor in state.items()}, **SWIN)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_a_torchvision_swin_is_the_baseline():
    torch.manual_seed(0)
    other = TorchvisionSwin([2, 2], 8, [2, 2], [2, 4], [4, 4], num_classes=5).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert_close(load_author_checkpoint("swin_baseline", other.state_dict(), **SWIN)(pixels).logits, other(pixels), rtol=0, atol=1e-6)


@over(
    ("kind", "change", "message"),
    [
        ("swin_baseline", {}, "not in this model: features.1.0.attn.log_sigma.*and 1 more"),
        ("kswin", {"depths": [2, 4]}, "missing features.3.2.norm1.weight.*more$"),
        ("kswin", {"depths": [2, 1]}, "not in this model: features.3.1"),
        ("kswin", {"window_size": 2}, r"relative_position_bias_table is \(49, 2\), needed \(9, 2\)"),
        ("kswin", {"num_heads": [4, 4]}, r"features.1.0.attn.log_sigma is \(2,\), needed \(4,\)"),
        ("kswin", {"num_classes": 7}, r"head.weight is \(5, 16\), needed \(7, 16\)"),
        ("kswin", {"num_heads": [3, 4]}, "num_heads must divide the width 8, got 3"),
        ("kswin", {"window_size": [4, 2]}, r"window_size must be one number or two equal numbers, got \[4, 2\]"),
        ("kswin", {"img_size": 15}, "image_size must be a multiple of patch_size"),
        ("kswin", {"top_k": 4}, "config does not fit kind 'kswin'.*top_k"),
    ],
)
def test_another_swin_is_refused_by_name(kind, change, message):
    with pytest.raises(ValueError, match=message):
        load_author_checkpoint(kind, author_swin()[1], **SWIN | change)


def test_missing_left_over_and_misshapen_tensors_are_all_named():
    state = author_swin()[1]
    del state["norm.bias"]
    state |= {"gate": torch.zeros(1), "head.weight": torch.zeros(2, 16)}
    with pytest.raises(ValueError, match=r"missing norm.bias; not in this model: gate; head.weight is \(2, 16\), needed \(5, 16\)$"):
        load_author_checkpoint("kswin", state, **SWIN)
    with pytest.raises(ValueError, match="does not fit kind 'kswin'.*missing features.*not in this model: blocks.*needed.*more$"):
        load_author_checkpoint("kswin", parity("kvit_5x5")[0], **SWIN)


def test_an_index_of_other_positions_is_refused():
    state = author_swin()[1]
    state["features.1.0.attn.relative_position_index"] = state["features.1.0.attn.relative_position_index"].T
    with pytest.raises(ValueError, match="features.1.0.attn.relative_position_index is not this model's$"):
        load_author_checkpoint("kswin", state, **SWIN)


@pytest.mark.parametrize("kind", ["kvit_4neighbour", "kvit_5x5"])
def test_authors_mask_is_our_neighbourhood(kind):
    path, tensors, config = parity(kind)
    model = load_author_checkpoint(kind, path, **config)
    mask = vision_neighborhood(model.config).mask(tensors["attention_last"].shape[-1])
    for layer in range(config["n_layers"]):
        assert torch.equal(tensors[f"state.blocks.{layer}.attention.local_mask_buffer"], mask)


@pytest.mark.parametrize("kind", VISION)
def test_loaded_weights_are_saved_and_found_again(kind, tmp_path):
    path, tensors, config = parity(kind)
    model = load_author_checkpoint(kind, path, **config)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tensors["input"]).logits, model(tensors["input"]).logits)


def test_the_given_state_dict_is_not_changed():
    _, tensors, config = parity("vit_baseline")
    state = author_state(tensors, "module.")
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = load_author_checkpoint("vit_baseline", state, **config)
    with torch.no_grad():
        model.head.weight.zero_()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match="kind must be one of kvit_4neighbour, .*got 'karn'"):
        load_author_checkpoint("karn", {})


@over(
    ("kind", "change", "message"),
    [
        ("kvit_4neighbour", {"window_size": 3}, "config does not fit kind 'kvit_4neighbour'.*window_size"),
        ("vit_baseline", {"top_k": 2}, "config does not fit kind 'vit_baseline'.*top_k"),
        ("kvit_4neighbour", {"n_layers": 4}, "missing blocks.3"),
        ("kvit_4neighbour", {"n_layers": 2}, "not in this model: blocks.2"),
        ("kvit_5x5", {"num_classes": 10}, r"head.weight is \(12, 32\), needed \(10, 32\)"),
        ("kvit_5x5", {"img_size": 16}, r"position_embedding is \(1, 65, 32\), needed \(1, 17, 32\)"),
        ("vit_baseline", {"d_model": 64}, r"patch_embedding.weight is .*and \d+ more"),
        ("kvit_4neighbour", {"n_heads": 3}, "num_attention_heads must divide"),
        ("kvit_4neighbour", {"patch_size": 5}, "image_size must be a multiple of patch_size"),
        ("kvit_4neighbour", {"sigma": 0.0}, "sigma must be"),
        ("kvit_4neighbour", {"top_k": 0}, "top_k must be"),
        ("kvit_4neighbour", {"top_k": None}, "top_k must be an integer ≥ 1, got None"),
        ("karm", {"d_model": None}, "d_model must be an integer ≥ 1, got None"),
        ("kswin_attention_plain", {"window_size": [[2], [2]]}, "window_size must be one number or two equal numbers"),
        ("kswin_attention_plain", {"shift_size": []}, "shift_size must be one number or two"),
        *(("krause_llama_attention", {name: value}, f"{name} must be") for name, value in (
            ("hidden_size", 0), ("hidden_size", "a"), ("head_dim", -2), ("head_dim", 3), ("num_key_value_heads", -1), ("top_k", None),
            ("window_size", [4]), ("init_sigma", 0), ("rope_theta", 0), ("rope_theta", -1.0), ("attn_dropout", 2.0))),
        ("krause_llama_attention", {"hidden_size": 15}, "num_attention_heads must divide hidden_size = 15"),
        ("krause_llama_attention", {"num_key_value_heads": 3}, "be a multiple of num_key_value_heads = 3"),
        ("krause_lm_attention", {"num_heads": 3}, "num_heads must divide hidden_size"),
    ],
)
def test_wrong_config_is_named(kind, change, message):
    path, _, config = parity(kind)
    with pytest.raises(ValueError, match=message):
        load_author_checkpoint(kind, path, **config | change)


def test_missing_and_extra_tensors_are_named():
    _, tensors, config = parity("kvit_4neighbour")
    state = author_state(tensors)
    lacking = {name: tensor for name, tensor in state.items() if name != "blocks.1.attention.log_sigma"}
    with pytest.raises(ValueError, match="missing blocks.1.attention.log_sigma"):
        load_author_checkpoint("kvit_4neighbour", lacking, **config)
    with pytest.raises(ValueError, match="not in this model: blocks.0.attention.gate"):
        load_author_checkpoint("kvit_4neighbour", state | {"blocks.0.attention.gate": torch.zeros(1)}, **config)
    with pytest.raises(ValueError, match="missing"):
        load_author_checkpoint("kvit_4neighbour", {}, **config)


@pytest.mark.parametrize(("kind", "other"), [("kvit_4neighbour", "vit_baseline"), ("vit_baseline", "kvit_4neighbour")])
def test_the_weights_of_another_family_are_refused(kind, other):
    _, tensors, _ = parity(other)
    config = {key: value for key, value in parity(kind)[2].items()}
    with pytest.raises(ValueError, match=f"does not fit kind '{kind}'.*missing"):
        load_author_checkpoint(kind, author_state(tensors), **config)


@pytest.mark.parametrize(("kind", "other"), [("kvit_4neighbour", "kvit_5x5"), ("kvit_5x5", "kvit_4neighbour")])
def test_the_weights_of_another_neighbourhood_are_refused(kind, other):
    "Both kinds have the same parameters; only the stored masks tell them apart."
    path, _, config = parity(other)
    with pytest.raises(ValueError, match="local_mask_buffer"):
        load_author_checkpoint(kind, path, **config)


class Malice:
    "Writes a file when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "author.pt", "author.ckpt", "author", "disguised.safetensors"])
def test_a_pickle_is_never_opened(name, tmp_path):
    mark, file = tmp_path / "mark", tmp_path / name
    torch.save({"head.weight": Malice(mark)}, file)
    told = rf"{re.escape(name)}(; pickled checkpoints are not read$| is not a whole safetensors file)"
    with pytest.raises(ValueError, match=told) as error:
        load_author_checkpoint("vit_baseline", file)
    assert "weights_only" not in str(error.value) and not mark.exists()


@over("kind", KINDS)
def test_a_state_of_odd_shapes_is_refused_by_name(kind):
    if kind in ("kswin", "swin_baseline"):
        state, config = author_swin("krause" if kind == "kswin" else "softmax")[1], SWIN
    else:
        _, tensors, config = parity(kind)
        state = author_state(tensors)
    for odd in (torch.zeros(()), torch.zeros(2, 2, 2), torch.zeros(0)):
        with pytest.raises(ValueError, match=f"the checkpoint does not fit kind '{kind}'|is not the neighbourhood of kind '{kind}'"):
            load_author_checkpoint(kind, {name: odd for name in state}, **config)
    integers = {name: t.long() if t.is_floating_point() else t for name, t in state.items()}
    with pytest.raises(ValueError, match=f"the checkpoint does not fit kind '{kind}' .* is of torch.int64, needed torch.float32"):
        load_author_checkpoint(kind, integers, **config)


@pytest.mark.parametrize(("state", "message"), [
    ({"head.weight": 3}, "must map names to tensors, got int under 'head.weight'"), ({3: torch.zeros(1)}, "got Tensor under 3"),
    ([torch.zeros(1)], "state_dict_or_path must be a dict or a .safetensors file"), (None, "must be a dict or a .safetensors file"),
])
def test_what_is_no_state_dict_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        load_author_checkpoint("vit_baseline", state)


@pytest.mark.parametrize("kind", ["karm", "kswin", "kvit_5x5", "krause_lm_attention", "kswin_attention_plain"])
def test_an_unknown_argument_is_told_the_nearest(kind):
    told = f"config does not fit kind '{kind}': its constructor takes no 'sigm'; the nearest name is '(init_)?sigma'"
    with pytest.raises(ValueError, match=told):
        load_author_checkpoint(kind, {}, sigm=1.0)
    with pytest.raises(ValueError, match="kind must be one of"):
        load_author_checkpoint([kind], {})


def test_a_truncated_file_is_named(tmp_path):
    file = tmp_path / "author.safetensors"
    file.write_bytes(parity("kvit_5x5")[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match="author.safetensors is not a whole safetensors file"):
        load_author_checkpoint("kvit_5x5", file)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_author_checkpoint("vit_baseline", tmp_path / "nowhere.safetensors")
    pickled = tmp_path / "author.pth"
    torch.save({}, pickled)
    with pytest.raises(ValueError, match="author.pth.*pickled"):
        load_author_checkpoint("vit_baseline", pickled)
