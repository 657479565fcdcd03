"""What all tables share: their style, and how sizes and times are written."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


def size(nbytes: float) -> str:
    """Bytes in decimal units, like disks and the hub."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def duration(seconds: float) -> str:
    """A time in s, min or h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def listed(text: str) -> Text:
    """A cell that is cut off at the end on a narrow terminal, so that a row stays on one line."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def table(*columns: tuple[Any, Any], one_line: bool = False) -> Table:
    """Make an empty table.

    Args:
        columns: Title and alignment ("left" or "right") of each column.
        one_line: Do not wrap cells, except in the last column.
    """
    made = Table(box=None, pad_edge=False, show_header=any(title for title, _ in columns))
    for title, side in columns:
        made.add_column(title, justify=side, overflow="fold", no_wrap=one_line)
    made.columns[-1].no_wrap = False
    return made
