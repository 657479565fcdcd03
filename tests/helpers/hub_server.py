"""A Hugging Face hub on this machine: models in folders, large files from a content server, uploads, and failures.

Its answers follow the real hub's API as huggingface_hub uses it. `Hub` holds the models and controls how the server
misbehaves; every request is logged. The content server is the same server under another host name.
"""

import base64
import contextlib
import functools
import gc
import hashlib
import io
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")  # kept in large-file storage; all else is in git
PIECE = 64 * 1024  # bytes sent at a time


@dataclass
class Hub:
    """`models` maps an id to its folder, or to (status, error code) if requests for it are refused."""

    folder: Path  # of models that are uploaded
    models: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)  # model -> its newest commit, COMMIT where there was no upload
    private: set = field(default_factory=set)  # what was created as private
    branches: set = field(default_factory=lambda: {"main"})  # of all models, with the same content
    log: list = field(default_factory=list)  # (method, path, Authorization, Range)
    sent: int = 0  # bytes of large files
    # the content server misbehaves:
    cut_after: list = field(default_factory=list)  # bytes after which each next answer is cut off
    refuse: list = field(default_factory=list)  # statuses that the next answers have
    replaced: dict = field(default_factory=dict)  # file name -> other content than the listing's
    reachable: int | None = None  # bytes of any large file: what is beyond is cut off
    ignores_range: bool = False
    pause: float = 0.0  # seconds before each piece
    # the hub misbehaves:
    broken: bool = False  # no file is served
    lists_sizes: bool = True
    uploads: dict = field(default_factory=dict)  # oid -> content
    read_only: bool = False
    port: int = 0
    server: ThreadingHTTPServer | None = None

    def files(self, model: str) -> dict[str, Path]:
        folder = self.models[model]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, model: str) -> str:
        return self.commits.get(model, COMMIT)

    def downloaded(self) -> set[str]:
        """Names of the files that were fetched."""
        got = (path for method, path, *_ in self.log if method == "GET" and ("/resolve/" in path or "/cdn/" in path))
        return {path.partition("?")[0].rpartition("/")[2] for path in got}

    def ranges(self) -> list[str]:
        """The ranges of large files that were requested."""
        return [asked for method, path, _, asked in self.log if method == "GET" and "/cdn/" in path]

    def stop(self) -> None:
        """Shut down, also for connections that are open."""
        huggingface_hub.utils.close_session()
        self.server.shutdown()
        self.server.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return sha256(path.read_bytes())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, computed once until the file changes."""
    found = path.stat()
    return _sha256_of(path, found.st_size, found.st_mtime_ns)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Finds the method for a path, and sends what it returns: (status, content, headers)."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    ROUTES = (
        (r"(?:GET|HEAD) /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "model_info"),
        (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        (r"GET /cdn/([^/]+/[^/]+)/(.+)", "content"),
        (r"GET /api/whoami-v2", "whoami"),
        (r"GET /api/models/([^/]+/[^/]+)/refs", "refs"),
        (r"POST /api/repos/create", "create"),
        (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        (r"POST /api/validate-yaml", "validate"),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        (r"PUT /lfs/(.+)", "store"),
        (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    )

    def handle_one(self) -> None:
        path, _, self.query = self.path.partition("?")
        asked = self.headers.get("Range")
        self.hub.log.append((self.command, self.path, self.headers.get("Authorization"), asked))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {unquote(path)}"):
                status, content, headers = getattr(self, name)(*match.groups())
                return self.send(status, content, headers)
        return self.send(404, b"", {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, content: bytes, headers: dict) -> None:
        cut, large = None, self.path.startswith("/cdn/") and status in (200, 206)
        if large and self.hub.cut_after:
            cut = self.hub.cut_after.pop(0)
        elif large and self.hub.reachable is not None:
            start = int(re.search(r"\d*(?=-)|$", self.headers.get("Range") or "")[0] or 0)
            cut = max(0, self.hub.reachable - start)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        content = content[:cut]
        with contextlib.suppress(ConnectionError):  # a client that had enough
            for start in range(0, len(content), PIECE):
                time.sleep(self.hub.pause)
                self.wfile.write(content[start : start + PIECE])
        self.hub.sent += len(content) * large
        self.close_connection = self.close_connection or cut is not None

    def json(self, value: object, status: int = 200) -> tuple:
        return status, json.dumps(value).encode(), {"Content-Type": "application/json"}

    def refused(self, model: str, revision: str | None) -> tuple | None:
        """The answer for a model or revision that does not exist, or that this client may not access."""
        folder = self.hub.models.get(model, (401, "RepoNotFound"))
        if isinstance(folder, tuple):
            return folder[0], b"{}", {"X-Error-Code": folder[1]}
        if revision not in (None, *self.hub.branches, self.hub.commit(model)):
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        return None

    def entry(self, name: str, path: Path) -> dict:
        """The listing entry of a file."""
        size = path.stat().st_size
        if not name.endswith(LARGE):
            return {"size": size, "oid": git_sha1(path.read_bytes())}
        return {"size": size, "oid": "0" * 40, "lfs": {"oid": sha256_of(path), "size": size, "pointerSize": 1}}

    def model_info(self, model: str, revision: str | None) -> tuple:
        if answer := self.refused(model, revision):
            return answer
        siblings = []
        for name, path in self.hub.files(model).items():
            sibling = {"rfilename": name}
            if "blobs=" in self.query and self.hub.lists_sizes:
                entry = self.entry(name, path)
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {"size": lfs["size"], "sha256": lfs["oid"], "pointerSize": 1}
            siblings.append(sibling)
        info = {"id": model, "sha": self.hub.commit(model), "siblings": siblings}
        readme = self.hub.models[model] / "README.md"
        if readme.is_file() and (license := re.search(r"^license: (\S+)$", readme.read_text(), re.MULTILINE)):
            info["cardData"] = {"license": license[1]}
        return self.json(info)

    def tree(self, model: str, revision: str, folder: str | None) -> tuple:
        """Files of a folder, with those of subfolders if requested; otherwise only the names of subfolders."""
        if answer := self.refused(model, revision):
            return answer
        start = f"{folder}/" if folder else ""
        files = {name: path for name, path in self.hub.files(model).items() if name.startswith(start)}
        if folder and not files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        folders = set()
        if "recursive=true" not in self.query.lower():
            folders = {start + name[len(start) :].partition("/")[0] for name in files} - files.keys()
            files = {name: path for name, path in files.items() if "/" not in name[len(start) :]}
        entries = [{"type": "file", "path": name, **self.entry(name, path)} for name, path in files.items()]
        return self.json(entries + [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders])

    def resolve(self, model: str, revision: str, name: str) -> tuple:
        if answer := self.refused(model, revision):
            return answer
        if self.hub.broken:
            return 500, b"", {}
        path = self.hub.files(model).get(name)
        headers = {"X-Repo-Commit": self.hub.commit(model)}
        if path is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound", **headers}
        if not name.endswith(LARGE):
            data = path.read_bytes()
            return 200, data, {"ETag": f'"{git_sha1(data)}"', **headers}
        linked = {"X-Linked-ETag": f'"{sha256_of(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        location = f"http://localhost:{self.hub.port}/cdn/{model}/{name}?signature=secret-of-the-address"
        return 302, b"", {"Location": location, **linked, **headers}

    def content(self, model: str, name: str) -> tuple:
        """The content server: ranges, and the ways in which such a server fails."""
        if self.hub.refuse:
            return self.hub.refuse.pop(0), b"", {}
        path, replaced = self.hub.files(model)[name], self.hub.replaced.get(name)
        size = path.stat().st_size if replaced is None else len(replaced)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        etag = {"ETag": f'"{sha256_of(path) if replaced is None else sha256(replaced)}"'}
        if not asked or self.hub.ignores_range:
            return 200, path.read_bytes() if replaced is None else replaced, etag
        start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
        if start >= size:
            return 416, b"", {"Content-Range": f"bytes */{size}"}
        with io.BytesIO(replaced) if replaced is not None else path.open("rb") as file:
            file.seek(start)
            return 206, file.read(stop - start), {"Content-Range": f"bytes {start}-{stop - 1}/{size}", **etag}

    def whoami(self) -> tuple:
        if self.headers.get("Authorization") is None or self.hub.read_only == "unknown":
            return 401, b"{}", {}
        return self.json({"name": "me", "type": "user", "orgs": []})

    def refs(self, model: str) -> tuple:
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.commit(model)}
        return self.json({"branches": [branch], "tags": [], "converts": []})

    def create(self) -> tuple:
        asked = json.loads(self.body)
        model = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.hub.read_only or self.headers.get("Authorization") is None:
            return 403, b'{"error": "You have no right to create a model under this namespace"}', {}
        if model in self.hub.models:
            return self.json({"error": "exists", "url": f"/{model}"}, 409)
        self.hub.models[model] = self.hub.folder / model.replace("/", "--")
        self.hub.models[model].mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(model)
        return self.json({"url": f"http://127.0.0.1:{self.hub.port}/{model}", "id": model, "name": model})

    def branch(self, model: str, name: str) -> tuple:
        status = 409 if name in self.hub.branches else 201
        self.hub.branches.add(name)
        return self.json({}, status)

    def preupload(self, model: str, revision: str) -> tuple:
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        large = {file["path"]: modes[file["path"].endswith(LARGE)] for file in files}
        return self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in large.items()]})

    def validate(self) -> tuple:
        return self.json({"errors": [], "warnings": []})

    def batch(self, model: str) -> tuple:
        href = f"http://127.0.0.1:{self.hub.port}/lfs/"
        objects = [
            {"oid": entry["oid"], "size": entry["size"], "actions": {"upload": {"href": href + entry["oid"]}}}
            for entry in json.loads(self.body)["objects"]
        ]
        return self.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> tuple:
        assert sha256(self.body) == oid
        self.hub.uploads[oid] = self.body
        return 200, b"", {}

    def commit(self, model: str, revision: str) -> tuple:
        if self.hub.read_only:
            return 403, b'{"error": "read only"}', {}
        folder = self.hub.models[model]
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "deletedFile":
                (folder / value["path"]).unlink()
            elif kind in ("file", "lfsFile"):
                data = base64.b64decode(value["content"]) if kind == "file" else self.hub.uploads[value["oid"]]
                (folder / value["path"]).parent.mkdir(exist_ok=True)
                (folder / value["path"]).write_bytes(data)
        oid = self.hub.commits[model] = git_sha1(self.body)
        url = f"http://127.0.0.1:{self.hub.port}/{model}/commit/{oid}"
        return self.json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


@contextlib.contextmanager
def serving(hub: Hub, cache: Path, monkeypatch):
    """Runs the server and points huggingface_hub to it, with a separate cache and quick retries."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.server, hub.port = server, server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    endpoint = f"http://127.0.0.1:{hub.port}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr("quantize8.sources.ranges.WAIT", 0.01)
    monkeypatch.setattr("quantize8.sources.ranges.MAX_WAIT", 0.05)
    monkeypatch.setitem(huggingface_hub.utils.http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setattr("quantize8.sources.fetch.cache_dir", lambda name: cache / name)
    huggingface_hub.utils.close_session()
    try:
        yield
    finally:
        gc.collect()  # ends the transfers of checkpoints that are gone
        for each in threading.enumerate():
            if each.name.startswith("fetch"):
                each.join(0.2)
        huggingface_hub.utils.close_session()
        server.shutdown()
        server.server_close()
        thread.join()
