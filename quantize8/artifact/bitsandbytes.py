"""The bitsandbytes format: what transformers writes for LLM.int8(), and opens without knowing quantize8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize8.artifact.layout import OutTensor
from quantize8.checkpoint import TensorInfo
from quantize8.errors import ArtifactError

NAME = "bitsandbytes"
SCALE = "SCB"  # absmax of each row, float32 [N]: bitsandbytes stores it undivided
_FORMAT = "weight_format"  # uint8, no dimensions; 0 = row-major, the only layout that is still read


def module_tensors(module: str, shape: tuple[int, int]) -> list[OutTensor]:
    """Tensors of a quantized module with a weight [N, K], the weight first."""
    return [
        OutTensor(f"{module}.weight", "I8", shape),
        OutTensor(f"{module}.{SCALE}", "F32", shape[:1]),
        OutTensor(f"{module}.{_FORMAT}", "U8", ()),
    ]


def quantization_config(threshold: float, skip_modules: list[str]) -> dict[str, Any]:
    """The entry of config.json. A list of modules, even an empty one, replaces transformers' own choice."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(threshold),  # an integer is refused by transformers
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,  # stored as true, int8 weights would load as plain Linear ones
    }


def check_module(tensors: Mapping[str, TensorInfo], module: str, where: object) -> None:
    """Raise ArtifactError unless a module's weight is int8 [N, K] and its scales are float32 [N]."""
    weight, scale = tensors.get(f"{module}.weight"), tensors.get(f"{module}.{SCALE}")
    if weight is None or scale is None:
        raise ArtifactError(f"{where}: {module} lacks its weight or its {SCALE}; copy or convert the artifact again")
    if (weight.dtype, len(weight.shape), scale.dtype, scale.shape) != ("I8", 2, "F32", weight.shape[:1]):
        raise ArtifactError(f"{where}: {module} is not int8 [N, K] with float32 {SCALE} [N]; convert the source again")


def is_int8(config: dict[str, Any]) -> bool:
    """Whether a config.json says that the folder holds int8 weights in this format."""
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method", NAME) == NAME and entry.get("load_in_8bit") is True
