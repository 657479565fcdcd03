"""What the CPU benchmarks share: the machine, interleaved timing, and the results file."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "compressed-tensors", "xllamacpp", "ctranslate2", "numpy")


def about_machine() -> dict[str, Any]:
    """The processor, the versions and the commit that figures belong to."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if name in flags]
    return {
        "machine": f"{os.cpu_count()} processors, {platform.machine()}, {', '.join(units)}",
        "versions": versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def has(package: str) -> bool:
    """Whether a peer is installed; says so where it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package}: not installed, left out")
    return found


def interleaved(variants: dict[str, Callable[[int], Any]], rounds: int, warm: int = 2) -> dict[str, dict[str, float]]:
    """Seconds of each variant, called in turn with the number of the round: median, and the middle half's range."""
    for call in variants.values():
        for round_ in range(warm):
            call(round_)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call(round_)
            seconds[name].append(time.perf_counter() - start)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def write(name: str, values: dict[str, Any]) -> Path:
    """Results as JSON."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about_machine(), **values}, indent=1) + "\n")
    return path
