"""The bitsandbytes format: what transformers writes for LLM.int8(), and opens without knowing quantize8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantize8.formats import BITSANDBYTES
from quantize8.formats.base import Int8Format, OutTensor
from quantize8.kernels.reference import Array
from quantize8.sources.bitsandbytes import LAYOUT, SCALE
from quantize8.sources.structure import Structure, is_skipped

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan


@dataclass(frozen=True)
class BitsAndBytes(Int8Format):
    """Int8 codes with the absmax of each row; experts stay in floating point, for transformers joins them."""

    name: str = BITSANDBYTES
    suffix: str = "int8"
    options: ClassVar[frozenset[str]] = Int8Format.options | {"threshold"}

    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """See `Int8Format.linears`."""
        return structure.linears, dict.fromkeys(structure.experts, "experts, which this format cannot hold in int8")

    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """Modules that an entry of the skip list also matches: it matches what begins or ends with it."""
        patterns = structure.skip_list(set(modules))
        caught = [name for name in modules if is_skipped(structure.model_names.get(name, name), patterns)]
        return dict.fromkeys(caught, "a loader cannot tell it from a module of like name that stays in floating point")

    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """See `Int8Format.module_tensors`."""
        return [
            OutTensor(f"{module}.weight", "I8", shape),
            OutTensor(f"{module}.{SCALE}", "F32", shape[:1]),
            OutTensor(f"{module}.{LAYOUT}", "U8", ()),
        ]

    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """See `Int8Format.scales`."""
        return [absmax, np.zeros((), np.uint8)]

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """See `Format.edit_config`."""
        return {**config, "quantization_config": quantization_config(plan.recipe.threshold, plan.skip_list)}


def quantization_config(threshold: float, skip_modules: list[str]) -> dict[str, Any]:
    """The entry of config.json. A list of modules, even an empty one, replaces transformers' own choice."""
    return {
        "quant_method": BITSANDBYTES,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(threshold),  # an integer is refused by transformers
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,  # stored as true, int8 weights would load as plain Linear ones
    }
