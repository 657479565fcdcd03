"""Int8Config: what transformers' BitsAndBytesConfig is for 8-bit, for layers of ours."""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantize8.artifact.bitsandbytes import quantization_config
from quantize8.checkpoint.bitsandbytes import is_int8
from quantize8.ops.reference import DEFAULT_THRESHOLD, MODES, OutlierMode

METHOD = "quantize8"  # in memory only: a loader without quantize8 would read a folder of this name as noise


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Quantize Linear layers to int8 while a model is loaded: `from_pretrained(..., quantization_config=Int8Config())`.

    A folder that is int8 already, in the bitsandbytes format, opens with it too: which modules are int8 is then what
    the folder says, all else what is given here.
    Args: load_in_8bit, always true; llm_int8_threshold, of outliers, 0 for none; llm_int8_skip_modules, modules to
    leave in floating point, None for transformers' choice (the output head, tied weights);
    llm_int8_enable_fp32_cpu_offload, leave in floating point what device_map puts on "cpu" or "disk", which else
    computes in int8 there; llm_int8_has_fp16_weight, keep the weights in floating point, for training them;
    mode, "bitsandbytes" for its results bit for bit on a CPU, "dynamic" or "hybrid" for less error;
    quantize_experts, also those of mixture-of-experts models, which bitsandbytes leaves in floating point.
    Raises: ValueError for load_in_8bit=False, a threshold that is no number from 0, and a mode that there is not.
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
            raise ValueError(f"Int8Config: {unknown} is not for int8; use transformers' BitsAndBytesConfig for 4-bit")
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
        """What config.json of a saved model says: the bitsandbytes format, which any transformers opens."""
        return quantization_config(self.llm_int8_threshold, self.llm_int8_skip_modules or [])

    def for_stored(self, stored: dict[str, Any]) -> Int8Config:
        """What opens a folder that is int8 already; stored, the quantization_config of its config.json."""
        if self.llm_int8_has_fp16_weight:
            raise ValueError(
                "Int8Config: llm_int8_has_fp16_weight trains floating-point weights, and this model is stored in int8; "
                "give its source, or dequantize it (convert --format float16)"
            )
        merged = copy.copy(self)
        merged.llm_int8_skip_modules = stored.get("llm_int8_skip_modules")
        merged.quantize_experts = False  # the format has no int8 experts
        return merged


def _accept_stored_models() -> None:
    """Let an Int8Config open folders in the bitsandbytes format, which transformers refuses by the class's name."""
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
