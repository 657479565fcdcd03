"""Q8_0: equal to the package of llama.cpp on hostile data, with the kernels of every unit."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from quantize8.kernels import cpu, q8_0
from quantize8.kernels.reference import scale_of
from quantize8.kernels.scales import ScaleSearch


@pytest.fixture(params=cpu.available())
def way(request, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: request.param)


def hostile(rows=64, columns=1024):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1)) * 3)
    values[0], values[1, :32] = 0, -0.0
    values[2] = np.resize(np.arange(-254, 255) / 2, columns)  # halves of a step,
    values[2, ::32] = 127  # which is 1
    values[3], values[3, ::32] = np.float32(0.49999997), 127  # rounds up if a half is added to it
    values[4], values[5], values[6], values[7] = 1e-7, 1e-38, 1e-41, 1e-45  # no scale in float16, and no 1 / scale
    values[8], values[9], values[10, 5] = 8.3e6, -8.3e6, 1e4
    return values.astype(np.float32)


def test_by_hand(way):
    row = np.zeros((1, 32), np.float32)
    row[0, :5] = 127, 0.5, -0.5, 1.49, -126.5
    packed = q8_0.quantize_rows(row)
    assert packed.shape == (1, 34) and packed[0, :2].view("<f2")[0] == 1
    assert packed[0, 2:8].view(np.int8).tolist() == [127, 1, -1, 1, -127, 0]


def test_equals_ggufs_own(way):
    values = hostile()
    with np.errstate(all="ignore"):
        expected = quants.quantize(values, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(q8_0.quantize_rows(values), expected)
    np.testing.assert_array_equal(
        q8_0.dequantize_rows(expected), quants.dequantize(expected, GGMLQuantizationType.Q8_0)
    )
    assert q8_0.first_unfit(expected) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 8.4e6])
@pytest.mark.parametrize("place", [0, 1000])
def test_what_no_scale_can_hold_is_found(bad, place, way):
    values = hostile()
    values[17, place] = values[40, 3] = bad
    assert q8_0.first_unfit(q8_0.quantize_rows(values)) == 17


def test_no_rows(way):
    packed = q8_0.quantize_rows(np.empty((0, 64), np.float32))
    assert packed.shape == (0, 68) and q8_0.first_unfit(packed) is None
    assert [len(part) for part in q8_0.row_errors(np.empty((0, 64), np.float32), packed)] == [0, 0]


def test_carried_codes_stay_and_scales_are_rounded_once():
    rng = np.random.default_rng(0)
    codes, absmax = rng.integers(-127, 128, (6, 96)).astype(np.int8), np.float32([0, 1e-9, 3e-6, 0.3, 7, 8.3e6])
    packed = q8_0.with_scales(codes, scale_of(absmax)[:, None])
    blocks = packed.reshape(6, 3, 34)
    np.testing.assert_array_equal(blocks[:, :, 2:].view(np.int8).reshape(6, 96), codes)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
    np.testing.assert_array_equal(scales, np.repeat((absmax / np.float32(127)).astype(np.float16)[:, None], 3, axis=1))
    assert scales[1, 0] == 0 and scales[5, 0] > 60000
    assert q8_0.first_unfit(q8_0.with_scales(codes, scale_of(np.float32([0, 1, 1, 8.4e6, 1, np.nan]))[:, None])) == 3


def test_errors_are_the_same_in_any_company(way):
    values = hostile()
    packed = q8_0.quantize_rows(values)
    squares, errors = q8_0.row_errors(values, packed)
    wide = values.astype(np.float64)
    np.testing.assert_allclose(squares, (wide**2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(errors, ((wide - q8_0.dequantize_rows(packed)) ** 2).sum(axis=1), rtol=1e-6)
    alone = [q8_0.row_errors(values[n : n + 1], packed[n : n + 1]) for n in range(len(values))]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in alone]), squares)
    np.testing.assert_array_equal(np.concatenate([part for _, part in alone]), errors)


def test_scales_without_loss_are_taken_where_float16_holds_them(way):
    values = np.tile(np.array([0.5, 1, 1.5, 2, 3, 4, 6, -6], np.float32), (2, 12))
    values[0, 32:64] *= 2.0**-23  # the smallest number is 2^-24, the smallest scale of float16
    values[0, 64:] *= 2.0**-24
    values[1, 7] = 5.03
    packed = q8_0.quantize_rows(values, exact=True)
    back, plain = q8_0.dequantize_rows(packed), q8_0.quantize_rows(values)
    exact = (back == values).reshape(2, 3, 32).all(axis=2)
    assert exact.tolist() == [[True, True, False], [False, True, True]]
    blocks, plain = packed.reshape(2, 3, 34), plain.reshape(2, 3, 34)
    assert blocks[0, 0, :2].view("<f2") == 2.0**-4 and blocks[0, 1, :2].view("<f2") == 2.0**-24
    np.testing.assert_array_equal(blocks[~exact], plain[~exact])


def importances(columns=1024):
    """Log-normal, one column without any, one with most of it."""
    importance = np.exp(np.random.default_rng(5).normal(size=columns) * 2).astype(np.float32)
    importance[3], importance[40] = 0, 1e6
    return importance


def read_back(block, weights, level):
    """The weighted error of a block by d = absmax / level, in float64, and its 34 bytes."""
    scale = np.abs(block).max() / np.float32(level)
    with np.errstate(all="ignore"):  # 1 / 0, and scales beyond float16
        inverse, stored = np.float32(1) / scale, scale.astype("<f2")
        scaled = np.abs(block * (inverse if np.isfinite(inverse) else np.float32(0))).astype(np.float64)
        codes = np.sign(block) * np.floor(scaled + 0.5)
        error = (weights * (block.astype(np.float64) - codes * np.float64(stored)) ** 2).sum()
    return error, stored.tobytes() + codes.astype(np.int8).tobytes()


@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_those_of_brute_force(weighted, way):
    values = hostile(rows=24)
    importance = importances() if weighted else np.ones(1024, np.float32)
    plain = q8_0.quantize_rows(values).reshape(-1, 34)
    packed = q8_0.quantize_rows(values, ScaleSearch(importance if weighted else None)).reshape(-1, 34)
    weights = np.resize(importance, values.size).reshape(-1, 32)
    for number, block in enumerate(values.reshape(-1, 32)):
        found = [read_back(block, weights[number], level) for level in range(127, 118, -1)]
        assert found[0][1] == plain[number].tobytes()
        least = min(error for error, _ in found if np.isfinite(error))
        ties = {data for error, data in found if error <= least * (1 + 1e-5)}  # float32 sums may take one for another
        assert packed[number].tobytes() in ties


def test_a_search_gains_on_plain_weights(way):
    values = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    plain, found = (q8_0.row_errors(values, q8_0.quantize_rows(values, how))[1].sum() for how in (None, ScaleSearch()))
    assert (found / plain) ** 0.5 < 0.92


@pytest.mark.parametrize("bad", [np.nan, np.inf, 8.4e6])
def test_a_search_leaves_what_no_scale_can_hold_to_be_found(bad, way):
    values = hostile()
    values[17, 5] = bad
    assert q8_0.first_unfit(q8_0.quantize_rows(values, ScaleSearch())) == 17
    assert q8_0.quantize_rows(np.empty((0, 64), np.float32), ScaleSearch()).shape == (0, 68)


@pytest.mark.parametrize("search", [ScaleSearch(), ScaleSearch(importances())], ids=["mse", "weighted"])
def test_a_search_equals_its_definition_bit_for_bit(search, way):
    values = hostile()
    blocks, weights = values.reshape(-1, 32), search.weights(values.shape[1]).reshape(-1, 32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(q8_0._searched(blocks, weights), q8_0.search_scales(blocks, weights))


def test_row_errors_are_those_of_what_is_read_back(way):
    values = hostile()
    packed = q8_0.quantize_rows(values)
    parts = (values, values - q8_0.dequantize_rows(packed))
    for found, part in zip(q8_0.row_errors(values, packed), parts, strict=True):
        lanes = np.zeros((len(part), 32))
        for block in np.moveaxis(part.reshape(len(part), -1, 32), 1, 0).astype(np.float64):
            lanes += block * block
        np.testing.assert_array_equal(found, np.cumsum(lanes, axis=1)[:, -1])
