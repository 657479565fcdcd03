"""The interface of a checkpoint: names, shapes and dtypes are known on opening, values are read in blocks of rows.

This module also decides which files of a model folder are copied into an artifact: all that are not recognized as
something else. Tokenizers, processors and templates have names of every kind (`source.spm`, `bpe.codes`,
`tokenizer.model.v3`), so no list of them would be complete. Weights, leftovers of other tools, and files that only
describe the model are left out. The decision depends on file names alone, so it is the same for a folder, the hub and
an object store.
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

# safetensors dtype name -> NumPy dtype
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
BLOCK_BYTES = 4 * 2**20  # size of a block that is read: several fit a core's share of the last-level cache
READERS = 2  # threads that check or measure tensors in parallel: one reads while the other computes
QUANTIZABLE = ("F16", "BF16", "F32")
FLOATING = ("F64", *QUANTIZABLE)
MXFP4, NVFP4 = FLOAT4 = ("MXFP4", "NVFP4")  # of 4-bit floats in blocks that share a scale (formats/float4.py)
FLOAT_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # in a config.json
CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"  # ModelOpt's: how the weights are quantized
_MODULES_NAME = "modules.json"  # sentence-transformers: the modules that process a text, starting with the model

# Files of a model folder, by name
# An artifact has its own version of these, if any
_OURS = (CONFIG_NAME, "*.index.json", "quantize8.json", QUANT_CONFIG_NAME)
_WEIGHTS = (
    *(".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".nemo", ".mlmodel", ".mlpackage", ".xml", ".engine"),
    *(".tar", ".gz", ".zip", ".7z", ".parquet", ".arrow"),
)
_ADAPTERS = ("adapter_config.json",)  # makes transformers look for further weights
_TRAINING = ("trainer_state.json", "events.out.tfevents.*", "*.log", "*.lock", "*.incomplete", "zero_to_fp32.py")
_PICKLES = (".pkl", ".pickle", ".joblib")  # these run code when they are opened
_ABOUT = ("README.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.webm", "*.pdf", "*.ipynb")
_MODULE = re.compile(r"\d+_\w+/.+")  # a module of sentence-transformers with its own weights, such as 2_Dense

_LAYER_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks)$")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, as its file header describes it.

    Attributes:
        name: Name of the tensor.
        dtype: The dtype in which `Checkpoint.rows` returns it, by its safetensors name.
        shape: Shape of the tensor.
        file: The file that contains it, relative to the model folder.
        stored_dtype: The dtype in which its values are stored, a name of DTYPES or FLOAT4; `dtype` by default.
        is_int8: Whether it is stored as int8 codes with one scale per row; `Checkpoint.int8_rows` returns these.
        rotation: Size of the blocks of input features by which it is stored rotated, as such codes, while `rows` undoes
            the rotation; 0 if it is not. `is_int8` is false then: without the rotation the codes mean nothing.
        float_dtype: The dtype in which it is written if it stays in floating point; empty for `dtype`. Formats decide
            that of a tensor in `Checkpoint.decoded`.
        nbytes: Size of the values in `dtype`, in bytes.

    Raises:
        SourceError: The name or the shape is invalid or exceeds a limit.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stored_dtype: str = ""
    is_int8: bool = False
    rotation: int = 0
    float_dtype: str = ""
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        itemsize = DTYPES[self.dtype].itemsize
        limits.check_tensor(self.name, self.shape, itemsize, self.file, SourceError)
        object.__setattr__(self, "nbytes", math.prod(self.shape) * itemsize)
        object.__setattr__(self, "stored_dtype", self.stored_dtype or self.dtype)


@dataclass
class Checkpoint(ABC):
    """A model's weights and small files. Headers are read when it is opened, values when they are requested.

    Attributes:
        folder: The model folder.
        name: Name of the model: the last component of its hub id, or the name of its folder or file.
        identity: What the manifest records about the source: its id, and its revision if it is a hub model.
        tensors: The tensors by name, in the order in which they are stored.
        files: Weight file -> number of leading bytes that identify its content.
        decoded: Weights that are stored quantized and that `rows` decodes: [N, K] in float32, or the fused experts of
            a layer [E, K, N] in bfloat16.
        is_remote: Whether the weights are read over the network and not stored on this machine.
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
        """Read a range of rows; may be called from several threads.

        Args:
            name: Name of the tensor.
            start: First row, along the first dimension. A tensor without dimensions counts as one row.
            stop: End of the range, exclusive.

        Returns:
            A contiguous array in the dtype of `tensors[name]`.
        """

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, without the quantization settings if the weights are decoded when read."""
        return read_config(self.folder)

    @property
    def is_encoder(self) -> bool:
        """Whether the model is one for sentence-transformers, which loads no head whatever class config.json names."""
        path = self.folder / _MODULES_NAME
        if not path.is_file():
            return False
        try:
            modules = json.loads(limits.read_bytes(contained(path, self.folder), limits.CONFIG_BYTES, SourceError))
        except (ValueError, RecursionError):
            raise SourceError(f"{path}: not readable as JSON; fetch it again") from None
        first = modules[0] if isinstance(modules, list) and modules else None
        return isinstance(first, dict) and str(first.get("type")).rpartition(".")[2] == "Transformer"

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint as it was opened; its type decides where settings and tokenizer are found."""
        return self

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors as stored, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> dict[str, list[Any]]:
        """Identify the content of the weight files.

        Returns:
            {file: [size in bytes, modification time in ns, BLAKE3 of its first bytes]}. For a hub model the time is 0:
            it differs between copies of the same revision, and the revision identifies the content better.

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
        """Read a range of rows of a weight that is stored as int8 (`TensorInfo.is_int8`, or `rotation`).

        Args:
            name: Name of the weight.
            start: First row.
            stop: End of the range, exclusive.

        Returns:
            Codes int8 [n, K] in -127..127, and the absmax of each row, float32 [n].
        """
        raise NotImplementedError(name)

    def confirm(self, file: str | None = None) -> None:  # noqa: B027 - most sources promise nothing
        """Check that a file has the content that its source announced; called after the file was read.

        Only streams do this, because they are hashed while they are read. All other sources are checked beforehand.

        Args:
            file: The weight file; None for all of them.

        Raises:
            SourceError: The content differs.
        """

    def left_behind(self) -> dict[str, str]:
        """Files of the model folder that are neither read nor copied into an artifact -> the reason."""
        about = ("hidden", "about")  # every model has some of these
        left = files_left_out(_names(self.folder))
        return {name: why for name, why in left.items() if not why.startswith(about) and name not in self.files}

    def require_companions(self) -> None:  # noqa: B027 - files are copied without any package
        """Raise DependencyError if `write_companions` needs a package that is missing."""

    def write_companions(self, folder: Path) -> None:
        """Copy the tokenizer and the other small files into `folder`, unchanged."""
        for path in companions(self.folder):
            target = folder / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """Read all rows of a tensor in order, block by block.

        Args:
            name: Name of the tensor.
            block_bytes: Approximate size of a block in bytes; None for BLOCK_BYTES.
            multiple: The number of rows in every block but the last is a multiple of this.
        """
        info = self.tensors[name]
        count = info.shape[0] if info.shape else 1
        step = max(1, (block_bytes or BLOCK_BYTES) * count // max(1, info.nbytes) // multiple) * multiple
        for start in range(0, count, step):
            yield self.rows(name, start, min(start + step, count))


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first model class that a config.json names; None if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def model_dtype(config: dict[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """The floating-point dtype of a model: the one its config names, else the one that most of its values have."""
    for settings in (config, config.get("text_config")):
        if isinstance(settings, dict):
            named = str(settings.get("dtype") or settings.get("torch_dtype")).removeprefix("torch.")
            if named in FLOAT_NAMES:
                return FLOAT_NAMES[named]
    return main_dtype(tensors)


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The dtype in which most floating-point values of these tensors are written; F16 if there are none."""
    sizes: dict[str, int] = {}
    for info in tensors:
        if info.dtype in FLOATING:
            dtype = info.float_dtype or info.dtype
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default="F16")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the config.json of a model folder.

    Raises:
        SourceError: It is missing or invalid, or has settings that `check_settings` refuses.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise SourceError(f"{folder}: not a model folder, it has no {CONFIG_NAME}; name a model folder, file or hub id")
    config = limits.read_object(contained(path, folder), limits.CONFIG_BYTES, SourceError)
    check_settings(config, path)
    return config


