"""Downloads that resume where they stopped, and whose content is verified against the hub's digests.

huggingface_hub discards a partial file when its process ends, and compares no digests. So weight files are downloaded
by `ordered` to their place in its cache, and hashed on the way. huggingface_hub downloads the other files and makes
the links of the snapshot. A file that another tool has put in the cache is hashed once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from quantize8.errors import SourceError
from quantize8.files import cache_dir, flush
from quantize8.sources import hub, ordered
from quantize8.sources.ordered import OrderedFile, Transfers
from quantize8.sources.ranges import HubFile

_PARTIAL = ".quantize8.incomplete"  # the suffix by which the hub's own tools recognize partial files


def download(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download a hub model with its weights in one format, or take it from the cache when offline.

    Args:
        repo_id: The id of the model.
        revision: A branch, tag or commit; None for the main branch.
        token: A hub token; None for the stored one.

    Returns:
        The folder of the snapshot in the hub's cache, and the commit.

    Raises:
        SourceError: The model cannot be downloaded, or its content does not have the hub's digest.
    """
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
    """Whether a model should be read from disk: its weights are in the cache already, or it cannot be streamed."""
    try:
        weights = hub.find(repo_id, revision, token).weights
    except hub.OfflineError:
        return True
    return not _missing(repo_id, weights.values()) or not any(name.endswith(".safetensors") for name in weights)


def _missing(repo_id: str, files: Iterable[HubFile]) -> dict[Path, HubFile]:
    """The weight files that are not in the cache, by the path that they would have there."""
    wanted = {_blob(repo_id, file.digest.value): file for file in files if file.digest and file.digest.kind == "sha256"}
    return {blob: file for blob, file in wanted.items() if not blob.exists()}


def _fetch_all(missing: dict[Path, HubFile], title: str) -> None:
    """Download files to the cache one by one, with the progress bar of all downloads from the hub."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, not marked

    transfers, total = Transfers(), sum(file.size for file in missing.values())
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:  # type: ignore[no-untyped-call]
            for blob, file in missing.items():
                _fetch(file, blob, transfers, bar.update)
    finally:
        transfers.close()


def _blob(repo_id: str, sha256: str) -> Path:
    """The path of a large file's content in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "blobs" / sha256


def _lock_of(blob: Path) -> Path:
    """The file with which huggingface_hub locks a blob against other processes."""
    cache, folder = blob.parents[2], blob.parents[1].name
    return cache / ".locks" / folder / f"{blob.name}.lock"


def _fetch(file: HubFile, blob: Path, transfers: Transfers, advance: Callable[[int], object]) -> None:
    """Download a file to the cache, resuming an earlier attempt."""
    partial, lock = blob.with_name(blob.name + _PARTIAL), _lock_of(blob)
    try:
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # a second process waits here, and then finds the complete file
            if blob.exists():
                return partial.unlink(missing_ok=True)
            with partial.open("a+b") as target:
                remote = _resume(file, target, transfers, advance)
            try:
                remote.confirm()
            except SourceError:
                partial.unlink()
                raise
            flush(partial)
            partial.replace(blob)
    except OSError as error:
        raise SourceError(
            f"{file.where}: cannot be stored in {blob.parent} ({error.strerror}); fix that and run it again"
        ) from None
    _mark(file, blob)


def _resume(file: HubFile, target: BinaryIO, transfers: Transfers, advance: Callable[[int], object]) -> OrderedFile:
    """Append the missing chunks to `target`; return the remote file, which can `confirm` the digest of the whole."""
    remote, chunk = OrderedFile(file, transfers), ordered.CHUNK
    present = min(os.fstat(target.fileno()).st_size, file.size) // chunk  # whole chunks
    target.truncate(present * chunk)
    advance(present * chunk)
    target.seek(0)
    for _ in range(present):
        remote.supply(bytearray(target.read(chunk)))
    for number in range(present, remote.count):
        data = bytearray(min(chunk, file.size - number * chunk))
        remote.read_into(memoryview(data), number * chunk)
        target.write(data)
        advance(len(data))
    return remote


def _check(file: HubFile, path: Path) -> None:
    """Raise SourceError if a cached file does not have the hub's digest; a file that passed is not hashed again."""
    if file.digest is None or _marker(file, path).exists():
        return
    begin = b"" if file.digest.kind == "sha256" else b"blob %d\0" % path.stat().st_size
    content = hashlib.new(file.digest.kind.removeprefix("git-"), begin, usedforsecurity=False)
    with path.open("rb") as source:
        while block := source.read(ordered.CHUNK):
            content.update(block)
    if content.hexdigest() != file.digest.value:
        where = f"{file.where}: its copy at {path.resolve()}"
        raise SourceError(f"{where} does not have the {file.digest.kind} that the hub lists; remove it and run again")
    _mark(file, path)


def _mark(file: HubFile, path: Path) -> None:
    marker = _marker(file, path)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # the file is hashed again next time


def _marker(file: HubFile, path: Path) -> Path:
    """The empty file that records a passed check; its name holds the digest, and the inode, size and time of `path`."""
    assert file.digest is not None
    status = path.resolve().stat()
    return cache_dir("checked") / f"{file.digest.value}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
