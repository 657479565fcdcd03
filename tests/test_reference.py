"""The reference against numbers worked out by hand, and against the formulas of the paper."""

import ml_dtypes
import numpy as np
import pytest

from quantize8.kernels import reference
from quantize8.kernels.reference import ColumnStats, Int8Weight


def weight_of(values, **fields):
    return Int8Weight(*reference.quantize_rowwise(np.asarray(values, np.float16)), **fields)


def test_codes_round_half_to_even():
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], np.float16)
    codes, absmax = reference.quantize_rowwise(row)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert absmax.tolist() == [127.0]


def test_scales_that_lose_nothing_by_hand():
    values = np.array([[0.5, -6, 1.5], [127, 1, 0], [128, 1, 0], [127, 0.5, 0], [0, 0, 0], [np.nan, 1, 1], [0.1, 1, 1]])
    scales = reference.exact_scales(values.astype(np.float32), np.dtype(np.float32))
    assert scales.tolist() == [2.0**-4, 1, 0, 0, 0, 0, 0]  # 6 is 96 steps of 2^-4; 12 of 2^-1 would do as well


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(np.float16, -24, 15), (ml_dtypes.bfloat16, -126, 121), (np.float32, -126, 121)],
)
def test_scales_that_lose_nothing_are_numbers_of_their_dtype(dtype, least, most):
    """Down to the smallest number that has an inverse in float32, with the codes that remain."""
    for exponent in range(-149, 125):
        values = np.ldexp(np.array([[1, -3, 6]], np.float32), exponent)
        (scale,), smallest = reference.exact_scales(values, np.dtype(dtype)), max(exponent - 4, least)
        held = exponent >= least and exponent - 4 <= most
        assert scale == (np.ldexp(np.float32(1), smallest) if held else 0), exponent
        if held:
            codes = values / scale
            assert np.array_equal(codes, np.rint(codes)) and abs(codes).max() <= 127
            assert np.array_equal(codes.astype(np.int8) * np.float32(dtype(scale)), values)


def test_values_too_small_beside_others_are_not_lost():
    values = np.ldexp(np.float32(1), np.array([[100, -100], [120, -140]]))
    assert not reference.exact_scales(values, np.dtype(np.float32)).any()


def test_zero_row_has_zero_codes_and_absmax():
    codes, absmax = reference.quantize_rowwise(np.zeros((2, 5), np.float32))
    assert not codes.any() and not absmax.any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weights_are_rounded_to_float16_first(dtype):
    values = np.array([[1.0, 2.0**-26, 0.33333334]], np.float32).astype(dtype)
    codes, absmax = reference.quantize_rowwise(values)
    half = np.asarray(values.astype(np.float32), np.float16).astype(np.float32)
    assert half[0, 1] == 0  # below half of float16's smallest
    assert absmax[0] == half.max()
    assert codes.tolist() == np.rint(half * np.float32(127)).astype(int).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 65520.0])
def test_rows_that_int8_cannot_hold_are_told_by_absmax(bad):
    codes, absmax = reference.quantize_rowwise(np.array([[1, bad, 2], [1, 2, 3]], np.float32))
    assert not np.isfinite(absmax[0]) and absmax[1] == 3
    assert not codes[0].any() and codes[1].any()


def test_largest_float16_is_held():
    codes, absmax = reference.quantize_rowwise(np.array([[65504.0, -65519.0]], np.float32))  # 65519 rounds down
    assert absmax.tolist() == [65504.0] and codes.tolist() == [[127, -127]]


def test_error_of_a_code_is_at_most_half_a_step():
    weight = np.random.default_rng(0).standard_t(2, (64, 257)).astype(np.float16)
    codes, absmax = reference.quantize_rowwise(weight)
    error = np.abs(weight.astype(np.float64) - reference.dequantize(codes, absmax))
    assert (error <= absmax[:, None] / 254 * (1 + 1e-5)).all()
    assert np.abs(codes).max() == 127  # the row's peak takes the last code; -128 never appears


