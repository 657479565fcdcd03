"""The results of `architectures` as Markdown, for the terminal and for docs/architectures.md."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
TARGETS = ("bitsandbytes", "w8a8", "w8a16")
ALONE = "w8a8, moe vllm"
VERDICTS = ("ok", "refused", "FAULT", "WRONG", "FAILS", "crashed", "not run", "not built")
MOST_NAMES = 3  # of the tensors that a reason is for


def summary(rows: list[Row]) -> list[str]:
    """How many types have which verdict, by kind."""
    verdicts = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    lines = [f"| kind | {' | '.join(verdicts)} | all |", "|---" * (2 + len(verdicts)) + "|"]
    for kind in [*kinds(rows), "all"]:
        counts = Counter(row["verdict"] for row in rows if kind in ("all", row["kind"]))
        cells = " | ".join(str(counts[verdict]) for verdict in verdicts)
        lines.append(f"| {kind} | {cells} | {counts.total()} |")
    return lines


def kinds(rows: list[Row]) -> list[str]:
    """The kinds of models, in order."""
    return list(dict.fromkeys(row["kind"] for row in rows))


def table(rows: list[Row], kind: str) -> list[str]:
    """A line for each type of a kind that ran."""
    codes = reasons(rows)
    lines = ["| model type | int8 | bitsandbytes | w8a8 | w8a16 | in float |", "|---" * 6 + "|"]
    for row in rows:
        if row["kind"] == kind and "targets" in row:
            cells = " | ".join(cell(row["targets"][target]) for target in TARGETS)
            lines.append(f"| `{row['model_type']}` | {_shares(row)} | {cells} | {_in_float(row, codes)} |")
    return lines


def cell(target: Row) -> str:
    """The error in transformers / in quantize8.load, in percent."""
    if "loaders" not in target:
        return str(target["verdict"])
    return " / ".join(_figure(target["loaders"][name]) for name in ("transformers", "load"))


def _figure(loader: Row) -> str:
    if "errors" not in loader:
        return str(loader["verdict"])
    values = [float("inf") if value == "infinite" else value for value in loader["errors"].values()]
    return f"{100 * max(values):.1f}" + ("" if loader["verdict"] == "ok" else f" {loader['verdict']}")


def reasons(rows: list[Row]) -> dict[str, str]:
    """The reasons why tensors stay in floating point -> a letter, the most frequent first."""
    counts = Counter(each["reason"] for row in rows for each in _kept(row))
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return {reason: _letter(number) for number, reason in enumerate(ordered)}


def legend(rows: list[Row]) -> list[str]:
    """What the letters mean, with tensors as examples."""
    lines = []
    for reason, letter in reasons(rows).items():
        tensors = [name for row in rows for each in _kept(row, reason) for name in each["tensors"]]
        names = Counter(re.sub(r".*\*\.", "", name) for name in tensors)
        examples = ", ".join(f"`{name}`" for name, _ in names.most_common(MOST_NAMES))
        lines += _wrapped(f"- **{letter}**: {reason} ({examples})")
    return lines


def grouped(rows: list[Row], verdict: str) -> list[str]:
    """The types that a loader or a conversion fails for in the same way."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for where, reason in _failures(row, verdict):
            types = found.setdefault(f"{where}: {reason}" if where else reason, [])
            types += [] if row["model_type"] in types else [row["model_type"]]
    return [line for reason, types in found.items() for line in _wrapped(f"- {', '.join(types)}: {reason}")]


def _failures(row: Row, verdict: str) -> Iterable[tuple[str, str]]:
    if "targets" not in row:
        return [("", row["reason"])] if row["verdict"] == verdict else []
    found = []
    for target, result in row["targets"].items():
        if result["verdict"] == verdict:
            found.append((target, result["reason"]))
        for name, loader in result.get("loaders", {}).items():
            if loader["verdict"] == verdict:
                reason = loader.get("without quantize8") or loader.get("reason") or f"errors {loader['errors']}"
                found.append((f"{target}, {name}", reason))
    joined: dict[str, list[str]] = {}
    for where, reason in found:
        joined.setdefault(_plain(reason), []).append(where)
    return [("; ".join(places), reason) for reason, places in joined.items()]


def _plain(reason: str) -> str:
    """A reason without what differs from model to model, and without what Markdown would take for markup."""
    reason = re.sub(r"\(\d+\)|(?<=for example )\S+", lambda match: "(n)" if "(" in match[0] else "one", reason)
    reason = re.sub(r"missing keys: .*", "missing keys", reason)
    reason = re.sub(r"source keys=.*", "source keys have no single target", reason)
    return re.sub(r"[*_`<>|\[\]]", " ", reason.replace("'", ""))[:160].strip()


def _shares(row: Row) -> str:
    names = (*TARGETS[:2], "w8a8, moe vllm")
    shares = [f"{100 * row['targets'][name]['int8']:.0f}" for name in names if "int8" in row["targets"].get(name, {})]
    return " / ".join(dict.fromkeys(shares)) or "-"


def _in_float(row: Row, codes: dict[str, str]) -> str:
    shares: Counter[str] = Counter()
    for each in _kept(row):
        shares[codes[each["reason"]]] += each["share"]
    return ", ".join(f"{letter} {100 * share:.0f}" for letter, share in sorted(shares.items())) or "-"


def _kept(row: Row, reason: str | None = None) -> list[Row]:
    """The large float tensors of w8a8, or of bitsandbytes if a model is refused as w8a8."""
    targets = [row.get("targets", {}).get(name, {}) for name in ("w8a8", "bitsandbytes")]
    found: list[Row] = next((target["float"] for target in targets if "float" in target), [])
    named = [each | {"reason": _without_names(each["reason"])} for each in found]
    return [each for each in named if reason in (None, each["reason"])]


def _without_names(reason: str) -> str:
    """A reason without the names of modules and classes of one model."""
    reason = re.sub(r"^in \S+, outside", "outside", reason)
    return re.sub(r"^a parameter of \w+$", "a parameter of a module that is no Linear layer", reason)


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"a{chr(ord('a') + number - 26)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def filled(page: str, rows: list[Row]) -> str:
    """A page with the tables of these rows between its markers, such as <!-- table: text --> and <!-- end -->."""

    def part(match: re.Match[str]) -> str:
        name, _, argument = match[1].partition(": ")
        parts = {"summary": summary, "legend": legend, "table": table, "grouped": grouped}
        lines = parts[name](rows, *([argument] if argument else []))  # type: ignore[operator]
        return "\n\n".join([f"<!-- {match[1]} -->", "\n".join(lines) or "None.", "<!-- end -->"])

    return re.sub(r"<!-- ([^>]*?) -->\n(?:.*?\n)??<!-- end -->", part, page, flags=re.DOTALL)
