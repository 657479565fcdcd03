"""What 4-bit floats lose in int8: nothing, where a block, group or row has a scale that is a power of two."""

import io
import json

import numpy as np
import pytest
import torch
from helpers import gguf_files
from helpers.packing import opened
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_float4 import decompressed, entry_of, named, parts
from test_mxfp4 import packed

from quantize8 import convert, inspect, verify
from quantize8.formats import mxfp4
from quantize8.kernels import groups, q8_0
from quantize8.reports import artifacts
from quantize8.sources import open_checkpoint

TARGETS = {
    "gguf": {"format": "gguf"},
    "g32": {"format": "compressed-tensors", "scheme": "w8a16", "group_size": 32},
    "g64": {"format": "compressed-tensors", "scheme": "w8a16", "group_size": 64},
    "w8a16": {"format": "compressed-tensors", "scheme": "w8a16"},
    "w8a8": {"format": "compressed-tensors"},
    "bitsandbytes": {"format": "bitsandbytes"},
}


def in_mxfp4(folder, scales):
    """A tiny Llama with 4-bit floats for Linear weights, and the weights. `scales` maps random octets to scales."""
    gguf_files.write_tokenizer(folder)
    source = gguf_files.folder_of(folder, gguf_files.config_of("llama"), tokenizer=False)
    state, weights = load_file(source / "model.safetensors"), {}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        made = parts("MXFP4", *state.pop(name).shape)
        made["weight_scale"] = scales(made["weight_scale"])
        state |= named(made, name.removesuffix(".weight"))
        weights[name] = decompressed("MXFP4", made)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": entry_of("MXFP4")}))
    return source, weights


def of_all_sizes(octets):
    return octets % 20 + 108  # 2^-19 to 2^0


def near(octets):
    return octets % 4 + 118  # within a row, too, the largest number is at most 96 times the smallest


def errors_of(result):
    float4 = [entry for entry in result.errors.values() if entry.source_dtype == "MXFP4"]
    assert float4
    return {entry.relative_error for entry in float4}


@pytest.mark.parametrize("target", ["gguf", "g32"])
def test_blocks_of_32_lose_nothing(target, tmp_path):
    source, weights = in_mxfp4(tmp_path / "source", of_all_sizes)
    result = convert(str(source), tmp_path / "out", **TARGETS[target])
    assert errors_of(result) == {0.0} and result.as_json()["exact"] == 1
    out = result.out / next(iter(result.manifest.headers)) if target == "gguf" else result.out
    back = open_checkpoint(str(out))
    for name, weight in weights.items():
        assert np.array_equal(back.rows(name, 0, len(weight)).astype(np.float32), weight.numpy()), name
    verify(tmp_path / "out")


@pytest.mark.parametrize("target", TARGETS)
def test_whole_rows_lose_nothing_where_their_scales_are_near(target, tmp_path):
    source, weights = in_mxfp4(tmp_path / "source", near)
    result = convert(str(source), tmp_path / "out", **TARGETS[target])
    assert errors_of(result) == {0.0} and result.as_json()["exact"] == 1
    if target != "gguf":
        back = open_checkpoint(str(tmp_path / "out"))
        for name, weight in weights.items():
            assert np.array_equal(back.rows(name, 0, len(weight)), weight.numpy()), name


def test_rows_of_all_sizes_lose_something_and_the_share_says_so(tmp_path):
    source, _ = in_mxfp4(tmp_path / "source", of_all_sizes)
    result = convert(str(source), tmp_path / "out")
    assert result.as_json()["exact"] == 0 and min(errors_of(result)) > 0


def test_a_searched_scale_is_not_preferred_to_one_without_loss(tmp_path):
    source, _ = in_mxfp4(tmp_path / "source", of_all_sizes)
    assert errors_of(convert(str(source), tmp_path / "out", format="gguf", scale="mse")) == {0.0}
    source, _ = in_mxfp4(tmp_path / "near", near)
    assert errors_of(convert(str(source), tmp_path / "int8", scale="mse")) == {0.0}


def test_one_weight_that_loses_something_is_counted_out(tmp_path):
    """Its error is far below the digits of the manifest."""
    source, weights = in_mxfp4(tmp_path / "source", of_all_sizes)
    state, name = load_file(source / "model.safetensors"), "model.layers.0.mlp.up_proj"
    state[f"{name}.weight_scale"][3, 0] = 80  # 2^-47, which float16 does not hold
    save_file(state, source / "model.safetensors", {"format": "pt"})
    result = convert(str(source), tmp_path / "out", format="gguf")
    lost, total = weights[f"{name}.weight"].numel(), sum(weight.numel() for weight in weights.values())
    assert result.as_json()["exact"] == pytest.approx(1 - lost / total)
    assert errors_of(result) == {0.0, 1e-8}


def test_the_table_of_a_conversion_says_it(tmp_path):
    source, _ = in_mxfp4(tmp_path / "source", of_all_sizes)
    result = convert(str(source), tmp_path / "out", **TARGETS["g32"])
    text = io.StringIO()
    Console(width=120, file=text).print(artifacts.conversion(result))
    assert "100% of the weights that were 4-bit floats" in text.getvalue()
    assert [artifacts._percent(share) for share in (0, 0.1239, 0.99999)] == ["0.0%", "12.3%", "99.9%"]
    assert {report.dtype for report in inspect(str(source))} == {"MXFP4"}


@pytest.mark.parametrize("experts", [1, 3])
def test_fused_experts_lose_nothing(experts, tmp_path):
    blocks, scales = packed(experts, 48, 96, 108, 128)
    stored = opened(tmp_path, {"m.down_proj_blocks": blocks, "m.down_proj_scales": scales})
    (encoding,) = mxfp4.find(stored, {}).values()
    for expert in range(experts):
        weight = np.ascontiguousarray(encoding.rows(expert, expert + 1)[0].T.astype(np.float32))
        assert np.array_equal(q8_0.dequantize_rows(q8_0.quantize_rows(weight, exact=True)), weight)
        codes, by_group = groups.quantize_rows(weight, 32, encoding.rows(0, 1).dtype, exact=True)
        assert not groups.row_errors(weight, codes, by_group)[1].any()


def test_other_sources_keep_llama_cpps_scales(tmp_path):
    """Also where a power of two would lose nothing: only 4-bit floats are known to have been such multiples."""
    source, weights = in_mxfp4(tmp_path / "source", near)
    convert(str(source), tmp_path / "float", format="float32")  # copies the tokenizer, too
    result = convert(str(tmp_path / "float"), tmp_path / "out", format="gguf")
    assert result.as_json()["exact"] is None and max(e.relative_error for e in result.errors.values()) > 0.001
    assert torch.equal(load_file(tmp_path / "float" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
                       weights["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
