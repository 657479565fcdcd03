"""Q8_0, the int8 format of ggml and llama.cpp: blocks of 32 weights of a row that share one float16 scale.

A block is 34 bytes: the scale d, little-endian float16, and then 32 int8 codes. The rule is llama.cpp's: d is
absmax / 127 in float32, the codes are the weights times 1 / d rounded half away from zero, and only then is d rounded
to float16. `gguf.quants` is the definition; the kernels of cpu/weights.c equal it bit for bit.

A searched scale is d = absmax / level, for the level among a few from 127 down at which the dequantized block has the
least weighted squared error, summed as in `scales`. The level 127, llama.cpp's own, is tried first and wins ties.

Weights that were 4-bit floats can be stored without any loss: then d is the power of two of `reference.exact_scales`.
"""

from __future__ import annotations

import numpy as np

from quantize8.kernels import cpu
from quantize8.kernels.cpu import pointer
from quantize8.kernels.reference import INT8_MAX, Array, scale_of
from quantize8.kernels.scales import ScaleSearch, folded

Q8_0 = "Q8_0"  # llama.cpp's name of the type
BLOCK = 32  # weights that share a scale
BLOCK_BYTES = 34
_SCALE = np.dtype("<f2")
_SCALE_BYTES = _SCALE.itemsize
# The codes that absmax can get. A block is so short that a slightly wider step often fits its weights better, the
# largest one included. Clipping, as for whole rows, gains nothing here. Compared with 127 alone these nine levels
# remove 10% of the error on normally distributed weights; 16 levels would remove 11%.
_LEVELS = (INT8_MAX - np.arange(9)).astype(np.float32)


