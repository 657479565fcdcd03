"""GGUF of models with experts, of Gemma, Phi-3 and gpt-oss, read back: what the checkpoint held, or one line."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from helpers.gguf_files import (
    FUSED,
    MIXTURES,
    OTHERS,
    assemble,
    config_of,
    dequantized,
    folder_of,
    model_of,
    separate,
    write_tokenizer,
)
from transformers import AutoModelForCausalLM

from quantize8 import SourceError, convert
from quantize8.formats.gguf import architectures as gguf
from quantize8.formats.gguf.architectures import Field
from quantize8.runtime.loading import find_tokenizer
from quantize8.sources import open_checkpoint

IDS = torch.arange(3, 103)[None]
FACTORS = {"short_factor": [1.0 + i / 16 for i in range(8)], "long_factor": [1.0 + i / 4 for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "rope_theta": 150000.0}
CASES = [(family, {}) for family in (*MIXTURES, *OTHERS, *FUSED)]
CASES.append(("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 64}))
CASES.append(("gpt-oss", {"rope_parameters": {**YARN, "truncate": False}}))
CASES.append(("phi3", {"tie_word_embeddings": True}))


def file_of(folder, family, **changes):
    """A file without a tokenizer, which transformers would replace in a Qwen."""
    config = config_of(family, **changes)
    source = folder_of(folder / "model", config, tokenizer=False)
    assemble(source, folder / "tiny.gguf", gguf.settings(config, "tiny", "here"))
    return folder / "tiny.gguf"


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_every_tensor_is_found_and_the_model_computes_the_same(family, changes, tmp_path):
    path = file_of(tmp_path, family, **changes)
    model = dequantized(config_of(family, **changes))
    model.save_pretrained(tmp_path / "rounded")
    expected = separate(open_checkpoint(str(tmp_path / "rounded")))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        assert checkpoint.tensors[name].shape == info.shape, name
        values = expected.rows(name, 0, info.shape[0]).astype(np.float32).astype(np.float16)
        np.testing.assert_allclose(checkpoint.rows(name, 0, info.shape[0]), values, rtol=1e-3, atol=2e-7, err_msg=name)
        np.testing.assert_array_equal(checkpoint.rows(name, 1, 3), checkpoint.rows(name, 0, 3)[1:], name)
    convert(str(path), tmp_path / "float32", format="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.float32).eval()
    with torch.no_grad():
        logits, ours = model(IDS).logits, again(IDS).logits
    assert (logits - ours).norm() < 0.01 * logits.norm()


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gemma3", "phi3", "gpt-oss"])
def test_an_artifact_is_checked_against_its_source(family, tmp_path):
    source = folder_of(tmp_path / "model", config_of(family), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        path.rename(source / path.name)
    result = convert(str(source), tmp_path / "out", format="gguf", check=True)
    assert result.check.skipped is None and result.check.error < 0.15
    assert find_tokenizer(open_checkpoint(str(tmp_path / "out"))) is not None


def rewritten(path, fields=None, tensors=None):
    """The file with other metadata, None for none, and with tensors that functions change or leave out."""
    reader, fields, tensors = GGUFReader(path), fields or {}, tensors or {}
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path.with_name("other.gguf"), arch)
    for name, field in reader.fields.items():
        key = name.removeprefix(f"{arch}.")
        if name.startswith("GGUF.") or name == "general.architecture" or (key in fields and fields[key] is None):
            continue
        writer.add_key_value(name, fields.get(key, field.contents()), field.types[0])
    for tensor in reader.tensors:
        data = tensors.get(tensor.name, lambda data: data)(tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("other.gguf")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3moe", {"expert_count": 5}, r"ffn_gate_inp.weight is \[4, 64\], but by the metadata \[5, 64\]"),
        ("qwen3moe", {"expert_count": 1000}, "expert_count is 1000, more than the 512 that llama.cpp runs"),
        ("qwen3moe", {"expert_count": None}, "lacks qwen3moe.expert_count"),
        ("qwen3moe", {"expert_used_count": 0}, "expert_used_count is 0, not a valid count"),
        ("qwen3moe", {"expert_feed_forward_length": 64}, r"by the metadata \[4, 64, 64\]"),
        ("qwen2moe", {"block_count": 2**31}, "block_count is 2147483648, not a valid count"),
        ("qwen2moe", {"block_count": 3}, "lacks blk.2.attn_q.weight, which this qwen2moe must have"),
        ("qwen2moe", {"attention.head_count": 8}, "attention.key_length is 16, not the 8 of heads as wide as"),
        ("gemma2", {"attention.value_length": 16}, "attention.value_length is 16, not the 32 of keys"),
        ("gemma2", {"rope.dimension_count": 16}, "rope.dimension_count is 16, not the 32 of a head"),
        ("gemma2", {"attn_logit_softcapping": None}, "lacks gemma2.attn_logit_softcapping"),
        ("gemma2", {"rope.scaling.type": "linear"}, "which Gemma2ForCausalLM does not support"),
        ("phi3", {"rope.dimension_count": 32}, "rope.dimension_count is 32, not the 16 of a head"),
        ("gpt-oss", {"attention.layer_norm_rms_epsilon": None}, "lacks gpt-oss.attention.layer_norm_rms_epsilon"),
        ("mixtral", {"attention.head_count_kv": 4}, r"attn_k.weight is \[32, 64\], but by the metadata \[64, 64\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(family, fields, message, tmp_path):
    path = file_of(tmp_path, family, **({"rope_scaling": None} if family == "gemma2" else {}))
    if "rope.scaling.type" in fields:
        config = config_of(family)
        more = [Field("gemma2.rope.scaling.type", "linear", gguf.GGUFValueType.STRING)]
        more.append(Field("gemma2.rope.scaling.factor", 2.0, gguf.GGUFValueType.FLOAT32))
        assemble(tmp_path / "model", tmp_path / "other.gguf", [*gguf.settings(config, "tiny", "here"), *more])
        path, fields = tmp_path / "other.gguf", {}
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(rewritten(path, fields) if fields else path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "tensor", "change", "message"),
    [
        ("gpt-oss", "blk.1.ffn_up_exps.bias", lambda data: None, "lacks blk.1.ffn_up_exps.bias"),
        ("gpt-oss", "blk.1.attn_sinks.weight", lambda data: data[:2], r"attn_sinks.weight is \[2\]"),
        ("mixtral", "blk.0.ffn_down_exps.weight", lambda data: data[:3], r"ffn_down_exps.weight is \[3, 64, 96\]"),
        ("phi3-long", "rope_factors_short.weight", lambda data: None, "rope_factors_short.weight is no list"),
        ("gemma3", "blk.0.post_ffw_norm.weight", lambda data: None, "lacks blk.0.post_ffw_norm.weight"),
        ("qwen2moe", "blk.0.ffn_gate_inp_shexp.weight", lambda data: data[:32], r"shexp.weight is \[32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(family, tensor, change, message, tmp_path):
    scaling = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 64}
    changes = scaling if family == "phi3-long" else {}
    path = rewritten(file_of(tmp_path, family.removesuffix("-long"), **changes), tensors={tensor: change})
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_the_model_lacks_is_refused(tmp_path):
    config = config_of("gemma2")
    source = folder_of(tmp_path / "model", config, tokenizer=False)
    checkpoint = open_checkpoint(str(source))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    tensors = gguf.tensors_of(config, shapes, "here")
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "gemma2")
    for field in gguf.settings(config, "tiny", "here"):
        writer.add_key_value(field.key, field.value, field.kind)
    for tensor in tensors:
        writer.add_tensor(tensor.name, np.zeros(tensor.shape, np.float32))
    writer.add_tensor("rope_factors_long.weight", np.ones(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"tensor rope_factors_long\.weight is unknown for gemma2"):
        open_checkpoint(str(path))


def test_norms_of_gemma_lose_no_more_than_the_sum_with_1_in_float32(tmp_path):
    config = config_of("gemma2")
    path = file_of(tmp_path, "gemma2")
    expected = model_of(config).state_dict()
    checkpoint = open_checkpoint(str(path))
    for name in ("model.norm.weight", "model.layers.1.post_feedforward_layernorm.weight"):
        values = checkpoint.rows(name, 0, 64).astype(np.float32)
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-3, atol=1e-7)
