"""What AWQ and GPTQ share: unsigned integers stored down the in features, with scale and zero point by group of them.

A module M has `M.qweight`, int32 words of several integers; `M.scales` [G, N]; `M.qzeros`, zero points [G, N] packed
in words along N. w[n, k] = (q[n, k] - z[n, g]) * s[n, g] with g the group of in feature k. The difference has at most
9 bits and a float16 scale 11, so that the product is exact in float32, and rounds to what float16 arithmetic gives.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize8.checkpoint.base import Checkpoint
from quantize8.checkpoint.encoding import Encoding
from quantize8.errors import SourceError
from quantize8.ops.reference import Array

WEIGHT, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (WEIGHT, ZEROS, SCALES, ORDER)
SCALE_TYPES = ("F16", "BF16", "F32")
WORDS = ("I32",)


@dataclass
class Grouped(Encoding):
    """Integers minus zero points, times scales."""

    group_size: int = 0  # consecutive in features that share a scale; 0 where g_idx says which do

    @abstractmethod
    def integers(self, start: int, stop: int) -> Array:
        """Rows start..stop of the integers, uint8 [n, K]."""

    @abstractmethod
    def zero_points(self, start: int, stop: int) -> Array:
        """What is subtracted from those rows, uint8 [n, G]."""

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        columns = self.shape[1]
        integers, zero = self.integers(start, stop), np.ascontiguousarray(self.zero_points(start, stop))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the caller to judge
            scale = self.whole(f"{self.module}.{SCALES}")[:, start:stop].T.astype(np.float32, order="C")
            if self.group_size and columns % self.group_size == 0:  # the groups are a dimension: nothing to look up
                integers = integers.reshape(stop - start, columns // self.group_size, self.group_size)
                zero, scale = zero[:, :, None], scale[:, :, None]
            else:
                group = self.group_of()
                zero, scale = zero.take(group, axis=1), scale.take(group, axis=1)  # rows stay contiguous
            values: Array = np.subtract(integers, zero, dtype=np.float32)
            values *= scale
        return values.reshape(stop - start, columns)

    def group_of(self) -> Array:
        """The group of each in feature, int [K]."""
        if self.group_size:
            return np.arange(self.shape[1]) // self.group_size
        return self.whole(f"{self.module}.{ORDER}")

    def check(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Raise SourceError where a tensor of the module is missing, or not of this dtype and shape."""
        info = self.stored.tensors.get(f"{self.module}.{part}")
        if info is None:
            raise self.refuse(f"has no {part}")
        if info.dtype not in dtypes or info.shape != shape:
            is_, meant = f"{info.dtype} {list(info.shape)}", f"{' or '.join(dtypes)} {list(shape)}"
            raise self.refuse(f"has {part} {is_} where {meant} would fit")


def modules(stored: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Module -> the names of its tensors, `qweight` first.

    Raises SourceError for parts without qweight, as the scales of activations are that AWQ adds to some models, and
    where qweight is not int32 [R, C].
    """
    found: dict[str, tuple[str, ...]] = {}
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        where = f"{stored.folder / info.file}: {module}"
        if part not in PARTS:
            continue
        if f"{module}.{WEIGHT}" not in stored.tensors:
            raise SourceError(f"{where} has {part} and no {WEIGHT}, which is not read; use the original")
        if part == WEIGHT and (info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape):
            raise SourceError(
                f"{where} has {WEIGHT} {info.dtype} {list(info.shape)}, which is not read; use the original"
            )
        names = (f"{module}.{part}" for part in PARTS)
        found[module] = tuple(name for name in names if name in stored.tensors)
    return found


def group_size_of(entry: dict[str, Any], default: int, where: str) -> int:
    """The config's group_size: a size, or -1 for one group of all in features."""
    size = entry.get("group_size", entry.get("q_group_size", default))
    if type(size) is not int or (size <= 0 and size != -1):
        raise SourceError(f"{where}: its group_size {size!r} is no size; fetch config.json again")
    return size
