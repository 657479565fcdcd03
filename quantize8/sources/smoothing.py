"""A checkpoint whose weights are multiplied by powers of two, by row and by column, as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from quantize8.kernels.reference import FLOAT16_MAX, Array
from quantize8.sources.base import Checkpoint
from quantize8.sources.wrapper import Wrapper


@dataclass(frozen=True)
class Factors:
    """The factors that a tensor [N, K] or [N] is multiplied by.

    Attributes:
        rows: Powers of two, float32 [N]; None if rows have no factors.
        columns: Powers of two, float32 [K]; None if columns have no factors.
    """

    rows: Array | None = None
    columns: Array | None = None

    def of(self, block: Array, start: int) -> Array:
        """The factors of a block of rows, in a shape that broadcasts with it.

        Args:
            block: The block, [n, K] or [n].
            start: The number of its first row.
        """
        if self.rows is None:
            assert self.columns is not None
            return self.columns
        rows = self.rows[start : start + len(block)].reshape(-1, *(1,) * (block.ndim - 1))
        return rows if self.columns is None else rows * self.columns


class SmoothedCheckpoint(Wrapper):
    """A checkpoint with some of its tensors multiplied by factors, in their stored dtype.

    Args:
        inner: The checkpoint to read.
        factors: The factors by tensor name.
        features: The number of features that have a factor of their own.
        left: The number of those whose factor had to be 1.
    """

    def __init__(self, inner: Checkpoint, factors: Mapping[str, Factors], features: int = 0, left: int = 0) -> None:
        # the codes of a multiplied weight differ from those of the source
        changed = {name: replace(inner.tensors[name], is_int8=False, rotation=0) for name in factors}
        super().__init__(inner, {**inner.tensors, **changed})
        self.factors = factors
        self.features, self.left = features, left

    @property
    def summary(self) -> str:
        """How many features are smoothed, for a report."""
        left = f"; {self.left} left, whose weights would overflow or lose digits" if self.left else ""
        return f"{self.features - self.left} features{left}"

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
        """Find the rows or columns of a tensor for which multiplying is not exact.

        A product is lost if the dtype of the tensor cannot represent it, or if it exceeds float16, from which int8 is
        computed. NaN counts as lost.

        Args:
            name: A tensor that has factors.

        Returns:
            bool [N], one for each row, if the tensor has row factors, otherwise bool [K], one for each column.
        """
        by_row, start = self.factors[name].rows is not None, 0
        blocks: list[Array] = []
        for values in self.inner.blocks(name):
            factor = self.factors[name].of(values, start)
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = self._scaled(name, values, start).astype(np.float32)
                # a power of two changes no digits, so a value that is not restored has overflowed or become subnormal
                lost = (scaled / factor != values.astype(np.float32)) | (np.abs(scaled) > FLOAT16_MAX)
            blocks.append(lost.reshape(len(lost), -1).any(axis=1) if by_row else lost.any(axis=0)[None])
            start += len(values)
        whole: Array = np.concatenate(blocks)
        return whole if by_row else np.asarray(whole.any(axis=0))

    def _scaled(self, name: str, values: Array, start: int) -> Array:
        factor = self.factors[name].of(values, start)
        with np.errstate(over="ignore"):  # `lossy` reports it
            scaled: Array = (values.astype(np.float32) * factor).astype(values.dtype)
        return scaled
