"""Reads float8 checkpoints with quant_method "fp8": scales by block, as in DeepSeek-V3 and Qwen3, by row or by tensor.

A weight is w = weight * scale. `weight_scale_inv` is a factor in spite of its name, as in DeepSeek-V3's
inference/kernel.py. It has one scale for each block of weight_block_size rows and columns, [128, 128] if config.json
does not say; the last block in either direction may be smaller. If weight_block_size is null, `weight_scale_inv` or
`weight_scale` (vLLM's name for it) is one scale for the tensor, or one for each row. Scales are floating-point numbers,
or ue8m0: a byte b that represents 2^(b - 127).

A checkpoint that was only cast to float8, without any mention in config.json, holds the values themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding, require
from quantize8.kernels.reference import Array
from quantize8.sources.base import DTYPES, Checkpoint, TensorInfo
from quantize8.sources.wrapper import Wrapper

METHOD = "fp8"
WEIGHT = "weight"
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("activation_scale", "input_scale")  # for static quantization of activations
VALUES = ("F8_E4M3", "F8_E5M2")
_CAST = "BF16"  # holds every number of both float8 types exactly
_LOOSE_SCALES = ("scale", "scale_weight", "scaled_fp8", "scale_input", *_SCALES)  # including ComfyUI's names
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_BLOCK = (128, 128)


@dataclass
class _Float8(Encoding):
    block: tuple[int, int] = _BLOCK  # rows and columns that share a scale

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`. The product of a stored number and its scale is rounded to float32 once."""
        down, across = self.block
        dtype = DTYPES[self.stored.tensors[self.tensors[0]].dtype]
        scale = self._scale()[np.arange(start, stop) // down]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller decides about values that are not finite
            numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
            values: Array = numbers[self.stored.rows(self.tensors[0], start, stop).view(np.uint8)]
            for i in range(scale.shape[1]):
                values[:, i * across : (i + 1) * across] *= scale[:, i, None]
        return values

    def _scale(self) -> Array:
        """The scales as a float32 matrix, one for each block."""
        stored = self.whole(self.tensors[1])
        if stored.dtype == np.uint8:
            stored = stored.view(DTYPES["F8_E8M0"])
        grid = stored.reshape(stored.shape[0] if stored.ndim else 1, -1)
        return grid.astype(np.float32)


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the modules with a float8 weight; the lists of modules in config.json are not consulted.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: A float8 tensor has no scales, scales have no float8 weight (float4 formats), scales do not fit
            weight_block_size, or a weight is 3-D (fused experts).
    """
    require(entry, {"fmt": (None, "e4m3", "float8_e4m3fn", "e5m2", "float8_e5m2")}, str(stored.folder))
    block = _block_size(stored, entry)
    encodings: dict[str, Encoding] = {}
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        if info.dtype in VALUES and part == WEIGHT:
            encodings[module] = module_of(stored, info, block)
        elif info.dtype in VALUES:
            where = stored.folder / info.file
            raise SourceError(
                f"{where}: {info.name} is {info.dtype} but not a weight, which is not read; use the original checkpoint"
            )
        elif part in _SCALES and stored.tensors.get(f"{module}.{WEIGHT}", info).dtype not in VALUES:
            where = stored.folder / info.file
            raise SourceError(
                f"{where}: {module} has {part} but no float8 weight, which is not read; use the original checkpoint"
            )
    return encodings


def uncast(stored: Checkpoint) -> Checkpoint:
    """Wrap a checkpoint whose tensors were only cast to float8 so that they are read as bfloat16.

    Raises:
        SourceError: The checkpoint has scales that config.json does not explain.
    """
    cast = {name for name, info in stored.tensors.items() if info.dtype in VALUES}
    scale = next((name for name in stored.tensors if name.rpartition(".")[2] in _LOOSE_SCALES), None)
    if scale is not None:
        raise SourceError(
            f"{stored.folder}: holds float8 with scales ({scale}), but config.json has no quantization_config that "
            "describes them; use the original checkpoint"
        )
    tensors = {name: replace(info, dtype=_CAST) if name in cast else info for name, info in stored.tensors.items()}
    return _Uncast(stored, tensors)


class _Uncast(Wrapper):
    """Float8 tensors without scales, read as bfloat16."""

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        values = self.inner.rows(name, start, stop)
        if self.inner.tensors[name].dtype not in VALUES:
            return values
        numbers = np.arange(256, dtype=np.uint8).view(values.dtype).astype(DTYPES[_CAST])
        cast: Array = numbers[values.view(np.uint8)]
        return cast


def _block_size(stored: Checkpoint, entry: dict[str, Any]) -> tuple[int, int] | None:
    """The weight_block_size of a quantization_config, None if it has none."""
    block = entry.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise SourceError(f"{stored.folder}: its weight_block_size {block!r} is not two sizes; fetch config.json again")
    return block[0], block[1]


def module_of(stored: Checkpoint, weight: TensorInfo, block: tuple[int, int] | None) -> Encoding:
    """The encoding of one module.

    Args:
        stored: The checkpoint as it is stored.
        weight: Its float8 weight.
        block: The rows and columns that share a scale, or None for one scale by tensor or by row.

    Raises:
        SourceError: The scales are missing or do not fit, or the weight is not a matrix.
    """
    module = weight.name.removesuffix(f".{WEIGHT}")
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
