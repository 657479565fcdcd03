"""Linear layers on a CPU: ours and bitsandbytes' Linear8bitLt against F.linear, alternating in one process.

Float32 layers get float32 activations, bfloat16 layers bfloat16 ones. Weights rotate over more memory than the caches
hold, as in a model. 0.5% of the input columns are outliers. If QUANTIZE8_UNIT forces a unit without AVX-512, torch is
restricted to AVX2, too.

Run: [QUANTIZE8_UNIT=avx2] python -m benchmarks.linear_cpu
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cpu import has, hold_torch_to_unit, interleaved, write
from quantize8.kernels import cpu
from quantize8.kernels.packed import PackedWeight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (1536, 576))  # out features, in features
TOKENS = (1, 4, 16, 64, 256, 1024)
ROTATION_BYTES = 1200 * 10**6
THRESHOLD = 6.0
BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Time all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds; writes nothing")
    quick = parser.parse_args().quick
    hold_torch_to_unit("benchmarks.linear_cpu")
    rows = []
    for out_features, in_features in ((512, 256),) if quick else SHAPES:
        for row in measure(out_features, in_features, (1, 20) if quick else TOKENS, 3 if quick else None):
            rows.append(row)
            print(line(row), flush=True)
    if not quick:
        values = {"unit": cpu.chosen(), "threads": torch.get_num_threads(), "rows": rows}
        print(f"written to {write(f'linear-cpu-{cpu.chosen()}', values)}")


def measure(out_features: int, in_features: int, tokens: tuple[int, ...], rounds: int | None) -> list[dict[str, Any]]:
    """Seconds by variant for each number of tokens."""
    count = max(2, min(48, ROTATION_BYTES // (4 * out_features * in_features)))
    floats = [torch.randn(out_features, in_features).mul_(0.02) for _ in range(count)]
    halves = [weight.bfloat16() for weight in floats]
    ours = [_packed(out_features, in_features) for _ in range(count)]
    peers = [_bitsandbytes(weight) for weight in floats[: max(2, count // 4)]] if has("bitsandbytes") else []
    rows = []
    with torch.inference_mode():
        for m in tokens:
            x = torch.randn(m, in_features).clamp(-5, 5)
            x[:, torch.randperm(in_features)[: in_features // 200]] *= 12
            half = x.bfloat16()
            variants: dict[str, Any] = {
                "float32": lambda i, x=x: functional.linear(x, floats[i % count]),
                "quantize8, float32": lambda i, x=x: ours[i % count].linear(x, None, THRESHOLD, "dynamic"),
                "quantize8, bfloat16": lambda i, x=half: ours[i % count].linear(x, None, THRESHOLD, "dynamic"),
                "bfloat16": lambda i, x=half: functional.linear(x, halves[i % count]),
            }
            if peers:
                variants["bitsandbytes"] = lambda i, x=half: peers[i % len(peers)](x)
            # each layer runs once before: it caches the outlier columns, which stay the same in a model
            times = interleaved(variants, rounds or max(7, min(50, 2000 // (m + 20))), warm=min(count, 12))
            rows.append({"N": out_features, "K": in_features, "M": m, "seconds": times})
    return rows


def ratios(row: dict[str, Any]) -> list[float]:
    """How many times as fast as float32, bfloat16 and, if it is installed, bitsandbytes."""
    seconds = {name: each["median"] for name, each in row["seconds"].items()}
    found = [seconds[base] / seconds[f"quantize8, {base}"] for base in BASES]
    if "bitsandbytes" in seconds:
        found.append(seconds["bitsandbytes"] / seconds["quantize8, bfloat16"])
    return found


def cell(row: dict[str, Any]) -> str:
    """The ratios of a row as a table cell, with as many digits as are significant."""
    return "/".join(f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}" for ratio in ratios(row))


def line(row: dict[str, Any]) -> str:
    """A row as text: milliseconds and ratios."""
    cells = [f"{name} {s['median'] * 1e3:.2f} ms" for name, s in row["seconds"].items()]
    return f"{row['N']} x {row['K']}, M {row['M']}: {', '.join(cells)}: {cell(row)}"


def _packed(out_features: int, in_features: int) -> PackedWeight:
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return PackedWeight(codes, torch.rand(out_features) + 0.5)


def _bitsandbytes(weight: torch.Tensor) -> Any:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs at every call that it casts to float16
    layer = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


if __name__ == "__main__":
    main()
