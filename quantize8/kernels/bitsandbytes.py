"""A linear layer as bitsandbytes 0.50 computes it on a CPU, with the same rounding steps and so the same results.

`reference.linear` is closer to the unquantized layer. Here, as in bitsandbytes, activations are first rounded to
float16, and quantized at decode too; whole outlier columns get the code 0 and are multiplied in the activations' dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize8.kernels.reference import INT8_MAX

if TYPE_CHECKING:
    from torch import Tensor

    from quantize8.kernels.packed import PackedWeight

_BOTH_SCALES = 6.200124e-05  # bitsandbytes' float32 constant for 1 / 127^2
_WEIGHT_SCALE = 7.874015718698502e-3  # bitsandbytes' constant for 1 / 127


def linear(x: Tensor, weight: PackedWeight, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Compute a linear layer with the result of bitsandbytes.matmul on a CPU without gradients, bit for bit.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: The packed codes [N, K].
        absmax: float32 [N], the absmax of each row of the weight.
        bias: [N] or None.
        threshold: Columns with an element |x| >= threshold are outlier columns; 0 for none.

    Returns:
        [M, N] in x's dtype.
    """
    import torch

    with torch.autocast("cpu", enabled=False):  # autocast would round products of float32, and of codes, to 16-bit
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
        outlier_weight = (weight.columns(columns) * absmax[:, None] * _WEIGHT_SCALE).to(x.dtype)
        result = result.addmm(x[:, columns], outlier_weight.t())
    return result
