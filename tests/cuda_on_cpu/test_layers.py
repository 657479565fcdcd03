"""Whole layers and models on the (emulated) kernels: the host code between launches, and what a model computes."""

import numpy as np
import pytest
import torch
from cuda_on_cpu.emulation import EmulatedGpu
from helpers.making import llama
from torch.utils._python_dispatch import TorchDispatchMode

from quantize8 import Int8Linear, convert, load
from quantize8.kernels import cpu, gpu, operator
from quantize8.kernels.reference import Int8Weight
from quantize8.runtime import linear

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "item",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique",
    "_to_copy",
    "copy_",
}


class Watch(TorchDispatchMode):
    """Records every torch operation, and refuses those for which the host would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} reads a result, or copies it to the host"
        self.operations.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_a_layer_launches_and_waits_for_nothing(monkeypatch, capability, tokens):
    """So a CUDA graph can hold it. The number of launches is as promised."""
    emulated = EmulatedGpu(capability)
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
    monkeypatch.setattr(gpu, "_int_mm", torch._int_mm)
    weight = Int8Weight(torch.ones(24, 64, dtype=torch.int8), torch.ones(24))
    x, bias = torch.randn(tokens, 64).half(), torch.zeros(24).half()
    x[0, 3] = 50
    with Watch() as watch:
        gpu.linear(x, weight, bias, 6.0)
    prefill = ["quantize_activations", "mixed_matmul" if capability >= (8, 0) else "mixed_epilogue"]
    assert emulated.launched == (["weight_only_matmul"] if tokens <= 16 else prefill)
    others = set(watch.operations) - {"new_empty", "new_zeros", "empty", "zeros", "zero_"}
    library_matmul = {"_int_mm", "t", "constant_pad_nd", "pad"}
    assert not others - (library_matmul if capability < (8, 0) else set()), others


@pytest.mark.parametrize("tokens", [1, 17])
def test_a_rotated_layer_launches_twice_and_waits_for_nothing(monkeypatch, tokens):
    emulated = EmulatedGpu()
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
    weight = Int8Weight(torch.ones(24, 64, dtype=torch.int8), torch.ones(24), rotation=64)
    x, bias = torch.randn(tokens, 64).half(), torch.zeros(24).half()
    with Watch() as watch:
        gpu.linear(x, weight, bias, 6.0)
    decode, prefill = ["rotate", "weight_only_matmul"], ["quantize_activations", "mixed_matmul"]
    assert emulated.launched == (decode if tokens == 1 else prefill)
    assert not set(watch.operations) - {"new_empty", "empty"}


def test_the_watch_sees_waiting():
    with Watch(), pytest.raises(AssertionError, match="reads a result"):
        torch.ones(3).nonzero()


@pytest.fixture
def kernels_for_layers(monkeypatch) -> EmulatedGpu:
    """Make every Int8Linear use the kernels, although its tensors are on the CPU."""
    emulated = EmulatedGpu(order=3)
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
    monkeypatch.setattr(cpu, "linear", gpu.linear)
    monkeypatch.setattr(linear.Int8Linear, "_packs_for", lambda self, x: False)
    return emulated


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_computes_the_same_on_kernels_and_on_the_cpu(tmp_path, dtype, kernels_for_layers, monkeypatch):
    convert(str(llama(tmp_path / "source", hidden=64, dtype=dtype)), tmp_path / "out", device="cpu")
    model, _ = load(tmp_path / "out", "cpu", dtype=dtype)
    ids = torch.arange(40)[None] % 64
    with torch.inference_mode():
        ours = model(ids).logits.float()
        steps = model.generate(ids[:, :20], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert {"weight_only_matmul", "mixed_matmul", "quantize_activations"} == set(kernels_for_layers.launched)
        monkeypatch.undo()
        theirs = model(ids).logits.float()
        assert torch.equal(steps, model.generate(ids[:, :20], max_new_tokens=5, do_sample=False, pad_token_id=0))
    spread = (ours - theirs).norm() / theirs.norm()
    assert spread < (2e-3 if dtype == torch.float16 else 1.5e-2)


def test_training_reaches_the_input_through_kernels(kernels_for_layers):
    layer = Int8Linear.from_float(torch.nn.Linear(64, 24))
    x = torch.randn(20, 64).requires_grad_()
    layer(x).sum().backward()
    np.testing.assert_allclose(x.grad[0], layer.dequantize().sum(0), rtol=1e-4, atol=1e-5)
    assert kernels_for_layers.launched and operator.linear is torch.ops.quantize8.linear.default
