"""What outlier handling and rotation cost a linear layer on a CPU, relative to plain int8, for random weights.

Run: [QUANTIZE8_UNIT=avx2] python -m benchmarks.rotation_cpu, less than a minute
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.cpu import hold_torch_to_unit, interleaved, write
from quantize8 import Int8Linear
from quantize8.kernels import cpu
from quantize8.kernels.reference import rotation_of

SIZES = (576, 2048, 4096)  # K and N
TOKENS = (512, 1)
COLUMNS, EXACT = 128, 16  # outlier columns, and how many of them are exact in the weight, too
ROUNDS = 41
LEAST_BYTES = 100 * 10**6  # of weights that are used in turn when there is one token, so that caches do not hold them
BASE = "plain"


def main() -> None:
    """Time all sizes, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    hold_torch_to_unit("benchmarks.rotation_cpu")
    rows = []
    for size in SIZES:
        for tokens in TOKENS:
            rows.append(measure(size, tokens, ROUNDS))
            print(line(rows[-1]), flush=True)
    values = {"threads": torch.get_num_threads(), "rows": rows}
    print(f"written to {write(f'rotation-cpu-{cpu.chosen()}', values)}")


def measure(size: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds by variant for a layer of this size."""
    count = 1 if tokens > 1 else max(2, LEAST_BYTES // size**2)
    layers = {name: [_layer(name, size) for _ in range(count)] for name in (BASE, "hybrid", "columns", "rotated")}
    x = torch.randn(1, tokens, size)
    with torch.inference_mode():
        calls = {name: lambda i, same=same: same[i % count](x) for name, same in layers.items()}
        seconds = interleaved(calls, rounds if tokens > 1 else 10 * rounds, warm=count)
    return {"size": size, "tokens": tokens, "seconds": {name: found["median"] for name, found in seconds.items()}}


def line(row: dict[str, Any]) -> str:
    """The times of the variants relative to plain int8, as a row of a table."""
    seconds = row["seconds"]
    ratios = " | ".join(f"{value / seconds[BASE]:.2f}" for name, value in seconds.items() if name != BASE)
    return f"| random weights, K = N = {row['size']}, {row['tokens']} tokens | {ratios} |".replace(
        " 1 tokens", " 1 token"
    )


def _layer(name: str, size: int) -> Int8Linear:
    rotation = rotation_of(size) if name == "rotated" else 0
    layer = Int8Linear.from_float(torch.nn.Linear(size, size, bias=False), 0.0, rotation)
    if name in ("hybrid", "columns"):
        layer.mode = "hybrid"
        if name == "columns":
            layer.outlier_columns = torch.arange(COLUMNS, dtype=torch.int32) * (size // COLUMNS)
            layer.outlier_weight = torch.zeros(size, EXACT, dtype=torch.float16)
    return layer


if __name__ == "__main__":
    main()
