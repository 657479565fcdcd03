"""Read checkpoints in safetensors: a single file, or several with an index.

The safetensors library validates each header; the values are then read directly from their byte offsets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.files import fill_from, open_file
from quantize8.kernels.reference import Array, as_bytes
from quantize8.sources.base import DTYPES, Checkpoint, TensorInfo, contained

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ADAPTER = "adapter_model."  # prefix of PEFT's adapter weights, which are not part of the model
_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.\w+)")
_AHEAD = 64 * 2**20  # readahead distance in bytes: a few blocks for each thread


class SafetensorsCheckpoint(Checkpoint):
    """A folder of safetensors files. All headers are read and checked on opening."""

    def __init__(self, folder: Path, files: list[str], identity: dict[str, str], name: str) -> None:
        super().__init__(folder, name, identity)
        self._offsets: dict[str, int] = {}  # tensor -> position of its first byte in its file
        self._descriptors: dict[str, int] = {}
        for file in files:
            path, (header, self.files[file]) = folder / file, self._open(file)
            for tensor, entry in header.items():
                if tensor in self.tensors:
                    other = self.tensors[tensor].file
                    raise SourceError(f"{path}: {tensor} is also in {other}; keep one of the two files")
                if entry["dtype"] not in DTYPES:
                    raise SourceError(f"{path}: {tensor} has dtype {entry['dtype']}, which quantize8 cannot read")
                self.tensors[tensor] = TensorInfo(tensor, entry["dtype"], tuple(entry["shape"]), file)
                self._offsets[tensor] = self.files[file] + entry["data_offsets"][0]

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        info = self.tensors[name]
        values = np.empty((stop - start, *info.shape[1:]), DTYPES[info.dtype])
        row_bytes = info.nbytes // (info.shape[0] if info.shape else 1) if info.nbytes else 0
        self._fill(as_bytes(values), info, self._offsets[name] + start * row_bytes)
        return values if info.shape else values.reshape(())

    def _fill(self, target: memoryview, info: TensorInfo, position: int) -> None:
        """Read a part of a tensor, starting at this position in its file."""
        descriptor = self._descriptors[info.file]
        if hasattr(os, "posix_fadvise"):  # later data is read while the current block is processed
            os.posix_fadvise(descriptor, position + _AHEAD, len(target), os.POSIX_FADV_WILLNEED)
        where = f"{self.folder / info.file}: {info.name}"
        try:
            whole = fill_from(descriptor, target, position)
        except OSError as error:
            raise SourceError(f"{where} cannot be read ({error.strerror}); check the disk") from None
        if not whole:
            raise SourceError(f"{where} ends early; the file changed while it was read")

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def _open(self, file: str) -> tuple[dict[str, Any], int]:
        """Open a file and return the result of `read_header`."""
        header = read_header(self.folder / file)
        descriptor = self._descriptors[file] = open_file(self.folder / file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead
        return header


def read_header(path: Path, where: str = "") -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file; the safetensors library validates it.

    Args:
        path: The file.
        where: What error messages call the file; its path by default.

    Returns:
        The entries by tensor name in the order in which they are stored, and the position of the first data byte.

    Raises:
        SourceError: The file is missing, incomplete or damaged.
    """
    if not limits.is_file(path):
        raise SourceError(f"{where or path}: missing; the checkpoint is incomplete, fetch it again")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise SourceError(f"{where or path}: missing; the checkpoint is incomplete, fetch it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{where or path}: not a whole safetensors file ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 8 + length


Opener = Callable[[Path, list[str], dict[str, str], str], SafetensorsCheckpoint]


def open_safetensors(folder: Path, identity: dict[str, str], name: str) -> SafetensorsCheckpoint | None:
    """Open the safetensors files of a model folder: those in its index, else model.safetensors, else all of them.

    Args:
        folder: The model folder.
        identity: What the manifest records about the source.
        name: Name of the model.

    Returns:
        The checkpoint; None if the folder has no safetensors files.

    Raises:
        SourceError: A file is missing, damaged, unsafe, or does not match the index.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return open_files(folder, files, identity, name, SafetensorsCheckpoint)


def open_files(
    folder: Path, files: list[str], identity: dict[str, str], name: str, opener: Opener
) -> SafetensorsCheckpoint | None:
    """Do the same as `open_safetensors` with a list of files, which need not be stored on this machine.

    Args:
        folder: The model folder; only its small files, such as the index, must be in it.
        files: Names of the safetensors files.
        identity: What the manifest records about the source.
        name: Name of the model.
        opener: Makes the checkpoint from folder, files, identity and name.

    Returns:
        The checkpoint; None if there are no files.

    Raises:
        SourceError: A file is missing, damaged, unsafe, or does not match the index.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_weight_map(index)
        checkpoint = opener(folder, sorted(set(weight_map.values())), identity, name)
        for tensor, file in weight_map.items():
            if tensor not in checkpoint.tensors or checkpoint.tensors[tensor].file != file:
                raise SourceError(f"{index}: says {tensor} is in {file}, but it is not; fetch both again")
        return checkpoint
    files = [name for name in files if not name.startswith(_ADAPTER)]
    files = [SINGLE_NAME] if SINGLE_NAME in files else files
    require_parts(folder, files)
    for file in files:
        contained(folder / file, folder)
    return opener(folder, files, identity, name) if files else None


def require_parts(folder: Path, files: list[str]) -> None:
    """Raise SourceError if a file is named as one of several (NAME-00001-of-00002) and another of them is missing."""
    for file in files:
        if match := _PART.fullmatch(file):
            start, _, count, end = match.groups()
            names = (f"{start}{number:0{len(count)}}-of-{count}{end}" for number in range(1, int(count) + 1))
            missing = next((name for name in names if name not in files), None)
            if missing is not None:
                raise SourceError(f"{folder / missing}: missing; the checkpoint is incomplete, fetch it again")


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the index of a checkpoint with several weight files.

    Args:
        index: The index, such as model.safetensors.index.json.

    Returns:
        Tensor -> name of its file.

    Raises:
        SourceError: The index is damaged, or names a file that is not directly inside the folder.
    """
    weight_map = limits.read_object(contained(index, index.parent), limits.INDEX_BYTES, SourceError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: has no weight_map; fetch it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise SourceError(f"{index}: {tensor} points at {file!r}, outside the model folder; correct the entry")
    for file in set(weight_map.values()):
        contained(index.parent / file, index.parent)
    return weight_map
