"""The CPU path: weight quantization, activation codes and products, computed by the kernels in cpu/*.c.

Weights are NumPy arrays (no torch) and take one fused pass per row, while the row is in cache: float16 rounding,
absmax, codes and column statistics. ctypes releases the GIL, so threads can run these passes in parallel. Activations
and products are torch tensors. Results that `reference` defines as integers or scales equal it bit for bit.

A unit is a set of instructions that multiply int8 codes. `cpu/build.py` compiles all kernels once for each unit. The
best unit of the processor is chosen, and its library loaded. QUANTIZE8_UNIT=avx2, for example, forces another unit, so
that a processor with AMX can also test and time the code for other processors. All units compute the same integers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import ml_dtypes
import numpy as np

from quantize8.errors import DependencyError
from quantize8.kernels.reference import (
    INT8_MAX,
    Array,
    ColumnStats,
    Int8Weight,
    LayerMode,
    fixed_columns,
    scale_limits,
    to_float16,
)
from quantize8.kernels.scales import CLIPS, LEAST_SCALE, ScaleSearch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Unit = Literal["amx", "avx512vnni", "avxvnni", "avx2", "neon-i8mm", "neon-dotprod", "generic"]

UNITS: tuple[Unit, ...] = get_args(Unit)  # fastest first
VARIABLE = "QUANTIZE8_UNIT"
LARGEST_K = 133_144  # largest K whose sums of products of codes fit into int32: 127^2 K < 2^31
BLOCK_N = 32  # output features in a block of a packed weight; see cpu/quantize8.h
STEP_K = 64  # input features in a step
GROUP_K = 4  # input features that are adjacent in memory
STEP_BYTES = BLOCK_N * STEP_K
MEANING: dict[Unit, str] = {
    "amx": "Intel AMX: tiles of int8",
    "avx512vnni": "AVX-512 VNNI: int8 products of 16 outputs at a time",
    "avxvnni": "AVX-VNNI: int8 products of 8 outputs at a time",
    "avx2": "AVX2: exact 16-bit products",
    "neon-i8mm": "Arm i8mm: int8 matrix products",
    "neon-dotprod": "Arm dot products of int8",
    "generic": "no int8 instructions: plain loops, slow",
}
_BITS: dict[Unit, int] = {  # as defined in cpu/detect.c
    "avx2": 1, "avxvnni": 2, "avx512vnni": 4, "amx": 8, "neon-dotprod": 16, "neon-i8mm": 32, "generic": 0
}  # fmt: skip
_FOLDER = Path(__file__).resolve().parent.parent / "cpu"


class LinearCall(Structure):
    """`struct q8_linear` of cpu/linear.c, where its fields are described."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "out", "weight", "scale", "code_sums", "bias")),
        *((name, c_void_p) for name in ("wide", "apart", "apart_sums")),
        *((name, c_int64) for name in ("tokens", "columns", "outputs", "wide_count", "exact")),
        ("threshold", c_float),
        *((name, c_int32) for name in ("dtype", "mode", "threads", "rotation")),
    )


