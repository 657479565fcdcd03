"""4-bit floats: numbers by hand, and compressed-tensors' NVFP4 and MXFP4 as its own package decompresses them."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers.making import llama
from helpers.packing import opened, rows_equal_the_whole
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, convert
from quantize8.formats import compressed_tensors, float4
from quantize8.sources import open_checkpoint

FORMS = {"NVFP4": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized"}
ARGUMENTS = {
    "NVFP4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    "MXFP4": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
}


def entry_of(kind):
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": float4.BLOCK[kind]}
    group = {"targets": ["Linear"], "format": FORMS[kind], "weights": {**weights, "strategy": "group"}}
    groups = {"group_0": {**group, "input_activations": None, "output_activations": None}}
    entry = {
        "quant_method": "compressed-tensors",
        "format": FORMS[kind],
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
    return {**entry, "quantization_status": "compressed"}


def parts(kind, rows, columns, shape=(1,)):
    """The tensors of a module with random numbers of all kinds, and scales of all magnitudes."""
    generator = torch.Generator().manual_seed(rows * columns)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0, 255, (rows, columns // float4.BLOCK[kind]), dtype=torch.uint8, generator=generator)
    state = {"weight_packed": packed, "weight_scale": scale}
    if kind == "NVFP4":
        scale = torch.where(scale & 0x7F == 0x7F, 0x38, scale)  # no NaN
        state["weight_scale"] = scale.view(torch.float8_e4m3fn)
        state["weight_global_scale"] = torch.full(shape, 1234.567)
    return state


def decompressed(kind, state, dtype=torch.float32):
    """By the package, whose unpacking is in bfloat16; the scales are given the output's precision."""
    arguments = QuantizationArgs(num_bits=4, type="float", symmetric=True, **ARGUMENTS[kind])
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    if dtype == torch.bfloat16:
        return BaseCompressor.get_value_from_registry(FORMS[kind]).decompress(dict(state), scheme)["weight"]
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = state["weight_packed"], state["weight_scale"]
    scale = torch.exp2(scale.double() - 127).float() if kind == "MXFP4" else scale.float()
    numbers = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], dtype)
    return dequantize(numbers, scale, args=arguments, global_scale=state.get("weight_global_scale"), dtype=dtype)


def named(state, module="m"):
    return {f"{module}.{name}": value for name, value in state.items()}


def test_numbers_by_hand():
    first = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    octets = np.array([[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]], np.uint8)
    values = float4.unpack(octets)
    assert values.tolist() == [first, [-x for x in first]] and np.signbit(values[1, 0])


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (24, 160)])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_equals_compressed_tensors(kind, rows, columns, shape, tmp_path):
    state = parts(kind, rows, columns, shape)
    stored = opened(tmp_path, {**named(state), "m.input_global_scale": torch.ones(1)})
    (encoding,) = compressed_tensors.find(stored, entry_of(kind)).values()
    ours = torch.from_numpy(rows_equal_the_whole(encoding))
    assert encoding.stored_dtype == kind
    assert torch.equal(ours, decompressed(kind, state))
    if shape:  # torch would round a quotient by a number without dimensions to bfloat16
        assert torch.equal(ours.bfloat16(), decompressed(kind, state, torch.bfloat16))


def in_float4(kind, folder):
    """A tiny Llama whose Linear weights are 4-bit floats, and the state that the package decompresses."""
    source = llama(folder, dtype=torch.bfloat16, hidden=64)
    state, expected = load_file(source / "model.safetensors"), {}
    config = json.loads((source / "config.json").read_text())
    for name in [name for name in state if name.endswith("_proj.weight") and "down" not in name]:
        made = parts(kind, *state.pop(name).shape)
        if kind == "MXFP4":
            made["weight_scale"] = made["weight_scale"] % 6 + 118
        state |= named(made, name.removesuffix(".weight"))
        expected[name] = decompressed(kind, made)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": entry_of(kind)}))
    return source, expected


@pytest.mark.parametrize("kind", FORMS)
def test_a_checkpoint_has_the_tensors_of_the_model(kind, tmp_path):
    source, expected = in_float4(kind, tmp_path / "source")
    checkpoint = open_checkpoint(str(source))
    assert checkpoint.decoded == set(expected) and not [n for n in checkpoint.tensors if "_scale" in n or "packed" in n]
    for name, weight in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.stored_dtype) == ("F32", kind)
        assert torch.equal(torch.from_numpy(np.concatenate([*checkpoint.blocks(name, 1000)])), weight)
    manifest = convert(str(source), tmp_path / "out").manifest
    assert {r.quantized.source_dtype for r in manifest.tensors.values() if r.quantized} == {kind, "BF16"}


def test_a_scale_that_is_nan_is_refused_when_it_is_read(tmp_path):
    state = parts("MXFP4", 8, 64)
    state["weight_scale"][5, 1] = 255
    (encoding,) = compressed_tensors.find(opened(tmp_path, named(state)), entry_of("MXFP4")).values()
    encoding.rows(0, 5)
    with pytest.raises(SourceError, match=r"safetensors: m has a scale that is NaN in row 5 of m.weight_scale; fetch"):
        encoding.rows(4, 8)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_of_the_tensor_that_is_no_divisor_is_refused(value, tmp_path):
    state = parts("NVFP4", 8, 64) | {"weight_global_scale": torch.tensor([value])}
    (encoding,) = compressed_tensors.find(opened(tmp_path, named(state)), entry_of("NVFP4")).values()
    with pytest.raises(SourceError, match=r"m has weight_global_scale .*, which is not a positive number; fetch"):
        encoding.rows(0, 8)


NV, MX = parts("NVFP4", 4, 64), parts("MXFP4", 4, 64)
REFUSED = {
    "no scale": ({"weight_packed": MX["weight_packed"]}, "m.weight_packed has no weight_scale beside it"),
    "no weight": ({"weight_scale": MX["weight_scale"]}, "m has weight_scale but no weight"),
    "no global scale": (NV | {"weight_global_scale": None}, "has no weight_global_scale"),
    "global scales": (NV | {"weight_global_scale": torch.ones(4)}, "has F32 [4] as weight_global_scale"),
    "global dtype": (NV | {"weight_global_scale": torch.ones(1).half()}, "has F16 [1] as weight_global_scale"),
    "global of mx": (MX | {"weight_global_scale": torch.ones(1)}, "is MXFP4, which has no weight_global_scale"),
    "grid": (MX | {"weight_scale": MX["weight_scale"][:, :1]}, "MXFP4 4x64 with scales U8 [4, 1]"),
    "rows": (NV | {"weight_scale": NV["weight_scale"][:3]}, "NVFP4 4x64 with scales F8_E4M3 [3, 4]"),
    "scale dtype": (NV | {"weight_scale": torch.ones(4, 4)}, "NVFP4 4x64 with scales F32 [4, 4]"),
    "part of a block": (MX | {"weight_packed": MX["weight_packed"][:, :24]}, "MXFP4 4x48 with scales"),
    "experts": (MX | {"weight_packed": MX["weight_packed"][None]}, "stores its weight as U8 [1, 4, 32]"),
    "zero points": (MX | {"weight_zero_point": MX["weight_scale"]}, "has zero points"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    state, message = REFUSED[case]
    stored = opened(tmp_path, named({name: value for name, value in state.items() if value is not None}))
    with pytest.raises(SourceError) as error:
        compressed_tensors.find(stored, entry_of("MXFP4"))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)
