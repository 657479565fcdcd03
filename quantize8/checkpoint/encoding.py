"""Weights that a checkpoint stores quantized: a few stored tensors that stand for one floating-point matrix."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantize8.checkpoint.base import Checkpoint
from quantize8.errors import SourceError
from quantize8.ops.reference import INT8_MAX, Array, dequantize, quantize_rowwise, scale_of


@dataclass
class Encoding(ABC):
    """A weight [N, K] of the module `module`, and the tensors of `stored` that it consists of."""

    stored: Checkpoint
    module: str
    tensors: tuple[str, ...]  # full names, the one with the values first
    shape: tuple[int, int]
    _whole: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop of the weight that the stored numbers stand for, float32 [n, K]."""

    def whole(self, name: str) -> Array:
        """A stored tensor as a whole, kept for the next block of rows that the same thread asks for."""
        kept: dict[str, Array] = self._whole.__dict__
        if name not in kept:
            info = self.stored.tensors[name]
            kept[name] = self.stored.rows(name, 0, info.shape[0] if info.shape else 1)
        return kept[name]

    def release(self) -> None:
        """Let go of what `whole` keeps for this thread."""
        self._whole.__dict__.clear()

    def refuse(self, what: str) -> SourceError:
        """The error for a module that is not stored as its format says."""
        where = self.stored.folder / self.stored.tensors[self.tensors[0]].file
        return SourceError(f"{where}: {self.module} {what}; fetch the checkpoint again, or use its original")


class RowwiseInt8(Encoding):
    """Int8 codes with one scale per row: what all int8 formats here hold, so that codes pass from one to another."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> Array:
        """Rows start..stop of the codes as stored, int8 [n, K]."""

    @abstractmethod
    def absmax(self, start: int, stop: int) -> Array:
        """127 times the scale of each of those rows, float32 [n]."""

    def int8_rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Codes in -127..127 and absmax of rows start..stop; a row that holds -128 is quantized again."""
        codes, absmax = self.codes(start, stop), self.absmax(start, stop)
        lowest = np.flatnonzero(codes.min(axis=1, initial=0) < -INT8_MAX)
        if len(lowest):
            codes = codes.copy()
            codes[lowest], absmax[lowest] = quantize_rowwise(dequantize(codes[lowest], absmax[lowest]))
        return codes, absmax

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        return dequantize(self.codes(start, stop), self.absmax(start, stop))


def absmax_of(scale: Array) -> Array:
    """The absmax float32 whose 127th part is `scale`: the float16 number it was, where it was one.

    127 * scale alone may differ from it in the last bit, and a weight carried to another format and back would too.
    """
    scale = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        near = (scale * np.float32(INT8_MAX)).astype(np.float16).astype(np.float32)
    absmax: Array = np.where(scale_of(near) == scale, near, scale * np.float32(INT8_MAX))
    return absmax


def unpack_int32(packed: Array, bits: int) -> Array:
    """Unsigned numbers of 8 bits or fewer from int32 [R, C], lowest bits first: uint8 [R, C * 32 / bits].

    A number may lie across two words, as those of 3 bits do: C is then a multiple of `bits`.
    """
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return octets
    period = 1 if 8 % bits == 0 else bits  # octets after which numbers begin at a first bit again
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
    """Raise SourceError where a quantization_config asks for something that its reader does not know."""
    for key, values in known.items():
        if entry.get(key, values[0]) not in values:
            raise SourceError(
                f"{where}: its quantization_config has {key} = {entry[key]!r}, which is not read; use its original"
            )
