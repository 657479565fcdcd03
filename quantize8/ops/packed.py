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
from functools import cache

import numpy as np
import torch
from torch import Tensor

from quantize8.ops.cpu import PARALLEL
from quantize8.ops.passes import FEW, NOTHING, SEVERAL
from quantize8.ops.reference import DECODE_TOKENS, INT8_MAX, Array, OutlierMode

_SUMS_BYTES = 8 * 2**20  # of float32 sums at a time: more would come from fresh memory, and be paged in, at every call;
_LEAST_ROWS = 256  # but this many rows, or the weight is read too often
_DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}  # to 2^-31 and 2^-23 of a token's absmax
_LEAST_KEPT, _KEPT_SHARE = 16, 64  # outlier columns kept as floats: at most K / 64, a sixteenth of the weight's bytes
_UNROLL = 4  # outlier columns that the last pass adds at a time


@cache
def available() -> bool:
    """Whether int8 products are faster than floats here, as on processors with VNNI, and exact, which is tried."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not (torch.backends.mkldnn.is_available() and has_vnni() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return False
    largest = np.full((1, 512), INT8_MAX, np.int8)  # a processor that saturates 16-bit sums shows it here
    weight = PackedWeight(torch.from_numpy(-largest), torch.full((1,), float(INT8_MAX)))
    return bool(weight._multiply(largest)[0, 0] == -largest.size * INT8_MAX**2)


_BITS = (torch.float32, torch.bfloat16)  # what the passes read and write
_NO_BIAS, _NO_MARKS, _NO_PLACES = np.zeros(0, np.float32), np.zeros(0, np.uint8), np.zeros(0, np.int64)


class _Scratch(threading.local):
    """Memory that a thread uses again at its next call: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._digits, self._sums = np.empty(0, np.int8), np.empty(0, np.float32)

    def digits(self, *shape: int) -> Array:
        """Room of a shape, with anything in it."""
        count = math.prod(shape)
        if self._digits.size < count:
            self._digits = np.empty(count, np.int8)
        return self._digits[:count].reshape(shape)

    def zeros(self, *shape: int) -> Tensor:
        """Float32 zeros of a shape."""
        count = math.prod(shape)
        if self._sums.size < count:
            self._sums = np.empty(count, np.float32)
        return torch.from_numpy(self._sums[:count]).view(shape).zero_()


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
        values = (x if x.dtype in _BITS else x.float()).contiguous()
        y = torch.empty(values.shape[0], self.shape[0], dtype=values.dtype)
        if y.numel():
            bits, out = _bits_of(values), _bits_of(y)
            shift = _NO_BIAS if bias is None else bias.float().numpy()
            if bits.shape[0] <= DECODE_TOKENS:
                self._decode(bits, _DIGITS[x.dtype], shift, out)
            else:
                self._prefill(bits, threshold, mode == "elementwise", shift, out)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _decode(self, bits: Array, count: int, bias: Array, out: Array) -> None:
        """Few tokens, all their elements in `count` digits."""
        tokens, columns = bits.shape
        digits, scale = np.empty((count, tokens, columns), np.int8), np.empty(tokens, np.float32)
        to_digits, finish = FEW
        to_digits(bits, NOTHING, digits, scale, _NO_MARKS)
        sums = self._multiply(digits.reshape(-1, columns)).reshape(count, tokens, -1)
        finish(sums, scale, bits, digits[0], _NO_PLACES, self._kept, _NO_PLACES, NOTHING, bias, out)

    def _prefill(self, bits: Array, threshold: float, elementwise: bool, bias: Array, out: Array) -> None:
        """Many tokens in one digit, without the elements over the threshold; what that misses is added at the end."""
        tokens, columns = bits.shape
        limit = np.float32(threshold).view(np.uint32) if threshold > 0 else NOTHING
        digits, scale, marks = (
            _SCRATCH.digits(1, tokens, columns),
            np.empty(tokens, np.float32),
            np.zeros(columns, np.uint8),
        )
        to_digits, finish = SEVERAL
        with PARALLEL:
            to_digits(bits, limit, digits, scale, marks)
        outliers = np.flatnonzero(marks)
        weights, places = self._columns(outliers)
        step = max(_LEAST_ROWS, _SUMS_BYTES // (4 * self.shape[0]))
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            codes = digits[0, part]
            sums = self._multiply(codes, _SCRATCH.zeros(len(codes), self.shape[0]))[None]
            elements_from = limit if elementwise else np.uint32(0)  # 0: all of an outlier column is corrected
            given = (sums, scale[part], bits[part], codes, outliers, weights, places, elements_from)
            with PARALLEL:
                finish(*given, bias, out[part])

    def _multiply(self, codes: Array, zeros: Tensor | None = None) -> Array:
        """Float32 [M, N]: codes int8 [M, K] times the dequantized weight transposed, each sum rounded once.

        In new memory, or in that of `zeros`: oneDNN adds to what is there when asked for a sum.
        """
        left, right = (torch.from_numpy(codes), 1.0, 0), (self._packed, self._scale, self._zeros)
        operation, onto = torch.ops.onednn.qlinear_pointwise, (1.0, 0, torch.float32)
        sums: Tensor
        if zeros is None:
            sums = operation.default(*left, *right, None, *onto, "none", [], "")
        else:
            sums = operation.binary(*left, *right, zeros, None, *onto, 1.0, 0, "sum", 1.0, "none", [], "")
        return sums.numpy()

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
        ones = np.zeros((len(columns), self.shape[1]), np.int8)
        ones[np.arange(len(columns)), columns] = 1
        return self._multiply(ones)


def _bits_of(values: Tensor) -> Array:
    """The bits of float32 or bfloat16 values, sharing their memory."""
    if values.dtype == torch.float32:
        return values.numpy().view(np.uint32)
    return values.view(torch.int16).numpy().view(np.uint16)
