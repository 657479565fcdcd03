"""Compiled loops of the fast CPU path: activations to int8 digits, and their product with a weight laid out in tiles.

Activations and outputs are float32 or bfloat16, given by their bits. A token, and a block of the product, stay in the
nearest cache until they are done: between activations and outputs only codes are written to memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.ops.bits import INFINITE, MAGNITUDE, ROUNDER, as_bits, as_float, value_of
from quantize8.ops.epilogue import finish, read_column
from quantize8.ops.jit import compiled, prange
from quantize8.ops.reference import INT8_MAX
from quantize8.ops.units import (
    BLOCK,
    DIGIT_BASE,
    LINES,
    TILE_COLUMNS,
    TILE_ROWS,
    multiply,
    prepare,
    release,
)

NOTHING = np.uint32(0x80000000)  # above the bits of every magnitude: no element is an outlier
_BASE = np.float32(DIGIT_BASE)
PAIR = 2 * TILE_ROWS  # rows that one call of `multiply` takes at most


@compiled(nogil=True, parallel=True, fastmath={"contract"})
def decode(
    bits: Any,
    count: int,
    exact: Any,
    weight: Any,
    scale: Any,
    start: Any,
    shift: int,
    bias: Any,
    digits: Any,
    parts: int,
    out: Any,
) -> None:
    """Few tokens with exact activations: out [M, N] = x times the weight transposed, plus bias.

    Args: bits [M, K] of x; count, digits a token, all of which fit into two pairs of tiles; exact [E], columns of the
    weight that have a second digit, in tiles after those of K; weight [N / 32, K / 64, 2048]; scale, start [N / 32,
    32]; shift of the unit's activations; bias [N], or empty; digits [tiles, K / 64, 16, 64], to work in; parts that
    the outputs are divided into; out, bits [M, N].
    """
    tokens = len(bits)
    steps, marks, nothing = np.empty(TILE_ROWS, np.float32), np.empty(0, np.uint32), np.empty((1, 0), np.float32)
    for m in prange(tokens):
        steps[m] = _to_digits(bits[m], NOTHING, count, m, tokens, shift, digits, marks)
        if len(exact):
            _repeat_digits(exact, bits.shape[1], count, m, tokens, digits)
    rows, added = count * tokens, bias_blocks(bias, len(weight))
    for part in prange(parts):
        prepare(weight)
        sums = np.empty((2 * PAIR, BLOCK), np.int32)
        for block in range(part * len(weight) // parts, (part + 1) * len(weight) // parts):
            for first in range(0, rows, PAIR):
                here = min(PAIR, rows - first)
                multiply_block(weight, block, digits, first // TILE_ROWS, here, start, sums[first:])
            finish_block(sums, count, steps, scale, nothing, nothing, added, block, out, 0, tokens)
        release(weight)


@compiled(nogil=True, parallel=True, fastmath={"contract"})
def prefill(
    bits: Any,
    limit: Any,
    elementwise: bool,
    weight: Any,
    scale: Any,
    start: Any,
    shift: int,
    bias: Any,
    digits: Any,
    parts: int,
    out: Any,
) -> None:
    """Many tokens, each in one digit but for its elements of magnitude `limit` and more; arguments as in `decode`.

    What the codes miss of x is multiplied in float32: of outlier columns all of it, or elementwise that of outliers.
    """
    tokens, columns = bits.shape
    tiles = len(digits)
    steps, marks = np.zeros(tiles * TILE_ROWS, np.float32), np.zeros(columns, np.uint32)
    for m in prange(tokens):
        steps[m] = _to_digits(bits[m], limit, 1, m, tokens, shift, digits, marks)
    outliers = np.flatnonzero(marks)
    residual = np.zeros((tiles * TILE_ROWS, len(outliers)), np.float32)
    if len(outliers):
        for m in prange(tokens):
            _residual(
                bits[m],
                limit,
                elementwise,
                outliers,
                digits[m // TILE_ROWS],
                m % TILE_ROWS,
                steps[m],
                shift,
                residual[m],
            )
    added = bias_blocks(bias, len(weight))
    for part in prange(parts):
        prepare(weight)
        first, last = part * len(weight) // parts, (part + 1) * len(weight) // parts
        sums, beside = np.empty((PAIR, BLOCK), np.int32), np.empty((last - first, len(outliers), BLOCK), np.float32)
        for row in range(0, tokens, PAIR):
            here = min(PAIR, tokens - row)
            for block in range(first, last):
                multiply_block(weight, block, digits, row // TILE_ROWS, here, start, sums)
                right = beside[block - first]
                if row == 0:
                    for j in range(len(outliers)):
                        read_column(
                            weight[block].ctypes.data, outliers[j], scale[block].ctypes.data, right[j].ctypes.data
                        )
                finish_block(sums, 1, steps, scale, residual, right, added, block, out, row, here)
        release(weight)


@compiled(nogil=True, parallel=True)
def product(
    codes: Any, steps: Any, weight: Any, scale: Any, start: Any, shift: int, digits: Any, parts: int, out: Any
) -> None:
    """out float32 [M, N] = codes int8 [M, K] times the weight transposed, times (steps [M] * scale); as in `decode`."""
    tokens, columns = codes.shape
    for m in prange(tokens):
        for s in range(digits.shape[1]):
            for k in range(min(TILE_COLUMNS, columns - s * TILE_COLUMNS)):
                code = np.int32(codes[m, s * TILE_COLUMNS + k]) + np.int32(shift)
                digits[m // TILE_ROWS, s, m % TILE_ROWS, k] = np.int8(code)
    nothing, none = np.empty((1, 0), np.float32), np.zeros((len(weight), BLOCK), np.float32)
    for part in prange(parts):
        prepare(weight)
        sums = np.empty((PAIR, BLOCK), np.int32)
        for row in range(0, tokens, PAIR):
            here = min(PAIR, tokens - row)
            for block in range(part * len(weight) // parts, (part + 1) * len(weight) // parts):
                multiply_block(weight, block, digits, row // TILE_ROWS, here, start, sums)
                finish_block(sums, 1, steps, scale, nothing, nothing, none, block, out, row, here)
        release(weight)


@compiled(nogil=True)
def inverse_of(absmax: Any) -> Any:
    """By the reference's rule: 0 where there is none."""
    if absmax == 0:
        return np.float32(0)
    inverse = np.float32(1) / absmax * np.float32(INT8_MAX)
    return inverse if np.isfinite(inverse) and np.isfinite(absmax) else np.float32(0)


