"""Any format to any other: codes are copied unchanged, floating point equals dequantized codes, options are checked."""

import json

import numpy as np
import pytest
import torch
from helpers.making import llama, mixtral, qwen3_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantize8 import OutputError, WeightError, convert, verify
from quantize8.formats import FORMATS
from quantize8.formats.base import make_format
from quantize8.formats.bitsandbytes import BitsAndBytes
from quantize8.kernels import reference
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import LINEAR, Structure

IDS = torch.arange(2, 42)[None]


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gguf"])  # that is in test_gguf_format.py
def test_each_format_makes_a_folder_that_verifies(name, tmp_path):
    source = llama(tmp_path / "source")
    result = convert(str(source), tmp_path / "out", format=name)
    assert result.manifest.format == name
    assert verify(tmp_path / "out").tensors == len(tensors(tmp_path / "out"))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_bitsandbytes_to_compressed_tensors_and_back_changes_no_byte_of_a_tensor(scheme, smollm2_int8, tmp_path):
    convert(str(smollm2_int8), tmp_path / "ct", format="compressed-tensors", scheme=scheme)
    convert(str(tmp_path / "ct"), tmp_path / "back")
    assert (smollm2_int8 / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (smollm2_int8, tmp_path / "back")]
    assert configs[0] == configs[1]


def test_an_output_head_that_is_int8_already_keeps_its_codes(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "all", recipe="int8-all")
    convert(str(tmp_path / "all"), tmp_path / "ct", format="compressed-tensors")
    convert(str(tmp_path / "ct"), tmp_path / "back")
    assert tensors(tmp_path / "ct")["lm_head.weight"].dtype == torch.int8
    assert equal(tensors(tmp_path / "all"), tensors(tmp_path / "back"))


