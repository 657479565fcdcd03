"""The CPU path: Numba for the passes bound by memory, torch's int8 GEMM for the products.

Weights (NumPy arrays, no torch) take one fused pass per row while it sits in cache: float16 rounding, absmax, codes
and column statistics. It releases the GIL, so threads run it side by side. Activations and products are torch tensors.
Every result that `reference` defines as an integer or a scale is equal to it, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from quantize8.ops import jit, reference
from quantize8.ops.jit import PARALLEL, compiled, prange
from quantize8.ops.reference import (
    DECODE_TOKENS,
    FLOAT16_MAX,
    INT8_MAX,
    OUTLIER_SIGMAS,
    STATS_TILE_ROWS,
    Array,
    ColumnStats,
    Int8Weight,
    OutlierMode,
    fixed_columns,
)

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT16, _BFLOAT16, _FLOAT32 = 0, 1, 2  # how the kernel reads the bits of a weight
_KINDS = {
    np.dtype(np.float16): (_FLOAT16, np.uint16),
    np.dtype(ml_dtypes.bfloat16): (_BFLOAT16, np.uint16),
    np.dtype(np.float32): (_FLOAT32, np.uint32),
}
_FLOAT16_MAX_BITS = int(np.float32(FLOAT16_MAX).view(np.uint32))
_FLOAT16_NORMAL_BITS = int(np.float32(2.0**-14).view(np.uint32))  # below it float16 is evenly spaced by 2^-24
_FLOAT_EXACT = 1024  # products of codes whose sum float32 holds exactly: 1024 * 127^2 < 2^24
_REBIAS = np.float32(2.0**112)  # float16 exponents are biased by 15, float32's by 127


def quantize_rowwise(weight: Array, stats: ColumnStats | None = None) -> tuple[Array, Array]:
    """`reference.quantize_rowwise`, and `reference.column_stats` added to `stats` in the same pass.

    Args: weight, contiguous float16, bfloat16 or float32 [N, K]; stats, to add to (rows so far a multiple of 64).
    Returns: codes int8 [N, K], absmax float32 [N], non-finite where a row cannot be quantized.
    """
    if not jit.INSTALLED:
        codes, absmax = reference.quantize_rowwise(weight)
        if stats is not None:
            reference.column_stats(weight, codes, absmax, stats)
        return codes, absmax
    rows, columns = weight.shape
    kind, bits = _KINDS[weight.dtype]
    codes, absmax = np.empty((rows, columns), np.int8), np.empty(rows, np.float32)
    stats = ColumnStats.empty(columns) if stats is None else stats
    if weight.size:
        _quantize_rows(
            weight.view(bits), kind, codes, absmax, stats.absmax, stats.sum_square, stats.sum_error, stats.outliers
        )
    else:
        absmax.fill(0)
    stats.rows += rows
    return codes, absmax


def quantize_activations(
    x: Tensor, threshold: float, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference.quantize_activations` on torch tensors; the outlier mask is None where no element can be one.

    Args: x [M, K]; columns int [J], the fixed outlier columns, or None to take the elements with |x| >= threshold.
    Returns: codes int8 [M, K], scale float32 [M], outliers bool [M, K] or None.
    """
    import torch

    values = x.to(torch.float32, copy=True)
    outliers = None
    if columns is not None:
        values[:, columns] = 0
        outliers = torch.zeros_like(values, dtype=torch.bool)
        outliers[:, columns] = True
    elif threshold > 0:
        outliers = values.abs() >= threshold
        values.masked_fill_(outliers, 0)
    absmax = values.abs().amax(1) if values.numel() else values.new_zeros(len(values))
    inverse = absmax.reciprocal() * INT8_MAX
    usable = absmax.isfinite() & inverse.isfinite()
    values.mul_(inverse.where(usable, 0)[:, None]).round_()
    if not usable.all():
        values.masked_fill_(~usable[:, None], 0)
    return values.to(torch.int8), absmax / INT8_MAX, outliers


