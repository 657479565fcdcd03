"""The fast CPU path against the reference, and the layer that stores its weight in that layout."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.kernels import cpu, packed, reference
from quantize8.kernels.packed import PackedWeight
from quantize8.kernels.reference import Int8Weight

UNITS = cpu.available()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = 1.05


def numpy(tensor: torch.Tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weight_of(rows: int, columns: int, unit: cpu.Unit | None = None, seed: int = 0) -> tuple[Int8Weight, PackedWeight]:
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, columns)).astype(np.float32)
    values[:, ::7] *= 5
    values[rows // 2] = 0
    codes, absmax = reference.quantize_rowwise(values)
    return Int8Weight(codes, absmax), PackedWeight(torch.from_numpy(codes), torch.from_numpy(absmax), unit)


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


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 6, 11, 16, 17, 18, 32, 33, 70])
@pytest.mark.parametrize(("mode", "threshold"), [("dynamic", 6.0), ("dynamic", 0.0)])
def test_linear_equals_the_reference_up_to_rounding(unit, tokens, mode, threshold, dtype):
    for rows, columns in ((45, 131), (1, 1), (64, 128), (33, 63)):
        ours, theirs = weight_of(rows, columns, unit)
        x, bias = tokens_of(tokens, columns, dtype), torch.linspace(-2, 2, rows).to(dtype)
        exact = reference.linear(numpy(x), ours, numpy(bias), threshold, mode)
        y = theirs.linear(x, bias, threshold, mode)
        assert y.dtype == dtype and y.shape == (tokens, rows)
        assert_within_rounding(y, exact)


@pytest.mark.parametrize("unit", UNITS)
def test_sums_are_exact_at_the_largest_columns_and_values(unit):
    """Every product at its limit."""
    columns = cpu.LARGEST_K
    codes = torch.full((33, columns), -127, dtype=torch.int8)
    codes[1::2] = 127
    x = torch.full((40, columns), 3.0)
    y = PackedWeight(codes, torch.full((33,), 127.0), unit).linear(x, None, 0.0, "dynamic")
    np.testing.assert_allclose(y[:, 0], -3.0 * 127 * columns, rtol=1e-6)
    np.testing.assert_allclose(y[:, 1], 3.0 * 127 * columns, rtol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_marks_equal_the_reference_in_every_bit(dtype, unit):
    x = tokens_of(40, 577, dtype, outliers=9)
    x[5] *= 1e-38  # too small for an inverse in float32
    x[6, 3], x[7, 4] = torch.nan, torch.inf
    _, ours = weight_of(3, 577, unit)
    for threshold in (6.0, 0.0):
        codes, scale, outliers = reference.quantize_activations(numpy(x), threshold)
        low, high, found, columns = ours.encode(x, threshold, "dynamic")
        np.testing.assert_array_equal(low, codes)
        np.testing.assert_array_equal(found, scale)
        np.testing.assert_array_equal(columns, outliers.any(0))
        assert not high.any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_each_prefill_result_is_that_of_the_references_codes(threshold, unit):
    """Element by element, so that a single code off by a step shows; inputs with few bits cause many ties."""
    ours, theirs = weight_of(45, 131, unit)
    for seed in range(10):
        x = tokens_of(40, 131, torch.bfloat16, seed=seed).float()
        exact = reference.linear(x.numpy(), ours, None, threshold)
        codes, scale, _ = reference.quantize_activations(x.numpy(), threshold)
        sums = (np.abs(codes.astype(float)) @ np.abs(ours.codes.T.astype(float))) * scale[:, None] * ours.absmax / 127
        sums += np.abs(x.numpy()) @ np.abs(reference.dequantize(ours.codes, ours.absmax)).T
        y = theirs.linear(x, None, threshold, "dynamic").double().numpy()
        assert (np.abs(y - exact) <= 1e-6 * sums).all(), seed


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_decode_keeps_small_features_beside_massive_ones(scale):
    """A feature of 2000 with zero weights beside ones of 1, as in real models: the digits resolve the small ones."""
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


@pytest.mark.parametrize("unit", UNITS)
def test_nan_and_infinity_stay_in_their_token(unit):
    _, theirs = weight_of(20, 64, unit)
    for tokens in (4, 20):
        x = tokens_of(tokens, 64, torch.bfloat16, outliers=1)
        clean = theirs.linear(x, None, 0.0, "dynamic")
        x[2, 3], x[3, 9] = torch.nan, torch.inf
        y = theirs.linear(x, None, 0.0, "dynamic")
        assert not y[2].isfinite().any() and not y[3, 1].isfinite()
        assert torch.equal(y[:2], clean[:2]) and torch.equal(y[4:], clean[4:])


@pytest.mark.parametrize("unit", UNITS)
def test_results_without_outliers_do_not_depend_on_the_neighbours_in_any_bit(unit):
    _, theirs = weight_of(30, 300, unit)
    x = tokens_of(60, 300, torch.bfloat16, outliers=40)
    together = theirs.linear(x, None, 0.0, "dynamic")
    for start in (0, 20, 40):
        assert torch.equal(theirs.linear(x[start : start + 20], None, 0.0, "dynamic"), together[start : start + 20])


@pytest.mark.parametrize("unit", UNITS)
def test_parts_threads_and_outlier_columns_of_any_number_change_nothing(unit, monkeypatch):
    """6000 tokens have more codes than the cache holds, so that the weight is taken in larger parts."""
    ours, theirs = weight_of(400, 200, unit)
    for outliers in (0, 1, 7, 150):
        x = tokens_of(100, 200, torch.float32, outliers)
        whole = theirs.linear(x, None, 6.0, "dynamic")
        assert_within_rounding(whole, reference.linear(x.numpy(), ours, None, 6.0))
        few = theirs.linear(x[:9], None, 6.0, "dynamic")
        many = theirs.linear(x.repeat(60, 1), None, 6.0, "dynamic")
        assert torch.equal(many[:100], whole) and torch.equal(many[5900:], whole)
        with monkeypatch.context() as patch:
            for threads in (1, 3, 16):
                patch.setattr(packed, "_threads", lambda threads=threads: threads)
                assert torch.equal(theirs.linear(x, None, 6.0, "dynamic"), whole)
                assert torch.equal(theirs.linear(x[:9], None, 6.0, "dynamic"), few)


def test_our_own_pool_of_threads_computes_the_same(tmp_path):
    """For systems where torch has no OpenMP runtime (macOS, Windows); also after a fork, and from several threads."""
    script = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch
from quantize8.kernels import packed, cpu
cpu.share_threads = lambda loaded: None
weight = packed.PackedWeight(torch.randint(-127, 128, (400, 200), dtype=torch.int8), torch.rand(400))
x = torch.randn(300, 200)
packed._threads = lambda: 1
alone = [weight.linear(x[:count], None, 6.0, "dynamic") for count in (5, 300)]
packed._threads = lambda: 4

def same(_):
    found = [weight.linear(x[:count], None, 6.0, "dynamic") for count in (5, 300)]
    return all(map(torch.equal, found, alone))

with ThreadPoolExecutor(3) as pool:
    assert all(pool.map(same, range(60)))
expected = alone[1].numpy()
if os.fork() == 0:  # where torch's own threads are gone, too, so that it compares nothing
    os._exit(0 if (weight.linear(x, None, 6.0, "dynamic").numpy() == expected).all() else 1)
assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("unit", UNITS)
def test_units_share_one_layout_so_that_a_saved_graph_may_move(unit):
    ours, other = weight_of(40, 100, unit)[1], weight_of(40, 100, UNITS[0])[1]
    assert all(map(torch.equal, ours.parts, other.parts))


def test_prefill_has_the_same_bits_on_every_unit():
    """Sums are exact, and the rest has one definition on processors with fused multiply-add."""
    x, bias = tokens_of(40, 300, torch.bfloat16, outliers=5), torch.linspace(-2, 2, 70)
    found = [weight_of(70, 300, unit)[1].linear(x, bias, 6.0, "dynamic") for unit in UNITS if unit != "generic"]
    assert all(torch.equal(each, found[0]) for each in found)


def test_torch_finds_its_own_tiles_as_it_left_them():
    """torch's bfloat16 products may use AMX, too, on the same threads."""
    _, ours = weight_of(64, 128)
    x, weight = torch.randn(70, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    expected = nn.functional.linear(x, weight)
    small = nn.functional.linear(x[:5], weight)
    for tokens in (1, 20, 70) * 5:
        ours.linear(torch.randn(tokens, 128), None, 6.0, "dynamic")
        assert torch.equal(nn.functional.linear(x, weight), expected)
        assert torch.equal(nn.functional.linear(x[:5], weight), small)


def test_as_many_threads_as_torch_is_told():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert packed._threads() == 1
    finally:
        torch.set_num_threads(threads)


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
    for unit in UNITS:
        assert torch.equal(PackedWeight(codes, torch.ones(shape[0]), unit).codes(), codes)


@pytest.fixture
def layer() -> Int8Linear:
    torch.manual_seed(0)
    made = Int8Linear.from_float(nn.Linear(40, 24))
    with torch.no_grad():
        made(torch.randn(3, 40))
    assert made._packed is not None and made._parameters["weight"].untyped_storage().nbytes() == 1
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
    assert torch.equal(packed_result, trained.detach())
