"""4-bit floats in blocks that share a scale: MXFP4 and NVFP4.

A number is E2M1: a sign, two bits of exponent and one of mantissa, for 0, 0.5, 1, 1.5, 2, 3, 4 and 6. A byte holds two,
the first in its low bits. The blocks are consecutive columns of a row:

- MXFP4 (OCP Microscaling Formats 1.0): 32 numbers and a scale E8M0, a byte b that stands for 2^(b - 127). The byte 255
  is NaN. Such weights are small integers times a power of two, so that int8 can hold them exactly.
- NVFP4: 16 numbers and a scale in float8 (E4M3), beside a float32 scale of the whole tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from quantize8.formats.encoding import Encoding
from quantize8.kernels.reference import Array
from quantize8.sources.base import DTYPES, MXFP4, NVFP4

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the codes 0..7; 8..15 are their negatives
BLOCK = {MXFP4: 32, NVFP4: 16}  # numbers that share a scale
PACKED_TYPE = "U8"
E8M0_TYPES = ("U8", "F8_E8M0")
E4M3_TYPES = ("F8_E4M3",)
_E8M0_NAN = 255
_CODES = np.concatenate([NUMBERS, -NUMBERS])
# both numbers of each byte, as 64 bits that are moved at once
_PAIRS = np.stack([np.tile(_CODES, 16), np.repeat(_CODES, 16)], axis=1).view(np.uint64)[:, 0]


def unpack(packed: Array) -> Array:
    """Unpack E2M1 numbers, uint8 [..., C], to float32 [..., 2 C]."""
    return _PAIRS[packed].view(np.float32)


def is_nan(scales: Array) -> Array:
    """Which E8M0 scales, in uint8 or float8, are NaN; bool in their shape."""
    found: Array = scales.view(np.uint8) == _E8M0_NAN
    return found


def powers(scales: Array) -> Array:
    """The powers of two that E8M0 scales, in uint8 or float8, stand for: float32 in their shape."""
    return scales.view(DTYPES["F8_E8M0"]).astype(np.float32)


def scaled(packed: Array, scales: Array) -> Array:
    """Decode rows of blocks.

    Args:
        packed: E2M1 numbers, uint8 [n, K / 2].
        scales: float32 [n, G], one for each of the G blocks of a row.

    Returns:
        float32 [n, K], contiguous. A product is rounded once, and infinite beyond float32.
    """
    rows, columns = len(packed), 2 * packed.shape[1]
    values = unpack(packed).reshape(rows, scales.shape[1], columns // max(1, scales.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller decides about values that are not finite
        values *= scales[:, :, None]
    return values.reshape(rows, columns)


@dataclass
class Float4(Encoding):
    """A weight [N, K] of 4-bit floats. `tensors` are the packed numbers, the scales of the blocks, and others.

    Attributes:
        kind: MXFP4 or NVFP4.
    """

    kind: str = NVFP4

    @property
    def stored_dtype(self) -> str:
        """See `Encoding.stored_dtype`."""
        return self.kind

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        scales = self.whole(self.tensors[1])[start:stop]
        if self.kind == NVFP4:
            factors = self.times_global(scales.astype(np.float32))
        else:
            if (nan := is_nan(scales)).any():
                row = start + int(np.argmax(nan.any(axis=1)))
                raise self.refuse(f"has a scale that is NaN in row {row} of {self.tensors[1]}")
            factors = powers(scales)
        return scaled(self.stored.rows(self.tensors[0], start, stop), factors)

    @abstractmethod
    def times_global(self, scales: Array) -> Array:
        """Combine NVFP4's scales of blocks, float32 [n, G], with the scale of the tensor, rounding once."""

    def global_scale(self, name: str) -> Array:
        """Read the scale of the tensor, float32 [1].

        Raises:
            SourceError: It is not a positive number.
        """
        value = self.whole(name).reshape(1)
        if not 0 < value[0] < np.inf:
            raise self.refuse(f"has {name.rpartition('.')[2]} {value[0]}, which is not a positive number")
        return value

    def check_parts(self, global_scale: str) -> None:
        """Check dtypes and shapes of the stored tensors, and set the shape.

        Args:
            global_scale: Name of the scale of the tensor, which MXFP4 does not have.

        Raises:
            SourceError: A tensor is missing or does not fit.
        """
        packed, scale = (self.stored.tensors[name] for name in self.tensors[:2])
        if packed.dtype != PACKED_TYPE or len(packed.shape) != 2 or 0 in packed.shape:
            raise self.refuse(f"stores its weight as {packed.dtype} {list(packed.shape)}, which is not read")
        rows, columns, block = packed.shape[0], 2 * packed.shape[1], BLOCK[self.kind]
        self.shape = (rows, columns)
        types = E8M0_TYPES if self.kind == MXFP4 else E4M3_TYPES
        if scale.dtype not in types or columns % block or scale.shape != (rows, columns // block):
            raise self.refuse(
                f"is {self.kind} {rows}x{columns} with scales {scale.dtype} {list(scale.shape)}, not one "
                f"{types[-1]} for each {block} columns"
            )
        whole = self.stored.tensors.get(global_scale)
        if self.kind == NVFP4 and (whole is None or whole.dtype != "F32" or whole.shape not in ((), (1,), (1, 1))):
            actual = "no" if whole is None else f"{whole.dtype} {list(whole.shape)} as"
            raise self.refuse(f"has {actual} {global_scale.rpartition('.')[2]}, which is one F32 number")
        if self.kind == MXFP4 and whole is not None:
            raise self.refuse(f"is MXFP4, which has no {global_scale.rpartition('.')[2]}")
