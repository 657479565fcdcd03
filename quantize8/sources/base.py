"""What every source of weights offers: names, shapes and dtypes at once, values a block of rows at a time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.kernels.reference import Array
from quantize8.sources.companions import files_left_out, files_to_copy

# safetensors' names of dtypes, as NumPy knows them
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
BLOCK_BYTES = 4 * 2**20  # read at a time: several fit a core's share of the last-level cache
READERS = 2  # threads that check or measure tensors side by side: one reads while one computes
QUANTIZABLE = ("F16", "BF16", "F32")
FLOATING = ("F64", *QUANTIZABLE)
FLOAT_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # in a config.json
CONFIG_NAME = "config.json"
_MODULES_NAME = "modules.json"  # of sentence-transformers: the parts that a text goes through, the model first
_HEAD_BYTES = 2**20  # of a weight file whose header has no known size

_LAYER_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks)$")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: dtype by its safetensors name, shape, and the file (relative to the model) that holds it.

    Raises SourceError for a name or a shape beyond the limits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    def __post_init__(self) -> None:
        limits.check_tensor(self.name, self.shape, DTYPES[self.dtype].itemsize, self.file, SourceError)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class Checkpoint(ABC):
    """A model's weights and small files. `tensors` is in the order of storage; nothing else is read until asked."""

    folder: Path
    name: str  # of the model: the last part of its hub id, or its folder or file name
    identity: dict[str, str]  # what the manifest says of the source: id, and revision where there is one
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows start..stop along the first dimension, contiguous, in the dtype of `tensors[name]`.

        A tensor without dimensions is one row. Safe to call from several threads.
        """

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, without an entry on quantization that reading undoes."""
        return read_config(self.folder)

    @property
    def is_remote(self) -> bool:
        """Whether the weights are read from elsewhere, and kept nowhere."""
        return False

    @property
    def is_encoder(self) -> bool:
        """Whether sentence-transformers opens the model, without a head whatever class config.json names."""
        path = self.folder / _MODULES_NAME
        if not path.is_file():
            return False
        try:
            modules = json.loads(limits.read_bytes(contained(path, self.folder), limits.CONFIG_BYTES, SourceError))
        except (ValueError, RecursionError):
            raise SourceError(f"{path}: not readable as JSON; fetch the file again") from None
        first = modules[0] if isinstance(modules, list) and modules else None
        return isinstance(first, dict) and str(first.get("type")).rpartition(".")[2] == "Transformer"

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint as it was opened, by whose kind its settings and tokenizer are found."""
        return self

    @property
    def decoded(self) -> frozenset[str]:
        """Weights [N, K] that are stored quantized, and that `rows` gives in float32."""
        return frozenset()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict[str, list[Any]]:
        """What tells whether a weight file has changed: {file: [bytes, time of change in ns, BLAKE3 of its head]}.

        A hub model's revision says more than the time, which differs between copies of it: there it is 0.
        """
        pinned, files = "revision" in self.identity, sorted(self._files())
        return {file: _stamp(self.folder / file, self._head_bytes(file), pinned) for file in files}

    def _files(self) -> Collection[str]:
        """The weight files, relative to the folder."""
        return {info.file for info in self.tensors.values()}

    def _head_bytes(self, file: str) -> int:
        """How much of a weight file tells what is in it."""
        return _HEAD_BYTES

    def stored_dtype(self, name: str) -> str:
        """The dtype that a tensor's values are stored in."""
        return self.tensors[name].dtype

    def is_int8(self, name: str) -> bool:
        """Whether a weight is stored as int8 codes with one scale per row, which `int8_rows` gives as they are."""
        return False

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """Rows start..stop of a weight that `is_int8`: codes int8 [n, K] in -127..127, absmax float32 [n]."""
        raise NotImplementedError(name)

    @property
    def one_reader_a_file(self) -> bool:
        """Whether each file should be read by one thread, tensor by tensor in the order of `tensors`."""
        return False

    def confirm(self, file: str | None = None) -> None:  # noqa: B027 - most sources promise nothing
        """Refuse a file, or all, whose content is not what its source promised. Called when it was read.

        Only where that is not known beforehand: a stream is hashed on its way.
        """

    def left_behind(self) -> dict[str, str]:
        """Files of the model's folder that neither are read nor go into an artifact -> why."""
        return left_behind(self.folder, self._files())

    def write_companions(self, folder: Path) -> None:
        """Put the tokenizer and the other small files into `folder`, unchanged."""
        for path in companions(self.folder):
            target = folder / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """All rows of a tensor in order, in blocks of about so many bytes, a multiple of `multiple` rows each."""
        info = self.tensors[name]
        count = info.shape[0] if info.shape else 1
        step = max(1, (block_bytes or BLOCK_BYTES) * count // max(1, info.nbytes) // multiple) * multiple
        for start in range(0, count, step):
            yield self.rows(name, start, min(start + step, count))


def _stamp(path: Path, head_bytes: int, pinned: bool) -> list[Any]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            head = blake3(file.read(head_bytes)).hexdigest()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); fetch the checkpoint again") from None
    return [status.st_size, 0 if pinned else status.st_mtime_ns, head]


