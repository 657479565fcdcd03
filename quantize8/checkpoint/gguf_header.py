"""The counts and lengths in a GGUF header, held against the file before llama.cpp's package believes them.

That package makes an object of every value a count asks for, past the end of the file too. The layout is that of
ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from quantize8 import limits

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> its bytes
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # of a tensor, as in ggml


def check_header(path: Path) -> None:
    """Raise ValueError where a header asks for more than the file has, or for more values than METADATA_VALUES."""
    if not path.is_file():
        raise ValueError("no file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _Walk(data).header()
        except struct.error:
            raise ValueError("ends early") from None


class _Walk:
    """A place in the header that only moves on within the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.left = data, 0, limits.METADATA_VALUES

    def header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("does not begin with GGUF")
        version = self._number("<4xI")
        if version not in (2, 3):
            raise ValueError(f"is of version {version}, which is not read")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if tensors > limits.TENSORS:
            raise ValueError(f"claims {tensors:,} tensors")
        for _ in range(self._counted(fields)):
            self._string()
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._tensor()

    def _tensor(self) -> None:
        self._string()
        dimensions = self._number("<I")
        if not 0 < dimensions <= _DIMENSIONS:
            raise ValueError(f"has a tensor of {dimensions:,} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= self._number("<Q") or 1
        if count > limits.TENSOR_BYTES:  # the package multiplies in 64 bits
            raise ValueError("has a tensor that no file holds")
        self._number("<IQ")

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind != _ARRAY:
            self._skip(self._size(kind))
        else:
            inner, count = self._number("<I"), self._counted(self._number("<Q"))
            if inner != _STRING:
                self._skip(self._size(inner) * count)
                return
            for _ in range(count):
                self._string()

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"has a value of type {kind}, which is not read")
        return _SIZES[kind]

    def _counted(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"has more than {limits.METADATA_VALUES:,} values")
        return count

    def _number(self, form: str) -> int:
        number: int = struct.unpack_from(form, self.data, self.place)[0]
        self.place += struct.calcsize(form)
        return number

    def _skip(self, count: int) -> None:
        if count > len(self.data) - self.place:
            raise ValueError("ends early")
        self.place += count
