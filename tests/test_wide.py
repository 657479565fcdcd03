"""Modes static and hybrid in int8 tiles: digits and sums as defined in NumPy, and how close to exact."""

import numpy as np
import pytest
import torch
from test_packed import numpy, tokens_of

from quantize8.errors import WeightError
from quantize8.kernels import cpu, reference
from quantize8.kernels.packed import PackedWeight
from quantize8.kernels.reference import DECODE_TOKENS, STATIC_MODES, Int8Weight

UNITS = cpu.available()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPSILON = 2.0**-23  # of float32
HALF_A_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding an output
BASE, MOST = np.float32(254), np.float32(127)
# N, K, J, E: no outlier columns, one, either side of a tile's 64; none, some and all of them stored; K of all kinds
SHAPES = [
    (45, 131, 5, 3), (64, 128, 0, 0), (33, 63, 63, 63), (32, 577, 64, 16), (70, 200, 65, 0), (70, 200, 65, 65),
    (1, 1, 1, 1), (1, 1, 0, 0), (100, 65, 1, 0),
]  # fmt: skip


def weight_of(rows: int, columns: int, count: int, stored: int, unit: cpu.Unit) -> tuple[Int8Weight, PackedWeight]:
    """A weight with columns of several sizes and a row of zeros, with `count` outlier columns in any order."""
    random = np.random.default_rng(rows + columns)
    values = random.normal(size=(rows, columns)).astype(np.float32) * 0.05
    values[:, ::7] *= 5
    if rows > 1:
        values[rows // 2] = 0
    codes, absmax = reference.quantize_rowwise(values)
    chosen = random.permutation(columns)[:count].astype(np.int32)
    weight = Int8Weight(codes, absmax, chosen, np.ascontiguousarray(values[:, chosen[:stored]].astype(np.float16)))
    fields = (weight.codes, weight.absmax, weight.outlier_columns, weight.outlier_weight)
    codes, absmax, *outliers = map(torch.from_numpy, fields)
    return weight, PackedWeight(codes, absmax, unit, *outliers)


def inputs_of(tokens: int, weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Outliers in the outlier columns of some tokens only, and tokens that differ from the others."""
    columns = weight.outlier_columns
    x = tokens_of(tokens, weight.codes.shape[1], torch.float32, outliers=0, seed=tokens).numpy()
    x[:, columns] *= np.random.default_rng(1).choice([0.1, 1, 40], (tokens, len(columns)))
    if tokens > 12:
        others = np.setdiff1d(np.arange(x.shape[1]), columns)
        x[3] = 0
        x[4, others] = 0  # nothing but outliers
        x[5, columns[:1]] = -60000  # more than two digits hold in steps of the others: the step grows
        x[6] *= 1e-5
        x[7, others[:1]] = 9
        x[8, others[: len(others) // 80]] = -50  # as many as can stand out, and more than can
        x[9, others[: len(others) // 50]] = 50
        x[10, others[-2:-1]], x[10, others[-1:]] = 30, -20
        x[11, others] = 1e-30 * x[11, others]  # squares that underflow
        x[12, others] *= 1e25 if dtype != torch.float16 else 1  # and that overflow
    return torch.from_numpy(x).to(dtype)


def digits_of(x: np.ndarray, columns: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition: low and high digits [M, K] of x float32, absmax [M], one rounding an operation."""
    wide = np.zeros(x.shape, bool)
    wide[:, columns] = True
    if mode == "hybrid":
        wide |= reference.token_outliers(np.where(wide, np.float32(0), x))
    rest, apart = np.where(wide, np.float32(0), x), np.where(wide, x, np.float32(0))
    absmax = np.maximum(np.abs(rest).max(1, initial=0), np.abs(apart).max(1, initial=0) / BASE).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(1) / absmax * MOST
    usable = (np.isfinite(inverse) & np.isfinite(absmax))[:, None]
    inverse = np.where(usable, inverse[:, None], np.float32(0))
    low, scaled = np.rint(np.where(usable, rest, 0) * inverse), np.where(usable, apart, 0) * inverse
    high = np.rint(scaled / BASE)
    return np.where(wide, np.rint(scaled - high * BASE), low), high, absmax


def second_of(weight: Int8Weight) -> np.ndarray:
    """What the stored columns have beyond their codes, in units of 1/254 step."""
    stored = weight.outlier_weight.astype(np.float32)
    inverse = np.where(weight.absmax > 0, np.float32(1) / np.where(weight.absmax > 0, weight.absmax, 1) * MOST, 0)
    codes = weight.codes[:, weight.outlier_columns[: stored.shape[1]]]
    return np.rint((stored * inverse[:, None] - codes) * BASE)


def defined(x: np.ndarray, weight: Int8Weight, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """The product that mode static stands for, float64 [M, N], and the magnitude of the sums that it is made of."""
    columns = weight.outlier_columns
    low, high, absmax = digits_of(x, columns, mode)
    codes, exact = weight.codes.astype(np.float64), columns[: weight.outlier_weight.shape[1]]
    below = low @ codes.T + high[:, exact] @ second_of(weight).T
    above = 254 * (high.astype(np.float64) @ codes.T)
    units = (absmax / MOST)[:, None].astype(np.float64) * (weight.absmax / MOST)
    return (below + above) * units, (np.abs(below) + np.abs(above)) * units


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("mode", STATIC_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "count", "exact"), [(577, 65, 16), (64, 64, 64), (131, 0, 0), (131, 1, 0)])
def test_digits_and_scales_equal_their_definition_in_every_bit(columns, count, exact, dtype, mode, unit):
    weight, ours = weight_of(3, columns, count, exact, unit)
    x = inputs_of(40, weight, dtype)
    x[9] *= 1e-38  # too small for an inverse in float32
    values = numpy(x).astype(np.float32)
    low, high, absmax = digits_of(values, weight.outlier_columns, mode)
    found_low, found_high, scale, _ = ours.encode(x, 6.0, mode)
    np.testing.assert_array_equal(found_low, low)
    np.testing.assert_array_equal(found_high, high)
    np.testing.assert_array_equal(scale, absmax / MOST)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", STATIC_MODES)
def test_prefill_is_the_integer_product_up_to_one_rounding(mode, shape, dtype, unit):
    """Sums are exact; each of two becomes a float32, they are added, scaled and rounded to the output."""
    weight, ours = weight_of(*shape, unit)
    bias = np.linspace(-2, 2, shape[0], dtype=np.float32)
    for tokens in (17, 32, 33, 300):
        x = inputs_of(tokens, weight, dtype)
        exact, sums = defined(numpy(x).astype(np.float32), weight, mode)
        with np.errstate(over="ignore"):
            representable = np.abs(exact) < torch.finfo(dtype).max
        for added in (None, bias):
            y = ours.linear(x, None if added is None else torch.from_numpy(added).to(dtype), 6.0, mode)
            shift = 0 if added is None else numpy(torch.from_numpy(added).to(dtype)).astype(np.float64)
            assert y.dtype == dtype and y.shape == exact.shape
            allowed = HALF_A_STEP[dtype] * np.abs(exact + shift) + 4 * EPSILON * (sums + np.abs(shift)) + 1e-7
            off = np.abs(y.double().numpy() - exact - shift)
            assert (off <= allowed)[representable].all(), (tokens, (off / allowed)[representable].max())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_differs_from_exact_columns_by_what_their_digits_leave_out(shape, unit):
    """At most half a step of an outlier column's x, low * second, and half a 254th of a stored weight's step.

    Where the step grew, also half of it and of the old one in the other columns.
    """
    weight, ours = weight_of(*shape, unit)
    x = inputs_of(40, weight, torch.float32)
    values, columns, stored = x.numpy(), weight.outlier_columns, weight.outlier_weight.shape[1]
    y, exact = ours.linear(x, None, 6.0, "static").double().numpy(), reference.linear(values, weight, None, 6, "static")
    step = (digits_of(values, columns, "static")[2] / MOST)[:, None].astype(np.float64)
    old = reference.quantize_activations(values, 6.0, columns)[1][:, None]
    full, scale = np.abs(reference._float_weight(weight)), (weight.absmax / MOST).astype(np.float64)
    bound = step / 2 * full[:, columns].sum(1)
    bound = bound + stored * 127 * step * scale / 2
    bound += np.abs(values[:, columns[:stored]]).sum(1, keepdims=True) * scale / 508
    bound += np.where(step == old, 0, (step + old) / 2) * np.delete(full, columns, 1).sum(1)
    bound += 4 * EPSILON * np.abs(values) @ full.T
    assert (np.abs(y - exact) <= bound).all()
    if len(columns) > 1:
        plain = reference.linear(values, Int8Weight(weight.codes, weight.absmax), None, 0.0)
        alike = [m for m in range(40) if m not in (5, 12)]  # but for a step that grew, and one huge token
        assert np.linalg.norm((y - exact)[alike]) < 0.3 * np.linalg.norm((plain - exact)[alike])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_takes_stored_columns_to_a_254th_of_a_step(shape, dtype, unit):
    """Activations are exact there; only their last digit is not multiplied by second digits."""
    weight, ours = weight_of(*shape, unit)
    bias, stored = np.linspace(-2, 2, shape[0], dtype=np.float32), weight.outlier_weight.shape[1]
    scale = weight.absmax.astype(np.float64) / 127
    for tokens in (0, 1, 3, 5, 11, DECODE_TOKENS):
        x = inputs_of(tokens, weight, dtype)
        values = numpy(x).astype(np.float64)
        shift = torch.from_numpy(bias).to(dtype)
        y = ours.linear(x, shift, 6.0, "static")
        assert y.dtype == dtype and y.shape == (tokens, shape[0])
        exact = reference.weight_only_matmul(values, weight, numpy(shift))
        least = np.abs(values[:, weight.outlier_columns[:stored]]).sum(1, keepdims=True) * scale / 508
        peak = np.abs(values).max(1, initial=0, keepdims=True)
        bound = 1.001 * least + HALF_A_STEP[dtype] * np.abs(exact) + 1e-6
        bound += 4 * EPSILON * peak * np.abs(reference._float_weight(weight)).sum(1)
        representable = np.abs(exact) < torch.finfo(dtype).max
        assert (np.abs(y.double().numpy() - exact) <= bound)[representable].all(), tokens


@pytest.mark.parametrize("column", [-1, 64])
def test_columns_that_are_not_there_are_refused_before_c_sees_them(column):
    codes, exact = torch.ones(3, 64, dtype=torch.int8), torch.ones(3, 1).half()
    with pytest.raises(WeightError, match="an outlier column is not in 0 to 63"):
        PackedWeight(codes, torch.ones(3), None, torch.tensor([5, column]), exact)


@pytest.mark.parametrize("unit", UNITS)
def test_codes_come_back_without_second_digits(unit):
    weight, ours = weight_of(70, 200, 65, 65, unit)
    np.testing.assert_array_equal(ours.codes(), weight.codes)
    columns = torch.tensor([3, 0, 199])
    np.testing.assert_array_equal(ours.columns(columns), weight.codes[:, columns])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", STATIC_MODES)
def test_what_is_no_number_stays_in_its_row(mode, bad, tokens, unit):
    weight, ours = weight_of(45, 131, 5, 3, unit)
    x = inputs_of(tokens, weight, torch.float32)
    clean = ours.linear(x, None, 6.0, mode)
    others = np.setdiff1d(np.arange(131), weight.outlier_columns)
    x[1, int(weight.outlier_columns[0])], x[3, int(others[70])] = bad, bad
    y = ours.linear(x, None, 6.0, mode)
    live = weight.absmax > 0
    assert not y[1, live].isfinite().any() and not y[3, live].isfinite().any()
    rest = [row for row in range(tokens) if row not in (1, 3)]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(0, 131, 5, 3), (45, 131, 5, 3)])