def mixed_matmul(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: OutlierMode = "dynamic"
) -> Tensor:
    """`reference.mixed_matmul` on torch tensors: x [M, K] -> [M, N] in x's dtype, summed in float32."""
    import torch

    fixed = fixed_columns(weight, mode)
    codes, scale, outliers = quantize_activations(x, threshold, fixed)
    product = int8_matmul(codes, weight.codes).to(torch.float32)
    product.mul_(scale[:, None]).mul_(weight.absmax / INT8_MAX)
    columns = fixed if fixed is not None else None if outliers is None else outliers.any(0).nonzero().flatten()
    if columns is not None and len(columns):
        residual = x[:, columns].float() - codes[:, columns] * scale[:, None]
        if mode == "elementwise" and outliers is not None:
            residual.masked_fill_(~outliers[:, columns], 0)
        product.addmm_(residual, _float_columns(weight, columns).t())
    return (product if bias is None else product.add_(bias)).to(x.dtype)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int8_matmul` on torch tensors: a int8 [M, K] times b int8 [N, K] transposed, int32 [M, N]."""
    import torch

    if a.shape[1] > 1 and _library_is_exact():  # for K = 1 torch 2.13 returns memory it has not written
        return torch._int_mm(a, b.t())
    product = torch.zeros(len(a), len(b), dtype=torch.int32)
    for start in range(0, a.shape[1], _FLOAT_EXACT):
        part = slice(start, start + _FLOAT_EXACT)
        product += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return product


@cache
def _library_is_exact() -> bool:
    """Whether torch's int8 product is: on processors without VNNI it may saturate 16-bit sums on the way."""
    import torch

    largest = torch.full((32, 512), INT8_MAX, dtype=torch.int8)
    product = torch._int_mm(largest, -largest.t())
    return bool((product == -largest.shape[1] * INT8_MAX**2).all())


def weight_only_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """`reference.weight_only_matmul` on torch tensors: x [M, K], M <= 16 -> [M, N] in x's dtype."""
    import torch

    tokens = x.to(torch.float32, copy=weight.outlier_columns is not None).contiguous()
    columns = weight.outlier_columns
    exact = None
    if columns is not None:
        exact = tokens[:, columns]
        tokens[:, columns] = 0
    product = torch.empty(len(x), len(weight.codes))
    scale = weight.absmax / INT8_MAX
    if jit.INSTALLED:
        with PARALLEL:
            _weight_only(tokens.numpy(), weight.codes.numpy(), scale.numpy(), product.numpy())
    else:
        torch.mm(tokens, weight.codes.float().t(), out=product).mul_(scale)
    if exact is not None:
        product.addmm_(exact, weight.outlier_weight.float().t())
    return (product if bias is None else product.add_(bias)).to(x.dtype)


def linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: OutlierMode = "dynamic"
) -> Tensor:
    """`reference.linear` on torch tensors: x [M, K] -> [M, N] in x's dtype."""
    if len(x) <= DECODE_TOKENS:
        return weight_only_matmul(x, weight, bias)
    return mixed_matmul(x, weight, bias, threshold, mode)


def _float_columns(weight: Int8Weight, columns: Tensor) -> Tensor:
    """float32 [N, J]: columns of the weight, exact where the artifact stores them, else dequantized."""
    values: Tensor = weight.codes[:, columns].float() * (weight.absmax / INT8_MAX)[:, None]
    if weight.outlier_columns is not None:
        import torch

        stored = torch.isin(columns, weight.outlier_columns)
        place = torch.searchsorted(weight.outlier_columns, columns[stored].to(weight.outlier_columns.dtype))
        values[:, stored] = weight.outlier_weight[:, place].float()
    return values


@compiled(nogil=True)
def _quantize_rows(
    weight: Any,
    kind: int,
    codes: Any,
    absmax: Any,
    column_absmax: Any,
    sum_square: Any,
    sum_error: Any,
    outliers: Any,
) -> None:
    """One pass over the bits of a weight [N, K]. No fastmath: sums must run in the reference's order."""
    rows, columns = weight.shape
    source_bits, half_bits = np.empty(columns, np.uint32), np.empty(columns, np.uint32)
    source, half = source_bits.view(np.float32), half_bits.view(np.float32)
    peak_bits = np.empty(1, np.uint32)
    peak_value = peak_bits.view(np.float32)
    squares = np.zeros(columns, np.float32)
    errors = np.zeros(columns, np.float32)
    counts = np.zeros(columns, np.int32)
    peaks = np.zeros(columns, np.float32)
    for n in range(rows):
        _unpack(weight[n], kind, source_bits, half_bits)
        peak = np.uint32(0)
        for k in range(columns):
            peak = max(peak, half_bits[k] & np.uint32(0x7FFFFFFF))
        inverse = np.float32(0)
        if peak > np.uint32(_FLOAT16_MAX_BITS):
            absmax[n] = np.inf
            half[:] = 0  # the row cannot be quantized; no float may turn into an integer that has no room for it
        else:
            peak_bits[0] = peak
            absmax[n] = peak_value[0]
            if peak > 0:
                inverse = np.float32(1) / absmax[n] * np.float32(INT8_MAX)
        scale = absmax[n] / np.float32(INT8_MAX)
        energy = np.int64(0)
        for k in range(columns):
            code = np.int8(np.rint(half[k] * inverse))
            codes[n, k] = code
            energy += np.int32(code) * np.int32(code)
        # q^2 K > 36 sum q^2, with the division once a row: q^2 is an integer, so rounding down changes nothing
        limit = np.int32(OUTLIER_SIGMAS * OUTLIER_SIGMAS * energy // columns)
        for k in range(columns):
            value = source[k]
            code = np.int32(codes[n, k])
            error = value - np.float32(code) * scale
            squares[k] += value * value
            errors[k] += error * error
            counts[k] += np.int32(code * code > limit)
            peaks[k] = max(peaks[k], abs(value))
        if (n + 1) % STATS_TILE_ROWS == 0 or n + 1 == rows:
            for k in range(columns):
                sum_square[k] += squares[k]
                sum_error[k] += errors[k]
                outliers[k] += counts[k]
                column_absmax[k] = max(column_absmax[k], peaks[k])
            squares[:] = 0
            errors[:] = 0
            counts[:] = 0


@compiled(nogil=True)
def _unpack(row: Any, kind: int, source: Any, half: Any) -> None:
    """Float32 bits of a row [K]: of its stored values, and of those rounded to float16 (half to even)."""
    sign, magnitude = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
    if kind == _FLOAT16:
        for k in range(len(row)):
            bits = np.uint32(row[k])
            source[k] = (bits & np.uint32(0x7FFF)) << np.uint32(13)
        value = source.view(np.float32)
        for k in range(len(row)):
            value[k] *= _REBIAS  # exact, subnormals included; infinity and NaN land above 65504
        for k in range(len(row)):
            source[k] |= (np.uint32(row[k]) & np.uint32(0x8000)) << np.uint32(16)
            half[k] = source[k]
        return
    shift = np.uint32(16) if kind == _BFLOAT16 else np.uint32(0)
    value = half.view(np.float32)
    for k in range(len(row)):
        source[k] = np.uint32(row[k]) << shift
        half[k] = source[k] & magnitude
    for k in range(len(row)):  # adding 0.5, whose neighbours are 2^-24 apart, rounds a float16 subnormal
        bits = half[k]
        value[k] = (value[k] + np.float32(0.5)) - np.float32(0.5)
        if bits >= np.uint32(_FLOAT16_NORMAL_BITS):  # drop 13 of the 23 mantissa bits
            half[k] = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    for k in range(len(row)):
        half[k] |= source[k] & sign


@compiled(nogil=True, parallel=True, fastmath={"reassoc", "contract"})
def _weight_only(x: Any, codes: Any, scale: Any, product: Any) -> None:
    """product[m, n] = scale[n] sum_k x[m, k] codes[n, k]: each row of codes is read once, for all tokens."""
    tokens, columns = x.shape
    for n in prange(len(codes)):
        row = np.empty(columns, np.float32)
        for k in range(columns):
            row[k] = codes[n, k]
        for m in range(tokens):
            total = np.float32(0)
            for k in range(columns):
                total += x[m, k] * row[k]
            product[m, n] = total * scale[n]
