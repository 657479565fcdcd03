"""The compiled loop of mode static: outlier columns known beforehand take part in 16 bits, all in int8 products.

A token's scale s comes from its other columns. On the grid of s an outlier column's element is a code of 16 bits, two
int8 digits; a column of the weight that is stored exactly gets a second digit below its code c:

    x = s (254 high + low)        w = absmax / 127 (c + second / 254)

    x w is the sum of low c, in the product of all columns,
                      254 high c, in one of the outlier columns alone,
                      high second, beside the first; low second, less than a step of either, is left out.

So a token's result does not depend on its neighbours, and nothing is looked for while the model runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.ops.bits import INFINITE, MAGNITUDE, ROUNDER, as_bits, as_float, value_of
from quantize8.ops.jit import compiled, prange
from quantize8.ops.passes import PAIR, bias_blocks, finish_block, inverse_of, multiply_block
from quantize8.ops.reference import INT8_MAX
from quantize8.ops.units import BLOCK, DIGIT_BASE, TILE_COLUMNS, TILE_ROWS, prepare, release

_BASE = np.float32(DIGIT_BASE)


@compiled(nogil=True, parallel=True, fastmath={"contract"})
def static(
    bits: Any,
    limit: Any,
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
    it; exact, how many of the wide columns have a second digit; weight [N / 32, steps, 2048] and its digits, K and
    then the second digits, each in whole tiles; high_weight, the codes of the wide columns; the rest as in
    `passes.decode`.
    """
    tokens = len(bits)
    tiles = len(digits)
    steps = np.zeros(tiles * TILE_ROWS, np.float32)
    for m in prange(tokens):
        steps[m] = _BASE * _to_codes(bits[m], limit, wide, exact, m, shift, digits, high_digits, marks)
    nothing, added = np.empty((1, 0), np.float32), bias_blocks(bias, len(weight))
    for part in prange(parts):
        prepare(weight)
        sums = np.empty((2 * PAIR, BLOCK), np.int32)
        for row in range(0, tokens, PAIR):
            here = min(PAIR, tokens - row)
            for block in range(part * len(weight) // parts, (part + 1) * len(weight) // parts):
                multiply_block(high_weight, block, high_digits, row // TILE_ROWS, here, high_start, sums)
                multiply_block(weight, block, digits, row // TILE_ROWS, here, start, sums[here:])
                finish_block(sums, 2, steps, scale, nothing, nothing, added, block, out, row, here)
        release(weight)


@compiled(nogil=True, fastmath=False)  # else Numba takes the caller's: a product rounded with its sum is another code
def _to_codes(
    row: Any, limit: Any, wide: Any, exact: int, m: int, shift: int, digits: Any, high_digits: Any, marks: Any
) -> Any:
    """A token [K] as codes in row m of the tiles, those of wide columns in two digits; its scale."""
    columns = len(row)
    padded = -(-columns // TILE_COLUMNS) * TILE_COLUMNS
    values, apart, largest = np.zeros(padded, np.float32), np.empty(len(wide), np.float32), np.uint32(0)
    for k in range(columns):
        values[k] = value_of(row[k])
    for j in range(len(wide)):
        apart[j] = values[wide[j]]
        largest = max(largest, as_bits(apart[j]) & MAGNITUDE)  # by their bits, NaN is the largest of all
        values[wide[j]] = 0
    peak = np.uint32(0)
    for k in range(columns):
        peak = max(peak, as_bits(values[k]) & MAGNITUDE)
    if peak >= limit:
        for k in range(columns):
            magnitude = as_bits(values[k]) & MAGNITUDE
            if limit <= magnitude <= INFINITE:  # NaN is no outlier
                marks[k] = 1
    absmax = as_float(max(peak, as_bits(as_float(largest) / _BASE)))  # two digits hold 127 * 254 steps
    inverse, rounder = inverse_of(absmax), ROUNDER + np.float32(shift)
    if not inverse:
        values[:], apart[:] = 0, 0  # infinity * 0 is no number
    tile, place = digits[m // TILE_ROWS], m % TILE_ROWS
    for s in range(padded // TILE_COLUMNS):
        for k in range(TILE_COLUMNS):
            tile[s, place, k] = np.int8(as_bits(values[s * TILE_COLUMNS + k] * inverse + rounder))
    high_tile = high_digits[m // TILE_ROWS]
    for j in range(len(wide)):
        scaled = apart[j] * inverse
        high = (scaled / _BASE + ROUNDER) - ROUNDER
        k, beside = wide[j], padded + j
        tile[k // TILE_COLUMNS, place, k % TILE_COLUMNS] = np.int8(as_bits((scaled - high * _BASE) + rounder))
        code = np.int8(as_bits(high + rounder))
        high_tile[j // TILE_COLUMNS, place, j % TILE_COLUMNS] = code
        if j < exact:
            tile[beside // TILE_COLUMNS, place, beside % TILE_COLUMNS] = code
    return absmax / np.float32(INT8_MAX)
