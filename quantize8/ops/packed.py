"""The fast CPU path of a linear layer: a weight in tiles for the processor's int8 unit, and one compiled call.

At prefill a token becomes one row of int8 codes, and what outlier columns lose by that is added in float32, or in mode
static in int8 too (`ops.wide`). At decode (M <= 16) activations keep their precision: each is written in base 254, as
three or four int8 digits, and the digits are multiplied as rows of their own. Reading the weight is the cost there, so
they are nearly free.

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
from quantize8.ops.units import BLOCK, DIGIT_BASE, TILE_COLUMNS, TILE_ROWS, VNNI_SHIFT, Unit
from quantize8.ops.wide import static

_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}  # to 2^-31 and 2^-23 of a token's absmax
_BITS = (torch.float32, torch.bfloat16)  # what the loops read and write
_NO_BIAS, _NO_COLUMNS = np.empty(0, np.float32), np.empty(0, np.int64)
_HALF_A_CACHE = 2**20  # bytes of a second-level cache that activations may stay in
_PART_BYTES = 3 * 2**18  # of weight that a thread multiplies by all tokens before it goes on, where they do not
_LARGEST_K = (2**31 - 1) // (INT8_MAX * 2 * VNNI_SHIFT)  # int32 sums hold these; 65,538


def available(columns: int = 1) -> bool:
    """Whether this processor has an int8 unit for weights of so many columns, K."""
    return bool(units.available()) and columns <= _LARGEST_K


class PackedWeight:
    """An int8 weight [N, K] with its scales, in the layout of an int8 unit: the fastest there is, if none is given.

    Args: wide int [J] and exact float16 [N, E], the outlier_columns and outlier_weight of an Int8Weight; with them it
    multiplies in the modes static and hybrid, and in no other.
    """

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        unit: Unit | None = None,
        wide: Tensor | None = None,
        exact: Tensor | None = None,
    ) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._unit = unit or units.available()[0]  # which also asks for the tiles that AMX needs
        self.scale = _blocks(absmax / INT8_MAX)
        self.absmax = _blocks(absmax)
        self.static: StaticColumns | None = None
        if wide is None or exact is None:
            self.tiles, self.start = self._tiles(codes)
        else:
            wide, marks = wide.long(), torch.zeros(codes.shape[1], dtype=torch.int32)
            second = _second_digits(codes, absmax, wide[: exact.shape[1]], exact)
            self.tiles, self.start = self._tiles(codes, second)
            self.static = StaticColumns(wide, exact.shape[1], *self._tiles(codes[:, wide]), marks)
        self._arrays = self.tiles.numpy(), self.scale.numpy(), self.start.numpy()

    def _tiles(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] side by side, each in whole tiles: [N / 32, steps, 2048]; what VNNI's sums start at."""
        rows, blocks = self.shape[0], -(-self.shape[0] // BLOCK)
        steps = [-(-part.shape[1] // TILE_COLUMNS) for part in parts]
        tiles = torch.zeros(blocks, 2, TILE_ROWS, sum(steps), TILE_COLUMNS // 4, 4, dtype=torch.int8)
        matrix, column = tiles.view(blocks * BLOCK, sum(steps) * TILE_COLUMNS), 0
        for part, count in zip(parts, steps, strict=True):
            matrix[:rows, column : column + part.shape[1]] = part
            column += count * TILE_COLUMNS
        start = _blocks(matrix[:rows].sum(1, dtype=torch.int32) * -VNNI_SHIFT)
        tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(blocks, sum(steps), BLOCK * TILE_COLUMNS)
        return (tiles if self._unit == "amx" else tiles.view(torch.uint8)), start

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

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that it consists of, for an operator of torch."""
        parts = [self.tiles, self.scale, self.start]
        if self.static is not None:
            parts += [self.static.wide, self.static.wide[: self.static.exact], self.static.tiles, self.static.start]
        return parts

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float, mode: OutlierMode) -> Tensor:
        """`reference.linear`: x [M, K] -> [M, N] in x's dtype. Static and hybrid, or dynamic and elementwise."""
        return _linear(x, self._arrays, bias, self.shape[0], threshold, mode, self.static)


class StaticColumns:
    """What modes static and hybrid need beside a packed weight: its outlier columns' codes, and who joined since.

    wide: int64 [J]; exact, how many of them have a second digit; marks: int32 [K], 1 at another column that reached
    the threshold.
    """

    def __init__(self, wide: Tensor, exact: int, tiles: Tensor, start: Tensor, marks: Tensor) -> None:
        self.wide, self.exact, self.tiles, self.start, self.marks = wide, exact, tiles, start, marks
        self.arrays = wide.numpy(), exact, tiles.numpy(), start.numpy(), marks.numpy()


def linear(
    x: Tensor, parts: list[Tensor], bias: Tensor | None, out_features: int, threshold: float, mode: str
) -> Tensor:
    """`PackedWeight.linear` on its `parts`; columns that join those of mode static are not noted.

    Raises DependencyError where they are laid out for a unit that this processor lacks: a saved graph may have moved.
    """
    tiles, scale, start, *rest = parts
    unit = "vnni" if tiles.dtype == torch.uint8 else "amx"
    if unit not in units.available():
        raise DependencyError(
            f"packed_linear: the weight is laid out for {unit}, which is not here; load the model anew"
        )
    columns = None
    if rest:
        wide, exact, apart, apart_start = rest
        columns = StaticColumns(wide, len(exact), apart, apart_start, torch.zeros(x.shape[1], dtype=torch.int32))
    return _linear(x, (tiles.numpy(), scale.numpy(), start.numpy()), bias, out_features, threshold, mode, columns)


def _linear(
    x: Tensor,
    weight: tuple[Array, Array, Array],
    bias: Tensor | None,
    out_features: int,
    threshold: float,
    mode: str,
    static_columns: StaticColumns | None = None,
) -> Tensor:
    values = (x if x.dtype in _BITS else x.float()).contiguous()
    tokens, (tiles, scale, start) = values.shape[0], weight
    y = torch.empty(tokens, out_features, dtype=values.dtype)
    if not y.numel():
        return y.to(x.dtype)
    count = _DIGITS[x.dtype] if tokens <= DECODE_TOKENS else 1
    digits = _SCRATCH.digits(-(-count * tokens // TILE_ROWS), tiles.shape[1])
    shift = VNNI_SHIFT if tiles.dtype == np.uint8 else 0
    added = _NO_BIAS if bias is None else bias.detach().float().numpy()
    rest, bits, out = (shift, added, digits), _bits_of(values), _bits_of(y)
    limit = np.float32(threshold).view(np.uint32) if threshold > 0 and mode != "hybrid" else NOTHING
    with PARALLEL:
        threads = _SCRATCH.use_threads()
        parts = _parts(digits, tiles, threads)
        if count > 1:
            seconds = _NO_COLUMNS if static_columns is None else static_columns.arrays[0][: static_columns.exact]
            decode(bits, count, seconds, *weight, *rest, threads, out)
        elif static_columns is None:
            prefill(bits, limit, mode == "elementwise", *weight, *rest, parts, out)
        else:
            wide, exact, apart, apart_start, marks = static_columns.arrays
            high = np.empty((len(digits), apart.shape[1], TILE_ROWS, TILE_COLUMNS), np.int8)
            columns = (wide, exact, tiles, start, apart, apart_start, scale)
            static(bits, limit, mode == "hybrid", *columns, *rest, high, marks, parts, out)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _second_digits(codes: Tensor, absmax: Tensor, columns: Tensor, exact: Tensor) -> Tensor:
    """int8 [N, E]: what exact float16 [N, E] has beyond the codes of its columns, in 254ths of a step."""
    inverse = torch.where(absmax > 0, INT8_MAX / absmax, torch.zeros_like(absmax))[:, None]
    rest = (exact.float() * inverse - codes[:, columns]) * DIGIT_BASE
    return rest.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


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
