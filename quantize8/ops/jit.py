"""Compiling loops with Numba; without it, callers take their slower way through NumPy and torch."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

try:
    from numba import njit, prange
except ImportError:
    njit, prange = None, range

INSTALLED = njit is not None
PARALLEL = threading.Lock()  # Numba's fallback thread pool aborts the process when two threads enter it

__all__ = ["INSTALLED", "PARALLEL", "compiled", "prange"]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile on first use, and keep the result for other processes where there is a folder to keep it in."""

    def decorate(function: Any) -> Any:
        if not INSTALLED:
            return function
        function.__qualname__ += f"-{_digest()}"
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return njit(**options)(function)

    return decorate


@cache
def _digest() -> str:
    """Of all files beside this one: Numba itself looks at a function's own file only, not at what it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
