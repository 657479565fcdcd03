"""The definition of quantize8's arithmetic, written for readability: every kernel is tested against this file.

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) multiplies in int8 with one scale per row of the activations and
one per row of the weight (section 3.1). The few feature columns with magnitudes of at least a threshold stay in 16-bit
(section 3.2). Shapes: M tokens, N output features, K input features, J outlier columns.

    weight:      absmax[n] = max_k |w16[n, k]|          q[n, k] = rint(w16[n, k] * (127 * (1 / absmax[n])))
    activation:  the same per token, except that outlier elements count as 0
    product:     y = (q_x q_w^T) * s_x * s_w + r[:, O] w[:, O]^T + bias,        s = absmax / 127
                 where O are the outlier columns, and r = x - q_x s_x is the residual that int8 did not capture
    rotated:     the same with x H and w H in place of x and w (see `rotate`), and no outlier columns

Codes and scales are defined exactly (integers, and float32 operations that each round once), so a kernel must reproduce
them bit for bit. Products are computed here in float64 from the quantized operands; a kernel may differ from them by
the error of rounding to its output type. Arrays are NumPy arrays; bfloat16 is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantize8.errors import WeightError

Array = NDArray[Any]
OutlierMode = Literal["hybrid", "dynamic", "bitsandbytes"]  # that users can choose; the last: kernels/bitsandbytes.py
LayerMode = Literal[OutlierMode, "static"]  # static: hybrid with its stored columns alone, which is what a GPU computes

MODES: tuple[OutlierMode, ...] = get_args(OutlierMode)
STATIC_MODES = ("static", "hybrid")  # modes whose outlier columns are known before the activations
INT8_MAX = 127  # -128 is never used, so that codes are symmetric, as in bitsandbytes
FLOAT16_MAX = 65504.0  # a larger weight becomes infinite in float16, the type that weights are quantized from
DEFAULT_THRESHOLD = 6.0  # from the paper, section 3.2: outlier columns have a magnitude of at least 6
OUTLIER_SIGMAS = 6  # a weight beyond 6 standard deviations of its row counts as an outlier of its column
STATS_TILE_ROWS = 64  # columns are summed in float32 over tiles of 64 rows, and tiles in float64: one order everywhere
TOKEN_SIGMAS = 8  # mode hybrid multiplies an element beyond 8 times the RMS of its token in 16-bit
LEAST_SQUARES = 2.0**-100  # smaller sums of squares have lost digits to underflow, so no element counts as an outlier
_LANES = 64  # partial sums in which the squares of a token are added up
# Features in a block of a rotation, the preferred first: the larger a block, the more features share an outlier. Powers
# of 4, so that 1 / sqrt(size) is an exact power of two.
ROTATIONS = (256, 64, 16)
DECODE_TOKENS = 16  # up to this M the time goes into reading the weight, so activations stay unquantized (no error)


@dataclass
class ColumnStats:
    """Statistics of each input column of a weight [N, K], accumulated over its rows in ascending order."""

    absmax: Array  # float32 [K], largest |w|
    sum_square: Array  # float64 [K], sum of w^2
    sum_error: Array  # float64 [K], sum of (w - dequantized w)^2
    outliers: Array  # int64 [K], number of weights beyond OUTLIER_SIGMAS standard deviations of their row
    rows: int = 0  # number of rows accumulated so far

    @classmethod
    def empty(cls, columns: int) -> ColumnStats:
        """Statistics of zero rows, for a weight with this many columns."""
        return cls(
            np.zeros(columns, np.float32),
            np.zeros(columns, np.float64),
            np.zeros(columns, np.float64),
            np.zeros(columns, np.int64),
        )


@dataclass(frozen=True)
class Int8Weight:
    """A quantized weight [N, K]; the fields are either all NumPy arrays or all torch tensors.

    Raises:
        WeightError: The rotation does not fit K, or there are outlier columns beside it.
    """

    codes: Any  # int8 [N, K]
    absmax: Any  # float32 [N], largest magnitude of the row; scale = absmax / 127
    outlier_columns: Any = None  # int32 [J]: outlier columns that calibration chose, the most important first
    outlier_weight: Any = None  # float16 [N, E], E <= J: the exact weights of the first E of those columns
    rotation: int = 0  # size of the blocks in which the codes, and so the activations, are rotated; 0: they are not

    def __post_init__(self) -> None:
        check_rotation(self.rotation, self.codes.shape[1])
        if self.rotation and self.outlier_columns is not None:
            raise WeightError("a rotated weight cannot have outlier columns: no column is one feature; convert again")


def quantize_rowwise(weight: Array, absmax: Array | None = None) -> tuple[Array, Array]:
    """Quantize a weight row by row with absmax scales (paper, section 3.1), rounding as bitsandbytes does.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        absmax: float32 [N] to use in place of each row's largest magnitude (see kernels/scales.py).

    Returns:
        Codes int8 [N, K] in [-127, 127], and absmax float32 [N]. A zero row has absmax 0 and codes 0. A row with NaN,
        infinity, or a |w| beyond float16 has a non-finite absmax and codes 0; the caller decides how to handle it.
    """
    values = to_float16(weight).astype(np.float32)
    absmax = np.abs(values).max(axis=1, initial=0.0) if absmax is None else absmax
    return codes_of(values, absmax), absmax


def column_stats(weight: Array, codes: Array, absmax: Array, stats: ColumnStats | None = None) -> ColumnStats:
    """Accumulate statistics of a weight and of its quantization error for each input column.

    Outliers are counted on the codes, so that an integer comparison decides: q^2 K > 36 sum_k q^2.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        codes: int8 [N, K], the codes of the weight.
        absmax: float32 [N], the absmax of each row.
        stats: Statistics of the rows before these, a multiple of STATS_TILE_ROWS; None to start.

    Returns:
        The updated `stats`, or new statistics.
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
    """The weight float32 [N, K] that codes int8 [N, K] and absmax float32 [N] represent."""
    return codes.astype(np.float32) * scale_of(absmax)[:, None]


