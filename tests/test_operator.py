"""The linear layer as a torch operator: shapes, gradients, and no graph breaks under torch.compile."""

import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.kernels.operator import linear, packed_linear


def layer(out_features: int = 12, in_features: int = 32, bias: bool = True) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear.from_float(nn.Linear(in_features, out_features, bias))


def arguments(tokens: int, dtype=torch.float32, bias: bool = True, gradient: bool = False):
    made = layer(bias=bias)
    x = torch.randn(tokens, 32).to(dtype)
    x[0, 5] = 30
    shift = made.bias.to(dtype) if bias else None
    return x.requires_grad_(gradient), made.codes(), made.SCB.data, shift, 6.0, "dynamic"


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_keeps_the_rules_of_torch(tokens, gradient, bias):
    """Schema, shape function, gradient registration, and tracing under ahead-of-time autograd."""
    torch.library.opcheck(linear, arguments(tokens, bias=bias, gradient=gradient))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_on_tiles_keeps_them_too_and_is_what_a_compiled_model_calls(tokens, bias):
    made, x = layer(bias=bias), torch.randn(tokens, 32)
    tiles = made.pack()
    rest = (made.bias, 12, 6.0, "dynamic")
    torch.library.opcheck(packed_linear, (x, tiles.parts, *rest))
    names = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(made, fullgraph=True, backend=look, dynamic=False)(x), made(x))
    assert any("packed_linear" in name for name in names) and made._packed is tiles


def static_layer(bias: bool = True) -> Int8Linear:
    made = layer(bias=bias)
    made.mode, made.outlier_columns = "static", torch.tensor([5, 0, 31], dtype=torch.int32)
    made.outlier_weight = (made.dequantize()[:, [5, 0]] * 1.001).half()
    return made


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("gradient", [False, True])
def test_stored_outlier_columns_keep_the_rules_too(tokens, gradient):
    made = static_layer()
    x = torch.randn(tokens, 32, requires_grad=gradient)
    rest = (made.bias.data, 6.0, "static", made.outlier_columns, made.outlier_weight)
    torch.library.opcheck(linear, (x, made.codes(), made.SCB.data, *rest))


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_compiled_static_layer_gives_the_same_bits(tokens):
    made, x = static_layer(), torch.randn(tokens, 32)
    tiles = made.pack()
    assert len(tiles.parts) == 7
    for mode in ("static", "hybrid"):
        torch.library.opcheck(packed_linear, (x, tiles.parts, made.bias, 12, 6.0, mode))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        assert torch.equal(compiled(x), made(x)) and made._packed is tiles
        assert torch.equal(compiled(x[None]), made(x[None]))


@pytest.mark.parametrize("tokens", [3, 40])
def test_the_gradient_of_a_static_layer_reaches_its_input(tokens):
    made = static_layer()
    x = torch.randn(tokens, 32, requires_grad=True)
    made(x).sum().backward()
    np.testing.assert_allclose(x.grad, made.dequantize().sum(0).expand(tokens, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_graph_without_breaks_gives_the_same(tokens):
    model = nn.Sequential(layer(), nn.GELU(), layer(7, 12, bias=False))
    x = torch.randn(2, tokens, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)  # eager takes the packed weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_input_is_that_of_the_dequantized_layer(dtype):
    x, codes, absmax, bias, *rest = arguments(20, dtype, gradient=True)
    y = linear(x, codes, absmax, bias, *rest)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)
    exact = upstream.double() @ (codes.double() * (absmax.double() / 127)[:, None])
    np.testing.assert_allclose(x.grad.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_weights_are_constants_to_the_gradient():
    made = layer()
    made(torch.randn(3, 32, requires_grad=True)).sum().backward()
    assert made.weight.grad is None and made.SCB.grad is None
