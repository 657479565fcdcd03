"""The CPU's int8 units, and the library of compiled kernels (cpu/*.c) for each.

A unit is the instructions that multiply int8 codes. `cpu/build.py` compiles all kernels once for each unit; here the
best one that the processor has is chosen and its library loaded. QUANTIZE8_UNIT=avx2 forces one, so that a processor
with AMX tests and times what others have. Every unit computes the same integers.
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

UNITS: tuple[Unit, ...] = get_args(Unit)  # the faster one first
VARIABLE = "QUANTIZE8_UNIT"
LARGEST_K = 133_144  # int32 sums of products of codes hold these: 127^2 K < 2^31
BLOCK_N = 32  # out features of a packed weight's block; cpu/quantize8.h
STEP_K = 64  # in features of a step
GROUP_K = 4  # of which this many lie side by side
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
_BITS: dict[Unit, int] = {  # cpu/detect.c
    "avx2": 1, "avxvnni": 2, "avx512vnni": 4, "amx": 8, "neon-dotprod": 16, "neon-i8mm": 32, "generic": 0
}  # fmt: skip
_FOLDER = Path(__file__).resolve().parent.parent / "cpu"


class LinearCall(Structure):
    """`struct q8_linear` of cpu/linear.c, which says what each field is."""

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
    """The units that this processor has and its system lets us use, the fastest first.

    Raises DependencyError where the kernels are not compiled.
    """
    found = _load("generic").q8_units()
    return tuple(unit for unit in UNITS if found & _BITS[unit] == _BITS[unit] and _file(unit).is_file())


@cache
def chosen() -> Unit:
    """The unit that computes: the fastest, or the one that QUANTIZE8_UNIT names.

    Raises DependencyError where it names one that is not here.
    """
    forced = os.environ.get(VARIABLE)
    if not forced:
        return available()[0]
    for unit in available():
        if unit == forced:
            return unit
    raise DependencyError(f"{VARIABLE}={forced}: not available here; set it to one of {', '.join(available())}")


def library(unit: Unit | None = None) -> Any:
    """The compiled kernels for a unit, or for the chosen one; raises DependencyError where it is not here."""
    return _prepared(unit or chosen())


@cache
def _prepared(unit: Unit) -> Any:
    if unit not in available():  # which also asks Linux for AMX's tiles
        raise DependencyError(f"unit {unit}: not available here; use one of {', '.join(available())}")
    loaded = _load(unit)
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def share_threads(loaded: Any) -> None:
    """Have a library compute on the threads of the OpenMP runtime that torch has loaded, where that is possible.

    Two pools would fight for the same cores, for torch's threads keep spinning after each of its operations.
    """
    if sys.platform != "linux":
        return
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    for path in sorted(paths, key=lambda path: "/torch" not in path):  # another package may have brought its own
        runtime = ctypes.CDLL(path) if Path(path).name.startswith(("libgomp", "libomp", "libiomp")) else None
        if runtime is not None and hasattr(runtime, "GOMP_parallel"):
            loaded.q8_set_openmp(ctypes.cast(runtime.GOMP_parallel, c_void_p))
            return


def pointer(array: np.ndarray) -> c_void_p:
    """The address of a contiguous array's memory, which the caller keeps alive."""
    return c_void_p(array.ctypes.data)


def check(status: int) -> None:
    """Raise MemoryError where a kernel returned that memory is short."""
    if status:
        raise MemoryError("not enough memory for the activations of a linear layer")


def _file(unit: Unit) -> Path:
    return _FOLDER / f"{unit}.{'dll' if sys.platform == 'win32' else 'so'}"


def _load(unit: Unit) -> Any:
    path = _file(unit)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DependencyError(
            f"{path}: the CPU kernels are not compiled for this machine ({error}); in a clone run "
            "`python cpu/build.py`, else reinstall quantize8"
        ) from None
