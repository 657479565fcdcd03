"""Dequantizing llama.cpp's blocks: equal to its own package, bit for bit, on every unit."""

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from quantize8.kernels import cpu, ggml

HALF = np.dtype(np.float16)


def blocks(kind: str, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Random bytes as rows of blocks, and the weights of a row: all codes, and scales of any size, NaN and infinity."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    stored = np.random.default_rng(len(kind)).integers(0, 256, (rows, columns * size)).astype(np.uint8)
    return stored, columns * weights


def definition(stored: np.ndarray, kind: str, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(stored, GGMLQuantizationType[kind]).astype(dtype)


@pytest.mark.parametrize("unit", cpu.available())
@pytest.mark.parametrize("kind", ggml._COMPILED)
def test_equals_the_definition(kind, unit, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    stored, weights = blocks(kind, 500, 3)
    found, expected = ggml.decode(stored, kind, (weights,), HALF), definition(stored, kind, HALF)
    assert found.shape == (500, weights) and found.dtype == HALF and found.flags.c_contiguous
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(found[~numbers]).all()
    assert 0 < numbers.mean() < 1 and np.isinf(expected).any()  # or nothing of the sort would be tested
    subnormal = np.abs(expected[numbers].astype(np.float32)) < 2.0**-14
    assert (subnormal & (expected[numbers] != 0)).any()


@pytest.mark.parametrize("kind", ["Q5_0", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0"])
@pytest.mark.parametrize("dtype", [HALF, np.dtype(ml_dtypes.bfloat16)])
def test_other_types_are_dequantized_by_the_package(kind, dtype):
    stored, weights = blocks(kind, 5, 2)
    found = ggml.decode(stored, kind, (weights,), dtype)
    assert found.dtype == dtype and ggml.is_read(kind)
    np.testing.assert_array_equal(found.astype(np.float32), definition(stored, kind, dtype).astype(np.float32))


def test_rows_that_do_not_follow_one_another():
    stored, weights = blocks("Q4_K", 6, 2)
    found = ggml.decode(stored[::2], "Q4_K", (weights,), HALF)
    np.testing.assert_array_equal(found, ggml.decode(stored, "Q4_K", (weights,), HALF)[::2])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floating_point(kind):
    values = np.float32([[1.5, -2.25], [1e30, 6e-8]])
    with np.errstate(over="ignore"):
        stored = {"F32": values, "F16": values.astype(HALF), "BF16": values.astype(ml_dtypes.bfloat16)}
    as_bytes = stored[kind].view(np.uint8).reshape(2, -1)
    for dtype in (HALF, np.dtype(ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            expected = stored[kind].astype(dtype)
        np.testing.assert_array_equal(ggml.decode(as_bytes, kind, (2,), dtype).astype(float), expected.astype(float))


def test_types_that_nobody_dequantizes():
    assert not any(map(ggml.is_read, ("Q8_1", "Q8_K", "I32", "F64", "Q1_0")))
