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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Unit = Literal["amx", "vnni"]

TILE_ROWS, TILE_COLUMNS = 16, 64  # of bytes: the largest tile that AMX has
BLOCK = 32  # output features multiplied at a time: two tiles
DIGIT_BASE = 254  # of activations in several digits: twice the largest code, so that what rounding leaves is a code
VNNI_SHIFT = 128  # what makes an int8 unsigned
_TILE = TILE_ROWS * TILE_COLUMNS
_AHEAD = 2 * 2 * _TILE  # bytes: where the processor's own prefetching stops, at the end of a page
LINES = 2 * _TILE // 64  # cache lines of a weight that one step multiplies
_HELD_ROWS = 8  # of sums in VNNI's registers: 16 of the 32
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

_BYTE, _INT32, _INT64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES = 16
_VECTOR_BYTES = 4 * _LANES
_INTS, _FLOATS = ir.VectorType(_INT32, _LANES), ir.VectorType(_FLOAT, _LANES)


@cache
def available() -> tuple[Unit, ...]:
    """The units that this processor has and its system lets us use, the faster one first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    has = binding.get_host_cpu_features()
    found: list[Unit] = []
    if has.get("avx512f") and has.get("amx-int8") and _may_use_tiles():
        found.append("amx")
    if has.get("avx512f") and has.get("avx512vnni"):
        found.append("vnni")
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
            where = cgutils.global_constant(builder, "tiles", ir.Constant(ir.ArrayType(_BYTE, 64), shape))
            _call(builder, "ldtilecfg", builder.bitcast(where, _BYTE.as_pointer()))
        return target.get_dummy_value()

    return types.void(weight), generate


@intrinsic
def release(_: Any, weight: Any) -> Any:
    """Undo `prepare`."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _is_amx(signature.args[0]):
            _call(builder, "tilerelease")
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
        with builder.if_else(builder.icmp_signed(">", rows, _INT64(TILE_ROWS))) as (two, one):
            with two:
                _amx(builder, block, left, steps, 2, sums, fetched)
            with one:
                _amx(builder, block, left, steps, 1, sums, fetched)
        return target.get_dummy_value()

    return types.void(weight, *(types.intp,) * 7), generate


@intrinsic
def finish(
    _: Any,
    sums: Any,
    digits: Any,
    steps: Any,
    scale: Any,
    left: Any,
    columns: Any,
    right: Any,
    bias: Any,
    out: Any,
    place: Any,
    rows: Any,
    width: Any,
) -> Any:
    """out = sums of the digits * steps * scale + left times right + bias, for a block of 32 outputs up to `width`.

    Columns are added one after the other, so that one whose left is 0 changes no bit. Rows up to a multiple of 8 are
    read. Args: addresses of sums int32 [digits rows, 32], the highest digit first, each worth 254 of the next; of steps
    float32 [rows], scale [32], left [rows, columns], right [columns, 32] and bias [32]; out [any, N], bits of float32
    or of bfloat16, rounded half to even; the address in it of the first result.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, digits, steps, scale, left, columns, right, bias, out, place, rows, width = arguments
        array = target.make_array(signature.args[8])(target, builder, out)
        next_row = cgutils.unpack_tuple(builder, array.strides)[0]
        stride = builder.mul(columns, _INT64(4))
        halves = [half * _VECTOR_BYTES for half in range(2)]
        added = [builder.load(_at(builder, bias, half, _FLOATS), align=4) for half in halves]
        scales = [builder.load(_at(builder, scale, half, _FLOATS), align=4) for half in halves]
        masks = [_mask(builder, width, half * _LANES) for half in range(2)]

        def fused(total: Any, a: Any, b: Any) -> Any:
            return _call(builder, f"fma.v{_LANES}f32", a, b, total, prefix="llvm", result=_FLOATS)

        def digit(number: Any, row: Any, half: int) -> Any:
            here = builder.add(builder.mul(number, rows), row)
            address = builder.add(sums, builder.mul(here, _INT64(2 * _VECTOR_BYTES)))
            return builder.sitofp(builder.load(_at(builder, address, halves[half], _INTS), align=4), _FLOATS)

        @contextmanager
        def each_column() -> Iterator[tuple[Any, Any]]:
            with cgutils.for_range(builder, columns) as loop:
                yield builder.mul(loop.index, _INT64(4)), builder.mul(loop.index, _INT64(2 * _VECTOR_BYTES))

        with cgutils.for_range_slice(builder, _INT64(0), rows, _INT64(_HELD_ROWS)) as (first, _):

            def begin(row: int, half: int) -> Any:
                number = builder.add(first, _INT64(row))
                lowest = builder.sub(digits, _INT64(1))
                value = cgutils.alloca_once_value(builder, digit(lowest, number, half))
                with cgutils.for_range(builder, lowest) as loop:
                    higher = builder.sub(builder.sub(lowest, loop.index), _INT64(1))
                    share = _repeat(builder, _FLOAT(1 / DIGIT_BASE))
                    builder.store(fused(digit(higher, number, half), builder.load(value), share), value)
                step = builder.load(_at(builder, steps, builder.mul(number, _INT64(4)), _FLOAT), align=4)
                return builder.fmul(builder.load(value), builder.fmul(_repeat(builder, step), scales[half]))

            def store(row: int, half: int, total: Any) -> None:
                number = builder.add(first, _INT64(row))
                where = builder.add(place, builder.mul(number, next_row))
                with builder.if_then(builder.icmp_signed("<", number, rows)):
                    _store(builder, builder.fadd(total, added[half]), where, half, masks[half], array.itemsize)

            a = builder.add(left, builder.mul(first, stride))
            _held(builder, _FLOAT, begin, (a, stride), (right, _VECTOR_BYTES), each_column, fused, store)
        return target.get_dummy_value()

    intp = types.intp
    return types.void(*(intp,) * 8, out, *(intp,) * 3), generate


@intrinsic
def read_column(_: Any, block: Any, column: Any, scale: Any, values: Any) -> Any:
    """Values float32 [32] = a column of one block of a weight * scale [32]. All are addresses but the column."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block, column, scale, values = arguments
        step, place = builder.udiv(column, _INT64(TILE_COLUMNS)), builder.urem(column, _INT64(TILE_COLUMNS))
        group, item = builder.udiv(place, _INT64(4)), builder.urem(place, _INT64(4))
        words = builder.add(builder.mul(step, _INT64(2 * _TILE)), builder.mul(group, _INT64(_VECTOR_BYTES)))
        to_top = builder.trunc(builder.mul(builder.sub(_INT64(3), item), _INT64(8)), _INT32)
        for half in range(2):
            address = _at(builder, builder.add(block, words), half * _TILE, _INTS)
            top = builder.shl(builder.load(address, align=4), _repeat(builder, to_top))
            codes = builder.sitofp(builder.ashr(top, _repeat(builder, _INT32(24))), _FLOATS)
            steps = builder.load(_at(builder, scale, half * _VECTOR_BYTES, _FLOATS), align=4)
            builder.store(builder.fmul(codes, steps), _at(builder, values, half * _VECTOR_BYTES, _FLOATS), align=4)
        return target.get_dummy_value()

    return types.void(*(types.intp,) * 4), generate


