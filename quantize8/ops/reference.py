"""The arithmetic of quantize8, written to be read: every kernel is tested against this file.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) multiplies in int8 with one scale per row of the activations and
one per row of the weight (section 3.1), and keeps the few feature columns with magnitudes above a threshold in 16-bit
(section 3.2). Shapes: M tokens, N out features, K in features, J outlier columns.

    weight:      absmax[n] = max_k |w16[n, k]|          q[n, k] = rint(w16[n, k] * (127 * (1 / absmax[n])))
    activation:  the same per token, except that outlier elements count as 0
    product:     y = (q_x q_w^T) * s_x * s_w + r[:, O] w[:, O]^T + bias,        s = absmax / 127
                 with O the outlier columns and r = x - q_x s_x what int8 did not capture of them

Codes and scales are exact statements (integers, one rounding per operation, in float32), so a kernel must reproduce
them bit for bit. Products are computed here in float64 from the quantized operands; a kernel is held to the error of
rounding that result to its output type. Arrays are NumPy's; bfloat16 is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
OutlierMode = Literal["hybrid", "dynamic", "bitsandbytes"]  # to choose from; the last: ops/bitsandbytes.py
LayerMode = Literal[OutlierMode, "static"]  # static: of hybrid the stored columns alone, which is what a GPU computes

MODES: tuple[OutlierMode, ...] = get_args(OutlierMode)
STATIC_MODES = ("static", "hybrid")  # which know outlier columns beforehand
INT8_MAX = 127  # -128 is never used, so that codes are symmetric, as in bitsandbytes
FLOAT16_MAX = 65504.0  # a larger weight becomes infinite in float16, the type that weights are quantized from
DEFAULT_THRESHOLD = 6.0  # the paper's, section 3.2: columns with a magnitude >= 6 matter, smaller ones do not
OUTLIER_SIGMAS = 6  # a weight beyond 6 standard deviations of its row counts as an outlier of its column
STATS_TILE_ROWS = 64  # column sums run down 64 rows in float32, and over such tiles in float64: one order everywhere
TOKEN_SIGMAS = 8  # beyond 8 root mean squares of its token an element takes part in 16-bit (mode hybrid)
LEAST_SQUARES = 2.0**-100  # smaller sums of squares have lost digits to underflow: nothing stands out of them
_LANES = 64  # in which the squares of a token are summed
DECODE_TOKENS = 16  # up to this M reading the weight is the cost, so activations stay in 16-bit (no error from them)


@dataclass
class ColumnStats:
    """What a weight [N, K] looks like down its input columns, accumulated over its rows in ascending order."""

    absmax: Array  # float32 [K], largest |w|
    sum_square: Array  # float64 [K], sum of w^2
    sum_error: Array  # float64 [K], sum of (w - dequantized w)^2
    outliers: Array  # int64 [K], how many weights exceed OUTLIER_SIGMAS of their row
    rows: int = 0

    @classmethod
    def empty(cls, columns: int) -> ColumnStats:
        """Statistics of no rows."""
        return cls(
            np.zeros(columns, np.float32),
            np.zeros(columns, np.float64),
            np.zeros(columns, np.float64),
            np.zeros(columns, np.int64),
        )


@dataclass(frozen=True)
class Int8Weight:
    """A quantized weight [N, K]; the arrays may be NumPy's or torch's, all of one kind."""

    codes: Any  # int8 [N, K]
    absmax: Any  # float32 [N], largest magnitude of the row; scale = absmax / 127
    outlier_columns: Any = None  # int32 [J]: columns that a calibrated artifact treats apart, the most important first
    outlier_weight: Any = None  # float16 [N, E], E <= J: the first of those columns, exactly


def quantize_rowwise(weight: Array, absmax: Array | None = None) -> tuple[Array, Array]:
    """Row-wise absmax quantization of a weight (paper, section 3.1), by the rule of bitsandbytes.

    Args: weight, float16, bfloat16 or float32 [N, K]; absmax float32 [N], where it is chosen otherwise (ops/scales.py).
    Returns: codes int8 [N, K] in [-127, 127], absmax float32 [N]. A zero row has absmax 0 and codes 0. A row with
    NaN, infinity, or a |w| beyond float16 has a non-finite absmax and codes 0: the caller decides what to do with it.
    """
    values = to_float16(weight).astype(np.float32)
    absmax = np.abs(values).max(axis=1, initial=0.0) if absmax is None else absmax
    return codes_of(values, absmax), absmax


def column_stats(weight: Array, codes: Array, absmax: Array, stats: ColumnStats | None = None) -> ColumnStats:
    """Statistics down the input columns of a weight and of its quantization.

    Args: weight [N, K]; its codes int8 [N, K] and absmax float32 [N]; stats, to go on from (rows so far a multiple of
    STATS_TILE_ROWS). Outliers are counted on the codes, where integers decide: q^2 K > 36 sum_k q^2.
    """
    rows, columns = weight.shape
    stats = ColumnStats.empty(columns) if stats is None else stats
    values = weight.astype(np.float32)
    error = values - dequantize(codes, absmax)
    squares = codes.astype(np.int64) ** 2
    for start in range(0, rows, STATS_TILE_ROWS):
        tile_square = np.zeros(columns, np.float32)
        tile_error = np.zeros(columns, np.float32)
        for n in range(start, min(start + STATS_TILE_ROWS, rows)):
            tile_square += values[n] * values[n]
            tile_error += error[n] * error[n]
        stats.sum_square += tile_square
        stats.sum_error += tile_error
    np.maximum(stats.absmax, np.abs(values).max(axis=0, initial=0.0), out=stats.absmax)
    stats.outliers += (squares * columns > OUTLIER_SIGMAS**2 * squares.sum(axis=1, keepdims=True)).sum(axis=0)
    stats.rows += rows
    return stats


def dequantize(codes: Array, absmax: Array) -> Array:
    """Weight float32 [N, K] that codes int8 [N, K] and absmax float32 [N] stand for."""
    return codes.astype(np.float32) * scale_of(absmax)[:, None]


def quantize_activations(
    x: Array, threshold: float, columns: Array | None = None, hybrid: bool = False
) -> tuple[Array, Array, Array]:
    """Token-wise absmax quantization with the outlier elements left out (paper, section 3.2).

    Args: x [M, K]. Outlier elements are those with |x| >= threshold (0 turns this off), or, where `columns` int [J] is
    given, all of those columns and no others; `hybrid`: and what stands out of each token.
    Returns: codes int8 [M, K], 0 at outlier elements; scale float32 [M]; outliers bool [M, K]. A row with NaN has
    scale NaN, so that its product is NaN.
    """
    values = x.astype(np.float32)
    if columns is not None:
        outliers = np.zeros(values.shape, np.bool_)
        outliers[:, columns] = True
        if hybrid:
            outliers |= token_outliers(np.where(outliers, np.float32(0), values))
    else:
        outliers = np.abs(values) >= threshold if threshold > 0 else np.zeros(values.shape, np.bool_)
    values = np.where(outliers, np.float32(0), values)
    absmax = np.abs(values).max(axis=1, initial=0.0)
    return codes_of(values, absmax), scale_of(absmax), outliers


def token_outliers(values: Array) -> Array:
    """Which elements of float32 [M, K] stand out of their token: bool [M, K], true where |x| > 8 sqrt(sum x^2 / K).

    Squares are summed in 64 lanes, column k in lane k mod 64, and lanes by halves, in float32: one order everywhere.
    A token with NaN or infinity, or whose sum is below LEAST_SQUARES, has none. There are fewer than K / 64 in a token.
    """
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns // _LANES), _LANES), np.float32)
    padded.reshape(rows, -1)[:, :columns] = values
    lanes = np.zeros((rows, _LANES), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for s in range(padded.shape[1]):
            lanes += padded[:, s] * padded[:, s]
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        limit = np.float32(TOKEN_SIGMAS) * np.sqrt(lanes / np.float32(columns))
        found: Array = (np.abs(values) > limit) & (lanes >= LEAST_SQUARES)
    return found


def int8_matmul(a: Array, b: Array) -> Array:
    """a int8 [M, K] times b int8 [N, K] transposed: int32 [M, N], exact while K <= 133,144."""
    product: Array = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)
    return product


def mixed_matmul(
    x: Array, weight: Int8Weight, bias: Array | None, threshold: float, mode: LayerMode = "dynamic"
) -> Array:
    """Mixed-precision product of the paper's figure 2: int8 for all, 16-bit for what int8 misses of the outliers.

    Args: x [M, K]; bias [N] or None; threshold, 0 for plain int8. mode "dynamic": a column with one outlier element is
    corrected for every token (LLM.int8() as published). "static": the columns listed with the weight are, and no
    others. "hybrid": these, and the elements that stand out of their token, so that it does not depend on its
    neighbours.
    Raises ValueError for mode "static" where the weight has no stored columns.
    Returns: float64 [M, N], exact but for float64's own rounding.
    """
    codes, scale, outliers = quantize_activations(x, threshold, fixed_columns(weight, mode), mode == "hybrid")
    columns = np.flatnonzero(outliers.any(axis=0))
    residual = x.astype(np.float64) - codes * scale[:, None].astype(np.float64)
    if mode == "hybrid":
        residual = np.where(outliers, residual, 0.0)
    product = int8_matmul(codes, weight.codes) * scale[:, None].astype(np.float64)
    product = product * scale_of(weight.absmax).astype(np.float64)
    product += residual[:, columns] @ _float_weight(weight)[:, columns].T
    return product if bias is None else product + bias.astype(np.float64)


def weight_only_matmul(x: Array, weight: Int8Weight, bias: Array | None) -> Array:
    """x [M, K] in its own precision times the dequantized weight: float64 [M, N]. The decode path."""
    product: Array = x.astype(np.float64) @ _float_weight(weight).T
    return product if bias is None else product + bias.astype(np.float64)


def linear(x: Array, weight: Int8Weight, bias: Array | None, threshold: float, mode: LayerMode = "dynamic") -> Array:
    """What a quantized linear layer computes: x [M, K] -> float64 [M, N], by the path that M calls for."""
    if len(x) <= DECODE_TOKENS:
        return weight_only_matmul(x, weight, bias)
    return mixed_matmul(x, weight, bias, threshold, mode)


def fixed_columns(weight: Int8Weight, mode: LayerMode) -> Any:
    """The outlier columns of a mode that knows them beforehand; None where the activations decide."""
    if mode not in STATIC_MODES:
        return None
    if weight.outlier_columns is not None:
        return weight.outlier_columns
    if mode == "static":
        raise ValueError("mode static needs a weight with stored outlier columns")
    return np.zeros(0, np.int64)


def to_float16(weight: Array) -> Array:
    """Weight in float16, rounded once; magnitudes over 65504 become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return weight.astype(np.float32).astype(np.float16)


