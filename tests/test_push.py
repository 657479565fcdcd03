"""Artifacts on the hub: what is uploaded, what the card says, and that a download verifies and runs."""

import json
import shutil

import pytest
import yaml
from helpers.hub_server import COMMIT
from helpers.making import llama, word_tokenizer
from huggingface_hub import ModelCard, snapshot_download

from quantize8 import ArtifactError, OutputError, convert, push, run, verify
from quantize8.artifact.card import card
from quantize8.artifact.manifest import Manifest

TOKEN = "hf_averysecrettoken"
# huggingface_hub's own way of sending a body
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def card_of(hub, model: str) -> tuple[dict, str]:
    text = (hub.models[model] / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_converted_model_is_uploaded_whole_and_its_download_verifies_and_runs(hub, tmp_path, monkeypatch):
    word_tokenizer(hub.models["org/tiny"])
    done = convert("org/tiny", tmp_path / "out", stream=True, push_to_hub="me/tiny-int8", private=True, token=TOKEN)
    assert done.pushed.startswith("http") and hub.private == {"me/tiny-int8"}
    remote, files = hub.models["me/tiny-int8"], sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(path.name for path in remote.iterdir()) == sorted([*files, "README.md"])
    assert all((remote / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)
    copy = snapshot_download("me/tiny-int8", local_dir=tmp_path / "copy", token=TOKEN)
    assert verify(copy) == verify(snapshot_download("me/tiny-int8", token=TOKEN)).__class__(
        tmp_path / "copy", *list(vars(verify(tmp_path / "out")).values())[1:]
    )
    text = run("me/tiny-int8", "w1 w2", max_new_tokens=3, token=TOKEN).text
    assert text == run(str(tmp_path / "out"), "w1 w2", max_new_tokens=3).text
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in remote.iterdir())


def test_the_card_states_the_facts(hub, tmp_path):
    done = convert("org/tiny", tmp_path / "out", push_to_hub="me/tiny-int8", threshold=5.0, token=TOKEN)
    data, text = card_of(hub, "me/tiny-int8")
    assert data["base_model"] == "org/tiny" and data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-generation"
    assert {"quantize8", "int8", "8-bit", "bitsandbytes"} <= set(data["tags"])
    errors = [record.relative_error for record in done.errors.values()]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    for fact in (
        f"org/tiny at {COMMIT}",
        "llm-int8, threshold 5",
        "| calibration | none |",
        f"{done.manifest.source_bytes / 1e6:.1f} MB -> {size / 1e6:.1f} MB",
        f"{sum(errors) / len(errors):.4f} mean, {max(errors):.4f} maximum",
        "pip install transformers accelerate bitsandbytes",
        'AutoModelForCausalLM.from_pretrained("me/tiny-int8")',
        "quantize8 run me/tiny-int8",
    ):
        assert fact in text, fact
    assert ModelCard(text).data.base_model == "org/tiny" and max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"format": "compressed-tensors"}, ["vllm serve me/x", "| scheme | int-quantized |", "compressed-tensors`"]),
        ({"format": "bfloat16"}, ["| format | bfloat16 |", "pip install transformers accelerate`"]),
    ],
)
def test_the_card_of_other_formats(given, facts, hub, tmp_path):
    source = llama(tmp_path / "a | local `model`")
    convert(str(source), tmp_path / "out", push_to_hub="me/x", token=TOKEN, **given)
    data, text = card_of(hub, "me/x")
    assert "base_model" not in data and "license" not in data
    assert "a \\| local" in text and all(fact in text for fact in facts)
    assert ("relative error" in text) == (given["format"] != "bfloat16")


def test_the_card_of_a_gguf_names_its_file(tmp_path):
    (tmp_path / "x-Q8_0.gguf").write_bytes(bytes(2_000_000))
    manifest = Manifest("1.2.3", "gguf", {"id": "org/x", "revision": COMMIT}, {}, 4_000_000)
    manifest.headers = {"x-Q8_0.gguf": ""}
    text = card(tmp_path, manifest, "me/x-gguf", None)
    assert "llama-cli -m x-Q8_0.gguf" in text and "hf download me/x-gguf x-Q8_0.gguf" in text
    assert "4.0 MB -> 2.0 MB" in text and "license" not in text and "quantize8 run me/x-gguf" in text


