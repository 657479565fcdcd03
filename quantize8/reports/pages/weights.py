"""The pages about a conversion, and about the weights of a checkpoint or artifact."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize8.commands.inspect import WeightReport
from quantize8.conversion.plan import Plan
from quantize8.conversion.result import Conversion
from quantize8.formats.base import Int8Format
from quantize8.kernels.reference import OUTLIER_SIGMAS
from quantize8.reports import size
from quantize8.reports.pages import charts, markup, names, plots
from quantize8.sources.quantized import QuantizedCheckpoint

_LARGE_ERROR = 2  # times the median error, from which a layer is named: 4 times the squared error of the others
_SHOWN = 3  # names listed in a sentence
_BARS = 12  # most columns in a figure
_TABLE = 1000  # most rows of a table: an MoE model has tens of thousands of modules, and the page must open quickly
_SCALES = "scales"
_ERROR = "Relative error of the int8 weights: ||w - int8(w)|| / ||w||. All parts have the same y axis."
_OUTLIERS = (
    f"Weights larger than {OUTLIER_SIGMAS} times the root mean square of their row. A single one makes the "
    "quantization steps of its whole row coarser."
)


@dataclass(frozen=True)
class _Weight:
    """What a page shows of one int8 weight [N, K]."""

    module: str
    shape: tuple[int, ...]
    error: float | None
    outliers: int
    absmax: float
    worst_columns: list[tuple[int, int, float]]


def conversion(result: Conversion) -> bytes:
    """The page about what a conversion did, or what a dry run found; HTML in UTF-8."""
    plan, found = result.plan, _converted(result)
    share = plan.int8_weights / max(1, plan.weights)
    layers = f"; {share:.1%} of the weights are int8, in {len(plan.modules):,} layers" if plan.modules else ""
    items = [
        (f"{size(plan.source_bytes)} → {size(plan.output_bytes)}", "weights on disk, of source and artifact"),
        (f"{8 * plan.output_bytes / max(1, plan.weights):.2f} bits", f"per weight in the artifact{layers}"),
    ]
    items += _error_facts(found)
    did = "Dry run, nothing is converted:" if result.dry_run else "Converted"
    how = f"in the format {plan.format.title}"
    if isinstance(plan.format, Int8Format):
        how += f", with the recipe {plan.recipe.name}, threshold {plan.recipe.threshold:g}"
    source = plan.checkpoint.identity.get("id", plan.checkpoint.name)
    adapter = plan.checkpoint.identity.get("adapter")
    merged = "" if adapter is None else f" with the adapter {markup.code(adapter)} merged"
    lead = f"{did} {markup.code(source)}{merged} to {markup.code(result.out)}, {markup.text(how)}."
    parts = [markup.facts(items), markup.advice(_next_steps(result, found))]
    parts.append(markup.figures([_sizes(plan), *_figures(found)]))
    if found:
        parts.append(_table(found, "quantize8.json in the artifact lists all"))
    if plan.kept:
        parts.append(_kept(plan))
    title = f"{'Plan of a conversion' if result.dry_run else 'Conversion'} of {plan.checkpoint.name}"
    return markup.document(title, lead, parts)


def weights(reports: list[WeightReport], name: str) -> bytes:
    """The page about the statistics of Linear weights.

    Args:
        reports: What `inspect` found.
        name: The name of the model, as the user gave it.

    Returns:
        HTML in UTF-8.
    """
    found = [
        _Weight(entry.module, entry.shape, entry.relative_error, entry.outliers, entry.absmax, entry.worst_columns)
        for entry in reports
    ]
    count, outliers = sum(math.prod(entry.shape) for entry in found), sum(entry.outliers for entry in found)
    items = [(f"{len(found):,}", f"Linear layers with {count:,} weights"), *_error_facts(found)]
    rate = 1e6 * outliers / max(1, count)
    items.append((f"{rate:.3g}", f"outliers per million weights: larger than {OUTLIER_SIGMAS} times their row's RMS"))
    lead = f"The Linear weights of {markup.code(name)}, stored as {markup.text(_dtypes(reports))}."
    command = markup.code(f"quantize8 inspect {shlex.quote(name)} --text FILE")
    tips = [
        *_large_errors(found),
        f"Inspect the outliers in activations as well, which cost more than those in weights: {command}",
    ]
    parts = [markup.facts(items), markup.advice(tips), markup.figures([*_figures(found), *_columns(found)])]
    return markup.document(f"Weights of {Path(name).name or name}", lead, [*parts, _table(found, "--json lists all")])


def _converted(result: Conversion) -> list[_Weight]:
    """The int8 weights of a conversion, in the order of its source; without errors if codes were copied."""
    plan, found = result.plan, []
    written = {tensor.name: source for source, group in plan.outputs.items() for tensor in group}
    sources = {written[name]: entry for name, entry in result.errors.items()}
    for info in plan.checkpoint.tensors.values():
        if entry := sources.get(info.name):
            error = None if info.is_int8 else entry.relative_error
            module, peak = info.name.removesuffix(".weight"), entry.absmax_range[1]
            found.append(_Weight(module, plan.shape_of(info), error, entry.outliers, peak, entry.worst_columns))
    return found


def _error_facts(found: list[_Weight]) -> list[tuple[str, str]]:
    errors = [(entry.error, entry.module) for entry in found if entry.error is not None]
    if not errors:
        return []
    worst, module = max(errors)
    mean = sum(error for error, _ in errors) / len(errors)
    return [(f"{mean:.4f}", "mean relative error of the int8 weights"), (f"{worst:.4f}", f"the largest, in {module}")]


def _next_steps(result: Conversion, found: list[_Weight]) -> list[str]:
    plan, out = result.plan, shlex.quote(str(result.out))
    if result.dry_run:
        return ["Run the same command without --dry-run."]
    if result.manifest is None:
        return [f"When all parts are written, join them: {markup.code(f'quantize8 finalize {out}')}"]
    tips = _large_errors(found)
    if plan.carries:
        tips = ["The int8 codes are those of the source, so this conversion added no error."]
    if not isinstance(result.out, Path):
        return [
            *tips,
            f"Copy it to where it will be used, and check every byte there: {markup.code('quantize8 verify COPY')}",
        ]
    if plan.format.is_folder:
        tips.append(f"Measure the cost of int8: {markup.code(f'quantize8 evaluate {out} --reference SOURCE')}")
    return [*tips, f"After copying it, check every byte: {markup.code(f'quantize8 verify {out}')}"]


def _large_errors(found: list[_Weight]) -> list[str]:
    """Layers with an unusually large error, and how to leave them in float."""
    errors = {entry.module: entry.error for entry in found if entry.error is not None}
    if not errors:
        return []
    middle = float(np.median(list(errors.values())))
    worst = sorted((name for name in errors if errors[name] > _LARGE_ERROR * middle), key=lambda name: -errors[name])
    if not worst:
        return [f"No layer is an outlier: all errors are at most {_LARGE_ERROR} times the median, {middle:.4f}."]
    more = f" and {len(worst) - _SHOWN:,} more" if len(worst) > _SHOWN else ""
    shown = ", ".join(f"{markup.code(name)} ({errors[name]:.4f})" for name in worst[:_SHOWN])
    skip = markup.code(f"skip = {json.dumps(worst[:_SHOWN], ensure_ascii=False)}")
    return [
        f"More than {_LARGE_ERROR} times the median error, {middle:.4f}: {shown}{more}. "
        f"To leave such layers in floating point, convert with a recipe that contains {skip}."
    ]


def _sizes(plan: Plan) -> str:
    """Size of each part of the model, in the source and in the artifact."""
    before, after = _stored(plan), _written(plan)
    shown = [part for part in (*names.PARTS, _SCALES) if before.get(part) or after.get(part)]
    groups = {"source": [before.get(part, 0) for part in shown], "artifact": [after.get(part, 0) for part in shown]}
    caption = "Size of the tensors by part of the model."
    if _SCALES in shown:
        caption += " Scales are those of the int8 weights, one number per row."
    return markup.figure("Size by part", caption, plots.bars(shown, groups, size, alt=_alt_sizes(shown, groups)))


def _stored(plan: Plan) -> dict[str, int]:
    """Bytes of the stored tensors of the source, by part of the model."""
    checkpoint = plan.checkpoint
    scales: set[str] = set()
    if isinstance(checkpoint, QuantizedCheckpoint):
        scales = {name for encoding in checkpoint.encodings.values() for name in encoding.tensors[1:]}
        checkpoint = checkpoint.inner
    tensors = checkpoint.tensors.values()
    return _sums((_SCALES if info.name in scales else names.part(info.name), info.nbytes) for info in tensors)


def _written(plan: Plan) -> dict[str, int]:
    """Bytes of the tensors of the artifact, by part; of a tensor that became several, the first holds the codes."""
    pairs = ((names.part(source), group) for source, group in plan.outputs.items())
    return _sums((_SCALES if i else part, tensor.nbytes) for part, group in pairs for i, tensor in enumerate(group))


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for part, nbytes in pairs:
        totals[part] = totals.get(part, 0) + nbytes
    return totals


def _alt_sizes(shown: Sequence[str], groups: Mapping[str, Sequence[int]]) -> str:
    return "Bars: " + "; ".join(
        f"{part} {size(before)} to {size(after)}" for part, before, after in zip(shown, *groups.values(), strict=True)
    )


def _figures(found: list[_Weight]) -> list[str]:
    """Error by layer for each part of the model, and outliers by module type and layer."""
    errors = {entry.module: entry.error for entry in found if entry.error is not None}
    rates = {entry.module: 1e6 * entry.outliers / max(1, math.prod(entry.shape)) for entry in found}
    return [
        *charts.lines(errors, "Int8 error", _ERROR, "relative error"),
        *charts.heatmap(rates, "Outlier weights", _OUTLIERS, "outliers per million weights"),
    ]


def _columns(found: list[_Weight]) -> list[str]:
    """The input columns with the most outliers over all modules, counted in the worst columns of each module."""
    totals: dict[tuple[int, int], int] = {}
    for entry in found:
        for column, outliers, _ in entry.worst_columns:
            key = column, entry.shape[1]
            totals[key] = totals.get(key, 0) + outliers
    worst = [key for key in sorted(totals, key=lambda key: -totals[key]) if totals[key]][:_BARS]
    if not worst:
        return []
    labels, values = [f"{column} of {width:,}" for column, width in worst], [totals[key] for key in worst]
    caption = "Outlier weights by input column, summed over the worst columns of all modules of the same width."
    svg = plots.bars(labels, {"outliers": values}, "{:,.0f}".format, alt=f"Bars: {', '.join(labels)}")
    return [markup.figure("Columns with the most outliers", caption, svg)]


def _table(found: list[_Weight], rest: str) -> str:
    """One row for each module; if there are too many, the modules with the largest errors."""
    shown = sorted(found, key=lambda entry: -(entry.error or 0))[:_TABLE]
    whole = len(shown) == len(found)
    title = f"All {len(found):,} modules" if whole else f"The worst {_TABLE:,} of {len(found):,} modules; {rest}"
    rows = []
    for entry in sorted(shown, key=lambda entry: names.natural(entry.module)):
        worst = ", ".join(f"{column} ({count})" for column, count, _ in entry.worst_columns[:_SHOWN] if count)
        error = "" if entry.error is None else f"{entry.error:.4f}"
        rows.append(
            (entry.module, names.shape(entry.shape), error, f"{entry.absmax:.3g}", f"{entry.outliers:,}", worst)
        )
    return markup.table(title, ["<module", "shape", "error", "max |w|", "outliers", "<worst columns"], rows)


def _kept(plan: Plan) -> str:
    """Linear weights that are left in floating point, with the reason."""
    tensors = plan.checkpoint.tensors
    shapes = {name: tensors[name if name in tensors else f"{name}.weight"].shape for name in plan.kept}
    rows = [(name, names.shape(shapes[name]), why) for name, why in plan.kept.items()]
    return markup.table(f"Left in floating point: {len(rows):,}", ["<module", "shape", "<reason"], rows[:_TABLE])


def _dtypes(reports: list[WeightReport]) -> str:
    return " and ".join(sorted({entry.dtype for entry in reports}))
