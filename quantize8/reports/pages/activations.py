"""The page about outliers in activations on a text, and the cost of each threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantize8.calibration.features import EMERGENT_LAYERS, EMERGENT_POSITIONS, FeatureMap
from quantize8.calibration.outliers import ActivationReport, LayerThreshold
from quantize8.reports import size
from quantize8.reports.pages import charts, markup, names, plots

_SHOWN = 3  # names listed in a sentence
_TABLE = 1000  # most rows of a table
_FIRST_DIFFERS = 2  # if max |x| is this many times larger with position 0, the page shows both


def activations(report: ActivationReport, name: str) -> bytes:
    """The page about outliers in the input of each Linear layer.

    Args:
        report: What `inspect --text` found.
        name: The name of the model, as the user gave it.

    Returns:
        HTML in UTF-8.
    """
    lead = (
        f"The inputs of the Linear layers of {markup.code(name)} on {report.tokens:,} tokens of a text. An outlier is "
        f"a value with |x| &ge; {report.threshold:g}; a column that contains one is multiplied in floating point."
    )
    drawn = [*_features(report), *_thresholds(report), *_errors(report), *_columns(report), *_peaks(report)]
    parts = [markup.facts(_facts(report)), markup.advice(_advice(report)), markup.figures(drawn)]
    parts += [_emergent_table(report), _threshold_table(report), _module_table(report)]
    return markup.document(f"Outliers in activations of {Path(name).name or name}", lead, parts)


def _facts(report: ActivationReport) -> list[tuple[str, str]]:
    share = float(np.mean([len(entry.columns) / entry.in_features for entry in report.linears]))
    peak = max(report.linears, key=lambda entry: entry.max)
    noun = "feature" if len(report.emergent) == 1 else "features"
    reach = f"; outliers at {report.positions_affected:.0%} of the positions" if report.emergent else ""
    items = [
        (f"{len(report.emergent)}", f"emergent outlier {noun}, by the criteria of LLM.int8(){reach}"),
        (f"{share:.2%}", "of the columns of a layer contain outliers, on average"),
        (f"{peak.max:,.1f}", f"the largest |x|, in column {peak.max_column} of {peak.module}"),
    ]
    if report.advice is not None:
        chosen = next(entry for entry in report.thresholds if entry.threshold == report.advice.threshold)
        items.append((f"{chosen.threshold:g}", f"recommended threshold: expected error {chosen.error:.4f}"))
    if report.static is not None:
        items.append((f"{report.static.error:.4f}", "expected error with calibrated outlier columns"))
    return items


def _advice(report: ActivationReport) -> list[str]:
    rule = (
        f"|x| &ge; {report.threshold:g} in at least {EMERGENT_LAYERS:.0%} of {report.layer_inputs} layer inputs and at "
        f"at least {EMERGENT_POSITIONS:.0%} of the positions"
    )
    tips = []
    if report.advice is not None:
        option = "--calibrate FILE" if report.advice.calibrate else f"--threshold {report.advice.threshold:g}"
        command = markup.code(f"quantize8 convert SOURCE {option}")
        tips.append(f"Convert with {command}: {markup.text(report.advice.reason)}.")
    if report.emergent:
        found = ", ".join(str(entry.column) for entry in report.emergent[:_SHOWN])
        more = f" and {len(report.emergent) - _SHOWN} more" if len(report.emergent) > _SHOWN else ""
        tips.append(f"Emergent features ({rule}): column {found}{more}. Leave outlier detection on.")
    else:
        tips.append(f"No feature is emergent ({rule}).")
    return tips


def _features(report: ActivationReport) -> list[str]:
    """Heatmap of features and layer inputs: the share of positions at which a feature is an outlier."""
    found: FeatureMap | None = report.features
    if found is None or not found.columns:
        return []
    shares = 100 * np.array(found.share).T
    left_out = found.left_out + max(0, len(found.columns) - plots.ROWS)
    more = f" {left_out:,} features with fewer outliers are not shown." if left_out else ""
    caption = (
        "A feature is a column of the hidden state. Layer inputs are numbered from the first layer; a layer has one or "
        f"two, of attention and of feed-forward. Empty cells have no value with |x| of {report.threshold:g} or more."
        f"{more}"
    )
    rows = [str(column) for column in found.columns]
    alt = f"Heatmap: share of positions with an outlier, of {len(rows)} features at {len(found.inputs)} layer inputs"
    svg = plots.heatmap(shares, rows, "layer input", "% of positions", alt=alt, log=True)
    return [markup.figure("Outlier features", caption, svg)]


def _thresholds(report: ActivationReport) -> list[str]:
    """The cost of each threshold: error, and columns in 16-bit."""
    found, stored = report.thresholds, [report.static] if report.static is not None else []
    if not found:
        return []
    series = [
        plots.Series("mean", {entry.threshold: [entry.error] for entry in found}),
        plots.Series("worst layer", {entry.threshold: [entry.worst_error] for entry in found}),
        plots.Series("weights only", {entry.threshold: [report.weight_error] for entry in found}),
        *(plots.Series("calibrated", {entry.threshold: [static.error] for entry in found}) for static in stored),
    ]
    caption = (
        'Expected relative error of the int8 layer outputs. "weights only" is the error from rounding the weights, '
        'which no threshold removes. "calibrated" is the error with the columns that --calibrate chooses on this '
        "text, without a threshold."
    )
    svg = plots.lines(series, "threshold", "relative error", alt="Lines: expected error by threshold")
    drawn = [markup.figure("Error by threshold", caption, svg)]
    labels, sizes = [f"{entry.threshold:g}" for entry in found], [entry.bytes for entry in found]
    caption = "Size of the outlier columns in 16-bit, over all layers. A lower threshold means more columns."
    alt = f"Bars: {', '.join(f'{label}: {size(nbytes)}' for label, nbytes in zip(labels, sizes, strict=True))}"
    svg = plots.bars(labels, {"bytes": sizes}, size, alt=alt)
    return [*drawn, markup.figure("Columns in 16-bit by threshold", caption, svg)]


def _errors(report: ActivationReport) -> list[str]:
    """Expected error of the output of each layer at the recommended threshold."""
    if report.advice is None:
        return []
    threshold = report.advice.threshold
    errors = {
        entry.module: found.error
        for entry in report.linears
        if (found := _at(entry.thresholds, threshold)) is not None and found.error is not None
    }
    caption = f"Expected relative error of the int8 output of a layer at threshold {threshold:g}."
    return charts.lines(errors, "Output error", caption, "relative error")


def _at(thresholds: list[LayerThreshold], threshold: float) -> LayerThreshold | None:
    return next((entry for entry in thresholds if entry.threshold == threshold), None)


def _columns(report: ActivationReport) -> list[str]:
    """Share of columns with outliers, by module type and layer."""
    shares = {entry.module: 100 * len(entry.columns) / entry.in_features for entry in report.linears}
    caption = "Columns of the layer input with an outlier anywhere in the text, which are not computed in int8."
    return charts.heatmap(shares, "Columns with outliers", caption, "% of columns")


def _peaks(report: ActivationReport) -> list[str]:
    """The largest magnitudes by layer, and without position 0 where that makes a difference."""
    peaks = {entry.module: entry.max for entry in report.linears}
    later = {entry.module: entry.max_after_first for entry in report.linears}
    drawn = charts.lines(peaks, "Largest |x|", "The largest magnitude in the input of a layer.", "max |x|", log=True)
    differing = {names.part(module) for module in peaks if peaks[module] > _FIRST_DIFFERS * later[module]}
    later = {module: value for module, value in later.items() if names.part(module) in differing}
    caption = "The same without position 0, where many models have very large values that no other position has."
    ends = min(peaks.values()), max(peaks.values())
    return drawn + charts.lines(later, "Largest |x| after position 0", caption, "max |x|", log=True, ends=ends)


def _emergent_table(report: ActivationReport) -> str:
    rows = [
        (
            entry.column,
            f"{entry.layers:.0%}",
            f"{entry.positions:.1%}",
            f"{entry.max:.1f}",
            f"{entry.max_after_first:.1f}",
        )
        for entry in report.emergent
    ]
    columns = ["column", "layers", "positions", "max |x|", "after position 0"]
    return markup.table(f"Emergent features: {len(rows)}", columns, rows) if rows else ""


def _threshold_table(report: ActivationReport) -> str:
    rows = [
        (
            f"{entry.threshold:g}",
            f"{entry.error:.4f}",
            f"{entry.columns:,}",
            size(entry.bytes),
            f"{entry.worst_error:.4f}",
            entry.worst,
        )
        for entry in report.thresholds
    ]
    columns = ["threshold", "error", "columns", "size in 16-bit", "largest error", "<in layer"]
    return markup.table("Thresholds", columns, rows) if rows else ""


def _module_table(report: ActivationReport) -> str:
    """One row for each module; if there are too many, the modules with the largest |x|."""
    shown = sorted(report.linears, key=lambda entry: -entry.max)[:_TABLE]
    whole = len(shown) == len(report.linears)
    count = f"{len(report.linears):,}"
    title = f"All {count} modules"
    if not whole:
        title = f"The {_TABLE:,} of {count} modules with the largest |x|; --json lists all"
    rows = [
        (
            entry.module, entry.in_features, len(entry.columns), f"{entry.positions:.1%}", f"{entry.max:.1f}",
            entry.max_column, f"{entry.max_after_first:.1f}", f"{entry.rms:.3g}",
        )
        for entry in sorted(shown, key=lambda entry: names.natural(entry.module))
    ]  # fmt: skip
    columns = [
        "<module", "columns", "with outliers", "positions", "max |x|", "in column", "after position 0", "RMS",
    ]  # fmt: skip
    return markup.table(title, columns, rows)
