"""The fast CPU path against the reference, and the layer that keeps its weight in that layout."""

import copy
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.model import linear as layers
from quantize8.ops import packed, passes, reference
from quantize8.ops.packed import PackedWeight
from quantize8.ops.reference import Int8Weight

pytestmark = pytest.mark.skipif(
    not packed.available(), reason="the packed layout is used on processors with VNNI only, and this one has none"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = 1.05


def numpy(tensor: torch.Tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weight_of(rows: int, columns: int, seed: int = 0) -> tuple[Int8Weight, PackedWeight]:
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns)).astype(np.float32)
    values[:, ::7] *= 5
    values[rows // 2] = 0
    codes, absmax = reference.quantize_rowwise(values)
    return Int8Weight(codes, absmax), PackedWeight(torch.from_numpy(codes), torch.from_numpy(absmax))


def tokens_of(tokens: int, columns: int, dtype: torch.dtype, outliers: int = 2, seed: int = 0) -> torch.Tensor:
    """Outlier columns that some tokens reach, one exact hit of the threshold, a zero token, ties."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, columns)).astype(np.float32)
    chosen = random.permutation(columns)[:outliers]
    x[:, chosen] *= np.where(random.random((tokens, len(chosen))) < 0.5, 30, 0.1)
    if tokens > 3:
        x[0, 0] = -6.0
        x[1] = 0
        x[2] = random.integers(-11, 12, columns) / 2
    return torch.from_numpy(x).to(dtype)


def assert_within_rounding(y: torch.Tensor, exact: np.ndarray) -> None:
    rounded = torch.from_numpy(exact).to(y.dtype).double().numpy()
    least = np.linalg.norm(rounded - exact) + 1e-6 * np.linalg.norm(exact)
    assert np.linalg.norm(y.double().numpy() - exact) <= ROUNDING * least


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "elementwise"])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17, 18, 70])
def test_linear_equals_the_reference_up_to_rounding(tokens, threshold, mode, dtype):
    ours, theirs = weight_of(45, 131)
    x, bias = tokens_of(tokens, 131, dtype), torch.linspace(-2, 2, 45).to(dtype)
    exact = reference.linear(numpy(x), ours, numpy(bias), threshold, mode)
    y = theirs.linear(x, bias, threshold, mode)
    assert y.dtype == dtype and y.shape == (tokens, 45)
    assert_within_rounding(y, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_marks_equal_the_reference_in_every_bit(dtype):
    x = tokens_of(40, 577, dtype, outliers=9)
    x[5] *= 1e-38  # too small for an inverse in float32
    x[6, 3], x[7, 4] = torch.nan, torch.inf
    values = x.contiguous() if dtype == torch.bfloat16 else x.float()
    bits = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy()
    bits = bits.view(np.uint16 if dtype == torch.bfloat16 else np.uint32)
    for threshold, limit in ((6.0, np.float32(6).view(np.uint32)), (0.0, passes.NOTHING)):
        codes, scale, outliers = reference.quantize_activations(numpy(x), threshold)
        for to_digits, *_ in (passes.FEW, passes.SEVERAL):
            digits, found, marks = np.ones((1, 40, 577), np.int8), np.ones(40, np.float32), np.zeros(577, np.uint8)
            to_digits(bits, limit, digits, found, marks)
            np.testing.assert_array_equal(digits[0], codes)
            np.testing.assert_array_equal(found, scale)
            np.testing.assert_array_equal(marks.astype(bool), outliers.any(0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_decode_keeps_small_features_beside_massive_ones(scale):
    """A feature of 2000 beside ones of 1, as in real models, whose weights are nothing: digits reach that far down."""
    values = np.random.default_rng(1).normal(size=(30, 400)).astype(np.float32)
    values[:, 7] = 0
    codes, absmax = reference.quantize_rowwise(values)
    ours, theirs = Int8Weight(codes, absmax), PackedWeight(torch.from_numpy(codes), torch.from_numpy(absmax))
    for dtype in (torch.bfloat16, torch.float32):
        x = tokens_of(3, 400, torch.float32, outliers=0)
        x[:, 7] = 2000
        x = (x * scale).to(dtype)
        y = theirs.linear(x, None, 6.0, "dynamic")
        assert_within_rounding(y, reference.linear(numpy(x), ours, None, 6.0))


def test_nan_and_infinity_stay_in_their_token():
    _, theirs = weight_of(20, 64)
    for tokens in (4, 20):
        x = tokens_of(tokens, 64, torch.bfloat16, outliers=1)
        clean = theirs.linear(x, None, 6.0, "elementwise")
        x[2, 3], x[3, 9] = torch.nan, torch.inf
        y = theirs.linear(x, None, 6.0, "elementwise")
        assert not y[2].isfinite().any() and not y[3, 1].isfinite()
        assert torch.equal(y[:2], clean[:2]) and torch.equal(y[4:], clean[4:])


def test_elementwise_results_do_not_depend_on_the_neighbours_in_any_bit():
    _, theirs = weight_of(30, 300)
    x = tokens_of(60, 300, torch.bfloat16, outliers=40)
    together = theirs.linear(x, None, 6.0, "elementwise")
    for start in (0, 20, 40):
        assert torch.equal(theirs.linear(x[start : start + 20], None, 6.0, "elementwise"), together[start : start + 20])


def test_many_tokens_go_in_parts(monkeypatch):
    _, theirs = weight_of(33, 96)
    x = tokens_of(100, 96, torch.bfloat16, outliers=5)
    whole = theirs.linear(x, None, 6.0, "dynamic")
    monkeypatch.setattr(packed, "_SUMS_BYTES", 0)
    monkeypatch.setattr(packed, "_LEAST_ROWS", 30)
    assert torch.equal(theirs.linear(x, None, 6.0, "dynamic"), whole)


def test_outlier_columns_are_kept_replaced_and_never_mixed_up():
    ours, theirs = weight_of(24, 200)
    for seed in range(
        12
    ):  # 16 columns are kept: some calls add to them, some start anew, some need more than there are
        x = tokens_of(20, 200, torch.float32, outliers=(1, 5, 9, 40)[seed % 4], seed=seed)
        assert_within_rounding(theirs.linear(x, None, 6.0, "dynamic"), reference.linear(x.numpy(), ours, None, 6.0))
    assert len(theirs._places) <= 16


def test_threads_may_share_a_weight():
    ours, theirs = weight_of(24, 200)
    inputs = [tokens_of(18, 200, torch.float32, outliers=8, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: theirs.linear(x, None, 6.0, "dynamic"), inputs))
    for x, y in zip(inputs, found, strict=True):
        assert_within_rounding(y, reference.linear(x.numpy(), ours, None, 6.0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (192, 576), (576, 192), (577, 100)])
def test_codes_come_back_as_they_were(shape):
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    assert torch.equal(PackedWeight(codes, torch.ones(shape[0])).codes(), codes)


def test_a_processor_with_inexact_sums_is_not_used(monkeypatch):
    multiply = PackedWeight._multiply
    monkeypatch.setattr(PackedWeight, "_multiply", lambda self, codes: np.clip(multiply(self, codes), -32768, 32767))
    assert packed.available.__wrapped__() is False


@pytest.fixture
def layer() -> Int8Linear:
    torch.manual_seed(0)
    made = Int8Linear.from_float(nn.Linear(40, 24))
    with torch.no_grad():
        made(torch.randn(3, 40))
    assert made._packed is not None and made.weight.untyped_storage().nbytes() == 1
    return made


def test_a_packed_layer_keeps_one_copy_and_loses_nothing(layer):
    codes = layer.codes()
    assert layer.weight.shape == (24, 40) and layer.weight.dtype == torch.int8 and codes.unique().numel() > 50
    np.testing.assert_array_equal(layer.dequantize(), codes.float() * (layer.SCB / 127)[:, None])
    assert torch.equal(layer.state_dict()["weight"], codes)
    assert torch.equal(copy.deepcopy(layer).codes(), codes)
    assert torch.equal(layer.to(torch.bfloat16).weight, codes) and layer._packed is None


def test_a_packed_layer_takes_new_weights(layer):
    other = Int8Linear.from_float(nn.Linear(40, 24))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(5, 40)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))


def test_training_unpacks_and_both_ways_agree(layer):
    x = torch.randn(20, 40)
    with torch.no_grad():
        packed_result = layer(x)
    trained = layer(x.requires_grad_())
    assert layer._packed is None and trained.requires_grad
    torch.testing.assert_close(packed_result, trained.detach(), rtol=1e-5, atol=1e-5)


def test_without_vnni_the_plain_path_serves(monkeypatch):
    monkeypatch.setattr(layers, "available", lambda: False)
    layer = Int8Linear.from_float(nn.Linear(40, 24))
    with torch.no_grad():
        layer(torch.randn(3, 40))
    assert layer._packed is None