_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "q8_linear": (c_int, (POINTER(LinearCall),)),
    "q8_encode": (c_int, (POINTER(LinearCall), c_void_p, c_void_p, c_void_p, c_void_p)),
    "q8_multiply": (c_int, (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int, c_void_p)),
    "q8_pack": (None, (c_void_p, c_int64, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p)),
    "q8_unpack": (None, (c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p)),
    "q8_quantize_rows": (c_int, (c_int, c_void_p, c_int64, c_int64, c_int, *(c_void_p,) * 6)),
    "q8_search_rows": (
        c_int, (c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_float, c_void_p)
    ),
    "q8_exact_scales": (None, (c_void_p, c_int64, c_int64, c_float, c_float, c_void_p)),
    "q8_all_finite": (c_int, (c_int, c_void_p, c_int64)),
    "q8_add_low_rank": (c_int, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_float)),
    "q8_rotate": (None, (c_void_p, c_int64, c_int64, c_int32)),
    "q8_0_peaks": (None, (c_void_p, c_int64, c_void_p)),
    "q8_0_encode": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "q8_0_search": (None, (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "q8_0_add_squares": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "q8_accumulate": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_int)),
    "q8_factor": (c_int, (c_void_p, c_int64, c_int)),
    "q8_round_codes": (c_int, (*(c_void_p,) * 4, c_int64, c_int64, c_int64, c_int, c_void_p)),
    "q8_ggml_halves": (c_int, (c_int, c_void_p, c_int64, c_void_p)),
    "q8_set_openmp": (None, (c_void_p,)),
}  # fmt: skip
# enum dtype of cpu/quantize8.h
_DTYPES = {np.dtype(np.float32): 0, np.dtype(ml_dtypes.bfloat16): 1, np.dtype(np.float16): 2}
_CLIPS = np.array(CLIPS, np.float32)
_CODES_GIVEN = 2  # what is given to q8_quantize_rows: 0 nothing, 1 absmax, 2 the codes too


def quantize_rowwise(
    weight: Array, stats: ColumnStats | None = None, search: ScaleSearch | None = None, exact: bool = False
) -> tuple[Array, Array]:
    """`reference.quantize_rowwise`, and in the same pass `reference.column_stats`.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        stats: Column statistics to which these rows are added; its rows so far must be a multiple of 64.
        search: Take the absmax of `scales.search_absmax` instead of each row's largest magnitude.
        exact: Take the scale of `reference.exact_scales` for each row that has one and that float16 holds.

    Returns:
        Codes int8 [N, K], and absmax float32 [N], not finite where a row cannot be quantized.

    Raises:
        MemoryError: A kernel cannot allocate its buffers.
        DependencyError: The kernels are not compiled for this machine.
    """
    rows, columns = weight.shape
    codes, absmax = np.empty((rows, columns), np.int8), np.zeros(rows, np.float32)
    stats = ColumnStats.empty(columns) if stats is None else stats
    if weight.size:
        weight, kernels = np.ascontiguousarray(weight), library()
        given = (_DTYPES[weight.dtype], pointer(weight), rows, columns)
        if search is not None:
            importance, kept = search.weights(columns), search.kept(columns)
            how = (pointer(importance), pointer(kept), pointer(_CLIPS), len(_CLIPS), LEAST_SCALE)
            check(kernels.q8_search_rows(*given, *how, pointer(absmax)))
        if exact:
            absmax = _lossless(weight, None if search is None else absmax)
        sums = (stats.absmax, stats.sum_square, stats.sum_error, stats.outliers)
        outputs = [pointer(array) for array in (codes, absmax, *sums)]
        check(kernels.q8_quantize_rows(*given, search is not None or exact, *outputs))
    stats.rows += rows
    return codes, absmax


def column_stats(weight: Array, codes: Array, absmax: Array, stats: ColumnStats) -> None:
    """`reference.column_stats` of rows whose codes are given.

    Args:
        weight: float16, bfloat16 or float32 [N, K].
        codes: int8 [N, K].
        absmax: float32 [N].
        stats: The statistics to which these rows are added; its rows so far must be a multiple of 64.
    """
    rows, columns = weight.shape
    if weight.size:
        weight = np.ascontiguousarray(weight)
        given = (_DTYPES[weight.dtype], pointer(weight), rows, columns, _CODES_GIVEN)
        sums = (stats.absmax, stats.sum_square, stats.sum_error, stats.outliers)
        check(library().q8_quantize_rows(*given, *(pointer(array) for array in (codes, absmax, *sums))))
    stats.rows += rows


def exact_scales(values: Array, dtype: np.dtype[Any]) -> Array:
    """`reference.exact_scales` of contiguous float32 [R, K], in `dtype`: float32 [R]."""
    rows, columns = values.shape
    scales, (least, most) = np.zeros(rows, np.float32), scale_limits(dtype)
    library().q8_exact_scales(pointer(values), rows, columns, least, most, pointer(scales))
    return scales


