"""The processor's own int8 units, for compiled code to call: AMX tiles, or the VNNI instructions of AVX-512.

Both multiply 16 or 32 rows of int8 activations by 32 output features into int32 sums, which are exact. Operands lie in
the order that the units read, in tiles of 1024 bytes:

    activations  [rows / 16, K / 64][16 rows][64 input features]
    weights      [N / 32, K / 64][2][16 groups of 4 input features][16 output features][4]

VNNI multiplies unsigned by signed bytes: there activations are stored 128 higher, and sums start at -128 sum_k w. The
element type of a weight names its unit, so that code is compiled for each: int8 for AMX, uint8 for VNNI.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantize8.ops.emit import BYTE, HELD_ROWS, INT32, INT64, INTS, VECTOR_BYTES, at, call, dot, hold

Unit = Literal["amx", "vnni"]

TILE_ROWS, TILE_COLUMNS = 16, 64  # of bytes: the largest tile that AMX has
BLOCK = 32  # output features multiplied at a time: two tiles
DIGIT_BASE = 254  # of activations in several digits: twice the largest code, so that what rounding leaves is a code
VNNI_SHIFT = 128  # what makes an int8 unsigned
TILE_BYTES = TILE_ROWS * TILE_COLUMNS
_AHEAD = 2 * 2 * TILE_BYTES  # bytes: where the processor's own prefetching stops, at the end of a page
LINES = 2 * TILE_BYTES // 64  # cache lines of a weight that one step multiplies
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@cache
def available() -> tuple[Unit, ...]:
    """The units that this processor has and its system lets us use, the faster one first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    has = binding.get_host_cpu_features()
    found: list[Unit] = []
    if has.get("avx512f") and has.get("avx512vnni"):  # which processors with AMX have, too
        found += ["amx", "vnni"] if has.get("amx-int8") and _may_use_tiles() else ["vnni"]
    return tuple(found)


def _may_use_tiles() -> bool:
    """Ask Linux for the tile registers, as a process has to once."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@intrinsic
def prepare(_: Any, weight: Any) -> Any:
    """Set this thread up for `multiply` with a weight of this type."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _is_amx(signature.args[0]):
            shape = bytearray(64)  # palette 1, then eight tiles' bytes a row, then their rows
            shape[0] = 1
            shape[16:32] = TILE_COLUMNS.to_bytes(2, "little") * 8
            shape[48:56] = bytes([TILE_ROWS]) * 8
            where = cgutils.global_constant(builder, "tiles", ir.Constant(ir.ArrayType(BYTE, 64), shape))
            call(builder, "ldtilecfg", builder.bitcast(where, BYTE.as_pointer()))
        return target.get_dummy_value()

    return types.void(weight), generate


