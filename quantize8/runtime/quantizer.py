"""The hooks through which transformers builds, quantizes, saves and dequantizes models with quantize8's layers.

A stored model is either already int8, and then its codes and scales are loaded as they are, or in floating point, and
then each tensor is quantized as it is loaded. save_pretrained writes the bitsandbytes format.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from quantize8.errors import WeightError
from quantize8.kernels.cuda import CHUNK
from quantize8.kernels.devices import resolve
from quantize8.kernels.reference import OutlierMode
from quantize8.runtime.config import METHOD, Int8Config
from quantize8.runtime.experts import SCALE, Int8Experts
from quantize8.runtime.linear import Int8Linear, quantize
from quantize8.runtime.training import TrainableInt8Linear
from quantize8.sources.experts import layouts_of
from quantize8.sources.reading import read_by_code
from quantize8.sources.structure import CONV1D, linear_kinds

__all__ = ["METHOD", "Int8Config", "Int8Quantizer", "enable"]

_BITSANDBYTES = "bitsandbytes_8bit"  # transformers' key for its own quantizer of that format


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Replaces experts, and each Linear or Conv1D that is or becomes int8, with quantize8's layers.

    Args:
        quantization_config: An Int8Config, or after `enable` a BitsAndBytesConfig.
        **given: Further arguments of HfQuantizer.
    """

    requires_calibration = False
    serialized_names: ClassVar = {"weight": ["weight", f"weight{SCALE}"]}  # experts' scales are joined as weights are

    def __init__(self, quantization_config: Any, **given: Any) -> None:
        # a copy, as loading extends the list of skipped modules, which is for this model only
        super().__init__(copy.copy(quantization_config), **given)

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, from which device_map="auto" computes sizes."""
        return 1

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the frozen layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained, which they can if kept in floating point."""
        return bool(self.quantization_config.llm_int8_has_fp16_weight)

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile can trace the layers, which are torch operators."""
        return True

    def is_serializable(self) -> bool:
        """True: save_pretrained writes the bitsandbytes format."""
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """The device_map to use: without one, a GPU if it can run the kernels, else the CPU.

        "auto" becomes the CPU too if no GPU can run the kernels, which transformers does not check.
        """
        if device_map in (None, "auto") and resolve("auto") == "cpu":
            return {"": "cpu"}
        return {"": torch.cuda.current_device()} if device_map is None else device_map

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a floating-point weight of the checkpoint is quantized or transposed while it is loaded."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, TrainableInt8Linear):
            return name == "weight" and module.transposed
        return not self.pre_quantized and (
            (isinstance(module, Int8Linear) and name == "weight")
            or (isinstance(module, Int8Experts) and name in module.layout.projections)
        )

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The dtype that a stored tensor is cast to; never int8, as casting floating point to int8 gives zeros."""
        cast = super().get_new_dtype(converter, param, dtype)
        return None if cast == torch.int8 else cast

    def get_quantize_ops(self) -> ConversionOps:
        """The operation on weights for which `param_needs_quantization` is true."""
        return _Quantize()

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **_: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
        if config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
            skip += [name for name, device in device_map.items() if device in ("cpu", "disk")]
        skip += _tied_modules(model)
        if not self.pre_quantized:  # what a folder stores as int8 must not be loaded as floating point
            skip += sorted(read_by_code(model))
        mode: OutlierMode | None = getattr(config, "mode", None)  # a BitsAndBytesConfig names none
        if getattr(config, "quantize_experts", False) and not config.llm_int8_has_fp16_weight:
            for name, layout in layouts_of(model, {}).items():
                if should_convert_module(name, skip):
                    experts = Int8Experts(model.get_submodule(name), layout, config.llm_int8_threshold, mode)
                    model.set_submodule(name, experts)
        for name, kind in linear_kinds(model).items():
            if should_convert_module(name, skip):
                model.set_submodule(name, _empty_layer(model.get_submodule(name), kind, config, mode))
        config.llm_int8_skip_modules = sorted(set(skip))  # so that a saved model lists what is not int8

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _require_loaded(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Experts):
                if next(iter(module.parameters())).is_meta:
                    raise ValueError(
                        f"{name}: int8 experts cannot be offloaded to disk; use a device_map that puts them on a device"
                    )
                module.split()
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                # transformers 5.23 would read back the floating-point weight from the checkpoint
                if module.weight.is_meta and not self.pre_quantized:
                    raise ValueError(
                        f"{name}: is offloaded to disk before it is quantized to int8; convert the model, and load the "
                        "result instead"
                    )
                _check(module, name)
                model.is_loaded_in_8bit = hasattr(module, "state")  # PEFT then uses its methods for 8-bit layers
                # a view into a file's bytes is copied to an address from which kernels can load vectors
                if module.weight.is_cuda and module.weight.data_ptr() % CHUNK:
                    module.weight.data = module.weight.data.clone()
        if self.quantization_config.llm_int8_has_fp16_weight:
            del model.config.quantization_config  # it is saved as an unquantized model
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # the config of a saved model has the name
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Experts):
                model.set_submodule(name, module.to_float(dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear | TrainableInt8Linear):
                model.set_submodule(name, _float_layer(module, dtype))
        model.is_loaded_in_8bit = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that save_pretrained writes: the bitsandbytes format, or the weights that are trained.

        Experts are dequantized, as the format has no int8 experts.

        Raises:
            WeightError: A layer is rotated, which the format cannot say.
        """
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear) and module.rotation:
                raise WeightError(
                    f"{name}: is rotated, and a model is saved in the bitsandbytes format, which is not; copy the "
                    "artifact instead, or call dequantize() first"
                )
        state: dict[str, Tensor] = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, Int8Experts):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
                state |= {f"{name}.{key}": value for key, value in module.dequantized(model.dtype).items()}
        return state, {}


def enable() -> None:
    """Make transformers use quantize8's layers for models that it would load with bitsandbytes' LLM.int8().

    This applies to folders in the bitsandbytes format, and to models loaded with BitsAndBytesConfig(load_in_8bit=True).
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = Int8Quantizer


class _Quantize(ConversionOps):
    """Quantizes a floating-point tensor of the checkpoint to codes and scales, on the device it is loaded to."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, last = get_module_from_name(model, name)
            if isinstance(module, TrainableInt8Linear):
                result[name] = weight.t().contiguous()
            elif isinstance(module, Int8Experts):
                transposed = module.layout.projections[last].transposed
                experts = weight.transpose(1, 2) if transposed else weight
                codes, absmax = zip(*map(quantize, experts), strict=True)
                result |= {name: torch.stack(codes), name + SCALE: torch.stack(absmax)}
            else:
                base = name.removesuffix(last)
                result[name], result[f"{base}SCB"] = quantize(weight.t() if module.transposed else weight)
                result[f"{base}weight_format"] = torch.zeros((), dtype=torch.uint8, device=weight.device)
            module.__dict__["_is_hf_initialized"] = True
        return result


def _tied_modules(model: Any) -> list[str]:
    """Linear modules that share their weight with another module.

    Both stay in floating point, as tying does not share the scales.
    """
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    return [name for name in linear_kinds(model) if f"{name}.weight" in tied]


def _require_loaded(model: Any) -> None:
    """Raise WeightError for codes that no tensor was loaded into: transformers only warns, and they are noise."""
    for name, module in model.named_modules():
        parameters: Iterable[str] = ("weight",) if isinstance(module, Int8Linear) else ()
        if isinstance(module, Int8Experts):
            parameters = module.layout.projections
        for parameter in parameters:
            codes: Any = module._parameters[parameter]
            if not (codes.is_meta or getattr(codes, "_is_hf_initialized", False)):
                raise WeightError(
                    f"{name}.{parameter} is not in the checkpoint, and would be noise; fetch the checkpoint again, or "
                    "add the module to llm_int8_skip_modules to initialize it in floating point"
                )


def _check(layer: Int8Linear, name: str) -> None:
    """Raise WeightError if a layer could not be quantized.

    This is checked after loading, because transformers hides the cause of an error that is raised while it converts
    tensors.
    """
    if layer.weight.dtype != torch.int8:
        raise WeightError(f"{name}: its weight is {layer.weight.dtype}, not int8; add it to llm_int8_skip_modules")
    if not (layer.SCB.is_meta or layer.SCB.isfinite().all()):
        row = int(layer.SCB.isfinite().int().argmin())
        raise WeightError(
            f"{name} row {row} holds NaN, infinity or a |w| beyond float16; add it to llm_int8_skip_modules"
        )


def _layer_class() -> type[Int8Linear]:
    """The layer class: Int8Linear, or its subclass of bitsandbytes' layer if PEFT or bitsandbytes is imported.

    PEFT looks for bitsandbytes' class. Others are spared its import, which takes a second and prints warnings.
    """
    if not {"bitsandbytes", "peft"} & sys.modules.keys() or find_spec("bitsandbytes") is None:
        return Int8Linear
    from quantize8.runtime.bitsandbytes import Linear8bitLt, check_adapters

    if "peft" in sys.modules:
        check_adapters()
    return Linear8bitLt


def _empty_layer(module: nn.Module, kind: str, config: Any, mode: OutlierMode | None) -> nn.Module:
    """A quantize8 layer on the meta device that replaces a Linear or Conv1D on the meta device."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out_features, in_features = reversed(weight.shape) if kind == CONV1D else weight.shape
    given = (in_features, out_features, module.bias is not None, config.llm_int8_threshold, mode, "meta")
    trained = config.llm_int8_has_fp16_weight
    layer = TrainableInt8Linear(*given, dtype=weight.dtype) if trained else _layer_class()(*given)
    layer.transposed = kind == CONV1D
    if layer.bias is not None and isinstance(module.bias, torch.Tensor):
        layer.bias.data = layer.bias.data.to(module.bias.dtype)
    layer.__dict__["_is_hf_initialized"] = True  # else transformers fills int8 weights that go to disk with noise
    return layer


def _float_layer(layer: Int8Linear | TrainableInt8Linear, dtype: torch.dtype) -> Any:
    weight = layer.dequantize().to(dtype)
    module: Any
    if layer.transposed:
        module = Conv1D(0, 0)
        module.nf, module.nx = layer.out_features, layer.in_features
        weight = weight.t().contiguous()
    else:
        module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return module
