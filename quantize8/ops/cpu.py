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
    INT8_MAX,
    Array,
    ColumnStats,
    Int8Weight,
    OutlierMode,
    fixed_columns,
    token_outliers,
)
from quantize8.ops.scales import ScaleSearch, search_absmax

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {np.dtype(np.float16): np.int16, np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.float32): np.uint32}
_FLOAT_EXACT = 1024  # products of codes whose sum float32 holds exactly: 1024 * 127^2 < 2^24


def quantize_rowwise(
    weight: Array, stats: ColumnStats | None = None, search: ScaleSearch | None = None
) -> tuple[Array, Array]:
    """`reference.quantize_rowwise`, and `reference.column_stats` added to `stats` in the same pass.

    Args: weight, contiguous float16, bfloat16 or float32 [N, K]; stats, to add to (rows so far a multiple of 64);
    search, for the absmax of `scales.search_absmax`.
    Returns: codes int8 [N, K], absmax float32 [N], non-finite where a row cannot be quantized.
    """
    if not jit.INSTALLED:
        codes, absmax = reference.quantize_rowwise(weight, search_absmax(weight, search) if search else None)
        if stats is not None:
            reference.column_stats(weight, codes, absmax, stats)
        return codes, absmax
    from quantize8.ops.rows import quantize_rows, search_rows

    rows, columns = weight.shape
    codes, absmax = np.empty((rows, columns), np.int8), np.empty(rows, np.float32)
    stats = ColumnStats.empty(columns) if stats is None else stats
    if weight.size:
        bits, sums = weight.view(_BITS[weight.dtype]), (stats.absmax, stats.sum_square, stats.sum_error, stats.outliers)
        if search is not None:
            search_rows(bits, search.weights(columns), search.kept(columns), absmax)
        quantize_rows(bits, codes, absmax, *sums, search is not None)
    else:
        absmax.fill(0)
    stats.rows += rows
    return codes, absmax


def all_finite(values: Array) -> bool:
    """Whether floating-point numbers, contiguous, are neither NaN nor infinite."""
    if not jit.INSTALLED or values.dtype not in _BITS:
        return bool(np.isfinite(values).all())
    from quantize8.ops.rows import all_finite

    return bool(all_finite(values.reshape(-1).view(_BITS[values.dtype])))


def quantize_activations(
    x: Tensor, threshold: float, columns: Tensor | None = None, hybrid: bool = False
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
        if hybrid:
            outliers |= torch.from_numpy(token_outliers(values.numpy()))
            values.masked_fill_(outliers, 0)
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
    codes, scale, outliers = quantize_activations(x, threshold, fixed, mode == "hybrid")
    product = int8_matmul(codes, weight.codes).to(torch.float32)
    product.mul_(scale[:, None]).mul_(weight.absmax / INT8_MAX)
    columns = fixed if mode == "static" else None if outliers is None else outliers.any(0).nonzero().flatten()
    if columns is not None and len(columns):
        residual = x[:, columns].float() - codes[:, columns] * scale[:, None]
        if mode in ("elementwise", "hybrid") and outliers is not None:
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
    exact = None
    if weight.outlier_columns is not None:
        columns = weight.outlier_columns[: weight.outlier_weight.shape[1]]
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
        same = columns[:, None] == weight.outlier_columns[: weight.outlier_weight.shape[1]]
        here, stored = same.nonzero(as_tuple=True)
        values[:, here] = weight.outlier_weight[:, stored].float()
    return values


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
