"""The CPU path: weight quantization, activation codes and products, computed by the kernels in cpu/*.c.

Weights are NumPy arrays (no torch) and take one fused pass per row, while the row is in cache: float16 rounding,
absmax, codes and column statistics. ctypes releases the GIL, so threads can run these passes in parallel. Activations
and products are torch tensors. Results that `reference` defines as integers or scales equal it bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from quantize8.kernels import isa as units
from quantize8.kernels.isa import check, pointer
from quantize8.kernels.reference import Array, ColumnStats, Int8Weight, LayerMode, fixed_columns
from quantize8.kernels.scales import CLIPS, LEAST_SCALE, ScaleSearch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# enum dtype of cpu/quantize8.h
_DTYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float16): 2}
_CLIPS = np.array(CLIPS, np.float32)


def quantize_rowwise(
    weight: Array, stats: ColumnStats | None = None, search: ScaleSearch | None = None
) -> tuple[Array, Array]:
    """`reference.quantize_rowwise`, and in the same pass `reference.column_stats`.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        stats: Column statistics to which these rows are added; its rows so far must be a multiple of 64.
        search: Take the absmax of `scales.search_absmax` instead of each row's largest magnitude.

    Returns:
        Codes int8 [N, K], and absmax float32 [N], not finite where a row cannot be quantized.

    Raises:
        MemoryError: A kernel cannot allocate its buffers.
        DependencyError: The kernels are not compiled for this machine.
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
        outputs = [pointer(array) for array in (codes, absmax, *sums)]
        check(library.q8_quantize_rows(*given, search is not None, *outputs))
    stats.rows += rows
    return codes, absmax


def all_finite(values: Array) -> bool:
    """Whether none of these floating-point numbers is NaN or infinite."""
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
    """`reference.quantize_activations` on torch tensors, without columns known beforehand.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        threshold: Elements with |x| >= threshold get the code 0; 0 turns this off.

    Returns:
        Codes int8 [M, K], and scale float32 [M].
    """
    from quantize8.kernels.packed import encode

    return encode(x, threshold)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int8_matmul` on torch tensors: a int8 [M, K] times the transpose of b int8 [N, K], int32 [M, N]."""
    from quantize8.kernels.packed import PackedWeight

    return PackedWeight(b, b.new_ones(len(b)).float()).multiply(a)


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: LayerMode = "dynamic") -> Tensor:
    """`reference.linear` on torch tensors.

    The weight is packed for this call alone; use `PackedWeight` for a weight that is used again.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: The quantized weight [N, K].
        bias: [N] or None.
        threshold: Outlier threshold of mode "dynamic"; 0 for none.
        mode: "dynamic", "static" or "hybrid".

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: The mode is "static" and the weight has no stored columns.
        WeightError: int32 sums cannot hold K products, or an outlier column is outside the weight.
    """
    import torch

    from quantize8.kernels.packed import PackedWeight

    columns, exact = fixed_columns(weight, mode), weight.outlier_weight
    if columns is not None and weight.outlier_columns is None:  # hybrid without calibration
        columns, exact = torch.zeros(0, dtype=torch.int32), torch.zeros(len(weight.codes), 0, dtype=torch.float16)
    return PackedWeight(weight.codes, weight.absmax, None, columns, exact).linear(x, bias, threshold, mode)
