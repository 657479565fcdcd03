"""The page about how well a model predicts a text, and how close it is to a reference model."""

from __future__ import annotations

from pathlib import Path

from quantize8.commands.evaluate import Agreement, Estimate, Evaluation
from quantize8.reports.pages import markup, plots


def evaluation(result: Evaluation) -> bytes:
    """The page about perplexity, and with a reference the KL divergence from it; HTML in UTF-8."""
    found = result.agreement
    lead = (
        f"{markup.code(result.model)} on {result.tokens:,} tokens of a text, in windows of {result.context:,}: "
        f"{result.scored:,} are scored. Ranges are 95% confidence intervals, for texts like this one."
    )
    if found:
        lead += f" The reference is {markup.code(found.reference)}, on the same tokens."
    items = [(f"{result.perplexity.value:.3f}", f"perplexity{_range(result.perplexity, 3)}")]
    if found:
        items += _agreement_facts(found)
    parts = [markup.facts(items), markup.advice(_advice(result))]
    if found:
        parts += [markup.figures([*_positions(found, result.context), *_layers(found)]), _details(found)]
    return markup.document(f"Evaluation of {Path(result.model).name or result.model}", lead, parts)


def _agreement_facts(found: Agreement) -> list[tuple[str, str]]:
    error = found.kl.standard_error
    spread = "" if error is None else f", standard error {error:.5f}"
    reference = f"times the perplexity of the reference, {found.perplexity.value:.3f}{_range(found.ratio, 4)}"
    return [
        (f"{found.ratio.value:.4f}", reference),
        (f"{found.kl.mean:.5f}", f"nats per token: mean KL divergence from the reference{spread}"),
        (f"{found.top1:.1%}", "top-1 agreement: tokens for which both models rank the same token first"),
    ]


def _range(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _advice(result: Evaluation) -> list[str]:
    found = result.agreement
    if found is None:
        return [f"To measure the cost of int8, compare with the source: {markup.code('--reference SOURCE')}"]
    low, high = found.ratio.low, found.ratio.high
    change = f"{abs(found.ratio.value - 1):.2%} {'higher' if found.ratio.value > 1 else 'lower'}"
    if low is None or high is None:
        first = (
            "Too few tokens to distinguish a difference from chance: use a longer text, or more "
            f"{markup.code('--tokens')}."
        )
    elif low <= 1 <= high:
        first = (
            f"The perplexity is {change} than that of the reference, which may be chance. For a narrower interval, "
            f"score more tokens: {markup.code('--tokens')}, and a longer {markup.code('--text')}."
        )
    else:
        first = f"The perplexity is {change} than that of the reference, which is more than chance."
    tips = [first]
    if high is None or high > 1:
        lower = markup.code("--threshold 3")
        tips.append(f"A lower outlier threshold computes more columns in floating point. To see the gain: {lower}")
    if not found.layers:
        tips.append(f"To see in which layers the error arises: {markup.code('--layers')}")
    return tips


def _positions(found: Agreement, context: int) -> list[str]:
    """KL divergence by position in the window."""
    points = {float(entry.first): [entry.kl] for entry in found.kl.by_position}
    caption = (
        f"Mean over ranges of positions in the window of {context:,} tokens. A rising curve means that errors grow "
        "with the length of the context."
    )
    alt = f"Line: KL divergence over {len(points)} ranges of positions, mean {found.kl.mean:.5f}"
    series = [plots.Series("KL divergence", points)]
    svg = plots.lines(series, "position in the window", "nats per token", alt=alt)
    return [markup.figure("KL divergence by position", caption, svg)]


def _layers(found: Agreement) -> list[str]:
    """Error of the hidden state after each decoder layer."""
    if not found.layers:
        return []
    points = {float(i): [value] for i, value in enumerate(found.layers.values())}
    caption = (
        "||h - h_ref|| / ||h_ref|| of the hidden state h after each decoder layer, where h_ref is that of the "
        "reference. It falls where a layer adds a few very large values to the state, and so to its norm."
    )
    alt = f"Line: relative error of the hidden state after {len(points)} layers"
    svg = plots.lines([plots.Series("hidden state", points)], "layer", "relative error", alt=alt)
    return [markup.figure("Error of the hidden state", caption, svg)]


def _details(found: Agreement) -> str:
    kl = found.kl
    rows: list[tuple[str, str]] = [
        ("perplexity of the reference", f"{found.perplexity.value:.3f}{_range(found.perplexity, 3)}"),
        ("KL divergence, mean", f"{kl.mean:.5f}"),
        ("median", f"{kl.median:.5f}"),
        ("99th percentile", f"{kl.p99:.5f}"),
        ("largest", f"{kl.max:.5f}"),
    ]
    rows += [
        (f"positions from {entry.first:,}, {entry.tokens:,} tokens", f"{entry.kl:.5f}") for entry in kl.by_position
    ]
    rows += [(f"hidden state after {name}", f"{value:.4f}") for name, value in found.layers.items()]
    return markup.table("All values", ["<metric", "value"], rows)