@compiled(nogil=True, fastmath=False)  # or it would be its caller's
def _to_digits(row: Any, limit: Any, count: int, first: int, step: int, shift: int, digits: Any, marks: Any) -> Any:
    """A token [K] as `count` digits in rows first, first + step ... of the tiles, each `shift` higher; its scale.

    As reference.quantize_activations where there is one. Elements of magnitude `limit` and more get digits 0, and
    marks[k] = 1.
    """
    columns, padded = len(row), digits.shape[1] * TILE_COLUMNS
    peak = np.uint32(0)
    for k in range(columns):
        peak = max(peak, as_bits(value_of(row[k])) & MAGNITUDE)
    if peak >= limit:
        peak = _without_outliers(row, limit, marks)
    absmax = as_float(peak)
    inverse = inverse_of(absmax)
    rest = np.empty(padded, np.float32)
    for k in range(columns):
        value = value_of(row[k])
        rest[k] = (np.float32(0) if as_bits(value) & MAGNITUDE >= limit else value) * inverse
    rest[columns if inverse else 0 :] = 0  # infinity * 0 is no number
    rounder = ROUNDER + np.float32(shift)
    for d in range(count):
        place = first + d * step
        for s in range(digits.shape[1]):
            for k in range(TILE_COLUMNS):
                code = np.int8(as_bits(rest[s * TILE_COLUMNS + k] + rounder))
                digits[place // TILE_ROWS, s, place % TILE_ROWS, k] = code
        if d + 1 < count:
            for k in range(padded):
                rest[k] = (rest[k] - ((rest[k] + rounder) - rounder)) * _BASE
    return absmax / np.float32(INT8_MAX)


@compiled(nogil=True)
def _repeat_digits(exact: Any, columns: int, count: int, first: int, step: int, digits: Any) -> None:
    """For the second digits of a weight, each worth 1 / 254: a token's digits again, one place lower."""
    padded = -(-columns // TILE_COLUMNS) * TILE_COLUMNS
    for d in range(1, count):
        place, above = first + d * step, first + (d - 1) * step
        for j in range(len(exact)):
            k, beside = exact[j], padded + j
            digit = digits[above // TILE_ROWS, k // TILE_COLUMNS, above % TILE_ROWS, k % TILE_COLUMNS]
            digits[place // TILE_ROWS, beside // TILE_COLUMNS, place % TILE_ROWS, beside % TILE_COLUMNS] = digit


@compiled(nogil=True)
def _without_outliers(row: Any, limit: Any, marks: Any) -> Any:
    """The largest magnitude below `limit` in a token, or NaN's; marks[k] = 1 where one is at the limit or above.

    Threads share the marks, and so write those only that are not set yet.
    """
    whole = len(row) // TILE_COLUMNS
    peak = np.uint32(0)
    for s in range(whole + 1):
        unmarked = np.uint32(s == whole)
        if s < whole:  # 64 elements, so that the loop is compiled to a few instructions
            for k in range(TILE_COLUMNS):
                magnitude = as_bits(value_of(row[s * TILE_COLUMNS + k])) & MAGNITUDE
                outlier = (magnitude >= limit) & (magnitude <= INFINITE)
                peak = max(peak, np.uint32(0) if outlier else magnitude)
                unmarked |= np.uint32(outlier) & ~marks[s * TILE_COLUMNS + k]
        for k in range(s * TILE_COLUMNS, min((s + 1) * TILE_COLUMNS, len(row)) if unmarked else 0):
            magnitude = as_bits(value_of(row[k])) & MAGNITUDE
            if magnitude < limit or magnitude > INFINITE:
                peak = max(peak, magnitude)
            else:
                marks[k] = 1
    return peak


@compiled(nogil=True)
def _residual(
    row: Any, limit: Any, elementwise: bool, outliers: Any, tiles: Any, place: int, step: Any, shift: int, residual: Any
) -> None:
    """residual [J] = x - code * step of a token's outlier columns; elementwise 0 at magnitudes below `limit`."""
    for j in range(len(outliers)):
        k = outliers[j]
        value = value_of(row[k])
        if not elementwise or as_bits(value) & MAGNITUDE >= limit:
            code = np.int8(np.int32(tiles[k // TILE_COLUMNS, place, k % TILE_COLUMNS]) - np.int32(shift))
            residual[j] = value - np.float32(code) * step


@compiled(nogil=True)
def multiply_block(weight: Any, block: int, digits: Any, tile: int, rows: int, start: Any, sums: Any) -> None:
    """Sums int32 [rows, 32] of activations in `digits` from a tile on, times a block of a weight: `units.multiply`."""
    fetched = LINES if tile == 0 else 0  # the other tiles find the block in a cache
    right, left = weight[block].ctypes.data, digits[tile].ctypes.data
    multiply(weight, right, left, rows, digits.shape[1], start[block].ctypes.data, sums.ctypes.data, fetched)


@compiled(nogil=True)
def finish_block(
    sums: Any,
    count: int,
    steps: Any,
    scale: Any,
    residual: Any,
    beside: Any,
    added: Any,
    block: int,
    out: Any,
    row: int,
    tokens: int,
) -> None:
    """The block of out from (row, 32 block) on, for so many tokens."""
    column = block * BLOCK
    place, width = out.ctypes.data + (row * out.shape[1] + column) * out.itemsize, min(BLOCK, out.shape[1] - column)
    finish(
        sums.ctypes.data,
        count,
        steps[row:].ctypes.data,
        scale[block].ctypes.data,
        residual[row].ctypes.data,
        residual.shape[1],
        beside.ctypes.data,
        added[block].ctypes.data,
        out,
        place,
        tokens,
        width,
    )


@compiled(nogil=True)
def bias_blocks(values: Any, count: int) -> Any:
    """Values [N], or none, as [count, 32] with zeros at the end."""
    padded = np.zeros((count, BLOCK), np.float32)
    flat = padded.reshape(-1)
    for n in range(len(values)):
        flat[n] = values[n]
    return padded
