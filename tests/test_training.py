"""Trainable layers: gradients against float64, when a weight is quantized, gradients of adapters, copies."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.kernels import reference
from quantize8.runtime import training
from quantize8.runtime.training import TrainableInt8Linear, weight_gradient

N, K = 24, 33
THRESHOLD = 6.0
MODES = reference.MODES
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def hostile(rows: int, columns: int, seed: int) -> torch.Tensor:
    """float32 with a zero row, a row of ties, rows of very different size, and outliers in two columns."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-3, 0, rows)[:, None]
    if rows > 3:
        values[0] = 0
        values[1] = torch.arange(columns) / 2 / 127
        values[1, 0] = 1
        values[2, columns // 2] = 20
        values[3, 4] = -6.0
    return values


def layer_of(dtype=torch.float32, bias=True, mode="dynamic", threshold=THRESHOLD) -> TrainableInt8Linear:
    layer = TrainableInt8Linear(K, N, bias, threshold, mode, dtype=dtype)
    layer.weight.data = hostile(N, K, 1).to(dtype)
    return layer


def quantized(layer) -> torch.Tensor:
    """The weight that the reference's codes represent, float64 [N, K]."""
    codes, absmax = reference.quantize_rowwise(layer.weight.detach().float().numpy())
    return torch.from_numpy(codes.astype(np.float64) * absmax.astype(np.float64)[:, None] / 127)


def step_of(values: torch.Tensor) -> torch.Tensor:
    """float64: the distance of two codes, for each column of [M, C]."""
    return values.abs().amax(0) / 127 if len(values) else values.new_zeros(values.shape[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 17, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_quantized_weight(mode, dtype, tokens, bias):
    layer = layer_of(dtype, bias, mode)
    x = hostile(tokens, K, 2).to(dtype).requires_grad_()
    upstream = hostile(tokens, N, 3).to(dtype)
    y = layer(x)
    y.backward(upstream)
    exact, weight, gradient = x.detach().double(), quantized(layer), upstream.double()
    eps = torch.finfo(dtype).eps  # the rounding of the result; before it, sums of at most K products in float32
    expected = gradient @ weight
    slack = K * 2**-23 * (gradient.abs() @ weight.abs()) + 2**-24  # the last: float16's smallest step
    assert ((x.grad.double() - expected).abs() <= eps * expected.abs() + slack).all()
    if bias:
        expected = gradient.sum(0)
        slack = tokens * 2**-23 * gradient.abs().sum(0)
        assert ((layer.bias.grad.double() - expected).abs() <= eps * expected.abs() + slack).all()
    expected = gradient.t() @ exact
    wrong = int8_error(gradient, exact) + eps * expected.abs() + 2**-24
    outliers = (exact.abs() >= THRESHOLD).any(0)
    wrong[:, outliers] = (eps * expected.abs() + 64 * 2**-23 * (gradient.t().abs() @ exact.abs()) + 2**-24)[:, outliers]
    assert ((layer.weight.grad.double() - expected).abs() <= wrong).all()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype


def int8_error(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How far sum_m g x may be from that of the codes: each factor is off by at most half a step, s or t.

    |g x - g' x'| <= |g - g'| |x| + |g'| |x - x'| <= s/2 |x| + (|g| + s/2) t/2, summed over the tokens; and float32.
    """
    s, t = step_of(gradient)[:, None] / 2, step_of(x) / 2
    sums = gradient.abs().sum(0)[:, None] + len(x) * s
    return (s * x.abs().sum(0) + sums * t) * (1 + 2**-18)


@pytest.mark.parametrize("threshold", [THRESHOLD, 0.0])
def test_weight_gradient_is_the_product_of_the_codes(threshold):
    gradient, x = hostile(40, N, 3), hostile(40, K, 2)
    got = weight_gradient(gradient, x, threshold)
    left, left_scale, _ = reference.quantize_activations(gradient.t().numpy(), 0)
    right, right_scale, _ = reference.quantize_activations(x.t().numpy(), 0)
    expected = left.astype(np.float64) @ right.T.astype(np.float64) * left_scale[:, None] * right_scale.astype(float)
    outliers = (x.abs() >= threshold).any(0).numpy() & (threshold > 0)
    assert outliers.sum() == (2 if threshold else 0)
    expected[:, outliers] = (gradient.double().t() @ x.double()).numpy()[:, outliers]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-7)  # float32 scales and sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [3, 40])
def test_forward_is_that_of_the_frozen_int8_layer(mode, tokens):
    layer = layer_of(mode=mode)
    frozen = Int8Linear.from_float(layer, THRESHOLD)
    frozen.mode = mode
    x = hostile(tokens, K, 2).requires_grad_()  # so that neither takes the packed path, which sums in another order
    assert torch.equal(layer(x), frozen(x))


@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_any_layout(mode):
    layer = layer_of(mode=mode)
    x = hostile(K, 40, 2).t()[::2].requires_grad_()
    plain = x.detach().contiguous().requires_grad_()
    gradients = []
    for each in (x, plain):
        y = layer(each.view(4, 5, K) if each is plain else each.unflatten(0, (4, 5)))
        assert y.shape == (4, 5, N)
        y.sum(-1).t().square().sum().backward()  # whose gradient is expanded, not contiguous
        gradients.append((each.grad, layer.weight.grad))
        layer.weight.grad = None
    (left, right), (other, another) = gradients
    assert torch.equal(left, other) and torch.equal(right, another)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [5, 40])
def test_nan_reaches_what_depends_on_it_and_nothing_else(mode, tokens):
    layer = layer_of(mode=mode)
    x, upstream = torch.randn(tokens, K), torch.randn(tokens, N)
    x[3, 7] = upstream[2, 5] = float("nan")
    x.requires_grad_()
    y = layer(x)
    y.backward(upstream)
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1
    assert x.grad[2].isnan().all() and x.grad.isnan().any(1).sum() == 1
    wrong = layer.weight.grad.isnan()
    assert wrong[5].all() and wrong[:, 7].all() and wrong.sum() == N + K - 1
    assert layer.bias.grad.isnan().nonzero().tolist() == [[5]]


def test_a_weight_that_is_nan_gives_nan():
    layer = layer_of()
    layer.weight.data[6, 3] = float("nan")
    assert layer(torch.randn(20, K))[:, 6].isnan().all()


@pytest.fixture
def calls(monkeypatch) -> list:
    """A list that grows by one each time a weight is quantized."""
    found = []

    def counted(weight):
        found.append(weight)
        return quantize(weight)

    quantize = training.quantize
    monkeypatch.setattr(training, "quantize", counted)
    return found


def optimizer_step(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight], 0.1).step()


def assign(layer):
    layer.weight.data = layer.weight.data * 2


def assign_twice(layer):
    parameter = layer._parameters["weight"]
    for factor in (2, 3):  # the second may get the memory of the one that was quantized
        parameter.data = parameter.data * factor


def add_through_data(layer):
    layer.weight.data += 1  # as PEFT merges


def load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


CHANGES = [
    optimizer_step,
    assign,
    assign_twice,
    add_through_data,
    load,
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: nn.init.ones_(layer.weight),
]


@pytest.mark.parametrize("change", CHANGES)
def test_without_gradients_a_weight_is_quantized_when_it_has_changed_and_only_then(change, calls):
    layer, x = layer_of().eval(), torch.randn(20, K)
    with torch.no_grad():
        layer(x), layer(x)
    assert len(calls) == 1
    change(layer)
    before = quantized(layer)
    with torch.no_grad():
        y = layer(x)
        assert len(calls) == 2 and torch.equal(y, layer(x))
        assert len(calls) == 2
    codes, absmax = layer.codes()
    assert torch.equal(codes.double() * absmax.double()[:, None] / 127, before)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_training_sees_what_optimizers_change_without_a_trace(name, calls):
    """bitsandbytes' optimizers write to the weight's memory without changing its version."""
    import bitsandbytes.optim

    layer, x = layer_of(), torch.randn(20, K)
    optimizer = getattr(bitsandbytes.optim, name)(layer.parameters(), lr=0.1)
    version = layer.weight._version
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    assert layer.weight._version == version
    y = layer(x)
    assert len(calls) == 3
    assert torch.equal(y, Int8Linear.from_float(layer)(x.clone().requires_grad_()))
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_a_frozen_weight_is_quantized_once_while_adapters_train(calls):
    layer = layer_of().requires_grad_(False)
    for _ in range(3):
        layer(torch.randn(20, K, requires_grad=True)).sum().backward()
    assert len(calls) == 1


def test_gradients_accumulate():
    layer, x = layer_of(), hostile(40, K, 2)
    parts = []
    for rows in (x[:20], x[20:]):
        layer(rows).square().sum().backward()
        parts.append(layer.weight.grad.clone())
    layer.weight.grad = None
    layer(x[20:]).square().sum().backward()
    torch.testing.assert_close(parts[1], parts[0] + layer.weight.grad)


def test_copies_and_pickles_train_on_their_own():
    layer, x = layer_of(), torch.randn(20, K)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        optimizer_step(other)
        assert not torch.equal(other(x), expected) and torch.equal(layer(x), expected)


def test_a_layer_for_a_conv1d_has_the_weight_of_one_in_its_state():
    layer = layer_of()
    layer.transposed = True
    state = layer.state_dict()
    assert state["weight"].shape == (K, N) and state["weight"].is_contiguous()
    other = TrainableInt8Linear(K, N)
    other.transposed = True
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [3, 40])
def test_autocast_changes_nothing(mode, tokens):
    """An int8 product in 16 bits would lose the low bits of the sums; nor may autocast change the output's dtype."""
    layer, x = layer_of(mode=mode), hostile(tokens, K, 2).requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("make", [lambda layer: layer.requires_grad_(False), Int8Linear.from_float])
def test_what_ran_in_inference_mode_trains(make):
    layer, x = make(layer_of()), torch.randn(20, K)
    with torch.inference_mode():
        layer(x)
        copy.deepcopy(layer)  # unpacks
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, quantized(layer_of()).sum(0).float().expand_as(x))