def quantize_rows(values: Array, search: ScaleSearch | None = None, exact: bool = False) -> Array:
    """Quantize rows of a weight to Q8_0.

    Args:
        values: Contiguous float32 [N, K], K a multiple of 32.
        search: Search the scales with the least error, weighted by its importance; its exact columns are ignored, as
            Q8_0 cannot store any. None for llama.cpp's own scales.
        exact: Take the scale of `reference.exact_scales` for each block that has one.

    Returns:
        uint8 [N, K // 32 * 34]. A block with NaN, infinity or an absmax beyond 127 * 65504 has a scale that is not
        finite, which `first_unfit` finds. A block with an absmax below 3.8e-6 has the scale 0: llama.cpp reads zeros.
    """
    blocks = values.reshape(-1, BLOCK)
    with np.errstate(all="ignore"):
        scales = scale_of(absmax_of(blocks))
        if search is not None:
            scales = _searched(blocks, search.weights(values.shape[1]).reshape(-1, BLOCK))
        if exact:
            powers = cpu.exact_scales(blocks, _SCALE)
            scales = np.where(powers > 0, powers, scales)
        packed = encode(blocks, _inverses(scales))
        _put_scales(packed, scales)
    return packed.reshape(len(values), values.shape[1] // BLOCK * BLOCK_BYTES)


def encode(blocks: Array, inverses: Array) -> Array:
    """The codes of blocks: weights times the inverse of the scale, rounded half away from zero.

    Args:
        blocks: Contiguous float32 [B, 32].
        inverses: float32 [B].

    Returns:
        uint8 [B, 34]; the two bytes before the codes of a block, for the scale, are not set.
    """
    packed = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    cpu.library().q8_0_encode(pointer(blocks), pointer(inverses), len(blocks), pointer(packed))
    return packed


def codes_of(packed: Array) -> Array:
    """The codes of blocks uint8 [..., 34], int8 [..., 32]; a view."""
    codes: Array = packed[..., _SCALE_BYTES:].view(np.int8)
    return codes


def with_scales(codes: Array, scales: Array) -> Array:
    """Store codes and scales that were chosen elsewhere as Q8_0; the scales are rounded to float16.

    Args:
        codes: int8 [N, K], K a multiple of 32.
        scales: float32 [N, K / 32]; or [N, 1], one scale for all blocks of a row.

    Returns:
        uint8 [N, K // 32 * 34]. A scale beyond 65504 is not finite, which `first_unfit` finds. A scale below 3e-8
        becomes 0, so that the block is read as zeros, as it would be by llama.cpp's rule.
    """
    rows, columns = codes.shape
    packed = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    codes_of(packed)[:] = codes.reshape(rows, columns // BLOCK, BLOCK)
    with np.errstate(all="ignore"):
        _put_scales(packed, np.broadcast_to(scales, packed.shape[:2]))
    return packed.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def dequantize_rows(packed: Array) -> Array:
    """The weights float32 [N, K] that llama.cpp reads from blocks uint8 [N, K // 32 * 34]."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(invalid="ignore"):  # infinite scales
        values: Array = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
    return values


def first_unfit(packed: Array) -> int | None:
    """The first row of uint8 [N, K // 32 * 34] that has a NaN or infinite scale; None if all scales are finite."""
    fit = np.isfinite(scales_of(packed)).all(axis=1)
    return None if fit.all() else int(np.argmin(fit))


def row_errors(values: Array, packed: Array, scales: Array | None = None) -> tuple[Array, Array]:
    """The sum of squares of each row, and the sum of squares of its quantization error.

    In each row, weight i of every block is added to sum i of 32; these sums are then added from left to right. This
    order does not depend on which rows are passed together.

    Args:
        values: Contiguous float32 [N, K].
        packed: uint8 [N, K // 32 * 34], as `quantize_rows` or `with_scales` makes it.
        scales: Contiguous float32 [N, K // 32], instead of those in `packed`.

    Returns:
        Two arrays float64 [N]: squares of the values, and of the errors.
    """
    squares, errors = np.zeros((len(values), BLOCK)), np.zeros((len(values), BLOCK))
    scales, blocks = scales_of(packed) if scales is None else scales, values.shape[1] // BLOCK
    cpu.library().q8_0_add_squares(
        *map(pointer, (values, packed, scales)), len(values), blocks, pointer(squares), pointer(errors)
    )
    return np.cumsum(squares, axis=1)[:, -1], np.cumsum(errors, axis=1)[:, -1]


def absmax_of(blocks: Array) -> Array:
    """The largest magnitude of each block [B, 32]: float32 [B], NaN where the block holds a NaN."""
    peaks = np.empty(len(blocks), np.uint32)
    cpu.library().q8_0_peaks(pointer(blocks), len(blocks), pointer(peaks))
    return peaks.view(np.float32)


def _inverses(scales: Array) -> Array:
    inverses: Array = np.float32(1) / scales
    inverses[np.isinf(inverses)] = 0  # of the scale 0, or of one so small that codes would not be finite
    return inverses


def _searched(blocks: Array, weights: Array) -> Array:
    """The best scale float32 [B] of each block [B, 32], not yet rounded to float16.

    weights float32 [K // 32, 32] are the importances of one row's columns, which all rows share.
    """
    scales, inverses, stored = _candidates(blocks)
    best, weights = np.zeros(len(blocks), np.int64), np.ascontiguousarray(weights)
    cpu.library().q8_0_search(
        pointer(blocks), len(blocks), pointer(weights), len(weights), pointer(inverses), pointer(stored), len(scales),
        pointer(best),
    )  # fmt: skip
    chosen: Array = scales[best, np.arange(len(blocks))]
    return chosen


def search_scales(blocks: Array, weights: Array) -> Array:
    """The slow definition of the search, against which the compiled one is tested.

    Args:
        blocks: float32 [B, 32], whole rows of K // 32 blocks each.
        weights: float32 [K // 32, 32], importances of one row's columns, which all rows share.

    Returns:
        The best scale float32 [B] of each block, not yet rounded to float16.
    """
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
    """The scales of each level and block, their inverses, and the float16 scales that are stored: float32 [L, B]."""
    scales: Array = np.ascontiguousarray(absmax_of(blocks) / _LEVELS[:, None])
    return scales, _inverses(scales), scales.astype(_SCALE).astype(np.float32)


def scales_of(packed: Array) -> Array:
    """The scales float32 [N, K // 32] of blocks uint8 [N, K // 32 * 34]."""
    blocks = packed.reshape(len(packed), packed.shape[1] // BLOCK_BYTES, BLOCK_BYTES)
    scales: Array = np.ascontiguousarray(blocks[:, :, :_SCALE_BYTES]).view(_SCALE)[:, :, 0].astype(np.float32)
    return scales


def _put_scales(packed: Array, scales: Array) -> None:
    packed[..., :_SCALE_BYTES] = np.ascontiguousarray(scales.astype(_SCALE))[..., None].view(np.uint8)
