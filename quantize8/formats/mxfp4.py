"""Reads gpt-oss as it is published, with quant_method "mxfp4": the fused experts of a layer in MXFP4.

The layout is that of transformers 5.23 (`integrations/mxfp4.py`). For a tensor X of experts, such as
`model.layers.0.mlp.experts.down_proj`, `X_blocks` is uint8 [E, N, K / 32, 16] and holds two numbers a byte, and
`X_scales` uint8 [E, N, K / 32] their scales (see `formats.float4`). X is read as transformers' GptOssExperts has it:
[E, K, N], transposed, in bfloat16. That is exact: a number has two bits of mantissa, and bfloat16 the exponents of
E8M0. What is beyond them, from 2^128, is infinite as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding
from quantize8.formats.float4 import BLOCK, PACKED_TYPE, is_nan, powers, scaled
from quantize8.kernels.reference import Array
from quantize8.sources.base import DTYPES, MXFP4, Checkpoint

METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_CHUNK = 2**18  # numbers that are decoded at a time, which stay in a core's cache while they are transposed


@dataclass
class _Experts(Encoding):
    """Fused experts [E, K, N]; `module` is the name of the tensor."""

    dtype: ClassVar[str] = "BF16"

    @property
    def name(self) -> str:
        """See `Encoding.name`."""
        return self.module

    @property
    def stored_dtype(self) -> str:
        """See `Encoding.stored_dtype`."""
        return MXFP4

    def rows(self, start: int, stop: int) -> Array:
        """Dequantize experts start..stop to bfloat16 [e, K, N]; one of them is held in its stored form at a time."""
        _, columns, rows = self.shape
        values = np.empty((stop - start, columns, rows), np.uint16)
        step = max(1, _CHUNK // columns)
        for expert, out in zip(range(start, stop), values, strict=True):
            packed, scales = (self.stored.rows(name, expert, expert + 1)[0] for name in self.tensors)
            if (nan := is_nan(scales)).any():
                row = int(np.argmax(nan.any(axis=1)))
                raise self.refuse(f"has a scale that is NaN in expert {expert}, row {row} of {self.tensors[1]}")
            packed, factors = packed.reshape(rows, columns // 2), powers(scales)
            for first in range(0, rows, step):
                chunk = scaled(packed[first : first + step], factors[first : first + step])
                # the upper half of a float32 is a bfloat16, and these have nothing in the lower
                out[:, first : first + step] = chunk.view(np.uint32).astype("<u4").view("<u2")[:, 1::2].T
        return values.view(DTYPES[self.dtype])


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the tensors of experts; the modules_to_not_convert of config.json are not consulted.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each tensor of experts, by its name.

    Raises:
        SourceError: Blocks or scales are missing, or do not fit together.
    """
    encodings: dict[str, Encoding] = {}
    for info in stored.tensors.values():
        name = info.name.removesuffix(_BLOCKS)
        if name != info.name:
            encodings[name] = _experts(stored, name)
        name = info.name.removesuffix(_SCALES)
        if name != info.name and f"{name}{_BLOCKS}" not in stored.tensors:
            where = stored.folder / info.file
            raise SourceError(f"{where}: has {info.name} but no {name}{_BLOCKS}; fetch the checkpoint again")
    return encodings


def _experts(stored: Checkpoint, name: str) -> Encoding:
    names = (f"{name}{_BLOCKS}", f"{name}{_SCALES}")
    blocks, scales = stored.tensors[names[0]], stored.tensors.get(names[1])
    experts, rows, groups, octets = blocks.shape if len(blocks.shape) == 4 else (0, 0, 0, 0)
    encoding = _Experts(stored, name, names, (experts, 2 * groups * octets, rows))
    if blocks.dtype != PACKED_TYPE or 2 * octets != BLOCK[MXFP4] or 0 in blocks.shape:
        kind = f"{blocks.dtype} {list(blocks.shape)}"
        raise encoding.refuse(f"has blocks {kind}, not {PACKED_TYPE} [E, N, K / 32, 16]")
    if scales is None:
        raise encoding.refuse(f"has no {names[1].rpartition('.')[2]}")
    if scales.dtype != PACKED_TYPE or scales.shape != blocks.shape[:3]:
        kind = f"{scales.dtype} {list(scales.shape)}"
        raise encoding.refuse(f"has scales {kind} for blocks {list(blocks.shape)}, not one for each block")
    if name in stored.tensors:
        raise encoding.refuse(f"is stored a second time, as {stored.tensors[name].dtype}")
    return encoding