def _lossless(weight: Array, absmax: Array | None) -> Array:
    """127 times the exact scale of each row of a weight [N, K] that has one, for other rows `absmax` or the plain one.

    A scale that float16 holds leaves nothing for rounding to float16 to remove, unless the row is too large for it.
    """
    values = np.ascontiguousarray(weight, np.float32)
    peaks = np.maximum(np.abs(values.max(axis=1)), np.abs(values.min(axis=1)))
    plain = to_float16(peaks).astype(np.float32)
    plain[~np.isfinite(plain)] = np.inf
    scales = exact_scales(values, np.dtype(np.float16))
    fits = (scales > 0) & np.isfinite(plain)
    chosen: Array = np.where(fits, np.float32(INT8_MAX) * scales, plain if absmax is None else absmax)
    return chosen


def all_finite(values: Array) -> bool:
    """Whether none of these floating-point numbers is NaN or infinite."""
    if values.dtype not in _DTYPES:
        return bool(np.isfinite(values).all())
    values = np.ascontiguousarray(values)
    return bool(library().q8_all_finite(_DTYPES[values.dtype], pointer(values), values.size))


def add_low_rank(rows: Array, left: Array, right: Array, scaling: float) -> Array:
    """`reference.add_low_rank`.

    Args:
        rows: Any floating-point dtype [n, K]; not changed.
        left: float32 [n, R].
        right: float32 [R, K].
        scaling: The factor of the product.

    Returns:
        float32 [n, K].

    Raises:
        MemoryError: The kernel cannot allocate its buffer.
        DependencyError: The kernels are not compiled for this machine.
    """
    result: Array = np.array(rows, np.float32, order="C")
    left, right = np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)
    sizes = (*result.shape, left.shape[1])
    check(library().q8_add_low_rank(pointer(result), pointer(left), pointer(right), *sizes, scaling))
    return result


def rotate(values: Array, size: int) -> Array:
    """`reference.rotate`.

    Args:
        values: float16, bfloat16 or float32 [R, K]; not changed.
        size: One of `reference.ROTATIONS` that divides K.

    Returns:
        float32 [R, K].

    Raises:
        DependencyError: The kernels are not compiled for this machine.
    """
    result: Array = np.array(values, np.float32, order="C")
    library().q8_rotate(pointer(result), *result.shape, size)
    return result


