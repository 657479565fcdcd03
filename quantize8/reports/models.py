"""Tables of the results of inspect, run, evaluate, env and the demo."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantize8.calibration.features import EMERGENT_LAYERS, EMERGENT_POSITIONS, Feature
from quantize8.calibration.outliers import ActivationReport
from quantize8.commands.environment import Environment
from quantize8.commands.evaluate import Divergence, Estimate, Evaluation
from quantize8.commands.inspect import WeightReport
from quantize8.commands.run import Comparison, Generation
from quantize8.demo import Demo
from quantize8.kernels.reference import OUTLIER_SIGMAS
from quantize8.reports.tables import listed, size, table

_SHOWN_RANGES = 4  # ranges of positions in a window; the JSON has all of them
_SHOWN_COLUMNS = 3  # columns in a row: for most models, a line then fits in 80 characters


def weights(reports: list[WeightReport]) -> RenderableType:
    """Statistics of each Linear weight."""
    rows = table(
        ("module", "left"), ("dtype", "left"), ("shape", "right"), ("max |w|", "right"), ("outliers", "right"),
        ("error", "right"), (listed("worst columns"), "left"), one_line=True,
    )  # fmt: skip
    for report in reports:
        worst = ", ".join(f"{k} ({n})" for k, n, _ in report.worst_columns[:_SHOWN_COLUMNS] if n)
        error = "" if report.relative_error is None else f"{report.relative_error:.4f}"
        shape = f"{report.shape[0]}x{report.shape[1]}"
        rows.add_row(
            report.module, report.dtype, shape, f"{report.absmax:.3g}", f"{report.outliers:,}", error, listed(worst)
        )
    notes = [
        f"outliers: weights larger than {OUTLIER_SIGMAS} times the RMS of their row; error: relative error of int8",
        "worst columns: input columns with the most outliers, and their number",
    ]
    return Group(rows, Text(), *map(Text, notes))


def activations(report: ActivationReport) -> RenderableType:
    """Outliers in the input of each Linear layer, the emergent features, and the effect of each threshold."""
    rows = table(
        ("module", "left"), ("outliers", "right"), ("max |x|", "right"), ("rotated", "right"), ("column", "right"),
        ("excl. pos 0", "right"), ("positions", "right"), (listed("outlier columns"), "left"), one_line=True,
    )  # fmt: skip
    for entry in report.linears:
        shown = ", ".join(map(str, entry.columns[:_SHOWN_COLUMNS])) + (
            " ..." if len(entry.columns) > _SHOWN_COLUMNS else ""
        )
        count = f"{len(entry.columns)} of {entry.in_features}"
        rotated = "" if entry.rotated is None else f"{entry.rotated.max:.1f}"
        rows.add_row(
            entry.module, count, f"{entry.max:.1f}", rotated, str(entry.max_column), f"{entry.max_after_first:.1f}",
            f"{entry.positions:.1%}", listed(shown),
        )  # fmt: skip
    notes = ["rotated: max |x| after a rotation in blocks; excl. pos 0: max |x| without the first position"]
    notes += ["", _emergent(report)]
    if report.emergent:
        notes.append(
            f"at least one of them: in {report.layers_affected:.0%} of the layer inputs, "
            f"at {report.positions_affected:.1%} of their positions"
        )
    parts: list[RenderableType] = [rows, Text(), *map(Text, notes)]
    if report.thresholds:
        parts += [Text(), _thresholds(report), Text("error: expected relative error of the int8 outputs")]
    if report.advice:
        what = "--calibrate" if report.advice.calibrate else f"threshold {report.advice.threshold:g}"
        parts += [Text(), Text(f"advice: {what}: {report.advice.reason}")]
        parts += [Text(), _choices(report), Text(), Text(f"least error: {report.advice.command}")]
    return Group(*parts)


def generation(result: Generation) -> RenderableType:
    """Speed of a generation, its weights and memory."""
    return Text(_speed(result))


def comparison(result: Comparison) -> RenderableType:
    """Speed of both models, the text of the source, and how far the two agree."""
    count, difference = len(result.generation.tokens), result.first_difference
    lines = [Text(f"identical: {count} of {count} tokens")]
    if difference is not None:
        lines = [Text(f"first difference at token {difference + 1} of {count}")]
    if result.agreement is not None:
        agreement = result.agreement
        lines.append(Text(
            f"on the {agreement.tokens} tokens of the source's text: KL(source || model) {agreement.kl:.5f} nats per "
            f"token, top-1 agreement {agreement.top1:.1%}"
        ))  # fmt: skip
    return Group(
        Text(_speed(result.generation)), Text(),
        Text(f"{result.source.model}:"), Text(result.source.text), Text(_speed(result.source)), Text(),
        *lines,
    )  # fmt: skip


def evaluation(result: Evaluation) -> RenderableType:
    """Perplexity, and how close the predictions are to those of the reference."""
    rows = table(("", "left"), ("", "left"))
    rows.add_row("text", f"{result.tokens} tokens in windows of {result.context}, {result.scored} scored")
    rows.add_row("perplexity", _estimate(result.perplexity, 3))
    if result.agreement is None:
        return rows
    found, kl = result.agreement, result.agreement.kl
    error = "" if kl.standard_error is None else f", standard error {kl.standard_error:.5f}"
    rows.add_row("reference perplexity", _estimate(found.perplexity, 3))
    rows.add_row("perplexity ratio", _estimate(found.ratio, 4))
    rows.add_row("KL divergence", f"{kl.mean:.5f} nats per token{error}")
    rows.add_row("", f"median {kl.median:.5f}, 99th percentile {kl.p99:.5f}, max {kl.max:.5f}")
    rows.add_row("KL by position", _by_position(kl))
    rows.add_row("top-1 agreement", f"{found.top1:.1%}")
    if not found.layers:
        return rows
    layers = table(("hidden state after", "left"), ("relative error", "right"))
    for name, value in found.layers.items():
        layers.add_row(name, f"{value:.4f}")
    return Group(rows, Text(), layers)


def environment(result: Environment) -> RenderableType:
    """Versions, devices, and advice on what is missing."""
    rows = table(("", "left"), ("", "left"))
    rows.add_row("python", f"{result.python} on {result.system}")
    rows.add_row("cpu", f"{result.processors} processors, {result.cpu}, {size(result.memory_bytes)} memory")
    rows.add_row("gpu", ", ".join(result.gpus) or "none found by torch")
    rows.add_row("kernels", result.kernels)
    for name, version in result.versions.items():
        rows.add_row(name, version or "not installed")
    return Group(rows, *(Text(f"{problem}: {remedy}") for problem, remedy in result.advice.items()))


def demo(result: Demo) -> RenderableType:
    """The table of the demo."""
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


def _choices(report: ActivationReport) -> RenderableType:
    """The ways to convert, with what each costs and where it opens."""
    rows = table(("convert with", "left"), ("error", "right"), ("adds", "right"), ("opens in", "left"))
    for choice in sorted(report.choices, key=lambda choice: -choice.error):
        where = "quantize8; vLLM on GPUs" if "--rotate" in choice.options else "every loader"
        rows.add_row(choice.options, f"{choice.error:.4f}", size(choice.bytes) if choice.bytes else "", where)
    return rows


def _thresholds(report: ActivationReport) -> Table:
    rows = table(
        ("threshold", "right"), ("columns in 16-bit", "right"), ("size", "right"), ("mean error", "right"),
        ("worst error", "right"), (listed("in layer"), "left"), one_line=True,
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
    """Mean KL divergence, with the buckets merged into at most four ranges of positions."""
    width, shown = -(-len(kl.by_position) // _SHOWN_RANGES), []
    for start in range(0, len(kl.by_position), width):
        buckets = kl.by_position[start : start + width]
        mean = sum(entry.kl * entry.tokens for entry in buckets) / sum(entry.tokens for entry in buckets)
        shown.append(f"{mean:.5f} from {buckets[0].first}")
    return ", ".join(shown)
