"""Floating-point numbers by their bits, for compiled loops. Each is an instruction or two, and can be vectorized.

Stored elements name their kind by the type of their bits: int16 for float16, uint16 for bfloat16, uint32 for float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, half to even, and leaves that in the lowest bits
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of a float32; magnitudes are in the order of their bits
INFINITE = np.uint32(0x7F800000)

_FLOAT, _HALF, _INT32 = ir.FloatType(), ir.HalfType(), ir.IntType(32)


@intrinsic
def as_float(_: Any, bits: Any) -> Any:
    """The float32 of uint32 bits."""
    return types.float32(types.uint32), _inline(lambda builder, bits: builder.bitcast(bits, _FLOAT))


@intrinsic
def as_bits(_: Any, value: Any) -> Any:
    """The uint32 bits of a float32."""
    return types.uint32(types.float32), _inline(lambda builder, value: builder.bitcast(value, _INT32))


@intrinsic
def value_of(_: Any, stored: Any) -> Any:
    """The float32 that a stored element stands for."""
    return types.float32(stored), _inline(lambda builder, bits: _value(builder, stored, bits))


@intrinsic
def half_of(_: Any, stored: Any) -> Any:
    """A stored element, or a float32, rounded to float16, half to even, as float32; infinite beyond 65504."""

    def generate(builder: Any, bits: Any) -> Any:
        value = _value(builder, stored, bits)
        return value if stored == types.int16 else builder.fpext(builder.fptrunc(value, _HALF), _FLOAT)

    return types.float32(stored), _inline(generate)


def _value(builder: Any, stored: Any, bits: Any) -> Any:
    if stored == types.float32:
        return bits
    if stored == types.int16:
        return builder.fpext(builder.bitcast(bits, _HALF), _FLOAT)
    if stored == types.uint16:
        bits = builder.shl(builder.zext(bits, _INT32), _INT32(16))
    return builder.bitcast(bits, _FLOAT)


def _inline(generate: Callable[[Any, Any], Any]) -> Any:
    """What an intrinsic of one argument has to return beside its signature."""
    return lambda target, builder, signature, arguments: generate(builder, arguments[0])