@dataclass(frozen=True)
class CpuQuantizer:
    """Quantizes the rows of a weight on the CPU, for one thread at a time; also with searched scales.

    Attributes:
        search: What the scales are searched for; None for those of the absolute maximum.
        exact: Whether a row gets a scale that loses nothing, if there is one.
        block_bytes: It takes blocks of any size.
    """

    search: ScaleSearch | None = None
    exact: bool = False
    block_bytes: int | None = None

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Yield (block, codes, absmax) for each block [n, K], n a multiple of 64 in all but the last."""
        for block in blocks:
            yield (block, *quantize_rowwise(block, stats, self.search, self.exact))


def quantize_activations(x: Tensor, threshold: float = 0.0, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations` on torch tensors, without columns known beforehand.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        threshold: Elements with |x| >= threshold get the code 0; 0 turns this off.
        rotation: Size of the blocks in which x is rotated first, without a threshold then; 0 for none.

    Returns:
        Codes int8 [M, K], and scale float32 [M].

    Raises:
        WeightError: The rotation does not fit K.
    """
    from quantize8.kernels.packed import encode

    return encode(x, threshold, rotation)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int8_matmul` on torch tensors: a int8 [M, K] times the transpose of b int8 [N, K], int32 [M, N]."""
    from quantize8.kernels.packed import PackedWeight

    return PackedWeight(b, b.new_ones(len(b)).float()).multiply(a)


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, threshold: float, mode: LayerMode = "dynamic") -> Tensor:
    """`reference.linear` on torch tensors.

    The weight is packed for this call alone; use `PackedWeight` for a weight that is used again.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: The quantized weight [N, K].
        bias: [N] or None.
        threshold: Outlier threshold of mode "dynamic"; 0 for none.
        mode: "dynamic", "static" or "hybrid"; not used for a rotated weight.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: The mode is "static" and the weight has no stored columns.
        WeightError: int32 sums cannot hold K products, or an outlier column is outside the weight.
    """
    import torch

    from quantize8.kernels.packed import PackedWeight

    columns, exact = None if weight.rotation else fixed_columns(weight, mode), weight.outlier_weight
    if columns is not None and weight.outlier_columns is None:  # hybrid without calibration
        columns, exact = torch.zeros(0, dtype=torch.int32), torch.zeros(len(weight.codes), 0, dtype=torch.float16)
    packed = PackedWeight(weight.codes, weight.absmax, None, columns, exact, weight.rotation)
    return packed.linear(x, bias, threshold, mode)


@cache
def available() -> tuple[Unit, ...]:
    """The units that the processor has and the operating system permits, fastest first.

    Raises:
        DependencyError: The kernels are not compiled for this machine.
    """
    bits = _load("generic").q8_units()
    return tuple(unit for unit in UNITS if bits & _BITS[unit] == _BITS[unit] and _file(unit).is_file())


@cache
def chosen() -> Unit:
    """The unit that computes: the one that QUANTIZE8_UNIT names, or else the fastest.

    Raises:
        DependencyError: QUANTIZE8_UNIT names a unit that is not available, or the kernels are not compiled.
    """
    forced = os.environ.get(VARIABLE)
    if not forced:
        return available()[0]
    for unit in available():
        if unit == forced:
            return unit
    raise DependencyError(f"{VARIABLE}={forced}: not available here; set it to one of {', '.join(available())}")


def library(unit: Unit | None = None) -> Any:
    """The compiled kernels for a unit, or for the chosen one; raises DependencyError if the unit is not available."""
    return _prepared(unit or chosen())


def share_threads(loaded: Any) -> None:
    """Make a library use the threads of the OpenMP runtime that torch has loaded, where that is possible (on Linux).

    With two thread pools both would compete for the same cores, as torch's threads keep spinning after each operation.
    """
    if sys.platform != "linux":
        return
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    for path in sorted(paths, key=lambda path: "/torch" not in path):  # other packages may have loaded their own
        runtime = ctypes.CDLL(path) if Path(path).name.startswith(("libgomp", "libomp", "libiomp")) else None
        if runtime is not None and hasattr(runtime, "GOMP_parallel"):
            loaded.q8_set_openmp(ctypes.cast(runtime.GOMP_parallel, c_void_p))
            return


def pointer(array: np.ndarray) -> c_void_p:
    """The address of a contiguous array's memory; the caller must keep the array alive."""
    return c_void_p(array.ctypes.data)


def check(status: int) -> None:
    """Raise MemoryError if a kernel returned that it cannot allocate memory."""
    if status:
        raise MemoryError("not enough memory for the buffers of a CPU kernel; use shorter inputs, or free memory")


@cache
def _prepared(unit: Unit) -> Any:
    if unit not in available():  # calling this also requests permission to use AMX from Linux
        raise DependencyError(f"unit {unit}: not available here; use one of {', '.join(available())}")
    loaded = _load(unit)
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _file(unit: Unit) -> Path:
    return _FOLDER / f"{unit}.{'dll' if sys.platform == 'win32' else 'so'}"


def _load(unit: Unit) -> Any:
    path = _file(unit)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DependencyError(
            f"{path}: the CPU kernels are not compiled for this machine ({error}); run `python cpu/build.py` in a "
            "clone, or else reinstall quantize8"
        ) from None
