"""Figures as SVG for an HTML page: plain numbers in, one `<svg>` element out. Independent of the kinds of results.

Matplotlib draws with placeholder colors, which become CSS variables of the page, so that one figure works in light and
dark mode. Text stays text, in the font of the page. The same numbers give the same bytes. A figure is as wide as a
phone screen, in its own units; the page scales it up where there is room.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import numpy as np

from quantize8.errors import DependencyError
from quantize8.kernels.reference import Array
from quantize8.reports.pages.names import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6  # colors that a reader can distinguish; further lines repeat them, dashed
_WIDTH, _FONT = 380, 11.5  # px: on a phone 360 px wide the text is still 10 px high
_PX = 1 / 72  # inches per SVG unit, as matplotlib writes it
_LABEL = 26  # most characters of a label: half of the width
_ABREAST = 42  # most characters of labels in one row of a legend, without their markers
_MARGIN = 1.2  # factor at both ends of a logarithmic axis
ROWS = 40  # most rows of a heatmap, so that their names do not overlap
_STEPS = 24  # steps of the color scale of a heatmap
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"  # placeholders: no figure uses these colors
_COLORS = [f"#0{i}0206" for i in range(1, SERIES + 1)]
_CSS = {_INK: "currentColor", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
_CSS |= {color: f"var(--s{i})" for i, color in enumerate(_COLORS, 1)}
_HEAT = (0xD9, 0x59, 0x26)  # color of the largest value of a heatmap, visible on white and black; others: lower alpha
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantize8",  # without a salt, ids would be random
    "svg.image_inline": True,
    "text.parse_math": False,  # a $ in a name is a plain $
    "font.family": "DejaVu Sans",  # bundled with matplotlib, so that the layout is the same on every machine
    "font.size": _FONT,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": _FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": _FONT,
}


@dataclass(frozen=True)
class Series:
    """A named line: the values at each x. The line shows their median and a band their range."""

    label: str
    points: Mapping[float, Sequence[float]]


def require() -> None:
    """Raise DependencyError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DependencyError(
            "matplotlib: not installed, needed for --report: pip install 'quantize8[report]'"
        ) from None


def lines(
    series: Sequence[Series], x: str, y: str, *, alt: str, ends: tuple[float, float] | None = None, log: bool = False
) -> str:
    """Draw lines with a dot for each point.

    Args:
        series: The lines.
        x: Label of the x axis.
        y: Label of the y axis.
        alt: Description of the figure for screen readers.
        ends: Values that the y axis includes in addition to those of the series.
        log: Use a logarithmic y axis, if all values are positive. Otherwise it starts at 0.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.ticker import MaxNLocator

    abreast = min(4, max(2, _ABREAST // max((len(entry.label) for entry in series), default=1)))
    rows = math.ceil(len(series) / abreast) if len(series) > 1 else 0
    with _drawing(190 + 18 * rows) as (figure, axes):
        for i, entry in enumerate(series):
            _line(axes, i, entry)
        values = [value for entry in series for found in entry.points.values() for value in found]
        low, high = min([*values, *(ends or ())]), max([*values, *(ends or ())])
        if log and low > 0:
            axes.set_yscale("log")
            axes.set_ylim(low / _MARGIN, high * _MARGIN)
        else:
            axes.set_ylim(0, high * 1.05 or 1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=plain(x), ylabel=plain(y))
        if rows:
            figure.legend(loc="outside upper left", ncols=abreast, handlelength=1.2, columnspacing=1, borderaxespad=0.1)
        return _svg(figure, alt)


def bars(
    labels: Sequence[str], groups: Mapping[str, Sequence[float]], write: Callable[[float], str], *, alt: str
) -> str:
    """Draw horizontal bars, for each label one per group, with their values at the end.

    Args:
        labels: Names of the bars.
        groups: Name of the group -> value for each label.
        write: Formats a value as text.
        alt: Description of the figure for screen readers.

    Returns:
        An `<svg>` element.
    """
    thick = 0.8 / len(groups)
    rows = 1 if len(groups) > 1 else 0
    with _drawing(24 + 18 * rows + 18 * len(labels) * max(1.15, len(groups))) as (figure, axes):
        places = np.arange(len(labels))
        for i, (name, values) in enumerate(groups.items()):
            drawn = axes.barh(
                places + (i - (len(groups) - 1) / 2) * thick, values, thick * 0.9, color=_COLORS[i], label=_short(name)
            )
            for j, patch in enumerate(drawn):
                patch.set_gid(f"bar-{i}-{j}")
            axes.bar_label(drawn, [plain(write(value)) for value in values], padding=3, color=_INK)
        axes.set_yticks(places, [_short(label) for label in labels], color=_INK)
        axes.invert_yaxis()
        axes.set_xlim(0, max([value for values in groups.values() for value in values], default=0) * 1.28 or 1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        if rows:
            figure.legend(loc="outside upper left", ncols=len(groups), handlelength=1, borderaxespad=0.1)
        return _svg(figure, alt)


def heatmap(values: Array, rows: Sequence[str], x: str, scale: str, *, alt: str, log: bool = False) -> str:
    """Draw a heatmap of cells in one color, which is more opaque for larger values; NaN is left empty.

    Args:
        values: The cells [rows, columns]. The first 40 rows are shown.
        rows: Names of the rows.
        x: Label of the x axis.
        scale: What the color stands for.
        alt: Description of the figure for screen readers.
        log: Use a logarithmic color scale; values of 0 or less are left empty.

    Returns:
        An `<svg>` element.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(values, np.float64)[:ROWS]
    low, high = _limits(values, log)
    with _drawing(66 + 15.5 * len(values)) as (figure, axes):
        axes.imshow(_shade(values, low, high, log), aspect="auto", interpolation="none")
        axes.set_yticks(range(len(values)), [_short(name) for name in rows[: len(values)]], color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.set_xlabel(plain(x))
        axes.set_title(plain(scale), loc="left", fontsize=_FONT, color=_MUTED, y=1, pad=8)
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        _scale(axes, low, high, log)
        return _svg(figure, alt)


def banded(series: Sequence[Series]) -> bool:
    """Whether `lines` draws a band for any of these series."""
    return any(len(values) > 1 for entry in series for values in entry.points.values())


def _scale(axes: Axes, low: float, high: float, log: bool) -> None:
    """Draw the color scale from the smallest to the largest value, above the cells on the right, beside the title."""
    from matplotlib.transforms import Affine2D, ScaledTranslation, blended_transform_factory

    # pixels above the axes
    above = Affine2D().scale(axes.figure.dpi * _PX) + ScaledTranslation(0, 1, cast(Any, axes.transAxes))
    place = blended_transform_factory(axes.transAxes, above)
    bar = axes.inset_axes((0.66, 8, 0.18, 9), transform=place)
    bar.set_in_layout(False)  # the title already reserves the space
    steps = np.geomspace(low, high, _STEPS) if log else np.linspace(low, high, _STEPS)
    bar.imshow(_shade(steps[None], low, high, log), aspect="auto", interpolation="none")
    bar.set_axis_off()
    for end, value, side in ((-0.05, low, "right"), (1.05, high, "left")):
        bar.text(end, 0.5, f"{float(f'{value:.3g}'):,g}", ha=side, va="center", color=_MUTED, transform=bar.transAxes)


def _line(axes: Axes, index: int, entry: Series) -> None:
    """Draw one series, with ids by which its points can be found."""
    color, dashed = _COLORS[index % SERIES], index >= SERIES
    xs = sorted(entry.points)
    if banded([entry]):
        low, high = ([float(pick(entry.points[x])) for x in xs] for pick in (min, max))
        axes.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0).set_gid(f"band-{index}")
    middle = [float(np.median(entry.points[x])) for x in xs]
    (drawn,) = axes.plot(
        xs, middle, color=color, label=_short(entry.label), linewidth=1.6, linestyle="--" if dashed else "-",
        marker="o", markersize=3.2,
    )  # fmt: skip
    drawn.set_gid(f"series-{index}")


