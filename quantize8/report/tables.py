"""What all tables here share: how they look, and how sizes and times are written."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def duration(seconds: float) -> str:
    """A time in its usual unit."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def listed(text: str) -> Text:
    """A cell whose end a narrow terminal cuts off, so that a row stays one line."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def table(*columns: tuple[Any, Any], one_line: bool = False) -> Table:
    """An empty table of these columns, each with its title and side; the last may take several lines."""
    made = Table(box=None, pad_edge=False, show_header=any(title for title, _ in columns))
    for title, side in columns:
        made.add_column(title, justify=side, overflow="fold", no_wrap=one_line)
    made.columns[-1].no_wrap = False
    return made