def add_low_rank(rows: Array, left: Array, right: Array, scaling: float) -> Array:
    """Add a product of two thin matrices: W + s B A of LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Every operation rounds to float32, and the R products of an element are added in order, so that the result depends
    on neither the number of rows at a time nor the machine.

    Args:
        rows: W, float32 [n, K].
        left: B, float32 [n, R].
        right: A, float32 [R, K].
        scaling: s, rounded to float32.

    Returns:
        float32 [n, K].
    """
    total = np.zeros_like(rows)
    for rank in range(left.shape[1]):
        total += left[:, rank, None] * right[rank]
    result: Array = rows + np.float32(scaling) * total
    return result


def rotation_of(columns: int) -> int:
    """The size of the blocks in which a weight with K input features is rotated: 256, 64 or 16; 0 if none divides K."""
    return next((size for size in ROTATIONS if columns % size == 0), 0)


def rotate(values: Array, size: int) -> Array:
    """Multiply each block of adjacent features by a Hadamard matrix (QuaRot, arXiv:2404.00456, section 3).

    H is the orthogonal matrix of Sylvester's construction, symmetric and its own inverse. Rotating both the input and
    the weight of a layer leaves x W^T = (x H) (W H)^T as it was, but spreads an outlier over the features of its block.

    Stages follow one another for h = 1, 2, 4, ... < size: the elements a and b of a block that are h apart become
    a + b and a - b, each rounded to float32. Then all are multiplied by 1 / sqrt(size).

    Args:
        values: float32 [R, K].
        size: Features in a block, one of ROTATIONS that divides K.

    Returns:
        float32 [R, K]. NaN makes all elements of its block NaN, and one infinity makes them infinite; two become NaN
        where they cancel.
    """
    rows, columns = values.shape
    rotated: Array = values
    with np.errstate(over="ignore", invalid="ignore"):
        for h in (2**stage for stage in range(size.bit_length() - 1)):
            pairs = rotated.reshape(rows, columns // (2 * h), 2, h)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            rotated = np.stack((first + second, first - second), axis=2)
    result: Array = rotated.reshape(rows, columns) * np.float32(1 / math.sqrt(size))
    return result


def check_rotation(size: int, columns: int) -> None:
    """Raise WeightError unless a weight with K input features can be rotated in blocks of this size; 0 always fits."""
    if size and (size not in ROTATIONS or columns % size):
        sizes = ", ".join(map(str, ROTATIONS))
        raise WeightError(f"a rotation in blocks of {size}: must be one of {sizes} and divide {columns} input features")


def quantize_activations(
    x: Array, threshold: float, columns: Array | None = None, hybrid: bool = False, rotation: int = 0
) -> tuple[Array, Array, Array]:
    """Quantize activations token by token with absmax scales, leaving out the outlier elements (paper, section 3.2).

    Args:
        x: Activations [M, K] in any floating-point dtype.
        threshold: Elements with |x| >= threshold are outliers; 0 turns this off. Not used where `columns` is given.
        columns: int [J], outlier columns that are known beforehand: all of their elements are outliers.
        hybrid: With `columns`, elements of other columns that `token_outliers` finds are outliers too.
        rotation: Size of the blocks in which x, as float32, is rotated first. Then no element is an outlier, whatever
            the other arguments.

    Returns:
        Codes int8 [M, K], 0 at outlier elements; scale float32 [M]; outliers bool [M, K]. A row with NaN has the scale
        NaN, so that its product is NaN. A rotated row with infinity has the scale infinity or NaN, and codes 0.
    """
    values = x.astype(np.float32)
    if rotation:
        values, threshold, columns = rotate(values, rotation), 0.0, None
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
    """Find the elements that are outliers of their token: those with |x| > 8 sqrt(sum x^2 / K).

    Squares are summed in float32 in 64 lanes, column k in lane k mod 64; then the upper half of the lanes is added to
    the lower half until one is left. All implementations use this order. A token has fewer than K / 64 such elements.

    Args:
        values: float32 [M, K].

    Returns:
        bool [M, K]. All False for a token with NaN or infinity, or whose sum of squares is below LEAST_SQUARES.
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
    """The product of a int8 [M, K] and the transpose of b int8 [N, K]: int32 [M, N], exact for K <= 133,144."""
    product: Array = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)
    return product


def mixed_matmul(
    x: Array, weight: Int8Weight, bias: Array | None, threshold: float, mode: LayerMode = "dynamic"
) -> Array:
    """The mixed-precision product of the paper's figure 2: int8 for all columns, plus a correction for the outliers.

    Args:
        x: Activations [M, K].
        weight: The quantized weight [N, K].
        bias: [N] or None.
        threshold: Outlier threshold of mode "dynamic"; 0 for plain int8.
        mode: "dynamic": a column with one outlier element is corrected for every token (LLM.int8() as published).
            "static": the columns stored with the weight are corrected, and no others. "hybrid": those columns, and the
            elements that are outliers of their token, so that a token's result does not depend on its neighbors. A
            rotated weight has no outliers in any mode.

    Returns:
        float64 [M, N], exact up to the rounding of float64.

    Raises:
        ValueError: The mode is "static" and the weight has no stored columns.
    """
    if weight.rotation:
        x, threshold, mode = rotate(x.astype(np.float32), weight.rotation), 0.0, "dynamic"
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
    """The decode product: x [M, K], not quantized, times the dequantized weight [N, K], plus bias: float64 [M, N].

    For a rotated weight x is rotated as well, in float32, and still not quantized.
    """
    if weight.rotation:
        x = rotate(x.astype(np.float32), weight.rotation)
    product: Array = x.astype(np.float64) @ _float_weight(weight).T
    return product if bias is None else product + bias.astype(np.float64)


def linear(x: Array, weight: Int8Weight, bias: Array | None, threshold: float, mode: LayerMode = "dynamic") -> Array:
    """The output float64 [M, N] of a quantized linear layer for x [M, K].

    Up to DECODE_TOKENS rows it is `weight_only_matmul`, else `mixed_matmul`, whose arguments and errors it shares.
    """
    if len(x) <= DECODE_TOKENS:
        return weight_only_matmul(x, weight, bias)
    return mixed_matmul(x, weight, bias, threshold, mode)


def fixed_columns(weight: Int8Weight, mode: LayerMode) -> Any:
    """The outlier columns int [J] that a mode takes from the weight; None where the activations decide.

    Mode hybrid without stored columns gives an empty array; mode static raises ValueError.
    """
    if mode not in STATIC_MODES:
        return None
    if weight.outlier_columns is not None:
        return weight.outlier_columns
    if mode == "static":
        raise ValueError("mode static needs a weight with stored outlier columns")
    return np.zeros(0, np.int64)


def to_float16(weight: Array) -> Array:
    """The weight in float16, rounded once; magnitudes beyond 65504 become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return weight.astype(np.float32).astype(np.float16)


def scale_of(absmax: Array) -> Array:
    """The step between two adjacent codes: absmax / 127, in float32."""
    scale: Array = absmax / np.float32(INT8_MAX)
    return scale


def absmax_of(scale: Array) -> Array:
    """Compute the absmax whose 127th part is `scale`, recovering the float16 number that it was if it was one.

    127 * scale alone may differ from that number in the last bit, and then a weight that is converted to another format
    and back would change.

    Args:
        scale: The stored scales, of any floating-point dtype and shape.

    Returns:
        absmax, float32, in the shape of `scale`.
    """
    scale = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        near = (scale * np.float32(INT8_MAX)).astype(np.float16).astype(np.float32)
    absmax: Array = np.where(scale_of(near) == scale, near, scale * np.float32(INT8_MAX))
    return absmax


def exact_scales(values: Array, dtype: np.dtype[Any]) -> Array:
    """The scales that lose nothing: powers of two of which all values of a row are multiples, at most 127 times.

    4-bit floats (formats/float4.py) have such a scale: in a block of MXFP4 every weight is 0, 1, 2, 3, 4, 6, 8 or 12
    times the same power of two. Of several powers the smallest is taken, with which the largest code is the largest
    possible. Where `dtype` does not hold that one, a larger power that it holds may still divide all values.

    Args:
        values: float32 [R, K].
        dtype: The dtype in which scales are stored.

    Returns:
        float32 [R], numbers of `dtype` whose inverse is finite in float32; 0 for a row that has no such scale, or only
        zeros. The codes are values / scale.
    """
    (least, most), peaks = scale_limits(dtype), np.abs(values).max(axis=1, initial=0.0)
    usable = np.isfinite(peaks) & (peaks > 0)
    fraction, exponent = np.frexp(np.where(usable, peaks, 1))
    needed = exponent - INT8_MAX.bit_length() + (fraction > INT8_MAX / (INT8_MAX + 1))
    power = np.maximum(np.ldexp(np.float32(1), needed), least)
    usable &= power <= most
    steps = np.rint(np.where(usable[:, None], values, 0) / power[:, None])
    usable &= (steps * power[:, None] == values).all(axis=1)
    scales: Array = np.where(usable, power, np.float32(0))
    return scales


def scale_limits(dtype: np.dtype[Any]) -> tuple[np.float32, np.float32]:
    """The smallest power of two that `dtype` holds and that has an inverse in float32, and the largest number."""
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    least = max(np.float32(limits.smallest_subnormal), np.finfo(np.float32).tiny)
    return np.float32(least), np.float32(limits.max)


def codes_of(values: Array, absmax: Array) -> Array:
    """Codes int8 [R, K] of values, in the order of operations of bitsandbytes: value * (127 * (1 / absmax)).

    Each step rounds to float32. Computing 127 / absmax in one step, or w / absmax * 127, would change about 1e-5 of
    the codes.

    Args:
        values: float32 [R, K].
        absmax: float32 [R].

    Returns:
        int8 [R, K]. A row whose absmax is 0, not finite, or so small (below 4e-37) that its inverse is not finite, gets
        codes 0. A value beyond its absmax gets the code 127 or -127.
    """
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / absmax * np.float32(INT8_MAX)
    usable = np.isfinite(absmax) & np.isfinite(inverse)
    inverse = np.where(usable, inverse, np.float32(0))
    finite = np.where(usable[:, None], values, np.float32(0))
    codes: Array = np.clip(np.rint(finite * inverse[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8)
    return codes


def as_bytes(values: Array) -> memoryview[int]:
    """The bytes of a contiguous array, without copying."""
    return values.reshape(-1).view(np.uint8).data


def _float_weight(weight: Int8Weight) -> Array:
    """The weight float64 [N, K] that the codes represent, with stored exact columns in place of theirs."""
    values: Array = weight.codes.astype(np.float64) * scale_of(weight.absmax)[:, None].astype(np.float64)
    if weight.outlier_columns is not None:
        values[:, weight.outlier_columns[: weight.outlier_weight.shape[1]]] = weight.outlier_weight
    return values
