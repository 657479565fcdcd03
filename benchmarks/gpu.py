"""On a machine with an NVIDIA GPU: check that the kernels are correct, and time them (`make gpu`). Needs no network.

The most important parts run first, and each is written to the results file when it ends, so a run that is cut short
keeps what it has. The tables come last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_speed
from benchmarks.timing import Results, about_machine

RESULTS = Path(__file__).parent / "results"
BUDGET_SECONDS = 8.5 * 60
SANITIZERS = ("memcheck", "racecheck", "synccheck")
_SANITIZER_SECONDS = 75.0
_GPUS = {"H200": "h200", "H100": "h100", "A100": "a100"}


def main() -> int:
    """Run all parts, or with --small only the checks on tiny shapes. Returns 0 if every check passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only the checks, on tiny shapes (for compute-sanitizer)")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU: nothing was run", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0)
    if chosen.small:
        return _small(device)
    start = time.monotonic()
    about = about_machine()
    results = Results(chosen.out or RESULTS / f"{_name(about['gpu'])}-{about['date']}.json", about)
    run(device, results, lambda: BUDGET_SECONDS - (time.monotonic() - start))
    results.add("seconds", round(time.monotonic() - start, 1))
    print("\n".join(tables(results.values)))
    print(f"written to {results.path}")
    return 0 if all(check["ok"] is not False for check in results.values["checks"]) else 1


def run(device: torch.device, results: Results, left: Any, sizes: dict[str, Any] | None = None) -> None:
    """Run all parts while `left()` seconds remain. sizes: other shapes, for a rehearsal."""
    sizes = sizes or {}
    for part, rows in (
        ("checks", lambda: gpu_checks.run(device, small=bool(sizes))),
        ("sanitizer", lambda: _sanitize(left)),
        ("ceilings", lambda: [gpu_speed.ceilings(device, **sizes.get("ceilings", {}))]),
        ("quantize", lambda: gpu_speed.quantizing(device, _copy_rate(results), **sizes.get("quantize", {}))),
        ("stack", lambda: gpu_speed.stack(device, **(sizes.get("stack") or {"layers": _layers(device)}))),
        ("linear", lambda: gpu_speed.linears(device, **sizes.get("linear", {}))),
    ):
        done: list[Any] = []
        try:
            for row in rows():
                done.append(row)
                results.add(part, done)
                print(part, row, flush=True)
                if left() <= 0:
                    results.add("cut_short_in", part)
                    return
        except Exception as error:  # the other parts are still useful
            results.add(f"{part}_failed", f"{type(error).__name__}: {error}".splitlines()[0])
            print(part, "failed:", error, flush=True)
    results.add("finished", True)


def tables(values: dict[str, Any]) -> list[str]:
    """The results as text: checks, ceilings, and each time next to what it is compared with."""
    marks = {True: "ok ", None: "-- ", False: "BAD"}
    lines = [f"{marks[check['ok']]} {check['check']}: {check['wrong'] or ''}" for check in values["checks"]]
    lines += [f"sanitizer {row['tool']}: {row['result']}" for row in values.get("sanitizer", [])]
    lines += [str(row) for row in values.get("ceilings", [])]
    for row in values.get("quantize", []):
        shape = f"{row['dtype']} {row['rows']} x {row['columns']}"
        plain = f"{row['us']:.1f} us, {row['of_copy']:.0%} of copy{_versus(row, 'bitsandbytes_us', ' x bnb')}"
        stats = f"with statistics {row['with_stats_us']:.1f} us, {row['with_stats_of_copy']:.0%}"
        lines.append(f"quantize {shape}: {plain}; {stats}")
    lines.append("linear layers, by M: us, times as fast as cuBLAS in the same dtype, and as bitsandbytes")
    cells: dict[str, list[str]] = {}
    for row in values.get("linear", []):
        name = f"{row['dtype'].removeprefix('torch.')} {row['N']} x {row['K']}, {row['outliers']} outliers:"
        versus = _versus(row, "cublas_us", "") + _versus(row, "bitsandbytes_us", "")
        cells.setdefault(name, []).append(f"{row['M']}: {row['us']:.1f}{versus}")
    lines += [" ".join([name, " | ".join(each)]) for name, each in cells.items()]
    return lines + [str(row) for row in values.get("stack", [])]


def _versus(row: dict[str, Any], peer: str, unit: str) -> str:
    return f", {row[peer] / row['us']:.2f}{unit}" if peer in row else ""


def _small(device: torch.device) -> int:
    checks = list(gpu_checks.run(device, small=True))
    for check in checks:
        print(check)
    return 0 if all(check["ok"] for check in checks) else 1


def _sanitize(left: Any) -> Any:
    """Repeat the checks under each of compute-sanitizer's tools, in separate processes."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # otherwise bounds are those of torch's pool
    for tool in SANITIZERS if program else ():
        command = [
            str(program),
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--small",
        ]
        try:
            limit = min(_SANITIZER_SECONDS, max(1.0, left() - 240))
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            yield {"tool": tool, "result": "clean" if done.returncode == 0 else f"exit {done.returncode}: {last}"}
        except subprocess.TimeoutExpired:
            yield {"tool": tool, "result": f"not finished in {limit:.0f} s"}
    if not program:
        yield {"tool": "compute-sanitizer", "result": "not installed"}


def _copy_rate(results: Results) -> float:
    return float(results.values["ceilings"][0]["copy_bytes_per_s"])


def _layers(device: torch.device) -> int:
    """All 32 layers if the bfloat16 stack and its head fit with room to spare, else 8."""
    return 32 if torch.cuda.mem_get_info(device)[0] > 40 * 2**30 else 8


def _name(gpu: str) -> str:
    return next((name for part, name in _GPUS.items() if part in gpu), gpu.lower().replace(" ", "-"))


if __name__ == "__main__":
    sys.exit(main())
