"""What stands out of a token: two passes over its elements, in vectors, 64 at a time.

Values are float32, K and zeros up to whole tiles of 64. Magnitudes are compared by their bits, where NaN is above all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantize8.ops.bits import MAGNITUDE
from quantize8.ops.emit import FLOATS, INT32, INT64, INTS, LANES, VECTOR_BYTES, at, call, repeat
from quantize8.ops.units import TILE_COLUMNS

_VECTORS = TILE_COLUMNS // LANES
_MASK = ir.IntType(TILE_COLUMNS)


@intrinsic
def peak_and_squares(_: Any, values: Any, tiles: Any, result: Any) -> Any:
    """result uint32 [2] = bits of the largest magnitude, and of the sum of squares by `reference.token_outliers`.

    Args: addresses of values and of result, and how many tiles there are.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, tiles, result = arguments
        tops, sums = _held(builder, INTS, 0), _held(builder, FLOATS, 0.0)
        with cgutils.for_range(builder, tiles) as loop:
            for i, value in enumerate(_tile(builder, values, loop.index)):
                builder.store(_larger(builder, builder.load(tops[i]), _magnitude(builder, value)), tops[i])
                builder.store(builder.fadd(builder.load(sums[i]), builder.fmul(value, value)), sums[i])
        top = _folded(builder, tops, lambda a, b: _larger(builder, a, b))
        total = builder.bitcast(_folded(builder, sums, builder.fadd), INT32)
        builder.store(top, at(builder, result, 0, INT32))
        builder.store(total, at(builder, result, 4, INT32))
        return target.get_dummy_value()

    return types.void(*(types.intp,) * 3), generate


@intrinsic
def beyond(_: Any, values: Any, tiles: Any, bound: Any, masks: Any, result: Any) -> Any:
    """masks uint64 [tiles]: bit k of a tile's is set where the magnitude of element k is above bound.

    result uint32 [1] = bits of the largest magnitude that is not. Addresses, but for tiles and bound, uint32.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, tiles, bound, masks, result = arguments
        limit, none = repeat(builder, bound), ir.Constant(INTS, [0] * LANES)
        tops = _held(builder, INTS, 0)
        with cgutils.for_range(builder, tiles) as loop:
            mask: Any = ir.Constant(_MASK, 0)
            for i, value in enumerate(_tile(builder, values, loop.index)):
                magnitude = _magnitude(builder, value)
                above = builder.icmp_unsigned(">", magnitude, limit)
                left = builder.select(above, none, magnitude)
                builder.store(_larger(builder, builder.load(tops[i]), left), tops[i])
                bits = builder.zext(builder.bitcast(above, ir.IntType(LANES)), _MASK)
                mask = builder.or_(mask, builder.shl(bits, _MASK(i * LANES)))
            builder.store(mask, at(builder, masks, builder.mul(loop.index, INT64(8)), _MASK))
        top = _folded(builder, tops, lambda a, b: _larger(builder, a, b))
        builder.store(top, at(builder, result, 0, INT32))
        return target.get_dummy_value()

    return types.void(types.intp, types.intp, types.uint32, types.intp, types.intp), generate


@intrinsic
def lowest(_: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set in a uint64."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "cttz.i64", arguments[0], ir.IntType(1)(0), prefix="llvm", result=_MASK)

    return types.int64(types.uint64), generate


def _held(builder: Any, vector: Any, value: Any) -> list[Any]:
    """Registers for the lanes of a tile."""
    return [cgutils.alloca_once_value(builder, ir.Constant(vector, [value] * LANES)) for _ in range(_VECTORS)]


def _tile(builder: Any, values: Any, number: Any) -> list[Any]:
    offset = builder.mul(number, INT64(4 * TILE_COLUMNS))
    places = [builder.add(offset, INT64(i * VECTOR_BYTES)) for i in range(_VECTORS)]
    return [builder.load(at(builder, values, place, FLOATS), align=4) for place in places]


def _magnitude(builder: Any, value: Any) -> Any:
    return builder.and_(builder.bitcast(value, INTS), ir.Constant(INTS, [int(MAGNITUDE)] * LANES))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _folded(builder: Any, held: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """One number of the 64: halves are combined until one is left."""
    vectors = [builder.load(place) for place in held]
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [combine(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True)]
    (vector,) = vectors
    width = LANES // 2
    while width:
        order = ir.Constant(ir.VectorType(INT32, LANES), [(i + width) % LANES for i in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, order))
        width //= 2
    return builder.extract_element(vector, INT32(0))
