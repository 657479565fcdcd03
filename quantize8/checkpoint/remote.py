"""Safetensors that are never stored here: read by range from the hub, or from any store that fsspec has a driver for.

Small files (config, tokenizer, index) are fetched as they are. Of a weight file the header comes first, then the
tensors in the order of the file (see `ordered`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from quantize8 import limits
from quantize8.checkpoint import hub
from quantize8.checkpoint.address import HUB_SCHEME, file_system, reason, without_secrets
from quantize8.checkpoint.base import TensorInfo, read_config
from quantize8.checkpoint.ordered import OrderedFile, Transfers
from quantize8.checkpoint.ranges import FsspecFile, RemoteFile
from quantize8.checkpoint.safetensors import SafetensorsCheckpoint, open_files, read_header
from quantize8.errors import SourceError
from quantize8.files import is_url


class StreamedCheckpoint(SafetensorsCheckpoint):
    """A model whose small files are in `folder`, and whose weights are in `remote` files."""

    def __init__(
        self,
        folder: Path,
        files: list[str],
        identity: dict[str, str],
        name: str,
        *,
        remote: Mapping[str, RemoteFile],
    ) -> None:
        self._remote = remote
        self._transfers = Transfers()
        weakref.finalize(self, self._transfers.close)
        known = [file for file in files if file in remote]
        self._ordered: dict[str, OrderedFile] = {}
        try:
            self._heads = dict(zip(known, self._transfers.fetching.map(self._header, known), strict=True))
            super().__init__(folder, files, identity, name)
        except BaseException:
            self._transfers.close()
            raise

    @property
    def one_reader_a_file(self) -> bool:
        """See `Checkpoint.one_reader_a_file`."""
        return True

    def confirm(self, file: str | None = None) -> None:
        """See `Checkpoint.confirm`."""
        for name in self._ordered if file is None else [file]:
            self._ordered[name].confirm()

    @property
    def is_remote(self) -> bool:
        """See `Checkpoint.is_remote`."""
        return True

    def fingerprint(self) -> dict[str, list[Any]]:
        """See `Checkpoint.fingerprint`; a header tells as much as that of a stored file."""
        heads = {file: blake3(self._heads[file]).hexdigest() for file in self._ordered}
        return {file: [self._remote[file].size, 0, heads[file]] for file in sorted(heads)}

    def _fill(self, target: memoryview, info: TensorInfo, position: int) -> None:
        self._ordered[info.file].read_into(target, position)

    def _open(self, file: str) -> tuple[dict[str, Any], int]:
        """Have the library judge the header, on a file of the same size that holds nothing else, and takes no room."""
        if file not in self._heads:
            raise SourceError(f"{self.identity['id']}: {file} is missing; the checkpoint is incomplete")
        header, remote = self._heads[file], self._remote[file]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            try:
                path.write_bytes(header)
                os.truncate(path, remote.size)
            except OSError as error:
                raise SourceError(f"{folder}: cannot be written ({error.strerror}); set TMPDIR to a folder") from None
            found = read_header(path, remote.where)
        self._ordered[file] = OrderedFile(remote, self._transfers, header)
        return found

    def _header(self, file: str) -> bytes:
        """The first bytes of a file, up to the data."""
        remote = self._remote[file]
        start = bytes(remote.read(0, min(8, remote.size), self._transfers.ended))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(limits.HEADER_BYTES, remote.size - 8):
            raise SourceError(f"{remote.where}: not a whole safetensors file (a header of {length} bytes)")
        return start + bytes(remote.read(8, 8 + length, self._transfers.ended))


def open_stream(source: str, revision: str | None, token: str | None) -> StreamedCheckpoint:
    """Open a hub id or an address for reading by range. Raises SourceError or DependencyError, in one line."""
    if is_url(source) and not source.startswith(HUB_SCHEME):
        return _open_store(source)
    repo_id, _, at = source.removeprefix(HUB_SCHEME).removeprefix("models/").strip("/").partition("@")
    listing = hub.find(repo_id, revision or at or None, token)
    _check_kind(repo_id, [*listing.weights])
    folder = hub.snapshot(listing, listing.small)
    name, identity = repo_id.rpartition("/")[2], {"id": repo_id, "revision": listing.commit}
    return _open(folder, listing.weights, identity, name)


def _open(folder: Path, remote: Mapping[str, RemoteFile], identity: dict[str, str], name: str) -> StreamedCheckpoint:
    read_config(folder)
    checkpoint = open_files(folder, list(remote), identity, name, partial(StreamedCheckpoint, remote=remote))
    assert isinstance(checkpoint, StreamedCheckpoint)
    return checkpoint


def _check_kind(source: str, weights: list[str]) -> None:
    if not any(file.endswith(".safetensors") for file in weights):
        raise SourceError(f"{source}: holds no safetensors, and nothing else is streamed; copy it here first")


def _open_store(source: str) -> StreamedCheckpoint:
    """A model in a folder of a store. Its small files are copied into a temporary folder, which ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="quantize8-"))
    try:
        checkpoint = _read_store(source, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


def _read_store(source: str, folder: Path) -> StreamedCheckpoint:
    shown = without_secrets(source)
    system, root = file_system(source, SourceError)
    try:
        if not system.isdir(root):
            raise FileNotFoundError
        start = len(str(root).strip("/")) + 1
        found = system.find(root, maxdepth=2, detail=True).values()
        files = {str(entry["name"]).strip("/")[start:]: entry for entry in found if entry["type"] == "file"}
        weights, small = hub.needed_files(list(files))
        _check_kind(shown, weights)
        places = {name: (files[name]["name"], f"{shown}/{name}", int(files[name]["size"])) for name in weights}
        remote = {name: FsspecFile(system, *each) for name, each in places.items()}
        for name in small:
            if files[name]["size"] > limits.SMALL_BYTES:
                raise SourceError(
                    f"{shown}/{name}: over {limits.SMALL_BYTES:,} bytes, which no such file has; look at it"
                )
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(system.cat_file(files[name]["name"]))
        return _open(folder, remote, {"id": shown}, shown.rpartition("/")[2])
    except SourceError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{shown}: no such folder; name the folder of a model") from None
    except Exception as error:  # each driver has errors of its own, which may quote the address
        raise SourceError(f"{shown}: cannot be read ({reason(error, source)})") from None
