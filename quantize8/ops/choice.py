"""Which device computes: the one asked for, if it is there and gives right results.

Kernels are compiled on the machine they run on, by whatever compiler and driver it has. Before a GPU is trusted with a
model, every kernel that it would use multiplies a small layer, and the result is compared with the reference: once a
process, a few milliseconds.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache

import numpy as np

from quantize8.errors import DependencyError, DeviceWarning
from quantize8.ops import reference
from quantize8.ops.reference import ColumnStats, Int8Weight
from quantize8.optional import installed

DEVICES = ("auto", "cpu", "cuda")
_ROUNDING = 1.05  # what a product may be off by, over rounding the exact result


def resolve(device: str) -> str:
    """Cpu or cuda, for a --device.

    Raises DependencyError where the device is unknown, or is cuda and cannot be used. With auto, a GPU that is there
    but cannot be used gives a DeviceWarning that says why, and the CPU; without torch it is the CPU.
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
    warnings.warn(f"{reason}; going on with the CPU", DeviceWarning, stacklevel=2)
    return "cpu"


@cache
def problem(index: int = 0) -> str | None:
    """One line on why a GPU cannot be used and how to fix it; None where it can."""
    from quantize8.ops.device import why_not

    if reason := why_not(index):
        return reason
    try:
        wrong = disagreement(index)
    except DependencyError as error:
        return f"device cuda: {error}"
    if wrong:
        return f"device cuda: {wrong} of GPU {index} differs from the reference; use --device cpu, and report this"
    return None


def disagreement(index: int | None = 0) -> str | None:
    """Name of the first kernel whose result on a small layer is not the reference's; None where all agree.

    Args: index, of the GPU; None for tensors in main memory (tests).
    """
    import torch

    from quantize8.ops import gpu

    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    random = np.random.default_rng(8)
    weight = random.normal(size=(264, 1040)).astype(np.float16)
    tokens = random.normal(size=(300, 1040)).astype(np.float16)
    tokens[::3, 17::400] *= 20
    codes, absmax = reference.quantize_rowwise(weight)
    expected = reference.column_stats(weight, codes, absmax)

    stats, found = gpu.DeviceStats.empty(weight.shape[1], device), ColumnStats.empty(weight.shape[1])
    on_device = torch.from_numpy(weight).to(device)
    layer = Int8Weight(*gpu.quantize_rowwise(on_device, stats))
    stats.read_into(found)
    if not np.array_equal(layer.codes.cpu(), codes) or not np.array_equal(layer.absmax.cpu(), absmax):
        return "quantize_rowwise"
    if any(not np.array_equal(getattr(found, name), getattr(expected, name)) for name in vars(expected)):
        return "column_stats"
    threshold = reference.DEFAULT_THRESHOLD
    for count, name in ((1, "weight_only_matmul"), (40, "mixed_matmul"), (300, "mixed_matmul in large tiles")):
        x = tokens[:count]
        y = gpu.linear(torch.from_numpy(x).to(device), layer, None, threshold).cpu().double().numpy()
        if not _within_rounding(y, reference.linear(x, Int8Weight(codes, absmax), None, threshold)):
            return name
    return None


def _within_rounding(y: np.ndarray, exact: np.ndarray) -> bool:
    """Whether y, of float16, is as near to the exact result as its rounding allows, and float32 sums beside it."""
    least = np.linalg.norm(exact.astype(np.float16) - exact) + 2e-7 * np.linalg.norm(exact)
    return bool(np.linalg.norm(y - exact) <= _ROUNDING * least)


def _has_driver() -> bool:
    """Whether an NVIDIA driver is installed; asks the loader, because importing torch to ask takes a second."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
