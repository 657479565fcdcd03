"""The command line. Each command is one call of the library; only this file prints and exits."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize8 import __version__
from quantize8.errors import Quantize8Error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from quantize8.artifact.writer import Progress

app = typer.Typer(
    help="Quantize LLM checkpoints to int8 with LLM.int8(), see their outliers, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts faster, and reads well in a log
)


class OutlierMode(str, Enum):
    """Values of --mode."""

    static = "static"
    dynamic = "dynamic"
    elementwise = "elementwise"
    bitsandbytes = "bitsandbytes"


_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Page = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html", help="Write a web page with plots too; a page there is replaced."),
]
_Mode = Annotated[
    OutlierMode | None,
    typer.Option(help="What is corrected for outliers.  [default: static where calibrated, else dynamic]"),
]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
_Token = Annotated[
    str | None,
    typer.Option(help="Hub token (default: the one of `hf auth login`).", envvar="HF_TOKEN", show_envvar=True),
]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder, or .safetensors, .bin or .gguf file.")],
    out: Annotated[str | None, typer.Option(help="New folder.  [default: <name>-int8]")] = None,
    format: Annotated[
        str, typer.Option(help="bitsandbytes, compressed-tensors, gguf, float16, bfloat16 or float32.")
    ] = "bitsandbytes",
    scheme: Annotated[str | None, typer.Option(help="Of compressed-tensors: w8a8 or w8a16.  [default: w8a8]")] = None,
    moe: Annotated[str | None, typer.Option(help="Its experts are for vllm or transformers.  [default: vllm]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Outlier threshold, 0 for none.  [default: the recipe's]")
    ] = None,
    calibrate: Annotated[str | None, typer.Option(help="Text file to choose and store outlier columns by.")] = None,
    outlier_columns: Annotated[str, typer.Option(help="auto, or how many of each weight.")] = "auto",
    smooth: Annotated[float | None, typer.Option(help="SmoothQuant's alpha, by that text: 0.5.")] = None,
    recipe: Annotated[str, typer.Option(help="llm-int8, int8, int8-all, or a .toml file.")] = "llm-int8",
    scale: Annotated[str, typer.Option(help="absmax, or mse: the one with the least squared error.")] = "absmax",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    workers: Annotated[int | None, typer.Option(help="Threads.  [default: one a processor]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and convert nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact at --out.")] = False,
    page: _Page = None,
    revision: _Revision = None,
    token: _Token = None,
    as_json: _Json = False,
) -> None:
    """Write an int8 artifact that other loaders open as it is, or a plain one of a quantized source."""
    from quantize8 import report
    from quantize8.operations.convert import convert as operation
    from quantize8.page import build

    build.check(page)
    with _progress("converting") as progress:
        result = operation(
            source, out, format=format, scheme=scheme, moe=moe, threshold=threshold, calibrate=calibrate,
            outlier_columns=outlier_columns, smooth=smooth, recipe=recipe, scale=scale, device=device,
            max_shard_size=max_shard_size, workers=workers, dry_run=dry_run, overwrite=overwrite,
            revision=revision, token=token, progress=progress,
        )  # fmt: skip
    _show(result, report.conversion(result), as_json)
    build.write(page, result, source)


@app.command()
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
    page: _Page = None,
    revision: _Revision = None,
    token: _Token = None,
    as_json: _Json = False,
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
    _show(
        result, report.activations(result) if isinstance(result, ActivationReport) else report.weights(result), as_json
    )
    build.write(page, result, model)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The capital of France is",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    compare: Annotated[str | None, typer.Option(help="Source checkpoint to run beside.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mode: _Mode = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    revision: _Revision = None,
    token: _Token = None,
    as_json: _Json = False,
) -> None:
    """Continue a text greedily, as a quick check; then say how fast."""
    from quantize8 import report
    from quantize8.operations.run import Comparison
    from quantize8.operations.run import run as operation

    write = None if as_json else _stream
    result = operation(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        compare=compare,
        device=device,
        mode=mode.value if mode else None,
        chat=chat,
        revision=revision,
        token=token,
        on_text=write,
    )
    if write is not None:
        write("\n\n")
    _show(result, report.comparison(result) if isinstance(result, Comparison) else report.generation(result), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact or checkpoint.")],
    text: Annotated[str | None, typer.Option(help="Text file.  [default: an address that is shipped]")] = None,
    reference: Annotated[str | None, typer.Option(help="Checkpoint to compare with, such as the source.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Use so many tokens of the text.")] = 4096,
    layers: Annotated[bool, typer.Option("--layers", help="Compare hidden states after each layer, too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mode: _Mode = None,
    threshold: Annotated[float | None, typer.Option(help="Outlier threshold.  [default: the artifact's]")] = None,
    page: _Page = None,
    revision: _Revision = None,
    token: _Token = None,
    as_json: _Json = False,
) -> None:
    """Score a text: perplexity, and with --reference how far the predictions are from its own."""
    from quantize8 import report
    from quantize8.operations.evaluate import evaluate as operation
    from quantize8.page import build

    build.check(page)
    result = operation(
        model, text=text, reference=reference, context=context, tokens=tokens, layers=layers, device=device,
        mode=mode.value if mode else None, threshold=threshold, revision=revision, token=token,
    )  # fmt: skip
    _show(result, report.evaluation(result), as_json)
    build.write(page, result, model)


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="Folder that convert wrote.")],
    as_json: _Json = False,
) -> None:
    """Check every byte of an artifact against its manifest."""
    from quantize8 import report
    from quantize8.operations.verify import verify as operation

    result = operation(artifact)
    _show(result, report.verification(result), as_json)


@app.command()
def env(as_json: _Json = False) -> None:
    """Show versions and devices, and what is missing with the command that mends it."""
    from quantize8 import report
    from quantize8.operations.environment import environment

    result = environment()
    _show(result, report.environment(result), as_json)


@app.command()
def demo(
    out: Annotated[str | None, typer.Option(help="Artifact folder.  [default: SmolLM2-135M-Instruct-int8]")] = None,
    as_json: _Json = False,
) -> None:
    """Convert, inspect and run SmolLM2-135M, and show what int8 cost."""
    from quantize8 import report
    from quantize8.demo import demo as operation

    with _progress("converting") as progress:
        result = operation(out, on_step=lambda step: typer.echo(step, err=True), progress=progress)
    _show(result, report.demo(result), as_json)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: run a command; an error that a user can mend becomes one line and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except Quantize8Error as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo("warning: " + " ".join(str(message).split()), err=True)


def _show(result: Any, rendered: RenderableType, as_json: bool) -> None:
    from quantize8 import report

    if as_json:
        typer.echo(json.dumps(report.as_json(result), indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)  # a log has no width of its own
    console.print(rendered)


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A progress bar on the terminal's error stream; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, start=True)
        yield lambda done, total: bar.update(task, completed=done, total=total)
