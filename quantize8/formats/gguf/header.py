"""The header of a GGUF file: its metadata and the position of each tensor, checked against the file's actual size.

Single values are decoded at once; arrays, such as the tokens and their merges, only when they are used. The layout is
that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quantize8 import limits
from quantize8.errors import SourceError

MAGIC = b"GGUF"
ARCHITECTURE = "general.architecture"
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct formats
_UINT32, _STRING, _ARRAY = 4, 8, 9
_DIMENSIONS = 4  # of a tensor, as in ggml
_ALIGNMENT = 32  # of the tensors, if the metadata does not say
_LENGTH = struct.Struct("<Q")


class Entry(NamedTuple):
    """An entry of the metadata. An array is not decoded; its position is stored instead of its value."""

    kind: int  # ggml's number of the type
    value: Any = None
    items: int | None = None  # ggml's number of the type of an array's items
    length: int = 0  # of an array, in items
    place: int = 0  # byte position of an array's first item


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    file: str
    shape: tuple[int, ...]  # in NumPy's order, which is the reverse of ggml's
    kind: str  # ggml's name of the type
    offset: int  # in bytes, from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        entries: The metadata by key.
        tensors: The tensors by llama.cpp's names, in the order of the file.
        data_offset: Where the tensors begin, in bytes.
        nbytes: The size of the file.
    """

    path: Path
    entries: dict[str, Entry]
    tensors: dict[str, StoredTensor]
    data_offset: int
    nbytes: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.value(ARCHITECTURE))

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata, an array as a list.

        Raises SourceError if the file has changed since it was opened.
        """
        entry = self.entries.get(key)
        if entry is None:
            return default
        if entry.kind != _ARRAY:
            return entry.value
        with _walk(self.path) as walk:
            return walk.items(entry)

    def length(self, key: str) -> int | None:
        """How many items an array has; None if there is no array of this name."""
        entry = self.entries.get(key)
        return None if entry is None or entry.kind != _ARRAY else entry.length


def read_header(path: Path, architectures: Collection[str]) -> Header:
    """Read and check the header of a GGUF file.

    Args:
        path: The file.
        architectures: The names of the architectures that are read.

    Returns:
        The header. Only the first part of a split file has an architecture.

    Raises:
        SourceError: The architecture is not one of `architectures`, in which case nothing after it is read; the header
            claims more than the file contains, or more values than METADATA_VALUES; or tensors overlap.
    """
    with _walk(path) as walk:
        tensors, fields = walk.counts()
        entries: dict[str, Entry] = {}
        for _ in range(fields):
            key = walk.string()
            if key in entries:
                raise ValueError(f"contains {key} twice")
            entries[key] = walk.entry()
            if key == ARCHITECTURE and entries[key].value not in architectures:
                raise _unknown(entries[key].value, architectures, path)
        records = [walk.tensor() for _ in range(tensors)]
        start = walk.aligned(entries.get("general.alignment", Entry(_UINT32, _ALIGNMENT)))
        placed = {name: _placed(path, name, shape, kind, start + offset) for name, shape, kind, offset in records}
        if len(placed) < len(records):
            raise ValueError("has two tensors of the same name")
        nbytes = len(walk.data)
    end = start
    for tensor in sorted(placed.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise SourceError(f"{path}: its tensors overlap each other; fetch it again")
        end = tensor.offset + tensor.nbytes
    if end > nbytes and placed:
        raise SourceError(f"{path}: not a whole GGUF file (its last tensor ends at byte {end:,}); fetch it again")
    return Header(path, entries, placed, start, nbytes)


def _unknown(architecture: Any, architectures: Collection[str], path: Path) -> SourceError:
    if architecture == "clip":
        return SourceError(f"{path}: holds a vision projector (mmproj), not a language model; name the model's file")
    known = ", ".join(architectures)
    return SourceError(
        f"{path}: architecture {architecture!r} is not read from GGUF (only {known}); use a safetensors checkpoint"
    )


def _placed(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    """The tensor at an offset, with its size computed from ggml's block sizes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        named = GGMLQuantizationType(kind)
    except ValueError:
        raise SourceError(
            f"{path}: {name} is stored as type {kind}, which is not read; use a safetensors checkpoint"
        ) from None
    block, size = GGML_QUANT_SIZES[named]
    if shape[-1] % block:
        raise ValueError(f"has {name} with rows of {shape[-1]}, not a multiple of {block}")
    return StoredTensor(path.name, shape, named.name, offset, math.prod(shape) // block * size)


@contextmanager
def _walk(path: Path) -> Iterator[_Walk]:
    """Open the header of a file at its beginning; errors within the block become a SourceError."""
    try:
        if not limits.is_file(path):
            raise ValueError("not a file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Walk(data)
    except (struct.error, OverflowError):
        raise SourceError(f"{path}: not a whole GGUF file (ends early); fetch it again") from None
    except (ValueError, OSError) as error:
        raise SourceError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None


class _Walk:
    """A reader of the header, whose position moves only forward and stays within the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.left = data, 0, limits.METADATA_VALUES
        self.end = min(len(data), limits.GGUF_HEADER_BYTES)

    def counts(self) -> tuple[int, int]:
        """Read the number of tensors and the number of metadata entries."""
        if self.data[:4] != MAGIC:
            raise ValueError("does not begin with GGUF")
        version = self._number("<4xI")
        if version not in (2, 3):
            raise ValueError(f"has version {version}, which is not read")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if tensors > limits.TENSORS:
            raise ValueError(f"claims {tensors:,} tensors")
        return tensors, self._counted(fields)

    def entry(self) -> Entry:
        """Read the next value of the metadata; of an array, only its position."""
        kind = self._number("<I")
        if kind == _STRING:
            return Entry(kind, self.string())
        if kind != _ARRAY:
            return Entry(kind, self._number(f"<{self._form(kind)}"))
        items, count = self._number("<I"), self._counted(self._number("<Q"))
        place = self.place
        if items == _STRING:
            for _ in self._lengths(count):
                pass
        else:
            self._skip(struct.calcsize(f"<{self._form(items)}") * count)
        return Entry(kind, None, items, count, place)

    def items(self, entry: Entry) -> list[Any]:
        """Read the items of an array."""
        self.place, items = entry.place, entry.items
        if items == _STRING:
            return [str(self.data[place : place + length], "utf-8") for place, length in self._lengths(entry.length)]
        assert items is not None
        return list(struct.unpack_from(f"<{entry.length}{self._form(items)}", self.data, self.place))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read the next tensor: its name, shape, type, and offset in bytes from the first tensor."""
        name, dimensions = self.string(), self._number("<I")
        if not 0 < dimensions <= _DIMENSIONS:
            raise ValueError(f"has a tensor with {dimensions:,} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        if math.prod(length or 1 for length in shape) > limits.TENSOR_BYTES:
            raise ValueError("has a tensor that is too large for any file")
        return name, shape, self._number("<I"), self._number("<Q")

    def aligned(self, alignment: Entry) -> int:
        """The position of the first tensor: the end of the header, rounded up to the alignment."""
        size = alignment.value
        if alignment.kind != _UINT32 or size == 0 or size & (size - 1):
            raise ValueError(f"aligns its tensors to {size!r}, which is not a power of two")
        return -(-self.place // int(size)) * int(size)

    def string(self) -> str:
        """Read the next string."""
        length = self._number("<Q")
        place = self.place
        self._skip(length)
        return str(self.data[place : place + length], "utf-8")

    def _lengths(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield the position and length of each of the next strings, and move past them."""
        data, place, end, unpack = self.data, self.place, self.end, _LENGTH.unpack_from
        for _ in range(count):
            (length,) = unpack(data, place)
            if length > end - place - 8:
                raise self._short()
            yield place + 8, length
            place += 8 + length
            self.place = place

    def _form(self, kind: int) -> str:
        if kind not in _FORMS:
            raise ValueError(f"has a value of type {kind}, which is unknown")
        return _FORMS[kind]

    def _counted(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"has more than {limits.METADATA_VALUES:,} values")
        return count

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return number

    def _skip(self, count: int) -> None:
        if count > self.end - self.place:
            raise self._short()
        self.place += count

    def _short(self) -> ValueError:
        whole = self.end == len(self.data)
        return ValueError("ends early" if whole else f"has more than {self.end:,} bytes before its tensors")
