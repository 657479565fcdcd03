"""Reads AutoAWQ's checkpoints, version "gemm": 4-bit integers packed along the out features, interleaved.

The layout is that of AutoAWQ 0.2.9 (`awq/modules/linear/gemm.py`): qweight int32 [K, N/8], qzeros int32 [G, N/8] and
scales float16 [G, N], with G = K / group_size. The eight integers of a word, from the lowest bits up, belong to its out
features 0, 2, 4, 6, 1, 3, 5 and 7. With zero_point = false, every zero point is 8, and qzeros may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding, require
from quantize8.formats.grouped import (
    ORDER,
    SCALE_TYPES,
    SCALES,
    WEIGHT,
    WORDS,
    ZEROS,
    Grouped,
    group_size_of,
    modules,
)
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint

METHOD = "awq"
_BITS = 4
_LANES = 32 // _BITS
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # out features of a word, from its lowest bits up
_MIDDLE = 8  # the zero point when config.json says zero_point = false
_GROUP_SIZE = 128  # when config.json does not say


@dataclass
class _Gemm(Grouped):
    symmetric: bool = False

    def integers(self, start: int, stop: int) -> Array:
        return self._unpack(WEIGHT, start, stop)

    def zero_points(self, start: int, stop: int) -> Array:
        if self.symmetric:
            return np.full((stop - start, self.shape[1] // self.group_size), _MIDDLE, np.uint8)
        return self._unpack(ZEROS, start, stop)

    def _unpack(self, part: str, start: int, stop: int) -> Array:
        """Unpack out features start..stop of a packed tensor [R, N/8], as uint8 [n, R]."""
        first, last = start // _LANES, -(-stop // _LANES)
        words = np.ascontiguousarray(self.whole(f"{self.module}.{part}")[:, first:last].T)
        values = np.empty((last - first, _LANES, words.shape[1]), np.uint8)
        for lane, feature in enumerate(_ORDER):
            np.bitwise_and(words >> _BITS * lane, 2**_BITS - 1, out=values[:, feature], casting="unsafe")
        offset = first * _LANES
        return values.reshape(len(words) * _LANES, words.shape[1])[start - offset : stop - offset]


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the modules with a qweight; the lists of modules in config.json are not consulted.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: The version is not gemm, the integers do not have 4 bits, the shapes of a module do not fit
            together, or zero_point is false and zero points other than 8 are stored.
    """
    where = str(stored.folder)
    require(entry, {"bits": (_BITS,), "w_bit": (_BITS,), "zero_point": (True, False)}, where)
    for key in ("version", "checkpoint_format", "format"):  # AutoAWQ's name for it, and GPTQModel's
        if str(entry.get(key) or "gemm").lower() != "gemm":
            raise SourceError(
                f"{where}: is AWQ with {key} {entry[key]!r}, which is not read (only gemm); use the original checkpoint"
            )
    size, symmetric = group_size_of(entry, _GROUP_SIZE, where), not entry.get("zero_point", True)
    return {module: _module(stored, module, names, size, symmetric) for module, names in modules(stored).items()}


def _module(stored: Checkpoint, module: str, names: tuple[str, ...], size: int, symmetric: bool) -> Encoding:
    columns, words = stored.tensors[names[0]].shape
    size = columns if size == -1 else size
    encoding = _Gemm(stored, module, names, (words * _LANES, columns), group_size=size, symmetric=symmetric)
    if f"{module}.{ORDER}" in names:
        raise encoding.refuse(f"has {ORDER}, which AWQ does not use")
    if columns % size:
        raise encoding.refuse(f"has {columns} in features, which group_size {size} does not divide")
    encoding.check(SCALES, SCALE_TYPES, (columns // size, words * _LANES))
    has_zeros = f"{module}.{ZEROS}" in names
    if has_zeros or not symmetric:
        encoding.check(ZEROS, WORDS, (columns // size, words))
    if has_zeros and symmetric:
        encoding.symmetric = False
        differ = (encoding.zero_points(0, words * _LANES) != _MIDDLE).any()
        encoding.release()
        if differ:
            raise encoding.refuse(f"has zero points other than {_MIDDLE}, but config.json says zero_point = false")
    return encoding
