"""Training: layers that multiply in int8 and keep their weight in floating point, and adapters merged into int8.

The products are those of LLM.int8() (Dettmers et al. 2022, appendix on training, as bitsandbytes implements it): y and
the weight's gradient in int8 with outlier columns in floating point, x's gradient through the quantized weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize8.errors import SourceError
from quantize8.model.linear import Int8Linear, quantize
from quantize8.ops import cpu
from quantize8.ops.operator import linear
from quantize8.ops.reference import DEFAULT_THRESHOLD, INT8_MAX, OutlierMode


class TrainableInt8Linear(nn.Linear):
    """A linear layer whose weight [N, K] stays in floating point, is quantized when it has changed, and is trained.

    transposed: whether it stands for a Conv1D, which is stored [K, N].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = DEFAULT_THRESHOLD,
        mode: OutlierMode = "dynamic",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.threshold, self.mode, self.transposed = threshold, mode, False
        self._quantized: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        product: Tensor = _Int8Product.apply(flat, self.weight, self.bias, self)
        return product.view(*x.shape[:-1], self.out_features)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and absmax float32 [N] of the weight as it is now."""
        weight = self.weight.detach()
        state = (weight.data_ptr(), weight._version)
        if self._quantized is None or self._quantized[0] != state:
            self._quantized = (state, *quantize(weight))
        return self._quantized[1], self._quantized[2]

    def dequantize(self) -> Tensor:
        """The weight that is kept, float32 [N, K]."""
        return self.weight.detach().float()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: codes are made anew."""
        return {**self.__dict__, "_quantized": None}


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: TrainableInt8Linear) -> Tensor:
        codes, absmax = layer.codes()
        ctx.save_for_backward(x, codes, absmax)
        ctx.threshold, ctx.dtype, ctx.bias = layer.threshold, weight.dtype, None if bias is None else bias.dtype
        product: Tensor = linear(x, codes, absmax, bias, layer.threshold, layer.mode)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, absmax = ctx.saved_tensors
        gradient = gradients[0].float()
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = ((gradient * (absmax / INT8_MAX)) @ codes.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = weight_gradient(gradient, x.float(), ctx.threshold).to(ctx.dtype)
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            to_bias = gradient.sum(0).to(ctx.bias)
        return to_x, to_weight, to_bias, None


def weight_gradient(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """gradient [M, N] transposed times x [M, K], both float32: [N, K], in int8 but for x's outlier columns.

    Each output and each feature has one scale over the tokens. On a GPU the product is in floating point.
    """
    if gradient.is_cuda:
        return gradient.t() @ x
    left, left_scale, _ = cpu.quantize_activations(gradient.t().contiguous(), 0)
    right, right_scale, _ = cpu.quantize_activations(x.t().contiguous(), 0)
    product = cpu.int8_matmul(left, right).float().mul_(left_scale[:, None]).mul_(right_scale)
    columns = (x.abs() >= threshold).any(0).nonzero().flatten() if threshold > 0 else None
    if columns is not None and len(columns):
        product[:, columns] = gradient.t() @ x[:, columns]
    return product


def merge_and_unload(model: Any) -> Any:
    """Merge the adapters of a PEFT model into its int8 layers: dequantized, added to, and quantized again.

    Args: model, a peft.PeftModel over a model of ours. Returns: the model itself, without adapters, in int8.
    Raises: SourceError where the model has no adapters to merge.
    """
    if not hasattr(model, "merge_and_unload"):
        raise SourceError(f"{type(model).__name__}: has no adapters to merge; pass the PEFT model")
    merged: list[tuple[Any, Int8Linear]] = []
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, Int8Linear):
            plain = nn.Linear(base.in_features, base.out_features, False, device="meta")
            plain.weight = nn.Parameter(base.dequantize(), requires_grad=False)
            plain.bias = base.bias
            module.base_layer = plain
            merged.append((plain, base))
    result = model.merge_and_unload()
    layers = dict(merged)
    for name, module in list(result.named_modules()):
        if module in layers:
            old = layers[module]
            new = Int8Linear.from_float(module, old.threshold)
            new.mode, new.transposed = old.mode, old.transposed
            result.set_submodule(name, new)
    return result
