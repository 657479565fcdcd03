"""The CPU kernels equal the reference: bit for bit for integers and scales, otherwise up to output rounding."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch

from quantize8.errors import WeightError
from quantize8.kernels import cpu, reference
from quantize8.kernels.reference import STATIC_MODES, ColumnStats, Int8Weight
from quantize8.kernels.scales import ScaleSearch

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
SHAPES = [(1, 1), (3, 5), (64, 64), (65, 33), (130, 777), (7, 4096), (2, 0), (0, 4)]
# Of the result: what the integer form of static and hybrid may differ by, at decode and at prefill. These are to catch
# what is wrong; test_wide.py has the bounds, element by element.
TWO_DIGITS = (2e-3, 2e-2)
ROUNDING = 1.05  # a product may err by this much more than rounding the exact result to the output type does


@pytest.fixture(params=cpu.available(), autouse=True)
def unit(request, monkeypatch):
    """Every test here runs for each unit that this machine has."""
    monkeypatch.setattr(cpu, "chosen", lambda: request.param)


def hostile(rows: int, columns: int, dtype, seed: int = 0):
    """Heavy tails, rows of very different scale, zero rows, ties, float16 subnormals and the largest float16."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, (rows, columns)) * rng.choice([1e-7, 1e-5, 1.0, 50.0], (rows, 1))
    values = np.clip(values, -65504, 65504).astype(np.float32)
    if rows > 2 and columns:
        values[0] = 0
        values[1] = rng.integers(-254, 255, columns) / 2  # half steps of a row whose absmax is 127
        values[1, 0] = 127
        values[2, -1] = -65504 if dtype != ml_dtypes.bfloat16 else -65280
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_pass_equals_the_reference_in_every_bit(shape, dtype):
    weight = hostile(*shape, dtype)
    codes, absmax = reference.quantize_rowwise(weight)
    stats = reference.column_stats(weight, codes, absmax)
    got = ColumnStats.empty(shape[1])
    got_codes, got_absmax = cpu.quantize_rowwise(weight, got)
    np.testing.assert_array_equal(got_codes, codes)
    np.testing.assert_array_equal(got_absmax, absmax)
    for field in ("absmax", "sum_square", "sum_error", "outliers", "rows"):
        np.testing.assert_array_equal(getattr(got, field), getattr(stats, field), field)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 16])
def test_low_rank_products_are_added_as_in_the_reference_whatever_the_rows(shape, dtype, rank):
    rng, (rows, columns) = np.random.default_rng(rank), shape
    weight = hostile(*shape, dtype)
    left, right = (rng.standard_t(2, size).astype(np.float32) for size in ((rows, rank), (rank, columns)))
    expected = reference.add_low_rank(weight.astype(np.float32), left, right, 0.3)
    np.testing.assert_array_equal(cpu.add_low_rank(weight, left, right, 0.3), expected)
    for step in (1, 2, 7):
        parts = [cpu.add_low_rank(weight[n : n + step], left[n : n + step], right, 0.3) for n in range(0, rows, step)]
        np.testing.assert_array_equal(np.concatenate([weight[:0].astype(np.float32), *parts]), expected)


def test_low_rank_products_worked_out_by_hand():
    rows, left, right = np.array([[1, 2], [3, 4]]), np.array([[1, 0], [2, 1]]), np.array([[5, 6], [7, 8]])
    expected = [[1 + 0.5 * 5, 2 + 0.5 * 6], [3 + 0.5 * 17, 4 + 0.5 * 20]]
    for add in (cpu.add_low_rank, reference.add_low_rank):
        assert add(*(array.astype(np.float32) for array in (rows, left, right)), 0.5).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 32, 100])
