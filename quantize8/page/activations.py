"""A page about the outliers that a text brings about in activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantize8.operations.inspect import EMERGENT_LAYERS, EMERGENT_POSITIONS, ActivationReport
from quantize8.page import charts, markup, names

_SHOWN = 3  # names in a sentence
_TABLE = 1000  # rows of a table


def activations(report: ActivationReport, name: str) -> bytes:
    """Outliers in the input of each Linear layer of a model that the user calls `name`."""
    lead = (
        f"The inputs of the Linear layers of {markup.code(name)} over {report.tokens:,} tokens of a text. An outlier "
        f"is a number with |x| &ge; {report.threshold:g}; a column that holds one is multiplied in floating point."
    )
    parts = [markup.facts(_facts(report)), markup.advice(_advice(report))]
    drawn = [*_columns(report), *_peaks(report)]
    parts += [markup.figures(drawn), _features(report), _table(report)]
    return markup.document(f"Outliers in activations of {Path(name).name or name}", lead, parts)


def _facts(report: ActivationReport) -> list[tuple[str, str]]:
    share = float(np.mean([len(entry.columns) / entry.in_features for entry in report.linears]))
    widest = max(report.linears, key=lambda entry: len(entry.columns) / entry.in_features)
    peak = max(report.linears, key=lambda entry: entry.max)
    return [
        (f"{len(report.emergent)}", "emergent outlier features, by the criteria of LLM.int8()"),
        (f"{share:.2%}", "of a layer's columns hold outliers, on average"),
        (f"{len(widest.columns) / widest.in_features:.1%}", f"of the columns at most, in {widest.module}"),
        (f"{peak.max:,.1f}", f"the largest |x|, in column {peak.max_column} of {peak.module}"),
    ]


def _advice(report: ActivationReport) -> list[str]:
    rule = (
        f"|x| &ge; {report.threshold:g} in at least {EMERGENT_LAYERS:.0%} of {report.layer_inputs} layer inputs and at "
        f"{EMERGENT_POSITIONS:.0%} of the positions or more"
    )
    if report.emergent:
        found = ", ".join(str(entry.column) for entry in report.emergent[:_SHOWN])
        more = f" and {len(report.emergent) - _SHOWN} more" if len(report.emergent) > _SHOWN else ""
        first = f"Emergent ({rule}): column {found}{more}. Keep outlier detection on: without it, the other columns of "
        first += "such tokens lose their small numbers."
    else:
        first = f"No feature is emergent ({rule}): int8 without outlier detection may do as well; measure it."
    convert = markup.code(f"quantize8 convert SOURCE --threshold {report.threshold:g}")
    return [first, f"To convert with this threshold: {convert}"]


def _columns(report: ActivationReport) -> list[str]:
    """Share of columns with outliers, by kind of module and layer."""
    shares = {entry.module: 100 * len(entry.columns) / entry.in_features for entry in report.linears}
    caption = "Columns of a layer's input that hold an outlier somewhere in the text: what int8 does not compute."
    return charts.heatmap(shares, "Columns with outliers", caption, "% of columns")


def _peaks(report: ActivationReport) -> list[str]:
    """The largest magnitudes, by layer."""
    peaks = {entry.module: entry.max for entry in report.linears}
    return charts.lines(peaks, "Largest |x|", "The largest number in a layer's input.", "max |x|", log=True)


def _features(report: ActivationReport) -> str:
    rows = [
        (entry.column, f"{entry.layers:.0%}", f"{entry.positions:.1%}", f"{entry.max:.1f}") for entry in report.emergent
    ]
    return markup.table("Emergent features", ["column", "layers", "positions", "max |x|"], rows) if rows else ""


def _table(report: ActivationReport) -> str:
    """One line for each module, those with the largest numbers where there are too many."""
    shown = sorted(report.linears, key=lambda entry: -entry.max)[:_TABLE]
    whole = len(shown) == len(report.linears)
    count = f"{len(report.linears):,}"
    title = f"All {count} modules" if whole else f"The {_TABLE:,} of {count} modules with largest |x|; --json lists all"
    rows = [
        (
            entry.module,
            entry.in_features,
            len(entry.columns),
            f"{entry.max:.1f}",
            entry.max_column,
            f"{entry.positions:.1%}",
        )
        for entry in sorted(shown, key=lambda entry: names.natural(entry.module))
    ]
    columns = ["<module", "columns", "with outliers", "max |x|", "in column", "positions with outliers"]
    return markup.table(title, columns, rows)
