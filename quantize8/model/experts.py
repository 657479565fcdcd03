"""Int8Experts: the experts of a mixture-of-experts layer, which transformers keeps as two tensors, in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize8.model.linear import Int8Linear
from quantize8.ops.reference import LayerMode

PROJECTIONS = ("gate_up_proj", "down_proj")  # [E, 2 I, H] and [E, H, I]: E experts of inner width I
SCALE = "_SCB"  # appended to a projection's name: its absmax float32 [E, N]


class Int8Experts(nn.Module):
    """The experts of `source` in int8. While a model is loaded they are two tensors; then `split` makes them layers."""

    def __init__(self, source: nn.Module, threshold: float, mode: LayerMode | None) -> None:
        super().__init__()
        self.threshold, self.mode = threshold, mode
        self._source: Any
        self.__dict__["_source"] = source  # its activation, and its class for dequantizing; not a module of the model
        for name in PROJECTIONS:
            shape = getattr(source, name).shape
            codes = torch.empty(shape, dtype=torch.int8, device="meta")
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            absmax = torch.empty(shape[:2], dtype=torch.float32, device="meta")
            self.register_parameter(name + SCALE, nn.Parameter(absmax, requires_grad=False))

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module holds experts in the common layout: gated, without bias, [E, N, K] each."""
        weights = [getattr(module, name, None) for name in PROJECTIONS]
        return (
            all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)
            and hasattr(module, "_apply_gate")
            and bool(getattr(module, "has_gate", False))
            and not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
        )

    def split(self) -> None:
        """Make a layer of each expert's matrix, sharing its memory."""
        for name in PROJECTIONS:
            codes, absmax = getattr(self, name).data, getattr(self, name + SCALE).data
            delattr(self, name)
            delattr(self, name + SCALE)
            layers = [self._layer(expert, peaks) for expert, peaks in zip(codes, absmax, strict=True)]
            self.register_module(name, nn.ModuleList(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, H], the experts [T, k] of each and their weights [T, k] -> [T, H]; sums in expert order."""
        result = torch.zeros_like(hidden_states)
        gate_up, down = (getattr(self, name) for name in PROJECTIONS)
        for expert in top_k_index.unique().tolist():
            if expert == len(down):  # which stands for one on another machine
                continue
            token, place = torch.where(top_k_index == expert)
            inner = self._source._apply_gate(gate_up[expert](hidden_states[token]))
            output = down[expert](inner) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    def dequantized(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Projection -> its weights [E, N, K]."""
        return {name: torch.stack([e.dequantize().to(dtype) for e in getattr(self, name)]) for name in PROJECTIONS}

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The experts as they were before, with the weights that the codes stand for."""
        source: Any = self._source
        for name, weight in self.dequantized(dtype).items():
            setattr(source, name, nn.Parameter(weight, requires_grad=False))
        module: nn.Module = source
        return module

    def _layer(self, codes: Tensor, absmax: Tensor) -> Int8Linear:
        layer = Int8Linear(codes.shape[1], codes.shape[0], False, self.threshold, self.mode, "meta")
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.SCB = nn.Parameter(absmax, requires_grad=False)
        layer.weight_format = torch.zeros((), dtype=torch.uint8, device=codes.device)
        return layer