def test_scales_without_loss_equal_the_reference(columns, dtype):
    rng = np.random.default_rng(columns)
    values = rng.integers(-127, 128, (3000, columns)) * 2.0 ** rng.integers(-155, 117, (3000, 1))
    values[::3] *= 2.0 ** rng.integers(0, 4, (1000, columns))  # beyond 127 times, often
    values[::7, 0] += 2.0 ** rng.integers(-160, 117, len(values[::7]))
    values[10], values[11, -1], values[12, 0], values[13, 0] = 0, np.nan, np.inf, -np.inf
    values = values.astype(np.float32)
    expected = reference.exact_scales(values, np.dtype(dtype))
    np.testing.assert_array_equal(cpu.exact_scales(values, np.dtype(dtype)), expected)
    assert 0.2 < (expected > 0).mean() < 0.95 or dtype == np.float16
    assert not cpu.exact_scales(values[:0], np.dtype(dtype)).size


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_loss_have_the_scale_of_the_reference(dtype, searched):
    rng = np.random.default_rng(0)
    weight = hostile(70, 96, dtype)
    weight[3:40] = (rng.integers(-127, 128, (37, 96)) * 2.0 ** rng.integers(-20, 5, (37, 1))).astype(dtype)
    weight[50], weight[51, 3], weight[52, 4] = np.ldexp(1.0, -40), np.nan, np.inf
    weight[53], weight[54] = 2 * rng.integers(-63, 64, 96), 512 * rng.integers(-127, 128, 96)
    weight[54, 7] = 65024  # 127 times 512
    if dtype != np.float16:
        weight[55, 0] = 65536  # a power of two, but too large for float16
    search = ScaleSearch() if searched else None
    with np.errstate(invalid="ignore"):
        values = weight.astype(np.float32)
        scale = reference.exact_scales(values, np.dtype(np.float16))
        _, plain = cpu.quantize_rowwise(weight, search=search)
    scale[55] = 0  # float16, which codes are made of, does not hold the row, though it does the scale
    expected = np.where(scale > 0, np.float32(127) * scale, plain)
    stats = ColumnStats.empty(96)
    codes, absmax = cpu.quantize_rowwise(weight, stats, search, exact=True)
    assert absmax.tobytes() == expected.tobytes()  # the sign of zero, too
    np.testing.assert_array_equal(codes, reference.quantize_rowwise(weight, expected)[0])
    exact = scale > 0
    assert exact[3:40].all() and exact[53:55].all() and not exact[[1, 51, 52]].any()
    assert np.array_equal(reference.dequantize(codes[exact], absmax[exact]), values[exact])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern_is_rounded_to_float16_as_numpy_does(dtype):
    patterns = np.arange(2**16, dtype=np.uint16)
    weight = patterns.view(dtype) if dtype != np.float32 else (patterns.astype(np.uint32) << 16 | 0x1001).view(dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # quiet NaN patterns
        half = weight.astype(np.float32).astype(np.float16).astype(np.float32)
    weight = weight[np.isfinite(half)][:, None]
    _, absmax = cpu.quantize_rowwise(np.ascontiguousarray(weight))
    np.testing.assert_array_equal(absmax, np.abs(half[np.isfinite(half)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 70000.0])
def test_rows_that_cannot_be_quantized_are_told_and_leave_the_others_alone(dtype, bad):
    weight = hostile(5, 40, dtype)
    clean = cpu.quantize_rowwise(weight)
    with np.errstate(over="ignore"):
        weight[3, 7] = np.float32(bad).astype(dtype)
    codes, absmax = cpu.quantize_rowwise(weight)
    assert not np.isfinite(absmax[3]) and not codes[3].any()
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(codes[others], clean[0][others])
    np.testing.assert_array_equal(absmax[others], clean[1][others])


def test_statistics_do_not_depend_on_the_blocks():
    weight = hostile(300, 50, np.float16)
    whole, parts = ColumnStats.empty(50), ColumnStats.empty(50)
    cpu.quantize_rowwise(weight, whole)
    for start in range(0, 300, 128):
        cpu.quantize_rowwise(weight[start : start + 128], parts)
    for field in ("absmax", "sum_square", "sum_error", "outliers", "rows"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field), field)


def activations(tokens: int, features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values, two outlier columns, an exact hit of the threshold, a zero row, ties, a tiny row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, features)).astype(np.float32)
    x[:, features // 3] *= 20
    x[:: max(1, tokens // 3), features // 2] = 40
    if tokens > 3:
        x[0, 0] = -6.0
        x[1] = 0
        x[2] = rng.integers(-11, 12, features) / 2
    if tokens > 4:
        x[3] *= 1e-38  # too small for an inverse in float32
    return torch.from_numpy(x).to(dtype)


def as_numpy(tensor: torch.Tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("shape", [(1, 8), (17, 33), (64, 576), (0, 8)])
def test_activation_codes_equal_the_reference_in_every_bit(shape, threshold, dtype):
    x = activations(*shape, dtype)
    expected = reference.quantize_activations(as_numpy(x), threshold)
    codes, scale = cpu.quantize_activations(x, threshold)
    np.testing.assert_array_equal(codes.numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])


def int8_weight(rows: int, columns: int, exact: list[int] | None = None):
    """The same weight for the reference (NumPy) and for torch."""
    values = hostile(rows, columns, np.float16, seed=9)
    codes, absmax = reference.quantize_rowwise(values)
    if exact is None:
        return Int8Weight(codes, absmax), Int8Weight(torch.from_numpy(codes), torch.from_numpy(absmax))
    place = np.array(exact, np.int32)
    fields = (codes, absmax, place, np.ascontiguousarray(values[:, place]))
    return Int8Weight(*fields), Int8Weight(*map(torch.from_numpy, fields))


def assert_within_rounding(product: torch.Tensor, exact: np.ndarray, beside: float = 1e-6) -> None:
    """The Frobenius error is at most ROUNDING times that of rounding the exact result (float32 sums allowed)."""
    rounded = torch.from_numpy(exact).to(product.dtype).double().numpy()
    least = np.linalg.norm(rounded - exact) + beside * np.linalg.norm(exact)
    assert np.linalg.norm(product.double().numpy() - exact) <= ROUNDING * least


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("mode", "exact"),
    [("dynamic", None), ("hybrid", None), *product(STATIC_MODES, ([3], [0, 11, 12]))],
)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 70])
def test_linear_equals_the_reference_up_to_rounding(tokens, exact, mode, dtype):
    columns, rows = 37, 19
    ours, theirs = int8_weight(rows, columns, exact)
    x = activations(tokens, columns, dtype)
    bias = np.linspace(-2, 2, rows, dtype=np.float32)
    y = cpu.linear(x, theirs, torch.from_numpy(bias), 6.0, mode)
    assert y.dtype == dtype and y.shape == (tokens, rows)
    # the row with |w| of 65504 dwarfs the others (and leaves float16): judge rows of one scale together
    expected = reference.linear(as_numpy(x), ours, bias, 6.0, mode)
    beside = TWO_DIGITS[tokens > 16] if mode in STATIC_MODES else 1e-6
    for row in range(rows):
        if np.abs(expected[:, row]).max(initial=0) < 60000:
            assert_within_rounding(y[:, row], expected[:, row], beside)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 16, 31, 33, 100])
