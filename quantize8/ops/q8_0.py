"""Q8_0, llama.cpp's int8 format: blocks of 32 weights of a row with one float16 scale, by llama.cpp's own rule.

A block is 34 bytes: d, float16 little-endian, then 32 codes, int8. d = absmax / 127 in float32, codes are the weights
times 1 / d rounded half away from zero, and only then is d rounded to float16. `gguf.quants` is the definition; the
kernels of cpu/weights.c equal it bit for bit.

A searched scale is the d = absmax / level, of a few levels from 127 down, with which a block is read back with the
least weighted squared error, summed as in `scales`. The level 127, llama.cpp's own, comes first and stays where errors
are equal.
"""

from __future__ import annotations

import numpy as np

from quantize8.ops import units
from quantize8.ops.reference import INT8_MAX, Array, scale_of
from quantize8.ops.scales import ScaleSearch, folded
from quantize8.ops.units import pointer

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
        packed, scales = np.empty((len(blocks), BLOCK_BYTES), np.uint8), scale_of(_absmax(blocks))
        if search is not None:
            scales = _searched(blocks, search.weights(values.shape[1]).reshape(-1, BLOCK))
        inverses = _inverses(scales)
        units.library().q8_0_encode(pointer(blocks), pointer(inverses), len(blocks), pointer(packed))
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
    Returns: two float64 [N]. Per row, 32 sums run down the blocks and are then added from left to right: one order,
    whatever rows come together.
    """
    squares, errors = np.zeros((len(values), BLOCK)), np.zeros((len(values), BLOCK))
    scales, blocks = _scales(packed), values.shape[1] // BLOCK
    units.library().q8_0_add_squares(
        *map(pointer, (values, packed, scales)), len(values), blocks, pointer(squares), pointer(errors)
    )
    return np.cumsum(squares, axis=1)[:, -1], np.cumsum(errors, axis=1)[:, -1]


def _absmax(blocks: Array) -> Array:
    """The largest magnitude of each block [B, 32]; NaN where it holds one."""
    peaks = np.empty(len(blocks), np.uint32)
    units.library().q8_0_peaks(pointer(blocks), len(blocks), pointer(peaks))
    return peaks.view(np.float32)


def _inverses(scales: Array) -> Array:
    inverses: Array = np.float32(1) / scales
    inverses[np.isinf(inverses)] = 0  # of 0, and of what is so small that codes would be no numbers
    return inverses


def _searched(blocks: Array, weights: Array) -> Array:
    """The best scale float32 [B] of each block [B, 32], not yet rounded; weights are [K // 32, 32], for every row."""
    scales, inverses, stored = _candidates(blocks)
    best, weights = np.zeros(len(blocks), np.int64), np.ascontiguousarray(weights)
    units.library().q8_0_search(
        pointer(blocks), len(blocks), pointer(weights), len(weights), pointer(inverses), pointer(stored), len(scales),
        pointer(best),
    )  # fmt: skip
    chosen: Array = scales[best, np.arange(len(blocks))]
    return chosen


def search_scales(blocks: Array, weights: Array) -> Array:
    """The definition of the search, slow: the scale float32 [B] of each block [B, 32]; weights are [K // 32, 32]."""
    scales, inverses, stored = _candidates(blocks)
    best, least = np.zeros(len(blocks), np.int64), np.full(len(blocks), np.inf, np.float32)
    for level in range(len(scales)):
        magnitudes = np.abs(blocks * inverses[level][:, None])
        whole = np.floor(magnitudes)
        codes = whole + (magnitudes - whole >= np.float32(0.5))  # half away from zero
        difference = np.abs(blocks) - codes * stored[level][:, None]
        errors = folded((difference * difference).reshape(-1, *weights.shape) * weights).reshape(-1)
        best[errors < least] = level
        least = np.fmin(errors, least)
    chosen: Array = scales[best, np.arange(len(blocks))]
    return chosen


def _candidates(blocks: Array) -> tuple[Array, Array, Array]:
    """Scales of each level and block [L, B], their inverses, and what is stored of them."""
    scales: Array = np.ascontiguousarray(_absmax(blocks) / _LEVELS[:, None])
    return scales, _inverses(scales), scales.astype("<f2").astype(np.float32)


def _scales(packed: Array) -> Array:
    """float32 [N, K // 32]."""
    blocks = packed.reshape(len(packed), packed.shape[1] // BLOCK_BYTES, BLOCK_BYTES)
    scales: Array = np.ascontiguousarray(blocks[:, :, :_SCALE_BYTES]).view("<f2")[:, :, 0].astype(np.float32)
    return scales


def _put_scales(packed: Array, scales: Array) -> None:
    packed[..., :_SCALE_BYTES] = np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)
