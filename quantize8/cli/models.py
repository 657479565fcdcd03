"""Commands that read a model: inspect, run and evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from quantize8.cli.options import Json, Mode, Page, Revision, Token
from quantize8.cli.terminal import show, stream


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint or artifact: folder, file or hub id.")],
    text: Annotated[
        str | None, typer.Option(help="Text file: report outliers in the activations on this text.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Outlier threshold: |x| >= this (with --text).")] = 6.0,
    layer: Annotated[str, typer.Option(help="Glob pattern of module names to report.")] = "*",
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of the text to use.")] = 1024,
    budget: Annotated[
        float, typer.Option(help="Largest mean relative error of int8 outputs for the recommended threshold.")
    ] = 0.025,
    page: Page = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show outlier statistics of the weights, or with --text of the activations."""
    from quantize8 import reports
    from quantize8.calibration.outliers import ActivationReport
    from quantize8.commands.inspect import inspect as operation
    from quantize8.reports.pages import build

    build.check(page)
    result = operation(
        model, text=text, threshold=threshold, layer=layer, tokens=tokens, budget=budget, revision=revision, token=token
    )
    show(
        result,
        reports.activations(result) if isinstance(result, ActivationReport) else reports.weights(result),
        as_json,
    )
    build.write(page, result, model)


def run(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint: folder, file or hub id.")],
    prompt: Annotated[str, typer.Option(help="Prompt to continue.")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 64,
    compare: Annotated[str | None, typer.Option(help="Source checkpoint to run and compare with.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    mode: Mode = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Generate text greedily as a quick check, and show the speed."""
    from quantize8 import reports
    from quantize8.commands.run import Comparison
    from quantize8.commands.run import run as operation

    write = None if as_json else stream
    result = operation(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        compare=compare,
        device=device,
        mode=mode,
        chat=chat,
        revision=revision,
        token=token,
        on_text=write,
    )
    if write is not None:
        write("\n\n")
    show(result, reports.comparison(result) if isinstance(result, Comparison) else reports.generation(result), as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint: folder, file or hub id.")],
    text: Annotated[str | None, typer.Option(help="Text file to score.  [default: a bundled text]")] = None,
    reference: Annotated[str | None, typer.Option(help="Checkpoint to compare with, such as the source.")] = None,
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Number of tokens of the text to use.")] = 4096,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare the hidden states after each layer (with --reference).")
    ] = False,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    mode: Mode = None,
    threshold: Annotated[float | None, typer.Option(help="Outlier threshold, 0 for none.  [default: stored]")] = None,
    page: Page = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and with --reference the KL divergence from that model."""
    from quantize8 import reports
    from quantize8.commands.evaluate import evaluate as operation
    from quantize8.reports.pages import build

    build.check(page)
    result = operation(
        model, text=text, reference=reference, context=context, tokens=tokens, layers=layers, device=device,
        mode=mode, threshold=threshold, revision=revision, token=token,
    )  # fmt: skip
    show(result, reports.evaluation(result), as_json)
    build.write(page, result, model)
