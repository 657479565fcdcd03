"""convert --format gguf: from a checkpoint to one verified file, with codes copied unchanged."""

import numpy as np
import pytest
from blake3 import blake3
from gguf import GGUFReader
from helpers.gguf_files import WRITTEN, assemble, config_of, folder_of, multimodal, write_tokenizer
from safetensors.torch import load_file, save_file

from quantize8 import ArtifactError, OutputError, SourceError, WeightError, convert, verify
from quantize8.conversion.driver import Writer
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


def source_of(folder, family):
    """A model with its tokenizer beside it."""
    source = folder_of(folder / "source", config_of(family), tokenizer=False)
    write_tokenizer(folder / "tokenizer")
    for path in (folder / "tokenizer").iterdir():
        path.rename(source / path.name)
    return source


@pytest.fixture
def llama_gguf(tmp_path):
    return source_of(tmp_path, "llama")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_each_expert_has_its_place_its_digest_and_its_statistics(family, tmp_path):
    source = source_of(tmp_path, family)
    result = convert(str(source), tmp_path / "out", format="gguf")
    (path,) = (tmp_path / "out").glob("*.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    config, tensors = config_of(family), result.manifest.tensors
    experts, inner, hidden = (config[key] for key in ("num_local_experts", "intermediate_size", "hidden_size"))
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        tensor = stored[f"blk.1.ffn_{part}_exps.weight"]
        assert tensor.tensor_type.name == "Q8_0" and tuple(tensor.shape) == (*shape[::-1], experts)
        errors = set()
        for number in range(experts):
            record = tensors[f"blk.1.ffn_{part}_exps.weight[{number}]"]
            assert (record.dtype, record.shape) == ("Q8_0", shape)
            assert record.blake3 == blake3(np.ascontiguousarray(tensor.data[number])).hexdigest()
            assert 0 < record.quantized.relative_error < 0.01
            errors.add(record.quantized.source_blake3)
        assert len(errors) == experts
    assert stored["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert verify(tmp_path / "out").tensors == len(tensors) > len(stored)


@pytest.mark.parametrize("family", ["qwen3moe", "gpt-oss"])
def test_a_conversion_of_experts_goes_on_where_it_stopped(family, tmp_path, monkeypatch):
    source = source_of(tmp_path, family)
    convert(str(source), tmp_path / "whole", format="gguf")
    write, left = Writer.write, iter(range(30))

    def stopping(self, name, quantizer):
        if next(left, None) is None:
            raise OutputError("stopped")
        return write(self, name, quantizer)

    monkeypatch.setattr(Writer, "write", stopping)
    with pytest.raises(OutputError, match="stopped"):
        convert(str(source), tmp_path / "out", format="gguf", workers=1)
    monkeypatch.setattr(Writer, "write", write)
    assert convert(str(source), tmp_path / "out", format="gguf").resumed == 30
    for name in ("source-Q8_0.gguf", "quantize8.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_flipped_byte_in_an_expert_is_found(tmp_path):
    convert(str(source_of(tmp_path, "qwen3moe")), tmp_path / "out", format="gguf")
    (path,) = (tmp_path / "out").glob("*.gguf")
    content = bytearray(path.read_bytes())
    (tensor,) = (each for each in GGUFReader(path).tensors if each.name == "blk.1.ffn_up_exps.weight")
    content[tensor.data_offset + 2 * tensor.n_bytes // 4 + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"ffn_up_exps\.weight\[2\] changed"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3moe", "gpt-oss"])
def test_int8_experts_keep_their_codes(family, tmp_path):
    source = source_of(tmp_path, family)
    convert(str(source), tmp_path / "int8", format="compressed-tensors", scheme="w8a16")
    convert(str(tmp_path / "int8"), tmp_path / "gguf", format="gguf")
    verify(tmp_path / "gguf")
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    int8, base = open_checkpoint(str(tmp_path / "int8")), "model.layers.1.mlp.experts.2"
    joint = f"{base}.gate_up_proj.weight"
    for first, part in enumerate(("gate", "up")):
        name = joint if joint in int8.tensors else f"{base}.{part}_proj.weight"
        codes, _ = int8.int8_rows(name, 0, int8.tensors[name].shape[0])
        codes = codes[first::2] if name == joint else codes
        blocks = stored[f"blk.1.ffn_{part}_exps.weight"][2].reshape(len(codes), -1, 34)
        assert np.array_equal(blocks[:, :, 2:].reshape(codes.shape).view(np.int8), codes)


def test_the_language_model_alone_is_not_compared_with_a_source_that_sees_images(tmp_path):
    source = multimodal(tmp_path / "source", "model.language_model.", "model.")
    for path in (source / "tokenizer").iterdir():
        path.rename(source / path.name)
    result = convert(str(source), tmp_path / "out", format="gguf", check=True)
    assert result.check.skipped == "of Gemma3ForConditionalGeneration, only the language model is in GGUF"
    verify(tmp_path / "out")
    assert open_checkpoint(str(tmp_path / "out")).config["architectures"] == ["Gemma3ForCausalLM"]


def test_a_value_that_is_too_large_is_named_by_its_row(tmp_path):
    source = source_of(tmp_path, "gpt-oss")
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.experts.gate_up_proj"][3, 0, 7] = 1e8  # [E, K, N]; an odd row is the up projection's
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"experts\.3\.gate_up_proj\.weight row 7 holds a value too large"):
        convert(str(source), tmp_path / "out", format="gguf")


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
