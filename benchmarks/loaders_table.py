"""The results of `loaders` as tables in Markdown, for the terminal and for docs/loaders.md."""

from __future__ import annotations

from typing import Any

LOADERS = {"bitsandbytes": "transformers, bitsandbytes", "gguf": "llama.cpp"}
LOADERS |= dict.fromkeys(("w8a8", "w8a8, moe transformers", "w8a16"), "transformers, compressed-tensors")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each model and target, a column for each source."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines = [f"| model | target | {' | '.join(sources)} |", "|---" * (2 + len(sources)) + "|"]
    for model, target in dict.fromkeys((row["model"], row["target"]) for row in rows):
        cells = {row["source"]: cell(row) for row in rows if (row["model"], row["target"]) == (model, target)}
        lines.append(f"| {model} | {target} | {' | '.join(cells[source] for source in sources)} |")
    return lines


def worst(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: of each loader, over all models and sources, the figures furthest from equality."""
    lines = ["| opened by | target | outputs | top-1 | KL | weights |", "|---|---|---|---|---|---|"]
    for name in ("loader", "load"):
        for target in dict.fromkeys(row["target"] for row in rows):
            found = [row[name] for row in rows if row["target"] == target and "apart" in row.get(name, {})]
            columns = {key: [each[key] for each in found if key in each] for key in ("apart", "top1", "kl", "weights")}
            cells = [_short((min if key == "top1" else max)(values, default=None)) for key, values in columns.items()]
            opened_by = LOADERS.get(target, "transformers") if name == "loader" else "quantize8.load"
            lines.append(f"| {opened_by} | {target} | {' | '.join(cells)} |")
    return lines


def cell(row: dict[str, Any]) -> str:
    """One cell: how far the outputs are apart in the target's own loader / in quantize8.load."""
    if "load" not in row:
        return str(row["status"])
    figures = (_short(row[name]["apart"]) if "apart" in row[name] else "cannot" for name in ("loader", "load"))
    return " / ".join(figures) + (" FAILS" if row["status"] == "fails" else "")


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value in (0, 1) else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"
