"""The compiled loop of modes static and hybrid: what int8 would lose most of takes part in 16 bits, all in integers.

A token's scale s comes from its other elements. On the grid of s an outlier's element is a code of 16 bits, two int8
digits; a column of the weight that is stored exactly gets a second digit below its code c:

    x = s (254 high + low)        w = absmax / 127 (c + second / 254)

    x w is the sum of low c, in the product of all columns,
                      254 high c, in one of the outlier columns alone,
                      high second, beside the first; low second, less than a step of either, is left out.

Mode static knows its outlier columns beforehand, and looks for nothing. Mode hybrid adds those elements of each token
that stand out of it (`reference.token_outliers`): there are few, and their 254 high c is added column by column.
Either way a token's result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.ops.bits import INFINITE, MAGNITUDE, ROUNDER, as_bits, as_float, value_of
from quantize8.ops.epilogue import add_columns, word_of
from quantize8.ops.jit import compiled, prange
from quantize8.ops.passes import PAIR, bias_blocks, finish_block, inverse_of, multiply_block
from quantize8.ops.reference import INT8_MAX, LEAST_SQUARES, TOKEN_SIGMAS
from quantize8.ops.standing_out import beyond, lowest, peak_and_squares
from quantize8.ops.units import BLOCK, DIGIT_BASE, TILE_COLUMNS, TILE_ROWS, prepare, release

_BASE, _SIGMAS, _LEAST = np.float32(DIGIT_BASE), np.float32(TOKEN_SIGMAS), np.float32(LEAST_SQUARES)


@compiled(nogil=True, parallel=True, fastmath={"contract"})
def static(
    bits: Any,
    limit: Any,
    hybrid: bool,
    wide: Any,
    exact: int,
    weight: Any,
    start: Any,
    high_weight: Any,
    high_start: Any,
    scale: Any,
    shift: int,
    bias: Any,
    digits: Any,
    high_digits: Any,
    marks: Any,
    parts: int,
    out: Any,
) -> None:
    """Out [M, N] = x times the weight transposed, plus bias, with the columns `wide` [J] in 16 bits.

    Args: bits [M, K] of x; limit, bits of the threshold: marks [K] becomes 1 where a column that is not wide reaches
    it; hybrid, whether a token's own outliers are in 16 bits, too; exact, how many of the wide columns have a second
    digit; weight [N / 32, steps, 2048] and its digits, K and then the second digits, each in whole tiles; high_weight,
    the codes of the wide columns; the rest as in `passes.decode`.
    """
    (tokens, columns), tiles = bits.shape, len(digits)
    steps, counts = np.zeros(tiles * TILE_ROWS, np.float32), np.zeros((tokens, 2), np.int64)
    # of K numbers fewer than K / c^2 have a square over c^2 times the mean
    most = int(columns // (_SIGMAS * _SIGMAS)) + 1 if hybrid else 0
    beside, high = -(-columns // TILE_COLUMNS), high_digits.shape[1]  # tiles before the second digits, of high ones
    words, factors = np.empty((tokens, most), np.int32), np.empty((tokens, most), np.int32)
    for tile in prange(tiles):
        work = _scratch(beside, high)
        for m in range(tile * TILE_ROWS, min((tile + 1) * TILE_ROWS, tokens)):
            found, here = (words[m], factors[m], counts[m]), (digits[tile], high_digits[tile])
            step = _quantize(bits[m], limit, wide, exact, m % TILE_ROWS, shift, work, found, here, marks)
            steps[m] = _BASE * step
    nothing, added = np.empty((1, 0), np.float32), bias_blocks(bias, len(weight))
    for part in prange(parts):
        prepare(weight)
        sums = np.empty((2 * PAIR, BLOCK), np.int32)
        for row in range(0, tokens, PAIR):
            rows = min(PAIR, tokens - row)
            for block in range(part * len(weight) // parts, (part + 1) * len(weight) // parts):
                multiply_block(high_weight, block, high_digits, row // TILE_ROWS, rows, high_start, sums)
                multiply_block(weight, block, digits, row // TILE_ROWS, rows, start, sums[rows:])
                if hybrid:
                    _add_factors(weight, block, words, factors, counts, row, rows, sums)
                finish_block(sums, 2, steps, scale, nothing, nothing, added, block, out, row, rows)
        release(weight)


@compiled(nogil=True, fastmath=False)  # else Numba takes the caller's: a product rounded with its sum is another code
def _quantize(
    row: Any, limit: Any, wide: Any, exact: int, place: int, shift: int, work: Any, found: Any, tiles: Any, marks: Any
) -> Any:
    """A token [K] in row `place` of the tiles, of all columns and of the wide ones: both digits; returns its scale.

    Its own outliers go to `found`, but for the low digit: words, factors and counts, as `add_columns` reads them.
    """
    values, apart, low, measured, masks = work
    _read(row, wide, values, apart)
    peak, largest = _take_out(values, len(row), limit, measured, masks, found, marks)
    for j in range(len(wide)):
        largest = max(largest, as_bits(apart[j]) & MAGNITUDE)  # by their bits, NaN is the largest of all
    absmax = as_float(max(peak, as_bits(as_float(largest) / _BASE)))  # two digits hold 127 * 254 steps
    inverse, rounder = inverse_of(absmax), ROUNDER + np.float32(shift)
    if not inverse:
        values[:], apart[:] = 0, 0  # infinity * 0 is no number
    tile, high_tile = tiles
    for s in range(len(values) // TILE_COLUMNS):
        for k in range(TILE_COLUMNS):
            tile[s, place, k] = np.int8(as_bits(values[s * TILE_COLUMNS + k] * inverse + rounder))
    _to_high_codes(wide, exact, apart, low, inverse, rounder, tile, high_tile, place, len(values) // TILE_COLUMNS)
    _to_factors(found, inverse, rounder, tile, place)
    return absmax / np.float32(INT8_MAX)


@compiled(nogil=True)
def _scratch(steps: int, high_steps: int) -> Any:
    """To work in: a token's values, in whole tiles; those of wide columns, and their low digits; what is measured."""
    values, apart = np.zeros(steps * TILE_COLUMNS, np.float32), np.zeros(high_steps * TILE_COLUMNS, np.float32)
    return values, apart, np.empty(len(apart), np.int8), np.empty(2, np.uint32), np.empty(steps, np.uint64)


