"""The choice of the device that computes: the requested one, if it is present and gives correct results.

Kernels are compiled on the machine they run on, by whatever compiler and driver it has. Before a GPU is used for a
model, every kernel that it would run computes a small layer, and the result is compared with the reference. This
happens once per process and takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache

import numpy as np

from quantize8.errors import DependencyError, DeviceWarning
from quantize8.kernels import reference
from quantize8.kernels.reference import ColumnStats, Int8Weight, OutlierMode
from quantize8.optional import installed

DEVICES = ("auto", "cpu", "cuda")
_ROUNDING = 1.05  # allowed error of a product, as a multiple of the error of rounding the exact result


def resolve(device: str) -> str:
    """The device to use for a value of --device.

    With auto, a GPU that is present but cannot be used gives a DeviceWarning with the reason, and the CPU is used; so
    it is, without a warning, where torch is not installed.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        "cpu" or "cuda".

    Raises:
        DependencyError: The device is unknown, or it is "cuda" and the GPU cannot be used.
    """
    if device not in DEVICES:
        raise DependencyError(f"device {device}: unknown; use {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    if device == "cpu" or (device == "auto" and not (_has_driver() and installed("torch"))):
        return "cpu"
    reason = problem()
    if reason is None:
        return "cuda"
    if device == "cuda":
        raise DependencyError(reason)
    warnings.warn(f"{reason}; using the CPU instead", DeviceWarning, stacklevel=2)
    return "cpu"


def default_mode(device_type: str) -> OutlierMode:
    """The outlier mode of a layer for which the user named none.

    On a CPU it is "bitsandbytes", so that a program that moves from bitsandbytes to quantize8 keeps its results. No GPU
    kernel computes that mode, so on a GPU it is "dynamic".

    Args:
        device_type: torch's name of the type of device, as "cpu" or "cuda".
    """
    return "dynamic" if device_type == "cuda" else "bitsandbytes"


@cache
def problem(index: int = 0) -> str | None:
    """One line on why the GPU of this index cannot be used and how to fix it; None if it can be used."""
    from quantize8.kernels.launch import why_not

    if reason := why_not(index):
        return reason
    try:
        wrong = disagreement(index)
    except DependencyError as error:
        return f"device cuda: {error}"
    if wrong:
        return (
            f"device cuda: kernel {wrong} on GPU {index} differs from the reference; use --device cpu, and report this"
        )
    return None


def disagreement(index: int | None = 0) -> str | None:
    """Compare every kernel with the reference on a small layer.

    Args:
        index: Index of the GPU; None for tensors in main memory (in tests).

    Returns:
        The name of the first kernel whose result differs from the reference; None if all agree.

    Raises:
        DependencyError: A kernel cannot be compiled or run on this GPU.
    """
    import torch

    from quantize8.kernels import gpu

    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    random = np.random.default_rng(8)
    weight = random.normal(size=(264, 1040)).astype(np.float16)
    tokens = random.normal(size=(300, 1040)).astype(np.float16)
    tokens[::3, 17::400] *= 20
    codes, absmax = reference.quantize_rowwise(weight)
    expected = reference.column_stats(weight, codes, absmax)

    stats, measured = gpu.DeviceStats.empty(weight.shape[1], device), ColumnStats.empty(weight.shape[1])
    on_device = torch.from_numpy(weight).to(device)
    layer = Int8Weight(*gpu.quantize_rowwise(on_device, stats))
    stats.read_into(measured)
    if not np.array_equal(layer.codes.cpu(), codes) or not np.array_equal(layer.absmax.cpu(), absmax):
        return "quantize_rowwise"
    if any(not np.array_equal(getattr(measured, name), getattr(expected, name)) for name in vars(expected)):
        return "column_stats"
    threshold = reference.DEFAULT_THRESHOLD
    for count, name in ((1, "weight_only_matmul"), (40, "mixed_matmul"), (300, "mixed_matmul in large tiles")):
        x = tokens[:count]
        y = gpu.linear(torch.from_numpy(x).to(device), layer, None, threshold).cpu().double().numpy()
        if not _within_rounding(y, reference.linear(x, Int8Weight(codes, absmax), None, threshold)):
            return name
    return None


def _within_rounding(y: np.ndarray, exact: np.ndarray) -> bool:
    """Whether y, rounded to float16, is as close to the exact result as that rounding and float32 sums allow."""
    least = np.linalg.norm(exact.astype(np.float16) - exact) + 2e-7 * np.linalg.norm(exact)
    return bool(np.linalg.norm(y - exact) <= _ROUNDING * least)


def _has_driver() -> bool:
    """Whether an NVIDIA driver is installed. The dynamic loader is asked, because importing torch takes a second."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
