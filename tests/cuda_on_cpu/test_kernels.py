"""The CUDA kernels, thread by thread on the CPU, against the reference: codes, scales and statistics bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_on_cpu.emulation import ORDERS, EmulatedGpu

from quantize8.errors import DeviceWarning, WeightError
from quantize8.kernels import cuda as kernels
from quantize8.kernels import gpu, reference
from quantize8.kernels.reference import ColumnStats, Int8Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALVES = DTYPES[:2]
AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)


@pytest.fixture
def on(monkeypatch):
    """Make the functions of ops.gpu launch on an emulated GPU."""

    def choose(capability=AMPERE, order=0, processors=4) -> EmulatedGpu:
        emulated = EmulatedGpu(capability, order, processors)
        monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
        return emulated

    return choose


def numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weight_of(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Outliers, ties, zero and tiny rows, nearly the largest float16."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    weight[:, :: max(1, columns // 3)] *= 30
    weight[:, 1::64] = weight.half().float().abs().amax(1, keepdim=True) / 2  # 63.5: the order of rounding decides
    if rows > 3:
        weight[1] = 0
        weight[2] = (torch.arange(columns) % 255 - 127).float() / 2  # absmax 63.5: all codes are ties
        weight[2, 0] = 127
        weight[3] = torch.randn(columns, generator=random) * 1e-6  # subnormal in float16
    if rows > 4:
        weight[4, -1] = 65504 if dtype != torch.bfloat16 else 65280
    return weight.to(dtype)


def activations_of(tokens: int, columns: int, dtype: torch.dtype, outliers: int, seed: int = 0) -> torch.Tensor:
    """Unlike tokens, with outlier columns that only some tokens reach, a zero token and a tie at the threshold."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=random).clamp(-5, 5)
    chosen = torch.randperm(columns, generator=random)[:outliers]
    x[:, chosen] *= torch.where(torch.rand(tokens, outliers, generator=random) < 0.5, 9.0, 0.1)
    if outliers:
        x[0, chosen[0]] = 6.0
        x[-1, chosen[0]] = -40
    if tokens > 2:
        x[1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (5, 8), (70, 72), (130, 129), (9, 2056), (6, 4100), (3, 8192), (3, 16392), (2, 32768)],
)
def test_quantize_rowwise(on, dtype, rows, columns, order):
    on(order=order)
    weight = weight_of(rows, columns, dtype)
    expected_codes, expected_absmax = reference.quantize_rowwise(numpy(weight))
    codes, absmax = gpu.quantize_rowwise(weight)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(absmax.numpy(), expected_absmax)

    stats, expected = gpu.DeviceStats.empty(columns, "cpu"), ColumnStats.empty(columns)
    for start in range(0, rows, reference.STATS_TILE_ROWS):  # in two calls where there are rows for it
        part = weight[start : start + reference.STATS_TILE_ROWS]
        codes, absmax = gpu.quantize_rowwise(part, stats)
        here = slice(start, start + len(part))
        np.testing.assert_array_equal(codes.numpy(), expected_codes[here])
        np.testing.assert_array_equal(absmax.numpy(), expected_absmax[here])
        reference.column_stats(numpy(part), expected_codes[here], expected_absmax[here], expected)
    for name in ("absmax", "sum_square", "sum_error", "outliers"):
        np.testing.assert_array_equal(getattr(stats, name).numpy(), getattr(expected, name), err_msg=name)
    assert stats.rows == rows


def test_statistics_of_many_tiles_in_one_launch(on):
    on(order=2)
    weight = weight_of(300, 40, torch.bfloat16)
    stats = gpu.DeviceStats.empty(40, "cpu")
    codes, absmax = gpu.quantize_rowwise(weight, stats)
    expected = reference.column_stats(numpy(weight), codes.numpy(), absmax.numpy())
    np.testing.assert_array_equal(stats.sum_square.numpy(), expected.sum_square)
    np.testing.assert_array_equal(stats.sum_error.numpy(), expected.sum_error)
    np.testing.assert_array_equal(stats.outliers.numpy(), expected.outliers)
    assert expected.outliers.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_cannot_be_quantized_has_no_finite_absmax_and_spoils_no_other(on, dtype, bad):
    on()
    weight = weight_of(20, 64, dtype)
    weight[7, 5] = bad
    codes, absmax = gpu.quantize_rowwise(weight, gpu.DeviceStats.empty(64, "cpu"))
    assert np.flatnonzero(~np.isfinite(absmax.numpy())).tolist() == [7] and not codes[7].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_beyond_float16_has_no_finite_absmax(on, dtype):
    on()
    weight = weight_of(6, 16, dtype)
    weight[0, 3] = 70000
    _, absmax = gpu.quantize_rowwise(weight)
    assert np.flatnonzero(~np.isfinite(absmax.numpy())).tolist() == [0]


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (8, 0)])
def test_nothing_to_quantize(on, rows, columns):
    emulated = on()
    codes, absmax = gpu.quantize_rowwise(torch.zeros(rows, columns))
    assert codes.shape == (rows, columns) and absmax.tolist() == [0.0] * rows and not emulated.launched


