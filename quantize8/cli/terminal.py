"""What commands print: results as tables or JSON, a progress bar, and generated text as it arrives."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from quantize8.conversion.driver import Progress


def show(result: Any, rendered: RenderableType, as_json: bool) -> None:
    """Print a result as it is rendered, or as JSON."""
    from quantize8 import reports

    if as_json:
        typer.echo(json.dumps(reports.as_json(result), indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)  # a log file has no width of its own
    console.print(rendered)


def stream(text: str) -> None:
    """Print a piece of text immediately."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr; it shows nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, start=True)
        yield lambda done, total: bar.update(task, completed=done, total=total)
