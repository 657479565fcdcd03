"""The accuracy of plans: alternates `quantize8 plan` and `quantize8 convert`, each in a process of its own.

Run: python -m benchmarks.planning CHECKPOINT ... [--rounds 5] [--options "--scale mse"]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def call(command: str, source: str, out: Path, options: list[str]) -> tuple[dict[str, Any], float]:
    """Run a command; returns the JSON that it prints, and its peak memory in MiB."""
    words = [sys.executable, "-m", "quantize8", command, source, "--out", str(out), "--json", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, text
    return json.loads(text), usage.ru_maxrss / 1024


def main() -> None:
    """Print the medians of the predicted and measured times and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", default="")
    given = parser.parse_args()
    options = shlex.split(given.options)
    for source in given.sources:
        predicted, took, memory, peaks = [], [], [], []
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                plan, _ = call("plan", source, Path(folder) / "out", options)
                made, peak = call("convert", source, Path(folder) / "out", options)
            predicted.append(plan["forecast"]["shares"][0]["seconds"])
            memory.append(plan["forecast"]["memory"] / 2**20)
            took.append(made["seconds"])
            peaks.append(peak)
        ratios = sorted(said / was for said, was in zip(predicted, took, strict=True))
        middle = [statistics.median(values) for values in (predicted, took, ratios, memory, peaks)]
        print(f"{source} {given.options}: predicted {middle[0]:.2f} s, took {middle[1]:.2f} s")
        print(f"  ratio {middle[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"  memory: predicted {middle[3]:.0f} MiB, took {middle[4]:.0f} MiB")


if __name__ == "__main__":
    main()
