"""Figures as SVG for a page of HTML: plain numbers in, one `<svg>` element out. Knows nothing of results.

Matplotlib draws with stand-in colours, which become CSS variables of the page, so that one figure serves light and
dark. Text stays text, in the page's font. The same numbers give the same bytes. A figure is as wide as a phone, in
its own units; the page scales it up where there is room.
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
from quantize8.ops.reference import Array
from quantize8.page.names import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6  # colours that a reader can tell apart; more lines repeat them, dashed
_WIDTH, _FONT = 380, 11.5  # px: on a phone 360 px wide the text is still 10 px high
_PX = 1 / 72  # matplotlib's inch, of which SVG makes 72 units
_LABEL = 26  # characters of a label: half of the width
_ABREAST = 42  # characters of labels that stand side by side, their marks left out
_MARGIN = 1.2  # at both ends of a logarithmic axis
ROWS = 40  # of a heatmap whose rows have names, so that they do not touch
_STEPS = 24  # of a heatmap's scale
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"  # stand-ins: no figure has these colours
_COLOURS = [f"#0{i}0206" for i in range(1, SERIES + 1)]
_CSS = {_INK: "currentColor", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
_CSS |= {colour: f"var(--s{i})" for i, colour in enumerate(_COLOURS, 1)}
_HEAT = (0xD9, 0x59, 0x26)  # of a heatmap's fullest cell: seen on white and on black; emptier ones let the page through
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantize8",  # or ids would be random
    "svg.image_inline": True,
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "DejaVu Sans",  # matplotlib's own, so that every machine lays a figure out alike
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
    """A named line: for each x its values, of which a line shows the median and a band the range."""

    label: str
    points: Mapping[float, Sequence[float]]


def require() -> None:
    """Raise DependencyError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DependencyError(
            "matplotlib: not installed, needed for --report: pip install 'quantize8[report]'"
        ) from None


def lines(
    series: Sequence[Series], x: str, y: str, *, alt: str, ends: tuple[float, float] | None = None, log: bool = False
) -> str:
    """Lines with a dot for each point. `ends` are values that y shows at least; its axis begins at 0 or is `log`."""
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
    """Horizontal bars, one of each group for a label, with its value at its end as `write` has it."""
    thick = 0.8 / len(groups)
    rows = 1 if len(groups) > 1 else 0
    with _drawing(24 + 18 * rows + 18 * len(labels) * max(1.15, len(groups))) as (figure, axes):
        places = np.arange(len(labels))
        for i, (name, values) in enumerate(groups.items()):
            drawn = axes.barh(
                places + (i - (len(groups) - 1) / 2) * thick, values, thick * 0.9, color=_COLOURS[i], label=_short(name)
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
    """Cells [rows, columns] of one colour, the fuller the larger the value; NaN is left empty.

    Args: rows, their names, of which 40 are shown; x, what the columns count; scale, what the colour means; log, its
    steps are factors, and values of 0 and less stay empty.
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
    """Whether `lines` draws a band for one of these."""
    return any(len(values) > 1 for entry in series for values in entry.points.values())


def _scale(axes: Axes, low: float, high: float, log: bool) -> None:
    """The colours from the least to the largest value, above the cells on the right, in the line of the title."""
    from matplotlib.transforms import Affine2D, ScaledTranslation, blended_transform_factory

    above = Affine2D().scale(axes.figure.dpi * _PX) + ScaledTranslation(0, 1, cast(Any, axes.transAxes))  # px over it
    place = blended_transform_factory(axes.transAxes, above)
    bar = axes.inset_axes((0.66, 8, 0.18, 9), transform=place)
    bar.set_in_layout(False)  # the title has made the room
    steps = np.geomspace(low, high, _STEPS) if log else np.linspace(low, high, _STEPS)
    bar.imshow(_shade(steps[None], low, high, log), aspect="auto", interpolation="none")
    bar.set_axis_off()
    for end, value, side in ((-0.05, low, "right"), (1.05, high, "left")):
        bar.text(end, 0.5, f"{float(f'{value:.3g}'):,g}", ha=side, va="center", color=_MUTED, transform=bar.transAxes)


def _line(axes: Axes, index: int, entry: Series) -> None:
    """One series, with ids by which its points can be found."""
    colour, dashed = _COLOURS[index % SERIES], index >= SERIES
    xs = sorted(entry.points)
    if banded([entry]):
        low, high = ([float(pick(entry.points[x])) for x in xs] for pick in (min, max))
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0).set_gid(f"band-{index}")
    middle = [float(np.median(entry.points[x])) for x in xs]
    (drawn,) = axes.plot(
        xs, middle, color=colour, label=_short(entry.label), linewidth=1.6, linestyle="--" if dashed else "-",
        marker="o", markersize=3.2,
    )  # fmt: skip
    drawn.set_gid(f"series-{index}")


def _limits(values: Array, log: bool) -> tuple[float, float]:
    """The least and the largest value that the colours tell apart; a linear scale begins at 0."""
    shown = values[np.isfinite(values) & (values > 0)]
    if not shown.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = (float(shown.min()) if log else 0.0), float(shown.max())
    return (low if low < high else low / 2, high)


def _shade(values: Array, low: float, high: float, log: bool) -> Array:
    """RGBA uint8 of values: the heat colour, the fuller the nearer to `high`."""
    shown = np.isfinite(values) & (values > 0)
    safe = np.where(shown, values, high)
    part = np.log(safe / low) / math.log(high / low) if log else safe / high
    least = 0.1 if log else 0.0  # the low end of a logarithmic scale is still more than an empty cell
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * np.where(shown, least + (1 - least) * np.clip(part, 0, 1), 0))
    return pixels


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure, `height` px high, drawn in our style; a name may hold signs that the font does not have."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(_WIDTH * _PX, height * _PX), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an element of a page: no size, no namespace, no font of its own, ids told apart by content."""
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
            parent.remove(child)  # its rules would hold for the whole page, which has them
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(alt)}
    return ElementTree.tostring(root, encoding="unicode")


def _value(key: str, value: str, prefix: str) -> str:
    """An attribute with the page's colours and font, and with ids of this figure alone."""
    if key == "id":
        return prefix + value
    if key.endswith("href") and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if key == "style":
        value = re.sub(r" ?font-family: [^;]*;", "", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value))
        return re.sub(r"#0\d020\d", lambda found: _CSS[found[0]], value)
    return value.replace("url(#", f"url(#{prefix}") if key == "clip-path" else value


def _short(label: str) -> str:
    """A label that leaves half of the figure to the data; its end tells modules apart."""
    label = plain(label)
    return label if len(label) <= _LABEL else f"…{label[1 - _LABEL :]}"
