"""What reading, running and scoring models has found, the machine, and the demo, as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantize8.demo import Demo
from quantize8.model.features import EMERGENT_LAYERS, EMERGENT_POSITIONS, Feature
from quantize8.model.outliers import ActivationReport
from quantize8.operations.environment import Environment
from quantize8.operations.evaluate import Divergence, Estimate, Evaluation
from quantize8.operations.inspect import WeightReport
from quantize8.operations.run import Comparison, Generation
from quantize8.ops.reference import OUTLIER_SIGMAS
from quantize8.report.tables import listed, size, table

_SHOWN_RANGES = 4  # of positions in a window; the JSON has all buckets
_SHOWN_COLUMNS = 3  # of the worst: a line of a table fits 80 characters for most models


def weights(reports: list[WeightReport]) -> RenderableType:
    """Statistics of each Linear weight."""
    rows = table(
        ("module", "left"), ("dtype", "left"), ("shape", "right"), ("max |w|", "right"), ("outliers", "right"),
        ("error", "right"), (listed("in columns"), "left"), one_line=True,
    )  # fmt: skip
    for report in reports:
        worst = ", ".join(f"{k} ({n})" for k, n, _ in report.worst_columns[:_SHOWN_COLUMNS] if n)
        error = "" if report.relative_error is None else f"{report.relative_error:.4f}"
        shape = f"{report.shape[0]}x{report.shape[1]}"
        rows.add_row(
            report.module, report.dtype, shape, f"{report.absmax:.3g}", f"{report.outliers:,}", error, listed(worst)
        )
    note = f"outliers: weights beyond {OUTLIER_SIGMAS} rms of their row, and the columns that hold most of them"
    return Group(rows, Text(), Text(f"{note}; error: of int8, relative"))


def activations(report: ActivationReport) -> RenderableType:
    """Outliers in each Linear's input, the emergent features, and what each threshold would do."""
    rows = table(
        ("module", "left"), ("outliers", "right"), ("max |x|", "right"), ("column", "right"), ("after 1st", "right"),
        ("positions", "right"), (listed("in columns"), "left"), one_line=True,
    )  # fmt: skip
    for entry in report.linears:
        shown = ", ".join(map(str, entry.columns[:_SHOWN_COLUMNS])) + (
            " ..." if len(entry.columns) > _SHOWN_COLUMNS else ""
        )
        count = f"{len(entry.columns)} of {entry.in_features}"
        rows.add_row(
            entry.module, count, f"{entry.max:.1f}", str(entry.max_column), f"{entry.max_after_first:.1f}",
            f"{entry.positions:.1%}", listed(shown),
        )  # fmt: skip
    notes = ["after 1st: max |x| without the first position", "", _emergent(report)]
    if report.emergent:
        notes.append(
            f"any of them: in {report.layers_affected:.0%} of the layer inputs, "
            f"at {report.positions_affected:.1%} of their positions"
        )
    parts: list[RenderableType] = [rows, Text(), *map(Text, notes)]
    if report.thresholds:
        parts += [Text(), _thresholds(report), Text("error: of int8 outputs, relative, expected")]
    if report.advice:
        what = "--calibrate" if report.advice.calibrate else f"threshold {report.advice.threshold:g}"
        parts += [Text(), Text(f"advice: {what}: {report.advice.reason}")]
    return Group(*parts)


def generation(result: Generation) -> RenderableType:
    """How fast a text came."""
    return Text(_speed(result))


def comparison(result: Comparison) -> RenderableType:
    """The source's text beside, and where the two part."""
    same = result.first_difference is None
    where = "the same tokens" if same else f"they part at token {(result.first_difference or 0) + 1}"
    lines = [Text(f"{where} of {len(result.generation.tokens)}")]
    if result.agreement is not None:
        found = result.agreement
        lines.append(Text(
            f"over the {found.tokens} tokens of the source's text: KL(source || model) {found.kl:.5f} nats a token, "
            f"top-1 agreement {found.top1:.1%}"
        ))  # fmt: skip
    return Group(
        Text(_speed(result.generation)), Text(),
        Text(f"{result.source.model}:"), Text(result.source.text), Text(_speed(result.source)), Text(),
        *lines,
    )  # fmt: skip


