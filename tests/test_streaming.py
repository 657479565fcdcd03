"""A streamed model computes the same as the model loaded whole, in less memory.

Without AVX-512, the last bits of MKL's float products depend on the addresses of the operands.
"""

import json
import subprocess
import sys

import pytest
import torch
from helpers.gguf_files import assemble, config_of, folder_of
from helpers.making import llama, mixtral, qwen3_moe
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, convert, load
from quantize8.runtime.streaming import streamed
from quantize8.sources import open_checkpoint

IDS = torch.arange(5, 45)[None]


def outputs(model) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        result = model(IDS)
    return tuple(value for value in result.values() if isinstance(value, torch.Tensor))


def check(source, reference, streams: bool = True) -> None:
    """Two passes over the streamed model equal one over `reference`, and leave no weight behind."""
    expected = outputs(load(reference, "cpu", dtype="float32")[0])
    with streamed(open_checkpoint(str(source))) as model:
        for _ in range(2):
            assert all(value.is_meta for value in model.parameters()) == streams
            for ours, theirs in zip(outputs(model), expected, strict=True):
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_in_every_dtype(dtype, tied, tmp_path):
    source = llama(tmp_path / "source", dtype=dtype, tied=tied, shards=2)
    check(source, source)


def test_a_tied_weight_stored_under_either_name_or_both(tmp_path):
    """transformers ties to whichever is there, and does not tie two that differ."""
    for name, kept in (("head", ["lm_head.weight"]), ("both", ["lm_head.weight", "model.embed_tokens.weight"])):
        source = llama(tmp_path / name)  # untied: the two differ
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
        (source / "config.json").write_text(json.dumps(config))
        state = load_file(source / "model.safetensors")
        for other in {"lm_head.weight", "model.embed_tokens.weight"} - set(kept):
            del state[other]
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        check(source, source)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_are_joined_from_their_own_tensors(make, tmp_path):
    source = make(tmp_path / "source")
    check(source, source)


def test_gpt2_and_an_encoder(mgm, minilm):
    check(mgm, mgm)
    check(minilm, minilm)


def test_torch_files(tmp_path):
    source = llama(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    check(source, source)


def test_gguf(tmp_path):
    source = folder_of(tmp_path / "source", config_of("llama"))
    assemble(source, tmp_path / "model.gguf")
    check(tmp_path / "model.gguf", tmp_path / "model.gguf")


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_int8_weights_are_dequantized(format, tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "int8", format=format)
    convert(str(tmp_path / "int8"), tmp_path / "float", format="float32")
    check(tmp_path / "int8", tmp_path / "float")


def test_mamba_reads_weights_of_modules_that_it_does_not_call(tmp_path):
    """What the blocks are for: a mixer takes the weights of its projections itself."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "time_step_rank": 4}
    FalconMambaForCausalLM(FalconMambaConfig(**sizes)).save_pretrained(tmp_path / "source")
    check(tmp_path / "source", tmp_path / "source")


def test_a_model_with_missing_weights_is_refused(tmp_path):
    """transformers would initialize them at random."""
    source = llama(tmp_path / "source", edit=lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with (
        pytest.raises(SourceError, match=r"needs model\.layers\.1\.mlp\.up_proj\.weight"),
        streamed(open_checkpoint(str(source))),
    ):
        pass


def test_a_weight_of_another_shape_is_refused(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 40}
    (source / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(SourceError, match=r"_proj\.weight has the shape \[\d+, \d+\], but config\.json says \[.*40"),
        streamed(open_checkpoint(str(source))),
    ):
        pass


def test_inputs_without_values_are_refused(tmp_path):
    """torch would look up embedding rows with garbage indices."""
    with streamed(open_checkpoint(str(llama(tmp_path / "source")))) as model:
        with pytest.raises(ValueError, match="inputs on the CPU"):
            model(IDS.to(model.device))
        assert all(value.is_meta for value in model.parameters())


def test_a_model_without_a_class_name_is_opened_as_its_base(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    check(source, source)


def test_a_config_that_makes_no_model_is_refused(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"num_attention_heads": 0}
    (source / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(SourceError, match="transformers cannot read its settings"),
        streamed(open_checkpoint(str(source))),
    ):
        pass


PEAK = """
import sys, torch
from quantize8.sources import open_checkpoint
from quantize8.runtime.streaming import streamed
from quantize8.commands.run import peak_rss

ids = torch.arange(8)[None]
for source in sys.argv[1:]:  # the first warms what is loaded once
    before = peak_rss()
    with streamed(open_checkpoint(source)) as model, torch.inference_mode():
        model(ids, use_cache=False)
print(peak_rss() - before)
"""


def test_memory_holds_a_layer_and_not_the_model(tmp_path):
    """24 layers of 3.4 MB in float32, 84 MB in all: the peak of a process that streams them grows by a few layers."""
    sources = [llama(tmp_path / str(layers), layers=layers, hidden=512) for layers in (2, 24)]
    size = 2 * sum(info.nbytes for info in open_checkpoint(str(sources[1])).tensors.values())  # stored in float16
    command = [sys.executable, "-c", PEAK, *map(str, sources)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 80e6 and grown < size / 4
