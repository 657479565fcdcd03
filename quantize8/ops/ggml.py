"""llama.cpp's blocks of weights to floating point, as its package `gguf` defines them."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from quantize8.ops.reference import Array

_BLOCKS = re.compile(r"Q([45]_[01]|8_0)|Q[2-6]_K|TQ[12]_0|(MX|NV)FP4|IQ[1-4]_\w+")  # what the package dequantizes


def is_read(kind: str) -> bool:
    """Whether blocks of this type can be dequantized; kind by ggml's name."""
    return _BLOCKS.fullmatch(kind) is not None


def decode(stored: Array, kind: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Stored rows as floating point.

    Args: stored, contiguous uint8 [n, bytes of a row]; kind, F32, F16, BF16 or one that `is_read`; shape of a row;
    dtype, float16 or bfloat16. A magnitude beyond the dtype becomes infinite.
    Returns: contiguous, [n, *shape] in that dtype.
    """
    from gguf import GGMLQuantizationType, dequantize

    if not stored.size:
        return np.empty((len(stored), *shape), dtype)
    if kind == "BF16":
        values: Array = stored.view(ml_dtypes.bfloat16)
    elif kind == "F16":
        values = stored.view(np.float16)
    else:
        with np.errstate(all="ignore"):
            values = dequantize(stored, GGMLQuantizationType[kind])
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.reshape(len(stored), *shape).astype(dtype, copy=False))
