"""How much quality int8 costs a model, and what recovers it at what cost: every mode, and bitsandbytes itself.

The first tokens of a text are scored against the float32 model; columns, scales and smoothing are chosen on other text.
All models compute in float32, so that the remaining difference is due to int8. The cost of a variant is the prefill
time of the linear layers of three blocks, relative to plain int8, which corrects no outliers. It is the minimum of
interleaved rounds.

Run: python -m benchmarks.quality [--model GGUF_OR_FOLDER --name NAME], about 10 minutes for SmolLM2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.cpu import RESULTS, write
from benchmarks.emulations import decode, int8_layers
from quantize8 import convert, load
from quantize8.calibration.scoring import Pairs, compare
from quantize8.commands.evaluate import interval
from quantize8.demo import MODEL, find_model
from quantize8.files import TEXT
from quantize8.runtime.loading import find_tokenizer, quiet
from quantize8.sources import open_checkpoint

TOKENS, CONTEXT = 2048, 1024  # scored in two windows; the text after them is for calibration
ROUNDS, TIMED_TOKENS = 15, 512
BASE = "plain int8, no outliers"  # the times are relative to its
BASES = ("bitsandbytes, threshold 6", "dynamic, threshold 6")  # of the ratios; the first computes in float16, which
# overflows in some models
ALPHA = 0.5  # for smoothing: SmoothQuant's default
Wrap = Callable[[Any], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Variant:
    """A way to make and run an int8 model.

    `made` are options of convert. mode None: bitsandbytes' own layers. static: only the stored columns of hybrid.
    """

    name: str
    made: dict[str, Any]
    mode: str | None = "dynamic"
    threshold: float | None = None
    wrap: Wrap | None = None  # changes the layers while it is scored; such a variant has no cost to measure


def variants() -> list[Variant]:
    """All variants; bitsandbytes is first, and the others are compared with it."""
    plain: dict[str, Any] = {}
    auto, gptq = {"calibrate": True}, {"calibrate": True, "rounding": "gptq"}
    mse, none, smooth = {"scale": "mse"}, {"outlier_columns": 0}, {"smooth": ALPHA}
    rotated: dict[str, Any] = {"format": "compressed-tensors", "rotate": 256}
    down = partial(decode, only="down_proj")
    rows = [
        Variant("bitsandbytes, threshold 6", plain, None),
        Variant("bitsandbytes, gptq", {**gptq, **none}, None),
        Variant("plain int8, no outliers", plain, threshold=0.0),
        Variant("plain int8, gptq", {**gptq, **none}, threshold=0.0),
        Variant(f"plain int8, smoothing {ALPHA:g}", {**auto, **none, **smooth}, threshold=0.0),
        Variant("dynamic, threshold 6", plain, threshold=6.0),
        Variant("dynamic, threshold 6, gptq", {**gptq, **none}, threshold=6.0),
        Variant("dynamic, threshold 3", plain, threshold=3.0),
        *(Variant(f"static, {n} columns", {**auto, "outlier_columns": n}, "static") for n in (8, 64)),
        Variant("static, auto", auto, "static"),
        Variant("static, auto, gptq", gptq, "static"),
        Variant("static, auto, down_proj in 16-bit", auto, "static", wrap=down),
        Variant("hybrid, no columns", plain, "hybrid"),
        Variant("hybrid, auto", auto, "hybrid"),
        Variant("hybrid, auto, scale mse", {**auto, **mse}, "hybrid"),
        Variant("hybrid, auto, gptq", gptq, "hybrid"),
        Variant(f"hybrid, auto, smoothing {ALPHA:g}", {**auto, **smooth}, "hybrid"),
        Variant("rotated", rotated),
        Variant("rotated, scale mse", {**rotated, **auto, **mse}),
        Variant("rotated, gptq", {**rotated, **gptq}),
        Variant("rotated, gptq, scale mse", {**rotated, **gptq, **mse}),
        Variant("rotated, gptq, down_proj in 16-bit", {**rotated, **gptq}, wrap=down),
        Variant("weights only, plain", plain, wrap=decode),
        Variant("weights only, scale mse", {**auto, **mse, **none}, wrap=decode),
        Variant("weights only, gptq", {**gptq, **none}, wrap=decode),
        Variant("weights only, gptq, scale mse", {**gptq, **mse, **none}, wrap=decode),
        Variant("weights only, auto", auto, "static", wrap=decode),
        Variant("weights only, auto, gptq", gptq, "static", wrap=decode),
        Variant("weights only, rotated", rotated, wrap=decode),
        Variant("weights only, rotated, gptq", {**rotated, **gptq}, wrap=decode),
    ]
    return rows


def main() -> None:
    """Score every variant, then time them; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a checkpoint; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--name", default=MODEL)
    parser.add_argument("--only", default="", help="names of variants, with semicolons between; all if left out")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text to score")
    parser.add_argument("--calibrate", type=Path, default=None, help="the rest of the scored text if left out")
    parser.add_argument(
        "--part", choices=["both", "scores", "times"], default="both", help="times: add them to a table"
    )
    arguments = parser.parse_args()
    source = arguments.model or find_model()
    names = [name.strip() for name in arguments.only.split(";") if name.strip()]
    chosen = [variant for variant in variants() if not names or variant.name in names]
    result = f"quality-{arguments.name}".lower()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(source, Path(folder), arguments.text, arguments.calibrate)
        if arguments.part == "times":
            found = json.loads((RESULTS / f"{result}.json").read_text())
        else:
            found = {"model": arguments.name, **scores(work, chosen)}
        if arguments.part != "scores":
            add_costs(work, [variant for variant in chosen if variant.name in found["rows"]], found["rows"])
    print(table(found["rows"]))
    print(f"written to {write(result, found)}")


