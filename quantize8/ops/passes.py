"""Compiled passes over activations and outputs, for the fast CPU path: from floats to int8 digits, and back.

Both read and write float32 or bfloat16 by their bits, and hold a token in the nearest cache meanwhile.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
from numba import prange

from quantize8.ops.cpu import compiled
from quantize8.ops.reference import INT8_MAX

NOTHING = np.uint32(0x80000000)  # above the bits of every magnitude: no element is an outlier
_INFINITE, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)  # bits of a float's magnitude order as it does
_BASE = np.float32(2 * INT8_MAX)
_ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, half to even, and leaves that in the lowest bits


@compiled(nogil=True, inline="always")
def _inverse(absmax: Any) -> Any:
    """By the reference's rule: 0 where there is none."""
    if absmax == 0:
        return np.float32(0)
    inverse = np.float32(1) / absmax * np.float32(INT8_MAX)
    return inverse if np.isfinite(inverse) and np.isfinite(absmax) else np.float32(0)


def _to_digits(bits: Any, limit: Any, digits: Any, scale: Any, marks: Any) -> None:
    """Digits int8 [D, M, K] of each token and its scale [M], as reference.quantize_activations where D is 1.

    Elements of magnitude `limit` and more have digits 0, and marks[k] = 1 in their columns.
    """
    count, tokens, columns = digits.shape
    shift = np.uint32(32 - 8 * bits.itemsize)
    for m in prange(tokens):
        values, rest = np.empty(columns, np.uint32), np.empty(columns, np.float32)
        floats, row = values.view(np.float32), bits[m]
        peak, found = np.uint32(0), np.uint32(0)
        for k in range(columns):
            value = np.uint32(row[k]) << shift
            magnitude = value & _MAGNITUDE
            outlier = (magnitude >= limit) & (magnitude <= _INFINITE)  # not NaN, which spoils its token
            values[k] = np.uint32(0) if outlier else value
            peak = max(peak, np.uint32(0) if outlier else magnitude)
            found += np.uint32(outlier)
        one = np.empty(1, np.uint32)
        one[0] = peak
        absmax = one.view(np.float32)[0]
        inverse = _inverse(absmax)
        scale[m] = absmax / np.float32(INT8_MAX)
        for k in range(columns):
            rest[k] = floats[k] * inverse
        if inverse == 0:
            rest[:] = 0  # infinity * 0 is no number
        for d in range(count):
            digit = digits[d, m]
            for k in range(columns):
                floats[k] = rest[k] + _ROUNDER
            for k in range(columns):
                digit[k] = np.int8(values[k])
            if d + 1 < count:
                for k in range(columns):
                    rest[k] = (rest[k] - (floats[k] - _ROUNDER)) * _BASE
        if found:
            for k in range(columns):
                magnitude = (np.uint32(row[k]) << shift) & _MAGNITUDE
                if magnitude >= limit and magnitude <= _INFINITE:
                    marks[k] = 1


def _finish(
    sums: Any,
    scale: Any,
    bits: Any,
    codes: Any,
    outliers: Any,
    weights: Any,
    places: Any,
    elements_from: Any,
    bias: Any,
    out: Any,
) -> None:
    """out [M, N] = sums [D, M, N] of the digits * scale + residual . weights[places] + bias, four tokens at a time.

    The residual is x - code * scale on the outlier columns, and 0 at magnitudes below elements_from.
    """
    count, tokens, out_features = sums.shape
    shift = np.uint32(32 - 8 * bits.itemsize)
    for block in prange((tokens + 3) // 4):
        first = block * 4
        here = min(4, tokens - first)
        rows = np.empty((4 if len(places) else here, out_features), np.float32)
        residual = np.zeros((4, len(places)), np.float32)
        one = np.empty(1, np.uint32)
        for i in range(here):
            row, last, step = rows[i], sums[count - 1, first + i], scale[first + i]
            if count == 1:
                for n in range(out_features):
                    row[n] = last[n] * step
            else:
                for n in range(out_features):
                    row[n] = last[n]
                for d in range(count - 2, -1, -1):
                    larger = sums[d, first + i]
                    for n in range(out_features):
                        row[n] = larger[n] + row[n] * (np.float32(1) / _BASE)
                for n in range(out_features):
                    row[n] *= step
            for j in range(len(outliers)):
                one[0] = np.uint32(bits[first + i, outliers[j]]) << shift
                if (one[0] & _MAGNITUDE) >= elements_from:
                    residual[i, j] = one.view(np.float32)[0] - np.float32(codes[first + i, outliers[j]]) * step
        for i in range(here, len(rows)):
            rows[i] = 0
        for j in range(0, len(places), 4):
            _add_columns(rows, residual[:, j : j + 4], weights, places[j : j + 4])
        for i in range(here):
            row = rows[i]
            for n in range(len(bias)):
                row[n] += bias[n]
            _store(row, out[first + i])


@compiled(nogil=True, inline="always", fastmath={"contract"})
def _add_columns(rows: Any, residual: Any, weights: Any, places: Any) -> None:
    """rows [4, N] += residual [4, 4] times four rows of weights, each of them read once.

    One column after the other, so that columns with residual 0 change no bit: a token's result does not depend on
    which columns its neighbours brought in.
    """
    p, q, r, s = weights[places[0]], weights[places[1]], weights[places[2]], weights[places[3]]
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    a0, b0, c0, d0 = residual[0, 0], residual[0, 1], residual[0, 2], residual[0, 3]
    a1, b1, c1, d1 = residual[1, 0], residual[1, 1], residual[1, 2], residual[1, 3]
    a2, b2, c2, d2 = residual[2, 0], residual[2, 1], residual[2, 2], residual[2, 3]
    a3, b3, c3, d3 = residual[3, 0], residual[3, 1], residual[3, 2], residual[3, 3]
    for n in range(len(row0)):
        w, x, y, z = p[n], q[n], r[n], s[n]
        row0[n] = ((row0[n] + a0 * w) + b0 * x) + c0 * y + d0 * z
        row1[n] = ((row1[n] + a1 * w) + b1 * x) + c1 * y + d1 * z
        row2[n] = ((row2[n] + a2 * w) + b2 * x) + c2 * y + d2 * z
        row3[n] = ((row3[n] + a3 * w) + b3 * x) + c3 * y + d3 * z


@compiled(nogil=True, inline="always")
def _store(row: Any, out: Any) -> None:
    """Float32 to the bits of out's kind: its own, or bfloat16's, rounded half to even."""
    bits = row.view(np.uint32)
    if out.itemsize == 4:
        for n in range(len(row)):
            out[n] = bits[n]
        return
    for n in range(len(row)):
        value = bits[n]
        rounded = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[n] = np.uint16(rounded) if (value & _MAGNITUDE) <= _INFINITE else np.uint16(0x7FC0)


def _twin(function: Any) -> Any:
    """The same function under another name, so that its serial and its parallel code are cached apart."""
    twin = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_few")
    twin.__qualname__ = f"{function.__qualname__}_few"
    return twin


# A second thread pool beside torch's costs more than it brings for a few tokens. SEVERAL wants ops.cpu.PARALLEL held.
FEW = (compiled(nogil=True)(_twin(_to_digits)), compiled(nogil=True, fastmath={"contract"})(_twin(_finish)))
SEVERAL = (
    compiled(nogil=True, parallel=True)(_to_digits),
    compiled(nogil=True, parallel=True, fastmath={"contract"})(_finish),
)