def test_nothing_at_all(shape, unit):
    ours = weight_of(*shape, unit)[1]
    assert ours.linear(torch.zeros(0, 131), None, 6.0, "static").shape == (0, shape[0])
    assert ours.linear(torch.zeros(20, 131), None, 6.0, "static").eq(0).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_alone_and_with_any_others(dtype, unit):
    weight, ours = weight_of(70, 200, 65, 16, unit)
    x = inputs_of(300, weight, dtype)
    for mode in STATIC_MODES:
        together = ours.linear(x, None, 6.0, mode)
        for first, last in ((0, 17), (283, 300), (100, 133)):
            assert torch.equal(ours.linear(x[first:last], None, 6.0, mode), together[first:last])
        few = ours.linear(x[:DECODE_TOKENS], None, 6.0, mode)
        for m in range(DECODE_TOKENS):
            assert torch.equal(ours.linear(x[m : m + 1], None, 6.0, mode), few[m : m + 1])


@pytest.mark.parametrize("unit", UNITS)
def test_sums_are_exact_at_the_largest_columns_and_values(unit):
    columns = 65_538
    codes = torch.full((33, columns), -127, dtype=torch.int8)
    codes[1::2] = 127
    exact = torch.full((33, 16), -127.49)
    exact[1::2] = 127.49
    weight = PackedWeight(codes, torch.full((33,), 127.0), unit, torch.arange(64), exact.half())
    y = weight.linear(torch.full((20, columns), 3.0), None, 0.0, "static")
    stored = 127.5  # 127.49 in float16
    np.testing.assert_allclose(y[:, 1], 3.0 * (127 * (columns - 16) + stored * 16), rtol=1e-5)
    np.testing.assert_allclose(y[:, 0], -y[:, 1])
