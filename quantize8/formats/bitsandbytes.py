"""The bitsandbytes format: what transformers writes for LLM.int8(), and loads without quantize8.

A module `M` has the int8 codes `M.weight` [N, K], the absmax of each row `M.SCB` [N], and `M.weight_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats import BITSANDBYTES
from quantize8.formats.base import Int8Format, OutTensor
from quantize8.formats.encoding import Encoding, RowwiseInt8
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint
from quantize8.sources.structure import Structure, is_skipped

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan

SCALE = "SCB"  # absmax of each row, float32 [N]; bitsandbytes does not divide it by 127
LAYOUT = "weight_format"  # uint8 scalar; 0 = row-major, the only layout that is still supported


@dataclass(frozen=True)
class BitsAndBytes(Int8Format):
    """Int8 codes with the absmax of each row. Experts stay in floating point because transformers fuses them."""

    name: str = BITSANDBYTES
    suffix: str = "int8"
    package: ClassVar[str] = "bitsandbytes"

    @property
    def options(self) -> frozenset[str]:
        """See `Format.options`."""
        return super().options | {"threshold"}

    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """See `Int8Format.linears`."""
        refused = dict.fromkeys(structure.experts, "experts, which this format cannot hold in int8")
        refused |= {
            name: "transformers' loader looks for `weight` in the names of tensors, and finds it in this module's"
            for name in structure.linears
            if "weight" in structure.model_names.get(name, name)
        }
        return {name: kind for name, kind in structure.linears.items() if name not in refused}, refused

    def holds_experts(self, structure: Structure) -> bool:
        """See `Format.holds_experts`; transformers must replace them with Linear layers."""
        return structure.replaced

    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """See `Int8Format.misfits`: modules that loaders would skip too, as an entry matches prefixes and suffixes."""
        patterns = structure.skip_list(set(modules))
        caught = [name for name in modules if is_skipped(structure.model_names.get(name, name), patterns)]
        return dict.fromkeys(caught, "loaders cannot distinguish it by name from a module that stays in floating point")

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

    def accepts(self, config: dict[str, Any], recipe: dict[str, Any]) -> bool:
        """See `Format.accepts`; it must be int8, with the recipe's threshold."""
        entry = config.get("quantization_config") or {}
        return is_int8(config) and entry.get("llm_int8_threshold") == recipe.get("threshold")


def quantization_config(threshold: float, skip_modules: list[str]) -> dict[str, Any]:
    """Make the quantization_config of config.json.

    Args:
        threshold: Outlier threshold of LLM.int8().
        skip_modules: Modules that stay in floating point. Even an empty list replaces transformers' own choice.
    """
    return {
        "quant_method": BITSANDBYTES,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(threshold),  # transformers rejects an integer
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,  # if true, int8 weights would be loaded into plain Linear layers
    }


def is_int8(config: dict[str, Any]) -> bool:
    """Whether a config.json says that its folder holds int8 weights in this format."""
    entry = config.get("quantization_config")
    return (
        isinstance(entry, dict)
        and entry.get("quant_method", BITSANDBYTES) == BITSANDBYTES
        and entry.get("load_in_8bit") is True
    )


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


class _Int8Module(RowwiseInt8):
    def codes(self, start: int, stop: int) -> Array:
        return self.stored.rows(self.tensors[0], start, stop)

    def absmax(self, start: int, stop: int) -> Array:
        return self.stored.rows(self.tensors[1], start, stop)


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
