"""Downloads that go on where they stopped, and whose content is what the hub promised.

huggingface_hub keeps nothing of a file whose download was cut off by the end of the process, and compares no digests.
So weight files come through `ordered` into the place that its cache has for them, and are hashed on the way; the rest,
and the links of the snapshot, are huggingface_hub's. A file that another tool put there is hashed once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from quantize8.checkpoint import hub, ordered
from quantize8.checkpoint.ordered import OrderedFile, Transfers
from quantize8.checkpoint.ranges import HubFile
from quantize8.errors import SourceError
from quantize8.files import flush
from quantize8.resources import cache_dir

_PARTIAL = ".quantize8.incomplete"  # the ending by which the hub's own tools know what is not whole


def download(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    """A snapshot of a hub model with its weights in one format: (folder, commit). Uses the cache when offline."""
    try:
        listing = hub.find(repo_id, revision, token)
    except hub.OfflineError:
        folder = hub.cached(repo_id, revision)
        return folder, folder.name
    missing = _missing(repo_id, listing.weights.values())
    if missing:
        _fetch_all(missing, repo_id)
    folder = hub.snapshot(listing, [*listing.weights, *listing.small])
    for name, file in listing.weights.items():
        _check(file, folder / name)
    return folder, listing.commit


def is_stored(repo_id: str, revision: str | None, token: str | None) -> bool:
    """Whether reading a model downloads nothing large, or it cannot be streamed."""
    try:
        weights = hub.find(repo_id, revision, token).weights
    except hub.OfflineError:
        return True
    return not _missing(repo_id, weights.values()) or not any(name.endswith(".safetensors") for name in weights)


def _missing(repo_id: str, files: Iterable[HubFile]) -> dict[Path, HubFile]:
    """Weight files that are not in the cache, by the place where they would be."""
    wanted = {_blob(repo_id, file.digest.value): file for file in files if file.digest and file.digest.kind == "sha256"}
    return {blob: file for blob, file in wanted.items() if not blob.exists()}


def _fetch_all(missing: dict[Path, HubFile], title: str) -> None:
    """Bring files into the cache, one after the other, with the progress bar of all downloads from the hub."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, not marked

    transfers, total = Transfers(), sum(file.size for file in missing.values())
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:  # type: ignore[no-untyped-call]
            for blob, file in missing.items():
                _fetch(file, blob, transfers, bar.update)
    finally:
        transfers.close()


def _blob(repo_id: str, sha256: str) -> Path:
    """Where the hub's cache has the content of a large file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "blobs" / sha256


def _lock_of(blob: Path) -> Path:
    """The file by which huggingface_hub keeps other processes from a blob."""
    cache, folder = blob.parents[2], blob.parents[1].name
    return cache / ".locks" / folder / f"{blob.name}.lock"


def _fetch(file: HubFile, blob: Path, transfers: Transfers, advance: Callable[[int], object]) -> None:
    """Bring a file into the cache, from where an earlier try stopped."""
    partial, lock = blob.with_name(blob.name + _PARTIAL), _lock_of(blob)
    try:
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # a second process waits here, and finds the file whole
            if blob.exists():
                return partial.unlink(missing_ok=True)
            with partial.open("a+b") as target:
                remote = _go_on(file, target, transfers, advance)
            try:
                remote.confirm()
            except SourceError:
                partial.unlink()
                raise
            flush(partial)
            partial.replace(blob)
    except OSError as error:
        raise SourceError(f"{file.where}: cannot be stored ({error.strerror}) in {blob.parent}; fix that") from None
    _mark(file, blob)


def _go_on(file: HubFile, target: BinaryIO, transfers: Transfers, advance: Callable[[int], object]) -> OrderedFile:
    """Append what is missing, in whole chunks; returns what knows whether all of it has the promised digest."""
    remote, chunk = OrderedFile(file, transfers), ordered.CHUNK
    here = min(os.fstat(target.fileno()).st_size, file.size) // chunk
    target.truncate(here * chunk)
    advance(here * chunk)
    target.seek(0)
    for _ in range(here):
        remote.supply(bytearray(target.read(chunk)))
    for number in range(here, remote.count):
        data = bytearray(min(chunk, file.size - number * chunk))
        remote.read_into(memoryview(data), number * chunk)
        target.write(data)
        advance(len(data))
    return remote


def _check(file: HubFile, path: Path) -> None:
    """Refuse a stored file that has not the promised digest; one that was found good is not hashed again."""
    if file.digest is None or _marker(file, path).exists():
        return
    begin = b"" if file.digest.kind == "sha256" else b"blob %d\0" % path.stat().st_size
    content = hashlib.new(file.digest.kind.removeprefix("git-"), begin, usedforsecurity=False)
    with path.open("rb") as source:
        while block := source.read(ordered.CHUNK):
            content.update(block)
    if content.hexdigest() != file.digest.value:
        where = f"{file.where}: its copy at {path.resolve()}"
        raise SourceError(f"{where} has not the {file.digest.kind} that the hub lists; remove it and run again")
    _mark(file, path)


def _mark(file: HubFile, path: Path) -> None:
    marker = _marker(file, path)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # hashed again the next time


def _marker(file: HubFile, path: Path) -> Path:
    """An empty file: its name tells the content, the file that was found to have it, and when that was written."""
    assert file.digest is not None
    found = path.resolve().stat()
    return cache_dir("checked") / f"{file.digest.value}-{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
