"""Training: layers that multiply in int8 with a weight kept in floating point, and merging of adapters into int8.

The products are those of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, appendix on training), as bitsandbytes
implements them: the output and the weight's gradient are computed in int8, with outlier columns in floating point; the
gradient of the input is computed through the quantized weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantize8.errors import SourceError, WeightError
from quantize8.kernels import cpu
from quantize8.kernels.devices import default_mode
from quantize8.kernels.operator import linear, rotate
from quantize8.kernels.reference import DEFAULT_THRESHOLD, INT8_MAX, LayerMode
from quantize8.runtime.linear import Int8Linear, checked_quantize, quantize

_ON_A_CODE = 1e-4  # a value within this many steps of a code differs from it by float32 rounding only


class TrainableInt8Linear(nn.Linear):
    """A linear layer whose weight [N, K] stays in floating point and is trained; its products are in int8.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the layer has a bias.
        threshold: Outlier threshold; 0 for none.
        mode: Outlier mode; None for the default of the device that the layer is on.
        device: Device of weight and bias.
        dtype: Dtype of weight and bias.

    Attributes:
        transposed: Whether the layer replaces a Conv1D, whose weight is [K, N] in a state_dict.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = DEFAULT_THRESHOLD,
        mode: LayerMode | None = "dynamic",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.threshold, self.chosen_mode, self.transposed = threshold, mode, False
        self._cached: tuple[Tensor, int, Tensor, Tensor] | None = None  # weight, its version, codes, absmax

    @property
    def mode(self) -> LayerMode:
        """The outlier mode that the layer computes in: `chosen_mode`, or the default for the layer's device."""
        weight: Any = self._parameters["weight"]
        return self.chosen_mode or default_mode(weight.device.type)

    @mode.setter
    def mode(self, value: LayerMode | None) -> None:
        self.chosen_mode = value

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer for x [..., K]: [..., N] in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        weight = self._parameters["weight"]  # not self.weight, which would discard the cached codes
        product: Tensor = _Int8Product.apply(flat, weight, self.bias, *self.codes(), self.threshold, self.mode)
        return product.view(*x.shape[:-1], self.out_features)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and absmax float32 [N] of the current weight.

        They are computed in each forward of training, since some optimizers (those of bitsandbytes) change a weight
        without changing its version. Otherwise they are cached until the layer changes. The one change that is not
        noticed is a write, between two forwards without gradients, to `.data` of a parameter that was taken from the
        layer before.
        """
        parameter: Any = self._parameters["weight"]
        weight, version = parameter.detach(), parameter._version
        trained = torch.is_grad_enabled() and parameter.requires_grad
        cached = self._cached  # includes the weight itself, so that no new weight can have its address
        if cached is not None and not trained and (cached[0].data_ptr(), cached[1]) == (weight.data_ptr(), version):
            return cached[2], cached[3]
        with torch.inference_mode(False):  # gradients may be computed from the cached codes later
            codes, absmax = quantize(weight)
        self._cached = None if trained else (weight, version, codes, absmax)
        return codes, absmax

    def dequantize(self) -> Tensor:
        """The floating-point weight, as float32 [N, K]."""
        return self.weight.detach().float()

    def __getattr__(self, name: str) -> Any:
        """As in nn.Module; reading `weight` discards the cached codes.

        The caller may write to its `.data`, as PEFT does to merge, and that does not change its version.
        """
        if name == "weight":
            self.__dict__["_cached"] = None
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copy and pickle, without the cached codes."""
        return {**self.__dict__, "_cached": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableInt8Linear:
        self._cached = None
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:  # as in the source: Trainer saves and resumes through the state_dict
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t().contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        if self.transposed and name in state_dict:
            state_dict = {**state_dict, name: state_dict[name].t()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        threshold: float,
        mode: LayerMode,
    ) -> Tensor:
        ctx.save_for_backward(x, codes, absmax)
        ctx.threshold, ctx.dtype, ctx.bias = threshold, weight.dtype, None if bias is None else bias.dtype
        product: Tensor = linear(x, codes, absmax, bias, threshold, mode)
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
        return to_x, to_weight, to_bias, None, None, None, None


def weight_gradient(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The gradient of a weight: gradient^T x, computed in int8 except for the outlier columns of x.

    Each output and each input feature has one scale over all tokens. On a GPU the product is in floating point.

    Args:
        gradient: Gradient of the output, float32 [M, N].
        x: Input, float32 [M, K].
        threshold: Columns of x with any |x| >= threshold are outlier columns; 0 for none.

    Returns:
        float32 [N, K].
    """
    if gradient.is_cuda:
        return gradient.t() @ x
    left, left_scale = cpu.quantize_activations(gradient.t().contiguous())
    right, right_scale = cpu.quantize_activations(x.t().contiguous())
    product = cpu.int8_matmul(left, right).float().mul_(left_scale[:, None]).mul_(right_scale)
    columns = (x.abs() >= threshold).any(0).nonzero().flatten() if threshold > 0 else None
    if columns is not None and len(columns):
        product[:, columns] = gradient.t() @ x[:, columns]
    return product


def merge_and_unload(model: Any) -> Any:
    """Merge the adapters of a PEFT model into its int8 layers, which are quantized again with stochastic rounding.

    Args:
        model: A peft.PeftModel on a model with quantize8's layers.

    Returns:
        The model itself, in int8 and without adapters.

    Raises:
        SourceError: The model has no adapters to merge, or PEFT cannot merge this kind of adapter.
        WeightError: A merged weight cannot be int8. The layers before it are already merged then.
    """
    if not hasattr(model, "merge_and_unload"):
        raise SourceError(f"{type(model).__name__}: has no adapters to merge; pass the PEFT model")
    adapted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), Int8Linear)
    }
    for name, module in adapted.items():
        try:
            _merge(module)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from None
        except NotImplementedError:
            raise SourceError(
                f"{name}: PEFT cannot merge {type(module).__name__}; use the adapter without merging it"
            ) from None
        model.set_submodule(name, module.base_layer)
    return model.merge_and_unload()


def _merge(module: Any) -> None:
    """Merge the adapter of one layer.

    PEFT's adapters for 8-bit layers assign the merged weight to the layer. Other adapters add to the weight of a
    floating-point layer, which takes the int8 layer's place meanwhile.
    """
    layer: Int8Linear = module.base_layer
    if hasattr(layer, "state"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Merge .* module to 8-bit linear")
            module.merge()
        return
    plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
    plain.weight, plain.bias = nn.Parameter(layer.dequantize(), requires_grad=False), layer.bias
    module.base_layer = plain
    try:
        module.merge()
        requantize(layer, plain.weight.detach())
    finally:
        module.base_layer = layer


def requantize(layer: Int8Linear, weight: Tensor) -> None:
    """Quantize a weight to which something was added, with stochastic rounding, and give it to its layer.

    The stored outlier columns are updated in the same way; they are stored in float16, so their codes are rounded to
    nearest.

    Args:
        layer: The layer, still with the weight before the addition.
        weight: The new weight [N, K] in floating point.

    Raises:
        WeightError: A row holds NaN, infinity or a |w| beyond float16.
    """
    weight, columns, exact = weight.detach().float(), layer.outlier_columns, layer.outlier_weight
    stored = None if columns is None or exact is None else columns[: exact.shape[1]].long()
    if stored is not None and exact is not None:
        added = (weight - layer.dequantize())[:, stored]
        weight = weight.index_copy(1, stored, exact.float() + added)
    if layer.rotation:
        weight = rotate(weight, layer.rotation)
    nearest, absmax = checked_quantize(weight)
    codes = dithered_codes(weight, absmax)
    if stored is not None:
        codes[:, stored], layer.outlier_weight = nearest[:, stored], weight[:, stored].half()
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.SCB.data = absmax


def dithered_codes(weight: Tensor, absmax: Tensor) -> Tensor:
    """Codes of a weight by stochastic rounding with a fixed seed, so that the same weight gets the same codes.

    A merged weight equals the old codes plus what the adapter adds, which is mostly less than half a step. Rounding to
    nearest would remove that; stochastic rounding preserves it on average.

    Args:
        weight: [N, K] in floating point.
        absmax: float32 [N].

    Returns:
        int8 [N, K].
    """
    inverse = torch.where(absmax > 0, INT8_MAX / absmax, torch.zeros_like(absmax))
    steps = weight.float() * inverse[:, None]
    nearest = steps.round()
    steps = torch.where((steps - nearest).abs() < _ON_A_CODE, nearest, steps)
    chance = torch.rand(steps.shape, generator=torch.Generator().manual_seed(0)).to(steps.device)
    return (steps + chance).floor().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
