"""An int8 artifact in the compressed-tensors format, served by vLLM on a CPU and queried through the `openai` client.

Converts SmolLM2-135M-Instruct (from its PyPI package), starts vLLM's OpenAI-compatible server, which has its own
virtual environment, asks a few questions greedily, and asks `quantize8.run` the same if it opens the artifact. Answers
diverge at the first near tie, so a text is scored, too: its perplexity from vLLM next to that from the source. Results
go to results/serve-vllm.json. If a server does not start, the end of its log is shown and the exit code is 1.

Run: python -m benchmarks.serve_vllm [--venv FOLDER] [--scheme SCHEME ...] [--artifact FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import quantize8
from benchmarks import vllm_server
from benchmarks.cpu import write
from quantize8.calibration.text import read_text
from quantize8.commands.evaluate import perplexity
from quantize8.demo import find_model
from quantize8.files import TEXT
from quantize8.runtime.loading import load

SCHEMES = ("w8a8", "w8a16")
NEW_TOKENS = 32
QUESTIONS = (
    ("completion", "The capital of France is"),
    ("completion", "Water freezes at a temperature of"),
    ("completion", "To make a cup of tea, first"),
    ("chat", "Name three planets of the solar system."),
)
CHARACTERS = 1800  # of the text to score: about 400 tokens
CLIENT = Path(__file__).with_name("openai_questions.py")
CHOICE = re.compile(r"CompressedTensors\w+|\w*Kernel\b")  # names of schemes and kernels in vLLM


def main() -> None:
    """Install, convert, serve and ask; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="for vLLM; made, or used again")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=["w8a8"], help="to convert to, one or both")
    parser.add_argument("--artifact", nargs="+", type=Path, help="serve these folders instead; nothing is converted")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exception, so that the server is stopped too
    python = vllm_server.install(asked.venv)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = [measure(python, model, work) for model in asked.artifact or _converted(asked.scheme, work)]
    found: dict[str, Any] = {"max_tokens": NEW_TOKENS, "rows": rows}
    if not asked.artifact:
        found["source"] = score(find_model())
        print(f"perplexity from the source, in float32: {found['source']['perplexity']:.3f}")
    print(f"written to {write('serve-vllm', found)}")
    sys.exit(0 if all(row["served"] for row in rows) else 1)


def _converted(schemes: list[str], work: Path) -> Iterator[Path]:
    for scheme in schemes:
        out = work / f"smollm2-{scheme}"
        quantize8.convert(find_model(), out, format="compressed-tensors", scheme=scheme)
        yield out


def measure(python: Path, model: Path, work: Path) -> dict[str, Any]:
    """The answers of one artifact's server, or the end of its log."""
    log = work / "server.log"
    format_ = json.loads((model / "config.json").read_text())["quantization_config"]["format"]
    row: dict[str, Any] = {"model": model.name, "format": format_, "served": False}
    print(f"{model.name} ({format_}): starting vLLM", flush=True)
    start = time.perf_counter()
    try:
        with vllm_server.server(python, model, log) as url:
            row["start_seconds"] = time.perf_counter() - start
            row |= questions(python, url) | {"served": True}
    except vllm_server.ServerError as error:
        print(error)
        return row | {"error": [line.replace(str(model), model.name) for line in error.cause]}
    row["vllm_says"] = choices(log.read_text(errors="replace"))
    print(*row["vllm_says"], sep="\n")
    row["quantize8_run"] = beside(model, row)
    show(row)
    return row


def questions(python: Path, url: str) -> dict[str, Any]:
    """Answers and versions, from the client in the server's environment."""
    asked: dict[str, Any] = {"url": url, "model": vllm_server.NAME, "max_tokens": NEW_TOKENS, "questions": QUESTIONS}
    asked["text"] = read_text(TEXT)[:CHARACTERS]
    process = subprocess.run(
        [str(python), str(CLIENT)],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        env=vllm_server.environment(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"),
    )
    if process.returncode:  # its own error is above, on stderr
        raise vllm_server.ServerError([f"the client ended with exit code {process.returncode}"])
    answered: dict[str, Any] = json.loads(process.stdout)
    return answered


def choices(log: str) -> list[str]:
    """Log messages that name a scheme or a kernel for the weights, each once, without time and process."""
    messages = [vllm_server.message(line) for line in log.splitlines() if CHOICE.search(line)]
    return list(dict.fromkeys(messages))


def score(model: str) -> dict[str, Any]:
    """The text that vLLM scores, scored by quantize8 in float32: perplexity and number of tokens."""
    opened, tokenizer = load(model, "cpu", dtype="float32")
    return asdict(perplexity(opened, tokenizer(read_text(TEXT)[:CHARACTERS], return_tensors="pt")["input_ids"][0]))


def beside(model: Path, row: dict[str, Any]) -> str:
    """Add quantize8's answers and its score of the text; says how many answers agree, or why there are none."""
    answers = row["answers"]
    try:
        for answer in answers:
            chat = answer["kind"] == "chat"
            ours = quantize8.run(str(model), answer["prompt"], max_new_tokens=NEW_TOKENS, device="cpu", chat=chat)
            answer["quantize8_run"] = ours.text
        row["text_by_quantize8"] = score(str(model))
    except quantize8.Quantize8Error as error:
        return f"left out: {str(error).replace(str(model), model.name)}"
    pairs = [(answer["answer"], answer["quantize8_run"]) for answer in answers]
    alike = [sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False))) for pair in pairs]
    same = sum(theirs == ours for theirs, ours in pairs)
    return f"{same} of {len(pairs)} answers are the same; they begin with {alike} characters in common"


def show(row: dict[str, Any]) -> None:
    """Print questions, answers and their speed."""
    for answer in row["answers"]:
        print(f"{answer['kind']}: {answer['prompt']!r}\n  vLLM:      {answer['answer']!r}", end="")
        print(f"  ({answer['tokens']} tokens, {answer['tokens'] / answer['seconds']:.1f} a second)")
        if answer.get("quantize8_run", answer["answer"]) != answer["answer"]:
            print(f"  quantize8: {answer['quantize8_run']!r}")
    print(f"quantize8.run: {row['quantize8_run']}")
    print(f"perplexity of {row['text']['scored']} tokens from vLLM: {row['text']['perplexity']:.3f}", flush=True)
    if "text_by_quantize8" in row:
        print(f"perplexity from quantize8, in float32: {row['text_by_quantize8']['perplexity']:.3f}", flush=True)


if __name__ == "__main__":
    main()
