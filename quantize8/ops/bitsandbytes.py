"""A linear layer as bitsandbytes 0.50 computes it on a CPU, rounding by rounding: what its users can compare with.

It differs from `reference.linear` where that is closer to the original: activations are rounded to float16 first, and
quantized at decode too; whole outlier columns get the code 0, and are multiplied in the activations' dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize8.ops.reference import INT8_MAX

if TYPE_CHECKING:
    from torch import Tensor

    from quantize8.ops.packed import PackedWeight

_BOTH_SCALES = 6.200124e-05  # its constant for 1 / 127^2, in float32
_WEIGHT_SCALE = 7.874015718698502e-3  # and for 1 / 127


def linear(x: Tensor, weight: PackedWeight, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """x [M, K] times packed codes [N, K] with absmax float32 [N], plus bias [N]: [M, N] in x's dtype.

    Equal, bit for bit, to bitsandbytes.matmul on a CPU without gradients.
    """
    import torch

    with torch.autocast("cpu", enabled=False):  # it would round products of float32, and of codes, to 16-bit
        return _steps(x, weight, absmax, bias, threshold)


def _steps(x: Tensor, weight: PackedWeight, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    import torch

    half = x.half()
    columns = None
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(0).nonzero().flatten()
        half = half.masked_fill(outliers, 0)
    peaks = half.abs().amax(1).float() if half.numel() else half.new_zeros(len(half), dtype=torch.float32)
    scaled = half.float() * (float(INT8_MAX) / peaks)[:, None]
    tokens = torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).round_().to(torch.int8)
    if columns is not None:
        tokens[:, columns] = 0
    product = weight.multiply(tokens).float() * (peaks[:, None] * absmax) * _BOTH_SCALES
    result = (product if bias is None else product + bias.float()).to(x.dtype)
    if columns is not None and len(columns):
        beside = (weight.columns(columns) * absmax[:, None] * _WEIGHT_SCALE).to(x.dtype)
        result = result.addmm(x[:, columns], beside.t())
    return result
