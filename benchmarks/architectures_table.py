"""The results of `architectures` as Markdown, for the terminal and for docs/architectures.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

Rows = list[dict[str, Any]]


def summary(rows: Rows) -> list[str]:
    """How many types have which verdict, by kind."""
    kinds = list(dict.fromkeys(row.get("kind", "-") for row in rows))
    verdicts = list(Counter(row["verdict"] for row in rows))
    lines = [f"| kind | {' | '.join(verdicts)} |", "|---" * (1 + len(verdicts)) + "|"]
    for kind in kinds:
        counts = Counter(row["verdict"] for row in rows if row.get("kind", "-") == kind)
        lines.append(f"| {kind} | {' | '.join(str(counts[verdict]) for verdict in verdicts)} |")
    return lines
