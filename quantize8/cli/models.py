"""Commands that read a model: its outliers, what it says, how well it predicts."""

from __future__ import annotations

from typing import Annotated

import typer

from quantize8.cli.options import Json, Mode, Page, Revision, Token
from quantize8.cli.terminal import show, stream


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint or artifact.")],
    text: Annotated[
        str | None, typer.Option(help="Text file: show the outliers it brings about in activations.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="An outlier has |x| >= this.")] = 6.0,
    layer: Annotated[str, typer.Option(help="Only modules with such names; * for any characters.")] = "*",
    tokens: Annotated[int, typer.Option(min=1, help="Use so many tokens of the text.")] = 1024,
    budget: Annotated[
        float, typer.Option(help="Mean relative error of int8 outputs that the advised threshold keeps to.")
    ] = 0.025,
    page: Page = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show outlier statistics of weights, or with --text of activations."""
    from quantize8 import report
    from quantize8.model.outliers import ActivationReport
    from quantize8.operations.inspect import inspect as operation
    from quantize8.page import build

    build.check(page)
    result = operation(
        model, text=text, threshold=threshold, layer=layer, tokens=tokens, budget=budget, revision=revision, token=token
    )
    show(
        result, report.activations(result) if isinstance(result, ActivationReport) else report.weights(result), as_json
    )
    build.write(page, result, model)


def run(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    compare: Annotated[str | None, typer.Option(help="Source checkpoint to run beside.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mode: Mode = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Continue a text greedily, as a quick check; then say how fast."""
    from quantize8 import report
    from quantize8.operations.run import Comparison
    from quantize8.operations.run import run as operation

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
    show(result, report.comparison(result) if isinstance(result, Comparison) else report.generation(result), as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint.")],
    text: Annotated[str | None, typer.Option(help="Text file.  [default: an address that is shipped]")] = None,
    reference: Annotated[str | None, typer.Option(help="Checkpoint to compare with, such as the source.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Use so many tokens of the text.")] = 4096,
    layers: Annotated[bool, typer.Option("--layers", help="Compare hidden states after each layer, too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mode: Mode = None,
    threshold: Annotated[float | None, typer.Option(help="Outlier threshold.  [default: the artifact's]")] = None,
    page: Page = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Score a text: perplexity, and with --reference how far the predictions are from its own."""
    from quantize8 import report
    from quantize8.operations.evaluate import evaluate as operation
    from quantize8.page import build

    build.check(page)
    result = operation(
        model, text=text, reference=reference, context=context, tokens=tokens, layers=layers, device=device,
        mode=mode, threshold=threshold, revision=revision, token=token,
    )  # fmt: skip
    show(result, report.evaluation(result), as_json)
    build.write(page, result, model)
