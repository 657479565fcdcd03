"""Searched scales: the definition against brute force in float64, its guarantees, and the compiled pass bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from test_cpu import DTYPES, SHAPES, hostile

from quantize8.kernels import cpu, reference
from quantize8.kernels.reference import ColumnStats
from quantize8.kernels.scales import CLIPS, ScaleSearch, folded, search_absmax

FLOAT32_SUMS = 1 + 1e-5  # errors are summed in float32: candidates so near may be taken for one another


def searches(columns: int) -> dict[str, ScaleSearch]:
    rng = np.random.default_rng(columns)
    importance = np.exp(2 * rng.normal(size=columns)).astype(np.float32)
    importance[0] = 0
    exact = np.sort(rng.permutation(columns)[: -(-columns // 8)])
    return {
        "mse": ScaleSearch(),
        "weighted": ScaleSearch(importance),
        "exact": ScaleSearch(None, exact),
        "both": ScaleSearch(importance, exact),
        "all exact": ScaleSearch(importance, np.arange(columns)),
    }


def error(row, absmax, weights) -> float:
    """Error of a row float16 [K] with an absmax, in float64, with independently rounded codes."""
    row = row.astype(np.float32)
    inverse = np.float32(1) / np.float32(absmax) * np.float32(127)
    codes = np.clip(np.rint(row * inverse), -127, 127).astype(np.float64)
    return float((weights * (row.astype(np.float64) - codes * (float(absmax) / 127)) ** 2).sum())


def by_brute_force(row, importance, exact):
    """(error over the other columns, error over all, absmax) of every candidate that may be taken, plain first."""
    others = importance.astype(np.float64).copy()
    others[exact] = 0
    held = np.abs(row[exact]).max(initial=0) * np.float32(127 / 127.5)
    plain = np.abs(row).max()
    clipped = [np.float16(np.float32(clip) * np.float32(plain)) for clip in CLIPS[1:]]
    candidates = [plain] + [absmax for absmax in clipped if absmax >= held]
    found = [(error(row, each, others), error(row, each, importance), float(each)) for each in candidates]
    return [entry for entry in found if entry[1] <= found[0][1] * FLOAT32_SUMS]


@pytest.mark.parametrize("kind", searches(1))
@pytest.mark.parametrize("columns", [1, 5, 33, 777])
def test_each_row_has_the_candidate_with_the_least_error(columns, kind):
    weight, search = hostile(40, columns, np.float16), searches(columns)[kind]
    importance = np.ones(columns, np.float32) if search.importance is None else search.importance
    exact = [] if search.exact is None else search.exact
    for row, chosen in zip(weight, search_absmax(weight, search), strict=True):
        if not row.any():
            assert chosen == 0
            continue
        found = by_brute_force(row, importance, exact)
        least = min(found)[0]
        assert chosen in [absmax for other, _, absmax in found if other <= least * FLOAT32_SUMS]


@pytest.mark.parametrize("kind", searches(1))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1]])
@pytest.mark.parametrize("unit", cpu.available())
def test_the_pass_equals_the_definition_in_every_bit(unit, shape, dtype, kind, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    weight, search = hostile(*shape, dtype), searches(shape[1])[kind]
    got = ColumnStats.empty(shape[1])
    codes, absmax = cpu.quantize_rowwise(weight, got, search)
    np.testing.assert_array_equal(absmax, search_absmax(weight, search))
    np.testing.assert_array_equal(codes, reference.quantize_rowwise(weight, absmax)[0])
    stats = reference.column_stats(weight, codes, absmax)
    for field in ("absmax", "sum_square", "sum_error", "outliers", "rows"):
        np.testing.assert_array_equal(getattr(got, field), getattr(stats, field), field)


@pytest.mark.parametrize("unit", cpu.available())
def test_extremes(unit, monkeypatch):
    """The least float16, whose clips are itself; the largest; exact columns far above all others."""
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    weight = np.zeros((4, 6), np.float16)
    weight[0, 2], weight[1], weight[2, :2] = 6e-8, 65504, [65504, -6e-8]
    weight[3] = [1, 0, 0, 0, 0, 0]
    codes, absmax = cpu.quantize_rowwise(weight, None, ScaleSearch(np.float32([0, 1, 1, 1, 1, 1]), np.array([0])))
    assert absmax.tolist() == [float(np.float16(6e-8)), 65504, 65504, 1]
    assert codes[:3].tolist() == [[0, 0, 127, 0, 0, 0], [127] * 6, [127, 0, 0, 0, 0, 0]] and codes[3, 0] == 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 70000.0])
@pytest.mark.parametrize("unit", cpu.available())
def test_rows_that_cannot_be_quantized_are_told(unit, bad, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    weight = hostile(5, 40, dtype)
    clean = cpu.quantize_rowwise(weight, None, ScaleSearch())
    with np.errstate(over="ignore"):
        weight[3, 7] = np.float32(bad).astype(dtype)
    codes, absmax = cpu.quantize_rowwise(weight, None, ScaleSearch())
    assert not np.isfinite(absmax[3]) and not codes[3].any()
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(codes[others], clean[0][others])
    np.testing.assert_array_equal(absmax[others], clean[1][others])


@pytest.mark.parametrize("seed", range(20))
def test_no_reader_is_worse_off_than_with_plain_absmax(seed):
    """A reader with the exact columns, judged by the error of the others; one with only codes, by the error of all."""
    rng = np.random.default_rng(seed)
    columns = int(rng.integers(2, 300))
    weight = (rng.standard_t(2, (50, columns)) * np.exp(rng.normal(size=columns))).clip(-6e4, 6e4).astype(np.float16)
    importance = np.exp(3 * rng.normal(size=columns)).astype(np.float32)
    exact = rng.permutation(columns)[: 1 + columns // 20]
    others = importance.astype(np.float64).copy()
    others[exact] = 0
    gained = 0
    for row, chosen in zip(weight, search_absmax(weight, ScaleSearch(importance, exact)), strict=True):
        plain = np.abs(row).max()
        assert error(row, chosen, others) <= error(row, plain, others) * FLOAT32_SUMS
        assert error(row, chosen, importance) <= error(row, plain, importance) * FLOAT32_SUMS
        gained += chosen < plain
    assert gained


def test_no_exact_weight_is_left_beyond_its_second_digit():
    """Between two codes there is half a step, which a second digit holds, and no more beyond the last."""
    row = np.full((1, 64), 0.1, np.float16)
    row[0, 1::2], row[0, 7] = 0.0123, 3
    importance = np.ones(64, np.float32)
    importance[7] = 1e-9  # its column alone would be clipped at no cost
    assert search_absmax(row, ScaleSearch(importance))[0] < 2.5
    assert search_absmax(row, ScaleSearch(importance, np.array([7]))).tolist() == [3]


def test_where_nothing_is_gained_plain_absmax_stays():
    steps = np.array([[127, 1, -2, 3], [1, 0, 0, 0]], np.float16)  # without error as it is
    assert search_absmax(steps, ScaleSearch()).tolist() == [127, 1]
    weight = hostile(30, 20, np.float16)
    indifferent = search_absmax(weight, ScaleSearch(np.zeros(20, np.float32)))
    np.testing.assert_array_equal(indifferent, reference.quantize_rowwise(weight)[1])


def test_every_absmax_is_a_float16_number():
    """A format that stores absmax / 127 gives it back only then."""
    absmax = search_absmax(hostile(200, 100, np.float32), ScaleSearch())
    np.testing.assert_array_equal(absmax, absmax.astype(np.float16))
    assert (absmax < reference.quantize_rowwise(hostile(200, 100, np.float32))[1]).any()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 31, 32, 1000])
def test_sums_in_halves(count):
    terms = np.random.default_rng(count).integers(-1000, 1000, (3, count)).astype(np.float32)
    np.testing.assert_array_equal(folded(terms), terms.sum(axis=1))
    assert folded(terms).dtype == np.float32
    assert folded(np.float32([1e8, 1, -1e8])) == 1 and folded(np.float32([1e8, -1e8, 1])) == 0  # 1e8 + 1 rounds to 1e8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_that_means_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        ScaleSearch(np.float32([1, bad]))
    with pytest.raises(ValueError, match=r"importance \[2\] for 3 columns"):
        search_absmax(np.ones((1, 3), np.float16), ScaleSearch(np.float32([1, 1])))


def test_bfloat16_is_rounded_to_float16_first():
    weight = hostile(20, 50, ml_dtypes.bfloat16)
    half = weight.astype(np.float32).astype(np.float16)
    np.testing.assert_array_equal(search_absmax(weight, ScaleSearch()), search_absmax(half, ScaleSearch()))
