"""Safetensors that are not stored on disk: read by range from the hub, or from any store that fsspec has a driver for.

Small files (config, tokenizer, index) are downloaded. Of a weight file, the header is read first, then the tensors in
the order of the file (see `ordered`).
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
from quantize8.errors import SourceError
from quantize8.files import is_url
from quantize8.sources import hub
from quantize8.sources.address import HUB_SCHEME, file_system, reason, without_secrets
from quantize8.sources.base import TensorInfo, read_config
from quantize8.sources.ordered import OrderedFile, Transfers
from quantize8.sources.ranges import FsspecFile, RemoteFile
from quantize8.sources.safetensors import SafetensorsCheckpoint, open_files, read_header


class StreamedCheckpoint(SafetensorsCheckpoint):
    """A model whose small files are in a local folder, and whose weights are in remote files.

    Args:
        folder: The local folder.
        files: The names of the weight files.
        identity: What the manifest says of the source.
        name: The name of the model.
        remote: The remote files by name.

    Raises:
        SourceError: A weight file is missing, damaged, or cannot be read.
    """

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
            self.is_remote = self.one_reader_a_file = True
        except BaseException:
            self._transfers.close()
            raise

    def confirm(self, file: str | None = None) -> None:
        """See `Checkpoint.confirm`."""
        for name in self._ordered if file is None else [file]:
            self._ordered[name].confirm()

    def fingerprint(self) -> dict[str, list[Any]]:
        """See `Checkpoint.fingerprint`; a header identifies a file as well as that of a local file does."""
        heads = {file: blake3(self._heads[file]).hexdigest() for file in self._ordered}
        return {file: [self._remote[file].size, 0, heads[file]] for file in sorted(heads)}

    def _fill(self, target: memoryview, info: TensorInfo, position: int) -> None:
        self._ordered[info.file].read_into(target, position)

    def _open(self, file: str) -> tuple[dict[str, Any], int]:
        """Let the safetensors library check the header, in a sparse file of the same size that holds nothing else."""
        if file not in self._heads:
            raise SourceError(f"{self.identity['id']}: {file} is missing; complete the checkpoint, or use another one")
        header, remote = self._heads[file], self._remote[file]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            try:
                path.write_bytes(header)
                os.truncate(path, remote.size)
            except OSError as error:
                raise SourceError(
                    f"{folder}: cannot be written ({error.strerror}); set TMPDIR to a writable folder"
                ) from None
            entries = read_header(path, remote.where)
        self._ordered[file] = OrderedFile(remote, self._transfers, header)
        return entries

    def _header(self, file: str) -> bytes:
        """The first bytes of a file, up to the data."""
        remote = self._remote[file]
        start = bytes(remote.read(0, min(8, remote.size), self._transfers.ended))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(limits.HEADER_BYTES, remote.size - 8):
            raise SourceError(
                f"{remote.where}: not a whole safetensors file (a header of {length} bytes); use another copy"
            )
        return start + bytes(remote.read(8, 8 + length, self._transfers.ended))


def open_stream(source: str, revision: str | None, token: str | None) -> StreamedCheckpoint:
    """Open a model for reading by range.

    Args:
        source: A hub id, or an address with a scheme such as s3://bucket/model.
        revision: A branch, tag or commit of a hub model; None for the main branch.
        token: A hub token; None for the stored one.

    Returns:
        The checkpoint.

    Raises:
        SourceError: The model cannot be read, or its weights are not safetensors.
        DependencyError: The driver for the scheme is not installed.
    """
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
        raise SourceError(f"{source}: holds no safetensors, and nothing else is streamed; download it first")


def _open_store(source: str) -> StreamedCheckpoint:
    """Open a model in a store. Its small files are copied to a temporary folder, removed with the checkpoint."""
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
        entries = system.find(root, maxdepth=2, detail=True).values()
        files = {str(entry["name"]).strip("/")[start:]: entry for entry in entries if entry["type"] == "file"}
        weights, small = hub.needed_files(list(files))
        _check_kind(shown, weights)
        remote = {
            name: FsspecFile(system, files[name]["name"], f"{shown}/{name}", int(files[name]["size"]))
            for name in weights
        }
        for name in small:
            if files[name]["size"] > limits.SMALL_BYTES:
                raise SourceError(
                    f"{shown}/{name}: over {limits.SMALL_BYTES:,} bytes, too large for such a file; move it elsewhere"
                )
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(system.cat_file(files[name]["name"]))
        return _open(folder, remote, {"id": shown}, shown.rpartition("/")[2])
    except SourceError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{shown}: no such folder; name the folder of a model") from None
    except Exception as error:  # each driver has its own errors, which may quote the address
        raise SourceError(f"{shown}: cannot be read ({reason(error, source)}); check the address") from None
