"""Reads NVIDIA ModelOpt's checkpoints, with quant_method "modelopt": NVFP4, and float8 by tensor or row.

The settings are the quantization_config of config.json, or the file hf_quant_config.json of older versions. The layout
is that of vLLM 0.32 (`quantization/modelopt.py`). A module of NVFP4 has `weight` uint8 [N, K / 2], `weight_scale`
float8 [N, K / 16] and `weight_scale_2` float32; a weight is number * (weight_scale * weight_scale_2). A module of
float8 has `weight` [N, K], and `weight_scale` for the tensor or for each row. `input_scale` is for activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize8.errors import SourceError
from quantize8.formats import fp8
from quantize8.formats.encoding import Encoding
from quantize8.formats.float4 import PACKED_TYPE, Float4
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint, TensorInfo

METHOD = "modelopt"
WEIGHT, SCALE, _GLOBAL = "weight", "weight_scale", "weight_scale_2"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
_SMOOTHING = "pre_quant_scale"  # factors that move from activations into weights
_UNUSED = "input_scale"


@dataclass
class _Nvfp4(Float4):
    def times_global(self, scales: Array) -> Array:
        """See `Float4.times_global`."""
        factors: Array = scales * self.global_scale(f"{self.module}.{_GLOBAL}")
        return factors


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the modules whose weight has scales; the lists of modules in the settings are not consulted.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of config.json, or the content of hf_quant_config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: The algorithm is not one of those above, the tensors of a module do not fit together, or there are
            fused experts or smoothing factors.
    """
    settings = entry.get("quantization", entry)
    algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
    if str(algorithm).upper() not in _ALGORITHMS:
        raise SourceError(
            f"{stored.folder}: is quantized by ModelOpt's {algorithm}, which is not read (only "
            f"{', '.join(_ALGORITHMS)}); use the original checkpoint"
        )
    encodings: dict[str, Encoding] = {}
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        where = f"{stored.folder / info.file}: {info.name}"
        if part == SCALE:
            encodings[module] = _module(stored, module, info)
        elif part == _GLOBAL and f"{module}.{SCALE}" not in stored.tensors:
            raise SourceError(f"{where} has no {SCALE} beside it; fetch the checkpoint again")
        elif part == _SMOOTHING or part.endswith((f"_{SCALE}", f"_{_GLOBAL}")):
            what = "smooths activations" if part == _SMOOTHING else "is a scale of fused experts"
            raise SourceError(f"{where} {what}, which is not read; use the original checkpoint")
        elif part == WEIGHT and info.dtype == PACKED_TYPE and f"{module}.{SCALE}" not in stored.tensors:
            raise SourceError(f"{where} is {info.dtype} without {SCALE}; fetch the checkpoint again")
    return encodings


def _module(stored: Checkpoint, module: str, scale: TensorInfo) -> Encoding:
    weight = stored.tensors.get(f"{module}.{WEIGHT}")
    if weight is None:
        where = stored.folder / scale.file
        raise SourceError(f"{where}: {module} has {SCALE} but no weight; fetch the checkpoint again")
    others = [f"{module}.{part}" for part in (_GLOBAL, _UNUSED) if f"{module}.{part}" in stored.tensors]
    if weight.dtype == PACKED_TYPE:
        encoding = _Nvfp4(stored, module, (weight.name, scale.name, *others), weight.shape)
        encoding.check_parts(f"{module}.{_GLOBAL}")
        return encoding
    if weight.dtype in fp8.VALUES and f"{module}.{_GLOBAL}" not in others:
        return fp8.module_of(stored, weight, None)
    where = stored.folder / weight.file
    raise SourceError(
        f"{where}: {weight.name} is {weight.dtype}, which is not read with {SCALE}; use the original checkpoint"
    )
