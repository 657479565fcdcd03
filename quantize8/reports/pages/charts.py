"""Figures of a value per module, over the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantize8.reports.pages import markup, names, plots

_Points = Mapping[float, list[float]]

_BAND = " With several modules of a type per layer, such as experts, lines are medians and bands are ranges."


def lines(
    values: Mapping[str, float],
    title: str,
    caption: str,
    y: str,
    *,
    log: bool = False,
    ends: tuple[float, float] | None = None,
) -> list[str]:
    """Draw a figure for each part of the model, with a line for each module type; all share the same y axis.

    Args:
        values: Module name -> value. Modules outside of layers are not drawn.
        title: Title of the figures; the part of the model is appended.
        caption: Caption of the figures.
        y: Label of the y axis.
        log: Use a logarithmic y axis.
        ends: Smallest and largest value of the y axis. None takes them from `values`.

    Returns:
        HTML of the figures.
    """
    drawn, found = [], names.by_layer(values)
    if ends is None:
        inside = [value for name, value in values.items() if names.layer(name) is not None]
        ends = min(inside, default=0), max(inside, default=0)
    for part, kinds in found.items():
        series = [plots.Series(kind, points) for kind, points in _joined(kinds).items()]
        alt = f"Lines: {y} by layer of {', '.join(kinds)}"
        svg = plots.lines(series, "layer", y, alt=alt, ends=ends, log=log)
        drawn.append(markup.figure(f"{title} in {part}", caption + (_BAND if plots.banded(series) else ""), svg))
    return drawn


def heatmap(values: Mapping[str, float], title: str, caption: str, scale: str) -> list[str]:
    """Draw one figure of mean values by module type and layer, on a logarithmic scale.

    Args:
        values: Module name -> value. Modules outside of layers are not drawn.
        title: Title of the figure.
        caption: Caption of the figure.
        scale: What the color stands for.

    Returns:
        HTML of the figure; an empty list if all values are 0.
    """
    kinds = {kind: points for part in names.by_layer(values).values() for kind, points in _joined(part).items()}
    if not any(any(found) for points in kinds.values() for found in points.values()):
        return []
    layers = int(max(max(points) for points in kinds.values())) + 1
    cells = [[float(np.mean(points[i])) if i in points else np.nan for i in range(layers)] for points in kinds.values()]
    alt = f"Heatmap: {scale}, by module type and layer"
    svg = plots.heatmap(np.array(cells), list(kinds), "layer", scale, alt=alt, log=True)
    return [markup.figure(title, caption, svg)]


def _joined(kinds: Mapping[str, _Points]) -> dict[str, _Points]:
    """Merge module types with equal values in all layers, such as q, k and v, which have the same input."""
    found: dict[str, _Points] = {}
    for kind, points in kinds.items():
        same = next((label for label in found if found[label] == points), None)
        found[kind if same is None else f"{same}, {kind}"] = points if same is None else found.pop(same)
    return found
