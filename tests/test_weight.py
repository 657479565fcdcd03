"""The weight object of an int8 layer: can be inspected, moved, copied and saved, but never mistaken for floats."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantize8 import Int8Linear, WeightError
from quantize8.runtime import linear
from quantize8.runtime.weight import Int8Weight

N, K = 24, 33


@pytest.fixture(params=["packed", "unpacked"])
def layer(request):
    torch.manual_seed(0)
    made = Int8Linear.from_float(nn.Linear(K, N))
    if request.param == "packed":
        made.pack()
    return made


def is_packed(layer):
    return layer._packed is not None


def test_what_a_weight_is_can_be_asked_without_unpacking(layer):
    before = is_packed(layer)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight.data, Int8Weight)
    assert (weight.dtype, weight.device.type, weight.shape, weight.ndim) == (torch.int8, "cpu", (N, K), 2)
    assert (weight.numel(), weight.element_size(), weight.size(0), len(weight), weight.dim()) == (N * K, 1, N, N, 2)
    assert not (weight.requires_grad or weight.is_meta or weight.is_floating_point()) and weight.grad is None
    assert torch.zeros_like(weight, dtype=torch.float32).shape == (N, K)
    assert is_packed(layer) == before


def test_codes_are_moved_copied_and_compared(layer):
    codes = layer.codes()
    for made in (layer.weight.clone(), layer.weight.data, layer.weight.to("cpu"), copy.deepcopy(layer.weight)):
        assert isinstance(made, Int8Weight) and torch.equal(made, codes)
    assert torch.equal(layer.weight.t(), codes.t()) and torch.equal(layer.weight[3:5], codes[3:5])
    assert (layer.weight == codes).all() and layer.weight.numpy().tolist() == codes.tolist()
    assert "dtype=torch.int8" in repr(layer.weight)
    torch.save(layer.weight, file := io.BytesIO())
    file.seek(0)
    for made in (torch.load(file), pickle.loads(pickle.dumps(layer.weight)), nn.Parameter(layer.weight, False)):
        assert torch.equal(made, codes)


COMPUTING = {
    "added to": lambda w: w.data.add_(torch.ones(N, K)),
    "subtracted from": lambda w: exec("w.data -= d", {"w": w, "d": torch.ones(N, K)}),
    "a sum": lambda w: w.data.clone() + torch.ones(N, K),
    "a scaled weight": lambda w: w * 0.5,
    "a product": lambda w: F.linear(torch.ones(2, K), w),
    "a matrix product": lambda w: torch.mm(torch.ones(2, N), w.data),
    "float": lambda w: w.float(),
    "to": lambda w: w.t().to(torch.float16),
    "to by name": lambda w: w.to(dtype=torch.bfloat16),
    "a norm": lambda w: torch.linalg.norm(w),
    "a copy into it": lambda w: w.data.copy_(torch.ones(N, K)),
    "a copy of it": lambda w: torch.ones(N, K).copy_(w),
    "a concatenation": lambda w: torch.cat([torch.ones(1, K), w]),
    "data": lambda w: setattr(w, "data", torch.ones(N, K)),
}


@pytest.mark.parametrize("what", COMPUTING)
def test_codes_are_not_taken_for_floating_point(what, layer):
    before = layer.codes().clone()
    with pytest.raises(
        WeightError, match=r"Int8Linear weight \[.*\]: holds int8 codes, but .* treats them as floating"
    ):
        COMPUTING[what](layer.weight)
    assert torch.equal(layer.codes(), before)


def test_new_codes_reach_the_layer(layer):
    codes = (layer.codes() // 2).contiguous()
    x = torch.randn(20, K)
    for assign in (
        lambda: setattr(layer, "weight", nn.Parameter(codes.clone(), requires_grad=False)),
        lambda: setattr(layer.weight, "data", codes.clone()),
        lambda: layer.weight.data.copy_(codes),
        lambda: layer.weight.copy_(codes),
        lambda: setattr(layer, "weight", Int8Weight(codes.clone())),
    ):
        assign()
        assert torch.equal(layer.codes(), codes) and torch.equal(layer.state_dict()["weight"], codes)
        expected = F.linear(x, layer.dequantize(), layer.bias)
        with torch.no_grad():
            assert (layer(x) - expected).norm() < 0.02 * expected.norm()
        layer.weight.data.zero_()
        assert not layer.codes().any()


def test_a_weight_in_floating_point_is_not_computed_with(layer):
    layer.weight = nn.Parameter(torch.randn(N, K))
    for x in (torch.randn(2, K), torch.randn(20, K), torch.randn(20, K, requires_grad=True)):
        with pytest.raises(WeightError, match=r"\[24, 33\]: is torch.float32, not int8, so the layer cannot compute"):
            layer(x)
    with pytest.raises(WeightError, match=r"is torch\.float32, not int8"):
        layer.dequantize()


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_a_float_layer_is_not_loaded(strict, layer):
    before = layer.codes().clone()
    with pytest.raises(
        RuntimeError, match=r"weight is torch.float32, not int8: create the layer with Int8Linear.from_fl"
    ):
        layer.load_state_dict(nn.Linear(K, N).state_dict(), strict=strict)
    assert torch.equal(layer.codes(), before)


def test_a_weight_that_was_moved_in_inference_mode_can_be_trained_over(layer):
    codes = layer.codes().clone()
    for made in (lambda: layer.weight.to("cpu"), lambda: layer.weight.clone()):  # PEFT assigns the first for DoRA
        with torch.inference_mode():
            layer.weight = made()
            layer(torch.randn(2, K))
        x = torch.randn(20, K, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))
        assert torch.equal(layer.codes(), codes)


@pytest.fixture
def compiling():
    """Reset torch.compile, so that compilations of one test do not count towards limits in another."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("called", [True, False])
def test_torch_compile_sees_no_subclass(called, compiling):
    layer, x = Int8Linear.from_float(nn.Linear(K, N)), torch.randn(20, K)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    if called:  # which packs
        with torch.no_grad():
            assert torch.equal(layer(x), compiled(x))
    else:
        x.requires_grad_()
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))


def test_quantizing_is_checked():
    with pytest.raises(WeightError, match="weight row 1 holds NaN"):
        linear.checked_quantize(torch.tensor([[1.0], [float("nan")]]))
