"""The CPU path: passes over weights, activation codes and products, in the kernels of cpu/*.c.

Weights are NumPy arrays (no torch), and take one fused pass per row while it sits in cache: float16 rounding, absmax,
codes and column statistics. ctypes releases the GIL, so threads run it side by side. Activations and products are torch
tensors. Every result that `reference` defines as an integer or a scale is equal to it, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from quantize8.ops import units
from quantize8.ops.reference import Array, ColumnStats, Int8Weight, LayerMode, fixed_columns
from quantize8.ops.scales import CLIPS, LEAST_SCALE, ScaleSearch
from quantize8.ops.units import check, pointer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# enum dtype of cpu/quantize8.h
_DTYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float16): 2}
_CLIPS = np.array(CLIPS, np.float32)


def quantize_rowwise(
    weight: Array, stats: ColumnStats | None = None, search: ScaleSearch | None = None
) -> tuple[Array, Array]:
    """`reference.quantize_rowwise`, and `reference.column_stats` added to `stats` in the same pass.

    Args: weight, contiguous float16, bfloat16 or float32 [N, K]; stats, to add to (rows so far a multiple of 64);
    search, for the absmax of `scales.search_absmax`.
    Returns: codes int8 [N, K], absmax float32 [N], non-finite where a row cannot be quantized.
    """
    rows, columns = weight.shape
    codes, absmax = np.empty((rows, columns), np.int8), np.zeros(rows, np.float32)
    stats = ColumnStats.empty(columns) if stats is None else stats
    if weight.size:
        weight, library = np.ascontiguousarray(weight), units.library()
        given = (_DTYPES[weight.dtype], pointer(weight), rows, columns)
        if search is not None:
            importance, kept = search.weights(columns), search.kept(columns)
            how = (pointer(importance), pointer(kept), pointer(_CLIPS), len(_CLIPS), LEAST_SCALE)
            check(library.q8_search_rows(*given, *how, pointer(absmax)))
        sums = (stats.absmax, stats.sum_square, stats.sum_error, stats.outliers)
        places = [pointer(array) for array in (codes, absmax, *sums)]
        check(library.q8_quantize_rows(*given, search is not None, *places))
    stats.rows += rows
    return codes, absmax


def all_finite(values: Array) -> bool:
    """Whether floating-point numbers, contiguous, are neither NaN nor infinite."""
    if values.dtype not in _DTYPES:
        return bool(np.isfinite(values).all())
    values = np.ascontiguousarray(values)
    return bool(units.library().q8_all_finite(_DTYPES[values.dtype], pointer(values), values.size))


class CpuQuantizer:
    """Quantizes the rows of a weight on the CPU, for one thread at a time; also with searched scales.

    Args:
        search: What the scales are searched for; None for those of the absolute maximum.
    """

    block_bytes = None  # takes blocks of any size

    def __init__(self, search: ScaleSearch | None = None) -> None:
        self._search = search

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Yield (block, codes, absmax) for each block [n, K], n a multiple of 64 in all but the last."""
        for block in blocks:
            yield (block, *quantize_rowwise(block, stats, self._search))


def quantize_activations(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations` of torch tensors, without fixed columns.

    Args: x, float16, bfloat16 or float32 [M, K]; elements with |x| >= threshold get the code 0 (0: none).
    Returns: codes int8 [M, K], scale float32 [M].
    """
    from quantize8.ops.packed import encode

    return encode(x, threshold)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int8_matmul` on torch tensors: a int8 [M, K] times b int8 [N, K] transposed, int32 [M, N]."""
    from quantize8.ops.packed import PackedWeight

    return PackedWeight(b, b.new_ones(len(b)).float()).multiply(a)


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: LayerMode = "dynamic") -> Tensor:
    """`reference.linear` on torch tensors: x [M, K] -> [M, N] in x's dtype.

    The weight is packed for this one call: `PackedWeight` is for those that serve again.
    """
    import torch

    from quantize8.ops.packed import PackedWeight

    columns, exact = fixed_columns(weight, mode), weight.outlier_weight
    if columns is not None and weight.outlier_columns is None:  # hybrid without calibration
        columns, exact = torch.zeros(0, dtype=torch.int32), torch.zeros(len(weight.codes), 0, dtype=torch.float16)
    return PackedWeight(weight.codes, weight.absmax, None, columns, exact).linear(x, bias, threshold, mode)
