"""A checkpoint whose weights are read multiplied by powers of two, row by row and column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from quantize8.checkpoint.base import Checkpoint
from quantize8.checkpoint.wrapper import Wrapper
from quantize8.ops.reference import FLOAT16_MAX, Array


@dataclass(frozen=True)
class Factors:
    """What a tensor [N, K] or [N] is multiplied by: powers of two, float32; None where there are none."""

    rows: Array | None = None  # [N]
    columns: Array | None = None  # [K]

    def of(self, block: Array, start: int) -> Array:
        """The factors of a block of rows [n, K] or [n], the first of them row `start`, in a shape to multiply by."""
        if self.rows is None:
            assert self.columns is not None
            return self.columns
        rows = self.rows[start : start + len(block)].reshape(-1, *(1,) * (block.ndim - 1))
        return rows if self.columns is None else rows * self.columns


class SmoothedCheckpoint(Wrapper):
    """`inner` with some of its tensors multiplied, in the dtype that they are stored in."""

    def __init__(self, inner: Checkpoint, factors: Mapping[str, Factors], features: int = 0, left: int = 0) -> None:
        super().__init__(inner, inner.tensors)
        self.factors = factors
        self.features, self.left = features, left  # rows that have a factor of their own; those where it had to be 1

    @property
    def summary(self) -> str:
        """How many features are smoothed, for a report."""
        left = f"; {self.left} left, whose weights would overflow or lose digits" if self.left else ""
        return f"{self.features - self.left} features{left}"

    def is_int8(self, name: str) -> bool:
        """See `Checkpoint.is_int8`; the codes of a weight that is multiplied are not those of the source."""
        return name not in self.factors and super().is_int8(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        values = super().rows(name, start, stop)
        return values if name not in self.factors else self._scaled(name, values, start)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        start = 0
        for values in self.inner.blocks(name, block_bytes, multiple):
            yield values if name not in self.factors else self._scaled(name, values, start)
            start += len(values) if values.ndim else 1

    def lossy(self, name: str) -> Array:
        """Elements of a multiplied tensor, row by row reduced: where its dtype does not hold the product, or
        float16, from which int8 starts, is exceeded.

        Returns bool [N] of rows for a tensor that has row factors, else bool [K] of columns. NaN counts as lost.
        """
        by_row, start = self.factors[name].rows is not None, 0
        found: list[Array] = []
        for values in self.inner.blocks(name):
            factor = self.factors[name].of(values, start)
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = self._scaled(name, values, start).astype(np.float32)
                # a power of two changes no digit: what does not come back has overflowed, or lost some as a subnormal
                lost = (scaled / factor != values.astype(np.float32)) | (np.abs(scaled) > FLOAT16_MAX)
            found.append(lost.reshape(len(lost), -1).any(axis=1) if by_row else lost.any(axis=0)[None])
            start += len(values)
        whole: Array = np.concatenate(found)
        return whole if by_row else np.asarray(whole.any(axis=0))

    def _scaled(self, name: str, values: Array, start: int) -> Array:
        factor = self.factors[name].of(values, start)
        with np.errstate(over="ignore"):  # `lossy` tells of it
            scaled: Array = (values.astype(np.float32) * factor).astype(values.dtype)
        return scaled
