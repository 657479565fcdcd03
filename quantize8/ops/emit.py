"""Emitting LLVM instructions on vectors of 16 numbers, of which intrinsics for Numba are made.

Addresses are 64-bit integers. A processor with shorter vectors takes several for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
VECTOR_BYTES = 4 * LANES
HELD_ROWS = 8  # of sums, 2 vectors each, in registers: 16 of the 32 that AVX-512 has
BYTE, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)


def call(builder: Any, name: str, *arguments: Any, result: Any = None, prefix: str = "llvm.x86") -> Any:
    """Call an instruction by LLVM's name for it."""
    kind = ir.FunctionType(ir.VoidType() if result is None else result, [each.type for each in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{prefix}.{name}"), arguments)


def hold(
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
    vector = ir.VectorType(element, LANES)
    places = [(row, half) for row in range(HELD_ROWS) for half in range(2)]
    held = {place: cgutils.alloca_once(builder, vector) for place in places}
    for row, half in places:
        builder.store(begin(row, half), held[row, half])
    with each_step() as (a, b):
        halves = [at(builder, builder.add(right[0], b), half * right[1], vector) for half in range(2)]
        halves = [builder.load(address, align=4) for address in halves]
        for row in range(HELD_ROWS):
            address = at(builder, builder.add(left[0], a), builder.mul(left[1], INT64(row)), element)
            repeated = repeat(builder, builder.load(address, align=4))
            for half in range(2):
                total = builder.load(held[row, half])
                builder.store(operation(total, repeated, halves[half]), held[row, half])
    for row, half in places:
        store(row, half, builder.load(held[row, half]))


def dot(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total int32 [16] += products of four unsigned bytes of a with four signed ones of b, word by word (VNNI)."""
    return call(builder, "avx512.vpdpbusd.512", total, a, b, result=INTS)


def mask_below(builder: Any, width: Any, first: int) -> Any:
    """Which of the lanes first, first + 1 ... are below width."""
    lanes = ir.Constant(INTS, list(range(first, first + LANES)))
    return builder.icmp_signed("<", lanes, repeat(builder, builder.trunc(width, INT32)))


def repeat(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))


def at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """The pointer to something of a kind."""
    offset = INT64(offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())
