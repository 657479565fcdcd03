"""Int8Experts: the experts of a mixture-of-experts layer in int8. transformers stores their weights in two tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize8.kernels.reference import LayerMode
from quantize8.runtime.linear import Int8Linear
from quantize8.sources.experts import BIAS, DOWN, GATED, Layout, is_dense

SCALE = "_SCB"  # suffix of a projection's name for its absmax float32 [E, N]
_NORM = "post_expert_norm"  # which some models apply to the output of each expert


class SeparateExperts(nn.Module):
    """The experts of a mixture-of-experts layer, computed one after the other.

    Args:
        source: transformers' module of the experts.
        layout: Its layout, as of `layouts_of`.
    """

    def __init__(self, source: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self._source: Any
        # For its activation function, and for dequantizing; set in this way it is not a submodule of the model
        self.__dict__["_source"] = source
        self._is_dense = is_dense(source)
        if hasattr(source, _NORM):
            self.add_module(_NORM, getattr(source, _NORM))

    @property
    def first(self) -> str:
        """Name of the projection that comes first."""
        return next(name for name in self.layout.projections if name != DOWN)

    def project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """The product [n, N] of inputs [n, K] with a projection of one expert, with its bias."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Compute the experts that the router chose, and add up their weighted outputs in the order of the experts.

        Args:
            hidden_states: [T, H]; or [E * T, H] if every expert has tokens of its own, as in Llama 4.
            top_k_index: int64 [T, k], the experts of each token.
            top_k_weights: [T, k], the weights of their outputs.

        Returns:
            [T, H] in the dtype of hidden_states; or [E * T, H].
        """
        if top_k_index is None or top_k_weights is None:
            return self._dense(hidden_states)
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.layout.count:  # marks an expert on another machine
                continue
            token, rank = torch.where(top_k_index == expert)
            output = self._expert(expert, hidden_states[token]) * top_k_weights[token, rank, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        """The output [n, H] of one expert for inputs [n, H]."""
        source: Any = self._source
        inner: Tensor = self.project(self.first, expert, inputs)
        if self.first != GATED:
            inner = source.act_fn(inner)
        elif self._is_dense:
            gate, up = inner.chunk(2, dim=-1)
            inner = up * source.act_fn(gate)
        else:
            inner = source._apply_gate(inner)
        output: Tensor = self.project(DOWN, expert, inner)
        norm = self._modules.get(_NORM)
        return output if norm is None else norm(output)

    def _dense(self, hidden_states: Tensor) -> Tensor:
        """Llama 4: each expert computes its own copy of the tokens, which is zero where it was not chosen."""
        blocks = hidden_states.view(self.layout.count, -1, hidden_states.shape[-1])
        result = torch.zeros_like(blocks)
        for expert, block in enumerate(blocks):
            (token,) = torch.where(block.any(dim=-1))
            if len(token):
                result[expert, token] = self._expert(expert, block[token]).to(result.dtype)
        return result.view(hidden_states.shape)


class Int8Experts(SeparateExperts):
    """The experts of a mixture-of-experts layer in int8.

    While a model is loaded, the experts are two tensors, as transformers stores them, but always [E, N, K]; `split`
    then makes them layers.

    Args:
        source: transformers' module of the experts.
        layout: Its layout, as of `layouts_of`.
        threshold: Outlier threshold of the layers; 0 for none.
        mode: Outlier mode of the layers; None for the default of their device.
    """

    def __init__(self, source: nn.Module, layout: Layout, threshold: float, mode: LayerMode | None) -> None:
        super().__init__(source, layout)
        self.threshold, self.mode = threshold, mode
        for name, projection in layout.projections.items():
            shape: tuple[int, ...] = getattr(source, name).shape
            if projection.transposed:
                shape = (shape[0], shape[2], shape[1])
            codes = torch.empty(shape, dtype=torch.int8, device="meta")
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            absmax = torch.empty(shape[:2], dtype=torch.float32, device="meta")
            self.register_parameter(name + SCALE, nn.Parameter(absmax, requires_grad=False))
            self.register_parameter(name + BIAS, getattr(source, name + BIAS, None))

    def project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """See `SeparateExperts.project`."""
        output: Tensor = getattr(self, name)[expert](inputs)
        return output

    def split(self) -> None:
        """Make each expert's matrix a layer, which shares the memory of the joint tensor."""
        for name in self.layout.projections:
            codes, absmax, biases = (getattr(self, name + suffix) for suffix in ("", SCALE, BIAS))
            for suffix in ("", SCALE, BIAS):
                delattr(self, name + suffix)
            layers = [self._layer(*parts) for parts in zip(codes.data, absmax.data, strict=True)]
            for layer, bias in zip(layers, biases if biases is not None else (), strict=False):
                layer.bias = nn.Parameter(bias.data, requires_grad=False)
            self.register_module(name, nn.ModuleList(layers))

    def dequantized(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The dequantized weights of each projection, in a dtype and in the order of the model's parameters."""
        result = {}
        for name, projection in self.layout.projections.items():
            layers: Any = getattr(self, name)
            weights = [layer.dequantize().to(dtype) for layer in layers]
            result[name] = torch.stack([weight.t() if projection.transposed else weight for weight in weights])
            if layers[0].bias is not None:
                result[name + BIAS] = torch.stack([layer.bias.data for layer in layers])
        return result

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
