"""Shared by the CPU benchmarks: description of the machine, interleaved timing, and the results file."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize8.kernels import cpu

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "compressed-tensors", "xllamacpp", "ctranslate2", "numpy")


AVX2_ONLY = {  # for torch, oneDNN, MKL and CTranslate2
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}
SLOW = 4.0  # seconds that a variant may take in all rounds together
MEDIAN_OF = 3  # calls of a variant, at least


def about_machine() -> dict[str, Any]:
    """The processor, the versions and the commit that a result belongs to."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "machine": f"{os.cpu_count()} processors, {platform.machine()}, {', '.join(cpu.available())}",
        "unit": cpu.chosen(),
        "versions": versions,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def hold_torch_to_unit(module: str) -> None:
    """If a unit without AVX-512 is forced, restart the module with torch restricted to AVX2, as on such a CPU."""
    if cpu.chosen() in ("avx2", "avxvnni") and not AVX2_ONLY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | AVX2_ONLY)


def has(package: str) -> bool:
    """Whether a package to compare with is installed; prints a line if it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package}: not installed, left out")
    return found


def interleaved(variants: dict[str, Callable[[int], Any]], rounds: int, warm: int = 2) -> dict[str, dict[str, float]]:
    """Seconds of each variant: median and quartiles. Variants alternate, and get the number of the round.

    A variant that would take longer than SLOW in total is called less often.
    """
    for call in variants.values():
        start = time.perf_counter()
        for round_ in range(warm):
            if time.perf_counter() - start < SLOW / 4:
                call(round_)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds):
        for name, call in variants.items():
            if sum(seconds[name]) < SLOW or len(seconds[name]) < MEDIAN_OF:
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
    """Write results as JSON."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about_machine(), **values}, indent=1) + "\n")
    return path
