"""GPTQ's codes: kernels against their definition bit for bit, the algorithm as published, hostile data."""

import ml_dtypes
import numpy as np
import pytest
from test_cpu import hostile

from quantize8.kernels import cpu
from quantize8.kernels.reference import INT8_MAX
from quantize8.kernels.rounding import (
    DAMPING,
    LEAST_INPUT,
    TOKENS,
    accumulate,
    defined_codes,
    defined_factor,
    defined_gram,
    factor,
    round_codes,
)

SIZES = [1, 2, 31, 63, 64, 65, 128, 130, 257]  # of K: around the sizes of blocks and strips


def correlated(tokens: int, columns: int, seed: int = 0):
    """Inputs [T, K] with bfloat16 numbers: a few directions, outlier columns, a zero column, tiny and zero tokens."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 5)) @ rng.normal(size=(5, columns)) + 0.3 * rng.normal(size=(tokens, columns))
    x *= np.exp(rng.normal(size=columns))
    x[:, columns // 3] *= 30
    x[: tokens // 7] *= 1e-20
    x[tokens // 2 :][:2] = 0
    if columns > 2:
        x[:, 1] = 0
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def row_scales(weight, groups: int = 1):
    """absmax / 127 of each group of adjacent features, float32 [N, G]."""
    peaks = np.abs(weight.reshape(len(weight), groups, weight.shape[1] // groups)).max(axis=2, initial=0)
    return (peaks / np.float32(INT8_MAX)).astype(np.float32)


def factored(x):
    gram = np.zeros((x.shape[1], x.shape[1]))
    accumulate(gram, x)
    return factor(gram)


def output_error(weight, scales, codes, x, order=None):
    """The squared output errors [N] on the inputs, damped as the Gram matrix is, in float64."""
    errors = weight - codes * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1).astype(np.float64)
    damping = DAMPING * np.square(x.astype(np.float64)).sum() / x.shape[1]
    return np.square(errors @ x.T.astype(np.float64)).sum(1) + damping * np.square(errors).sum(1)


def published(weight, scales, x):
    """The codes of GPTQ's algorithm 1 with act_order, in float64: updates by the Cholesky factor of the inverse."""
    columns = x.shape[1]
    gram = x.T.astype(np.float64) @ x
    order = np.argsort(-gram.diagonal(), kind="stable")
    damped = (gram + DAMPING * np.eye(columns) * gram.diagonal().mean())[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = weight[:, order].astype(np.float64), np.empty(weight.shape)
    for j in range(columns):
        codes[:, j] = np.clip(np.rint(left[:, j] / scales[:, 0]), -INT8_MAX, INT8_MAX)
        error = (left[:, j] - codes[:, j] * scales[:, 0]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("unit", cpu.available())
@pytest.mark.parametrize("tokens", [1, TOKENS, 300, 1100])
@pytest.mark.parametrize("columns", SIZES)
def test_gram_matrices_equal_the_definition_in_every_bit(columns, tokens, unit, threads, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    x, gram = correlated(tokens, columns), np.zeros((columns, columns))
    accumulate(gram, x, threads)
    np.testing.assert_array_equal(np.triu(gram), np.triu(defined_gram(x)))
    parts = np.zeros((columns, columns))
    for start in range(0, tokens, 2 * TOKENS):
        accumulate(parts, x[start : start + 2 * TOKENS], threads)
    np.testing.assert_array_equal(np.triu(parts), np.triu(gram))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("unit", cpu.available())
@pytest.mark.parametrize("columns", SIZES)
def test_factors_and_codes_equal_the_definition_in_every_bit(columns, unit, threads, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    gram = defined_gram(correlated(300, columns))
    expected = defined_factor(gram)
    order, carried = factor(gram, threads)
    np.testing.assert_array_equal(order, expected[0])
    np.testing.assert_array_equal(carried, expected[1])
    for rows in (0, 1, 70):
        weight = hostile(rows, columns, np.float32)
        scales = row_scales(weight)
        codes = round_codes(weight, scales, order, carried, threads)
        np.testing.assert_array_equal(codes, defined_codes(weight, scales, order, carried))


@pytest.mark.parametrize("unit", cpu.available())
@pytest.mark.parametrize("size", [32, 64, 128])
def test_groups_of_features_have_scales_of_their_own(size, unit, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    x = correlated(300, 384)
    order, carried = factored(x)
    weight = hostile(70, 384, np.float32)
    scales = row_scales(weight, 384 // size)
    scales[5, 1], scales[6, 0] = np.inf, np.nan
    codes = round_codes(weight, scales, order, carried, 2)
    np.testing.assert_array_equal(codes, defined_codes(weight, scales, order, carried))
    assert not codes[5, size : 2 * size].any() and not codes[6, :size].any() and codes[5, :size].any()


def test_the_codes_are_those_of_gptq_as_published():
    """Equal but for targets so near to the middle between two codes that float32 decides otherwise than float64."""
    rng = np.random.default_rng(1)
    x = correlated(600, 96, 1)
    weight = rng.normal(size=(80, 96)).astype(np.float32)
    scales = row_scales(weight) * np.float32(1.02)  # nothing is clamped, so that no row keeps its nearest codes
    codes = round_codes(weight, scales, *factored(x))
    expected = published(weight, scales, x)
    rows = (codes != expected).any(1)
    assert rows.sum() <= 4
    np.testing.assert_allclose(
        output_error(weight, scales, codes, x), output_error(weight, scales, expected, x), rtol=0.2
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_row_has_a_larger_output_error_than_with_nearest_codes(seed):
    rng = np.random.default_rng(seed)
    x = correlated(400, 160, seed)
    weight = rng.standard_t(2, (60, 160)).astype(np.float32)
    scales = row_scales(weight) * rng.choice([0.02, 0.3, 1.0], (60, 1)).astype(np.float32)  # clips, and how
    codes = round_codes(weight, scales, *factored(x))
    nearest = np.clip(np.rint(weight / scales), -INT8_MAX, INT8_MAX)
    ours, plain = (output_error(weight, scales, each, x) for each in (codes, nearest))
    assert (ours <= plain * (1 + 1e-4)).all()
    whole = scales[:, 0] >= row_scales(weight)[:, 0]
    assert ours[whole].sum() < 0.3 * plain[whole].sum()


def test_inputs_of_zeros_and_uncorrelated_inputs_give_the_nearest_codes():
    weight = hostile(70, 96, np.float32)
    scales = row_scales(weight)
    with np.errstate(all="ignore"):
        nearest = np.nan_to_num(np.rint(weight * (np.float32(1) / scales))).clip(-INT8_MAX, INT8_MAX)
    for x in (np.zeros((3, 96), np.float32), np.eye(96, dtype=np.float32), np.zeros((0, 96), np.float32)):
        order, carried = factored(x)
        assert order.tolist() == list(range(96))
        np.testing.assert_array_equal(round_codes(weight, scales, order, carried), nearest)


def test_scales_that_cannot_be_used_give_zeros():
    weight = np.ones((6, 8), np.float32)
    weight[0, 0], weight[1, 2] = np.inf, np.nan
    scales = np.array([np.inf, np.nan, 0, 1e-42, 1 / 127, -1 / 127], np.float32)[:, None]
    codes = round_codes(weight, scales, *factored(correlated(50, 8)))
    assert not codes[:4].any() and codes[4].any()
    np.testing.assert_array_equal(codes[5], -codes[4])


def test_a_row_does_not_depend_on_the_others():
    weight, x = hostile(70, 96, np.float32), correlated(200, 96)
    scales, given = row_scales(weight), factored(x)
    whole = round_codes(weight, scales, *given)
    for start in (0, 1, 64, 69):
        part = slice(start, start + 3)
        np.testing.assert_array_equal(round_codes(weight[part], scales[part], *given), whole[part])


def test_tiny_inputs_count_as_zeros():
    x = np.full((3, 2), LEAST_INPUT, np.float32)
    x[:, 1] /= 2
    gram = np.zeros((2, 2))
    accumulate(gram, x)
    assert gram[0, 0] == 3 * LEAST_INPUT**2 and not gram[:, 1].any()


def test_features_can_keep_their_order():
    x = correlated(200, 70)
    gram = defined_gram(x)
    order, carried = factor(gram.copy(), by_size=False)
    assert order.tolist() == list(range(70))
    upper = carried * carried.diagonal()
    np.fill_diagonal(upper, carried.diagonal())
    damped = gram + DAMPING * gram.diagonal().mean() * np.eye(70)
    np.testing.assert_allclose(upper.astype(np.float64) @ upper.T, damped, atol=1e-5 * damped.max())