def test_column_stats_equal_plain_sums():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(200, 100)).astype(np.float16)
    weight[17, 5] = 40  # an outlier of its row
    codes, absmax = reference.quantize_rowwise(weight)
    stats = reference.column_stats(weight, codes, absmax)
    exact = weight.astype(np.float64)
    np.testing.assert_allclose(stats.sum_square, (exact**2).sum(0), rtol=1e-5)
    error = exact - reference.dequantize(codes, absmax)
    np.testing.assert_allclose(stats.sum_error, (error**2).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(stats.absmax, np.abs(exact).max(0))
    assert stats.outliers[5] == 1 and stats.rows == 200


def test_column_stats_in_parts_equal_the_whole():
    weight = np.random.default_rng(2).normal(size=(150, 7)).astype(np.float32)
    codes, absmax = reference.quantize_rowwise(weight)
    whole = reference.column_stats(weight, codes, absmax)
    parts = ColumnStats.empty(7)
    for start in (0, 64, 128):
        part = slice(start, start + 64)
        reference.column_stats(weight[part], codes[part], absmax[part], parts)
    for field in ("absmax", "sum_square", "sum_error", "outliers", "rows"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))


def test_outlier_elements_count_as_zero_for_scale_and_codes():
    x = np.array([[1.0, -6.0, 2.0, 5.999]], np.float32)
    codes, scale, outliers = reference.quantize_activations(x, 6.0)
    assert outliers.tolist() == [[False, True, False, False]]
    assert scale[0] == np.float32(5.999) / np.float32(127)
    assert codes[0, 1] == 0 and codes[0, 3] == 127


def test_threshold_zero_turns_detection_off():
    codes, _scale, outliers = reference.quantize_activations(np.array([[100.0, 1.0]], np.float32), 0.0)
    assert not outliers.any() and codes.tolist() == [[127, 1]]


def test_a_token_too_small_for_a_scale_gets_codes_of_zero():
    """127 / 1e-38 is beyond float32; this once cast infinity to int8."""
    codes, scale, _ = reference.quantize_activations(np.array([[1e-38, -1e-39], [1.0, 0.5]], np.float32), 6.0)
    assert codes.tolist() == [[0, 0], [127, 64]] and 0 < scale[0] < 1e-38


def test_fixed_columns_are_left_out_whatever_their_size():
    x = np.array([[100.0, 0.1, 50.0]], np.float32)
    codes, _scale, outliers = reference.quantize_activations(x, 6.0, columns=np.array([0, 1]))
    assert outliers.tolist() == [[True, True, False]]
    assert codes.tolist() == [[0, 0, 127]]


def test_int8_matmul_is_exact_at_the_extremes():
    k = 4096
    a = np.full((2, k), 127, np.int8)
    b = np.full((3, k), -127, np.int8)
    b[0, 0] = 126
    product = reference.int8_matmul(a, b)
    assert product.dtype == np.int32
    assert product[0].tolist() == [-127 * 127 * (k - 1) + 127 * 126, -127 * 127 * k, -127 * 127 * k]


def test_dynamic_mode_takes_the_whole_column_and_hybrid_only_the_elements():
    rng = np.random.default_rng(3)
    weight = weight_of(rng.normal(size=(5, 80)))
    x = rng.normal(size=(4, 80)).astype(np.float32)
    x[1, 2] = 60.0
    dequantized = weight.codes * reference.scale_of(weight.absmax).astype(np.float64)[:, None]
    codes, scale, _ = reference.quantize_activations(x, 6.0)
    int8 = (codes * scale[:, None].astype(np.float64)) @ dequantized.T
    for mode, tokens in (("dynamic", range(4)), ("hybrid", [1])):
        expected = int8.copy()
        for m in tokens:
            expected[m] += (x[m, 2].astype(np.float64) - codes[m, 2] * scale[m].astype(np.float64)) * dequantized[:, 2]
        product = reference.mixed_matmul(x, weight, None, 6.0, mode)
        np.testing.assert_allclose(product, expected, rtol=1e-6)


