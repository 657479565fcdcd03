"""Verifying: a sound artifact passes; any changed byte and any missing or foreign file is found and named."""

import json
import random
import shutil

import numpy as np
import pytest
from helpers.making import llama

from quantize8 import ArtifactError, convert, verify
from quantize8.artifact.manifest import Manifest, TensorRecord, digest, read_manifest
from quantize8.sources.safetensors import read_header


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    source = llama(folder / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    convert(str(source), folder / "out", max_shard_size="10KB")
    return folder / "out"


@pytest.fixture
def artifact(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "artifact")


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_sound_artifact_passes_and_every_byte_is_counted(sound):
    result = verify(sound)
    others = sum(path.stat().st_size for path in sound.iterdir() if path.name != "quantize8.json")
    assert result.nbytes == others and result.files == len(list(sound.iterdir())) - 1


def test_the_real_artifact_passes(smollm2_int8):
    assert verify(smollm2_int8).tensors == 692


def test_any_flipped_bit_is_found(artifact):
    """Random bits of every file: weights, headers, config, tokenizer, index and manifest."""
    rng = random.Random(0)
    files = sorted(path for path in artifact.iterdir())
    for trial in range(120):
        path = files[trial % len(files)]
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        with pytest.raises(ArtifactError):
            verify(artifact)
        flip(path, position, bit)
    verify(artifact)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-*", "quantize8.json"])
def test_a_missing_file_is_named(artifact, name):
    (path,) = artifact.glob(name)
    path.unlink()
    with pytest.raises(ArtifactError, match=path.name):
        verify(artifact)


def test_a_foreign_file_is_named(artifact):
    (artifact / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"extra\.safetensors: is not part"):
        verify(artifact)


def test_a_truncated_weight_file_is_named(artifact):
    path = next(artifact.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=path.name):
        verify(artifact)


def forge(artifact, change) -> None:
    """Change a manifest and give it a digest that fits, as someone who knows the format could."""
    manifest = read_manifest(artifact)
    change(manifest)
    (artifact / "quantize8.json").write_bytes(manifest.to_bytes())


def patch(artifact, name, values, place=0) -> None:
    """Overwrite bytes of a tensor and forge its digest."""
    manifest = read_manifest(artifact)
    path = artifact / manifest.tensors[name].file
    header, start = read_header(path)
    begin, end = header[name]["data_offsets"]
    data = bytearray(path.read_bytes())
    place += start + begin
    data[place : place + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    forge(
        artifact, lambda manifest: setattr(manifest.tensors[name], "blake3", digest(data[start + begin : start + end]))
    )


def test_codes_and_scales_that_quantizing_never_gives_are_found_under_a_fitting_digest(artifact):
    module = "model.layers.0.self_attn.q_proj"
    row = 32  # the second; the first is a zero row
    patch(artifact, f"{module}.weight", np.array([-128], np.int8), row)
    with pytest.raises(ArtifactError, match="codes that quantization never produces"):
        verify(artifact)
    patch(artifact, f"{module}.weight", np.array([1], np.int8), row)
    verify(artifact)
    patch(artifact, f"{module}.weight", np.array([1], np.int8))
    with pytest.raises(ArtifactError, match="codes that quantization never produces"):
        verify(artifact)
    for bad in (np.nan, -1.0, np.inf):
        patch(artifact, f"{module}.SCB", np.array([bad], np.float32))
        with pytest.raises(ArtifactError, match="scale is negative, NaN or infinite"):
            verify(artifact)


def test_records_and_config_must_agree_with_the_files(artifact):
    def rename(manifest: Manifest) -> None:
        manifest.tensors["other"] = manifest.tensors.pop("model.norm.weight")

    forge(artifact, rename)
    with pytest.raises(ArtifactError, match="do not contain the tensors"):
        verify(artifact)


def test_a_record_with_another_dtype_is_found(artifact):
    def retype(manifest: Manifest) -> None:
        record = manifest.tensors["model.norm.weight"]
        manifest.tensors["model.norm.weight"] = TensorRecord(record.file, "BF16", record.shape, record.blake3)

    forge(artifact, retype)
    with pytest.raises(ArtifactError, match="its file, dtype or shape differs from its record"):
        verify(artifact)


def test_a_record_that_calls_another_tensor_quantized_is_found(artifact):
    def mark(manifest: Manifest) -> None:
        manifest.tensors["model.norm.weight"].quantized = manifest.tensors[
            "model.layers.0.mlp.up_proj.weight"
        ].quantized

    forge(artifact, mark)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is not quantized as quantize8.json says"):
        verify(artifact)


def test_a_threshold_unlike_the_recipes_is_found(artifact):
    forge(artifact, lambda manifest: manifest.recipe.update(threshold=3.0))
    with pytest.raises(ArtifactError, match="does not match the format and recipe"):
        verify(artifact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not readable"),
        (b"[1]", "no JSON object"),
        (b"{}", "not readable"),
        (json.dumps({"format_version": 99}).encode(), "another version"),
        (b"[" * 100_000, "not readable"),
    ],
)
def test_manifests_that_are_none_are_refused(artifact, content, message):
    (artifact / "quantize8.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        verify(artifact)