def check_settings(config: dict[str, Any], path: Path) -> None:
    """Refuse settings that would make transformers download code or exhaust memory, including nested settings.

    Args:
        config: The settings of a config.json.
        path: File that the error message names.

    Raises:
        SourceError: A setting is refused.
    """
    for key, value in config.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                check_settings(part, path)
        if str(key).endswith("_implementation") and "/" in str(value):
            raise SourceError(f"{path}: {key} names code on the hub, which quantize8 does not run; remove the entry")
        limit = limits.LAYERS if _LAYER_COUNT.search(str(key)) else limits.VOCABULARY if key == "vocab_size" else None
        if limit and isinstance(value, int | float) and not value <= limit:
            raise SourceError(f"{path}: {key} is {value!r}, more than the limit of {limit:,}; fetch it again")


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that are copied into an artifact, such as the tokenizer; sorted.

    Raises:
        SourceError: A file lies outside the folder, or is too large to be copied.
    """
    paths = [contained(folder / name, folder) for name in files_to_copy(_names(folder))]
    for path in paths:
        if path.stat().st_size > limits.SMALL_BYTES:
            raise SourceError(f"{path}: over {limits.SMALL_BYTES:,} bytes, too large to be copied; move it elsewhere")
    return paths


def files_to_copy(names: Collection[str]) -> list[str]:
    """The files of a model folder that are copied into an artifact unchanged, sorted.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    left = files_left_out(names)
    return sorted(name for name in names if name not in left and not _is_ours(name))


