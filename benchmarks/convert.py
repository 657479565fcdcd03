"""Conversion by whole processes: compares `quantize8 convert` with `cp -r` and the int8 converters of other tools.

Each process is followed by `sync`, so that its output is on disk. Warm: the source is in the page cache. Cold: the
cache is dropped first, which needs root. bitsandbytes and CTranslate2 are installed with the extra `bench`; llama.cpp's
converter is not a package, and is measured if --llama-cpp is the path of a clone of its repository. Missing tools are
reported and left out.

Run: python -m benchmarks.convert [--folder FOLDER] [--layers N] [--llama-cpp FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import TOKENIZER_SIZE, add_tokenizer, make_llama
from benchmarks.cpu import has, spread, write

DROP = Path("/proc/sys/vm/drop_caches")
BITSANDBYTES = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
quantized = BitsAndBytesConfig(load_in_8bit=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=quantized, device_map="cpu")
model.save_pretrained(sys.argv[2])
"""
CTRANSLATE2 = """
import sys
from ctranslate2.converters import TransformersConverter
TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization="int8")
"""


def main() -> None:
    """Generate the checkpoint, run the variants alternately, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=20, help="of 2048 x 5504; 20 make 2.4 GB")
    parser.add_argument("--llama-cpp", type=Path, default=None, help="a checkout, for its convert_hf_to_gguf.py")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        make_llama(source, hidden=2048, inner=5504, layers=chosen.layers, vocabulary=TOKENIZER_SIZE, shards=4)
        add_tokenizer(source)
        size = sum(path.stat().st_size for path in source.iterdir())
        rows = list(measure(source, target, chosen.rounds, chosen.llama_cpp))
    for row in rows:
        print(
            f"{row['what']}, {row['cache']}: {row['seconds']['median']:.2f} s, peak RSS {row['peak_rss'] / 1e6:.0f} MB"
        )
    print(f"source {size / 1e9:.2f} GB; written to {write('convert', {'source_bytes': size, 'rows': rows})}")


def measure(source: Path, target: Path, rounds: int, llama_cpp: Path | None) -> list[dict[str, Any]]:
    """Measure the seconds and peak memory of each variant.

    Args:
        source: The checkpoint.
        target: Where to write the output, which is removed after each run.
        rounds: Number of measurements of `cp -r` and quantize8; other tools are run once.
        llama_cpp: A clone of llama.cpp's repository; None to leave it out.

    Returns:
        One row per variant and cache state: warm, and cold if the page cache can be dropped.
    """
    commands: dict[str, list[str]] = {
        "cp -r": ["cp", "-r", str(source), str(target)],
        "quantize8 convert": [sys.executable, "-m", "quantize8", "convert", str(source), "--out", str(target)],
    }
    caches: dict[str, Callable[[], None]] = {"warm": lambda: None}
    if os.access(DROP, os.W_OK):
        caches["cold"] = _drop_caches
    rows = []
    for cache, prepare in caches.items():
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                prepare()
                found[name].append(_run(command, target))
        if cache == "warm":  # only once each, because they take long
            for name, command in _peers(source, target, llama_cpp).items():
                found[name] = [_run(command, target)]
        for name, runs in found.items():
            seconds = spread([seconds for seconds, _ in runs])
            rows.append({"what": name, "cache": cache, "seconds": seconds, "peak_rss": max(rss for _, rss in runs)})
    return rows


def _peers(source: Path, target: Path, llama_cpp: Path | None) -> dict[str, list[str]]:
    """The commands of the other tools, as far as they are installed."""
    python, folders = sys.executable, [str(source), str(target)]
    scripts = {
        "transformers + bitsandbytes": ("bitsandbytes", BITSANDBYTES),
        "CTranslate2": ("ctranslate2", CTRANSLATE2),
    }
    peers = {}
    for name, (package, script) in scripts.items():
        if has(package):
            peers[name] = [python, "-c", script, *folders]
    if llama_cpp is None:
        print("llama.cpp: left out; name a checkout with --llama-cpp")
    else:
        command = [python, str(llama_cpp / "convert_hf_to_gguf.py"), str(source)]
        peers["llama.cpp"] = [*command, "--outtype", "q8_0", "--outfile", str(target)]
    return peers


def _run(command: list[str], target: Path) -> tuple[float, int]:
    """Run a command; returns the seconds including the sync after it, and its peak resident memory in bytes."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, _peak_of(process.pid))
            time.sleep(0.02)
        subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[0]}: {errors.read().decode()[-500:]}")
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return seconds, peak


def _peak_of(process: int) -> int:
    """Peak resident memory so far in bytes, according to the system (getrusage would include this process)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    DROP.write_text("3")


if __name__ == "__main__":
    main()
