"""The formats float16, bfloat16 and float32: a plain checkpoint, dequantized where the source is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize8.artifact.format import Format
from quantize8.artifact.layout import OutTensor
from quantize8.checkpoint.base import FLOAT_NAMES
from quantize8.checkpoint.structure import Structure
from quantize8.ops.reference import Array

if TYPE_CHECKING:
    from quantize8.artifact.plan import Plan


@dataclass(frozen=True)
class Floating(Format):
    """Tensors of the model's own dtype are rounded to another; those it stores apart in a wider one are left alone."""

    @property
    def quantizes(self) -> bool:
        """See `Format.quantizes`."""
        return False

    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """See `Format.linears`: none."""
        return {}, {}

    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """Not called, as no module is int8."""
        raise NotImplementedError(module)

    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """Not called, as no module is int8."""
        raise NotImplementedError(self.name)

    def float_dtype(self, dtype: str, main: bool) -> str:
        """See `Format.float_dtype`."""
        return FLOAT_NAMES[self.name] if main else dtype

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """See `Format.edit_config`: the dtype, at the top and in the parts of a model of several."""
        edited = {"dtype" if key == "torch_dtype" else key: value for key, value in config.items()}
        for key, value in edited.items():
            if isinstance(value, dict) and key.endswith("_config") and ("dtype" in value or "torch_dtype" in value):
                edited[key] = self.edit_config(value, plan)
        return {**edited, "dtype": self.name}
