"""How transformers builds a model on our layers: a quantizer of its own kind, registered under the name quantize8.

Only in memory: no file ever names this method, because a loader without quantize8 would read such a folder as noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantize8.checkpoint.structure import CONV1D, linear_kinds
from quantize8.model.linear import Int8Linear
from quantize8.ops.reference import DEFAULT_THRESHOLD, OutlierMode

METHOD = "quantize8"


@register_quantization_config(METHOD)
class LoadConfig(QuantizationConfigMixin):
    """What the loader of an int8 folder needs to know: threshold, outlier mode, and the modules left in float."""

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        mode: OutlierMode = "dynamic",
        skip_modules: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.threshold, self.mode, self.skip_modules = threshold, mode, skip_modules


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Puts an Int8Linear in the place of each Linear or Conv1D that the folder holds in int8."""

    requires_calibration = False

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight takes, for device_map="auto"."""
        return 1

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Never: the folder's weights are int8 already."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.skip_modules, model._keep_in_fp32_modules)
        for name, kind in linear_kinds(model).items():
            if should_convert_module(name, skip):
                model.set_submodule(name, _empty_layer(model.get_submodule(name), kind, config))

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the model: not under this in-memory method."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the frozen layers."""
        return True


def _empty_layer(module: nn.Module, kind: str, config: LoadConfig) -> Int8Linear:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out_features, in_features = reversed(weight.shape) if kind == CONV1D else weight.shape
    layer = Int8Linear(in_features, out_features, module.bias is not None, config.threshold, config.mode, "meta")
    if layer.bias is not None and isinstance(module.bias, torch.Tensor):
        layer.bias.data = layer.bias.data.to(module.bias.dtype)
    layer.__dict__["_is_hf_initialized"] = (
        True  # or transformers fills int8 weights with normal noise when offloading to disk
    )
    return layer
