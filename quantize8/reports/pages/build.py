"""Any result as one HTML file: call `check` before the long computation and `write` after it."""

from __future__ import annotations

from pathlib import Path

from quantize8.calibration.outliers import ActivationReport
from quantize8.commands.evaluate import Evaluation
from quantize8.commands.inspect import WeightReport
from quantize8.conversion.result import Conversion
from quantize8.reports.pages import activations, evaluation, markup, plots, weights

Result = Conversion | list[WeightReport] | ActivationReport | Evaluation


def check(path: str | Path | None) -> None:
    """Fail early if a page could not be written.

    Args:
        path: The HTML file. None means that no page is wanted.

    Raises:
        DependencyError: matplotlib is not installed.
        OutputError: The file cannot be written, or must not be replaced.
    """
    if path is not None:
        plots.require()
        markup.check(Path(path))


def write(path: str | Path | None, result: Result, name: str) -> None:
    """Write the page of a result atomically.

    Args:
        path: The HTML file; an existing page is replaced. None means that no page is wanted.
        result: The result to show.
        name: The name of the model, as the user gave it.

    Raises:
        OutputError: The file cannot be written.
    """
    if path is not None:
        markup.write(Path(path), page(result, name))


def page(result: Result, name: str) -> bytes:
    """The page of a result as HTML in UTF-8. The same result always gives the same bytes.

    Args:
        result: The result to show.
        name: The name of the model, as the user gave it.
    """
    if isinstance(result, Conversion):
        return weights.conversion(result)
    if isinstance(result, ActivationReport):
        return activations.activations(result, name)
    if isinstance(result, Evaluation):
        return evaluation.evaluation(result)
    return weights.weights(result, name)
