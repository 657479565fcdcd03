"""Int8Linear as bitsandbytes' Linear8bitLt, by which PEFT knows 8-bit layers: its methods for these train and merge.

PEFT asks such a layer for `state` and `index`, and its weight for `SCB` and `has_fp16_weights`; to merge, it assigns a
new weight.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from quantize8.errors import WeightError
from quantize8.model.linear import Int8Linear
from quantize8.model.training import requantize
from quantize8.model.weight import Int8Weight


class Int8Params(Int8Weight):
    """The weight under the name that PEFT dequantizes by."""

    has_fp16_weights = True  # so that PEFT hands over a merged weight in floating point, and the layer quantizes it

    @property
    def SCB(self) -> Tensor | None:
        """The absmax of each row, float32 [N]; None for what was made from a layer's weight."""
        return None if self.layer is None else self.layer.SCB.detach()


class State:
    """A layer's scales and threshold under bitsandbytes' names."""

    has_fp16_weights, use_pool, is_training = False, False, False

    def __init__(self, layer: Int8Linear) -> None:
        self._layer, self.threshold, self.SCB = layer, layer.threshold, layer.SCB.detach()

    @property
    def CB(self) -> Tensor:
        """The codes, int8 [N, K]."""
        return self._layer.stored_codes()

    def reset_grads(self) -> None:
        """Nothing is kept from one pass to the next."""


class Linear8bitLt(Int8Linear, bitsandbytes.nn.Linear8bitLt):
    """An Int8Linear that is a bitsandbytes layer to `isinstance`; it computes as Int8Linear does."""

    index = None

    @property
    def state(self) -> State:
        """What the layer holds, as of now; writing to it changes nothing."""
        return State(self)

    @state.setter
    def state(self, _: State) -> None:
        """PEFT gives back the state that it took."""

    def _view(self, stored: Tensor) -> Int8Weight:
        return Int8Params(stored.detach(), layer=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As Int8Linear's; a weight of bitsandbytes' is quantized where it is not, or brings its scales."""
        if name != "weight" or not isinstance(value, bitsandbytes.nn.Int8Params):
            super().__setattr__(name, value)
        elif value.dtype.is_floating_point:
            if probe := self.__dict__.pop("_probe", None):
                _check_merged(self, value.data, probe)
            requantize(self, value.data)
        else:
            super().__setattr__(name, nn.Parameter(value.data, requires_grad=False))
            self.SCB.data = value.SCB.float()

    def init_8bit_state(self) -> None:
        """Codes and scales stay where they are."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        return nn.Module.to(self, *args, **kwargs)


def check_adapters() -> None:
    """Have PEFT refuse, over our layers, adapters that became int8 as the weight is, and weights merged wrongly."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind: Any = peft.PeftModel
    original = kind.__init__
    if original.__module__ == __name__:
        return

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, module in self.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Int8Linear):
                _check_tensors(name, module)
                _check_merging(type(module))

    kind.__init__ = init


def _check_tensors(name: str, module: Any) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    cast = [key for key, value in tensors.items() if value.dtype == torch.int8 and "base_layer" not in key]
    if cast:
        raise WeightError(
            f"{name}: {cast[0]} became int8, as the weight is, and lost its values; this PEFT method is not for 8-bit "
            "layers: use LoRA (docs/training.md)"
        )


def _check_merging(kind: Any) -> None:
    """Have a layer of PEFT's let our layer know, while it merges, what the adapter computes."""
    original = kind.merge
    if original.__module__ == __name__:
        return

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer, names = self.get_base_layer(), adapter_names or self.active_adapters
        if isinstance(layer, Linear8bitLt) and not self.merged and names:
            layer.__dict__["_probe"] = _probe(self, layer, names[0])
        try:
            original(self, safe_merge, adapter_names)
        finally:
            layer.__dict__.pop("_probe", None)

    kind.merge = merge


def _probe(module: Any, layer: Linear8bitLt, name: str) -> tuple[Tensor, Tensor]:
    """Inputs float32 [4, K], and what the adapter of this name adds to the layer's outputs, [4, N]."""
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.SCB.device)
    x[4] = 0  # what is added to the bias
    mode, active, training = layer.chosen_mode, module._active_adapter, module.training
    try:
        layer.mode, module._active_adapter = "dynamic", [name]  # this mode does not quantize so few inputs
        module.eval()
        with torch.no_grad():
            added = module(x) - layer(x)
    finally:
        layer.mode, module._active_adapter = mode, active
        module.train(training)
    return x[:4], added[:4] - added[4]


def _check_merged(layer: Linear8bitLt, weight: Tensor, probe: tuple[Tensor, Tensor]) -> None:
    x, added = probe
    old = layer.dequantize()
    error = x @ (weight.float() - old).t() - added
    if error.norm() > 0.05 * added.norm() + 1e-3 * (x @ old.t()).norm():  # rounding to float16 is far below
        raise WeightError(
            f"Linear8bitLt weight {list(weight.shape)}: what PEFT would merge is not what the adapter computes; keep "
            "the adapter apart, or use LoRA (docs/training.md)"
        )
