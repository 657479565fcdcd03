"""Reads the bitsandbytes format for LLM.int8(): which modules of a folder are int8, and their codes."""

from __future__ import annotations

from typing import Any

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding, RowwiseInt8
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint

METHOD = "bitsandbytes"
SCALE = "SCB"  # absmax of each row, float32 [N]: bitsandbytes stores it undivided
LAYOUT = "weight_format"  # uint8, no dimensions; 0 = row-major, the only layout that is still read


class _Int8Module(RowwiseInt8):
    def codes(self, start: int, stop: int) -> Array:
        return self.stored.rows(self.tensors[0], start, stop)

    def absmax(self, start: int, stop: int) -> Array:
        return self.stored.rows(self.tensors[1], start, stop)


def is_int8(config: dict[str, Any]) -> bool:
    """Whether a config.json says that its folder holds int8 weights in this format."""
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method", METHOD) == METHOD and entry.get("load_in_8bit") is True


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the modules that have codes and scales.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: The folder is in bitsandbytes' 4-bit format, or a module is not int8 [N, K] with SCB [N].
    """
    if entry.get("load_in_8bit") is not True:
        raise SourceError(
            f"{stored.folder}: is in bitsandbytes' 4-bit format, which is not read; use the original checkpoint"
        )
    names = [name.removesuffix(f".{SCALE}") for name in stored.tensors if name.endswith(f".{SCALE}")]
    return {name: _module(stored, name) for name in names}


def _module(stored: Checkpoint, module: str) -> Encoding:
    names = tuple(f"{module}.{part}" for part in ("weight", SCALE, LAYOUT))
    weight, scale = stored.tensors.get(names[0]), stored.tensors[names[1]]
    if weight is None:
        raise SourceError(f"{stored.folder / scale.file}: {module} has {SCALE} but no weight; fetch the folder again")
    rows, columns = (*weight.shape, 0, 0)[:2]
    encoding = _Int8Module(stored, module, tuple(name for name in names if name in stored.tensors), (rows, columns))
    if (weight.dtype, len(weight.shape), scale.dtype, scale.shape) != ("I8", 2, "F32", weight.shape[:1]):
        raise encoding.refuse(f"is not int8 [N, K] with float32 {SCALE} [N]")
    return encoding