def model_dtype(config: dict[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """The dtype of a model's floating-point numbers: what its config says, else what most of them have."""
    for settings in (config, config.get("text_config")):
        if isinstance(settings, dict):
            named = str(settings.get("dtype") or settings.get("torch_dtype")).removeprefix("torch.")
            if named in FLOAT_NAMES:
                return FLOAT_NAMES[named]
    return main_dtype(tensors)


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The dtype that most floating-point numbers of these tensors have."""
    sizes: dict[str, int] = {}
    for info in tensors:
        if info.dtype in FLOATING:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default="F16")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, as a dictionary."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise SourceError(f"{folder}: not a model folder, it has no {CONFIG_NAME}; name a folder, file or hub id")
    config = limits.read_object(contained(path, folder), limits.CONFIG_BYTES, SourceError)
    check_settings(config, path)
    return config


def check_settings(config: dict[str, Any], path: Path) -> None:
    """Refuse settings, of a part of the model too, by which transformers would fetch code or fill the memory."""
    for key, value in config.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                check_settings(part, path)
        if str(key).endswith("_implementation") and "/" in str(value):
            raise SourceError(f"{path}: {key} names code on the hub, which is not run; remove the entry")
        limit = limits.LAYERS if _LAYER_COUNT.search(str(key)) else limits.VOCABULARY if key == "vocab_size" else None
        if limit and isinstance(value, int | float) and not value <= limit:
            raise SourceError(f"{path}: {key} is {value!r}, more than the {limit:,} that are read; fetch it again")


def companions(folder: Path) -> list[Path]:
    """Files of a model folder that belong to it whatever its weights' format, sorted; see `companions.py`."""
    paths = [contained(folder / name, folder) for name in files_to_copy(_names(folder))]
    for path in paths:
        if path.stat().st_size > limits.SMALL_BYTES:
            raise SourceError(f"{path}: over {limits.SMALL_BYTES:,} bytes, too large to be copied; move it elsewhere")
    return paths


def left_behind(folder: Path, used: Collection[str]) -> dict[str, str]:
    """Files of a model folder that do not go into an artifact, besides the weight files `used` -> why."""
    quiet = ("hidden", "about")  # every model has some of these
    found = {name: why for name, why in files_left_out(_names(folder)).items() if not why.startswith(quiet)}
    return {name: why for name, why in found.items() if name not in used}


def _names(folder: Path) -> list[str]:
    """Files in a folder and the folders in it, by POSIX paths."""
    names: list[str] = []
    for path in folder.iterdir():
        if limits.is_file(path):
            names.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            names += [f"{path.name}/{file.name}" for file in contained(path, folder).iterdir() if limits.is_file(file)]
        if len(names) > limits.FILES:
            raise SourceError(f"{folder}: holds more than {limits.FILES:,} files; name a folder of one model alone")
    return names


def contained(path: Path, folder: Path) -> Path:
    """The same path, if its content lies in `folder` (or in the hub cache that `folder` is a snapshot of)."""
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        inside = any(path.resolve().is_relative_to(allowed) for allowed in roots)
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a name that no file can have
        inside = False
    if not inside:
        raise SourceError(f"{path}: points outside its model folder, and is not read; remove the link or the entry")
    return path
