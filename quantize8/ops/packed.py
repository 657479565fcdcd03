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

from quantize8.errors import DependencyError
from quantize8.ops import units
from quantize8.ops.jit import PARALLEL
from quantize8.ops.passes import NOTHING, decode, prefill, product
from quantize8.ops.reference import DECODE_TOKENS, INT8_MAX, Array, OutlierMode
from quantize8.ops.units import BLOCK, TILE_COLUMNS, TILE_ROWS, VNNI_SHIFT, Unit

_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}  # to 2^-31 and 2^-23 of a token's absmax
_BITS = (torch.float32, torch.bfloat16)  # what the loops read and write
_NO_BIAS = np.empty(0, np.float32)
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
        self.tiles = tiles if (unit or offered[0]) == "amx" else tiles.view(torch.uint8)
        self.scale = _blocks(absmax / INT8_MAX)
        self.absmax = _blocks(absmax)
        self.start = _blocks(codes.sum(1, dtype=torch.int32) * -VNNI_SHIFT)
        self._arrays = self.tiles.numpy(), self.scale.numpy(), self.start.numpy()

    def codes(self) -> Tensor:
        """The codes int8 [N, K] again, in the usual layout."""
        blocks, steps, _ = self.tiles.shape
        tiles = self.tiles.view(torch.int8).view(blocks, steps, 2, TILE_COLUMNS // 4, TILE_ROWS, 4)
        codes = tiles.permute(0, 2, 4, 1, 3, 5).reshape(blocks * BLOCK, steps * TILE_COLUMNS)
        return codes[: self.shape[0], : self.shape[1]].contiguous()

    def columns(self, columns: Tensor) -> Tensor:
        """Codes int8 [N, J] of some columns int [J]."""
        blocks, steps, _ = self.tiles.shape
        tiles = self.tiles.view(torch.int8).view(blocks, steps, 2, TILE_COLUMNS // 4, TILE_ROWS, 4)
        place = columns % TILE_COLUMNS
        found = tiles[:, columns // TILE_COLUMNS, :, place // 4, :, place % 4]  # [J, blocks, 2, rows of a tile]
        return found.reshape(len(columns), blocks * BLOCK)[:, : self.shape[0]].t().contiguous()

    def product(self, codes: Tensor, peaks: Tensor) -> Tensor:
        """Codes int8 [M, K] times the codes transposed, each sum times (peaks [M] * absmax): float32 [M, N]."""
        tokens, steps = len(codes), self.tiles.shape[1]
        y = torch.empty(tokens, self.shape[0])
        if y.numel():
            digits = _SCRATCH.digits(-(-tokens // TILE_ROWS), steps)
            padded = np.zeros(len(digits) * TILE_ROWS, np.float32)
            padded[:tokens] = peaks.numpy()
            shift = VNNI_SHIFT if self.tiles.dtype == torch.uint8 else 0
            with PARALLEL:
                parts = _parts(digits, self._arrays[0], _SCRATCH.use_threads())
                weight = (self._arrays[0], self.absmax.numpy(), self._arrays[2])
                product(codes.numpy(), padded, *weight, shift, digits, parts, y.numpy())
        return y

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float, mode: OutlierMode) -> Tensor:
        """`reference.linear`: x [M, K] -> [M, N] in x's dtype. Modes dynamic and elementwise."""
        return _linear(x, self._arrays, bias, self.shape[0], threshold, mode)


def linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    start: Tensor,
    bias: Tensor | None,
    out_features: int,
    threshold: float,
    mode: str,
) -> Tensor:
    """`PackedWeight.linear` on the tensors that one consists of.

    Raises DependencyError where they are laid out for a unit that this processor lacks: a saved graph may have moved.
    """
    unit = "vnni" if tiles.dtype == torch.uint8 else "amx"
    if unit not in units.available():
        raise DependencyError(
            f"packed_linear: the weight is laid out for {unit}, which is not here; load the model anew"
        )
    return _linear(x, (tiles.numpy(), scale.numpy(), start.numpy()), bias, out_features, threshold, mode)


def _linear(
    x: Tensor, weight: tuple[Array, Array, Array], bias: Tensor | None, out_features: int, threshold: float, mode: str
) -> Tensor:
    values = (x if x.dtype in _BITS else x.float()).contiguous()
    tokens, steps = values.shape[0], weight[0].shape[1]
    y = torch.empty(tokens, out_features, dtype=values.dtype)
    if not y.numel():
        return y.to(x.dtype)
    count = _DIGITS[x.dtype] if tokens <= DECODE_TOKENS else 1
    digits = _SCRATCH.digits(-(-count * tokens // TILE_ROWS), steps)
    shift = VNNI_SHIFT if weight[0].dtype == np.uint8 else 0
    added = _NO_BIAS if bias is None else bias.detach().float().numpy()
    given, out = (*weight, shift, added, digits), _bits_of(y)
    with PARALLEL:
        threads = _SCRATCH.use_threads()
        if count > 1:
            decode(_bits_of(values), count, *given, threads, out)
        else:
            parts = _parts(digits, weight[0], threads)
            limit = np.float32(threshold).view(np.uint32) if threshold > 0 else NOTHING
            prefill(_bits_of(values), limit, mode == "elementwise", *given, parts, out)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _parts(digits: Array, tiles: Array, threads: int) -> int:
    """How many parts the outputs of many tokens are divided into."""
    if digits.size <= _HALF_A_CACHE:
        return len(tiles)
    return min(len(tiles), max(2 * threads, tiles.size // _PART_BYTES))


class _Scratch(threading.local):
    """What a thread keeps between calls: memory, as fresh pages cost more than filling them, and Numba's threads."""

    def __init__(self) -> None:
        self._digits = np.empty(0, np.int8)
        self._threads = 0

    def use_threads(self) -> int:
        """Let Numba use as many threads as torch does, and say how many."""
        threads: int = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
        if threads != self._threads:
            set_num_threads(threads)
            self._threads = threads
        return threads

    def digits(self, tiles: int, steps: int) -> Array:
        """Room for activations, with anything in it."""
        shape = (tiles, steps, TILE_ROWS, TILE_COLUMNS)
        count = math.prod(shape)
        if self._digits.size < count:
            self._digits = np.empty(count, np.int8)
        return self._digits[:count].reshape(shape)


_SCRATCH = _Scratch()


def _blocks(values: Tensor) -> Tensor:
    """A value for each output feature as [N / 32, 32], with zeros at the end."""
    padded = torch.zeros(-(-len(values) // BLOCK), BLOCK, dtype=values.dtype)
    padded.view(-1)[: len(values)] = values
    return padded


def _bits_of(values: Tensor) -> Array:
    """The bits of float32 or bfloat16 values, sharing their memory."""
    bits: Array = values.view(torch.uint32 if values.dtype == torch.float32 else torch.uint16).numpy()
    return bits
