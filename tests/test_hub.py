"""The hub, as a small server on this machine: what is asked of it, what is downloaded, and how failures read."""

import pytest
from hub_server import COMMIT

from quantize8 import SourceError, convert
from quantize8.checkpoint import open_checkpoint
from quantize8.checkpoint.hub import needed_files

TOKEN = "hf_averysecrettoken"


def test_a_model_is_opened_by_its_id_with_only_the_files_it_needs(hub, tmp_path):
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.identity == {"id": "org/tiny", "revision": COMMIT} and checkpoint.name == "tiny"
    assert hub.downloaded() == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    local = open_checkpoint(str(hub.models["org/tiny"]))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: info.shape for name, info in local.tensors.items()
    }


def test_the_manifest_names_the_commit_and_the_artifact_equals_the_local_one(hub, tmp_path):
    remote = convert("org/tiny", tmp_path / "remote", token=TOKEN)
    local = convert(str(hub.models["org/tiny"]), tmp_path / "local")
    assert remote.manifest.source == {"id": "org/tiny", "revision": COMMIT}
    assert remote.manifest.tensors == local.manifest.tensors
    assert ("remote" in str(remote.out)) and (tmp_path / "remote" / "tokenizer.json").is_file()
    assert all(sent == f"Bearer {TOKEN}" for _, path, sent, _ in hub.log if path.startswith("/api/"))
    written = b"".join(path.read_bytes() for path in (tmp_path / "remote").iterdir())
    assert TOKEN.encode() not in written


def test_the_cache_serves_when_the_hub_is_away(hub):
    open_checkpoint("org/tiny")
    hub.stop()
    assert open_checkpoint("org/tiny").identity["revision"] == COMMIT


def test_without_a_hub_and_without_a_copy(hub):
    hub.stop()
    with pytest.raises(SourceError, match="cannot be reached and the model is not in the cache"):
        open_checkpoint("org/tiny")


@pytest.mark.parametrize(
    ("model", "answer", "message"),
    [
        ("org/nothing", None, "no such folder here and no such model on the hub"),
        ("org/gated", (403, "GatedRepo"), "gated; ask for access"),
        ("org/hidden", (401, "RepoNotFound"), "no such model on the hub"),
        ("org/broken", (500, "Oops"), "download failed"),
    ],
)
def test_models_that_cannot_be_had(hub, model, answer, message):
    if answer:
        hub.models[model] = answer
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(model, token=TOKEN)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_revision(hub):
    with pytest.raises(SourceError, match="has no revision 'v9'"):
        open_checkpoint("org/tiny", revision="v9")


def test_a_download_that_breaks(hub):
    hub.broken = True
    with pytest.raises(SourceError, match="org/tiny") as caught:
        open_checkpoint("org/tiny")
    assert "\n" not in str(caught.value)


def test_a_model_without_weights(hub, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.models["org/bare"] = tmp_path / "bare"
    with pytest.raises(SourceError, match="holds no safetensors"):
        open_checkpoint("org/bare")


@pytest.mark.parametrize("name", ["a b", "-x/y", "x/..", "a" * 200])
def test_what_is_no_hub_id(hub, name):
    with pytest.raises(SourceError, match="no such"):
        open_checkpoint(name)


@pytest.mark.parametrize(
    ("names", "weights", "small"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["model.safetensors"], ["config.json"]),
        (["pytorch_model.bin", "config.json", "vocab.txt"], ["pytorch_model.bin"], ["config.json", "vocab.txt"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"], []),
        (["a.safetensors", "b.safetensors", "x/c.safetensors"], ["a.safetensors", "b.safetensors"], []),
        (["pytorch_model-00001-of-00002.bin", "tf_model.h5"], ["pytorch_model-00001-of-00002.bin"], []),
        (
            ["model.safetensors", "1_Pooling/config.json", "onnx/config.json", "LICENSE", "README.md"],
            ["model.safetensors"],
            ["1_Pooling/config.json", "LICENSE"],
        ),
        (["x.gguf", "quantize8.json"], ["x.gguf"], ["quantize8.json"]),
        (["x.gguf", "y.gguf"], [], []),
        (["README.md", "config.json"], [], ["config.json"]),
    ],
)
def test_needed_files(names, weights, small):
    assert needed_files(names) == (weights, small)