def test_hybrid_mode_does_not_see_its_neighbours():
    rng = np.random.default_rng(4)
    weight = weight_of(rng.normal(size=(6, 80)))
    x = rng.normal(size=(20, 80)).astype(np.float32)
    x[3, 5] = 60.0
    together = reference.mixed_matmul(x, weight, None, 6.0, "hybrid")
    alone = np.concatenate([reference.mixed_matmul(row[None], weight, None, 6.0, "hybrid") for row in x])
    np.testing.assert_array_equal(together, alone)
    dynamic = reference.mixed_matmul(x, weight, None, 6.0, "dynamic")
    assert (dynamic[0] != reference.mixed_matmul(x[:1], weight, None, 6.0, "dynamic")[0]).any()


def test_static_columns_are_exact_in_activation_and_weight():
    rng = np.random.default_rng(5)
    values = rng.normal(size=(7, 12)).astype(np.float16)
    columns = np.array([1, 4], np.int32)
    weight = weight_of(values, outlier_columns=columns, outlier_weight=values[:, columns])
    x = np.zeros((3, 12), np.float32)
    x[:, columns] = rng.normal(size=(3, 2)) * 50
    product = reference.mixed_matmul(x, weight, None, 6.0, "static")
    np.testing.assert_allclose(product, x.astype(np.float64) @ values.astype(np.float64).T, rtol=1e-12)


def test_the_first_static_columns_may_be_exact_in_the_weight_and_all_are_in_the_activation():
    rng = np.random.default_rng(5)
    values = rng.normal(size=(7, 12)).astype(np.float16)
    columns = np.array([9, 1, 4], np.int32)
    stored = values[:, columns[:1]] * np.float16(2)  # unlike the codes, so that it shows
    weight = weight_of(values, outlier_columns=columns, outlier_weight=stored)
    meant = weight.codes * reference.scale_of(weight.absmax).astype(np.float64)[:, None]
    meant[:, 9] = stored[:, 0]
    x = np.zeros((20, 12), np.float32)
    x[:, columns] = rng.normal(size=(20, 3)) * 50
    for tokens in (20, 16):
        product = reference.linear(x[:tokens], weight, None, 6.0, "static")
        np.testing.assert_allclose(product, x[:tokens].astype(np.float64) @ meant.T, rtol=1e-12)


def test_elements_stand_out_of_their_token_beyond_8_root_mean_squares():
    x = np.random.default_rng(7).normal(size=(9, 300)).astype(np.float32)
    x[0, 5], x[1, [6, 7]], x[2] = -40, (30, -45), 0
    x[3, :4] = 1000  # as many as can be
    x[4, :5] = 1000  # and one more: none is far from the rest
    x[5, 3], x[6, 4] = np.nan, np.inf
    x[7] = 1e-20 * x[0]  # squares that underflow
    x[8] = 1e3 * x[0]
    found = reference.token_outliers(x)
    with np.errstate(invalid="ignore"):
        expected = np.abs(x) > 8 * np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True))
    expected[7] = False
    np.testing.assert_array_equal(found, expected)
    assert found.sum(1).tolist() == [1, 2, 0, 4, 0, 0, 0, 0, 1]
    assert not reference.token_outliers(np.ones((3, 0), np.float32)).any()
    assert not reference.token_outliers(np.eye(64, dtype=np.float32)).any()  # x^2 = 64 sum / K, and not more


