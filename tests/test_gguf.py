"""Reading GGUF: the same names and values as in transformers, with llama.cpp's interleaving undone."""

import os

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from helpers.gguf_files import HIDDEN, VOCABULARY, TinyGguf
from safetensors.torch import load_file

from quantize8 import SourceError, convert
from quantize8.sources import open_checkpoint

KINDS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1")]
ALL = ("attn_q", "attn_k", "attn_v", "attn_output")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("architecture", "biased"), [("llama", ()), ("llama", ALL), ("qwen2", ALL[:3]), ("qwen3", ())])
def test_names_and_values(architecture, biased, kind, tmp_path):
    tiny = TinyGguf(architecture, kind, biased)
    tiny.write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert set(checkpoint.tensors) == set(tiny.expected)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16" if kind.name == "BF16" else "F16"}
    for name, values in tiny.expected.items():
        assert checkpoint.tensors[name].shape == values.shape, name
        for start, stop in ((0, len(values)), (3, 9), (13, 14), (5, 5), (7, len(values))):
            got = checkpoint.rows(name, start, stop)
            np.testing.assert_array_equal(got, values[start:stop].astype(got.dtype), f"{name} {start}..{stop}")


def edited(edit):
    """A tiny model with its fields or tensors changed."""
    tiny = TinyGguf()
    edit(tiny)
    return tiny


def one_more(name, shape=(HIDDEN,)):
    return lambda tiny: tiny.tensors.update({name: (np.ones(shape, np.float32), GGMLQuantizationType.F32)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (one_more("blk.0.mystery.weight"), "tensor blk.0.mystery.weight is unknown for llama"),
        (one_more("strange.weight"), "tensor strange.weight is unknown"),
        (one_more("blk.0.attn_norm.bias"), "tensor blk.0.attn_norm.bias is unknown"),
        (one_more("blk.2.attn_norm.weight"), "tensor blk.2.attn_norm.weight is unknown"),
        (one_more("rope_freqs.weight"), "rope_freqs.weight does not match any llama3 rotary scaling"),
        (one_more("rope_freqs.weight", (0,)), "rope_freqs.weight does not match any llama3 rotary scaling"),
        (one_more("blk.0.attn_q.bias"), "lacks blk.0.attn_k.bias"),
        (
            one_more("token_embd.weight", (VOCABULARY, 32)),
            r"token_embd.weight is \[32, 32\], but by the metadata \[32, 64\]",
        ),
        (
            one_more("blk.1.ffn_up.weight", (96, 96)),
            r"blk.1.ffn_up.weight is \[96, 96\], but by the metadata \[96, 64\]",
        ),
        (
            lambda tiny: tiny.tensors.update(
                {"output_norm.weight": (np.zeros((HIDDEN,), np.int32), GGMLQuantizationType.I32)}
            ),
            r"model.norm.weight \[64\] is stored as I32, which is not read",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(edit, message, tmp_path):
    edited(edit).write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert "\n" not in str(caught.value) and "tiny.gguf: " in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_q.weight",
        "blk.1.ffn_norm.weight",
        "blk.1.ffn_down.weight",
    ],
)
def test_the_first_tensor_that_is_absent_is_named(name, tmp_path):
    edited(lambda tiny: tiny.tensors.pop(name)).write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match=f"lacks {name}, which a llama with 2 layers has"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


def test_more_layers_than_there_are(tmp_path):
    edited(lambda tiny: tiny.fields.update({"llama.block_count": (5, GGUFValueType.UINT32)})).write(tmp_path / "x.gguf")
    with pytest.raises(SourceError, match=r"lacks blk\.2\.attn_norm\.weight, which a llama with 5 layers has"):
        open_checkpoint(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_a_family_has_besides(family, tmp_path):
    tiny = TinyGguf(family)
    name = {"qwen2": "blk.1.attn_k.bias", "qwen3": "blk.1.attn_k_norm.weight"}[family]
    del tiny.tensors[name]
    tiny.write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match=f"lacks {name}"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("length", [0, 3, 20, 100, 700, 5000])
def test_cut_files_are_refused_in_one_line(length, tmp_path):
    path = tmp_path / "tiny.gguf"
    TinyGguf().write(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SourceError, match="not a whole GGUF file") as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_refused_before_anything_behind_it_is_read(tmp_path):
    path = tmp_path / "tiny.gguf"
    TinyGguf("gemma4", biased=()).write(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"gemma4") + len("gemma4")])  # nothing else is there
    with pytest.raises(SourceError, match=r"architecture 'gemma4' is not read from GGUF \(only llama, qwen2, "):
        open_checkpoint(str(path))


def test_other_bytes_are_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(SourceError, match="not a whole GGUF file"):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    (path,) = TinyGguf().write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SourceError, match=r"model\.norm\.weight ends early; the file changed while it was read"):
        checkpoint.rows("model.norm.weight", 0, HIDDEN)


def test_every_tensor_of_a_real_file_equals_transformers_own_reading(smollm2_gguf, smollm2):
    checkpoint = open_checkpoint(str(smollm2_gguf))
    expected = load_file(smollm2 / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        assert value.dtype == torch.float16
        np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value.numpy(), name)


def test_the_header_of_a_real_file_equals_that_of_llama_cpps_reader(smollm2_gguf):
    header, reader = open_checkpoint(str(smollm2_gguf)).header, GGUFReader(smollm2_gguf)
    theirs = {name: entry for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.entries) == list(theirs) and header.data_offset == reader.data_offset
    for name, entry in theirs.items():
        assert header.value(name) == entry.contents(), name
    for tensor in reader.tensors:
        found = header.tensors[str(tensor.name)]
        assert (found.kind, found.offset, found.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))


def test_biases_of_a_llama_are_computed_with(tmp_path):
    """transformers' own reader drops them."""
    from transformers import AutoModelForCausalLM

    tiny = TinyGguf(biased=(*ALL, "ffn_gate", "ffn_up", "ffn_down"))
    tiny.write(tmp_path / "tiny.gguf")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", format="float16")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).state_dict()
    for name, values in tiny.expected.items():
        np.testing.assert_array_equal(state[name].numpy(), values.astype(np.float16), name)
