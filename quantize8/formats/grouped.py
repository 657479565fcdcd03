"""What AWQ and GPTQ share: unsigned integers with one scale and one zero point for each group of in features.

A module M has `M.qweight`, int32 words that pack several integers each, in features first; `M.scales` [G, N]; and
`M.qzeros`, zero points [G, N] packed in words along N. w[n, k] = (q[n, k] - z[n, g]) * s[n, g], where g is the group of
in feature k. The difference has at most 9 bits and a float16 scale has 11, so the product is exact in float32, and
rounding it to float16 gives the result of float16 arithmetic.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint

WEIGHT, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (WEIGHT, ZEROS, SCALES, ORDER)
SCALE_TYPES = ("F16", "BF16", "F32")
WORDS = ("I32",)


@dataclass
class Grouped(Encoding):
    """Integers minus their zero points, times their scales."""

    group_size: int = 0  # consecutive in features that share a scale; 0 if g_idx assigns them to groups

    @abstractmethod
    def integers(self, start: int, stop: int) -> Array:
        """Unpack rows start..stop of the integers, uint8 [n, K]."""

    @abstractmethod
    def zero_points(self, start: int, stop: int) -> Array:
        """Unpack the zero points of rows start..stop, uint8 [n, G]."""

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        columns = self.shape[1]
        integers, zero = self.integers(start, stop), np.ascontiguousarray(self.zero_points(start, stop))
        with np.errstate(over="ignore", invalid="ignore"):  # the caller decides about values that are not finite
            scale = self.whole(f"{self.module}.{SCALES}")[:, start:stop].T.astype(np.float32, order="C")
            if self.group_size and columns % self.group_size == 0:  # no gathering: the groups become a dimension
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
        """Check a tensor of the module.

        Args:
            part: The last part of the tensor's name, such as "scales".
            dtypes: The dtypes that are accepted.
            shape: The expected shape.

        Raises:
            SourceError: The tensor is missing, or has another dtype or shape.
        """
        info = self.stored.tensors.get(f"{self.module}.{part}")
        if info is None:
            raise self.refuse(f"has no {part}")
        if info.dtype not in dtypes or info.shape != shape:
            actual, expected = f"{info.dtype} {list(info.shape)}", f"{' or '.join(dtypes)} {list(shape)}"
            raise self.refuse(f"has {part} {actual} instead of {expected}")


def modules(stored: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Find the quantized modules of a checkpoint.

    Args:
        stored: The checkpoint as it is stored.

    Returns:
        The names of each module's tensors, `qweight` first, by module name.

    Raises:
        SourceError: A module has other parts but no qweight, such as the scales of activations that AWQ adds to some
            models; or a qweight is not int32 [R, C].
    """
    tensors: dict[str, tuple[str, ...]] = {}
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        where = f"{stored.folder / info.file}: {module}"
        if part not in PARTS:
            continue
        if f"{module}.{WEIGHT}" not in stored.tensors:
            raise SourceError(f"{where} has {part} but no {WEIGHT}, which is not read; use the original checkpoint")
        if part == WEIGHT and (info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape):
            raise SourceError(
                f"{where} has {WEIGHT} {info.dtype} {list(info.shape)}, which is not read; use the original checkpoint"
            )
        names = (f"{module}.{part}" for part in PARTS)
        tensors[module] = tuple(name for name in names if name in stored.tensors)
    return tensors


def group_size_of(entry: dict[str, Any], default: int, where: str) -> int:
    """Read the group_size of a quantization_config.

    Args:
        entry: The quantization_config.
        default: The size if it has none.
        where: The checkpoint, for the message.

    Returns:
        The size, or -1 for one group of all in features.

    Raises:
        SourceError: The size is not a positive integer or -1.
    """
    size = entry.get("group_size", entry.get("q_group_size", default))
    if type(size) is not int or (size <= 0 and size != -1):
        raise SourceError(f"{where}: its group_size {size!r} is not a size; fetch config.json again")
    return size
