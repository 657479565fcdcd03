"""Where every byte of an artifact's weight files goes, known before the first one is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from quantize8.checkpoint.base import DTYPES
from quantize8.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME
from quantize8.errors import OutputError
from quantize8.ops.q8_0 import BLOCK, BLOCK_BYTES, Q8_0

DEFAULT_SHARD_SIZE = "5GB"  # transformers' and the hub's default
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")  # then the dtypes of one byte,
_BYTES = ("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")  # as the library orders them: all stay aligned
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: dtype by its safetensors name, or Q8_0."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        count = math.prod(self.shape)
        return count // BLOCK * BLOCK_BYTES if self.dtype == Q8_0 else count * DTYPES[self.dtype].itemsize


@dataclass
class Shard:
    """One weight file: its header, and the place of each tensor from the start of the file."""

    file: str
    tensors: list[OutTensor]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0  # of the whole file


def plan_shards(groups: Iterable[list[OutTensor]], max_shard_size: str) -> list[Shard]:
    """Fill files in order up to `max_shard_size`; the tensors of a group (one module's) stay together."""
    limit, size = parse_size(max_shard_size), 0
    files: list[list[OutTensor]] = [[]]
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    count = len(files)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_NAME]
    return [place(Shard(name, tensors)) for name, tensors in zip(names, files, strict=True)]


def index(shards: list[Shard], always: bool = False) -> dict[str, bytes]:
    """The index of several files, as transformers writes it: {file name: content}.

    Nothing for a single file, but `always`: loaders without an index read every file with the suffix .safetensors.
    """
    if len(shards) == 1 and not always:
        return {}
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_NAME: json.dumps(value, indent=2).encode() + b"\n"}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB (10^9) or 512MiB (2^20)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise OutputError(f"max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def place(shard: Shard) -> Shard:
    """Order as the safetensors library does: by dtype, wide ones first, then by name."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    shard.tensors.sort(key=lambda tensor: ((*_ORDER, *_BYTES).index(tensor.dtype), tensor.name))
    position = 0
    for tensor in shard.tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        shard.offsets[tensor.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    shard.header = len(text).to_bytes(8, "little") + text
    shard.offsets = {name: offset + len(shard.header) for name, offset in shard.offsets.items()}
    shard.nbytes = len(shard.header) + position
    return shard
