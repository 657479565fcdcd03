"""The fast CPU path of a linear layer: oneDNN's int8 GEMM on a weight in its own layout, between two compiled passes.

The weight is kept once, in the layout that the processor's int8 units read fastest (AMX, VNNI). One pass turns
activations into codes; the GEMM makes float32 sums times the weight's scale; one pass multiplies by the token's scale
and adds the outlier columns and the bias.

At decode (M <= 16) activations keep their precision: each is written in base 254, as three or four int8 digits, and the
digits go through the GEMM as extra rows. Reading the weight is the cost there, so they are nearly free.

    x = s (d1 + d2 / 254 + d3 / 254^2 + ...),    s = absmax / 127
"""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from quantize8.ops.cpu import PARALLEL, compiled
from quantize8.ops.reference import DECODE_TOKENS, INT8_MAX, Array, OutlierMode

_SUMS_BYTES = 8 * 2**20  # of float32 sums at a time: more would come from fresh memory, and be paged in, at every call
_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}  # to 2^-31 and 2^-23 of a token's absmax
_LEAST_KEPT, _KEPT_SHARE = 16, 64  # outlier columns kept as floats: at most K / 64, a sixteenth of the weight's bytes
_UNROLL = 4  # outlier columns that the last pass adds at a time
_BASE = np.float32(2 * INT8_MAX)
_ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, half to even, and leaves that in the lowest bits
_INFINITE, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)  # bits of a float's magnitude order as it does
_NOTHING = np.uint32(0x80000000)  # above every magnitude's bits: no element is an outlier


@cache
def available() -> bool:
    """Whether this processor's int8 products are exact and faster than floats: those with VNNI."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return False
    return hasattr(torch.ops.onednn, "qlinear_prepack")


class _Scratch(threading.local):
    """Memory for digits that a thread uses again at its next call: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.int8)

    def digits(self, *shape: int) -> Array:
        """Room of a shape, with anything in it."""
        count = math.prod(shape)
        if self._kept.size < count:
            self._kept = np.empty(count, np.int8)
        return self._kept[:count].reshape(shape)


_SCRATCH = _Scratch()


class PackedWeight:
    """An int8 weight [N, K] with its scales, in oneDNN's layout."""

    def __init__(self, codes: Tensor, absmax: Tensor) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scale = absmax / INT8_MAX
        self._zeros = torch.zeros(self.shape[0], dtype=torch.int32)
        room = max(_LEAST_KEPT, self.shape[1] // _KEPT_SHARE)
        self._kept = np.empty((room, 0), np.float32)  # grown to [room, N] when there is an outlier
        self._places: dict[int, int] = {}  # of columns, in it
        self._lock = threading.Lock()

    def codes(self) -> Tensor:
        """The codes int8 [N, K] again, in the usual layout."""
        codes: Tensor = self._packed.to_dense().t().contiguous()
        return codes

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float, mode: OutlierMode) -> Tensor:
        """`reference.linear`: x [M, K] -> [M, N] in x's dtype. Modes dynamic and elementwise."""
        values = x.contiguous() if x.dtype == torch.bfloat16 else x.float().contiguous()
        y = torch.empty(len(x), self.shape[0], dtype=values.dtype)
        if not y.numel():
            return y.to(x.dtype)
        signed, unsigned = (torch.int16, np.uint16) if values.dtype == torch.bfloat16 else (torch.int32, np.uint32)
        bits, out = (each.view(signed).numpy().view(unsigned) for each in (values, y))
        shift = np.zeros(0, np.float32) if bias is None else bias.float().numpy()
        limit = np.float32(threshold).view(np.uint32) if threshold > 0 else _NOTHING
        if len(x) > DECODE_TOKENS:
            self._compute(bits, 1, limit, limit if mode == "elementwise" else np.uint32(0), shift, out)
        else:
            self._compute(bits, _DIGITS[x.dtype], _NOTHING, _NOTHING, shift, out)
        return y.to(x.dtype)

    def _compute(self, bits: Array, count: int, limit: Any, elements_from: Any, bias: Array, out: Array) -> None:
        """The product of tokens in `count` digits, without the elements from `limit` on, which are added at the end.

        elements_from: 0 to correct all of a column that has such an element.
        """
        (tokens, columns), out_features = bits.shape, self.shape[0]
        digits, scale = _SCRATCH.digits(count, tokens, columns), np.empty(tokens, np.float32)
        marks = np.zeros(columns, np.uint8)
        to_digits, finish, turn = _FEW if tokens <= DECODE_TOKENS else _SEVERAL
        with turn:
            to_digits(bits, limit, digits, scale, marks)
        outliers = np.flatnonzero(marks)
        weights, places = self._columns(outliers)
        step = tokens if count > 1 else max(1, _SUMS_BYTES // (4 * out_features))
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            sums = self._multiply(torch.from_numpy(digits[:, part].reshape(-1, columns)))
            given = (sums.reshape(count, -1, out_features), scale[part], bits[part], digits[0, part])
            with turn:
                finish(*given, outliers, weights, places, elements_from, bias, out[part])

    def _multiply(self, codes: Tensor) -> Array:
        """Float32 [M, N]: codes int8 [M, K] times the dequantized weight transposed, each sum rounded once."""
        operands = (codes, 1.0, 0, self._packed, self._scale, self._zeros, None, 1.0, 0, torch.float32)
        sums: Array = torch.ops.onednn.qlinear_pointwise(*operands, "none", [], "").numpy()
        return sums

    def _columns(self, columns: Array) -> tuple[Array, Array]:
        """Rows of floats [any, N] among which are these columns of the dequantized weight, and where each is.

        A column that is not kept yet is read through the GEMM, by a one among zeros. The list is filled up to a
        multiple of _UNROLL with the first one's place; its residual there is 0.
        """
        padding = -len(columns) % _UNROLL
        if len(columns) > len(self._kept):
            weights, places = self._read(columns), np.arange(len(columns))
            return weights, np.append(places, np.zeros(padding, places.dtype))
        with self._lock:
            missing = [int(column) for column in columns if int(column) not in self._places]
            if missing:
                if not self._kept.shape[1]:
                    self._kept = np.empty((len(self._kept), self.shape[0]), np.float32)
                if len(self._places) + len(missing) > len(self._kept):
                    self._kept, self._places, missing = np.empty_like(self._kept), {}, [int(each) for each in columns]
                first = len(self._places)
                self._kept[first : first + len(missing)] = self._read(np.array(missing))
                self._places |= {column: first + i for i, column in enumerate(missing)}
            places = np.array([self._places[int(column)] for column in columns], np.int64)
            return self._kept, np.append(places, np.zeros(padding, np.int64))

    def _read(self, columns: Array) -> Array:
        """These columns of the dequantized weight, float32 [J, N]."""
        ones = torch.zeros(len(columns), self.shape[1], dtype=torch.int8)
        ones[torch.arange(len(columns)), torch.from_numpy(columns)] = 1
        return self._multiply(ones)


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


# A second thread pool beside torch's costs more than it brings for a few tokens.
_FEW = (
    compiled(nogil=True)(_twin(_to_digits)),
    compiled(nogil=True, fastmath={"contract"})(_twin(_finish)),
    nullcontext(),
)
_SEVERAL = (
    compiled(nogil=True, parallel=True)(_to_digits),
    compiled(nogil=True, parallel=True, fastmath={"contract"})(_finish),
    PARALLEL,
)