def _limits(values: Array, log: bool) -> tuple[float, float]:
    """The smallest and the largest value of the color scale; a linear scale starts at 0."""
    shown = values[np.isfinite(values) & (values > 0)]
    if not shown.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = (float(shown.min()) if log else 0.0), float(shown.max())
    return (low if low < high else low / 2, high)


def _shade(values: Array, low: float, high: float, log: bool) -> Array:
    """RGBA uint8 of values: the heat color, more opaque toward `high`."""
    shown = np.isfinite(values) & (values > 0)
    safe = np.where(shown, values, high)
    part = np.log(safe / low) / math.log(high / low) if log else safe / high
    least = 0.1 if log else 0.0  # so that the smallest value of a logarithmic scale differs from an empty cell
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * np.where(shown, least + (1 - least) * np.clip(part, 0, 1), 0))
    return pixels


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure, `height` px high, in our style. No warning if the font lacks characters of a name."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(_WIDTH * _PX, height * _PX), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an element of the page: without size, namespace and font, and with ids derived from its content."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    content = file.getvalue()
    prefix = f"f{hashlib.sha256(content + alt.encode('utf-8', 'replace')).hexdigest()[:8]}-"
    root = ElementTree.fromstring(content)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {key.rpartition("}")[2]: _value(key, value, prefix) for key, value in node.items()}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == "style"]:
            parent.remove(child)  # its rules would apply to the whole page, which has its own
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(alt)}
    return ElementTree.tostring(root, encoding="unicode")


def _value(key: str, value: str, prefix: str) -> str:
    """An attribute with the colors and the font of the page, and with ids that are unique to this figure."""
    if key == "id":
        return prefix + value
    if key.endswith("href") and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if key == "style":
        value = re.sub(r" ?font-family: [^;]*;", "", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value))
        return re.sub(r"#0\d020\d", lambda found: _CSS[found[0]], value)
    return value.replace("url(#", f"url(#{prefix}") if key == "clip-path" else value


def _short(label: str) -> str:
    """A label shortened to half of the figure; its end is kept, which distinguishes modules."""
    label = plain(label)
    return label if len(label) <= _LABEL else f"…{label[1 - _LABEL :]}"
