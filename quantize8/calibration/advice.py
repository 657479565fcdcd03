"""Advice for convert: the cheapest threshold with an expected error within a budget, and the best conversion of all."""

from __future__ import annotations

import shlex

from quantize8.calibration.outliers import ActivationReport, Advice, ThresholdReport
from quantize8.kernels.reference import DEFAULT_THRESHOLD

# On SmolLM2-135M the paper's threshold is just within this: the mean error of its layers is 0.0244 at 6.0 (0.0163 at 2,
# 0.0307 at 12), and perplexity rises from 22.1 to 22.7. A larger budget would allow more error than LLM.int8() has as
# published.
DEFAULT_BUDGET = 0.025


def recommend(report: ActivationReport, budget: float = DEFAULT_BUDGET) -> Advice:
    """Recommend a threshold for convert, or calibration.

    The advice is the highest threshold whose mean error is at most `budget`, as it leaves the fewest columns in 16-bit.
    If there is none, it is calibration where its stored columns have less error than every threshold, and otherwise the
    threshold with the least error, the highest one of equals.

    Args:
        report: Outliers of a model; its `thresholds` must not be empty.
        budget: Largest acceptable mean of the layers' expected relative output errors.
    """
    thresholds, static = report.thresholds, report.static
    within = [entry for entry in thresholds if entry.error <= budget]
    chosen = max(within or thresholds, key=lambda entry: (0.0 if within else -entry.error, entry.threshold))
    stored = ""
    if static is not None:
        stored = (
            f"{static.error:.4f} with {static.columns:,} columns stored by --calibrate ({static.bytes / 1e6:.1f} MB)"
        )
    calibrates = not within and static is not None and static.error < chosen.error
    if within:
        reason = f"the highest threshold whose expected error is within {budget:g}: {_figures(chosen)}"
        reason += f"; {stored} would leave less" if stored and static and static.error < chosen.error else ""
    else:
        rounding = f" ({report.weight_error:.4f} comes from rounding the weights, whatever the threshold)"
        reason = f"no threshold keeps the expected error within {budget:g}; the least is {_figures(chosen)}{rounding}"
        reason = f"{stored}; {reason}" if calibrates else reason
    published = next((entry for entry in thresholds if entry.threshold == DEFAULT_THRESHOLD), None)
    if published is not None and published is not chosen:
        reason += f"; the paper's {DEFAULT_THRESHOLD:g} has {_figures(published)}"
    met = bool(within) or (static is not None and calibrates and static.error <= budget)
    return Advice(budget, chosen.threshold, met, reason, calibrates)


def best_command(report: ActivationReport, model: str, text: str) -> str:
    """The command line of the conversion with the least expected error of all choices.

    Args:
        report: Outliers of a model; its `choices` must not be empty.
        model: The model, as the user named it.
        text: The text, which becomes the calibration text.
    """
    best = min(report.choices, key=lambda choice: choice.error)
    options = [text if word == "FILE" else word for word in best.options.split()]
    where = ["--format", "compressed-tensors"] if "--rotate" in options else []
    return shlex.join(["quantize8", "convert", model, *where, *options])


def _figures(report: ThresholdReport) -> str:
    return f"{report.error:.4f} with {report.columns:,} columns in 16-bit ({report.bytes / 1e6:.1f} MB)"
