"""Row scales found by search instead of taken from absmax: the definition, which compiled code equals bit for bit.

Clipping the largest weights of a row makes the steps finer for all its other weights. Among a few candidates for absmax
the search takes the one whose codes have the least squared error, weighted by the importance g of the input columns.
g is 1, or the mean square of the layer's inputs; with uncorrelated columns the latter gives the layer's output error.

    absmax[c] = fl16(CLIPS[c] * absmax)                              c = 0 is plain absmax
    q[c, k]   = clamp(rint(w16[k] * (127 * (1 / absmax[c]))))        to -127..127
    error[c]  = sum_k g[k] * (w16[k] - q[c, k] * (absmax[c] / 127))^2

in float32, one rounding per operation, summed in halves (`folded`). Between equal errors the earlier candidate wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantize8.kernels.reference import INT8_MAX, Array, codes_of, dequantize, to_float16

# Dense near 1, where most rows have their optimum: on SmolLM2-135M nine steps of 0.0375 remove 3.8% of the weighted
# error, these remove 7.7% (1.4% of the unweighted error). The last three are for heavy tails, where 0.95 is not enough.
CLIPS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.92, 0.85, 0.7)

# Least absmax, relative to a weight that is stored exactly: such a weight may lie half a step beyond the last code
LEAST_SCALE = np.float32(INT8_MAX / (INT8_MAX + 0.5))


@dataclass(frozen=True)
class ScaleSearch:
    """What a search for the scales of a weight [N, K] minimizes.

    Raises:
        ValueError: An importance is NaN, infinite or negative.
    """

    importance: Array | None = None  # float32 [K], finite and not negative; None for 1 everywhere
    exact: Array | None = None  # int [J], columns that an artifact also stores exactly, beside the codes

    def __post_init__(self) -> None:
        if self.importance is not None and not (np.isfinite(self.importance) & (self.importance >= 0)).all():
            raise ValueError("an importance is NaN, infinite or negative")

    def weights(self, columns: int) -> Array:
        """The importance of each of K columns, contiguous float32 [K]; ValueError where there are not K of them."""
        if self.importance is None:
            return np.ones(columns, np.float32)
        if self.importance.shape != (columns,):
            raise ValueError(f"importance {list(self.importance.shape)} for {columns} columns")
        return np.ascontiguousarray(self.importance, np.float32)

    def kept(self, columns: int) -> Array:
        """A mask float32 [K]: 0 for a column that is stored exactly, 1 for a column that only the codes represent."""
        kept = np.ones(columns, np.float32)
        if self.exact is not None:
            kept[self.exact] = 0
        return kept


def search_absmax(weight: Array, search: ScaleSearch) -> Array:
    """For each row, the candidate absmax whose codes have the least weighted squared error.

    Where some columns are stored exactly, the error over the other columns decides, with two limits. The error over all
    columns may not exceed that of plain absmax, for readers that use the codes alone. And an exact weight may not lie
    so far beyond its code that a second digit (kernels/packed.py) cannot hold the rest. Every absmax is a float16
    number, so that formats which store absmax / 127 lose nothing.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        search: Importance and exact columns.

    Returns:
        float32 [N], at most plain absmax; not finite where a row cannot be quantized.
    """
    values, columns = to_float16(weight).astype(np.float32), weight.shape[1]
    absmax = np.abs(values).max(axis=1, initial=0.0)
    fit = np.isfinite(absmax)
    values, peaks = np.where(fit[:, None], values, 0), np.where(fit, absmax, 0)
    weights, kept = search.weights(columns), search.kept(columns)
    others, lowest = weights * kept, np.abs(values * (1 - kept)).max(axis=1, initial=0.0) * LEAST_SCALE
    best, limit, least = peaks.copy(), _errors(values, peaks, weights), _errors(values, peaks, others)
    for clip in CLIPS[1:]:
        candidate = to_float16(np.float32(clip) * peaks).astype(np.float32)
        error, total = _errors(values, candidate, others), _errors(values, candidate, weights)
        better = (candidate > 0) & (candidate >= lowest) & (candidate < peaks) & (error < least) & (total <= limit)
        best[better], least[better] = candidate[better], error[better]
    chosen: Array = np.where(fit, best, absmax)
    return chosen


def folded(terms: Array) -> Array:
    """The sum over the last axis, in the dtype of the terms and in one fixed order of additions.

    The second half of the terms is added to the first half until one term is left. With an odd number of terms the
    first half is one longer, and its last term is carried over unchanged. The sum of no terms is 0.
    """
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        rest = terms.shape[-1] - half
        terms = np.concatenate([terms[..., :rest] + terms[..., half:], terms[..., rest:half]], axis=-1)
    total: Array = terms.sum(axis=-1, dtype=terms.dtype)
    return total


def _errors(values: Array, absmax: Array, weights: Array) -> Array:
    """The weighted squared errors float32 [N] of values float32 [N, K] at absmax float32 [N]; weights float32 [K]."""
    difference = values - dequantize(codes_of(values, absmax), absmax)
    return folded(weights * (difference * difference))
