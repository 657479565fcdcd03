"""Figures: every number of a series is in the SVG, equal numbers give equal bytes, and names stay text."""

import re
import sys
from base64 import b64decode
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from quantize8.errors import DependencyError
from quantize8.reports.pages import plots
from quantize8.reports.pages.plots import Series


def parse(svg: str) -> ElementTree.Element:
    """The figure as a tree; it must be well-formed and hold nothing but shapes and text."""
    root = ElementTree.fromstring(svg)
    kinds = {"svg", "g", "path", "use", "defs", "clipPath", "rect", "text", "image", "tspan"}
    assert {node.tag for node in root.iter()} <= kinds
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(set(ids)) == len(ids)
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert {first or second for first, second in targets} <= set(ids)
    return root


def group(root: ElementTree.Element, end: str) -> ElementTree.Element:
    (found,) = (node for node in root.iter("g") if node.get("id", "").endswith(f"-{end}"))
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return [(node.text or "").strip() for node in root.iter("text")]


def points(root: ElementTree.Element, index: int) -> list[tuple[float, float]]:
    return [(float(node.get("x")), float(node.get("y"))) for node in group(root, f"series-{index}").iter("use")]


def pixels(root: ElementTree.Element) -> list[np.ndarray]:
    """RGBA in 0..1 of the images, in their order."""
    found = [node.get("href").removeprefix("data:image/png;base64,") for node in root.iter("image")]
    return [imread(BytesIO(b64decode(data))) for data in found]


def test_a_line_has_a_dot_for_each_point_at_its_place():
    errors = {layer: [0.01 + 0.001 * layer**2] for layer in range(7)}
    root = parse(plots.lines([Series("q_proj", errors), Series("one", {3: [0.02]})], "layer", "error", alt="a"))
    drawn = points(root, 0)
    assert len(drawn) == 7 and len(points(root, 1)) == 1
    steps = np.diff([x for x, _ in drawn])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)  # the file has 6 decimals
    heights = drawn[0][1] - np.array([y for _, y in drawn])  # SVG counts down
    np.testing.assert_allclose(heights / heights[-1], [(layer / 6) ** 2 for layer in range(7)], atol=1e-4)
    assert {"q_proj", "one", "layer", "error"} <= set(texts(root))


def test_several_values_at_a_place_are_a_median_and_a_band():
    series = [Series("w1", {0: [1.0, 3.0, 2.0], 1: [2.0]})]
    root = parse(plots.lines(series, "layer", "y", alt="a"))
    (_, first), (_, second) = points(root, 0)
    assert plots.banded(series) and first == second  # the medians are equal
    assert group(root, "band-0") is not None
    assert not plots.banded([Series("w1", {0: [1.0]})])


def test_axes_take_the_same_ends_and_a_logarithmic_one_spaces_factors_alike():
    one = parse(plots.lines([Series("a", {0: [1.0]})], "x", "y", alt="a", ends=(1, 100)))
    two = parse(plots.lines([Series("b", {0: [1.0], 1: [50]})], "x", "y", alt="a", ends=(1, 100)))
    assert points(one, 0)[0][1] == pytest.approx(points(two, 0)[0][1])
    log = points(parse(plots.lines([Series("a", {0: [1.0], 1: [10], 2: [100]})], "x", "y", alt="a", log=True)), 0)
    assert log[0][1] - log[1][1] == pytest.approx(log[1][1] - log[2][1], abs=1e-3)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-30], [1e30, 0.0]])
def test_zeros_and_extremes_have_an_axis(values):
    for log in (False, True):
        root = parse(plots.lines([Series("a", dict(enumerate([[v] for v in values])))], "x", "y", alt="a", log=log))
        assert len(points(root, 0)) == len(values)
    parse(plots.bars(["a"] * len(values), {"n": values}, str, alt="a"))
    parse(plots.heatmap(np.array([values]), ["a"], "x", "s", alt="a"))
    parse(plots.heatmap(np.array([values]), ["a"], "x", "s", alt="a", log=True))


