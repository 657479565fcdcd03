"""Artifacts open in transformers + bitsandbytes, and equal what these two make of the same source."""

import json
from pathlib import Path

import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from quantize8 import convert
from quantize8.formats.bitsandbytes import is_int8, quantization_config

# bitsandbytes says so when it casts its input, which is how LLM.int8() works
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def assert_same_as_transformers(source: Path, artifact: Path, auto, tokens: int = 40) -> None:
    """Every code, scale and other tensor equal, and every output of a forward pass."""
    theirs = auto.from_pretrained(
        source, dtype="auto", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    ).eval()
    ours, notes = auto.from_pretrained(artifact, output_loading_info=True, device_map="cpu")
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    expected, got = theirs.state_dict(), ours.eval().state_dict()
    assert list(expected) == list(got)
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different
    assert any(tensor.dtype == torch.int8 for tensor in got.values())
    ids = torch.arange(2, 2 + tokens)[None] % theirs.config.vocab_size
    with torch.inference_mode():
        expected, got = theirs(ids), ours(ids)
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert torch.equal(value, got[name]), name


def test_smollm2_in_float16(smollm2, smollm2_int8):
    assert_same_as_transformers(smollm2, smollm2_int8, AutoModelForCausalLM)


def test_gguf_gives_the_same_artifact_as_the_float16_folder(smollm2_gguf, smollm2_int8, tmp_path):
    convert(str(smollm2_gguf), tmp_path / "out")
    ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / "out", smollm2_int8))
    assert ours.read_bytes() == theirs.read_bytes()


def test_searched_scales_are_read_as_what_they_stand_for(tmp_path):
    """A bitsandbytes layer applied to the identity: its weight is SCB * code / 127, up to float16 rounding."""
    source = llama(tmp_path / "source", hidden=160)
    convert(str(source), tmp_path / "out", scale="mse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float16)
    layer = model.model.layers[0].mlp.up_proj
    stored = load_file(tmp_path / "out" / "model.safetensors")
    codes, absmax = (stored[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight", "SCB"))
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer.weight.SCB, absmax)
    plain = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].abs().amax(1).float()
    assert (absmax < plain).any() and (codes.abs() == 127).sum(1).max() >= 1
    with torch.inference_mode():
        weight = layer(torch.eye(160, dtype=torch.float16)[None])[0].T.float()
    torch.testing.assert_close(weight, codes * absmax[:, None] / 127, rtol=2**-10, atol=1e-6)


def test_gpt2_with_conv1d_from_its_bin(mgm, tmp_path):
    convert(str(mgm), tmp_path / "out")
    assert_same_as_transformers(mgm, tmp_path / "out", AutoModelForCausalLM)


def test_minilm_in_float32(minilm, tmp_path):
    convert(str(minilm), tmp_path / "out")
    assert_same_as_transformers(minilm, tmp_path / "out", AutoModel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_small_llama_of_each_dtype_in_several_files(dtype, tied, tmp_path):
    source = llama(tmp_path / "source", dtype=dtype, shards=2, tied=tied)
    convert(str(source), tmp_path / "out", max_shard_size="10kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_as_transformers(source, tmp_path / "out", AutoModelForCausalLM)


def test_gpt2_checkpoint_named_without_its_prefix(tmp_path):
    """The hub's gpt2 stores h.0... where the model has transformer.h.0...; codes and logits must still fit."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)).half()
    model.save_pretrained(tmp_path / "source")
    state = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "source" / "model.safetensors")
    result = convert(str(tmp_path / "source"), tmp_path / "out")
    assert len(result.plan.modules) == sum(isinstance(module, Conv1D) for module in model.modules())
    assert_same_as_transformers(tmp_path / "source", tmp_path / "out", AutoModelForCausalLM)


def test_a_module_kept_by_the_recipe_loads_in_floating_point(tmp_path):
    source = llama(tmp_path / "source", layers=3)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('threshold = 6.0\nskip = ["model.layers.1.*", "*.down_proj"]\n')
    result = convert(str(source), tmp_path / "out", recipe=str(recipe))
    assert result.plan.kept["model.layers.1.mlp.up_proj"] == "recipe mine"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float16
    assert model.model.layers[2].mlp.down_proj.weight.dtype == torch.float16
    assert model.model.layers[2].mlp.up_proj.weight.dtype == torch.int8
    with torch.inference_mode():
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_an_untied_output_head_becomes_int8_only_when_asked(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "out", recipe="int8-all")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert model.lm_head.weight.dtype == torch.int8
    with torch.inference_mode():
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_a_tied_output_head_never_becomes_int8(tmp_path):
    source = llama(tmp_path / "source", tied=True)
    result = convert(str(source), tmp_path / "out", recipe="int8-all")
    assert "lm_head" not in result.plan.modules and result.plan.skip_list == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_threshold_is_stored_as_a_json_float(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out", threshold=4)
    text = (tmp_path / "out" / "config.json").read_text()
    assert '"llm_int8_threshold": 4.0' in text and is_int8(json.loads(text))


def test_other_quantizations_are_not_taken_for_int8():
    assert is_int8({"quantization_config": quantization_config(6, [])})
    for entry in (
        {"quant_method": "gptq", "bits": 8},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        None,
        [],
    ):
        assert not is_int8({"quantization_config": entry})
    assert not is_int8({})
