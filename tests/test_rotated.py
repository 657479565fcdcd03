"""Rotated layers: the codes and the input are rotated by blocks of a Hadamard matrix, and there are no outliers."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.errors import WeightError
from quantize8.kernels import cpu, packed, reference
from quantize8.kernels.operator import linear, packed_linear, rotate
from quantize8.kernels.packed import PackedWeight
from quantize8.kernels.reference import Int8Weight

UNITS = cpu.available()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(45, 48, 16), (1, 16, 16), (33, 80, 16), (70, 576, 64), (31, 192, 64), (64, 256, 256), (33, 768, 256)]
ROUNDING = 1.05
SMALL = 1e-38  # times a token: too small for an inverse in float32


def numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weights_of(rows: int, columns: int, size: int, unit: cpu.Unit | None = None) -> tuple[Int8Weight, PackedWeight]:
    """The same weight for the reference and for a unit, with heavy columns and a zero row."""
    values = np.random.default_rng(rows).standard_t(3, (rows, columns)).astype(np.float32)
    values[:, ::7] *= 5
    values[rows // 2] = 0
    codes, absmax = reference.quantize_rowwise(reference.rotate(values, size))
    theirs = PackedWeight(torch.from_numpy(codes), torch.from_numpy(absmax), unit, rotation=size)
    return Int8Weight(codes, absmax, rotation=size), theirs


def tokens_of(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Massive outliers, a zero token, ties, a tiny and a subnormal token."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, columns)).astype(np.float32)
    x[:, random.permutation(columns)[:3]] *= 300
    if tokens > 5:
        x[1] = 0
        x[2] = random.integers(-11, 12, columns) / 2
        x[3] *= SMALL
        x[4] = np.ldexp(random.integers(-9, 10, columns).astype(np.float32), -149)
    return torch.from_numpy(x).to(dtype)


def assert_within_rounding(y: torch.Tensor, exact: np.ndarray) -> None:
    rounded = torch.from_numpy(exact).to(y.dtype).double().numpy()
    least = np.linalg.norm(rounded - exact) + 1e-6 * np.linalg.norm(exact)
    assert np.linalg.norm(y.double().numpy() - exact) <= ROUNDING * least


def layer(rows: int = 45, columns: int = 192, bias: bool = True, rotation: int = 64) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear.from_float(nn.Linear(columns, rows, bias), rotation=rotation)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40])
def test_a_product_equals_the_reference_up_to_rounding_in_every_mode(tokens, dtype, unit):
    for rows, columns, size in SHAPES:
        ours, theirs = weights_of(rows, columns, size, unit)
        x, bias = tokens_of(tokens, columns, dtype), torch.linspace(-2, 2, rows).to(dtype)
        exact = reference.linear(numpy(x), ours, numpy(bias), 0.0)
        assert np.array_equal(exact, reference.linear(numpy(x), ours, numpy(bias), 6.0, "hybrid"))
        y = theirs.linear(x, bias, 0.0, "dynamic")
        assert y.dtype == dtype and y.shape == (tokens, rows)
        assert_within_rounding(y, exact)
        for mode, threshold in (("dynamic", 6.0), ("static", 6.0), ("hybrid", 6.0), ("bitsandbytes", 6.0)):
            assert torch.equal(theirs.linear(x, bias, threshold, mode), y), mode


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_codes_and_scales_equal_the_reference_in_every_bit(rows, columns, size, dtype, unit, monkeypatch):
    x = tokens_of(40, columns, dtype)
    x[6, 3], x[7, 4] = torch.nan, torch.inf
    x[8, 1], x[8, 2], x[9, 5], x[9, 9] = torch.inf, torch.inf, torch.inf, -torch.inf
    codes, scale, outliers = reference.quantize_activations(numpy(x), 6.0, rotation=size)
    assert not outliers.any() and np.isnan(scale[[6, 8, 9]]).all() and np.isinf(scale[7]) and not codes[6:10].any()
    low, high, found, columns_found = weights_of(rows, columns, size, unit)[1].encode(x, 6.0, "dynamic")
    np.testing.assert_array_equal(low, codes)
    np.testing.assert_array_equal(found, scale)
    assert not high.any() and not columns_found.any()
    monkeypatch.setattr(cpu, "chosen", lambda: unit)
    codes_alone, scale_alone = cpu.quantize_activations(x, 6.0, size)
    assert torch.equal(codes_alone, low)
    np.testing.assert_array_equal(scale_alone, scale)


@pytest.mark.parametrize("unit", UNITS)
def test_a_result_depends_on_no_other_token_and_not_on_threads(unit, monkeypatch):
    _, theirs = weights_of(400, 192, 64, unit)
    x = tokens_of(100, 192, torch.bfloat16)
    together, few = theirs.linear(x, None, 0.0, "dynamic"), theirs.linear(x[:9], None, 0.0, "dynamic")
    for start in (0, 20, 60):
        part = theirs.linear(x[start : start + 20], None, 0.0, "dynamic")
        assert torch.equal(part.nan_to_num(), together[start : start + 20].nan_to_num())
    for threads in (1, 2, 16):
        monkeypatch.setattr(packed, "_threads", lambda threads=threads: threads)
        assert torch.equal(theirs.linear(x, None, 0.0, "dynamic"), together)
        assert torch.equal(theirs.linear(x[:9], None, 0.0, "dynamic"), few)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("tokens", [4, 20])
def test_nan_infinity_and_sums_beyond_float32_stay_in_their_token(tokens, unit):
    ours, theirs = weights_of(20, 64, 16, unit)
    x = torch.randn(tokens, 64)
    clean = theirs.linear(x, None, 0.0, "dynamic")
    x[1, 3], x[2, 9], x[3, :16] = torch.nan, torch.inf, 3e38
    y = theirs.linear(x, None, 0.0, "dynamic")
    filled = torch.arange(20) != 10  # the row of zeros
    assert y[1].isnan().all() and not y[2:4, filled].isfinite().any()
    assert torch.equal(y[:1], clean[:1]) and torch.equal(y[4:], clean[4:])
    with np.errstate(all="ignore"):
        assert np.isnan(reference.linear(x.numpy(), ours, None, 0.0)[1]).all()


def test_outliers_cost_less_accuracy_than_without_a_rotation():
    """Plain int8 loses the small features beside a massive one; a rotation spreads it over 256 of them."""
    torch.manual_seed(0)
    source, x = nn.Linear(512, 64, False), torch.randn(64, 512)
    x[:, 7] = 100
    errors = []
    for rotation in (0, 16, 64, 256):
        made = Int8Linear.from_float(source, threshold=0.0, rotation=rotation)
        made.mode = "dynamic"
        exact = x.double() @ made.dequantize().double().t()  # so that the weight's own error is not counted
        with torch.no_grad():
            errors.append(float((made(x) - exact).norm()))
    assert errors[0] > 2 * errors[1] > 2 * errors[2] > 2 * errors[3] and errors[0] > 5 * errors[3]


@pytest.mark.parametrize("size", [8, 100, 128, 512, 256, -16])
def test_a_size_that_does_not_fit_is_refused_in_one_line(size):
    codes, absmax = torch.zeros(4, 192, dtype=torch.int8), torch.ones(4)
    message = f"^a rotation in blocks of {size}: must be one of 256, 64, 16 and divide 192 input features$"
    for call in (
        lambda: PackedWeight(codes, absmax, rotation=size),
        lambda: Int8Weight(codes, absmax, rotation=size),
        lambda: rotate(torch.ones(2, 192), size),
        lambda: cpu.quantize_activations(torch.ones(2, 192), 0.0, size),
        lambda: layer(rotation=size),
    ):
        with pytest.raises(WeightError, match=message):
            call()


def test_outlier_columns_beside_a_rotation_are_refused():
    made = layer()
    made.outlier_columns, made.outlier_weight = torch.tensor([3], dtype=torch.int32), torch.zeros(45, 1).half()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(WeightError, match="both a rotation and outlier columns"):
            made(torch.randn(3, 192, requires_grad=grad))
    with pytest.raises(WeightError, match="a rotated weight cannot have outlier columns"):
        Int8Weight(made.codes(), made.SCB, made.outlier_columns, made.outlier_weight, 64)


@pytest.mark.parametrize("mode", [None, "dynamic", "bitsandbytes", "hybrid", "static"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_mode_of_a_rotated_layer_is_the_same(tokens, mode):
    made, x = layer(), tokens_of(tokens, 192, torch.float32)
    expected = reference.linear(x.numpy(), _reference_of(made), made.bias.numpy(), 0.0)
    made.mode = mode
    assert made.mode == "dynamic" and made.chosen_mode == mode
    assert_within_rounding(made(x), expected)
    assert "rotation=64" in repr(made) and "mode" not in repr(made) and "rotation" not in repr(layer(rotation=0))


def _reference_of(made: Int8Linear) -> Int8Weight:
    return Int8Weight(made.codes().numpy(), made.SCB.detach().numpy(), rotation=made.rotation)


def test_dequantize_rotates_back():
    torch.manual_seed(0)
    source = nn.Linear(192, 45)
    made = Int8Linear.from_float(source, rotation=64)
    error = (made.dequantize() - source.weight).norm() / source.weight.norm()
    assert error < 0.01 and made.dequantize().dtype == torch.float32
    made(torch.randn(3, 192))
    rotated = reference.dequantize(made.codes().numpy(), made.SCB.detach().numpy())
    np.testing.assert_array_equal(made.dequantize(), reference.rotate(rotated, 64))


def test_the_rotation_survives_copies_and_casts():
    made, x = layer(), torch.randn(20, 192)
    expected = made(x)
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), layer().half().float()):
        assert other.rotation == 64
        torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    made.rotation = 16  # another basis, so another result: it is not packed for the old one any more
    assert not torch.allclose(made(x), expected, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
def test_sequences_of_a_batch_do_not_depend_on_it(tokens):
    made, x = layer(), torch.randn(9, tokens, 192)
    together = made(x)
    assert all(torch.equal(made(x[i : i + 1]), together[i : i + 1]) for i in range(9))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_input_is_rotated_back(tokens, dtype):
    made = layer()
    made.bias.requires_grad_()
    x = torch.randn(tokens, 192).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, 45).to(dtype)
    made(x).backward(upstream)
    exact = upstream.double() @ made.dequantize().double()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(x.grad.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made.bias.grad, upstream.float().sum(0))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_the_operators_keep_the_rules_of_torch(tokens, gradient):
    made, x = layer(), torch.randn(tokens, 192, requires_grad=gradient)
    torch.library.opcheck(rotate, (x, 64))
    torch.library.opcheck(
        linear, (x, made.codes(), made.SCB.data, made.bias.data, 6.0, "bitsandbytes", None, None, made.rotation)
    )
    torch.library.opcheck(packed_linear, (x.detach(), made.pack().parts, made.bias, 45, 6.0, "dynamic", 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_rotates_as_the_reference_and_so_does_its_gradient(dtype):
    values = tokens_of(7, 192, dtype).requires_grad_()
    rotated = rotate(values, 64)
    np.testing.assert_array_equal(rotated.detach(), reference.rotate(numpy(values.detach()).astype(np.float32), 64))
    upstream = torch.randn(7, 192)
    rotated.backward(upstream)
    assert torch.equal(values.grad, torch.from_numpy(reference.rotate(upstream.numpy(), 64)).to(dtype))


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_graph_without_breaks_gives_the_same(tokens):
    torch.compiler.reset()  # the layers of other tests count, too, towards the limit of versions of one function
    made, x = layer(), torch.randn(2, tokens, 192)
    with torch.no_grad():
        expected = made(x)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=False)
        assert torch.equal(compiled(x), expected) and made._packed is not None
    training, x = layer(), x.requires_grad_()
    compiled = torch.compile(training, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(x).sum().backward()
    exact = training.dequantize().sum(0).expand(x.shape)
    torch.testing.assert_close(x.grad, exact, rtol=1e-4, atol=1e-5)
