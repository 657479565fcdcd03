"""Int8 with one scale for each group of 32, 64 or 128 weights of a row, as compressed-tensors' w8a16 can have it.

A scale is stored in the model's dtype. It is absmax / 127, rounded to that dtype, or the next larger number where the
largest weight of the group would get a code beyond 127. The codes are the weights times the inverse of the scale as it
is stored, rounded half away from zero: the arithmetic of Q8_0, whose kernels compute them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.kernels import cpu, q8_0
from quantize8.kernels.q8_0 import BLOCK
from quantize8.kernels.reference import INT8_MAX, Array, scale_of


def quantize_rows(values: Array, size: int, dtype: np.dtype[Any], exact: bool = False) -> tuple[Array, Array]:
    """Quantize rows of a weight by groups.

    Args:
        values: Contiguous float32 [N, K], K a multiple of the size.
        size: Weights in a group, a multiple of 32.
        dtype: The dtype of the scales: float16, bfloat16 or float32.
        exact: Take the scale of `reference.exact_scales` for each group that has one.

    Returns:
        Codes int8 [N, K] in -127..127, and scales [N, K / size] in `dtype`. A group that `dtype` cannot hold, or that
        contains NaN or infinity, has a scale that is not finite, and codes 0. A group of zeros has the scale 0.
    """
    rows, columns = values.shape
    blocks, groups = values.reshape(-1, BLOCK), values.reshape(-1, size)
    with np.errstate(all="ignore"):
        peaks = q8_0.absmax_of(blocks).reshape(len(groups), size // BLOCK).max(axis=1)
        scales = _rounded(peaks, dtype)
        if exact:
            powers = cpu.exact_scales(groups, dtype)
            scales = np.where(powers > 0, powers.astype(dtype), scales)
        inverses = np.float32(1) / scales.astype(np.float32)
    inverses[~np.isfinite(inverses)] = 0
    packed = q8_0.encode(blocks, np.repeat(inverses, size // BLOCK))
    codes = np.ascontiguousarray(q8_0.codes_of(packed))
    return codes.reshape(rows, columns), scales.reshape(rows, columns // size)


def carry_rows(absmax: Array, groups: int, dtype: np.dtype[Any]) -> Array:
    """The scales [N, G] in `dtype` with which row-wise int8 keeps its codes: absmax float32 [N] / 127, rounded."""
    with np.errstate(over="ignore"):
        scales: Array = np.repeat(scale_of(absmax)[:, None], groups, axis=1).astype(dtype)
    return scales


def row_errors(values: Array, codes: Array, scales: Array) -> tuple[Array, Array]:
    """The sum of squares of each row, and that of its quantization error, as `q8_0.row_errors` adds them.

    Args:
        values: Contiguous float32 [N, K].
        codes: int8 [N, K].
        scales: [N, G].

    Returns:
        Two arrays float64 [N]: squares of the values, and of the errors.
    """
    rows, columns = values.shape
    packed = np.empty((rows, columns // BLOCK, q8_0.BLOCK_BYTES), np.uint8)
    q8_0.codes_of(packed)[:] = codes.reshape(rows, columns // BLOCK, BLOCK)
    factors = np.repeat(scales.astype(np.float32), columns // BLOCK // scales.shape[1], axis=1)
    return q8_0.row_errors(values, packed, factors)


def _rounded(peaks: Array, dtype: np.dtype[Any]) -> Array:
    """The scales of groups with the absmax `peaks`, float32 [R], as they are stored."""
    scales: Array = scale_of(peaks).astype(dtype)
    beyond = peaks / scales.astype(np.float32) >= INT8_MAX + 0.5  # rounded down by half a step or more, or to 0
    scales.view(f"u{dtype.itemsize}")[beyond] += 1  # the next larger number
    return scales