class Work:
    """The source, the tokens to score, and artifacts by the options they were made with; each is made only once.

    Args:
        source: A checkpoint.
        folder: An empty folder for the artifacts.
        text: The text to score.
        calibration: The text to calibrate with; None for the part of `text` after the scored tokens.
    """

    def __init__(self, source: str, folder: Path, text: Path = TEXT, calibration: Path | None = None) -> None:
        if source.endswith(".gguf"):  # the same numbers, faster to read repeatedly
            source = str(convert(source, folder / "source", format="float16").out)
        with quiet():
            tokenizer = find_tokenizer(open_checkpoint(source))
            encoded = tokenizer(text.read_text(), return_offsets_mapping=True, return_tensors="pt")
        if calibration is None:
            calibration = folder / "calibration.txt"
            calibration.write_text(text.read_text()[int(encoded["offset_mapping"][0, TOKENS - 1, 1]) :])
        self.ids = encoded["input_ids"][0, :TOKENS]
        self.reference = load(source, "cpu", dtype="float32")[0]
        self._source, self._folder, self._calibration = source, folder, calibration
        self._made: dict[str, Path] = {}

    def load(self, variant: Variant) -> Any:
        folder = self._artifact(variant.made)
        if variant.mode is None:
            with quiet():
                return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        mode: Any = "hybrid" if variant.mode == "static" else variant.mode
        model = load(folder, "cpu", dtype="float32", mode=mode, threshold=variant.threshold)[0]
        for layer in int8_layers(model).values():
            layer.mode = variant.mode
        return model

    def size(self, variant: Variant) -> int:
        return sum(path.stat().st_size for path in self._artifact(variant.made).glob("*.safetensors"))

    def _artifact(self, made: dict[str, Any]) -> Path:
        key = repr(sorted(made.items()))
        if key not in self._made:
            options = {**made, "calibrate": self._calibration} if made.get("calibrate") else made
            out = self._folder / str(len(self._made))
            self._made[key] = convert(self._source, out, check=False, **options).out
        return self._made[key]


def scores(work: Work, chosen: list[Variant]) -> dict[str, Any]:
    """The figures of each variant, by name, without times."""
    rows: dict[str, dict[str, Any]] = {}
    for variant in chosen:
        model = work.load(variant)
        with variant.wrap(model) if variant.wrap else contextlib.nullcontext(), torch.inference_mode():
            rows[variant.name] = figures(compare(model, work.reference, work.ids, CONTEXT))
        rows[variant.name]["bytes"] = work.size(variant)
        print(variant.name, rows[variant.name], flush=True)
        del model
    base = next(rows[name] for name in (*BASES, *rows) if name in rows)["kl"]
    for row in rows.values():
        row["ratio"] = round(row["kl"] / base, 3)
    return {"tokens": len(work.ids), "context": CONTEXT, "rows": rows}


