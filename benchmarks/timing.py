"""Timing on a GPU, and the results file: rewritten after every part, so that an interrupted run loses little."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

REPEATS = 15  # at most this many repetitions,
REPEAT_SECONDS = 0.15  # within this total, but at least the number below
LEAST_REPEATS = 3
CACHE_BYTES = (
    256 * 2**20
)  # of weights in rotation: several times the largest level-2 cache, so that all come from memory


def graph_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds per call, from replays of a CUDA graph of all calls: no launch gaps, no host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _median(graph.replay) / len(calls)


def eager_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds per call when launched one by one, as programs do: for what cannot be captured."""
    for call in calls:
        call()

    def all_of_them() -> None:
        for call in calls:
            call()

    return _median(all_of_them) / len(calls)


def _median(work: Callable[[], Any]) -> float:
    seconds: list[float] = []
    while len(seconds) < LEAST_REPEATS or (len(seconds) < REPEATS and sum(seconds) < REPEAT_SECONDS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        work()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1000)
    return statistics.median(seconds)


class Results:
    """A dictionary that is written to disk after every change."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"about": about, "finished": False}
        self.save()

    def add(self, part: str, rows: Any) -> None:
        """Set one part and write the file."""
        self.values[part] = rows
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")


def about_machine() -> dict[str, Any]:
    """The GPU, the versions and the commit that results belong to."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("cupy", "bitsandbytes", "triton"):
        try:
            versions[name] = __import__(name).__version__
        except Exception as error:  # a package that cannot be imported is skipped, and the file says why
            versions[name] = f"not used: {type(error).__name__}: {error}".splitlines()[0]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "versions": versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
