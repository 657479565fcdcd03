"""The CPU's int8 units, and the library of compiled kernels (cpu/*.c) for each.

A unit is a set of instructions that multiply int8 codes. `cpu/build.py` compiles all kernels once for each unit. This
module chooses the best unit of the processor and loads its library. QUANTIZE8_UNIT=avx2, for example, forces another
unit, so that a processor with AMX can also test and time the code for other processors. All units compute the same
integers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from quantize8.errors import DependencyError

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
        *((name, c_int32) for name in ("dtype", "mode", "threads")),
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
    "q8_all_finite": (c_int, (c_int, c_void_p, c_int64)),
    "q8_0_peaks": (None, (c_void_p, c_int64, c_void_p)),
    "q8_0_encode": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "q8_0_search": (None, (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p)),
    "q8_0_add_squares": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "q8_ggml_halves": (c_int, (c_int, c_void_p, c_int64, c_void_p)),
    "q8_set_openmp": (None, (c_void_p,)),
}  # fmt: skip


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


@cache
def _prepared(unit: Unit) -> Any:
    if unit not in available():  # calling this also requests permission to use AMX from Linux
        raise DependencyError(f"unit {unit}: not available here; use one of {', '.join(available())}")
    loaded = _load(unit)
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


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
