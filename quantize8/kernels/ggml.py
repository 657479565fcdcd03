"""Dequantization of llama.cpp's block formats. Its package `gguf` is the definition.

The common types are converted to float16 in cpu/ggml.c, which equals the definition bit for bit and is eight times as
fast.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from quantize8.kernels import cpu
from quantize8.kernels.cpu import pointer
from quantize8.kernels.reference import Array

_BLOCKS = re.compile(r"Q([45]_[01]|8_0)|Q[2-6]_K|TQ[12]_0|(MX|NV)FP4|IQ[1-4]_\w+")  # what the package dequantizes
# type -> its number in `enum type` of cpu/ggml.c, weights in a block, bytes in a block
_COMPILED = {
    "Q4_0": (0, 32, 18),
    "Q4_1": (1, 32, 20),
    "Q5_0": (2, 32, 22),
    "Q5_1": (3, 32, 24),
    "Q8_0": (4, 32, 34),
    "Q4_K": (5, 256, 144),
    "Q5_K": (6, 256, 176),
    "Q6_K": (7, 256, 210),
}


def is_read(kind: str) -> bool:
    """Whether blocks of this type, by its name in ggml, can be dequantized."""
    return _BLOCKS.fullmatch(kind) is not None


def decode(stored: Array, kind: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Convert stored rows to floating point.

    Args:
        stored: Contiguous uint8 [n, bytes of a row].
        kind: ggml's name of the type: F32, F16, BF16, or a block type that `is_read` accepts.
        shape: Shape of one row's values.
        dtype: float16 or bfloat16. Magnitudes beyond its range become infinite.

    Returns:
        Contiguous [n, *shape] in that dtype.
    """
    if not stored.size:
        return np.empty((len(stored), *shape), dtype)
    if kind in _COMPILED and dtype == np.float16:
        return _halves(stored, kind).reshape(len(stored), *shape)
    with np.errstate(all="ignore"):
        values = dequantize(stored, kind).reshape(len(stored), *shape)
        return np.ascontiguousarray(values.astype(dtype, copy=False))


def dequantize(stored: Array, kind: str) -> Array:
    """Dequantize by the definition: F16 and BF16 keep their dtype, and blocks become float32.

    Args:
        stored: uint8 [n, bytes of a row].
        kind: ggml's name of the type.
    """
    from gguf import GGMLQuantizationType, quants

    if kind in ("F16", "BF16"):
        return stored.view(np.float16 if kind == "F16" else ml_dtypes.bfloat16)
    values: Array = quants.dequantize(stored, GGMLQuantizationType[kind])
    return values


def _halves(stored: Array, kind: str) -> Array:
    """The weights of whole blocks, float16 and flat, by the compiled code."""
    number, weights, size = _COMPILED[kind]
    count = stored.size // size
    values = np.empty(count * weights, np.float16)
    stored = np.ascontiguousarray(stored)
    cpu.library().q8_ggml_halves(number, pointer(stored), count, pointer(values))
    return values
