"""What to convert with: the cheapest threshold whose expected error keeps to a budget, or stored columns, and why."""

from __future__ import annotations

from quantize8.model.outliers import ActivationReport, Advice, ThresholdReport
from quantize8.ops.reference import DEFAULT_THRESHOLD

# What the paper's threshold just keeps to on SmolLM2-135M: 0.0244 in the mean of its layers at 6.0 (0.0163 at 2, 0.0307
# at 12), where perplexity rises from 22.1 to 22.7. A larger budget would allow more than LLM.int8() as published.
DEFAULT_BUDGET = 0.025


def recommend(report: ActivationReport, budget: float = DEFAULT_BUDGET) -> Advice:
    """The highest threshold, which keeps the fewest columns in 16-bit, whose mean error is at most `budget`.

    Where none is, and columns stored by calibration have less error than each, these; else the threshold with the
    least error, the highest of such. `report.thresholds` must not be empty.
    """
    found, static = report.thresholds, report.static
    within = [entry for entry in found if entry.error <= budget]
    chosen = max(within or found, key=lambda entry: (0.0 if within else -entry.error, entry.threshold))
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
        alone = f" ({report.weight_error:.4f} comes of rounding the weights, whatever the threshold)"
        reason = f"no threshold keeps the expected error within {budget:g}; the least is {_figures(chosen)}{alone}"
        reason = f"{stored}; {reason}" if calibrates else reason
    published = next((entry for entry in found if entry.threshold == DEFAULT_THRESHOLD), None)
    if published is not None and published is not chosen:
        reason += f"; the paper's {DEFAULT_THRESHOLD:g} has {_figures(published)}"
    met = bool(within) or (static is not None and calibrates and static.error <= budget)
    return Advice(budget, chosen.threshold, met, reason, calibrates)


def _figures(report: ThresholdReport) -> str:
    return f"{report.error:.4f} with {report.columns:,} columns in 16-bit ({report.bytes / 1e6:.1f} MB)"
