"""The formats float16, bfloat16 and float32: a plain checkpoint; weights that are quantized are dequantized."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantize8.formats.base import Format, OutTensor
from quantize8.sources.base import FLOAT_NAMES, FLOATING, TensorInfo

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan


class Floating(Format):
    """Rounds tensors in the model's main dtype to another dtype; tensors stored in another dtype are not changed."""

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """See `Format.outputs`."""
        (out,) = super().outputs(plan, info)
        is_main = info.name in plan.checkpoint.decoded or out.dtype == plan.main_dtype
        return [replace(out, dtype=FLOAT_NAMES[self.name])] if is_main and out.dtype in FLOATING else [out]

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """See `Format.edit_config`; sets the dtype at the top level and in the configs of submodels."""
        edited = {"dtype" if key == "torch_dtype" else key: value for key, value in config.items()}
        for key, value in edited.items():
            if isinstance(value, dict) and key.endswith("_config") and ("dtype" in value or "torch_dtype" in value):
                edited[key] = self.edit_config(value, plan)
        return {**edited, "dtype": self.name}
