"""How much memory this process has held."""

from __future__ import annotations

from pathlib import Path


def peak_rss() -> int:
    """The most memory this process has held, in bytes; what it holds now where the system keeps no peak."""
    try:  # getrusage would also count the process that started this one
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        return int(psutil.Process().memory_info().rss)
