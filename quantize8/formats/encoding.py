"""Quantized weights of a checkpoint: several stored tensors that represent one floating-point tensor."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from quantize8.errors import SourceError
from quantize8.kernels.reference import INT8_MAX, Array, dequantize, quantize_rowwise
from quantize8.sources.base import Checkpoint


@dataclass
class Encoding(ABC):
    """A quantized weight [N, K] and the stored tensors that it consists of.

    Attributes:
        stored: The checkpoint that holds the tensors.
        module: The name of the module that the weight belongs to.
        tensors: The full names of the tensors, the one with the values first.
        shape: The shape [N, K] of the weight; of fused experts [E, K, N].
        rotation: Size of the blocks of input features that are rotated in the stored values, but not in `rows`; 0 for
            none.
        dtype: The dtype in which `rows` returns it.
    """

    stored: Checkpoint
    module: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    rotation: int = 0
    dtype: ClassVar[str] = "F32"
    _whole: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The name of the weight in the model."""
        return f"{self.module}.weight"

    @property
    def stored_dtype(self) -> str:
        """See `TensorInfo.stored_dtype`."""
        return self.stored.tensors[self.tensors[0]].dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Dequantize rows start..stop of the weight, to float32 [n, K]."""

    def whole(self, name: str) -> Array:
        """Read a stored tensor as a whole, and cache it for the next block of rows that the same thread asks for."""
        cache: dict[str, Array] = self._whole.__dict__
        if name not in cache:
            info = self.stored.tensors[name]
            cache[name] = self.stored.rows(name, 0, info.shape[0] if info.shape else 1)
        return cache[name]

    def release(self) -> None:
        """Drop the tensors that `whole` has cached for this thread."""
        self._whole.__dict__.clear()

    def refuse(self, what: str) -> SourceError:
        """Build the error for a module that is not stored as its format requires."""
        where = self.stored.folder / self.stored.tensors[self.tensors[0]].file
        return SourceError(f"{where}: {self.module} {what}; fetch the checkpoint again, or use the original one")


class RowwiseInt8(Encoding):
    """Int8 codes with one scale per row: common to all int8 formats here, so codes can be copied between them."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> Array:
        """Rows start..stop of the codes as they are stored, int8 [n, K]."""

    @abstractmethod
    def absmax(self, start: int, stop: int) -> Array:
        """127 times the scale of each of those rows, float32 [n]."""

    def int8_rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Read rows start..stop for a format whose codes are symmetric.

        Returns:
            Codes int8 [n, K] in -127..127, and absmax float32 [n]. A row that contains -128 is quantized again.
        """
        codes, absmax = self.codes(start, stop), self.absmax(start, stop)
        lowest = np.flatnonzero(codes.min(axis=1, initial=0) < -INT8_MAX)
        if len(lowest):
            codes = codes.copy()
            codes[lowest], absmax[lowest] = quantize_rowwise(dequantize(codes[lowest], absmax[lowest]))
        return codes, absmax

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        return dequantize(self.codes(start, stop), self.absmax(start, stop))


class GroupwiseInt8(Encoding):
    """Int8 codes with one scale per group of consecutive columns."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> Array:
        """Rows start..stop of the codes as they are stored, int8 [n, K]."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> Array:
        """The scales of those rows, float32 [n, G]."""


def unpack_int32(packed: Array, bits: int) -> Array:
    """Unpack unsigned numbers from int32 words, lowest bits first.

    Args:
        packed: The words, int32 [R, C]. If numbers cross word boundaries, as 3-bit numbers do, C is a multiple of
            `bits`.
        bits: The width of a number, at most 8.

    Returns:
        The numbers, uint8 [R, C * 32 / bits].
    """
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return octets
    period = 1 if 8 % bits == 0 else bits  # octets after which a number starts at bit 0 again
    octets = octets.reshape(len(packed), octets.shape[1] // period, period)
    lanes = 8 * period // bits
    values = np.empty((*octets.shape[:2], lanes), np.uint8)
    for lane in range(lanes):
        octet, shift = divmod(lane * bits, 8)
        value = octets[..., octet] >> np.uint8(shift)
        if shift + bits > 8:
            value |= octets[..., octet + 1] << np.uint8(8 - shift)
        np.bitwise_and(value, np.uint8(2**bits - 1), out=values[..., lane])
    return values.reshape(len(packed), octets.shape[1] * lanes)


def require(entry: dict[str, Any], known: dict[str, tuple[Any, ...]], where: str) -> None:
    """Raise SourceError if a quantization_config has a setting that its reader does not support.

    Args:
        entry: The quantization_config.
        known: The supported values by key, the default first.
        where: The checkpoint, for the message.
    """
    for key, values in known.items():
        if entry.get(key, values[0]) not in values:
            raise SourceError(
                f"{where}: its quantization_config has {key} = {entry[key]!r}, which is not read; "
                "use the original checkpoint"
            )
