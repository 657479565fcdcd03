"""convert --format gguf: from a checkpoint to one verified file, with codes copied unchanged."""

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.gguf_files import WRITTEN, assemble, config_of, folder_of, write_tokenizer

from quantize8 import ArtifactError, OutputError, SourceError, convert, verify
from quantize8.formats.gguf import architectures as gguf
from quantize8.formats.gguf.tokenizer import tokenizer_fields
from quantize8.sources import open_checkpoint


@pytest.mark.parametrize("family", sorted(WRITTEN))
def test_convert_writes_what_the_parts_give(family, tmp_path):
    """From a float source to one file, equal to the parts assembled by hand, and verified."""
    source = folder_of(tmp_path / "source", config_of(family), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    if family == "qwen2":  # transformers puts one of its own in the place of any that a Qwen's folder holds
        with pytest.raises(SourceError, match="tokenizer"):
            convert(str(source), tmp_path / "out", format="gguf")
        return
    for workers in (1, 3):
        convert(str(source), tmp_path / f"out{workers}", format="gguf", workers=workers)
    path = tmp_path / "out1" / "source-Q8_0.gguf"
    assert path.read_bytes() == (tmp_path / "out3" / "source-Q8_0.gguf").read_bytes()
    assert {entry.name for entry in (tmp_path / "out1").iterdir()} == {"source-Q8_0.gguf", "quantize8.json"}
    verified = verify(tmp_path / "out1")
    assert verified.nbytes >= path.stat().st_size
    fields = [*gguf.settings(config_of(family), "source", "source"), *tokenizer_fields(source, config_of(family))]
    assemble(source, tmp_path / "hand.gguf", fields)
    assert path.read_bytes() == (tmp_path / "hand.gguf").read_bytes()


@pytest.fixture
def llama_gguf(tmp_path):
    folder_of(tmp_path / "source", config_of("llama"), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    return tmp_path / "source"


@pytest.mark.parametrize("first", ["bitsandbytes", "compressed-tensors"])
def test_an_int8_artifact_keeps_its_codes_in_gguf(first, llama_gguf, tmp_path):
    convert(str(llama_gguf), tmp_path / "int8", format=first)
    convert(str(tmp_path / "int8"), tmp_path / "gguf", format="gguf")
    verify(tmp_path / "gguf")
    int8, back = (open_checkpoint(str(tmp_path / name)) for name in ("int8", "gguf"))
    stored = {str(tensor.name): tensor.data for tensor in GGUFReader(back.path).tensors}
    name = "model.layers.1.self_attn.k_proj.weight"
    codes, absmax = int8.int8_rows(name, 0, int8.tensors[name].shape[0])
    blocks = stored["blk.1.attn_k.weight"].reshape(len(codes), -1, 34)
    order = back._row_order(name, 0, len(codes))  # where each row stands in the file
    assert np.array_equal(blocks[order][:, :, 2:].reshape(codes.shape).view(np.int8), codes)
    scales = np.ascontiguousarray(blocks[order][:, :, :2]).view(np.float16)[:, :, 0]
    assert (scales == (absmax / np.float32(127)).astype(np.float16)[:, None]).all()
    convert(str(tmp_path / "gguf"), tmp_path / "back")
    again = open_checkpoint(str(tmp_path / "back"))
    for weight in int8.decoded:
        rows = int8.tensors[weight].shape[0]
        assert np.array_equal(int8.int8_rows(weight, 0, rows)[0], again.int8_rows(weight, 0, rows)[0]), weight


def test_scaled_rotary_frequencies_are_verified_too(tmp_path):
    """They are in the file as a tensor, which no source in GGUF may have."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
    source = folder_of(tmp_path / "source", config_of("llama", rope_parameters=rope), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        path.rename(source / path.name)
    convert(str(source), tmp_path / "out", format="gguf")
    assert verify(tmp_path / "out").tensors == len(open_checkpoint(str(source)).tensors) + 1


def test_every_flipped_byte_of_a_gguf_file_is_found(llama_gguf, tmp_path):
    convert(str(llama_gguf), tmp_path / "out", format="gguf")
    path = tmp_path / "out" / "source-Q8_0.gguf"
    content = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(content), 40).tolist()
    for place in (0, 5, *places, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            verify(tmp_path / "out")
    path.write_bytes(content)
    verify(tmp_path / "out")
    path.write_bytes(content + bytes(32))
    (tmp_path / "out" / "more").write_text("x")
    with pytest.raises(ArtifactError, match="is not part of the artifact"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"), [({"threshold": 5.0}, "threshold 5: --format gguf"), ({"recipe": "int8"}, "recipe int8")]
)
def test_options_that_gguf_has_no_place_for(options, message, llama_gguf, tmp_path):
    with pytest.raises(OutputError, match=message):
        convert(str(llama_gguf), tmp_path / "out", format="gguf", **options)