@compiled(nogil=True, fastmath=False)
def _read(row: Any, wide: Any, values: Any, apart: Any) -> None:
    """A token's bits [K] as float32, with those of wide columns apart, and 0 in their places."""
    for k in range(len(row)):
        values[k] = value_of(row[k])
    for j in range(len(wide)):
        apart[j] = values[wide[j]]
    for j in range(len(wide)):
        values[wide[j]] = 0


@compiled(nogil=True, fastmath=False)
def _take_out(values: Any, columns: int, limit: Any, measured: Any, masks: Any, found: Any, marks: Any) -> Any:
    """Set a token's own outliers to 0, as many as there may be; bits of the largest that is left, and of theirs.

    Of what was taken, words get the columns and factors the bits, negative numbers from the front and positive ones
    from the back; counts [2], how many of each.
    """
    words, factors, counts = found
    counts[0], counts[1] = 0, 0
    address, tiles = values.ctypes.data, len(values) // TILE_COLUMNS
    peak_and_squares(address, tiles, measured.ctypes.data)
    peak, total = measured[0], as_float(measured[1])
    if peak >= limit:
        _mark(values, limit, marks)
    bound = as_bits(_SIGMAS * np.sqrt(total / np.float32(columns)))
    if not len(words) or not total >= _LEAST or peak <= bound:  # the sum may be no number
        return peak, np.uint32(0)
    largest = peak
    beyond(address, tiles, bound, masks.ctypes.data, measured.ctypes.data)
    for s in range(tiles):
        mask = masks[s]
        while mask:
            k = s * TILE_COLUMNS + lowest(mask)
            positive = np.int64(values[k] > 0)
            place = len(words) - 1 - counts[1] if positive else counts[0]
            words[place], factors[place] = k, np.int32(as_bits(values[k]))
            counts[positive] += 1
            values[k] = 0
            mask &= mask - np.uint64(1)
    return measured[0], largest


