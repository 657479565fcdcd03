"""Compiled passes over a weight: each row is rounded to float16, its scale searched, quantized, and counted."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.ops.bits import INFINITE, MAGNITUDE, ROUNDER, as_bits, as_float, half_of, value_of
from quantize8.ops.jit import compiled
from quantize8.ops.reference import INT8_MAX, OUTLIER_SIGMAS, STATS_TILE_ROWS
from quantize8.ops.scales import CLIPS, LEAST_SCALE

_INT32_SQUARES = 2**17  # codes whose squares an int32 can sum up
_CLIPS = np.array(CLIPS, np.float32)


@compiled(nogil=True)
def quantize_rows(
    weight: Any,
    codes: Any,
    absmax: Any,
    column_absmax: Any,
    sum_square: Any,
    sum_error: Any,
    outliers: Any,
    chosen: Any,
) -> None:
    """Over the bits of a weight [N, K], K > 0, in one of the types of `ops.bits`; `chosen` says that absmax is given.

    No fastmath: sums must run in the reference's order.
    """
    rows, columns = weight.shape
    squares, errors = np.zeros(columns, np.float32), np.zeros(columns, np.float32)
    counts, peaks = np.zeros(columns, np.int32), np.zeros(columns, np.float32)
    for n in range(rows):
        row, code = weight[n], codes[n]
        if not chosen:
            absmax[n] = _absmax(row)
        energy = _encode(row, absmax[n], code)
        scale = absmax[n] / np.float32(INT8_MAX)
        # q^2 K > 36 sum q^2, with the division once a row: q^2 is an integer, so rounding down changes nothing
        limit = np.int32(OUTLIER_SIGMAS * OUTLIER_SIGMAS * energy // columns)
        for k in range(columns):
            value, number = value_of(row[k]), np.int32(code[k])
            error = value - np.float32(number) * scale
            squares[k] += value * value
            errors[k] += error * error
            counts[k] += np.int32(number * number > limit)
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
def search_rows(weight: Any, weights: Any, kept: Any, absmax: Any) -> None:
    """`scales.search_absmax` over the bits of a weight [N, K], K > 0; weights and kept are float32 [K]."""
    columns = weight.shape[1]
    values, terms, others = np.empty(columns, np.float32), np.empty(columns, np.float32), weights * kept
    all_kept = kept.min() > 0
    for n in range(len(weight)):
        absmax[n] = peak = _absmax(weight[n])
        if peak == 0 or peak == np.float32(np.inf):
            continue
        lowest = np.float32(0)
        for k in range(columns):
            values[k] = half_of(weight[n, k])
            lowest = max(lowest, abs(values[k]) * (np.float32(1) - kept[k]) * LEAST_SCALE)
        limit = _error(values, peak, weights, terms)
        least = limit if all_kept else _error(values, peak, others, terms)
        for c in range(1, len(_CLIPS)):
            candidate = half_of(_CLIPS[c] * peak)
            if candidate == 0 or candidate >= peak or candidate < lowest:
                continue
            error = _error(values, candidate, others, terms)
            if error < least and (all_kept or _error(values, candidate, weights, terms) <= limit):
                absmax[n], least = candidate, error


@compiled(nogil=True)
def _error(values: Any, absmax: Any, weights: Any, terms: Any) -> Any:
    """The weighted squared error of a row with an absmax; `terms` is room for K of them."""
    inverse, scale = np.float32(1) / absmax * np.float32(INT8_MAX), absmax / np.float32(INT8_MAX)
    for k in range(len(values)):
        scaled = min(max(values[k] * inverse, np.float32(-INT8_MAX)), np.float32(INT8_MAX))
        difference = values[k] - ((scaled + ROUNDER) - ROUNDER) * scale
        terms[k] = weights[k] * (difference * difference)
    count = len(values)
    while count > 1:
        half = (count + 1) // 2
        first, second = terms[: count - half], terms[half:count]
        for k in range(len(first)):
            first[k] += second[k]
        count = half
    return terms[0]


@compiled(nogil=True)
def all_finite(values: Any) -> bool:
    """Whether elements [any], given by their bits, are neither NaN nor infinite."""
    peak = np.uint32(0)
    for k in range(len(values)):
        peak = max(peak, as_bits(value_of(values[k])) & MAGNITUDE)
    return bool(peak < INFINITE)


@compiled(nogil=True)
def _absmax(row: Any) -> Any:
    """The largest magnitude of a row in float16, as float32; infinite where one is beyond float16, or not finite.

    Rounding keeps the order of numbers, so that only the largest needs to be rounded.
    """
    peak = np.uint32(0)
    for k in range(len(row)):
        peak = max(peak, as_bits(value_of(row[k])) & MAGNITUDE)
    absmax = half_of(as_float(peak))
    return absmax if absmax < np.float32(np.inf) else np.float32(np.inf)


@compiled(nogil=True)
def _encode(row: Any, absmax: Any, code: Any) -> Any:
    """Codes of a row, 0 where it has none; the sum of their squares."""
    if absmax == 0 or absmax == np.float32(np.inf):
        code[:] = 0
        return 0
    inverse = np.float32(1) / absmax * np.float32(INT8_MAX)
    for k in range(len(row)):
        scaled = min(max(half_of(row[k]) * inverse, np.float32(-INT8_MAX)), np.float32(INT8_MAX))
        code[k] = np.int8(as_bits(scaled + ROUNDER))
    return _energy(code)


@compiled(nogil=True)
def _energy(code: Any) -> Any:
    """The sum of squares of codes."""
    total = np.int64(0)
    for first in range(0, len(code), _INT32_SQUARES):
        part, squares = code[first : first + _INT32_SQUARES], np.int32(0)
        for k in range(len(part)):
            squares = np.int32(squares + np.int32(part[k]) * np.int32(part[k]))  # or Numba widens it to 64 bits
        total += squares
    return total
