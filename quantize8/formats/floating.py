"""The formats float16, bfloat16 and float32: a plain checkpoint, dequantized where the source is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize8.formats.base import Format
from quantize8.sources.base import FLOAT_NAMES

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan


class Floating(Format):
    """Tensors of the model's own dtype are rounded to another; those it stores apart in a wider one are left alone."""

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
