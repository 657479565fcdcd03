"""NVIDIA ModelOpt's checkpoints, by the formula in vLLM's source."""

import json

import numpy as np
import pytest
import torch
from helpers.making import llama
from helpers.packing import opened, rows_equal_the_whole
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, convert
from quantize8.formats import modelopt
from quantize8.sources import hub, open_checkpoint

CONFIG = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
OWN_FILE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dequantize_to_dtype(packed, scale, global_scale):
    """vLLM 0.32, quantization/utils/nvfp4_emulation_utils.py: break_fp4_bytes and dequantize_to_dtype, not swizzled."""
    codes = torch.stack((packed.flatten() & 0x0F, (packed.flatten() & 0xF0) >> 4), dim=1).flatten()
    values = NUMBERS[(codes & 0x07).long()] * torch.where((codes & 0x08).bool(), -1.0, 1.0)
    values = values.reshape(len(packed), -1, 16)
    return (values * (scale.float() * global_scale).unsqueeze(-1)).reshape(len(packed), -1)


def parts(rows, columns, shape=()):
    generator = torch.Generator().manual_seed(rows * columns)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0, 127, (rows, columns // 16), dtype=torch.uint8, generator=generator)
    state = {"weight": packed, "weight_scale": scale.view(torch.float8_e4m3fn)}
    return state | {"weight_scale_2": torch.full(shape, 0.000123456), "input_scale": torch.ones(())}


def named(state, module="m"):
    return {f"{module}.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(("rows", "columns", "shape"), [(1, 16, ()), (7, 48, (1,)), (24, 160, ())])
@pytest.mark.parametrize("entry", [CONFIG, OWN_FILE, {"quant_algo": "w4a16_nvfp4"}, {"quant_algo": "MIXED_PRECISION"}])
def test_nvfp4_equals_vllms_formula(rows, columns, shape, entry, tmp_path):
    state = parts(rows, columns, shape)
    (encoding,) = modelopt.find(opened(tmp_path, named(state)), entry).values()
    expected = dequantize_to_dtype(state["weight"], state["weight_scale"], state["weight_scale_2"])
    assert torch.equal(torch.from_numpy(rows_equal_the_whole(encoding)), expected)
    assert encoding.stored_dtype == "NVFP4" and set(encoding.tensors) == set(named(state))


@pytest.mark.parametrize("shape", [(), (1,), (24,), (24, 1)])
def test_float8(shape, tmp_path):
    weight = torch.randn(24, 40).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    state = {"m.weight": weight, "m.weight_scale": scale, "m.input_scale": torch.ones(())}
    (encoding,) = modelopt.find(opened(tmp_path, state), {"quant_algo": "FP8"}).values()
    expected = weight.float() * (scale[:, None] if scale.shape == (24,) else scale)
    assert torch.equal(torch.from_numpy(rows_equal_the_whole(encoding)), expected)


def in_nvfp4(folder):
    """A tiny Llama as ModelOpt stores it, and its weights by vLLM's formula."""
    source = llama(folder, dtype=torch.bfloat16, hidden=64)
    state, expected = load_file(source / "model.safetensors"), {}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        made = parts(*state.pop(name).shape)
        state |= named(made, name.removesuffix(".weight"))
        expected[name] = dequantize_to_dtype(made["weight"], made["weight_scale"], made["weight_scale_2"])
    state["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(state, source / "model.safetensors", {"format": "pt"})
    return source, expected


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_a_checkpoint_has_the_tensors_of_the_model(place, tmp_path):
    source, expected = in_nvfp4(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    if place == "config.json":
        (source / place).write_text(json.dumps({**config, "quantization_config": CONFIG}))
    else:
        (source / place).write_text(json.dumps(OWN_FILE))
    checkpoint = open_checkpoint(str(source))
    assert checkpoint.decoded == set(expected) and not [name for name in checkpoint.tensors if "_scale" in name]
    for name, weight in expected.items():
        assert torch.equal(torch.from_numpy(np.concatenate([*checkpoint.blocks(name, 1000)])), weight)
    result = convert(str(source), tmp_path / "out")
    assert {r.quantized.source_dtype for r in result.manifest.tensors.values() if r.quantized} == {"NVFP4"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists() and not result.plan.left_out


def test_the_settings_are_downloaded():
    assert "hf_quant_config.json" in hub.needed_files(["model.safetensors", "config.json", "hf_quant_config.json"])[1]


STATE = parts(4, 32)
REFUSED = {
    "algorithm": (STATE, {"quant_algo": "NVFP4_AWQ"}, "quantized by ModelOpt's NVFP4_AWQ, which is not read"),
    "no algorithm": (STATE, {"quantization": []}, "quantized by ModelOpt's None, which is not read"),
    "smoothed": (STATE | {"pre_quant_scale": torch.ones(32)}, CONFIG, "m.pre_quant_scale smooths activations"),
    "experts": (STATE | {"gate_up_proj_weight_scale": torch.ones(2)}, CONFIG, "is a scale of fused experts"),
    "3-D": (STATE | {"weight": STATE["weight"][None]}, CONFIG, "stores its weight as U8 [1, 4, 16]"),
    "no scale": (STATE | {"weight_scale": None, "weight_scale_2": None}, CONFIG, "m.weight is U8 without weight_scale"),
    "no block scale": (STATE | {"weight_scale": None, "weight": None}, CONFIG, "m.weight_scale_2 has no weight_scale"),
    "no global scale": (STATE | {"weight_scale_2": None}, CONFIG, "has no weight_scale_2"),
    "no weight": (STATE | {"weight": None}, CONFIG, "m has weight_scale but no weight"),
    "grid": (STATE | {"weight_scale": STATE["weight_scale"][:, :1]}, CONFIG, "NVFP4 4x32 with scales F8_E4M3 [4, 1]"),
    "dtype": (STATE | {"weight": torch.ones(4, 16)}, CONFIG, "m.weight is F32, which is not read with weight_scale"),
    "float8": ({"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale": torch.ones(3)}, CONFIG, "4x4 with"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    state, entry, message = REFUSED[case]
    stored = opened(tmp_path, named({name: value for name, value in state.items() if value is not None}))
    with pytest.raises(SourceError) as error:
        modelopt.find(stored, entry)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)


def test_a_negative_scale_of_the_tensor_is_refused(tmp_path):
    state = parts(4, 32) | {"weight_scale_2": torch.tensor(-1.0)}
    (encoding,) = modelopt.find(opened(tmp_path, named(state)), CONFIG).values()
    with pytest.raises(SourceError, match=r"m has weight_scale_2 -1\.0, which is not a positive number; fetch"):
        encoding.rows(0, 4)
