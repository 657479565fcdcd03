"""The hub, as a small server on this machine: which requests are made, what is downloaded, and error messages."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.hub_server import COMMIT

from quantize8 import SourceError, convert
from quantize8.sources import fetch, open_checkpoint, ordered
from quantize8.sources.hub import needed_files

TOKEN = "hf_averysecrettoken"
# huggingface_hub's own way of sending a body
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
new = hashlib.new


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
    with pytest.raises(SourceError, match="holds neither safetensors nor"):
        open_checkpoint("org/bare")


def test_models_in_gguf(hub, tmp_path):
    from helpers.gguf_files import TinyGguf

    (tmp_path / "several").mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        TinyGguf().write(tmp_path / "several" / name)
    hub.models["org/several"] = tmp_path / "several"
    with pytest.raises(SourceError, match="org/several: holds 2 models in GGUF; download one"):
        open_checkpoint("org/several")
    (tmp_path / "split").mkdir()
    parts = TinyGguf().write(tmp_path / "split" / "a.gguf", 8)
    hub.models["org/split"] = tmp_path / "split"
    checkpoint = open_checkpoint("org/split")
    assert set(checkpoint.fingerprint()) == {part.name for part in parts} and checkpoint.name == "split"


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
            ["model.safetensors", "1_Pooling/config.json", "onnx/config.json", "onnx/m.onnx", "LICENSE", "README.md"],
            ["model.safetensors"],
            ["1_Pooling/config.json", "LICENSE"],
        ),
        (
            ["model.safetensors", "2_Dense/pytorch_model.bin", "source.spm", "bpe.codes", "a/chat.jinja", "a/b/c.txt"],
            ["model.safetensors"],
            ["2_Dense/pytorch_model.bin", "a/chat.jinja", "bpe.codes", "source.spm"],
        ),
        (["x.gguf", "quantize8.json"], ["x.gguf"], ["quantize8.json"]),
        (["x.gguf", "y.gguf"], [], []),
        (["x-00002-of-00002.gguf", "x-00001-of-00002.gguf"], ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"], []),
        (["x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "y-00001-of-00002.gguf"], [], []),
        (["README.md", "config.json"], [], ["config.json"]),
    ],
)
def test_needed_files(names, weights, small):
    assert needed_files(names) == (weights, small)


WEIGHT = "model-00001-of-00002.safetensors"


def test_an_interrupted_download_goes_on_where_it_was(hub, monkeypatch):
    """The second run requests only the rest, and the resulting file is complete."""
    monkeypatch.setattr(ordered, "CHUNK", 5003)
    monkeypatch.setattr(ordered, "AHEAD", 2)
    size = (hub.models["org/tiny"] / WEIGHT).stat().st_size
    hub.reachable = 17_000
    with pytest.raises(SourceError, match="run it again when the connection is back"):
        open_checkpoint("org/tiny")
    time.sleep(0.1)  # the end of what was on its way
    hub.reachable, hub.sent = None, 0
    hub.log.clear()
    checkpoint = open_checkpoint("org/tiny")
    other = (hub.models["org/tiny"] / WEIGHT.replace("1-of", "2-of")).stat().st_size
    assert hub.sent == size + other - 3 * 5003 and "bytes=15009-20011" in hub.ranges()[:2]
    assert all(
        (checkpoint.folder / path.name).read_bytes() == path.read_bytes()
        for path in hub.models["org/tiny"].glob("model-*")
    )
    hub.sent = 0
    open_checkpoint("org/tiny")
    assert hub.sent == 0  # all of it is in the cache


def test_who_downloads_the_same_waits_and_fetches_nothing(hub, tmp_path):
    """The lock is huggingface_hub's own, so that other tools wait, too."""
    sizes = sum(path.stat().st_size for path in hub.models["org/tiny"].glob("model-*"))
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: open_checkpoint("org/tiny").folder, range(3)))
    assert len(folders) == 1 and hub.sent == sizes
    locks = {path.stem for path in (tmp_path / "cache" / ".locks" / "models--org--tiny").glob("*.lock")}
    assert {path.resolve().name for path in folders.pop().glob("model-*.safetensors")} <= locks


