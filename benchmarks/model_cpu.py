"""Whole models on a CPU: prefill of 512 tokens and decode of 64, the float source against its int8 artifact.

Both are transformers models, run alternately by the same loop in one process, with the cache of `quantize8 run`.
Outside the int8 layers they compute in bfloat16, or in float32 if the unit has no AVX-512. "int8 head" is the same
artifact with an int8 output head, as both peers have. --compile adds a static cache and a decode step through
torch.compile.

CTranslate2 runs the same model in int8, including its output head and embeddings, and llama.cpp (xllamacpp) in Q8_0.
Each is left out if it is not installed.

Run: [QUANTIZE8_UNIT=avx2] python -m benchmarks.model_cpu [--compile] [MODEL ...]
MODEL is a folder or GGUF file (default: SmolLM2-135M-Instruct from its package, and a random Llama of 1.2 billion
weights).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import convert as convert_benchmark
from benchmarks.checkpoints import TOKENIZER_SIZE, add_tokenizer, make_llama
from benchmarks.cpu import has, hold_torch_to_unit, spread, write
from quantize8.commands.convert import convert
from quantize8.demo import find_model
from quantize8.kernels import cpu
from quantize8.runtime.cache import preallocated_cache
from quantize8.runtime.linear import Int8Linear
from quantize8.runtime.loading import load

PROMPT, STEPS = 512, 64
CTRANSLATE2 = """
import json, os, sys, time, ctranslate2
folder, threads, prompt, steps = sys.argv[1], *map(int, sys.argv[2:])
model = ctranslate2.Generator(folder, compute_type="int8_float32", intra_threads=threads)
tokens = json.load(open(folder + "/vocabulary.json"))[:prompt]
for _ in range(2):  # the first is to warm up
    start = time.perf_counter()
    stream = model.generate_tokens(tokens, max_length=steps + 1, sampling_topk=1, end_token=[])
    times = [time.perf_counter() for _ in stream]
print(prompt / (times[0] - start), (len(times) - 1) / (times[-1] - times[0]), flush=True)
os._exit(0)  # at exit, CTranslate2 sometimes aborts because a thread still runs
"""
LLAMA_CPP = """
import sys
from pathlib import Path
from benchmarks.llama_cpp import served
threads, prompt, steps, size = map(int, sys.argv[2:])
with served(Path(sys.argv[1]), prompt + steps + 8, threads) as server:
    for _ in range(2):  # the first is to warm up
        speeds = server.speed([i % size for i in range(prompt)], steps)
print(*speeds)
"""
HEAD = "quantize8, int8 head"
VARIANTS = (
    "float",
    "quantize8",
    HEAD,
    "CTranslate2",
    "llama.cpp",
)  # in the table; compiled ones only in the results


def main() -> None:
    """Convert, load and time each model; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also a compiled decode step; takes minutes more")
    chosen = parser.parse_args()
    hold_torch_to_unit("benchmarks.model_cpu")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = chosen.models
        if not models:
            make_llama(folder / "llama-1.2b", layers=20, vocabulary=TOKENIZER_SIZE, shards=4)
            add_tokenizer(folder / "llama-1.2b")
            models = [Path(find_model()), folder / "llama-1.2b"]
        for number, model in enumerate(models):
            row = measure(model, folder / str(number), chosen.rounds, chosen.compile)
            rows.append(row)
            print(line(row), flush=True)
    values = {"unit": cpu.chosen(), "dtype": dtype(), "threads": torch.get_num_threads(), "rows": rows}
    print(f"written to {write(f'model-cpu-{cpu.chosen()}', values)}")


def dtype() -> str:
    """The fast dtype outside the int8 layers: without AVX-512, bfloat16 is many times slower than float32."""
    return "bfloat16" if cpu.chosen() in ("amx", "avx512vnni") else "float32"


def measure(source: Path, folder: Path, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Tokens per second of each variant and phase. Works in a new folder."""
    folder.mkdir()
    convert(str(source), folder / "int8", device="cpu")
    models = {
        "float": load(source, "cpu", dtype=dtype())[0],
        "quantize8": load(folder / "int8", "cpu", dtype=dtype())[0],
    }
    head = Int8Linear.from_float(models["quantize8"].get_output_embeddings())
    runs: dict[str, Callable[[], tuple[float, float]]] = {HEAD: partial(_with_head, models["quantize8"], head)}
    for name, model in models.items():
        runs[name] = partial(generate, model)
        if compiled:
            step = torch.compile(model, dynamic=False)
            runs[f"{name}, compiled"] = partial(generate, model, step)
    if has("ctranslate2"):
        runs["CTranslate2"] = _ctranslate2(source, folder)
    if has("xllamacpp"):
        runs["llama.cpp"] = _llama_cpp(source, folder, models["float"].config.vocab_size)
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            prefill, decode = run()
            if round_:  # the first warms up, packs the weights and compiles
                found[name]["prefill"].append(prefill)
                found[name]["decode"].append(decode)
    speeds = {name: {phase: spread(values) for phase, values in phases.items()} for name, phases in found.items()}
    return {"model": source.name, "tokens_per_s": speeds}


def generate(model: Any, step: Any = None) -> tuple[float, float]:
    """Tokens per second of one prefill, and of the greedy steps after it, for which `step` is the compiled model."""
    from transformers import StaticCache

    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with torch.inference_mode():
        if step is None:
            cache = preallocated_cache(model, PROMPT + STEPS)
        else:
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
        start = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        middle = time.perf_counter()
        for i in range(STEPS):
            given = {} if step is None else {"cache_position": torch.tensor([PROMPT + i])}
            output = (model if step is None else step)(token, past_key_values=cache, logits_to_keep=1, **given)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        end = time.perf_counter()
    return PROMPT / (middle - start), STEPS / (end - middle)


def _with_head(model: Any, head: Int8Linear) -> tuple[float, float]:
    """The same artifact with another output head."""
    own = model.get_output_embeddings()
    model.set_output_embeddings(head)
    try:
        return generate(model)
    finally:
        model.set_output_embeddings(own)


def _ctranslate2(source: Path, folder: Path) -> Callable[[], tuple[float, float]]:
    """The same for a model in CTranslate2's int8, in separate processes: its threads would slow the others down."""
    if source.is_file():
        model, tokenizer = load(source, "cpu", dtype="float16")
        source = folder / "float16"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    converted = str(folder / "ctranslate2")
    subprocess.run([sys.executable, "-c", convert_benchmark.CTRANSLATE2, str(source), converted], check=True)
    return _process(CTRANSLATE2, converted, torch.get_num_threads(), PROMPT, STEPS)


def _llama_cpp(source: Path, folder: Path, vocabulary: int) -> Callable[[], tuple[float, float]]:
    """The same for llama.cpp in Q8_0."""
    convert(str(source), folder / "gguf", format="gguf", device="cpu")
    (path,) = (folder / "gguf").glob("*.gguf")
    return _process(LLAMA_CPP, path, torch.get_num_threads(), PROMPT, STEPS, vocabulary)


def _process(script: str, *arguments: Any) -> Callable[[], tuple[float, float]]:
    """Run a script that prints both speeds in a separate process."""

    def run() -> tuple[float, float]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        prefill, decode = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return float(prefill), float(decode)

    return run


def line(row: dict[str, Any]) -> str:
    """One model as a table row: prefill / decode in tokens per second."""
    speeds = row["tokens_per_s"]
    cells = [
        f"{speeds[name]['prefill']['median']:.0f} / {speeds[name]['decode']['median']:.1f}" if name in speeds else "-"
        for name in VARIANTS
    ]
    return f"| {row['model']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