def files_left_out(names: Collection[str]) -> dict[str, str]:
    """The files of a model folder that are not copied into an artifact -> the reason.

    Files of which an artifact has its own version, such as config.json, are not among them.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    with_weights = {name.rpartition("/")[0] for name in names if PurePosixPath(name).suffix.lower() in _WEIGHTS}
    kinds = ((_ADAPTERS, "an adapter's"), (_TRAINING, "left by training"), (_ABOUT, "about the model"))
    left: dict[str, str] = {}
    for name in sorted(names):
        path, folder = PurePosixPath(name), name.rpartition("/")[0]
        if _is_ours(name):
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


def _is_ours(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _OURS)


def _names(folder: Path) -> list[str]:
    """Files in a folder and its direct subfolders, as POSIX paths relative to it."""
    names: list[str] = []
    for path in folder.iterdir():
        if limits.is_file(path):
            names.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            names += [f"{path.name}/{file.name}" for file in contained(path, folder).iterdir() if limits.is_file(file)]
        if len(names) > limits.FILES:
            raise SourceError(f"{folder}: has more than {limits.FILES:,} files; name a folder with one model only")
    return names


def contained(path: Path, folder: Path) -> Path:
    """Return `path` if what it resolves to lies inside a folder.

    Args:
        path: File or folder, which may be a symbolic link.
        folder: The model folder. For a snapshot in the hub cache, the cache's `blobs` are accepted as well.

    Raises:
        SourceError: It lies elsewhere.
    """
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        inside = any(path.resolve().is_relative_to(allowed) for allowed in roots)
    except (OSError, ValueError, RuntimeError):  # a loop of links, or an impossible file name
        inside = False
    if not inside:
        raise SourceError(f"{path}: points outside its model folder and is not read; remove the link or the entry")
    return path
