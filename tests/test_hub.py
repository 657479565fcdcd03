"""The hub, as a small server on this machine: what is asked of it, what is downloaded, and how failures read."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub.constants
import pytest
from making import llama

from quantize8 import SourceError, convert
from quantize8.checkpoint import open_checkpoint
from quantize8.checkpoint.hub import needed_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_averysecrettoken"


class Hub(BaseHTTPRequestHandler):
    """Models in folders: `models` maps an id to a folder, or to (status, error code) for one that is refused."""

    protocol_version = "HTTP/1.1"
    models: ClassVar[dict] = {}
    log: ClassVar[list] = []
    break_downloads = False

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        self.log.append((self.command, self.path, self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            model, revision = match.groups()
            folder = self.models.get(model, (401, "RepoNotFound"))
            if isinstance(folder, tuple):
                return self.send(folder[0], b"{}", {"X-Error-Code": folder[1]}, body)
            if revision not in (None, "main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            info = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(?:\?.*)?", self.path):
            folder = self.models[match[1]]
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            data = (self.models[match[1]] / match[3]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if self.break_downloads and body:
                return self.send(500, b"", {}, body)
            return self.send(200, data, headers, body)
        return self.send(404, b"", {}, body)

    def send(self, status: int, data: bytes, headers: dict, body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, org/tiny, which also has files that nobody needs; the handler class."""
    model = llama(tmp_path / "served", shards=2)
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("about")
    (model / "pytorch_model.bin").write_bytes(b"never asked for")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.safetensors").write_bytes(b"never asked for")
    monkeypatch.setattr(Hub, "models", {"org/tiny": model})
    monkeypatch.setattr(Hub, "log", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    huggingface_hub.utils.close_session()
    Hub.server_handle = server
    yield Hub
    huggingface_hub.utils.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def downloaded(hub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path}


def test_a_model_is_opened_by_its_id_with_only_the_files_it_needs(hub, tmp_path):
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.identity == {"id": "org/tiny", "revision": COMMIT} and checkpoint.name == "tiny"
    assert downloaded(hub) == {
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
    assert all(sent == f"Bearer {TOKEN}" for _, path, sent in hub.log if path.startswith("/api/"))
    written = b"".join(path.read_bytes() for path in (tmp_path / "remote").iterdir())
    assert TOKEN.encode() not in written


def test_the_cache_serves_when_the_hub_is_away(hub):
    open_checkpoint("org/tiny")
    hub.server_handle.shutdown()
    hub.server_handle.server_close()
    assert open_checkpoint("org/tiny").identity["revision"] == COMMIT


def test_without_a_hub_and_without_a_copy(hub):
    hub.server_handle.shutdown()
    hub.server_handle.server_close()
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


def test_a_download_that_breaks(hub, monkeypatch):
    monkeypatch.setattr(hub, "break_downloads", True)
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
    ("names", "needed"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "config.json", "vocab.txt"], ["config.json", "pytorch_model.bin", "vocab.txt"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["a.safetensors", "b.safetensors", "x/c.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["pytorch_model-00001-of-00002.bin", "tf_model.h5"], ["pytorch_model-00001-of-00002.bin"]),
        (
            ["model.safetensors", "1_Pooling/config.json", "onnx/config.json", "LICENSE", "README.md"],
            ["1_Pooling/config.json", "LICENSE", "model.safetensors"],
        ),
        (["README.md", "config.json"], []),
    ],
)
def test_needed_files(names, needed):
    assert needed_files(names) == needed