def test_a_partial_file_that_is_damaged_is_forgotten(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(ordered, "CHUNK", 5003)
    monkeypatch.setattr(ordered, "AHEAD", 2)
    hub.reachable = 11_000
    with pytest.raises(SourceError):
        open_checkpoint("org/tiny")
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    partial.write_bytes(b"x" * 7000)  # a whole chunk, and the beginning of one
    hub.reachable = None
    with pytest.raises(SourceError, match=f"{WEIGHT}: its content does not have the sha256"):
        open_checkpoint("org/tiny")
    assert not partial.exists()
    assert open_checkpoint("org/tiny").tensors


def test_a_download_with_other_content_is_refused(hub, tmp_path):
    data = bytearray((hub.models["org/tiny"] / WEIGHT).read_bytes())
    data[-1] ^= 1
    hub.replaced[WEIGHT] = bytes(data)
    with pytest.raises(SourceError, match=f"{WEIGHT}: its content does not have the sha256 that the hub lists"):
        convert("org/tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").rglob("*.incomplete"))


def test_what_another_tool_downloaded_is_hashed_once(hub, tmp_path, monkeypatch):
    folder = open_checkpoint("org/tiny").folder
    for marker in (tmp_path / "cache" / "checked").iterdir():
        marker.unlink()
    hashed = []
    monkeypatch.setattr(fetch.hashlib, "new", lambda *given, **named: hashed.append(given) or new(*given, **named))
    open_checkpoint("org/tiny")
    open_checkpoint("org/tiny")
    assert len(hashed) == 2
    weight = (folder / WEIGHT).resolve()
    weight.write_bytes(weight.read_bytes()[:-1] + b"x")
    with pytest.raises(SourceError, match="does not have the sha256 that the hub lists; remove it"):
        open_checkpoint("org/tiny")


def test_a_small_weight_file_in_git_is_compared_too(hub, monkeypatch):
    monkeypatch.setattr("helpers.hub_server.LARGE", (".bin",))
    folder = open_checkpoint("org/tiny").folder
    weight = (folder / WEIGHT).resolve()
    weight.write_bytes(weight.read_bytes()[:-1] + b"x")
    with pytest.raises(SourceError, match="does not have the git-sha1 that the hub lists; remove it"):
        open_checkpoint("org/tiny")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", ["argument", "environment", "saved"])
def test_a_token_that_cannot_be_sent_is_not_shown(place, stream, hub, tmp_path, monkeypatch, capfd):
    """HTTP libraries quote a header with a line break; huggingface_hub strips line breaks only from tokens it finds."""
    secret = "hf_secret\nwith a line"
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", secret)
    elif place == "saved":
        (tmp_path / "token").write_text(secret)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SourceError) as caught:
        convert("org/nothing", tmp_path / "out", stream=stream, token=secret if place == "argument" else None)
    shown = "".join([str(caught.value), *capfd.readouterr()])
    assert "hf_secret" not in shown and "with a line" not in shown


def test_a_token_is_in_no_output(hub, tmp_path, monkeypatch, capfd):
    from quantize8 import cli

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for line in (
        ["convert", "org/tiny", "--stream", "--out", tmp_path / "a", "--push-to-hub", "me/a", "--json"],
        ["convert", "org/tiny", "--out", tmp_path / "b", "--token", TOKEN],
        ["push", tmp_path / "b", "me/b", "--token", TOKEN],
        ["push", tmp_path / "b", "me/b", "--private", "--json"],
        ["convert", "org/nothing", "--stream", "--token", TOKEN],
        ["push", tmp_path / "b", "org/tiny", "--token", TOKEN],
    ):
        monkeypatch.setattr("sys.argv", ["quantize8", *map(str, line)])
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code or line[-2] == "--token"
        output = "".join(capfd.readouterr())
        assert TOKEN not in output and output.strip()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in written)
