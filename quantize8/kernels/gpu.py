"""The GPU path: the functions of `reference` on CUDA tensors, computed by the kernels in `cuda/`.

The functions only launch kernels and, except for `DeviceStats.read_into`, never read a result back, so all of them can
be captured in a CUDA graph. A linear layer takes one launch at decode, and at prefill two after a bit mask is cleared:
activations with their outlier list, then the product with everything else. A rotated layer takes two at decode: the
rotation, then the product; at prefill the activations are rotated as they are quantized.
Arguments are torch tensors on one GPU. A DependencyError is raised where kernels cannot run on it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quantize8.errors import DeviceWarning
from quantize8.kernels import cuda as kernels
from quantize8.kernels.cuda import CHUNK, TENSOR_CORES, WARP, Capability, ceil_div
from quantize8.kernels.launch import gpu_of
from quantize8.kernels.reference import (
    DECODE_TOKENS,
    INT8_MAX,
    STATS_TILE_ROWS,
    ColumnStats,
    Int8Weight,
    LayerMode,
    check_rotation,
    fixed_columns,
)

_ROWS_OF_A_BLOCK = 16  # rows per block of quantize_rowwise without statistics; with them a block sums a whole tile
_LIBRARY_TOKENS = 24  # the least M, a multiple of 8 above 16, that torch._int_mm accepts on all systems
_LIBRARY_MULTIPLE = 8  # torch._int_mm needs K and N to be multiples of this
GpuMode = Literal["dynamic", "static"]  # modes that have kernels
_int_mm = torch._int_mm  # cuBLAS's product; tests without a GPU replace it with an exact one on the CPU


@dataclass(frozen=True)
class Activations:
    """Quantized activations [M, K] on a GPU. The number of outlier columns stays there too, so no launch waits."""

    codes: Tensor  # int8 [M, K]
    scale: Tensor  # float32 [M]
    outliers: Tensor | None  # int32 [K]: the first `count` entries are the outlier columns, ascending
    count: Tensor | None  # int32 [1], the number of outlier columns


@dataclass
class DeviceStats:
    """`reference.ColumnStats` on a GPU, where the outlier counts are int32 [K]."""

    absmax: Tensor
    sum_square: Tensor
    sum_error: Tensor
    outliers: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> DeviceStats:
        """Statistics of zero rows, for a weight with this many columns."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(columns, dtype=dtype, device=device)

        return cls(zeros(torch.float32), zeros(torch.float64), zeros(torch.float64), zeros(torch.int32))

    def read_into(self, stats: ColumnStats) -> None:
        """Wait for the GPU, and replace the statistics in `stats` with these."""
        stats.absmax, stats.sum_square, stats.sum_error = (
            values.cpu().numpy() for values in (self.absmax, self.sum_square, self.sum_error)
        )
        stats.outliers, stats.rows = self.outliers.cpu().numpy().astype(np.int64), self.rows


