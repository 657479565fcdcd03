"""How much memory this process has held."""

from __future__ import annotations

from pathlib import Path


def peak_rss() -> int:
    """The most memory this process has held, in bytes; what it holds now where the system keeps no peak."""
    try:  # getrusage would also count the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))  # the peak is Windows'
