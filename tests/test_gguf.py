"""Reading GGUF: names and values as transformers has them, llama.cpp's interleaving undone."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file

from quantize8 import SourceError
from quantize8.checkpoint import open_checkpoint

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
KV = HIDDEN // HEADS * KV_HEADS
LAYER = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
}


def permute(weight, heads):
    """How llama.cpp's converter stores query and key rows of Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(path, architecture="llama", kind=GGMLQuantizationType.F32, extra=(), biases=False):
    """A tiny GGUF file; returns its tensors under transformers' names, as float32 after their quantization."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    expected = {}

    def add(stored, name, values, permuted=0):
        packed = quants.quantize(values, kind) if values.ndim == 2 else values
        expected[name] = quants.dequantize(packed, kind) if values.ndim == 2 else values
        if permuted:
            packed = permute(packed, permuted)
        writer.add_tensor(stored, packed, raw_dtype=kind if values.ndim == 2 else None)

    add("token_embd.weight", "model.embed_tokens.weight", rng.normal(size=(32, HIDDEN)).astype(np.float32))
    for layer in range(LAYERS):
        for stored, (name, shape) in LAYER.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(stored, 0) if architecture == "llama" else 0
            ends = ("weight", "bias") if biases and stored in ("attn_q", "attn_k", "attn_v") else ("weight",)
            for end in ends:
                values = rng.normal(size=shape if end == "weight" else shape[:1]).astype(np.float32)
                add(f"blk.{layer}.{stored}.{end}", f"model.layers.{layer}.{name}.{end}", values, heads)
    add("output_norm.weight", "model.norm.weight", np.ones(HIDDEN, np.float32))
    for stored in extra:
        writer.add_tensor(stored, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


KINDS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names_and_values(architecture, kind, tmp_path):
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path, architecture, kind, biases=architecture != "qwen3")
    checkpoint = open_checkpoint(str(path))
    assert set(checkpoint.tensors) == set(expected)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16" if kind.name == "BF16" else "F16"}
    for name, values in expected.items():
        assert checkpoint.tensors[name].shape == values.shape, name
        got = checkpoint.rows(name, 0, len(values))
        np.testing.assert_array_equal(got, values.astype(got.dtype), name)
        np.testing.assert_array_equal(checkpoint.rows(name, 3, 9), values[3:9].astype(got.dtype), name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bloom"}, "architecture 'bloom' is not read"),
        ({"extra": ["blk.0.mystery.weight"]}, "tensor blk.0.mystery.weight is unknown"),
        ({"extra": ["strange.weight"]}, "tensor strange.weight is unknown"),
        ({"extra": ["rope_freqs.weight"]}, "rotary scaling"),
    ],
)
def test_what_cannot_be_told_exactly_is_refused(options, message, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("length", [0, 3, 20, 100, 700, 5000])
def test_cut_files_are_refused_in_one_line(length, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SourceError, match="not a whole GGUF file") as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_other_bytes_are_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(SourceError, match="not a whole GGUF file"):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_every_tensor_of_a_real_file_equals_transformers_own_reading(smollm2_gguf, smollm2):
    checkpoint = open_checkpoint(str(smollm2_gguf))
    expected = load_file(smollm2 / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        assert value.dtype == torch.float16
        np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value.numpy(), name)


def test_config_and_tokenizer_of_a_real_file(smollm2_gguf, smollm2, tmp_path):
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(str(smollm2_gguf))
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["hidden_size"] == 576 and config["tie_word_embeddings"] is True and config["dtype"] == "float16"
    checkpoint.write_companions(tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(smollm2)
    text = "The State of the Union is sound."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_folder_with_one_gguf_file_is_that_file(smollm2_gguf, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    assert open_checkpoint(str(tmp_path)).name == tmp_path.name