def evaluation(result: Evaluation) -> RenderableType:
    """Perplexity, and how near the predictions are to the reference's."""
    rows = table(("", "left"), ("", "left"))
    rows.add_row("text", f"{result.tokens} tokens in windows of {result.context}, {result.scored} scored")
    rows.add_row("perplexity", _estimate(result.perplexity, 3))
    if result.agreement is None:
        return rows
    found, kl = result.agreement, result.agreement.kl
    error = "" if kl.standard_error is None else f", standard error {kl.standard_error:.5f}"
    rows.add_row("reference's", _estimate(found.perplexity, 3))
    rows.add_row("ratio", _estimate(found.ratio, 4))
    rows.add_row("KL divergence", f"{kl.mean:.5f} nats a token{error}")
    rows.add_row("", f"median {kl.median:.5f}, 99th percentile {kl.p99:.5f}, largest {kl.max:.5f}")
    rows.add_row("by position", _by_position(kl))
    rows.add_row("top-1 agreement", f"{found.top1:.1%}")
    if not found.layers:
        return rows
    layers = table(("hidden state after", "left"), ("relative error", "right"))
    for name, value in found.layers.items():
        layers.add_row(name, f"{value:.4f}")
    return Group(rows, Text(), layers)


def environment(result: Environment) -> RenderableType:
    """Versions, devices, advice."""
    rows = table(("", "left"), ("", "left"))
    rows.add_row("python", f"{result.python} on {result.system}")
    rows.add_row("cpu", f"{result.processors} processors, {result.cpu}, {size(result.memory_bytes)} memory")
    rows.add_row("gpu", ", ".join(result.gpus) or "none that torch sees")
    rows.add_row("kernels", result.kernels)
    for name, version in result.versions.items():
        rows.add_row(name, version or "not installed")
    return Group(rows, *(Text(f"{problem}: {remedy}") for problem, remedy in result.advice.items()))


def demo(result: Demo) -> RenderableType:
    """The demo's one table."""
    plan, (ours, theirs) = result.conversion.plan, result.perplexities
    int8, source = result.texts.generation, result.texts.source
    rows = table(("", "left"), ("source", "left"), ("int8", "left"))
    rows.add_row(
        "weights on disk",
        f"{size(plan.source_bytes)} ({next(iter(plan.checkpoint.tensors.values())).dtype})",
        size(plan.output_bytes),
    )
    rows.add_row(f"perplexity ({ours.scored} tokens)", f"{theirs.perplexity:.3f}", f"{ours.perplexity:.3f}")
    rows.add_row("prefill tokens/s", f"{source.prefill_tokens_per_s:.0f}", f"{int8.prefill_tokens_per_s:.0f}")
    rows.add_row("decode tokens/s", f"{source.decode_tokens_per_s:.1f}", f"{int8.decode_tokens_per_s:.1f}")
    rows.add_row("greedy continuation", source.text.strip(), int8.text.strip())
    return Group(rows, Text(_emergent(result.outliers)))


def _thresholds(report: ActivationReport) -> Table:
    rows = table(
        ("threshold", "right"), ("columns in 16-bit", "right"), ("size", "right"), ("mean error", "right"),
        ("worst", "right"), (listed("in"), "left"), one_line=True,
    )  # fmt: skip
    for entry in report.thresholds:
        errors = (f"{entry.error:.4f}", f"{entry.worst_error:.4f}", listed(entry.worst))
        rows.add_row(f"{entry.threshold:g}", f"{entry.columns:,}", size(entry.bytes), *errors)
    return rows


def _emergent(report: ActivationReport) -> str:
    rule = (
        f"|x| >= {report.threshold:g} in >= {EMERGENT_LAYERS:.0%} of {report.layer_inputs} layer inputs "
        f"and at >= {EMERGENT_POSITIONS:.0%} of {report.tokens} positions"
    )
    if not report.emergent:
        return f"no emergent outlier feature ({rule})"
    return f"emergent outlier features ({rule}): " + "; ".join(map(_feature, report.emergent))


def _feature(entry: Feature) -> str:
    return f"{entry.column} (layers {entry.layers:.0%}, positions {entry.positions:.1%}, max {entry.max:.1f})"


def _speed(result: Generation) -> str:
    return (
        f"prefill {result.prompt_tokens} tokens at {result.prefill_tokens_per_s:.0f}/s, "
        f"decode {len(result.tokens)} at {result.decode_tokens_per_s:.1f}/s, "
        f"weights {size(result.weight_bytes)}, peak memory {size(result.peak_rss_bytes)}"
    )


def _estimate(found: Estimate, digits: int) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f} (too few tokens for an interval)"
    return f"{found.value:.{digits}f} (95%: {found.low:.{digits}f} to {found.high:.{digits}f})"


def _by_position(kl: Divergence) -> str:
    """The buckets joined to at most four ranges of positions."""
    width, shown = -(-len(kl.by_position) // _SHOWN_RANGES), []
    for start in range(0, len(kl.by_position), width):
        part = kl.by_position[start : start + width]
        mean = sum(entry.kl * entry.tokens for entry in part) / sum(entry.tokens for entry in part)
        shown.append(f"{mean:.5f} from {part[0].first}")
    return ", ".join(shown)
