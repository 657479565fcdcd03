"""Int8Experts: the experts of a mixture-of-experts layer in int8. transformers stores their weights in two tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize8.kernels.reference import LayerMode
from quantize8.runtime.linear import Int8Linear

PROJECTIONS = ("gate_up_proj", "down_proj")  # [E, 2 I, H] and [E, H, I]: E experts with intermediate size I
SCALE = "_SCB"  # suffix of a projection's name for its absmax float32 [E, N]


class Int8Experts(nn.Module):
    """The experts of a mixture-of-experts layer in int8.

    While a model is loaded, the experts are two tensors, as transformers stores them; `split` then makes them layers.

    Args:
        source: transformers' module of the experts, for which `fits` is true.
        threshold: Outlier threshold of the layers; 0 for none.
        mode: Outlier mode of the layers; None for the default of their device.
    """

    def __init__(self, source: nn.Module, threshold: float, mode: LayerMode | None) -> None:
        super().__init__()
        self.threshold, self.mode = threshold, mode
        self._source: Any
        # For its activation function, and for dequantizing; set in this way it is not a submodule of the model
        self.__dict__["_source"] = source
        for name in PROJECTIONS:
            shape = getattr(source, name).shape
            codes = torch.empty(shape, dtype=torch.int8, device="meta")
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            absmax = torch.empty(shape[:2], dtype=torch.float32, device="meta")
            self.register_parameter(name + SCALE, nn.Parameter(absmax, requires_grad=False))

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module holds experts in the common layout: gated, without bias, with weights [E, N, K]."""
        weights = [getattr(module, name, None) for name in PROJECTIONS]
        return (
            all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)
            and hasattr(module, "_apply_gate")
            and bool(getattr(module, "has_gate", False))
            and not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
        )

    def split(self) -> None:
        """Make each expert's matrix a layer, which shares the memory of the joint tensor."""
        for name in PROJECTIONS:
            codes, absmax = getattr(self, name).data, getattr(self, name + SCALE).data
            delattr(self, name)
            delattr(self, name + SCALE)
            layers = [self._layer(expert, peaks) for expert, peaks in zip(codes, absmax, strict=True)]
            self.register_module(name, nn.ModuleList(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts that the router chose, and add up their weighted outputs in the order of the experts.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, k], the experts of each token.
            top_k_weights: [T, k], the weights of their outputs.

        Returns:
            [T, H] in the dtype of hidden_states.
        """
        result = torch.zeros_like(hidden_states)
        gate_up, down = (getattr(self, name) for name in PROJECTIONS)
        for expert in top_k_index.unique().tolist():
            if expert == len(down):  # marks an expert on another machine
                continue
            token, rank = torch.where(top_k_index == expert)
            inner = self._source._apply_gate(gate_up[expert](hidden_states[token]))
            output = down[expert](inner) * top_k_weights[token, rank, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    def dequantized(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The dequantized weights [E, N, K] of each projection, in a dtype."""
        return {name: torch.stack([e.dequantize().to(dtype) for e in getattr(self, name)]) for name in PROJECTIONS}

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The module that transformers made for these experts, with the dequantized weights in a dtype."""
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
