"""Memory of this process: its peak, and what it gives back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 2**20  # of weights and activations all but a few are larger
_LARGEST_THRESHOLD = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc, which its own adjustment ends at


def peak_rss() -> int:
    """Peak resident memory of this process in bytes; its current resident memory where the system keeps no peak."""
    try:  # getrusage would also count the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        usage = psutil.Process().memory_info()
        return int(getattr(usage, "peak_wset", usage.rss))  # only Windows has peak_wset


@contextmanager
def giving_back() -> Iterator[None]:
    """Within the context, freed memory of large tensors goes back to the system at once, where the C library is glibc.

    Otherwise glibc takes tensors up to 32 MB from its heap. Small objects that stay then keep the room between them:
    about 80 MB for each layer of a model with a billion parameters that is read layer by layer.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


@cache
def _mallopt() -> Any:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