def quantize_rowwise(weight: Tensor, stats: DeviceStats | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rowwise`, and in the same pass `reference.column_stats`.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        stats: Column statistics to which these rows are added; its rows so far must be a multiple of 64.

    Returns:
        Codes int8 [N, K], and absmax float32 [N], not finite where a row cannot be quantized.
    """
    weight = _dense(weight)
    rows, columns = weight.shape
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    if not weight.numel():
        return codes, weight.new_zeros(rows, dtype=torch.float32)
    absmax = weight.new_empty(rows, dtype=torch.float32)
    gpu = gpu_of(weight.device.index)
    kernel = kernels.quantize_rowwise(kernels.number_of(weight), columns, stats is not None)
    sizes = (rows, columns, kernels.rows_at_once(columns))
    if stats is None:
        grid = (ceil_div(rows, _ROWS_OF_A_BLOCK), 1)
        gpu.launch(kernel, grid, [weight, codes, absmax, None, None, None, None, *sizes, _ROWS_OF_A_BLOCK])
        return codes, absmax
    tiles = ceil_div(rows, STATS_TILE_ROWS)
    square, error = weight.new_empty((2, tiles, columns), dtype=torch.float32)
    columnwise = (square, error, stats.absmax, stats.outliers)
    gpu.launch(kernel, (tiles, 1), [weight, codes, absmax, *columnwise, *sizes, STATS_TILE_ROWS])
    adding = kernels.add_tiles()
    grid = (ceil_div(columns, adding.threads), 1)
    gpu.launch(adding, grid, [square, error, stats.sum_square, stats.sum_error, tiles, columns])
    stats.rows += rows
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.dequantize`, rounded to a dtype.

    Args:
        codes: int8 [N, K].
        absmax: float32 [N].
        dtype: float16, bfloat16 or float32.

    Returns:
        The weight [N, K] in that dtype.
    """
    weight = codes.new_empty(codes.shape, dtype=dtype)
    if weight.numel():
        kernel = kernels.dequantize(kernels.number_of(weight))
        gpu_of(codes.device.index).launch(kernel, (len(codes), 1), [codes.contiguous(), absmax, weight, codes.shape[1]])
    return weight


def quantize_activations(x: Tensor, threshold: float, rotation: int = 0) -> Activations:
    """`reference.quantize_activations` with a list of the outlier columns instead of a mask.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        threshold: Elements with |x| >= threshold are outliers; with 0 there are none, and no list.
        rotation: Size of the blocks in which x is rotated first, without outliers then; 0 for none.
    """
    x = _dense(x)
    tokens, columns = x.shape
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(tokens, dtype=torch.float32)
    mask = outliers = count = None
    if threshold > 0 and not rotation:
        mask = x.new_zeros(ceil_div(columns, 32) + 1, dtype=torch.int32)
        outliers, count = x.new_empty(columns, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)
    kernel = kernels.quantize_activations(kernels.number_of(x), columns, rotation)
    arguments = [x, codes, scale, mask, outliers, count, float(threshold), columns]
    if tokens:
        gpu_of(x.device.index).launch(kernel, (tokens, 1), arguments)
    return Activations(codes, scale, outliers, count)


def rotate(x: Tensor, size: int) -> Tensor:
    """`reference.rotate`.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        size: One of `reference.ROTATIONS` that divides K.

    Returns:
        float32 [M, K].

    Raises:
        WeightError: The size does not fit K.
    """
    x = _dense(x)
    check_rotation(size, x.shape[1])
    rotated = x.new_empty(x.shape, dtype=torch.float32)
    if x.numel():
        kernel = kernels.rotate(kernels.number_of(x), size)
        gpu_of(x.device.index).launch(kernel, (len(x), 1), [x, rotated, x.shape[1]])
    return rotated


def mixed_matmul(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: GpuMode = "dynamic"
) -> Tensor:
    """`reference.mixed_matmul`, summed in float32.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: The quantized weight [N, K].
        bias: [N] or None.
        threshold: Outlier threshold of mode "dynamic"; 0 for none.
        mode: "dynamic" or "static"; not used for a rotated weight.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: The mode is "static" and the weight has no stored columns.
    """
    if mode == "static" and not weight.rotation:
        return _static_matmul(x, weight, bias)
    x = _dense(x)
    (tokens, columns), rows = x.shape, len(weight.codes)
    y = x.new_empty((tokens, rows))
    if not y.numel():
        return y
    gpu = gpu_of(x.device.index)
    quantized = quantize_activations(x, threshold, weight.rotation)
    codes = _dense(weight.codes)
    operands = [quantized.codes, quantized.scale, codes, weight.absmax, _like(bias, x)]
    rest = [x, quantized.outliers, quantized.count, y, tokens, rows, columns]
    if _on_tensor_cores(x, columns, gpu.capability):
        tile = kernels.choose_tile(gpu.capability, gpu.processors, tokens, rows)
        kernel = kernels.mixed(kernels.number_of(x), tile)
        gpu.launch(kernel, tile.blocks(tokens, rows), [*operands, *rest])
    else:
        sums = _library_matmul(quantized.codes, codes)
        kernel = kernels.mixed_epilogue(kernels.number_of(x))
        grid = (tokens * ceil_div(rows, kernel.threads), 1)
        gpu.launch(kernel, grid, [sums, *operands, *rest, sums.shape[1]])
    return y


def _static_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """Mode static: the kernel multiplies all columns but the outlier columns, and torch multiplies these.

    The sum of both is rounded to x's dtype, which is one rounding more than in the other modes. No launch waits for the
    host.
    """
    columns = fixed_columns(weight, "static").long()
    plain = Int8Weight(weight.codes, weight.absmax)
    product = mixed_matmul(x.index_fill(1, columns, 0), plain, bias, 0.0)
    outlier_weight = _dequantized(weight, columns)
    outlier_weight[:, : weight.outlier_weight.shape[1]] = weight.outlier_weight
    return product.addmm_(x.index_select(1, columns), outlier_weight.to(x.dtype).t())


def weight_only_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """`reference.weight_only_matmul`, summed in float32.

    The difference between exact stored columns and their codes is added by a product of torch's, with one rounding
    more.

    Args:
        x: float16, bfloat16 or float32 [M, K] with M <= 16.
        weight: The quantized weight [N, K].
        bias: [N] or None.

    Returns:
        [M, N] in x's dtype.
    """
    product = _weight_only(x, weight, bias)
    if weight.outlier_columns is None or not weight.outlier_weight.shape[1]:
        return product
    columns = weight.outlier_columns[: weight.outlier_weight.shape[1]].long()
    difference = weight.outlier_weight.float() - _dequantized(weight, columns)
    return product.addmm_(x.index_select(1, columns), difference.to(x.dtype).t())


def _dequantized(weight: Int8Weight, columns: Tensor) -> Tensor:
    """The columns int64 [J] of a weight, dequantized from its codes: float32 [N, J]."""
    values: Tensor = weight.codes.index_select(1, columns).float().mul_((weight.absmax / INT8_MAX)[:, None])
    return values


def _weight_only(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    x = _dense(x)
    (tokens, columns), rows = x.shape, len(weight.codes)
    y = x.new_empty((tokens, rows))
    if not y.numel():
        return y
    gpu, number, bias = gpu_of(x.device.index), kernels.number_of(x), _like(bias, x)
    if weight.rotation:
        x, kernel = rotate(x, weight.rotation), kernels.weight_only_any(number, columns, rotated=True)
        rows_of_a_block = kernel.threads // WARP
    elif _on_tensor_cores(x, columns, gpu.capability):
        kernel, rows_of_a_block = kernels.weight_only(number, tokens), 16
    else:
        kernel = kernels.weight_only_any(number, columns)
        rows_of_a_block = kernel.threads // WARP
    arguments = [x, _dense(weight.codes), weight.absmax, bias, y, tokens, rows, columns]
    gpu.launch(kernel, (ceil_div(rows, rows_of_a_block), 1), arguments)
    return y


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: LayerMode = "dynamic") -> Tensor:
    """`reference.linear`.

    A mode without a kernel is replaced with the closest one that has a kernel, with a DeviceWarning once per process.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: The quantized weight [N, K].
        bias: [N] or None.
        threshold: Outlier threshold; 0 for none.
        mode: The outlier mode.

    Returns:
        [M, N] in x's dtype.
    """
    computed = _with_kernel(mode, weight)
    if len(x) <= DECODE_TOKENS:
        return weight_only_matmul(x, weight, bias)
    return mixed_matmul(x, weight, bias, threshold, computed)


def _with_kernel(mode: LayerMode, weight: Int8Weight) -> GpuMode:
    if weight.rotation:
        return "dynamic"  # a rotated weight has no outliers in any mode
    if mode == "dynamic" or mode == "static":
        return mode
    if mode == "hybrid" and weight.outlier_columns is not None and len(weight.outlier_columns):
        _say("a GPU has no kernel for mode hybrid; using only its stored columns")
        return "static"
    # bitsandbytes' own GPU kernels round differently from its CPU code, and are not reproduced here
    _say(f"a GPU has no kernel for mode {mode}; using mode dynamic")
    return "dynamic"


@cache
def _say(message: str) -> None:
    warnings.warn(f"{message}; a CPU supports this mode", DeviceWarning, stacklevel=2)


def _on_tensor_cores(x: Tensor, columns: int, capability: Capability) -> bool:
    """Whether the fast kernels can be used: 16-bit numbers, K a multiple of CHUNK, a GPU with their instructions."""
    return capability >= TENSOR_CORES and x.element_size() == 2 and columns % CHUNK == 0


def _library_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product int32 [>= M, >= N] of a int8 [M, K] and b int8 [N, K], padded with zeros to shapes of the library."""
    rows = max(_LIBRARY_TOKENS, ceil_div(len(a), _LIBRARY_MULTIPLE) * _LIBRARY_MULTIPLE) - len(a)
    columns, depth = (-size % _LIBRARY_MULTIPLE for size in b.shape)
    if rows or depth:
        a = torch.nn.functional.pad(a, (0, depth, 0, rows))
    if columns or depth:
        b = torch.nn.functional.pad(b, (0, depth, 0, columns))
    return _int_mm(a, b.t())


def _dense(x: Tensor) -> Tensor:
    """x in row-major order, starting at an address that is a multiple of 16, as vector loads need.

    x is copied only where it does not meet this: where it is a slice, or a view into a file's bytes.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % CHUNK else x


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
