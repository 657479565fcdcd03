"""The expected error of a layer's output in int8, computed from its input and its weight without the int8 product.

Let x [T, K] and w [N, K] be in floating point, and x + dx and w + dw the values that their codes represent. Then the
output has the error dx (w + dw)^T + x dw^T. Rounding errors are assumed to be independent of each other and of the
values, so that the expected squared error, summed over positions and outputs, is

    sum_k (sum_t dx[t, k]^2) (sum_n w[n, k]^2)  +  sum_k (sum_t x[t, k]^2) (sum_n dw[n, k]^2)

All four are sums over a column, so each input and each weight is read once, and each threshold costs O(T K). dx is that
of LLM.int8() in mode dynamic: it is 0 in each column with an outlier, and outliers do not count in the scales.
On SmolLM2-135M with 1024 tokens and thresholds from 2 to 12, the square root of this sum is within 8% of the measured
error in each of its 210 layers, and within 0.1% in the median.

A rotation (`kernels.reference.rotate`) changes x and w, but no product, so that the same formula holds. GPTQ's codes
(`kernels.rounding`) make the second sum smaller, by a share that depends on the inputs alone (`rounding_share`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantize8.kernels import cpu, rounding
from quantize8.kernels.reference import INT8_MAX, ColumnStats

# The paper's 6 with a range on both sides. Most elements of a normalized state are below 2, so that a lower threshold
# would leave most columns in 16-bit. Beyond 12 an int8 step is 0.1 or more, and the error changes little.
THRESHOLDS = tuple(float(threshold) for threshold in range(2, 13))


_MOST_SHARED = 8192  # input features up to which the share is computed: its time grows with the cube, 3 s here


@dataclass(frozen=True)
class InputError:
    """The int8 rounding errors of a layer's input x [T, K] at one threshold."""

    threshold: float
    columns: int  # number of columns with any |x| >= threshold, which stay exact
    positions: float  # share of positions with any |x| >= threshold
    squares: Tensor  # float64 [K], squared error of each column, summed over positions


@dataclass(frozen=True)
class WeightError:
    """The int8 rounding errors of a weight [N, K]."""

    energy: Tensor  # float64 [K], sum of w^2 of each column
    squares: Tensor  # float64 [K], squared error of each column, summed over rows; NaN if a row cannot be int8


def input_errors(x: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> list[InputError]:
    """The int8 rounding errors of a layer's input at each threshold.

    A position is quantized again only for a threshold that makes other elements outliers, so most positions are
    quantized once in all.

    Args:
        x: float32 [T, K].
        thresholds: Outlier thresholds in ascending order.
    """
    magnitudes = x.abs()
    peaks = magnitudes.amax(1)
    absmax = peaks.repeat(len(thresholds), 1)  # [thresholds, T], of the elements below the threshold
    columns, positions = [], []
    for below, threshold in zip(absmax, thresholds, strict=True):
        rows = (peaks >= threshold).nonzero().flatten()
        outliers = magnitudes[rows] >= threshold
        if len(rows):
            below[rows] = magnitudes[rows].masked_fill_(outliers, 0).amax(1)
        columns.append(outliers.any(0))
        positions.append(len(rows) / len(x))
    squares = _squares(x, absmax)
    squares[torch.stack(columns)] = 0
    counts = [int(mask.sum()) for mask in columns]
    return list(map(InputError, thresholds, counts, positions, squares))


def static_errors(x: Tensor, columns: Tensor) -> Tensor:
    """The squared int8 errors float64 [K] of the columns of x float32 [T, K] if just the columns int [J] are exact."""
    rest = x.index_fill(1, columns, 0)
    return _squares(rest, rest.abs().amax(1)[None])[0]


def weight_error(weight: Tensor) -> WeightError:
    """The int8 rounding errors of a weight float32 [N, K] on the CPU, quantized row by row."""
    stats = ColumnStats.empty(weight.shape[1])
    cpu.quantize_rowwise(weight.contiguous().numpy(), stats)
    return WeightError(torch.from_numpy(stats.sum_square), torch.from_numpy(stats.sum_error))


def rounding_share(x: Tensor) -> float | None:
    """The share of the squared error of rounding a weight to nearest that GPTQ's codes leave in the output.

    With e = w - code * scale and H = R R^T as in `kernels.rounding`, the choice makes e R, and not e, independent
    rounding errors: uniform ones, times the diagonal of R. So the share is ||F^-1 x^T||^2 / ||x||^2, where F is R with
    its columns divided by the diagonal. The codes would be chosen by the first half of the positions; the share is that
    of the second half, as on the first the errors balance better than on any other text.

    Args:
        x: The layer's inputs, float32 [T, K].

    Returns:
        The share; None for fewer than two positions, or more features than the estimate is worth.
    """
    half, columns = len(x) // 2, x.shape[1]
    if not half or columns > _MOST_SHARED:
        return None
    gram = np.zeros((columns, columns))
    rounding.accumulate(gram, x[:half].bfloat16().float().numpy(), torch.get_num_threads())
    order, factor = rounding.factor(gram, torch.get_num_threads())
    rest = x[half:, torch.from_numpy(order)]
    left = torch.linalg.solve_triangular(torch.from_numpy(factor), rest.t(), upper=True, unitriangular=True)
    return float(left.square().sum(dtype=torch.float64) / rest.square().sum(dtype=torch.float64).clamp_min(1e-300))


def without(weight: WeightError, columns: Tensor) -> WeightError:
    """The errors that remain of a weight if the columns int [E] are stored exactly."""
    return WeightError(weight.energy, weight.squares.index_fill(0, columns, 0))


def relative_error(input_squares: Tensor | float, x_energy: Tensor, weight: WeightError, y_energy: float) -> float:
    """The expected error of a layer's output, relative to the output without bias (the formula of this module).

    Args:
        input_squares: `squares` float64 [K] of an InputError; 0 for exact activations.
        x_energy: float64 [K], sum of x^2 of each column.
        weight: The errors of the weight.
        y_energy: Sum of squares of the product x w^T.
    """
    expected = float((input_squares * weight.energy + x_energy * weight.squares).sum())
    return math.sqrt(expected / y_energy) if y_energy else 0.0


def _squares(x: Tensor, absmax: Tensor) -> Tensor:
    """The squared rounding errors float64 [R, K] of each column of x [T, K], for each row of absmax [R, T]."""
    result = torch.zeros(len(absmax), x.shape[1], dtype=torch.float64)
    for i, current in enumerate(absmax):
        rows = slice(None) if i == 0 else (current != absmax[i - 1]).nonzero().flatten()
        peaks = current[rows]
        if not len(peaks):
            continue
        inverse = torch.where(peaks > 0, INT8_MAX / peaks, 0)
        steps = (x[rows] * inverse[:, None]).clamp_(-INT8_MAX, INT8_MAX)  # clamps outliers; callers zero their columns
        steps -= steps.round()
        same = absmax[i:][:, rows] == peaks  # whether a later threshold has the same scale at a position
        result[i:] += (same * (peaks / INT8_MAX).square()) @ steps.square_()
    return result
