"""The choice of a weight's outlier columns before it is used, from the inputs that a calibration text gives.

int8 loses accuracy in two ways. A token's largest elements determine the step of all its other elements. And the
columns that are multiplied with the largest inputs cause most of the error from rounding the weight. So for each weight
[N, K] with inputs x [T, K]:

    the columns with the largest  (sum_t x_tk^2) (sum_n dw_nk^2)  are stored exactly in 16-bit, in the weight as in the
        activation, if their share of the total is worth the bytes: this is the squared error in the output that
        rounding the column of the weight causes;
    the columns with the largest  sum_t min(|x_tk| / rms_t, c)^8  are exact in the activation: this grows with how
        often, and how far, a column has the largest element of a token.

There is no threshold: on a small model 6.0 would leave most of the error, and on a large one it would select more
columns than are useful.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize8.calibration.expected import WeightError, static_errors, without

# The CPU's int8 units multiply outlier columns in tiles of 64, so that 64 columns cost no more time than one
_WIDE = 64
_EXACT = 16  # columns of a weight that are stored exactly, at most: 32 bytes per row, 1.6% at K = 2048
_LEAST_SHARE = 0.005  # a column is worth storing from this share of the weight's expected error
_MOST_OF_K = 8  # a weight has at most K / 8 outlier columns, as they are multiplied twice
_ENOUGH = 1.1  # columns that lower the expected squared error below this multiple of its least are not worth the time
_PEAK_POWER, _PEAK_LIMIT = 8, 30.0  # 8th powers make the largest elements dominate; the limit is for massive tokens


def choose_columns(x: Tensor, rounded: WeightError, most: int | None = None) -> tuple[Tensor, int]:
    """Choose the outlier columns of a weight [N, K].

    Args:
        x: The layer's inputs, float32 [T, K].
        rounded: The errors of the weight quantized to int8.
        most: Number of columns to choose (at most K), all of them stored exactly. None to choose as many as are worth
            it, at most K / 8, of which at most 16 are stored exactly.

    Returns:
        The columns int64 [J], and E: the first E of them are stored exactly.
    """
    width = x.shape[1]
    energy = x.square().sum(0).double()
    costs = (energy * rounded.squares).nan_to_num_(0.0)  # NaN for a weight that cannot be int8
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
    weight_part = float((energy * without(rounded, columns[:worth]).squares).sum())
    sizes = _sizes(limit)
    errors = [weight_part + float((static_errors(x, columns[:size]) * rounded.energy).sum()) for size in sizes]
    enough = next((size for size, error in zip(sizes, errors, strict=True) if error <= _ENOUGH * min(errors)), limit)
    return columns[:enough], min(worth, enough)


def _sizes(limit: int) -> list[int]:
    """The numbers of columns to try: one tile, and doublings of it up to the limit."""
    if limit <= _WIDE:
        return [limit]
    sizes = [_WIDE]
    while 2 * sizes[-1] <= limit:
        sizes.append(2 * sizes[-1])
    return sizes
