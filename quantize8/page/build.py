"""A result as one HTML file, whatever kind of result it is: `check` before the long work, `write` after it."""

from __future__ import annotations

from pathlib import Path

from quantize8.conversion.result import Conversion
from quantize8.model.outliers import ActivationReport
from quantize8.operations.evaluate import Evaluation
from quantize8.operations.inspect import WeightReport
from quantize8.page import activations, evaluation, markup, plots, weights

Result = Conversion | list[WeightReport] | ActivationReport | Evaluation


def check(path: str | Path | None) -> None:
    """Refuse a page that could not be made: DependencyError or OutputError. None is no page."""
    if path is not None:
        plots.require()
        markup.check(Path(path))


def write(path: str | Path | None, result: Result, name: str) -> None:
    """Write the page of a result, in one step; see `page`. None is no page."""
    if path is not None:
        markup.write(Path(path), page(result, name))


def page(result: Result, name: str) -> bytes:
    """The page in UTF-8; `name` is what the user calls the model. The same result gives the same bytes."""
    if isinstance(result, Conversion):
        return weights.conversion(result)
    if isinstance(result, ActivationReport):
        return activations.activations(result, name)
    if isinstance(result, Evaluation):
        return evaluation.evaluation(result)
    return weights.weights(result, name)