@pytest.mark.parametrize("columns", [1, 63, 64, 100, 1024, 2500])
def test_int8_products_are_exact(tokens, columns):
    a, b = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8), torch.randint(-127, 128, (45, columns)).char()
    a[:1], b[0], b[1] = 127, -127, 0
    np.testing.assert_array_equal(cpu.int8_matmul(a, b).numpy(), reference.int8_matmul(a.numpy(), b.numpy()))


@pytest.mark.parametrize("columns", [65_538, cpu.LARGEST_K])
def test_sums_are_exact_at_the_largest_columns_and_values(columns):
    """Every product at its limit, with either sign: saturation and overflow show here."""
    a, b = torch.full((7, columns), 127, dtype=torch.int8), torch.full((33, columns), 127, dtype=torch.int8)
    a[1], b[1::2] = -127, -127
    sums = cpu.int8_matmul(a, b)
    assert (sums[0, ::2] == 127 * 127 * columns).all() and (sums[0, 1::2] == -127 * 127 * columns).all()
    assert (sums[1] == -sums[0]).all() and (sums[2:] == sums[0]).all()


def test_a_layer_that_sums_cannot_hold_is_refused():
    codes = torch.zeros(1, 1, dtype=torch.int8).expand(1, cpu.LARGEST_K + 1)
    with pytest.raises(WeightError, match="133145 input features: int32 sums hold at most 133144"):
        cpu.int8_matmul(codes, codes)


def test_threads_may_compute_at_once():
    weight = Int8Weight(torch.ones(512, 512, dtype=torch.int8), torch.full((512,), 127.0))

    def work(tokens: int) -> bool:
        return cpu.linear(torch.ones(tokens, 512), weight, None, 0.0).eq(512).all().item()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [3, 40] * 50))


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [5, 40])
def test_the_first_columns_only_may_be_stored(tokens, stored):
    """In the order of the list, which is not that of the columns; the others are outliers with dequantized weights."""
    ours, theirs = int8_weight(19, 37, [30, 3, 11])
    cut = [Int8Weight(w.codes, w.absmax, w.outlier_columns, w.outlier_weight[:, :stored]) for w in (ours, theirs)]
    x = activations(tokens, 37, torch.float32)
    x[:, [3, 30]] *= 10
    expected, product = (
        reference.linear(x.numpy(), cut[0], None, 6.0, "static"),
        cpu.linear(x, cut[1], None, 6.0, "static"),
    )
    for row in range(19):
        assert_within_rounding(product[:, row], expected[:, row], TWO_DIGITS[tokens > 16])


def test_plain_int8_without_decomposition():
    ours, theirs = int8_weight(12, 40)
    x = activations(33, 40, torch.float32)
    product = cpu.linear(x, theirs, None, 0.0)
    assert_within_rounding(product, reference.mixed_matmul(x.numpy(), ours, None, 0.0))


def test_nan_stays_visible_and_in_its_row():
    _, weight = int8_weight(6, 24)
    x = activations(30, 24, torch.float32)
    x[4, 3], x[9, 2] = torch.nan, torch.inf
    product = cpu.linear(x, weight, None, 0.0)
    assert product[4].isnan().all() and not product[9, 3:].isfinite().any()
    rest = [row for row in range(30) if row not in (4, 9)]
    assert product[rest].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.ROTATIONS)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_rotated_rows_equal_the_reference_in_every_bit(rows, size, dtype):
    for blocks in (1, 3, 5):
        weight = hostile(rows, blocks * size, dtype)
        if rows > 7:
            weight[4] = np.ldexp(1.0, np.random.default_rng(0).integers(-149, -130, weight.shape[1]))  # subnormal
            weight[5, 3], weight[6, 5], weight[7, 6], weight[7, 9] = np.nan, np.inf, np.inf, -np.inf
        with np.errstate(invalid="ignore"):
            values = weight.astype(np.float32)
        before, rotated = weight.tobytes(), cpu.rotate(weight, size)
        assert rotated.dtype == np.float32 and weight.tobytes() == before
        np.testing.assert_array_equal(rotated, reference.rotate(values, size))