def test_addresses_beyond_two_to_the_31(on):
    """The last block of 2^31 + 8192 weights, in memory that the system gives only where it is touched."""
    emulated = on()
    rows, columns = 2**18 + 1, 8192
    weight = torch.from_numpy(np.zeros((rows, columns), np.float16))
    codes, absmax = torch.from_numpy(np.zeros((rows, columns), np.int8)), torch.zeros(rows)
    weight[-1] = weight_of(1, columns, torch.float16)[0]
    kernel = kernels.quantize_rowwise("half", columns, False)
    arguments = [weight, codes, absmax, None, None, None, None, rows, columns, kernels.rows_at_once(columns), 16]
    emulated.launch(kernel, (kernels.ceil_div(rows, 16), 1), arguments, first_block=rows // 16)
    expected, peak = reference.quantize_rowwise(weight[-1:].numpy())
    np.testing.assert_array_equal(codes[-1:].numpy(), expected)
    assert absmax[-1].item() == peak[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(on, dtype):
    on()
    codes, absmax = reference.quantize_rowwise(numpy(weight_of(9, 301, torch.float32)))
    expected = torch.from_numpy(reference.dequantize(codes, absmax)).to(dtype)
    assert torch.equal(gpu.dequantize(torch.from_numpy(codes), torch.from_numpy(absmax), dtype), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "outliers"), [(1, 1, 1), (3, 8, 0), (20, 64, 3), (5, 4101, 40), (2, 32768, 3000)]
)
def test_quantize_activations(on, dtype, tokens, columns, outliers, order):
    on(order=order)
    x = activations_of(tokens, columns, dtype, outliers)
    for threshold in (6.0, 0.0):
        expected_codes, expected_scale, mask = reference.quantize_activations(numpy(x), threshold)
        found = gpu.quantize_activations(x, threshold)
        np.testing.assert_array_equal(found.codes.numpy(), expected_codes)
        np.testing.assert_array_equal(found.scale.numpy(), expected_scale)
        if threshold:
            listed = found.outliers[: found.count.item()].numpy()
            np.testing.assert_array_equal(listed, np.flatnonzero(mask.any(0)))
            assert bool(len(listed)) == bool(outliers)
        else:
            assert found.outliers is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_that_are_not_numbers(on, dtype):
    """NaN spoils its token; infinity is an outlier, or without a threshold spoils its token, too; tiny tokens are 0."""
    on()
    x = activations_of(6, 24, dtype, 2)
    x[2, 3], x[3, 4], x[4, 5] = float("nan"), float("inf"), -float("inf")
    x[5] = 0
    x[5, 1] = 1e-38 if dtype != torch.float16 else 6e-8
    for threshold in (6.0, 0.0):
        with np.errstate(all="ignore"):
            codes, scale, mask = reference.quantize_activations(numpy(x), threshold)
        found = gpu.quantize_activations(x, threshold)
        np.testing.assert_array_equal(found.codes.numpy(), codes)
        np.testing.assert_array_equal(found.scale.numpy(), scale)
        if threshold:
            assert found.outliers[: found.count.item()].tolist() == np.flatnonzero(mask.any(0)).tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "rotation"),
    [(3, 16, 16), (4, 2064, 16), (2, 64, 64), (3, 2112, 64), (2, 256, 256), (3, 8448, 256), (1, 32768, 256)],
)
def test_rotation_bit_for_bit(on, dtype, tokens, columns, rotation, order):
    """Also rows that end within a warp, where lanes past the end must take part in the exchange."""
    emulated = on(order=order)
    x = activations_of(tokens, columns, dtype, 5)
    expected_codes, expected_scale, _ = reference.quantize_activations(numpy(x), 6.0, rotation=rotation)
    found = gpu.quantize_activations(x, 6.0, rotation)
    np.testing.assert_array_equal(found.codes.numpy(), expected_codes)
    np.testing.assert_array_equal(found.scale.numpy(), expected_scale)
    assert found.outliers is None
    expected = reference.rotate(numpy(x).astype(np.float32), rotation)
    np.testing.assert_array_equal(gpu.rotate(x, rotation).numpy(), expected)
    assert emulated.launched == ["quantize_activations", "rotate"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotation", reference.ROTATIONS)
def test_rotated_activations_that_are_not_numbers_spoil_their_token_alone(on, dtype, bad, rotation):
    on()
    x = activations_of(4, 2 * rotation, dtype, 3)
    x[2, rotation + 3] = bad
    expected_codes, expected_scale, _ = reference.quantize_activations(numpy(x), 0.0, rotation=rotation)
    found = gpu.quantize_activations(x, 0.0, rotation)
    np.testing.assert_array_equal(found.codes.numpy(), expected_codes)
    np.testing.assert_array_equal(found.scale.numpy(), expected_scale)
    rotated = gpu.rotate(x, rotation)
    np.testing.assert_array_equal(rotated.numpy(), reference.rotate(numpy(x).astype(np.float32), rotation))
    assert rotated.isfinite().all(1).tolist() == [True, True, False, True]


def test_a_rotation_must_fit():
    with pytest.raises(WeightError, match=r"a rotation in blocks of 64: .* divide 96 input features"):
        gpu.rotate(torch.zeros(1, 96), 64)


def error_over_rounding(y: torch.Tensor, exact: np.ndarray) -> float:
    """Distance from the exact result, over that of the exact result rounded to y's dtype."""
    rounded = torch.from_numpy(exact).to(y.dtype).double().numpy()
    own = np.linalg.norm(y.double().numpy() - exact)
    floor = np.linalg.norm(rounded - exact) + 2e-7 * np.linalg.norm(exact)  # and that of summing in float32
    return float(own / floor)


def layer_of(out_features: int, in_features: int, seed: int = 1) -> Int8Weight:
    weight = weight_of(out_features, in_features, torch.float32, seed).clamp(-2, 2).numpy()
    codes, absmax = reference.quantize_rowwise(weight)
    return Int8Weight(torch.from_numpy(codes), torch.from_numpy(absmax))


def as_numpy(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(weight.codes.numpy(), weight.absmax.numpy())


PRODUCTS = [  # capability, processors, dtype, tokens, out features, in features, outliers, what it launches
    (AMPERE, 4, torch.float16, 20, 72, 64, 3, "small tile"),
    (AMPERE, 1, torch.bfloat16, 130, 136, 208, 21, "large tile, K no multiple of it"),
    (AMPERE, 1, torch.float16, 33, 131, 16, 16, "odd N, K shorter than a tile"),
    (AMPERE, 9, torch.bfloat16, 65, 67, 1040, 40, "odd M and N, outliers in three rounds"),
    (HOPPER, 1, torch.float16, 40, 100, 400, 5, "wgmma"),
    (HOPPER, 1, torch.bfloat16, 130, 259, 144, 17, "wgmma, odd N"),
    (HOPPER, 1, torch.bfloat16, 17, 256, 1024, 0, "wgmma, no outliers, pipeline goes round"),
    (TURING, 4, torch.float16, 20, 72, 64, 3, "library and epilogue"),
    (TURING, 4, torch.bfloat16, 29, 33, 101, 9, "library and epilogue, odd K"),
    (AMPERE, 4, torch.float32, 18, 300, 75, 4, "library and epilogue, float"),
    (AMPERE, 4, torch.float16, 21, 40, 100, 4, "library and epilogue, K no multiple of 16"),
]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case[-1])
def test_mixed_matmul(on, case, order):
    capability, processors, dtype, tokens, out_features, in_features, outliers, _ = case
    emulated = on(capability, order=order, processors=processors)
    x, weight = activations_of(tokens, in_features, dtype, outliers), layer_of(out_features, in_features)
    for bias, threshold in ((torch.randn(out_features).to(dtype), 6.0), (None, 0.0)):
        exact = reference.mixed_matmul(numpy(x), as_numpy(weight), None if bias is None else numpy(bias), threshold)
        y = gpu.mixed_matmul(x, weight, bias, threshold)
        assert y.shape == exact.shape and y.dtype == dtype
        assert error_over_rounding(y, exact) <= 1.05
    assert len(emulated.launched) == 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_mixed_matmul_does_not_depend_on_the_order_of_threads(on, capability, order):
    x, weight = activations_of(66, 272, torch.float16, 18), layer_of(130, 272)
    on(capability, processors=1)
    first = gpu.mixed_matmul(x, weight, None, 6.0)
    on(capability, order, processors=1)
    assert torch.equal(gpu.mixed_matmul(x, weight, None, 6.0), first)


def test_the_tile_fits_the_work():
    assert kernels.choose_tile(HOPPER, 132, 2048, 4096) is kernels.WGMMA_TILE
    assert kernels.choose_tile(HOPPER, 132, 256, 4096) is kernels.SMALL_TILE
    assert kernels.choose_tile((8, 9), 128, 2048, 4096) is kernels.LARGE_TILE
    assert kernels.choose_tile((12, 0), 170, 2048, 14336) is kernels.LARGE_TILE


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(
    ("capability", "dtype", "out_features", "in_features"),
    [
        (AMPERE, torch.float16, 40, 64),
        (AMPERE, torch.bfloat16, 17, 2064),
        (HOPPER, torch.float16, 3, 16),
        (HOPPER, torch.float16, 21, 4112),
        (TURING, torch.float16, 13, 528),
        (TURING, torch.bfloat16, 8, 37),
        (AMPERE, torch.float32, 11, 301),
    ],
)
def test_weight_only_matmul(on, capability, dtype, out_features, in_features, tokens):
    emulated = on(capability, order=tokens % 4)
    x, weight = activations_of(tokens, in_features, dtype, min(3, in_features)), layer_of(out_features, in_features)
    for bias in (None, torch.randn(out_features).to(dtype)):
        exact = reference.weight_only_matmul(numpy(x), as_numpy(weight), None if bias is None else numpy(bias))
        y = gpu.weight_only_matmul(x, weight, bias)
        assert error_over_rounding(y, exact) <= 1.05
    assert emulated.launched == ["weight_only_matmul"] * 2


ROTATED = [  # capability, dtype, out features, in features, rotation
    (AMPERE, torch.float16, 40, 64, 16),
    (AMPERE, torch.bfloat16, 67, 1088, 64),
    (HOPPER, torch.bfloat16, 259, 768, 256),
    (TURING, torch.float16, 33, 256, 256),
    (AMPERE, torch.float32, 21, 320, 64),
]


@pytest.mark.parametrize("tokens", [1, 16, 17, 70])
@pytest.mark.parametrize("case", ROTATED, ids=lambda case: f"sm{case[0][0]}-{case[1]}-{case[-1]}")
def test_a_rotated_layer_at_decode_and_prefill(on, case, tokens):
    capability, dtype, out_features, in_features, rotation = case
    emulated = on(capability, order=tokens % 4, processors=1)
    x, plain = activations_of(tokens, in_features, dtype, 3), layer_of(out_features, in_features)
    weight = Int8Weight(plain.codes, plain.absmax, rotation=rotation)
    in_numpy = Int8Weight(plain.codes.numpy(), plain.absmax.numpy(), rotation=rotation)
    for bias in (None, torch.randn(out_features).to(dtype)):
        exact = reference.linear(numpy(x), in_numpy, None if bias is None else numpy(bias), 6.0)
        y = gpu.linear(x, weight, bias, 6.0, "hybrid")  # a rotated weight has only one mode, and no warning
        limit = 1.05 if dtype != torch.float32 else 2  # the sum of few terms varies more than its bound
        assert y.dtype == dtype and error_over_rounding(y, exact) <= limit
    second = "mixed_epilogue" if capability < AMPERE or dtype == torch.float32 else "mixed_matmul"
    paths = ["rotate", "weight_only_matmul"] if tokens <= 16 else ["quantize_activations", second]
    assert emulated.launched == paths * 2


def test_a_rotated_token_does_not_depend_on_the_others(on):
    on()
    plain = layer_of(40, 128)
    weight, x = Int8Weight(plain.codes, plain.absmax, rotation=64), activations_of(40, 128, torch.float16, 3)
    every = gpu.linear(x, weight, None, 0.0)
    x[20:] *= 7
    assert torch.equal(gpu.linear(x, weight, None, 0.0)[:20], every[:20])


@pytest.mark.parametrize("tokens", [0, 16, 17])
def test_linear_takes_the_path_that_m_calls_for(on, tokens):
    emulated = on()
    x, weight = activations_of(tokens, 32, torch.float16, 1) if tokens else torch.zeros(0, 32).half(), layer_of(8, 32)
    y = gpu.linear(x, weight, None, 6.0)
    assert y.shape == (tokens, 8)
    paths = {0: [], 16: ["weight_only_matmul"], 17: ["quantize_activations", "mixed_matmul"]}
    assert emulated.launched == paths[tokens]


def test_inputs_that_start_or_lie_anyhow(on):
    on()
    weight = layer_of(24, 48)
    storage = activations_of(20, 50, torch.float16, 2)
    strided, shifted = storage[:, 2:], torch.cat([torch.zeros(1).half(), storage[:, 2:].flatten()])[1:].view(20, 48)
    plain = gpu.linear(strided.clone(), weight, None, 6.0)
    assert torch.equal(gpu.linear(strided, weight, None, 6.0), plain)
    assert shifted.data_ptr() % 16 and torch.equal(gpu.linear(shifted, weight, None, 6.0), plain)
    codes = torch.cat([torch.zeros(3, dtype=torch.int8), weight.codes.flatten()])[3:].view(24, 48)
    in_a_file = Int8Weight(codes, weight.absmax)
    assert codes.data_ptr() % 16 and torch.equal(gpu.linear(storage[:, 2:], in_a_file, None, 6.0), plain)
    assert torch.equal(gpu.linear(strided[:3], in_a_file, None, 6.0), gpu.linear(strided[:3], weight, None, 6.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
@pytest.mark.parametrize("exact", [0, 2, 5])
def test_static_columns_up_to_two_roundings(on, dtype, tokens, exact):
    """The kernel's result is rounded, and the sum with the product of the outlier columns once more."""
    on()
    weight = layer_of(24, 48)
    columns = torch.tensor([40, 3, 17, 0, 31], dtype=torch.int32)
    stored = weight_of(24, 48, torch.float32, 1).clamp(-2, 2)[:, columns[:exact].long()].half()
    calibrated = Int8Weight(weight.codes, weight.absmax, columns, stored)
    x, bias = activations_of(tokens, 48, dtype, 3), torch.linspace(-1, 1, 24).to(dtype)
    x[:, 17] *= 100
    y = gpu.linear(x, calibrated, bias, 6.0, "static")
    assert y.dtype == dtype and y.shape == (tokens, 24)
    plain = Int8Weight(weight.codes.numpy(), weight.absmax.numpy(), columns.numpy(), stored.numpy())
    expected = reference.linear(numpy(x), plain, numpy(bias), 6.0, "static")
    least = np.linalg.norm(torch.from_numpy(expected).to(dtype).double().numpy() - expected)
    assert np.linalg.norm(y.double().numpy() - expected) <= 2 * least
    assert gpu.linear(x[:0], calibrated, bias, 6.0, "static").shape == (0, 24)


def test_a_mode_without_a_kernel_is_the_nearest_one_and_is_said_once(on):
    on()
    gpu._say.cache_clear()
    weight, x = layer_of(24, 48), activations_of(40, 48, torch.float16, 3)
    columns = torch.tensor([40, 3], dtype=torch.int32)
    calibrated = Int8Weight(weight.codes, weight.absmax, columns, torch.zeros(24, 0).half())
    for layer, mode, nearest, said in (
        (calibrated, "hybrid", "static", "for mode hybrid; using only its stored columns"),
        (weight, "hybrid", "dynamic", "for mode hybrid; using mode dynamic"),
        (weight, "bitsandbytes", "dynamic", "for mode bitsandbytes; using mode dynamic"),
    ):
        with pytest.warns(DeviceWarning, match=f"^a GPU has no kernel {said}; a CPU supports this mode$"):
            found = gpu.linear(x, layer, None, 6.0, mode)
        for _ in range(2):  # a warning would be an error now
            assert torch.equal(found, gpu.linear(x, layer, None, 6.0, mode))
        assert torch.equal(found, gpu.linear(x, layer, None, 6.0, nearest))
