"""Which columns of a weight are outliers: chosen beforehand, from the inputs that a text brings about.

Two things make int8 lose: a token's largest elements set the step of all the others, and the columns that the largest
inputs meet carry most of the weight's rounding error. So of each weight [N, K], met by inputs x [T, K],

    the columns with most  (sum_t x_tk^2) (sum_n dw_nk^2)   are kept exactly, in weight and activation: it is what
        rounding that column of the weight costs the output, where its share of all is worth the bytes;
    the columns with most  sum_t min(|x_tk| / rms_t, c)^8   are kept exactly in the activation: it grows with how
        often a column has the largest element of a token, and by how much.

No threshold is asked: on a small model 6.0 leaves most of the loss, on a large one it takes more than helps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize8.model.expected import WeightError, static_errors, without

# Columns of an activation come in tiles of the CPU's int8 units, in which 64 cost no more than one does
_WIDE = 64
_EXACT = 16  # columns of a weight at most: 32 bytes a row, 1.6% at K = 2048
_LEAST_SHARE = 0.005  # of a weight's expected error, for a column to be worth storing
_MOST_OF_K = 8  # a weight has at most K / 8 outlier columns: they are multiplied twice
_ENOUGH = 1.1  # times the least expected squared error: more columns than that takes are not worth their time
_PEAK_POWER, _PEAK_LIMIT = 8, 30.0  # a sum of 8th powers is nearly its largest; one massive token is not everything


def choose_columns(x: Tensor, rounded: WeightError, most: int | None = None) -> tuple[Tensor, int]:
    """Outlier columns int64 [J] for inputs x float32 [T, K], and how many of them, the first, are stored exactly.

    `most`: so many, all stored; None: as many as are worth it, at most K / 8, of which at most 16 are stored.
    """
    width = x.shape[1]
    energy = x.square().sum(0).double()
    costs = (energy * rounded.squares).nan_to_num_(0.0)  # of a weight that cannot be int8, NaN
    if most is not None:
        first = costs.topk(min(most, width)).indices
        return first, len(first)
    limit = width // _MOST_OF_K
    first = costs.topk(min(_EXACT, limit)).indices
    worth = int(((costs[first] >= _LEAST_SHARE * costs.sum()) & (costs[first] > 0)).sum())
    rms = x.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    peaks = (x.abs() / rms).clamp_(max=_PEAK_LIMIT).pow_(_PEAK_POWER).sum(0)
    peaks[first] = -1
    columns = torch.cat([first, peaks.topk(limit - len(first)).indices])
    alone = float((energy * without(rounded, columns[:worth]).squares).sum())
    sizes = _sizes(limit)
    errors = [alone + float((static_errors(x, columns[:size]) * rounded.energy).sum()) for size in sizes]
    enough = next((size for size, error in zip(sizes, errors, strict=True) if error <= _ENOUGH * min(errors)), limit)
    return columns[:enough], min(worth, enough)


def _sizes(limit: int) -> list[int]:
    """Numbers of columns to choose among: tiles doubled, up to the limit."""
    if limit <= _WIDE:
        return [limit]
    sizes = [_WIDE]
    while 2 * sizes[-1] <= limit:
        sizes.append(2 * sizes[-1])
    return sizes
