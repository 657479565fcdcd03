"""The command line. Each command is one call of the library; nothing outside this package prints or exits."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from quantize8 import __version__
from quantize8.cli.artifacts import convert, finalize, plan, push, verify
from quantize8.cli.models import evaluate, inspect, run
from quantize8.cli.options import Json
from quantize8.cli.terminal import progress_bar, show
from quantize8.errors import Quantize8Error
from quantize8.kernels import ROTATIONS

_ROTATE = "--rotate"

app = typer.Typer(
    help="Quantize LLM checkpoints to int8 with LLM.int8(), inspect their outliers, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts faster and is readable in a log
)
for _command in (convert, plan, finalize, inspect, run, evaluate, verify, push):
    app.command()(_command)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions and devices, and how to install what is missing."""
    from quantize8 import reports
    from quantize8.commands.environment import environment

    result = environment()
    show(result, reports.environment(result), as_json)


@app.command()
def demo(
    out: Annotated[str | None, typer.Option(help="Output folder.  [default: SmolLM2-135M-Instruct-int8]")] = None,
    as_json: Json = False,
) -> None:
    """Convert, inspect and run SmolLM2-135M-Instruct, and compare int8 with its source."""
    from quantize8 import reports
    from quantize8.demo import demo as operation

    with progress_bar("converting") as progress:
        result = operation(out, on_step=lambda step: typer.echo(step, err=True), progress=progress)
    show(result, reports.demo(result), as_json)


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
    """Entry point: run a command. An error that the user can fix becomes one line on stderr and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app(_with_value(sys.argv[1:]))
    except Quantize8Error as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)


def _with_value(words: list[str]) -> list[str]:
    """The arguments with the default size after --rotate where no size follows, which Typer cannot express."""
    following = [*words[1:], "-"]
    return [f"{word}={ROTATIONS[0]}" if word == _ROTATE and after.startswith("-") else word
            for word, after in zip(words, following, strict=False)]  # fmt: skip


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo("warning: " + " ".join(str(message).split()), err=True)
