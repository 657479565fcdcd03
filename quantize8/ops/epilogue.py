"""The end of a product: from int32 sums of digits to outputs, a block of 32 output features at a time, in registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantize8.ops.emit import (
    FLOAT,
    FLOATS,
    HELD_ROWS,
    INT32,
    INT64,
    INTS,
    LANES,
    VECTOR_BYTES,
    at,
    call,
    dot,
    hold,
    mask_below,
    repeat,
)
from quantize8.ops.jit import compiled
from quantize8.ops.units import DIGIT_BASE, TILE_BYTES, TILE_COLUMNS


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
        stride = builder.mul(columns, INT64(4))
        halves = [half * VECTOR_BYTES for half in range(2)]
        added = [builder.load(at(builder, bias, half, FLOATS), align=4) for half in halves]
        scales = [builder.load(at(builder, scale, half, FLOATS), align=4) for half in halves]
        masks = [mask_below(builder, width, half * LANES) for half in range(2)]

        def fused(total: Any, a: Any, b: Any) -> Any:
            return call(builder, f"fma.v{LANES}f32", a, b, total, prefix="llvm", result=FLOATS)

        def digit(number: Any, row: Any, half: int) -> Any:
            here = builder.add(builder.mul(number, rows), row)
            address = builder.add(sums, builder.mul(here, INT64(2 * VECTOR_BYTES)))
            return builder.sitofp(builder.load(at(builder, address, halves[half], INTS), align=4), FLOATS)

        @contextmanager
        def each_column() -> Iterator[tuple[Any, Any]]:
            with cgutils.for_range(builder, columns) as loop:
                yield builder.mul(loop.index, INT64(4)), builder.mul(loop.index, INT64(2 * VECTOR_BYTES))

        with cgutils.for_range_slice(builder, INT64(0), rows, INT64(HELD_ROWS)) as (first, _):

            def begin(row: int, half: int) -> Any:
                number = builder.add(first, INT64(row))
                lowest = builder.sub(digits, INT64(1))
                value = cgutils.alloca_once_value(builder, digit(lowest, number, half))
                with cgutils.for_range(builder, lowest) as loop:
                    higher = builder.sub(builder.sub(lowest, loop.index), INT64(1))
                    share = repeat(builder, FLOAT(1 / DIGIT_BASE))
                    builder.store(fused(digit(higher, number, half), builder.load(value), share), value)
                step = builder.load(at(builder, steps, builder.mul(number, INT64(4)), FLOAT), align=4)
                return builder.fmul(builder.load(value), builder.fmul(repeat(builder, step), scales[half]))

            def store(row: int, half: int, total: Any) -> None:
                number = builder.add(first, INT64(row))
                where = builder.add(place, builder.mul(number, next_row))
                with builder.if_then(builder.icmp_signed("<", number, rows)):
                    _store(builder, builder.fadd(total, added[half]), where, half, masks[half], array.itemsize)

            a = builder.add(left, builder.mul(first, stride))
            hold(builder, FLOAT, begin, (a, stride), (right, VECTOR_BYTES), each_column, fused, store)
        return target.get_dummy_value()

    intp = types.intp
    return types.void(*(intp,) * 8, out, *(intp,) * 3), generate


@intrinsic
def read_column(_: Any, block: Any, column: Any, scale: Any, values: Any) -> Any:
    """Values float32 [32] = a column of one block of a weight * scale [32]. All are addresses but the column."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block, column, scale, values = arguments
        step, place = builder.udiv(column, INT64(TILE_COLUMNS)), builder.urem(column, INT64(TILE_COLUMNS))
        group, item = builder.udiv(place, INT64(4)), builder.urem(place, INT64(4))
        words = builder.add(builder.mul(step, INT64(2 * TILE_BYTES)), builder.mul(group, INT64(VECTOR_BYTES)))
        to_top = builder.trunc(builder.mul(builder.sub(INT64(3), item), INT64(8)), INT32)
        for half in range(2):
            address = at(builder, builder.add(block, words), half * TILE_BYTES, INTS)
            top = builder.shl(builder.load(address, align=4), repeat(builder, to_top))
            codes = builder.sitofp(builder.ashr(top, repeat(builder, INT32(24))), FLOATS)
            steps = builder.load(at(builder, scale, half * VECTOR_BYTES, FLOATS), align=4)
            builder.store(builder.fmul(codes, steps), at(builder, values, half * VECTOR_BYTES, FLOATS), align=4)
        return target.get_dummy_value()

    return types.void(*(types.intp,) * 4), generate


