"""Linear layers on a CPU: ours, and bitsandbytes' Linear8bitLt, against bfloat16 F.linear, from one process in turn.

Weights rotate over more memory than the caches hold, as in a model. 0.5% of the input columns are outliers.
Run: python -m benchmarks.linear_cpu
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cpu import has, interleaved, write
from quantize8.ops.packed import PackedWeight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))  # out features, in features
TOKENS = (1, 4, 16, 64, 256, 1024)
ROTATION_BYTES = 700 * 10**6
THRESHOLD = 6.0


def main() -> None:
    """Time all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds; writes nothing")
    quick = parser.parse_args().quick
    rows = []
    for out_features, in_features in ((512, 256),) if quick else SHAPES:
        for row in measure(out_features, in_features, (1, 20) if quick else TOKENS, 3 if quick else None):
            rows.append(row)
            print(line(row), flush=True)
    if not quick:
        print(f"written to {write('linear-cpu', {'threads': torch.get_num_threads(), 'rows': rows})}")


def measure(out_features: int, in_features: int, tokens: tuple[int, ...], rounds: int | None) -> list[dict[str, Any]]:
    """Seconds by variant for each number of tokens."""
    count = max(2, min(24, ROTATION_BYTES // (2 * out_features * in_features)))
    floats = [torch.randn(out_features, in_features).mul_(0.02).bfloat16() for _ in range(count)]
    ours = [_packed(out_features, in_features) for _ in range(count)]
    peers = [_bitsandbytes(weight) for weight in floats[: max(2, count // 2)]] if has("bitsandbytes") else []
    rows = []
    with torch.inference_mode():
        for m in tokens:
            x = torch.randn(m, in_features).clamp(-5, 5)
            x[:, torch.randperm(in_features)[: in_features // 200]] *= 12
            x = x.bfloat16()
            variants: dict[str, Any] = {
                "bf16": lambda i, x=x: functional.linear(x, floats[i % count]),
                "quantize8": lambda i, x=x: ours[i % count].linear(x, None, THRESHOLD, "dynamic"),
            }
            if peers:
                variants["bitsandbytes"] = lambda i, x=x: peers[i % len(peers)](x)
            # each layer once before: it then keeps the outlier columns, which stay the same in a model
            times = interleaved(variants, rounds or max(7, min(50, 2000 // (m + 20))), warm=count)
            rows.append({"N": out_features, "K": in_features, "M": m, "seconds": times})
    return rows


def line(row: dict[str, Any]) -> str:
    """One row as text: milliseconds, and how many times as fast as bfloat16."""
    base = row["seconds"]["bf16"]["median"]
    cells = [f"{name} {s['median'] * 1e3:.2f} ms ({base / s['median']:.2f}x)" for name, s in row["seconds"].items()]
    return f"{row['N']} x {row['K']}, M {row['M']}: " + ", ".join(cells)


def _packed(out_features: int, in_features: int) -> PackedWeight:
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return PackedWeight(codes, torch.rand(out_features) + 0.5)


def _bitsandbytes(weight: torch.Tensor) -> Any:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every call that it casts to float16
    layer = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=THRESHOLD
    )
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


if __name__ == "__main__":
    main()
