"""Whole models on a CPU: prefill of 512 tokens and decode of 64, the source in bfloat16 against its int8 artifact.

Both are transformers models run by the same loop, in turn, in one process. CTranslate2 is left out where it is not
installed. Run: python -m benchmarks.model_cpu [MODEL ...], folders or GGUF files (default: SmolLM2-135M-Instruct from
its package, and a random Llama of 1.2 billion weights)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import make_llama
from benchmarks.cpu import spread, write
from quantize8.demo import find_model
from quantize8.model.loading import load
from quantize8.operations.convert import convert

PROMPT, STEPS = 512, 64


def main() -> None:
    """Convert, load and time each model; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = chosen.models
        if not models:
            make_llama(folder / "llama-1.2b", layers=20, vocabulary=32000, shards=4)
            models = [Path(find_model()), folder / "llama-1.2b"]
        for number, model in enumerate(models):
            row = measure(model, folder / f"int8-{number}", chosen.rounds)
            rows.append(row)
            print(line(row), flush=True)
    print(f"written to {write('model-cpu', {'threads': torch.get_num_threads(), 'rows': rows})}")


def measure(source: Path, artifact: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second of both, by phase."""
    convert(str(source), artifact, device="cpu")
    models = {"bf16": load(source, "cpu", dtype="bfloat16")[0], "quantize8": load(artifact, "cpu", dtype="bfloat16")[0]}
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            prefill, decode = generate(model)
            if round_:  # the first is to warm up, and to pack the weights
                found[name]["prefill"].append(prefill)
                found[name]["decode"].append(decode)
    speeds = {name: {phase: spread(values) for phase, values in phases.items()} for name, phases in found.items()}
    return {"model": source.name, "tokens_per_s": speeds}


def generate(model: Any) -> tuple[float, float]:
    """Tokens a second of one prefill and of the greedy steps after it."""
    from transformers import DynamicCache

    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for _ in range(STEPS):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        end = time.perf_counter()
    return PROMPT / (middle - start), STEPS / (end - middle)


def line(row: dict[str, Any]) -> str:
    """One model as text."""
    ours, base = row["tokens_per_s"]["quantize8"], row["tokens_per_s"]["bf16"]
    cells = [
        f"{phase} {ours[phase]['median']:.1f} tokens/s, {ours[phase]['median'] / base[phase]['median']:.2f}x bf16"
        for phase in ("prefill", "decode")
    ]
    return f"{row['model']}: " + "; ".join(cells)


if __name__ == "__main__":
    main()
