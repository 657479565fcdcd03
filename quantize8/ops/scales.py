"""The scale of a row by search, in place of its absmax: the definition, which compiled code equals bit for bit.

Clipping the largest weights of a row makes its steps finer for all others. Of a few absmax the one is taken whose codes
have the least squared error, weighted by the importance g of the input columns (1, or the mean square of the layer's
inputs: with columns that do not correlate, the error of the layer's output).

    absmax[c] = fl16(CLIPS[c] * absmax)                              c = 0 is plain absmax
    q[c, k]   = clamp(rint(w16[k] * (127 * (1 / absmax[c]))))        to -127..127
    error[c]  = sum_k g[k] * (w16[k] - q[c, k] * (absmax[c] / 127))^2

in float32, one rounding per operation, summed in halves (`folded`). Of equal errors the first candidate's stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantize8.ops.reference import INT8_MAX, Array, codes_of, dequantize, to_float16

# Dense near 1, where a row is most often best: on SmolLM2-135M nine steps of 0.0375 win 3.8% of the error, these 7.7%
# (weighted; 1.4% unweighted). The last three are for heavy tails, where 0.95 is not enough.
CLIPS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.92, 0.85, 0.7)

LEAST_SCALE = np.float32(INT8_MAX / (INT8_MAX + 0.5))  # of an exact weight: beyond the last code lies half a step


@dataclass(frozen=True)
class ScaleSearch:
    """What the scales of a weight [N, K] are searched for."""

    importance: Array | None = None  # float32 [K], finite and not negative; None for 1 everywhere
    exact: Array | None = None  # int [J], columns that an artifact stores exactly beside the codes

    def __post_init__(self) -> None:
        if self.importance is not None and not (np.isfinite(self.importance) & (self.importance >= 0)).all():
            raise ValueError("an importance is NaN, infinite or negative")

    def weights(self, columns: int) -> Array:
        """The importance of each column, contiguous float32 [K]."""
        if self.importance is None:
            return np.ones(columns, np.float32)
        if self.importance.shape != (columns,):
            raise ValueError(f"importance {list(self.importance.shape)} for {columns} columns")
        return np.ascontiguousarray(self.importance, np.float32)

    def kept(self, columns: int) -> Array:
        """float32 [K]: 0 for an exact column, 1 for one that the codes alone hold."""
        kept = np.ones(columns, np.float32)
        if self.exact is not None:
            kept[self.exact] = 0
        return kept


def search_absmax(weight: Array, search: ScaleSearch) -> Array:
    """The absmax of each row that its codes have the least error with.

    Where columns are exact, the error over the others decides; but no candidate is taken whose error over all columns
    is above that of plain absmax, for a reader that knows codes alone, nor one that leaves more of an exact weight than
    a second digit holds (ops/wide.py). Every absmax is a float16 number, so that formats which store absmax / 127 lose
    nothing.

    Args: weight, float16, bfloat16 or float32 [N, K].
    Returns: float32 [N], not above plain absmax; not finite where a row cannot be quantized.
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
    """The sum over the last axis: its second half is added to the first until one is left, in the dtype of the terms.

    Of an odd number the first half is the longer, and its last term waits. The sum of none is 0.
    """
    while terms.shape[-1] > 1:
        half = (terms.shape[-1] + 1) // 2
        rest = terms.shape[-1] - half
        terms = np.concatenate([terms[..., :rest] + terms[..., half:], terms[..., rest:half]], axis=-1)
    total: Array = terms.sum(axis=-1, dtype=terms.dtype)
    return total


def _errors(values: Array, absmax: Array, weights: Array) -> Array:
    """Weighted squared error float32 [N] of values float32 [N, K] with an absmax float32 [N]; weights float32 [K]."""
    difference = values - dequantize(codes_of(values, absmax), absmax)
    return folded(weights * (difference * difference))
