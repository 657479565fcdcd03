"""gpt-oss as it is published: the fused experts are those that transformers decodes, bit for bit."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.making import word_tokenizer
from helpers.packing import opened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantize8 import SourceError, convert, inspect, load
from quantize8.formats import mxfp4
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import structure_of, with_fused_experts

IDS = torch.arange(2, 20)[None]
NAME = "model.layers.0.mlp.experts.down_proj"


def packed(experts, rows, columns, lowest=0, highest=255):
    """Random numbers of all kinds, and scales from lowest up to, not including, highest."""
    generator = torch.Generator().manual_seed(experts * rows + columns)
    shape = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(lowest, highest, shape, dtype=torch.uint8, generator=generator)


def bits(values):
    return values.view(np.uint16) if isinstance(values, np.ndarray) else values.view(torch.uint16).numpy()


def in_mxfp4(folder):
    """A tiny gpt-oss, in the form in which it is published."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, pad_token_id=0, max_position_embeddings=256, dtype=torch.bfloat16)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"], state[f"{name}_scales"] = packed(experts, rows, columns, 118, 124)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("experts", "rows", "columns"), [(1, 1, 32), (3, 7, 96), (5, 40, 32)])
@pytest.mark.parametrize("chunk", [1, 200, 2**20])
def test_equals_transformers(experts, rows, columns, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(mxfp4, "_CHUNK", chunk)
    blocks, scales = packed(experts, rows, columns)
    stored = opened(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    (encoding,) = mxfp4.find(stored, {}).values()
    oracle = convert_moe_packed_tensors(blocks, scales)
    assert (encoding.name, encoding.shape, encoding.stored_dtype) == (NAME, tuple(oracle.shape), "MXFP4")
    for start, stop in [(0, experts), (0, 1), (experts - 1, experts), (1, 1)]:
        ours = encoding.rows(start, stop)
        assert ours.dtype == ml_dtypes.bfloat16 and ours.flags["C_CONTIGUOUS"]
        assert np.array_equal(bits(ours), bits(oracle[start:stop]))


def test_every_number_with_every_scale_equals_transformers(tmp_path):
    """Subnormal and infinite products among them, and the sign of zero."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    stored = opened(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    (encoding,) = mxfp4.find(stored, {}).values()
    assert np.array_equal(bits(encoding.rows(0, 1)), bits(convert_moe_packed_tensors(blocks, scales)))


def test_the_checkpoint_has_the_tensors_of_the_model(tmp_path):
    checkpoint = open_checkpoint(str(in_mxfp4(tmp_path)))
    with torch.device("meta"):
        expected = GptOssForCausalLM(GptOssConfig(**checkpoint.config)).state_dict()
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        n: (*t.shape,) for n, t in expected.items()
    }
    assert "quantization_config" not in checkpoint.config
    info = checkpoint.tensors[NAME]
    assert (info.dtype, info.stored_dtype, info.is_int8) == ("BF16", "MXFP4", False)
    assert checkpoint.decoded == {n for n in expected if n.endswith(("gate_up_proj", "down_proj"))}


def test_as_bfloat16_it_is_what_transformers_loads(tmp_path):
    source = in_mxfp4(tmp_path / "source")
    convert(str(source), tmp_path / "out", format="bfloat16")
    state, written = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[NAME], convert_moe_packed_tensors(state[f"{NAME}_blocks"], state[f"{NAME}_scales"]))
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert model(IDS).logits.isfinite().all()


def test_load_computes_what_transformers_does_with_the_decoded_weights(tmp_path):
    source = in_mxfp4(tmp_path / "source")
    word_tokenizer(source)
    convert(str(source), tmp_path / "out", format="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, _ = load(str(source))
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, plain(IDS).logits)
    experts = [report for report in inspect(str(source)) if ".experts." in report.module]
    assert len(experts) == 2 * 3 * 2 and {report.dtype for report in experts} == {"MXFP4"}
    assert convert(str(source), tmp_path / "int8", check=True).check.parameters


def test_a_scale_that_is_nan_is_refused_when_it_is_read(tmp_path):
    blocks, scales = packed(3, 8, 64)
    scales[2, 5, 1] = 255
    (encoding,) = mxfp4.find(opened(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}), {}).values()
    encoding.rows(0, 2)
    with pytest.raises(SourceError, match=r"safetensors: .*NaN in expert 2, row 5 of .*down_proj_scales; fetch"):
        encoding.rows(0, 3)


BLOCKS, SCALES = packed(2, 4, 64)
REFUSED = {
    "no scales": ({f"{NAME}_blocks": BLOCKS}, "has no down_proj_scales"),
    "no blocks": ({f"{NAME}_scales": SCALES}, "down_proj_scales but no"),
    "grid": ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES[:, :3]}, "U8 [2, 3, 2] for blocks [2, 4, 2, 16]"),
    "types": ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES.float()}, "has scales F32"),
    "words": ({f"{NAME}_blocks": BLOCKS.view(torch.int32), f"{NAME}_scales": SCALES}, "has blocks I32 [2, 4, 2, 4]"),
    "width": ({f"{NAME}_blocks": BLOCKS[..., :8], f"{NAME}_scales": SCALES}, "has blocks U8 [2, 4, 2, 8]"),
    "joined": ({f"{NAME}_blocks": BLOCKS.flatten(2), f"{NAME}_scales": SCALES}, "has blocks U8 [2, 4, 32]"),
    "no experts": ({f"{NAME}_blocks": BLOCKS[:0], f"{NAME}_scales": SCALES[:0]}, "has blocks U8 [0, 4, 2, 16]"),
    "twice": ({f"{NAME}_blocks": BLOCKS, f"{NAME}_scales": SCALES, NAME: torch.ones(1)}, "a second time, as F32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    state, message = REFUSED[case]
    with pytest.raises(SourceError) as error:
        mxfp4.find(opened(tmp_path, state), {})
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)


def test_experts_in_groups_lose_nothing(tmp_path):
    """From the published form to w8a16 in groups of 32, and what both compute."""
    source = in_mxfp4(tmp_path / "source")
    result = convert(
        str(source), tmp_path / "out", format="compressed-tensors", scheme="w8a16", group_size=32, check=True
    )
    errors = {name: found.relative_error for name, found in quantized(result).items() if ".experts." in name}
    assert len(errors) == 2 * 3 * 2 and set(errors.values()) == {0.0} and result.exact == 1.0
    experts = sum(math.prod(info.shape) for name, info in result.plan.checkpoint.tensors.items() if ".experts." in name)
    assert experts > 0.7 * result.plan.weights
    stored, original = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(source))
    joined, _ = with_fused_experts(stored, structure_of(stored))
    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{kind}"
        assert np.array_equal(joined.rows(name, 0, 3), original.rows(name, 0, 3).astype(np.float32))


def quantized(result):
    return {name: record.quantized for name, record in result.manifest.tensors.items() if record.quantized}
