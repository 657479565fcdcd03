"""Reads torch checkpoints (pytorch_model.bin), memory-mapped and unpickled with weights_only: no code is ever run."""

from __future__ import annotations

import io
import mmap
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from quantize8.errors import SourceError, first_line
from quantize8.kernels.reference import Array
from quantize8.limits import check_tensor, is_file
from quantize8.optional import require
from quantize8.sources.base import Checkpoint, TensorInfo, contained
from quantize8.sources.pickles import check_pickle
from quantize8.sources.safetensors import read_weight_map, require_parts

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "pytorch_model.bin.index.json"
SINGLE_NAME = "pytorch_model.bin"
_HEAD_BYTES = 2**20  # identify the content of a file, which has no header of a known size
_SHARDS = "pytorch_model-*.bin"
_PICKLES_BEFORE = 4  # before torch 1.6: a magic number, version, machine, tensors; then the storages' keys and values


class TorchCheckpoint(Checkpoint):
    """One or more .bin files. A tensor that shares its storage with an earlier one (tied weights) is omitted.

    Args:
        folder: The model folder.
        files: The names of the .bin files.
        identity: What the manifest says of the source.
        name: The name of the model.

    Raises:
        SourceError: A file is missing, damaged, or holds anything but tensors.
    """

    def __init__(self, folder: Path, files: list[str], identity: dict[str, str], name: str) -> None:
        super().__init__(folder, name, identity)
        self._values: dict[str, Tensor] = {}
        tied = self.config.get("tie_word_embeddings", True)  # transformers' default
        seen: set[tuple[Any, ...]] = set()
        for file in files:
            self.files[file] = _HEAD_BYTES
            for tensor, value in _load(contained(folder / file, folder)).items():
                check_tensor(tensor, value.shape, value.element_size(), str(folder / file), SourceError)
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise SourceError(
                        f"{folder / file}: {tensor} has more values than the file; save it as a contiguous tensor"
                    )
                view = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
                if tied and view in seen:
                    continue
                seen.add(view)
                self.tensors[tensor] = TensorInfo(tensor, _dtype_name(value, folder / file), tuple(value.shape), file)
                self._values[tensor] = value

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        value = self._values[name]
        return _to_numpy(value[start:stop] if value.dim() else value)


def open_torch(folder: Path, identity: dict[str, str], name: str) -> TorchCheckpoint | None:
    """Open a folder's .bin files: those of the index, else pytorch_model.bin, else its parts.

    Args:
        folder: The model folder.
        identity: What the manifest says of the source.
        name: The name of the model.

    Returns:
        The checkpoint, None if the folder has no .bin files.

    Raises:
        SourceError: A file is missing, damaged, or holds anything but tensors.
    """
    if (folder / INDEX_NAME).is_file():
        files = sorted(set(read_weight_map(folder / INDEX_NAME).values()))
        return TorchCheckpoint(folder, files, identity, name)
    files = [SINGLE_NAME] if (folder / SINGLE_NAME).is_file() else sorted(path.name for path in folder.glob(_SHARDS))
    require_parts(folder, files)
    return TorchCheckpoint(folder, files, identity, name) if files else None


class _TorchScriptError(ValueError):
    """The file is an archive of torch.jit.save."""


def _load(path: Path) -> dict[str, Tensor]:
    require(f"to read {path}", "torch")
    import torch

    if not is_file(path):
        raise SourceError(f"{path}: missing; the checkpoint is incomplete, fetch it again")
    try:
        _check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on unusual pickles; what is not refused below is read exactly
            try:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                state = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except _TorchScriptError:
        raise SourceError(
            f"{path}: is a TorchScript archive, which is a program and is not run; save the model's state_dict()"
        ) from None
    except pickle.UnpicklingError:
        raise SourceError(
            f"{path}: holds objects or code besides tensors, and is not opened; use a safetensors checkpoint"
        ) from None
    except Exception as error:  # a damaged pickle can make torch raise anything
        raise SourceError(f"{path}: not a whole torch file ({first_line(error)}); fetch it again") from None
    # call the methods of the types: a pickle may give a dictionary or a tensor attributes with the same names
    if not isinstance(state, dict) or not all(_is_plain(name, value) for name, value in dict.items(state)):
        raise SourceError(f"{path}: is not a plain dictionary of tensors; save the model's state_dict()")
    return {name: torch.Tensor.detach(value) for name, value in dict.items(state)}


def _is_plain(name: Any, value: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _check(path: Path) -> None:
    """Raise UnpicklingError or ValueError for a file that torch must not be given."""
    from torch._C import PyTorchFileReader

    size = path.stat().st_size
    # memory-mapped: reading from the file would allocate whatever a length in it claims
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if file[:4] != b"PK\x03\x04":  # the format before torch 1.6
            for _ in range(_PICKLES_BEFORE + 1):
                check_pickle(file, size)
            return
        with zipfile.ZipFile(opened) as archive:
            if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
                raise _TorchScriptError
            for entry in archive.infolist():  # torch.save never compresses, a zip bomb does
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise ValueError(f"{entry.filename} is compressed")
    check_pickle(io.BytesIO(PyTorchFileReader(str(path)).get_record("data.pkl")), size)


def _dtype_name(value: Tensor, path: Path) -> str:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    if value.dtype not in names:
        raise SourceError(f"{path}: a tensor has dtype {value.dtype}, which quantize8 cannot read; save it as float32")
    return names[value.dtype]


def _to_numpy(value: Tensor) -> Array:
    import torch

    value = value.contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = np.asarray(value.numpy())
    return array