@compiled(nogil=True)
def _mark(values: Any, limit: Any, marks: Any) -> None:
    """marks[k] = 1 where a magnitude is at the limit or above; threads share them, and so write new ones only."""
    for first in range(0, len(values), TILE_COLUMNS):
        last, new = min(first + TILE_COLUMNS, len(marks)), np.int32(0)
        for k in range(first, last):
            magnitude = as_bits(values[k]) & MAGNITUDE
            new |= np.int32((magnitude >= limit) & (magnitude <= INFINITE)) & ~marks[k]  # NaN is no outlier
        if new & 1:
            for k in range(first, last):
                magnitude = as_bits(values[k]) & MAGNITUDE
                if limit <= magnitude <= INFINITE:
                    marks[k] = 1


@compiled(nogil=True, fastmath=False)
def _to_high_codes(
    wide: Any, exact: int, apart: Any, low: Any, inverse: Any, rounder: Any, tile: Any, high_tile: Any, place: int,
    beside: int,
) -> None:  # fmt: skip
    """Both digits of wide columns: high ones in their own tiles, and for the second digits from tile `beside` on."""
    for s in range(len(high_tile)):
        for k in range(TILE_COLUMNS):
            scaled = apart[s * TILE_COLUMNS + k] * inverse
            high = (scaled / _BASE + ROUNDER) - ROUNDER
            low[s * TILE_COLUMNS + k] = np.int8(as_bits((scaled - high * _BASE) + rounder))
            high_tile[s, place, k] = np.int8(as_bits(high + rounder))
    for j in range(len(wide)):
        tile[wide[j] // TILE_COLUMNS, place, wide[j] % TILE_COLUMNS] = low[j]
    for s in range(-(-exact // TILE_COLUMNS)):
        for k in range(TILE_COLUMNS):
            tile[beside + s, place, k] = high_tile[s, place, k]  # those beyond `exact` meet zeros


@compiled(nogil=True, fastmath=False)
def _to_factors(found: Any, inverse: Any, rounder: Any, tile: Any, place: int) -> None:
    """Of what was taken out of a token, the low digit in its tile, the high one as `add_columns` reads it."""
    words, factors, counts = found
    for i in range(counts[0] + counts[1]):
        j = i if i < counts[0] else len(words) - 1 - (i - counts[0])
        k, scaled = words[j], as_float(np.uint32(factors[j])) * inverse
        high = (scaled / _BASE + ROUNDER) - ROUNDER
        tile[k // TILE_COLUMNS, place, k % TILE_COLUMNS] = np.int8(as_bits((scaled - high * _BASE) + rounder))
        words[j], factors[j] = word_of(k), np.int32(abs(high)) << (8 * (k % 4))


@compiled(nogil=True)
def _add_factors(
    weight: Any, block: int, words: Any, factors: Any, counts: Any, row: int, rows: int, sums: Any
) -> None:
    """sums [rows, 32] += the columns of a block that stand out of each token, times their high digits."""
    address, most = weight[block].ctypes.data, words.shape[1]
    for m in range(row, row + rows):
        if counts[m, 0] + counts[m, 1]:
            skipped = m * most * words.itemsize
            here = words.ctypes.data + skipped, factors.ctypes.data + skipped
            add_columns(address, here[0], here[1], most, counts[m, 0], counts[m, 1], sums[m - row].ctypes.data)
