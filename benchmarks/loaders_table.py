"""The results of `loaders` as Markdown, for the terminal and for docs/loaders.md."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

Rows = list[dict[str, Any]]


def table(rows: Rows) -> list[str]:
    """A row for each model and target, a column for each source; targets with equal figures share a row."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = [f"| model | target | {' | '.join(sources)} |", "|---" * (2 + len(sources)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        found: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["model"] == model:
                found.setdefault(row["target"], {})[row["source"]] = cell(row)
        cells = ((target, " | ".join(each[source] for source in sources)) for target, each in found.items())
        lines += [f"| {model} | {targets} | {text} |" for targets, text in _joined(cells)]
    return lines


def worst(rows: Rows) -> list[str]:
    """For each target, the figures furthest from equality over all models, sources and both loaders."""
    names = ("outputs", "top-1", "KL", "weights")
    lines = [f"| target | {' | '.join(names)} | {' | '.join(f'load: {name}' for name in names)} |", "|---" * 9 + "|"]
    cells = []
    for target in dict.fromkeys(row["target"] for row in rows):
        figures = []
        for name in ("loader", "load"):
            found = [row[name] for row in rows if row["target"] == target and "apart" in row.get(name, {})]
            for key, furthest in (("apart", max), ("top1", min), ("kl", max), ("weights", max)):
                figures.append(_short(furthest((each[key] for each in found if key in each), default=None)))
        cells.append((target, " | ".join(figures)))
    return lines + [f"| {targets} | {text} |" for targets, text in _joined(cells)]


def reasons(rows: Rows) -> list[str]:
    """The reasons why conversions are refused or loaders fail."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        if row["status"] in ("refused", "cannot"):
            reason = re.sub(r"architecture \w+", "its architecture", row["reason"])
            where = found.setdefault(reason, {"target": {}, "model": {}})
            for key, names in where.items():
                names[row[key]] = None
    lines = [f"- {', '.join(x['target'])} of {'; '.join(x['model'])}: {reason}." for reason, x in found.items()]
    options: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return [line for text in lines for line in textwrap.wrap(text, 120, **options)]


def cell(row: dict[str, Any]) -> str:
    """Difference of the outputs in percent: in the loader of the target / in quantize8.load."""
    if "load" not in row:
        return "-" if row["status"] == "no source" else str(row["status"])
    figures = (_percent(row[name]["apart"]) if "apart" in row[name] else "cannot" for name in ("loader", "load"))
    return " / ".join(figures) + (" FAILS" if row["status"] == "fails" else "")


def _joined(cells: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merge (name, text) pairs with equal text into (names, text)."""
    found: dict[str, list[str]] = {}
    for name, text in cells:
        found.setdefault(text, []).append(name)
    return [(", ".join(names), text) for text, names in found.items()]


def _percent(value: float) -> str:
    return "0" if value == 0 else "<0.1" if value < 5e-4 else f"{100 * value:.1f}"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value in (0, 1) else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"
