"""Int8Linear as a subclass of bitsandbytes' Linear8bitLt, so that PEFT's methods for 8-bit layers train and merge it.

PEFT recognizes 8-bit layers by that class. It reads `state` and `index` of such a layer, and `SCB` and
`has_fp16_weights` of its weight; to merge an adapter, it assigns a new weight.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from quantize8.errors import WeightError
from quantize8.runtime.linear import Int8Linear
from quantize8.runtime.training import requantize
from quantize8.runtime.weight import Int8Weight


class Int8Params(Int8Weight):
    """The weight, under the class name by which PEFT decides to dequantize."""

    has_fp16_weights = True  # so that PEFT assigns a merged weight in floating point, which the layer quantizes

    @property
    def SCB(self) -> Tensor | None:
        """The absmax of each row, float32 [N]; None for a tensor that was computed from a layer's weight."""
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
        """Do nothing: no state is carried from one pass to the next."""


class Linear8bitLt(Int8Linear, bitsandbytes.nn.Linear8bitLt):
    """An Int8Linear that `isinstance` takes for a bitsandbytes layer; it computes as Int8Linear does."""

    index = None

    @property
    def state(self) -> State:
        """A snapshot of the layer's scales and threshold; writing to it does not change the layer."""
        return State(self)

    @state.setter
    def state(self, _: State) -> None:
        """Ignore the assignment, by which PEFT returns the state that it read."""

    def _view(self, stored: Tensor) -> Int8Weight:
        return Int8Params(stored.detach(), layer=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Int8Linear; bitsandbytes' Int8Params are quantized if in floating point, or else bring their scales."""
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
        """Do nothing: codes and scales are already attributes of the layer."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.to."""
        return nn.Module.to(self, *args, **kwargs)


def check_adapters() -> None:
    """Patch PEFT to raise WeightError, on quantize8's layers, for adapters that became int8 and for wrong merges.

    Some PEFT methods create their tensors in the weight's dtype, here int8, and some merge another result than the
    adapter computes.
    """
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
            f"{name}: {cast[0]} became int8 like the weight and lost its values; this PEFT method does not support "
            "8-bit layers: use LoRA (docs/training.md)"
        )


def _check_merging(kind: Any) -> None:
    """Patch the `merge` of a PEFT layer class so that our layer can compare the merged weight with the adapter."""
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
    """Random inputs float32 [4, K], and what the adapter of this name adds to the layer's outputs for them, [4, N]."""
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.SCB.device)
    x[4] = 0  # its output is what the adapter adds to the bias
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
            f"Linear8bitLt weight {list(weight.shape)}: the weight that PEFT would merge differs from what the adapter "
            "computes; do not merge this adapter, or use LoRA (docs/training.md)"
        )
