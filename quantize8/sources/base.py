"""What every source of weights offers: names, shapes and dtypes at once, values a block of rows at a time.

Also, which files of a model folder are copied into an artifact: all that are not known to be something else.
Tokenizers, processors and templates have names of every kind (`source.spm`, `bpe.codes`, `tokenizer.model.v3`), so a
list of them is never complete. Weights, leftovers of other tools, and files that only describe the model are left out.
Names alone decide, so the result is the same for a folder, the hub and an object store.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.kernels.reference import Array

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

# Files of a model folder, by name
_OURS = ("config.json", "*.index.json", "quantize8.json")  # which an artifact has of its own
_WEIGHTS = (
    *(".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".nemo", ".mlmodel", ".mlpackage", ".xml", ".engine"),
    *(".tar", ".gz", ".zip", ".7z", ".parquet", ".arrow"),
)
_ADAPTERS = ("adapter_config.json",)  # by which transformers would look for further weights
_TRAINING = ("trainer_state.json", "events.out.tfevents.*", "*.log", "*.lock", "*.incomplete", "zero_to_fp32.py")
_PICKLES = (".pkl", ".pickle", ".joblib")  # which run code when they are opened
_ABOUT = ("README.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.webm", "*.pdf", "*.ipynb")
_MODULE = re.compile(r"\d+_\w+/.+")  # a module of sentence-transformers, such as 2_Dense, whose weights are its own

_LAYER_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks)$")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, known from a header.

    Attributes:
        name: Its name.
        dtype: The dtype in which `Checkpoint.rows` returns it, by its safetensors name.
        shape: Its shape.
        file: The file that holds it, relative to the model folder.
        stored_dtype: The dtype in which its values are stored; `dtype` by default.
        is_int8: Whether it is stored as int8 codes with one scale for each row; `Checkpoint.int8_rows` returns these.
        nbytes: Size of the values in bytes.

    Raises:
        SourceError: The name or the shape exceeds a limit.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stored_dtype: str = ""
    is_int8: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        itemsize = DTYPES[self.dtype].itemsize
        limits.check_tensor(self.name, self.shape, itemsize, self.file, SourceError)
        object.__setattr__(self, "nbytes", math.prod(self.shape) * itemsize)
        object.__setattr__(self, "stored_dtype", self.stored_dtype or self.dtype)


@dataclass
class Checkpoint(ABC):
    """A model's weights and small files. Headers are read when it is opened; values when they are asked for.

    Attributes:
        folder: The model folder.
        name: The name of the model: the last part of its hub id, or of its folder or file.
        identity: What the manifest says of the source: its id, and its revision if it is a hub model.
        tensors: The tensors by name, in the order in which they are stored.
        files: Weight file -> how many of its first bytes identify its content.
        decoded: Weights [N, K] that are stored quantized, and that `rows` returns in float32.
        is_remote: Whether the weights are read from elsewhere, and not stored on this machine.
        one_reader_a_file: Whether each file should be read by one thread, tensor by tensor in the order of `tensors`.
    """

    folder: Path
    name: str
    identity: dict[str, str]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    decoded: frozenset[str] = frozenset()
    is_remote: bool = False
    one_reader_a_file: bool = False

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read rows start..stop along the first dimension, contiguous, in the dtype of `tensors[name]`.

        A tensor without dimensions is one row. May be called from several threads.
        """

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, without an entry on quantization that reading undoes."""
        return read_config(self.folder)

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
        """The checkpoint as it was opened; its kind decides where settings and tokenizer are found."""
        return self

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors as they are stored, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict[str, list[Any]]:
        """Identify the content of the weight files: {file: [bytes, time of change in ns, BLAKE3 of its head]}.

        For a hub model the time is 0: it differs between copies of a revision, which says more.

        Raises:
            SourceError: A file cannot be read.
        """
        stamps: dict[str, list[Any]] = {}
        for name in sorted(self.files):
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    head = blake3(file.read(self.files[name])).hexdigest()
            except OSError as error:
                raise SourceError(f"{path}: cannot be read ({error.strerror}); fetch the checkpoint again") from None
            stamps[name] = [status.st_size, 0 if "revision" in self.identity else status.st_mtime_ns, head]
        return stamps

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """Read rows start..stop of a weight that `is_int8`: codes int8 [n, K] in -127..127, absmax float32 [n]."""
        raise NotImplementedError(name)

    def confirm(self, file: str | None = None) -> None:  # noqa: B027 - most sources promise nothing
        """Raise SourceError if a file, or any file, is not what its source promised. Called after it was read.

        Only a stream does so, which is hashed while it is read; all other sources are checked before.
        """

    def left_behind(self) -> dict[str, str]:
        """Files of the model's folder that are neither read nor copied into an artifact -> why."""
        about = ("hidden", "about")  # every model has some of these
        left = files_left_out(_names(self.folder))
        return {name: why for name, why in left.items() if not why.startswith(about) and name not in self.files}

    def write_companions(self, folder: Path) -> None:
        """Copy the tokenizer and the other small files into `folder`, unchanged."""
        for path in companions(self.folder):
            target = folder / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """Read all rows of a tensor in order, block by block.

        Args:
            name: The tensor.
            block_bytes: Approximate size of a block; None for BLOCK_BYTES.
            multiple: Every block but the last has a multiple of so many rows.
        """
        info = self.tensors[name]
        count = info.shape[0] if info.shape else 1
        step = max(1, (block_bytes or BLOCK_BYTES) * count // max(1, info.nbytes) // multiple) * multiple
        for start in range(0, count, step):
            yield self.rows(name, start, min(start + step, count))


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The model class that a config.json names first; None if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


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
    """The files of a model folder that belong to it whatever its weights' format, sorted.

    Raises:
        SourceError: One lies outside the folder, or is too large to be copied.
    """
    paths = [contained(folder / name, folder) for name in files_to_copy(_names(folder))]
    for path in paths:
        if path.stat().st_size > limits.SMALL_BYTES:
            raise SourceError(f"{path}: over {limits.SMALL_BYTES:,} bytes, too large to be copied; move it elsewhere")
    return paths


def files_to_copy(names: Collection[str]) -> list[str]:
    """The files of a model folder that an artifact gets unchanged, sorted.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    left = files_left_out(names)
    ours = {name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in _OURS)}
    return sorted({*names} - left.keys() - ours)


def files_left_out(names: Collection[str]) -> dict[str, str]:
    """The files of a model folder that an artifact does not get, with the reason for each.

    Files that an artifact has of its own, such as config.json, are not among them.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    with_weights = {name.rpartition("/")[0] for name in names if PurePosixPath(name).suffix.lower() in _WEIGHTS}
    left: dict[str, str] = {}
    for name in sorted(names):
        path, folder = PurePosixPath(name), name.rpartition("/")[0]
        kinds = ((_ADAPTERS, "an adapter's"), (_TRAINING, "left by training"), (_ABOUT, "about the model"))
        if not folder and any(fnmatch(name, pattern) for pattern in _OURS):
            continue
        if any(part.startswith(".") or part == "__pycache__" for part in path.parts) or len(path.parts) > 2:
            left[name] = "hidden, or deeper in the folder than a model's files"
        elif _MODULE.fullmatch(name):
            continue
        elif path.suffix.lower() in _WEIGHTS:
            left[name] = "weights that are not read"
        elif folder and folder in with_weights:
            left[name] = "beside weights of another format or model"
        elif path.suffix.lower() in _PICKLES:
            left[name] = "a pickle, which runs code when it is opened"
        else:
            for patterns, reason in kinds:
                if any(fnmatch(path.name, pattern) for pattern in patterns):
                    left.setdefault(name, reason)
    return left


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
