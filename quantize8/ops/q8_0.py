"""Q8_0, llama.cpp's int8 format: blocks of 32 weights of a row with one float16 scale, by llama.cpp's own rule.

A block is 34 bytes: d, float16 little-endian, then 32 codes, int8. d = absmax / 127 in float32, codes are the weights
times 1 / d rounded half away from zero, and only then is d rounded to float16. `gguf.quants` is the definition, and
what computes where Numba is missing; the compiled loops equal it bit for bit.

A searched scale is the d = absmax / level, of a few levels from 127 down, with which a block is read back with the
least weighted squared error, summed as in `scales`. The level 127, llama.cpp's own, comes first and stays where errors
are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize8.ops import jit
from quantize8.ops.jit import compiled
from quantize8.ops.reference import INT8_MAX, Array, scale_of
from quantize8.ops.scales import ScaleSearch, folded

Q8_0 = "Q8_0"  # as llama.cpp names the type
BLOCK = 32  # weights that share a scale
BLOCK_BYTES = 34
_SCALE_BYTES = 2
# Of absmax: a block is short enough that a step a little wider often meets its weights better, and then the largest is
# met too. Clips, as of a row, win nothing here. Against 127 alone: 10% of the error on normal weights, 16 levels 11%.
_LEVELS = (INT8_MAX - np.arange(9)).astype(np.float32)


def quantize_rows(values: Array, search: ScaleSearch | None = None) -> Array:
    """Rows of a weight as Q8_0.

    Args: values, contiguous float32 [N, K], K a multiple of 32; search, whose importance the scales are searched for
    (Q8_0 has no place for exact columns, so that it does not matter which would be).
    Returns: uint8 [N, K // 32 * 34]. A block with NaN, infinity or an absmax beyond 127 * 65504 has a scale that is not
    finite, which `first_unfit` finds. A block with an absmax below 3.8e-6 has the scale 0: llama.cpp reads zeros.
    """
    blocks = values.reshape(-1, BLOCK)
    with np.errstate(all="ignore"):
        if not jit.INSTALLED and search is None:
            from gguf import GGMLQuantizationType, quants

            packed: Array = quants.quantize(values, GGMLQuantizationType.Q8_0)
            return packed
        packed, scales = np.empty((len(blocks), BLOCK_BYTES), np.uint8), scale_of(_absmax(blocks))
        if search is not None:
            scales = _searched(blocks, search.weights(values.shape[1]).reshape(-1, BLOCK))
        if jit.INSTALLED:
            _encode(blocks, _inverses(scales), packed)
        else:
            packed[:, _SCALE_BYTES:] = _codes(blocks, _inverses(scales)).astype(np.int8).view(np.uint8)
        _put_scales(packed, scales)
    return packed.reshape(len(values), values.shape[1] // BLOCK * BLOCK_BYTES)


def carry_rows(codes: Array, absmax: Array) -> Array:
    """Row-wise int8 as Q8_0 with the codes as they are: each block has its row's scale, rounded to float16.

    Args: codes int8 [N, K], K a multiple of 32; absmax float32 [N], 127 times the scale of the row.
    Returns: uint8 [N, K // 32 * 34]. A row with an absmax beyond 127 * 65504 has scales that are not finite, as above;
    one below 3.8e-6 has scales 0 and so counts as zeros, as it would by llama.cpp's rule.
    """
    rows, columns = codes.shape
    packed = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    packed[:, :, _SCALE_BYTES:] = codes.reshape(rows, columns // BLOCK, BLOCK).view(np.uint8)
    with np.errstate(all="ignore"):
        _put_scales(packed, np.broadcast_to(scale_of(absmax)[:, None], packed.shape[:2]))
    return packed.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def dequantize_rows(packed: Array) -> Array:
    """What llama.cpp reads: uint8 [N, K // 32 * 34] to float32 [N, K]."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(invalid="ignore"):  # infinite scales
        values: Array = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
    return values


def first_unfit(packed: Array) -> int | None:
    """The first row [K // 32 * 34] of a block of rows with a scale that is NaN or infinite; None where all are fit."""
    fit = np.isfinite(_scales(packed)).all(axis=1)
    return None if fit.all() else int(np.argmin(fit))


def row_errors(values: Array, packed: Array) -> tuple[Array, Array]:
    """The sum of squares of each row, and of its difference to what Q8_0 makes of it.

    Args: values, contiguous float32 [N, K]; packed uint8 [N, K // 32 * 34], as of `quantize_rows` or `carry_rows`.
    Returns: two float64 [N]. Per row, 32 sums run down the blocks and are then added from left to right: one order
    with and without Numba, and whatever rows come together.
    """
    squares, errors = np.zeros((len(values), BLOCK)), np.zeros((len(values), BLOCK))
    if jit.INSTALLED:
        _add_squares(
            values.reshape(len(values), values.shape[1] // BLOCK, BLOCK), packed, _scales(packed), squares, errors
        )
    else:
        difference = values - dequantize_rows(packed)
        for total, part in ((squares, values), (errors, difference)):
            for block in np.moveaxis(part.reshape(len(part), part.shape[1] // BLOCK, BLOCK), 1, 0).astype(np.float64):
                total += block * block
    return np.cumsum(squares, axis=1)[:, -1], np.cumsum(errors, axis=1)[:, -1]


def _absmax(blocks: Array) -> Array:
    """The largest magnitude of each block [B, 32]; NaN where it holds one."""
    if not jit.INSTALLED:
        absmax: Array = np.abs(blocks).max(axis=1, initial=0.0)
        return absmax
    peaks = np.empty(len(blocks), np.uint32)
    _peaks(blocks.view(np.uint32), peaks)
    return peaks.view(np.float32)


def _inverses(scales: Array) -> Array:
    inverses: Array = np.float32(1) / scales
    inverses[np.isinf(inverses)] = 0  # of 0, and of what is so small that codes would be no numbers
    return inverses


def _searched(blocks: Array, weights: Array) -> Array:
    """The best scale float32 [B] of each block [B, 32], not yet rounded; weights are [K // 32, 32], for every row."""
    scales: Array = _absmax(blocks) / _LEVELS[:, None]
    inverses, stored = _inverses(scales), scales.astype("<f2").astype(np.float32)
    best = np.zeros(len(blocks), np.int64)
    if jit.INSTALLED:
        _search(blocks, weights, inverses, stored, best)
    else:
        least = np.full(len(blocks), np.inf, np.float32)
        for level in range(len(scales)):
            difference = blocks - _codes(blocks, inverses[level]) * stored[level][:, None]
            terms = (difference * difference).reshape(-1, *weights.shape) * weights
            errors = folded(terms).reshape(-1)
            best[errors < least] = level
            least = np.fmin(errors, least)
    chosen: Array = scales[best, np.arange(len(blocks))]
    return chosen


def _codes(blocks: Array, inverses: Array) -> Array:
    """Codes of blocks [B, 32] as float32."""
    scaled = blocks * inverses[:, None]
    magnitudes = np.abs(scaled)
    whole = np.floor(magnitudes)
    codes: Array = np.copysign(whole + (magnitudes - whole >= np.float32(0.5)), scaled)
    return codes


def _scales(packed: Array) -> Array:
    """float32 [N, K // 32]."""
    blocks = packed.reshape(len(packed), packed.shape[1] // BLOCK_BYTES, BLOCK_BYTES)
    scales: Array = np.ascontiguousarray(blocks[:, :, :_SCALE_BYTES]).view("<f2")[:, :, 0].astype(np.float32)
    return scales


def _put_scales(packed: Array, scales: Array) -> None:
    packed[..., :_SCALE_BYTES] = np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)


@compiled(nogil=True)
def _peaks(blocks: Any, peaks: Any) -> None:
    """The bits of the largest magnitude of each block, given by its bits [B, 32]; NaN where it holds one."""
    for b in range(len(blocks)):
        peak, block = np.uint32(0), blocks[b]
        for k in range(BLOCK):
            peak = max(peak, block[k] & np.uint32(0x7FFFFFFF))
        peaks[b] = peak


@compiled(nogil=True)
def _encode(blocks: Any, inverses: Any, packed: Any) -> None:
    """Codes of blocks float32 [B, 32] behind the place of the scale in `packed` [B, 34]."""
    for b in range(len(blocks)):
        block, code, inverse = blocks[b], packed[b], inverses[b]
        for k in range(BLOCK):
            scaled = block[k] * inverse
            magnitude = abs(scaled)
            whole = np.int32(magnitude)
            number = whole + np.int32(magnitude - np.float32(whole) >= np.float32(0.5))  # adding 0.5 could round up
            code[2 + k] = np.uint8(np.int32(-number if scaled < 0 else number))


@compiled(nogil=True)
def _search(blocks: Any, weights: Any, inverses: Any, stored: Any, best: Any) -> None:
    """The number of each block's best level of L; inverses and stored scales are [L, B]."""
    terms = np.empty(BLOCK, np.float32)
    for b in range(len(blocks)):
        block, weight, least = blocks[b], weights[b % len(weights)], np.float32(np.inf)
        for level in range(len(stored)):
            inverse, scale = inverses[level, b], stored[level, b]
            for k in range(BLOCK):
                magnitude = abs(block[k] * inverse)
                whole = np.floor(magnitude)
                number = whole + np.float32(magnitude - whole >= np.float32(0.5))
                difference = abs(block[k]) - number * scale
                terms[k] = weight[k] * (difference * difference)
            for k in range(16):  # as `folded` does, with lengths that a compiler knows
                terms[k] += terms[16 + k]
            for k in range(8):
                terms[k] += terms[8 + k]
            for k in range(4):
                terms[k] += terms[4 + k]
            error = (terms[0] + terms[2]) + (terms[1] + terms[3])
            if error < least:
                best[b], least = level, error


@compiled(nogil=True)
def _add_squares(values: Any, packed: Any, scales: Any, squares: Any, errors: Any) -> None:
    """See `row_errors`."""
    for n in range(len(values)):
        square, error, row = squares[n], errors[n], packed[n]
        for b in range(values.shape[1]):
            block, code, scale = values[n, b], row[b * 34 + 2 : b * 34 + 34], scales[n, b]
            for k in range(BLOCK):
                value = block[k]
                difference = value - np.float32(np.int8(code[k])) * scale
                square[k] += np.float64(value) * np.float64(value)
                error[k] += np.float64(difference) * np.float64(difference)
