"""The fast CPU path of a linear layer: a weight in tiles for the processor's int8 unit, and one compiled call.

At prefill a token becomes one row of int8 codes, and what outlier columns lose by that is added in float32. At decode
(M <= 16) activations keep their precision: each is written in base 254, as three or four int8 digits, and the digits
are multiplied as rows of their own. Reading the weight is the cost there, so they are nearly free.

    x = s (d1 + d2 / 254 + d3 / 254^2 + ...),    s = absmax / 127
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numba import config, set_num_threads
from torch import Tensor

from quantize8.ops import units
from quantize8.ops.jit import PARALLEL
from quantize8.ops.passes import NOTHING, decode, prefill
from quantize8.ops.reference import DECODE_TOKENS, INT8_MAX, Array, OutlierMode
from quantize8.ops.units import BLOCK, TILE_COLUMNS, TILE_ROWS, VNNI_SHIFT, Unit

_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}  # to 2^-31 and 2^-23 of a token's absmax
_BITS = (torch.float32, torch.bfloat16)  # what the loops read and write
_HALF_A_CACHE = 2**20  # bytes of a second-level cache that activations may stay in
_PART_BYTES = 3 * 2**18  # of weight that a thread multiplies by all tokens before it goes on, where they do not
_LARGEST_K = (2**31 - 1) // (INT8_MAX * 2 * VNNI_SHIFT)  # int32 sums hold these; 65,538


def available(columns: int = 1) -> bool:
    """Whether this processor has an int8 unit for weights of so many columns, K."""
    return bool(units.available()) and columns <= _LARGEST_K


class PackedWeight:
    """An int8 weight [N, K] with its scales, in the layout of an int8 unit: the fastest there is, if none is given."""

    def __init__(self, codes: Tensor, absmax: Tensor, unit: Unit | None = None) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        rows, columns = self.shape
        blocks, steps = -(-rows // BLOCK), -(-columns // TILE_COLUMNS)
        tiles = torch.zeros(blocks, 2, TILE_ROWS, steps, TILE_COLUMNS // 4, 4, dtype=torch.int8)
        tiles.view(blocks * BLOCK, steps * TILE_COLUMNS)[:rows, :columns] = codes
        tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(blocks, steps, BLOCK * TILE_COLUMNS)
        offered = units.available()  # which also asks for the tiles that AMX needs
        is_amx = (unit or offered[0]) == "amx"
        self._tiles = tiles.numpy().view(np.int8 if is_amx else np.uint8)
        self._shift = 0 if is_amx else VNNI_SHIFT
        self._scale = _blocks(absmax / INT8_MAX)
        self._start = _blocks(codes.sum(1, dtype=torch.int32) * -VNNI_SHIFT)
        self._no_bias = np.zeros_like(self._scale)

    def codes(self) -> Tensor:
        """The codes int8 [N, K] again, in the usual layout."""
        blocks, steps, _ = self._tiles.shape
        tiles = torch.from_numpy(self._tiles.view(np.int8)).view(blocks, steps, 2, TILE_COLUMNS // 4, TILE_ROWS, 4)
        codes = tiles.permute(0, 2, 4, 1, 3, 5).reshape(blocks * BLOCK, steps * TILE_COLUMNS)
        return codes[: self.shape[0], : self.shape[1]].contiguous()

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float, mode: OutlierMode) -> Tensor:
        """`reference.linear`: x [M, K] -> [M, N] in x's dtype. Modes dynamic and elementwise."""
        values = (x if x.dtype in _BITS else x.float()).contiguous()
        y = torch.empty(values.shape[0], self.shape[0], dtype=values.dtype)
        if not y.numel():
            return y.to(x.dtype)
        count = _DIGITS[x.dtype] if len(x) <= DECODE_TOKENS else 1
        digits = _SCRATCH.digits(-(-count * len(x) // TILE_ROWS), self._tiles.shape[1])
        threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
        parts = len(self._tiles)
        if digits.size > _HALF_A_CACHE:
            parts = min(parts, max(2 * threads, self._tiles.size // _PART_BYTES))
        added = self._no_bias if bias is None else _blocks(bias.float())
        weight = (self._tiles, self._scale, self._start, self._shift, added, digits, parts, _bits_of(y))
        with PARALLEL:
            set_num_threads(threads)
            if count > 1:
                decode(_bits_of(values), count, *weight)
            else:
                limit = np.float32(threshold).view(np.uint32) if threshold > 0 else NOTHING
                prefill(_bits_of(values), limit, mode == "elementwise", *weight)
        return y if y.dtype == x.dtype else y.to(x.dtype)


class _Scratch(threading.local):
    """Memory that a thread uses again at its next call: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._digits = np.empty(0, np.int8)

    def digits(self, tiles: int, steps: int) -> Array:
        """Room for activations, with anything in it."""
        shape = (tiles, steps, TILE_ROWS, TILE_COLUMNS)
        count = math.prod(shape)
        if self._digits.size < count:
            self._digits = np.empty(count, np.int8)
        return self._digits[:count].reshape(shape)


_SCRATCH = _Scratch()


def _blocks(values: Tensor) -> Array:
    """A value for each output feature as [N / 32, 32], with zeros at the end."""
    padded = torch.zeros(-(-len(values) // BLOCK), BLOCK, dtype=values.dtype)
    padded.view(-1)[: len(values)] = values
    return padded.numpy()


def _bits_of(values: Tensor) -> Array:
    """The bits of float32 or bfloat16 values, sharing their memory."""
    if values.dtype == torch.float32:
        return values.numpy().view(np.uint32)
    return values.view(torch.int16).numpy().view(np.uint16)