@intrinsic
def release(_: Any, weight: Any) -> Any:
    """Undo `prepare`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _is_amx(signature.args[0]):
            call(builder, "tilerelease")
        return target.get_dummy_value()

    return types.void(weight), generate


@intrinsic
def multiply(
    _: Any, weight: Any, block: Any, left: Any, rows: Any, steps: Any, start: Any, sums: Any, fetched: Any
) -> Any:
    """sums int32 [rows, 32] = start [32] + activations times one block of a weight, transposed.

    Args: weight, the array, for its type; addresses of its block, of the first of one or two tiles of activations
    (left), of start (VNNI's; AMX starts at 0) and of sums, with room for full tiles; rows, up to 32; steps, tiles along
    K; fetched, cache lines of the weight to ask memory for at each step, well ahead.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, block, left, rows, steps, start, sums, fetched = arguments
        if not _is_amx(signature.args[0]):
            _vnni(builder, block, left, rows, steps, start, sums, fetched)
            return target.get_dummy_value()
        with builder.if_else(builder.icmp_signed(">", rows, INT64(TILE_ROWS))) as (two, one):
            with two:
                _amx(builder, block, left, steps, 2, sums, fetched)
            with one:
                _amx(builder, block, left, steps, 1, sums, fetched)
        return target.get_dummy_value()

    return types.void(weight, *(types.intp,) * 7), generate


def _is_amx(weight: Any) -> bool:
    return bool(weight.dtype == types.int8)


def _amx(builder: Any, block: Any, left: Any, steps: Any, tiles: int, sums: Any, fetched: Any) -> None:
    """Registers 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights."""

    def move(name: str, register: int, address: Any, stride: int) -> None:
        call(builder, name, BYTE(register), builder.inttoptr(address, BYTE.as_pointer()), INT64(stride))

    for register in range(2 * tiles):
        call(builder, "tilezero", BYTE(register))
    to_next = builder.mul(steps, INT64(TILE_BYTES))
    with cgutils.for_range(builder, steps) as loop:
        right = builder.add(block, builder.mul(loop.index, INT64(2 * TILE_BYTES)))
        here = builder.add(left, builder.mul(loop.index, INT64(TILE_BYTES)))
        _fetch(builder, right, fetched)
        for j in range(2):
            move("tileloadd64", 6 + j, builder.add(right, INT64(j * TILE_BYTES)), TILE_COLUMNS)
        for i in range(tiles):
            move("tileloadd64", 4 + i, builder.add(here, builder.mul(to_next, INT64(i))), TILE_COLUMNS)
            for j in range(2):
                call(builder, "tdpbssd", BYTE(2 * i + j), BYTE(4 + i), BYTE(6 + j))
    for i in range(tiles):
        for j in range(2):
            place = (i * TILE_ROWS * 2 + j) * VECTOR_BYTES
            move("tilestored64", 2 * i + j, builder.add(sums, INT64(place)), 2 * VECTOR_BYTES)


def _fetch(builder: Any, place: Any, lines: Any) -> None:
    """Ask for cache lines well after a place, into the second-level cache."""
    with cgutils.for_range(builder, lines) as line:
        where = at(builder, place, builder.add(builder.mul(line.index, INT64(64)), INT64(_AHEAD)), BYTE)
        call(builder, "prefetch.p0", where, INT32(0), INT32(2), INT32(1), prefix="llvm")


def _vnni(builder: Any, block: Any, left: Any, rows: Any, steps: Any, start: Any, sums: Any, fetched: Any) -> None:
    @contextmanager
    def each_group() -> Iterator[tuple[Any, Any]]:
        with cgutils.for_range(builder, steps) as tile:
            to_tile = builder.mul(tile.index, INT64(2 * TILE_BYTES))
            _fetch(builder, builder.add(block, to_tile), fetched)
            with cgutils.for_range(builder, INT64(TILE_COLUMNS // 4)) as group:
                a = builder.add(builder.mul(tile.index, INT64(TILE_BYTES)), builder.mul(group.index, INT64(4)))
                yield a, builder.add(to_tile, builder.mul(group.index, INT64(VECTOR_BYTES)))

    to_next = builder.mul(steps, INT64(TILE_BYTES))
    chunks = TILE_ROWS // HELD_ROWS
    filled = builder.udiv(builder.add(rows, INT64(HELD_ROWS - 1)), INT64(HELD_ROWS))
    with cgutils.for_range(builder, filled) as chunk:
        tile, part = builder.udiv(chunk.index, INT64(chunks)), builder.urem(chunk.index, INT64(chunks))
        a = builder.add(left, builder.mul(tile, to_next))
        a = builder.add(a, builder.mul(part, INT64(HELD_ROWS * TILE_COLUMNS)))
        c = builder.add(sums, builder.mul(chunk.index, INT64(HELD_ROWS * 2 * VECTOR_BYTES)))

        def begin(row: int, half: int) -> Any:
            return builder.load(at(builder, start, half * VECTOR_BYTES, INTS), align=4)

        def store(row: int, half: int, total: Any, c: Any = c) -> None:
            builder.store(total, at(builder, c, (2 * row + half) * VECTOR_BYTES, INTS), align=4)

        hold(
            builder,
            INT32,
            begin,
            (a, INT64(TILE_COLUMNS)),
            (block, TILE_BYTES),
            each_group,
            partial(dot, builder),
            store,
        )