def add_costs(work: Work, chosen: list[Variant], rows: dict[str, dict[str, Any]]) -> None:
    """Measure the times, and put them into the rows. Codes to nearest take as long as chosen ones."""
    blocks = _sampled(work.reference.config.num_hidden_layers)
    layers: dict[str, dict[str, nn.Module]] = {}
    same: dict[str, str] = {}  # name of a variant -> the one whose time it has
    for variant in chosen:
        if variant.wrap is None:
            made = {key: value for key, value in variant.made.items() if key not in ("rounding", "scale")}
            if not {"smooth", "outlier_columns"} & made.keys() and (made.get("rotate") or variant.mode is None):
                made.pop("calibrate", None)
            like = replace(variant, made=made, name="")
            same[variant.name] = repr(like)
            if repr(like) not in layers:
                found = int8_layers(work.load(like))
                layers[repr(like)] = {
                    name: copy.deepcopy(layer) for name, layer in found.items() if name.split(".")[2] in blocks
                }
    inputs = _inputs(work.reference, work.ids[:TIMED_TOKENS], set().union(*layers.values()))
    found_costs = costs(layers, inputs, same.get(BASE, ""))
    for name, like_name in same.items():
        if like_name in found_costs:
            rows[name]["cost"] = found_costs[like_name]


def figures(pairs: Pairs) -> dict[str, Any]:
    """KL divergence in nats per token with half its 95% interval, top-1 agreement, and perplexities."""
    found = interval(pairs.kl)
    return {
        "kl": round(float(pairs.kl.mean()), 6),
        "within": None if found.high is None else round(found.high - found.value, 6),
        "median": round(float(np.median(pairs.kl)), 8),
        "p99": round(float(np.quantile(pairs.kl, 0.99)), 5),
        "top1": round(float(pairs.same_top1.mean()), 4),
        "perplexity": round(float(np.exp(pairs.nll.mean())), 3),
        "reference": round(float(np.exp(pairs.reference_nll.mean())), 3),
        "scored": len(pairs.nll),
    }


def costs(layers: dict[str, dict[str, nn.Module]], inputs: dict[str, Tensor], base: str) -> dict[str, float]:
    """Time of each variant's layers relative to those of `base`."""
    if base not in layers:
        return {}
    least = dict.fromkeys(layers, 0.0)
    with torch.inference_mode():
        for module, x in inputs.items():
            times: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(ROUNDS + 1):  # the first round packs and compiles
                names = random.sample(list(layers), len(layers))  # in random order, so that caches affect all alike
                for name, own in ((name, layers[name]) for name in names):
                    start = time.perf_counter()
                    own[module](x)
                    times[name].append(time.perf_counter() - start)
            for name, found in times.items():
                least[name] += min(found[1:])
    return {name: round(total / least[base], 3) for name, total in least.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    smallest = min(row["bytes"] for row in rows.values())
    lines = [
        "| | KL | of bitsandbytes' | 99% | top-1 | perplexity | time | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cost = f"{row['cost']:.2f}" if "cost" in row else ""
        more = f"{row['bytes'] / smallest - 1:+.1%}" if row["bytes"] > 1.0005 * smallest else ""
        within = f" ± {row['within']:.5f}" if row.get("within") is not None else ""
        lines.append(
            f"| {name} | {row['kl']:.5f}{within} | {row['ratio']:.2f} | {row['p99']:.3f} | {row['top1']:.1%} | "
            f"{row['perplexity']:.3f} | {cost} | {more} |"
        )
    return "\n".join(lines)


def _sampled(layers: int) -> set[str]:
    return {str(number) for number in (1, layers // 2, layers - 2)}


def _inputs(reference: Any, ids: Tensor, names: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0][0].clone()

    hooks = [reference.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
    with torch.inference_mode():
        reference(ids[None])
    for hook in hooks:
        hook.remove()
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