def test_the_squares_of_a_token_are_summed_in_one_order():
    x = np.float32(10.0) ** np.random.default_rng(8).uniform(-3, 3, (50, 200)).astype(np.float32)
    lanes = [np.float32(0)] * 64
    for m in range(50):
        lanes = [np.float32(0)] * 64
        for k in range(200):
            lanes[k % 64] = np.float32(lanes[k % 64] + np.float32(x[m, k] * x[m, k]))
        for half in (32, 16, 8, 4, 2, 1):
            lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
        limit = np.float32(8) * np.sqrt(np.float32(lanes[0] / np.float32(200)))
        np.testing.assert_array_equal(reference.token_outliers(x[m : m + 1])[0], x[m] > limit)


def test_nan_and_infinity_in_a_token_stay_visible_and_in_their_row():
    weight = weight_of(np.random.default_rng(6).normal(size=(3, 4)))
    x = np.ones((20, 4), np.float32)
    x[2, 1], x[5, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        product = reference.mixed_matmul(x, weight, None, 0.0)
    assert np.isnan(product[2]).all() and not np.isfinite(product[5]).any()
    assert np.isfinite(np.delete(product, [2, 5], axis=0)).all()


def test_linear_takes_16_bit_activations_up_to_sixteen_tokens():
    rng = np.random.default_rng(7)
    weight, bias = weight_of(rng.normal(size=(5, 9))), rng.normal(size=5).astype(np.float32)
    x = rng.normal(size=(17, 9)).astype(np.float32)
    dequantized = reference.dequantize(weight.codes, weight.absmax).astype(np.float64)
    np.testing.assert_allclose(reference.linear(x[:16], weight, bias, 6.0), x[:16] @ dequantized.T + bias, rtol=1e-6)
    np.testing.assert_array_equal(
        reference.linear(x, weight, bias, 6.0), reference.mixed_matmul(x, weight, bias, 6.0, "dynamic")
    )


def test_the_largest_block_that_divides_the_columns_is_rotated():
    sizes = {2048: 256, 1536: 256, 576: 64, 64: 64, 48: 16, 80: 16, 100: 0, 1: 0}
    assert {columns: reference.rotation_of(columns) for columns in sizes} == sizes


@pytest.mark.parametrize("size", reference.ROTATIONS)
def test_rotation_multiplies_blocks_by_the_hadamard_matrix_of_sylvester(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    values = np.random.default_rng(size).integers(-99, 100, (3, 3 * size)).astype(np.float32)  # their sums are exact
    rotated = reference.rotate(values, size)
    assert rotated.dtype == np.float32
    expected = values.reshape(3, 3, size) @ matrix / np.sqrt(size)
    assert np.array_equal(rotated.reshape(3, 3, size), expected)
    assert np.array_equal(reference.rotate(rotated, size), values)  # its own inverse


def test_rotation_rounds_each_stage_in_order():
    """1 is lost beside 2^24 in the first stage; had the second come first, it would not be."""
    row = np.zeros((1, 16), np.float32)
    row[0, :3] = 2.0**24, 1, -(2.0**24)
    assert reference.rotate(row, 16)[0, :4].tolist() == [0, -0.25, 2.0**23, 2.0**23]


def test_what_is_not_finite_fills_its_block_and_no_other():
    values = np.ones((4, 48), np.float32)
    values[0, 17], values[1, 18], values[2, 16:18], values[3, 20] = np.nan, -np.inf, np.inf, 3e38
    values[3, 21] = 3e38  # their sum is beyond float32
    rotated = reference.rotate(values, 16)
    assert np.array_equal(rotated[:, :16], reference.rotate(values[:, :16], 16)) and np.isfinite(rotated[:, 32:]).all()
    assert np.isnan(rotated[0, 16:32]).all() and np.isinf(rotated[1, 16:32]).all()
    assert np.isnan(rotated[2, 17:32:2]).all() and np.isinf(rotated[2, 16:32:2]).all()
    assert np.isinf(rotated[3, 16:32:2]).all() and (rotated[3, 17:32:2] != np.inf).all()
    assert not reference.rotate(np.zeros((1, 16), np.float32), 16).any()
    assert reference.rotate(values[:0], 16).shape == (0, 48)
