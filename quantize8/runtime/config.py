"""Int8Config: the counterpart of transformers' BitsAndBytesConfig for 8-bit, which loads quantize8's layers."""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantize8.formats.bitsandbytes import is_int8, quantization_config
from quantize8.kernels.reference import DEFAULT_THRESHOLD, MODES, OutlierMode

METHOD = "quantize8"  # never written to a folder: a loader without quantize8 would then read the weights as noise


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Quantize Linear layers to int8 while a model is loaded: `from_pretrained(..., quantization_config=Int8Config())`.

    It also opens a folder that is already int8 in the bitsandbytes format. The folder then determines which modules are
    int8, and this config determines everything else.

    Args:
        load_in_8bit: Must be true.
        llm_int8_threshold: Outlier threshold; 0 turns outlier detection off.
        llm_int8_skip_modules: Modules to leave in floating point; None for transformers' choice (the output head, and
            tied weights).
        llm_int8_enable_fp32_cpu_offload: Leave modules in floating point that device_map puts on "cpu" or "disk".
            Otherwise these modules compute in int8 there.
        llm_int8_has_fp16_weight: Keep the weights in floating point, to train them.
        mode: "bitsandbytes" for the same bits as bitsandbytes on a CPU, "dynamic" or "hybrid" for less error. None for
            "bitsandbytes" where a layer is on a CPU and "dynamic" where it is on a GPU, which has no kernel for
            "bitsandbytes" and would compute it as "dynamic" with a DeviceWarning.
        quantize_experts: Quantize the experts of mixture-of-experts models too, which bitsandbytes leaves in floating
            point.
        **extra: Not accepted; an option of this class or of BitsAndBytesConfig that has no meaning for int8.

    Raises:
        ValueError: load_in_8bit is false, an option is unknown, the threshold is negative or NaN, or the mode is
            unknown.
    """

    def __init__(
        self,
        load_in_8bit: bool = True,
        llm_int8_threshold: float = DEFAULT_THRESHOLD,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        mode: OutlierMode | None = None,
        quantize_experts: bool = True,
        **extra: Any,
    ) -> None:
        extra.pop("quant_method", None)  # from_dict passes what to_dict gave
        if not load_in_8bit or extra:
            unknown = ", ".join(extra) or "load_in_8bit=False"
            raise ValueError(
                f"Int8Config: {unknown} is not an option for int8; use transformers' BitsAndBytesConfig for 4-bit"
            )
        if not llm_int8_threshold >= 0:
            raise ValueError(f"Int8Config: llm_int8_threshold {llm_int8_threshold} must be 0 (off) or positive")
        if mode is not None and mode not in MODES:
            raise ValueError(f"Int8Config: mode {mode} is unknown; name one of {', '.join(MODES)}")
        self.quant_method = METHOD
        self.load_in_8bit = True
        self.llm_int8_threshold = float(llm_int8_threshold)
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.llm_int8_enable_fp32_cpu_offload = llm_int8_enable_fp32_cpu_offload
        self.llm_int8_has_fp16_weight = llm_int8_has_fp16_weight
        self.mode, self.quantize_experts = mode, quantize_experts

    def to_dict(self) -> dict[str, Any]:
        """The quantization_config for config.json of a saved model: that of the bitsandbytes format."""
        return quantization_config(self.llm_int8_threshold, self.llm_int8_skip_modules or [])

    def for_stored(self, stored: dict[str, Any]) -> Int8Config:
        """The config to open a folder that is already int8.

        Args:
            stored: The quantization_config in the folder's config.json.

        Raises:
            ValueError: llm_int8_has_fp16_weight is set, and the folder has no floating-point weights to train.
        """
        if self.llm_int8_has_fp16_weight:
            raise ValueError(
                "Int8Config: llm_int8_has_fp16_weight trains floating-point weights, but this model is stored in int8; "
                "load its source, or dequantize it (convert --format float16)"
            )
        merged = copy.copy(self)
        merged.llm_int8_skip_modules = stored.get("llm_int8_skip_modules")
        merged.quantize_experts = False  # the bitsandbytes format has no int8 experts
        return merged


def _accept_stored_models() -> None:
    """Let an Int8Config open folders in the bitsandbytes format; transformers refuses that by the name of the class."""
    merge = AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(merge)
    def merge_with_ours(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, Int8Config):
            stored = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
            if is_int8({"quantization_config": stored}):
                return quantization_config_from_args.for_stored(stored)
        return merge(quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = merge_with_ours


_accept_stored_models()