def _is_amx(weight: Any) -> bool:
    return bool(weight.dtype == types.int8)


def _call(builder: Any, name: str, *arguments: Any, result: Any = None, prefix: str = "llvm.x86") -> Any:
    """Call an instruction by LLVM's name for it."""
    kind = ir.FunctionType(ir.VoidType() if result is None else result, [each.type for each in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{prefix}.{name}"), arguments)


def _amx(builder: Any, block: Any, left: Any, steps: Any, tiles: int, sums: Any, fetched: Any) -> None:
    """Registers 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights."""

    def move(name: str, register: int, address: Any, stride: int) -> None:
        _call(builder, name, _BYTE(register), builder.inttoptr(address, _BYTE.as_pointer()), _INT64(stride))

    for register in range(2 * tiles):
        _call(builder, "tilezero", _BYTE(register))
    to_next = builder.mul(steps, _INT64(_TILE))
    with cgutils.for_range(builder, steps) as loop:
        right = builder.add(block, builder.mul(loop.index, _INT64(2 * _TILE)))
        here = builder.add(left, builder.mul(loop.index, _INT64(_TILE)))
        _fetch(builder, right, fetched)
        for j in range(2):
            move("tileloadd64", 6 + j, builder.add(right, _INT64(j * _TILE)), TILE_COLUMNS)
        for i in range(tiles):
            move("tileloadd64", 4 + i, builder.add(here, builder.mul(to_next, _INT64(i))), TILE_COLUMNS)
            for j in range(2):
                _call(builder, "tdpbssd", _BYTE(2 * i + j), _BYTE(4 + i), _BYTE(6 + j))
    for i in range(tiles):
        for j in range(2):
            place = (i * TILE_ROWS * 2 + j) * _VECTOR_BYTES
            move("tilestored64", 2 * i + j, builder.add(sums, _INT64(place)), 2 * _VECTOR_BYTES)


def _fetch(builder: Any, place: Any, lines: Any) -> None:
    """Ask for cache lines well after a place, into the second-level cache."""
    with cgutils.for_range(builder, lines) as line:
        where = _at(builder, place, builder.add(builder.mul(line.index, _INT64(64)), _INT64(_AHEAD)), _BYTE)
        _call(builder, "prefetch.p0", where, _INT32(0), _INT32(2), _INT32(1), prefix="llvm")


def _vnni(builder: Any, block: Any, left: Any, rows: Any, steps: Any, start: Any, sums: Any, fetched: Any) -> None:
    @contextmanager
    def each_group() -> Iterator[tuple[Any, Any]]:
        with cgutils.for_range(builder, steps) as tile:
            to_tile = builder.mul(tile.index, _INT64(2 * _TILE))
            _fetch(builder, builder.add(block, to_tile), fetched)
            with cgutils.for_range(builder, _INT64(TILE_COLUMNS // 4)) as group:
                a = builder.add(builder.mul(tile.index, _INT64(_TILE)), builder.mul(group.index, _INT64(4)))
                yield a, builder.add(to_tile, builder.mul(group.index, _INT64(_VECTOR_BYTES)))

    def dot(total: Any, a: Any, b: Any) -> Any:
        return _call(builder, "avx512.vpdpbusd.512", total, a, b, result=_INTS)

    to_next = builder.mul(steps, _INT64(_TILE))
    chunks = TILE_ROWS // _HELD_ROWS
    filled = builder.udiv(builder.add(rows, _INT64(_HELD_ROWS - 1)), _INT64(_HELD_ROWS))
    with cgutils.for_range(builder, filled) as chunk:
        tile, part = builder.udiv(chunk.index, _INT64(chunks)), builder.urem(chunk.index, _INT64(chunks))
        a = builder.add(left, builder.mul(tile, to_next))
        a = builder.add(a, builder.mul(part, _INT64(_HELD_ROWS * TILE_COLUMNS)))
        c = builder.add(sums, builder.mul(chunk.index, _INT64(_HELD_ROWS * 2 * _VECTOR_BYTES)))

        def begin(row: int, half: int) -> Any:
            return builder.load(_at(builder, start, half * _VECTOR_BYTES, _INTS), align=4)

        def store(row: int, half: int, total: Any, c: Any = c) -> None:
            builder.store(total, _at(builder, c, (2 * row + half) * _VECTOR_BYTES, _INTS), align=4)

        _held(builder, _INT32, begin, (a, _INT64(TILE_COLUMNS)), (block, _TILE), each_group, dot, store)


def _held(
    builder: Any,
    element: Any,
    begin: Callable[[int, int], Any],
    left: tuple[Any, Any],
    right: tuple[Any, int],
    each_step: Callable[[], Any],
    operation: Callable[[Any, Any, Any], Any],
    store: Callable[[int, int, Any], None],
) -> None:
    """Sums of 8 rows by 32 outputs, held in registers: from `begin`, one `operation` after the other, to `store`.

    left, right: an address, and the bytes to the next row, or to the second half of the outputs.
    """
    vector = ir.VectorType(element, _LANES)
    places = [(row, half) for row in range(_HELD_ROWS) for half in range(2)]
    held = {place: cgutils.alloca_once(builder, vector) for place in places}
    for row, half in places:
        builder.store(begin(row, half), held[row, half])
    with each_step() as (a, b):
        halves = [_at(builder, builder.add(right[0], b), half * right[1], vector) for half in range(2)]
        halves = [builder.load(address, align=4) for address in halves]
        for row in range(_HELD_ROWS):
            address = _at(builder, builder.add(left[0], a), builder.mul(left[1], _INT64(row)), element)
            repeated = _repeat(builder, builder.load(address, align=4))
            for half in range(2):
                total = builder.load(held[row, half])
                builder.store(operation(total, repeated, halves[half]), held[row, half])
    for row, half in places:
        store(row, half, builder.load(held[row, half]))


def _store(builder: Any, values: Any, address: Any, half: int, mask: Any, item_bytes: Any) -> None:
    """Store the half of a row where mask says, as the bits of float32, or of bfloat16 where items have two bytes."""

    def masked(bits: Any, name: str, bytes_: int) -> None:
        where = _at(builder, address, half * _LANES * bytes_, bits.type)
        _call(builder, f"masked.store.{name}.p0", bits, where, _INT32(bytes_), mask, prefix="llvm")

    with builder.if_else(builder.icmp_signed("==", item_bytes, _INT64(4))) as (four, two):
        with four:
            masked(values, f"v{_LANES}f32", 4)
        with two:
            bits = builder.bitcast(values, _INTS)
            high = builder.lshr(bits, _repeat(builder, _INT32(16)))
            odd = builder.and_(high, _repeat(builder, _INT32(1)))
            up = builder.add(builder.add(bits, _repeat(builder, _INT32(0x7FFF))), odd)
            rounded = builder.lshr(up, _repeat(builder, _INT32(16)))
            is_number = builder.fcmp_ordered("ord", values, values)
            kept = builder.select(is_number, rounded, _repeat(builder, _INT32(0x7FC0)))
            masked(builder.trunc(kept, ir.VectorType(ir.IntType(16), _LANES)), f"v{_LANES}i16", 2)


def _mask(builder: Any, width: Any, first: int) -> Any:
    """Which of the lanes first, first + 1 ... are below width."""
    lanes = ir.Constant(_INTS, list(range(first, first + _LANES)))
    return builder.icmp_signed("<", lanes, _repeat(builder, builder.trunc(width, _INT32)))


def _repeat(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    vector = ir.VectorType(value.type, _LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * _LANES))


def _at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """The pointer to something of a kind."""
    offset = _INT64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())
