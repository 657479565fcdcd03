"""Training on a CPU: the cost of int8 products in loss, on SmolLM2-135M-Instruct and a text that comes with Python.

Trains pairs that differ only in int8, from the same seed, on the same batches, with AdamW and a linear schedule: all
weights, plain against llm_int8_has_fp16_weight; LoRA over the plain and over the int8 model; and that int8 model after
merging. Everything that is not int8 is float32: a weight stored in 16 bits would lose most updates of this size to
rounding, whatever the products are.

Run: python -m benchmarks.training [--steps N], about 12 minutes
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import write
from quantize8 import Int8Config
from quantize8.demo import find_model
from quantize8.runtime.loading import load
from quantize8.runtime.training import merge_and_unload

STEPS, LAST = 100, 10  # the mean loss of the last 10 steps is compared
BATCH, TOKENS, HELD_OUT = 2, 128, 16  # sequences per step, their length, and how many are held out
SHAPES = {"full": (BATCH, TOKENS), "lora": (1, 64)}  # per step: the first sequences of a batch, and their first tokens
RATES = {"full": 2e-5, "lora": 5e-4}
ALLOWED = 0.02  # of the loss of the plain model
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    """Train each variant; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        model, tokenizer = load(find_model(), "cpu", dtype="float32")
        model.save_pretrained(name)
        sequences = windows(tokenizer, BATCH * steps + HELD_OUT)
        found = measure(Path(name), sequences, steps)
    print(f"written to {write('training', found)}")


def windows(tokenizer: Any, count: int) -> Tensor:
    """The first `count` windows [count, TOKENS] of the reference manual of Python, shuffled with a fixed seed."""
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0][: count * TOKENS].view(count, TOKENS)
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def measure(folder: Path, sequences: Tensor, steps: int) -> dict[str, Any]:
    """The losses of each variant of the model in `folder`, and the difference within each pair."""
    held_out, batches = sequences[:HELD_OUT], sequences[HELD_OUT:].view(steps, BATCH, -1)
    rows: dict[str, dict[str, float]] = {"untrained": {"held_out": loss_of(build(folder, "full", False), held_out)}}
    rows["untrained, int8"] = {"held_out": loss_of(build(folder, "lora", True), held_out)}
    for how in RATES:
        for int8 in (False, True):
            model = build(folder, how, int8)
            count, length = SHAPES[how]
            row = train(model, batches[:, :count, :length], RATES[how])
            row["held_out"] = loss_of(model, held_out)
            rows[f"{how}, {'int8' if int8 else 'plain'}"] = row
            print(how, "int8" if int8 else "plain", row, flush=True)
    rows["lora, int8, merged"] = {"held_out": loss_of(merge_and_unload(model), held_out)}
    pairs = {how: {key: apart(rows, how, key) for key in ("last", "held_out")} for how in RATES}
    pairs["merged"] = {"held_out": rows["lora, int8, merged"]["held_out"] / rows["lora, int8"]["held_out"] - 1}
    within = all(abs(value) <= ALLOWED for how in RATES for value in pairs[how].values())
    set_up = {"steps": steps, "shapes": SHAPES, "held_out": HELD_OUT, "rates": RATES, "lora": LORA, "dtype": "float32"}
    return {**set_up, "threads": torch.get_num_threads(), "losses": rows, "int8_above_plain": pairs, "within": within}


def build(folder: Path, how: str, int8: bool) -> Any:
    """The model of a variant; random parts use the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = Int8Config(llm_int8_has_fp16_weight=how == "full") if int8 else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    torch.manual_seed(0)
    return model if how == "full" else get_peft_model(model, LoraConfig(**LORA))  # type: ignore[arg-type]


def train(model: Any, batches: Tensor, rate: float) -> dict[str, float]:
    """One step per batch of [steps, B, T]: mean loss of the first and of the last steps, and seconds per step."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    losses, seconds = [], []
    for ids in batches:
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    ends = {"first": statistics.fmean(losses[:LAST]), "last": statistics.fmean(losses[-LAST:])}
    return {**ends, "seconds_a_step": statistics.median(seconds)}


def loss_of(model: Any, sequences: Tensor) -> float:
    """Mean loss over sequences [S, T]."""
    model.eval()
    with torch.no_grad():
        return statistics.fmean(model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in sequences)


def apart(rows: dict[str, dict[str, float]], how: str, key: str) -> float:
    """By what fraction of the plain model's loss the int8 model's loss is higher."""
    return rows[f"{how}, int8"][key] / rows[f"{how}, plain"][key] - 1


if __name__ == "__main__":
    main()