@pytest.mark.parametrize("first", ["bitsandbytes", "compressed-tensors"])
def test_dequantizing_gives_the_dtype_asked_for_and_the_values_of_the_codes(first, tmp_path):
    source = llama(tmp_path / "source", dtype=torch.bfloat16)
    convert(str(source), tmp_path / "int8", format=first)
    original = tensors(source)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        result = convert(str(tmp_path / "int8"), tmp_path / name, format=name)
        got = tensors(tmp_path / name)
        assert got.keys() == original.keys() and {value.dtype for value in got.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        for key, value in original.items():
            if "_proj" in key:
                value = torch.from_numpy(reference.dequantize(*reference.quantize_rowwise(value.float().numpy())))
            assert torch.equal(got[key], value.to(dtype)), key
        assert result.plan.modules == {} and result.manifest.kept == {}


def test_a_tensor_that_the_model_stores_wider_than_the_rest_stays_as_it_is(tmp_path):
    """Such as DeepSeek's routing bias in float32, in a model of bfloat16."""

    def edit(state):
        state["model.norm.weight"] = state["model.norm.weight"].float()

    source = llama(tmp_path / "source", dtype=torch.bfloat16, edit=edit)
    convert(str(source), tmp_path / "out", format="float16")
    got = tensors(tmp_path / "out")
    assert got.pop("model.norm.weight").dtype == torch.float32
    assert {value.dtype for value in got.values()} == {torch.float16}


def test_what_float16_cannot_hold_is_an_error_that_names_the_row(tmp_path):
    def edit(state):
        state["model.layers.1.mlp.up_proj.weight"][7, 3] = 70000.0

    source = llama(tmp_path / "source", dtype=torch.float32, edit=edit)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight row 7 .* too large for F16"):
        convert(str(source), tmp_path / "out", format="float16")
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", format="bfloat16", overwrite=True)


def test_conv1d_comes_back_as_it_was_stored(mgm, tmp_path):
    convert(str(mgm), tmp_path / "int8")
    convert(str(tmp_path / "int8"), tmp_path / "float", format="float32")
    convert(str(tmp_path / "float"), tmp_path / "again")
    assert equal(tensors(tmp_path / "int8"), tensors(tmp_path / "again"))
    original, ours = open_checkpoint(str(mgm)), tensors(tmp_path / "float")
    worst = 0.0
    for name, info in original.tensors.items():
        values = torch.from_numpy(np.asarray(original.rows(name, 0, info.shape[0] if info.shape else 1), np.float32))
        assert ours[name].shape == values.shape
        worst = max(worst, float((ours[name] - values).norm() / values.norm().clamp(min=1e-9)))
    assert 0 < worst < 0.02


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
@pytest.mark.parametrize("options", [{"moe": "transformers"}, {"scheme": "w8a16"}])
def test_experts_in_transformers_agree_with_the_dequantized_model(make, options, tmp_path):
    source = make(tmp_path / "source")
    result = convert(str(source), tmp_path / "out", format="compressed-tensors", **options)
    assert sum(".experts." in name for name in result.plan.modules) == 2 * 4 * 3
    verify(tmp_path / "out")
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    quantized, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    with torch.inference_mode():
        ours, theirs = plain(IDS).logits, quantized.eval()(IDS).logits
    bound = 1e-6 if "scheme" in options else 0.05  # without a scheme, activations of the attention are int8
    assert (ours - theirs).norm() / ours.norm() < bound


def test_experts_for_vllm_are_one_by_one_and_all_int8(tmp_path):
    convert(str(mixtral(tmp_path / "source")), tmp_path / "out", format="compressed-tensors")
    got = tensors(tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    assert got[f"{name}.weight"].dtype == torch.int8 and got[f"{name}.weight_scale"].shape == (32, 1)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "int-quantized" and list(entry["config_groups"]) == ["group_0"]
    assert r"re:.*\.gate$" in entry["ignore"] and "lm_head" in entry["ignore"]
    convert(str(tmp_path / "out"), tmp_path / "int8")  # bitsandbytes holds no experts
    back = tensors(tmp_path / "int8")
    assert back[f"{name}.weight"].dtype == torch.float32 and "model.layers.0.self_attn.q_proj.SCB" in back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "onnx"}, "format onnx: unknown; name one of bitsandbytes, compressed-tensors"),
        ({"name": "compressed-tensors", "scheme": "w4a16"}, "scheme w4a16: unknown; name one of w8a8, w8a16"),
        ({"name": "compressed-tensors", "moe": "sglang"}, "moe sglang: unknown"),
        ({"name": "bitsandbytes", "scheme": "w8a8"}, "scheme w8a8: needs --format compressed-tensors"),
        ({"name": "gguf", "group_size": 32}, "group-size 32: needs --format compressed-tensors"),
        ({"name": "compressed-tensors", "group_size": 32}, "group-size 32: needs --scheme w8a16"),
        (
            {"name": "compressed-tensors", "scheme": "w8a16", "group_size": 16},
            "group-size 16: unknown; name one of 32, 64, 128",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(OutputError, match=message):
        make_format(**options)


def test_the_default_folder_says_what_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "tiny")
    packed = {"format": "compressed-tensors", "scheme": "w8a16"}
    for options in (packed, {**packed, "group_size": 32}, {"format": "bfloat16"}):
        convert("tiny", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "tiny-w8a16", "tiny-w8a16-g32", "tiny-bfloat16"}


def test_a_quantized_source_with_a_tensor_twice_is_refused(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.SCB"]
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(Exception, match=r"up_proj\.weight is I8 without a scale"):
        open_checkpoint(str(tmp_path / "out"))


def test_a_module_with_weight_in_its_name_is_not_for_transformers_and_bitsandbytes():
    """transformers' pattern for the tensors of a layer, `weight`, finds it in `inject_weight.SCB`."""
    modules = dict.fromkeys(("layers.0.up", "layers.0.inject_weight"), LINEAR)
    kept, refused = BitsAndBytes().linears(Structure(modules))
    assert kept == {"layers.0.up": LINEAR} and list(refused) == ["layers.0.inject_weight"]