def test_more_series_than_colours_repeat_them_dashed():
    svg = plots.lines([Series(f"s{i}", {0: [i], 1: [i]}) for i in range(8)], "x", "y", alt="a")
    assert "stroke-dasharray" in svg and "var(--s6)" in svg and "var(--s7)" not in svg
    assert "stroke-dasharray" not in plots.lines([Series("s", {0: [1], 1: [1]})], "x", "y", alt="a")


def test_bars_are_as_long_as_their_values_and_say_them():
    groups = {"source": [100.0, 50.0, 0.0], "artifact": [50.0, 25.0, 10.0]}
    root = parse(plots.bars(["attention", "norms", "scales"], groups, "{:.0f} B".format, alt="a"))
    widths = {}
    for i in range(2):
        for j in range(3):
            xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", group(root, f"bar-{i}-{j}").find("path").get("d"))]
            widths[i, j] = max(xs) - min(xs)
    for place, width in widths.items():
        assert width == pytest.approx(widths[0, 0] * list(groups.values())[place[0]][place[1]] / 100, abs=1e-3)
    assert {"100 B", "50 B", "25 B", "10 B", "0 B", "source", "artifact"} <= set(texts(root))


def test_cells_are_the_fuller_the_larger_and_empty_where_there_is_nothing():
    values = np.array([[1.0, 10.0, 100.0], [0.0, np.nan, 50.0]])
    cells, scale = pixels(parse(plots.heatmap(values, ["a", "b"], "layer", "s", alt="a", log=True)))
    alpha = cells[..., 3]
    assert alpha.shape == values.shape and alpha[0, 0] > 0 and alpha[0, 2] == 1
    assert alpha[0, 1] - alpha[0, 0] == pytest.approx(alpha[0, 2] - alpha[0, 1], abs=1 / 255)  # equal factors
    assert alpha[1, 0] == alpha[1, 1] == 0 and np.all(np.diff(scale[0, :, 3]) >= 0)
    assert "3,790" in texts(parse(plots.heatmap(37.9 * values, ["a", "b"], "layer", "s", alt="a")))
    cells, _ = pixels(parse(plots.heatmap(values, ["a", "b"], "layer", "s", alt="a")))
    np.testing.assert_allclose(cells[0, :, 3], values[0] / 100, atol=0.5 / 255 + 1e-6)


def test_a_heatmap_of_too_many_rows_shows_the_first():
    values = np.arange(100.0).reshape(50, 2)
    root = parse(plots.heatmap(values, [f"row{i}" for i in range(50)], "x", "s", alt="a"))
    assert pixels(root)[0].shape[0] == 40 and "row39" in texts(root) and "row40" not in texts(root)


def test_the_same_numbers_give_the_same_bytes_and_others_other_ids():
    one, same, other = (plots.lines([Series("a", {0: [v]})], "x", "y", alt="a") for v in (1.0, 1.0, 2.0))
    assert one == same
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x_{2}$", 'a"b', "层\x00\x1b[31m\udc80", "&amp;"])
def test_hostile_names_stay_text(name):
    drawn = [
        plots.lines([Series(name, {0: [1.0]}), Series("b", {0: [1.0]})], name, name, alt=name),
        plots.bars([name], {name: [1.0], "b": [1.0]}, lambda _: name, alt=name),
        plots.heatmap(np.ones((1, 1)), [name], name, name, alt=name),
    ]
    for svg in drawn:
        root = parse(svg)  # whose tags are known ones
        assert root.get("aria-label") is not None and "<script" not in svg


def test_long_names_keep_their_end_and_colours_are_the_pages():
    svg = plots.bars(["model." + "x" * 80 + ".down_proj"], {"n": [1.0]}, str, alt="a")
    (label,) = (text for text in texts(parse(svg)) if "down_proj" in text)
    assert label.startswith("…") and len(label) == 26
    assert not re.search(r": #[0-9a-f]{6}", svg) and "currentColor" in svg and "font-family" not in svg


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"pip install 'quantize8\[report\]'"):
        plots.require()