@compiled(nogil=True)
def word_of(column: int) -> Any:
    """Where in a block of a weight, in bytes, the codes of a column and of three others lie, one word an output."""
    step, place = column // TILE_COLUMNS, column % TILE_COLUMNS
    return step * 2 * TILE_BYTES + place // 4 * VECTOR_BYTES


@intrinsic
def add_columns(
    _: Any, block: Any, words: Any, factors: Any, most: Any, negatives: Any, positives: Any, sums: Any
) -> Any:
    """sums int32 [32] += some columns of one block of a weight, each times an integer of up to 127.

    Args: addresses of block, words and factors int32 [most], and sums; how many factors are negative, which come first,
    and how many positive, which come last. A word is `word_of` its column; a factor, without its sign, stands in the
    byte of its word that is the column's.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block, words, factors, most, negatives, positives, sums = arguments
        totals = [cgutils.alloca_once_value(builder, ir.Constant(INTS, [0] * LANES)) for _ in range(2)]

        def add(first: Any, last: Any) -> None:
            with cgutils.for_range_slice(builder, first, last, INT64(1)) as (number, _):
                offset = builder.mul(number, INT64(4))
                word = builder.sext(builder.load(at(builder, words, offset, INT32), align=4), INT64)
                factor = repeat(builder, builder.load(at(builder, factors, offset, INT32), align=4))
                for half, total in enumerate(totals):
                    codes = builder.load(at(builder, builder.add(block, word), half * TILE_BYTES, INTS), align=4)
                    builder.store(dot(builder, builder.load(total), factor, codes), total)

        add(INT64(0), negatives)
        for total in totals:
            builder.store(builder.neg(builder.load(total)), total)
        add(builder.sub(most, positives), most)
        for half, total in enumerate(totals):
            place = at(builder, sums, half * VECTOR_BYTES, INTS)
            builder.store(builder.add(builder.load(place, align=4), builder.load(total)), place, align=4)
        return target.get_dummy_value()

    return types.void(*(types.intp,) * 7), generate


def _store(builder: Any, values: Any, address: Any, half: int, mask: Any, item_bytes: Any) -> None:
    """Store the half of a row where mask says, as the bits of float32, or of bfloat16 where items have two bytes."""

    def masked(bits: Any, name: str, bytes_: int) -> None:
        where = at(builder, address, half * LANES * bytes_, bits.type)
        call(builder, f"masked.store.{name}.p0", bits, where, INT32(bytes_), mask, prefix="llvm")

    with builder.if_else(builder.icmp_signed("==", item_bytes, INT64(4))) as (four, two):
        with four:
            masked(values, f"v{LANES}f32", 4)
        with two:
            bits = builder.bitcast(values, INTS)
            high = builder.lshr(bits, repeat(builder, INT32(16)))
            odd = builder.and_(high, repeat(builder, INT32(1)))
            up = builder.add(builder.add(bits, repeat(builder, INT32(0x7FFF))), odd)
            rounded = builder.lshr(up, repeat(builder, INT32(16)))
            is_number = builder.fcmp_ordered("ord", values, values)
            kept = builder.select(is_number, rounded, repeat(builder, INT32(0x7FC0)))
            masked(builder.trunc(kept, ir.VectorType(ir.IntType(16), LANES)), f"v{LANES}i16", 2)
