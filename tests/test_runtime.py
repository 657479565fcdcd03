"""Our runtime computes LLM.int8(): its logits differ from a float64 emulation only by 16-bit rounding."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from quantize8 import Int8Linear, SourceError, WeightError, convert, load
from quantize8.files import TEXT
from quantize8.kernels.reference import INT8_MAX

THRESHOLD = 6.0


class Emulated(nn.Module):
    """LLM.int8() as the paper writes it, on an artifact's codes, multiplied in float64 and rounded to `dtype`.

    Not built from quantize8's own formulas: outlier columns are taken out of both operands. Only the rounding to
    codes is bitsandbytes' (float32, the reciprocal first), since a tie that falls otherwise is another definition.
    """

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes, self.scale, self.dtype = codes.double(), absmax.double() / INT8_MAX, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1]).double()
        outliers = tokens.abs() >= THRESHOLD
        columns = outliers.any(0)
        inner = tokens.masked_fill(outliers, 0)
        absmax = inner.float().abs().amax(1, keepdim=True)
        codes = (inner.float() * (absmax.clamp(min=1e-30).reciprocal() * INT8_MAX)).round().double()
        codes[:, columns] = 0
        product = (codes * absmax.double() / INT8_MAX) @ (self.codes * self.scale[:, None]).T
        product += tokens[:, columns] @ (self.codes * self.scale[:, None])[:, columns].T
        return product.to(self.dtype).view(*x.shape[:-1], -1)


def emulate(model: nn.Module, artifact: Path, linear_dtype: torch.dtype) -> nn.Module:
    """The same model with each Int8Linear replaced by the emulation."""
    state = load_file(artifact / "model.safetensors")
    emulated = copy.deepcopy(model)
    for name, module in list(emulated.named_modules()):
        if isinstance(module, Int8Linear):
            replacement = Emulated(state[f"{name}.weight"], state[f"{name}.SCB"], linear_dtype)
            emulated.set_submodule(name, replacement)
    return emulated


@pytest.fixture(scope="module")
def ids(smollm2_int8) -> torch.Tensor:
    _, tokenizer = load(smollm2_int8)
    return tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"][:, :192]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_differ_from_float64_emulation_by_no_more_than_16_bit_rounding(smollm2_int8, ids, dtype):
    """The yardstick: exact int8 products in the same 16-bit model, whose only error is rounding to 16 bits."""
    model, _ = load(smollm2_int8, dtype=dtype)
    exact_model = emulate(model, smollm2_int8, torch.float64).double()
    rounded_model = emulate(model, smollm2_int8, dtype)
    with torch.inference_mode():
        exact = exact_model(ids).logits.double()
        ours = model(ids).logits.double()
        rounded = rounded_model(ids).logits.double()
    error, rounding = ((logits - exact).norm().item() for logits in (ours, rounded))
    print(f"{dtype}: error {error:.3f}, of rounding alone {rounding:.3f}, ratio {error / rounding:.3f}")
    assert error <= 1.1 * rounding


def test_each_layer_alone_is_within_rounding_of_the_emulation(smollm2_int8, ids):
    """All layers get the same inputs, so that differences of earlier layers do not accumulate: the bound is tight."""
    model, _ = load(smollm2_int8, dtype=torch.bfloat16)
    state = load_file(smollm2_int8 / "model.safetensors")
    ratios = {}

    def compare(name):
        def hook(module, inputs, output):
            emulated = Emulated(state[f"{name}.weight"], state[f"{name}.SCB"], torch.float64)(inputs[0])
            rounding = (emulated.to(torch.bfloat16).double() - emulated).norm()
            ratios[name] = ((output.double() - emulated).norm() / rounding).item()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            module.register_forward_hook(compare(name))
    with torch.inference_mode():
        model(ids)
    assert len(ratios) == 210
    assert max(ratios.values()) <= 1.05


def test_decoding_token_by_token_agrees_with_the_exact_weight_only_model(smollm2_int8, ids):
    """Up to 16 tokens, activations stay in 16 bits: only the weights are quantized."""
    model, _ = load(smollm2_int8, dtype=torch.float32)
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Int8Linear):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
            layer.weight.data = module.dequantize()
            plain.set_submodule(name, layer)
    with torch.inference_mode():
        ours, exact = model(ids[:, :12]).logits, plain.double()(ids[:, :12]).logits
    assert (ours - exact).norm() / exact.norm() < 1e-5


def test_hybrid_mode_gives_a_sequence_the_same_logits_alone_and_in_a_batch(smollm2_int8, ids):
    together = ids[:, :160].view(2, 80)
    differences = {}
    for mode in ("hybrid", "dynamic"):
        model, _ = load(smollm2_int8, mode=mode)
        with torch.inference_mode():
            batch, alone = model(together).logits[0], model(together[:1]).logits[0]
        differences[mode] = (batch - alone).norm().item() / alone.norm().item()
    assert differences["hybrid"] < 1e-4 < differences["dynamic"]


def test_float16_is_computed_in_float32_on_a_cpu_and_other_types_as_stored(tmp_path):
    for stored, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        name = str(stored).removeprefix("torch.")
        convert(str(llama(tmp_path / name, dtype=stored)), tmp_path / f"{name}-int8")
        model, _tokenizer = load(tmp_path / f"{name}-int8")
        assert model.dtype == expected
        assert model.model.layers[0].mlp.up_proj.SCB.dtype == torch.float32


def test_conv1d_and_biases_run(mgm, tmp_path):
    convert(str(mgm), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out")
    source, _ = load(mgm)
    assert tokenizer is None  # the package has one of its own kind, which transformers does not read
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        ours, theirs = model(ids).logits, source(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.05
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 32


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_encoder_is_as_close_to_its_source_as_bitsandbytes_is(minilm, tmp_path):
    convert(str(minilm), tmp_path / "out")
    (ours, tokenizer), (source, _) = load(tmp_path / "out"), load(minilm)
    theirs = AutoModel.from_pretrained(tmp_path / "out", device_map="cpu").eval()
    encoded = tokenizer([TEXT.read_text()[:500], "Two words"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected, got, peer = (model(**encoded).last_hidden_state for model in (source, ours, theirs))
    assert (got - expected).norm() <= 1.05 * (peer - expected).norm()


def test_scales_stay_float32_when_the_model_is_cast(smollm2_int8):
    model, _ = load(smollm2_int8)
    layer = model.model.layers[0].mlp.up_proj
    scale = layer.SCB.clone()
    layer.half()
    assert layer.SCB.dtype == torch.float32 and torch.equal(layer.SCB, scale)
    assert layer.weight.dtype == torch.int8


def test_from_float_equals_the_converter_and_passes_gradients():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    layer = Int8Linear.from_float(linear)
    x = torch.randn(30, 40, requires_grad=True)
    layer(x).square().sum().backward()
    y = torch.nn.functional.linear(x.detach(), layer.dequantize(), layer.bias)
    torch.testing.assert_close(x.grad, 2 * layer(x.detach()) @ layer.dequantize())
    assert (layer(x.detach()) - y).norm() / y.norm() < 0.02
    assert "int8, threshold=6.0" in repr(layer)


def test_from_float_refuses_what_int8_cannot_hold():
    linear = nn.Linear(4, 4)
    linear.weight.data[2, 1] = np.nan
    with pytest.raises(WeightError, match="row 2"):
        Int8Linear.from_float(linear)


def test_batches_of_any_shape_and_none():
    layer = Int8Linear.from_float(nn.Linear(8, 3))
    assert layer(torch.zeros(2, 5, 7, 8)).shape == (2, 5, 7, 3)
    assert layer(torch.zeros(0, 8)).shape == (0, 3)
    assert torch.equal(layer(torch.zeros(8)), layer.bias)


@pytest.mark.parametrize("mode", ["static", "elementwise", "junk"])
def test_another_mode_is_refused_before_anything_is_opened(mode, tmp_path):
    with pytest.raises(SourceError, match=f"^mode {mode}: unknown; name one of hybrid, dynamic, bitsandbytes$"):
        load(tmp_path / "nothing", mode=mode)


def test_another_quantization_is_refused_in_one_line(tmp_path):
    source = llama(tmp_path / "source")
    config = source / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 8},', 1)
    )
    with pytest.raises(SourceError, match="quantized by gptq"):
        load(source)
