"""A linear layer on the CPU: a weight in the order in which the int8 unit reads it, and one call of cpu/linear.c.

At prefill each token becomes one row of int8 codes. The residual of the outlier columns is added in float32, or in
modes static and hybrid in integers. At decode (M <= 16) activations keep their precision. For a rotated weight, each
token is rotated as it is read. See cpu/linear.c for details.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from quantize8.errors import WeightError
from quantize8.kernels import cpu
from quantize8.kernels.cpu import BLOCK_N, GROUP_K, LARGEST_K, STEP_BYTES, STEP_K, LinearCall, Unit
from quantize8.kernels.reference import INT8_MAX, LayerMode, check_rotation

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dtype of cpu/quantize8.h
_MODES = {"dynamic": 0, "static": 1, "hybrid": 2}  # enum mode of cpu/linear.c
_SECOND_DIGIT = 254  # the second digit of an exact weight is in units of 1/254 step; 254 is twice the largest code
_SHARING: set[Unit] = set()  # units whose library already uses torch's threads


class PackedWeight:
    """An int8 weight [N, K] with its scales, in the layout of the CPU's int8 units.

    With outlier columns (`wide` and `exact`) it multiplies in the modes static and hybrid only, without them in mode
    dynamic only. If it is rotated, no mode has outliers.

    Args:
        codes: int8 [N, K].
        absmax: float32 [N].
        unit: The unit that multiplies; None for the best one.
        wide: int [J], the outlier_columns of an Int8Weight.
        exact: float16 [N, E], the outlier_weight of an Int8Weight.
        rotation: Size of the blocks in which the codes are rotated; 0 for none. Then `wide` and `exact` are None.

    Raises:
        WeightError: int32 sums cannot hold K products, an outlier column is not in 0 to K - 1, or the rotation does not
            fit K.
    """

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        unit: Unit | None = None,
        wide: Tensor | None = None,
        exact: Tensor | None = None,
        rotation: int = 0,
    ) -> None:
        check_rotation(rotation, codes.shape[1])
        if codes.shape[1] > LARGEST_K:
            raise WeightError(
                f"a layer with {codes.shape[1]} input features: int32 sums hold at most {LARGEST_K}; keep it in float"
            )
        self.shape = (codes.shape[0], codes.shape[1])
        self._library = _library(unit or cpu.chosen())
        self.scale = _blocks(absmax / INT8_MAX)
        self.static: StaticColumns | None = None
        if wide is None or exact is None:
            self.tiles, self.code_sums = self._pack(codes)
        else:
            wide = wide.long()
            if len(wide) and not 0 <= int(wide.min()) <= int(wide.max()) < codes.shape[1]:
                raise WeightError(
                    f"an outlier column is not in 0 to {codes.shape[1] - 1}; convert or calibrate the model again"
                )
            second = _second_digits(codes, absmax, wide[: exact.shape[1]], exact)
            self.tiles, self.code_sums = self._pack(codes, second)
            self.static = StaticColumns(wide, exact.shape[1], *self._pack(codes[:, wide]))
        self.rotation = rotation
        self._call = _call_of(self.parts, self.shape, self.static, rotation)

    def _pack(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Pack matrices of codes int8 [N, K_i] side by side, each padded to whole steps of K.

        Returns: tiles int8 [ceil(N / 32), steps, 2048], and the sum of each row's codes, int32 [ceil(N / 32), 32].
        """
        blocks, steps = -(-self.shape[0] // BLOCK_N), [-(-part.shape[1] // STEP_K) for part in parts]
        tiles = torch.zeros(blocks, sum(steps), STEP_BYTES, dtype=torch.int8)
        sums, step = torch.zeros(blocks, BLOCK_N, dtype=torch.int32), 0
        for part, count in zip(parts, steps, strict=True):
            rows = part.contiguous()
            self._library.q8_pack(
                rows.data_ptr(), *rows.shape, step, sum(steps), _threads(), tiles.data_ptr(), sums.data_ptr()
            )
            step += count
        return tiles, sums

    def codes(self) -> Tensor:
        """The codes int8 [N, K] in row-major order, unpacked."""
        codes = torch.empty(self.shape, dtype=torch.int8)
        self._library.q8_unpack(self.tiles.data_ptr(), *self.shape, self.tiles.shape[1], _threads(), codes.data_ptr())
        return codes

    def columns(self, columns: Tensor) -> Tensor:
        """The codes int8 [N, J] of the given columns int [J]."""
        blocks, steps, _ = self.tiles.shape
        tiles = self.tiles.view(blocks, steps, 2, STEP_K // GROUP_K, BLOCK_N // 2, GROUP_K)
        offset = columns % STEP_K
        codes = tiles[:, columns // STEP_K, :, offset // GROUP_K, :, offset % GROUP_K]  # [J, blocks, 2, 16]
        return codes.reshape(len(columns), blocks * BLOCK_N)[:, : self.shape[0]].t().contiguous()

    def multiply(self, codes: Tensor) -> Tensor:
        """The product of codes int8 [M, K] and the weight's transposed codes: int32 [M, N], exact."""
        codes, sums = codes.contiguous(), torch.empty(len(codes), self.shape[0], dtype=torch.int32)
        cpu.check(
            self._library.q8_multiply(
                codes.data_ptr(), *codes.shape, self.tiles.data_ptr(), self.code_sums.data_ptr(), self.shape[0],
                _threads(), sums.data_ptr(),
            )
        )  # fmt: skip
        return sums

    @property
    def parts(self) -> list[Tensor]:
        """The tensors of this weight, as `packed_linear` takes them: a torch operator cannot take the object."""
        parts = [self.tiles, self.scale, self.code_sums]
        if self.static is not None:
            parts += [self.static.wide, self.static.wide[: self.static.exact], self.static.tiles, self.static.code_sums]
        return parts

    def linear(self, x: Tensor, bias: Tensor | None, threshold: float, mode: LayerMode) -> Tensor:
        """`reference.linear` with this weight.

        Args:
            x: float16, bfloat16 or float32 [M, K].
            bias: [N] or None.
            threshold: Outlier threshold of mode "dynamic"; 0 for none.
            mode: "static" or "hybrid" for a weight with outlier columns, else "dynamic".

        Returns:
            [M, N] in x's dtype.

        Raises:
            MemoryError: The kernel cannot allocate its buffers.
        """
        return _linear(self._library, LinearCall.from_buffer_copy(self._call), x, bias, threshold, mode)

    def encode(self, x: Tensor, threshold: float, mode: LayerMode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The codes of activations that prefill multiplies.

        Args:
            x: float16, bfloat16 or float32 [M, K].
            threshold: Outlier threshold of mode "dynamic"; 0 for none.
            mode: As in `linear`.

        Returns:
            The low digits int8 [M, K]; the high digits int8 [M, K] of outliers in modes static and hybrid; the scale of
            a low digit float32 [M]; the outlier columns of mode dynamic, bool [K].
        """
        return _encode(self._library, LinearCall.from_buffer_copy(self._call), x, threshold, mode)


class StaticColumns:
    """The outlier columns of a packed weight, for modes static and hybrid.

    Args:
        wide: int64 [J], the outlier columns.
        exact: How many of them, the first ones, have a second digit.
        tiles: Packed codes of these columns.
        sums: Sum of each row of these codes, int32 [ceil(N / 32), 32].
    """

    def __init__(self, wide: Tensor, exact: int, tiles: Tensor, sums: Tensor) -> None:
        self.wide, self.exact, self.tiles, self.code_sums = wide.contiguous(), exact, tiles, sums


def encode(x: Tensor, threshold: float, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """`cpu.quantize_activations`, whose arguments and errors it shares."""
    check_rotation(rotation, x.shape[1])
    call = LinearCall(columns=x.shape[1], rotation=rotation)
    codes, _, scale, _ = _encode(_library(cpu.chosen()), call, x, threshold, "dynamic")
    return codes, scale


def rotate(values: Tensor, size: int) -> Tensor:
    """`reference.rotate` of values [R, K] in any floating-point dtype: float32 [R, K]."""
    check_rotation(size, values.shape[1])
    rotated = values.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    _library(cpu.chosen()).q8_rotate(rotated.data_ptr(), *rotated.shape, size)
    return rotated


def linear(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    threshold: float,
    mode: str,
    rotation: int = 0,
) -> Tensor:
    """`PackedWeight.linear` for a weight that is given by its `parts`.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        parts: The `parts` of a PackedWeight.
        bias: [N] or None.
        out_features: N.
        threshold: Outlier threshold of mode "dynamic"; 0 for none.
        mode: As in `PackedWeight.linear`.
        rotation: The `rotation` of the PackedWeight.

    Returns:
        [M, N] in x's dtype.
    """
    static = None
    if len(parts) > 3:
        wide, exact, tiles, sums = parts[3:]
        static = StaticColumns(wide, len(exact), tiles, sums)
    call = _call_of(parts, (out_features, x.shape[1]), static, rotation)
    return _linear(_library(cpu.chosen()), call, x, bias, threshold, mode)


def _call_of(parts: list[Tensor], shape: tuple[int, int], static: StaticColumns | None, rotation: int) -> LinearCall:
    """The fields of a LinearCall that are the same for every call with a weight [N, K]."""
    tiles, scale, sums = parts[:3]
    call = LinearCall(
        weight=tiles.data_ptr(), scale=scale.data_ptr(), code_sums=sums.data_ptr(), outputs=shape[0], columns=shape[1]
    )
    call.rotation = rotation
    if static is not None:
        call.wide, call.wide_count, call.exact = static.wide.data_ptr(), len(static.wide), static.exact
        call.apart, call.apart_sums = static.tiles.data_ptr(), static.code_sums.data_ptr()
    return call


def _linear(library: Any, call: LinearCall, x: Tensor, bias: Tensor | None, threshold: float, mode: str) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape[0], call.outputs, dtype=x.dtype)
    if bias is not None:
        bias = bias.detach().float().contiguous()
        call.bias = bias.data_ptr()
    call.out = out.data_ptr()
    _set_input(call, x, threshold, mode)
    cpu.check(library.q8_linear(byref(call)))
    return out


def _encode(
    library: Any, call: LinearCall, x: Tensor, threshold: float, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    low, high = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape, dtype=torch.int8)
    scale, counts = torch.empty(len(x)), torch.zeros(x.shape[1], dtype=torch.int32)
    _set_input(call, x, threshold, mode)
    cpu.check(library.q8_encode(byref(call), *(output.data_ptr() for output in (low, high, scale, counts))))
    return low, high, scale, counts > 0


def _set_input(call: LinearCall, x: Tensor, threshold: float, mode: str) -> None:
    call.x, call.tokens, call.dtype = x.data_ptr(), x.shape[0], _DTYPES[x.dtype]
    call.threshold, call.threads = threshold, _threads()
    call.mode = _MODES["dynamic" if call.rotation else mode]


def _library(unit: Unit) -> Any:
    """The kernels of a unit, set up to run on torch's threads."""
    loaded = cpu.library(unit)
    if unit not in _SHARING:
        cpu.share_threads(loaded)
        _SHARING.add(unit)
    return loaded


def _threads() -> int:
    return torch.get_num_threads()


def _second_digits(codes: Tensor, absmax: Tensor, columns: Tensor, exact: Tensor) -> Tensor:
    """The difference between exact float16 [N, E] and the codes of its columns, in units of 1/254 step: int8 [N, E]."""
    inverse = torch.where(absmax > 0, INT8_MAX / absmax, torch.zeros_like(absmax))[:, None]
    rest = (exact.float() * inverse - codes[:, columns]) * _SECOND_DIGIT
    return rest.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def _blocks(values: Tensor) -> Tensor:
    """Values [N] of the output features as [ceil(N / 32), 32], padded with zeros."""
    padded = torch.zeros(-(-len(values) // BLOCK_N), BLOCK_N, dtype=values.dtype)
    padded.view(-1)[: len(values)] = values
    return padded