def scale_of(absmax: Array) -> Array:
    """Step between two codes: absmax / 127, in float32."""
    scale: Array = absmax / np.float32(INT8_MAX)
    return scale


def codes_of(values: Array, absmax: Array) -> Array:
    """Codes of values float32 [R, K], by bitsandbytes' order: the reciprocal, times 127, times the value.

    Each step rounds to float32. 127 / absmax in one step, or w / absmax * 127, differs in some 1e-5 of codes. A row
    whose absmax is 0, not finite, or so small (below 4e-37) that the inverse is not, gets codes 0. A value beyond its
    absmax gets the last code.
    """
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / absmax * np.float32(INT8_MAX)
    usable = np.isfinite(absmax) & np.isfinite(inverse)
    inverse = np.where(usable, inverse, np.float32(0))
    finite = np.where(usable[:, None], values, np.float32(0))
    codes: Array = np.clip(np.rint(finite * inverse[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8)
    return codes


def as_bytes(values: Array) -> memoryview[int]:
    """The bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def _float_weight(weight: Int8Weight) -> Array:
    """float64 [N, K]: dequantized, with the stored exact columns in their places."""
    values: Array = weight.codes.astype(np.float64) * scale_of(weight.absmax)[:, None].astype(np.float64)
    if weight.outlier_columns is not None:
        values[:, weight.outlier_columns[: weight.outlier_weight.shape[1]]] = weight.outlier_weight
    return values
