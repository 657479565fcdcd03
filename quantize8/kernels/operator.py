"""The linear layer as torch operators: `quantize8::linear`, on the device of its tensors, and
`quantize8::packed_linear`, on a weight in the layout of a CPU's int8 unit; and `quantize8::rotate`.

All have shape functions (fake implementations), so torch.compile and torch.export can trace them without a graph
break. `quantize8::linear` and `quantize8::rotate` have gradients, so that adapters can be trained. Importing this
module registers all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantize8.kernels.reference import INT8_MAX, Int8Weight, LayerMode

_LIBRARY = torch.library.Library("quantize8", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, float threshold, str mode, "
    "Tensor? outlier_columns=None, Tensor? outlier_weight=None, int rotation=0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] packed, Tensor? bias, int out_features, float threshold, str mode, "
    "int rotation=0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define("rotate(Tensor values, int size) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _on_cpu(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: LayerMode,
    *stored: Any,
) -> Tensor:
    from quantize8.kernels import bitsandbytes, cpu
    from quantize8.kernels.packed import PackedWeight

    weight = Int8Weight(codes, absmax, *stored)
    if mode == "bitsandbytes" and not weight.rotation:
        return bitsandbytes.linear(x, PackedWeight(codes, absmax), absmax, bias, threshold)
    with torch.autocast("cpu", enabled=False):  # as in bitsandbytes.linear: it would round products to 16-bit
        return cpu.linear(x, Int8Weight(codes, absmax, *stored), bias, threshold, mode)


def _on_gpu(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: LayerMode,
    *stored: Any,
) -> Tensor:
    from quantize8.kernels import gpu

    return gpu.linear(x, Int8Weight(codes, absmax, *stored), bias, threshold, mode)


def _rotate_on_cpu(values: Tensor, size: int) -> Tensor:
    from quantize8.kernels import packed

    return packed.rotate(values, size)


def _rotate_on_gpu(values: Tensor, size: int) -> Tensor:
    from quantize8.kernels import gpu

    return gpu.rotate(values, size)


def _packed(x: Tensor, parts: list[Tensor], *rest: Any) -> Tensor:
    from quantize8.kernels import packed

    return packed.linear(x, parts, *rest)


_LIBRARY.impl("linear", _on_cpu, "CPU")
_LIBRARY.impl("linear", _on_gpu, "CUDA")
_LIBRARY.impl("packed_linear", _packed, "CPU")
_LIBRARY.impl("rotate", _rotate_on_cpu, "CPU")
_LIBRARY.impl("rotate", _rotate_on_gpu, "CUDA")


@torch.library.register_fake("quantize8::linear", lib=_LIBRARY)
def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@torch.library.register_fake("quantize8::packed_linear", lib=_LIBRARY)
def _packed_shape(x: Tensor, parts: list[Tensor], bias: Tensor | None, out_features: int, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("quantize8::rotate", lib=_LIBRARY)
def _rotated_shape(values: Tensor, size: int) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.bias, ctx.rotation = None if inputs[3] is None else inputs[3].dtype, inputs[8]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, through the dequantized weight, and of the bias. Codes are exact in every float dtype."""
    codes, absmax = ctx.saved_tensors
    scaled = gradient.float() * (absmax / INT8_MAX)
    numbers = gradient.dtype if gradient.is_cuda else torch.float32  # on a CPU 16-bit is not faster
    to_x = scaled.to(numbers) @ codes.to(numbers) if ctx.needs_input_grad[0] else None
    if to_x is not None:
        to_x = (rotate(to_x, ctx.rotation) if ctx.rotation else to_x).to(gradient.dtype)
    to_bias = gradient.float().sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
    return to_x, None, None, to_bias, None, None, None, None, None


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype, ctx.size = inputs[0].dtype, inputs[1]


def _rotated_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation is symmetric, so that the gradient is rotated as the values were."""
    return rotate(gradient, ctx.size).to(ctx.dtype), None


torch.library.register_autograd("quantize8::linear", _gradient, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("quantize8::rotate", _rotated_gradient, setup_context=_keep_rotation, lib=_LIBRARY)
linear = torch.ops.quantize8.linear.default
packed_linear = torch.ops.quantize8.packed_linear.default
rotate = torch.ops.quantize8.rotate.default