def test_a_branch(hub, tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    push(tmp_path / "out", "me/x", revision="w8a8", token=TOKEN)
    push(tmp_path / "out", "me/x", revision="w8a8", token=TOKEN)
    assert hub.branches == {"main", "w8a8"} and any("/commit/w8a8" in path for _, path, *_ in hub.log)


def test_the_card_of_a_calibrated_artifact(hub, tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(60)))
    given = {"calibrate": tmp_path / "text", "outlier_columns": 3}
    convert(str(source), tmp_path / "out", push_to_hub="me/x", token=TOKEN, **given)
    assert "outlier columns: 3" in card_of(hub, "me/x")[1]
    verify(snapshot_download("me/x", token=TOKEN))
    assert run("me/x", "w1", max_new_tokens=2, mode="hybrid").tokens


def test_pushing_again_replaces_the_artifact_and_nothing_else(hub, tmp_path):
    source = str(llama(tmp_path / "source"))
    convert(source, tmp_path / "two", max_shard_size="20KB")
    convert(source, tmp_path / "one")
    first = push(tmp_path / "two", "me/x", token=TOKEN)
    assert first.files == verify(tmp_path / "two").files + 1 and first.nbytes > 20_000
    (hub.models["me/x"] / ".gitattributes").write_text("*.bin")
    push(tmp_path / "one", "me/x", token=TOKEN)
    there = {path.name for path in hub.models["me/x"].iterdir()}
    assert there == {path.name for path in (tmp_path / "one").iterdir()} | {"README.md", ".gitattributes"}
    for holds in ("quantize8.json", "model.safetensors"):  # a damaged artifact, and a model of somebody's
        shutil.rmtree(hub.models["me/x"])
        hub.models["me/x"].mkdir()
        (hub.models["me/x"] / holds).write_text("{}")
        hub.commits["me/x"] = holds[:1] * 40
        with pytest.raises((OutputError, ArtifactError)) as caught:
            push(tmp_path / "one", "me/x", token=TOKEN)
        assert "\n" not in str(caught.value) and (hub.models["me/x"] / holds).read_text() == "{}"


def test_what_is_no_whole_artifact_is_not_uploaded(hub, tmp_path):
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        push(tmp_path, "me/x", token=TOKEN)
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"generation_config\.json: missing"):
        push(tmp_path / "out", "me/x", token=TOKEN)
    assert "me/x" not in hub.models


@pytest.mark.parametrize(
    ("read_only", "repo", "token", "message"),
    [
        (True, "me/x", TOKEN, "refused by the hub"),
        ("unknown", "me/x", TOKEN, "refused by the hub"),
        (False, "me/x/y", TOKEN, "is not a valid model name"),
        (False, "a b", TOKEN, "is not a valid model name"),
        (False, "me/x", None, "uploading needs a token"),
        (False, "me/x", "hf_bad\ntoken", "upload failed"),
    ],
)
def test_uploads_that_are_refused(read_only, repo, token, message, hub, tmp_path):
    hub.read_only = read_only
    source = str(llama(tmp_path / "source"))
    with pytest.raises(OutputError, match=message) as caught:
        convert(source, tmp_path / "out", push_to_hub=repo, token=token)
    text = str(caught.value)
    assert "\n" not in text and "hf_bad" not in text and TOKEN not in text
    # what can be told beforehand is; an artifact that was made stays
    assert (tmp_path / "out").exists() == (read_only is True)


def test_a_hub_that_is_away(hub, tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    hub.stop()
    with pytest.raises(OutputError, match="upload failed"):
        push(tmp_path / "out", "me/x", token=TOKEN)


def test_a_card_beside_an_artifact_is_passed_by_and_anything_else_is_not(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("of the user's own")
    verify(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("")
    with pytest.raises(ArtifactError, match=r"notes\.md: is not part of the artifact"):
        verify(tmp_path / "out")
    assert "README.md" not in json.loads((tmp_path / "out" / "quantize8.json").read_text())["files"]
