"""Peak memory use of this process."""

from __future__ import annotations

from pathlib import Path


def peak_rss() -> int:
    """Peak resident memory of this process in bytes; its current resident memory where the system keeps no peak."""
    try:  # getrusage would also count the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        usage = psutil.Process().memory_info()
        return int(getattr(usage, "peak_wset", usage.rss))  # only Windows has peak_wset
