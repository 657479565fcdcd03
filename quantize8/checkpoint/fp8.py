"""Reading float8 checkpoints with quant_method "fp8": DeepSeek-V3's and Qwen3's blocks, and one scale for a tensor.

A weight is w = weight * scale. `weight_scale_inv` (in spite of its name multiplied by, as DeepSeek-V3's
inference/kernel.py does) has a scale for each block of weight_block_size rows and columns, [128, 128] where config.json
says nothing; the last block of either direction may be cut off. Where weight_block_size is null, it or `weight_scale`
(vLLM's name for it) is one scale for the tensor, or one for each row. Scales are floating-point numbers, or ue8m0:
a byte b for 2^(b - 127).

A checkpoint that was only cast to float8, and whose config.json says nothing of it, holds the numbers as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantize8.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from quantize8.checkpoint.encoding import Encoding, require
from quantize8.checkpoint.wrapper import Wrapper
from quantize8.errors import SourceError
from quantize8.ops.reference import Array

METHOD = "fp8"
WEIGHT = "weight"
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("activation_scale", "input_scale")  # of static activations
_VALUES = ("F8_E4M3", "F8_E5M2")
_CAST = "BF16"  # holds every number of both float8 types exactly
_LOOSE_SCALES = ("scale", "scale_weight", "scaled_fp8", "scale_input", *_SCALES)  # ComfyUI's among them
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_BLOCK = (128, 128)


@dataclass
class _Float8(Encoding):
    block: tuple[int, int] = _BLOCK  # rows and columns that share a scale

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`. The product of a stored number and its scale, rounded to float32 once."""
        down, across = self.block
        dtype = DTYPES[self.stored.tensors[self.tensors[0]].dtype]
        scale = self._scale()[np.arange(start, stop) // down]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the caller to judge
            numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
            values: Array = numbers[self.stored.rows(self.tensors[0], start, stop).view(np.uint8)]
            for i in range(scale.shape[1]):
                values[:, i * across : (i + 1) * across] *= scale[:, i, None]
        return values

    def _scale(self) -> Array:
        """Scales as float32, one for each block in both directions."""
        stored = self.whole(self.tensors[1])
        if stored.dtype == np.uint8:
            stored = stored.view(DTYPES["F8_E8M0"])
        grid = stored.reshape(stored.shape[0] if stored.ndim else 1, -1)
        return grid.astype(np.float32)


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Module -> its encoding, for each module with a float8 weight; config.json's lists of modules are not asked.

    Raises SourceError for a float8 tensor without scales, for scales without a float8 weight (float4 ones), for scales
    that do not fit weight_block_size, and for 3-D weights (fused experts).
    """
    require(entry, {"fmt": (None, "e4m3", "float8_e4m3fn", "e5m2", "float8_e5m2")}, str(stored.folder))
    block = _block_size(stored, entry)
    found: dict[str, Encoding] = {}
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        if info.dtype in _VALUES and part == WEIGHT:
            found[module] = _module(stored, module, info, block)
        elif info.dtype in _VALUES:
            where = stored.folder / info.file
            raise SourceError(
                f"{where}: {info.name} is {info.dtype} outside a weight, which is not read; use the original"
            )
        elif part in _SCALES and stored.tensors.get(f"{module}.{WEIGHT}", info).dtype not in _VALUES:
            where = stored.folder / info.file
            raise SourceError(f"{where}: {module} has {part} and no float8 weight, which is not read; use the original")
    return found


def uncast(stored: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or where some of its tensors were cast to float8 one that gives them in bfloat16.

    Raises SourceError where they have scales, which no config.json explains.
    """
    cast = {name for name, info in stored.tensors.items() if info.dtype in _VALUES}
    if not cast:
        return stored
    scale = next((name for name in stored.tensors if name.rpartition(".")[2] in _LOOSE_SCALES), None)
    if scale is not None:
        raise SourceError(
            f"{stored.folder}: holds float8 with scales ({scale}), and config.json has no quantization_config that "
            "says how; use the original"
        )
    tensors = {name: replace(info, dtype=_CAST) if name in cast else info for name, info in stored.tensors.items()}
    return _Uncast(stored, tensors)


class _Uncast(Wrapper):
    """Float8 without scales, in bfloat16."""

    def stored_dtype(self, name: str) -> str:
        """See `Checkpoint.stored_dtype`."""
        return self.inner.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        values = self.inner.rows(name, start, stop)
        if self.inner.tensors[name].dtype not in _VALUES:
            return values
        numbers = np.arange(256, dtype=np.uint8).view(values.dtype).astype(DTYPES[_CAST])
        cast: Array = numbers[values.view(np.uint8)]
        return cast


def _block_size(stored: Checkpoint, entry: dict[str, Any]) -> tuple[int, int] | None:
    """weight_block_size as it is given, None where it is not."""
    block = entry.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise SourceError(f"{stored.folder}: its weight_block_size {block!r} is not two sizes; fetch config.json again")
    return block[0], block[1]


def _module(stored: Checkpoint, module: str, weight: TensorInfo, block: tuple[int, int] | None) -> Encoding:
    scales = [f"{module}.{part}" for part in _SCALES if f"{module}.{part}" in stored.tensors]
    unused = [f"{module}.{part}" for part in _UNUSED if f"{module}.{part}" in stored.tensors]
    shape = weight.shape if len(weight.shape) == 2 else (0, 0)
    encoding = _Float8(stored, module, (weight.name, *scales, *unused), shape)
    if 0 in shape:
        raise encoding.refuse(f"stores its weight as {weight.dtype} {list(weight.shape)}, which is not read")
    if len(scales) != 1:
        raise encoding.refuse(f"is {weight.dtype} with {' and '.join(_SCALES) if scales else 'no scale'}")
    scale = stored.tensors[scales[0]]
    if scale.dtype not in _SCALE_TYPES:
        raise encoding.refuse(f"has {scale.dtype} scales, which are not read")
    rows, columns = weight.shape
    blocks = [block or _BLOCK] if len(scale.shape) == 2 else []
    if len(scale.shape) < 2 or block is None:
        blocks += [(rows, columns), (1, columns)]
    for down, across in blocks:
        grid = (-(-rows // down), -(-columns // across))
        if scale.shape == grid or (scale.shape == grid[:1] and grid[1] == 1) or (scale.shape == () and grid == (1, 1)):
            encoding.block = (min(down, rows), min(across, columns))
            return encoding
    raise encoding.refuse(
        f"is {rows}x{columns} with scales {list(scale.shape)}, not one for each block of {block or _BLOCK}"
    )
