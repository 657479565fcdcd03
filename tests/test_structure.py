"""Which tensors are Linear weights: names alone must agree with transformers wherever they are trusted."""

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from quantize8 import SourceError
from quantize8.checkpoint import structure
from quantize8.checkpoint.base import TensorInfo
from quantize8.checkpoint.structure import CONV1D, LINEAR, is_skipped, read_structure

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def meta(config):
    """A model without storage, and the tensors a checkpoint of it holds."""
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(
            transformers.AutoConfig.for_model(**config)
        )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = model.state_dict()
    return model, {
        name: TensorInfo(name, "F16", tuple(value.shape), "f") for name, value in state.items() if name not in tied
    }


@pytest.mark.parametrize("architecture", sorted(structure._NAMES_SUFFICE))
@pytest.mark.parametrize("tied", [False, True])
def test_names_give_the_same_answer_as_transformers_where_they_are_trusted(architecture, tied, monkeypatch):
    model_type = architecture.removesuffix("ForCausalLM").lower()
    config = TINY | {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": tied}
    _, tensors = meta(config)
    by_names = read_structure(config, tensors)
    monkeypatch.setattr(structure, "_NAMES_SUFFICE", frozenset())
    by_model = read_structure(config, tensors)
    assert by_names.linears == by_model.linears and len(by_names.linears) == 14
    assert by_names.output_head == by_model.output_head == (None if tied else "lm_head")
    quantized = set(by_names.linears)
    assert by_names.skip_list(quantized) == by_model.skip_list(quantized) == ["lm_head"]


def test_conv1d_is_told_from_linear():
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    model, tensors = meta(config)
    found = read_structure(config, tensors)
    expected = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    assert {name for name, kind in found.linears.items() if kind == CONV1D} == expected
    assert not [name for name, kind in found.linears.items() if kind == LINEAR]


def test_embeddings_routers_and_fused_experts_are_not_linear_weights():
    config = TINY | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 2,
        "tie_word_embeddings": False,
    }
    _, tensors = meta(config)
    for layer in range(2):  # as checkpoints store experts: one by one
        for expert in range(2):
            for name, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32))):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = TensorInfo(key, "F16", shape, "f")
    found = read_structure(config, tensors)
    assert set(found.linears) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"
    }
    assert len(found.experts) == 12 and not set(found.experts) & set(found.skip_list(set(found.linears)))


def test_encoder_decoder_with_shared_embeddings():
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 32, "d_kv": 8}
    config |= {"d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    _, tensors = meta(config)
    found = read_structure(config, tensors)
    assert not [name for name in found.linears if "shared" in name or "relative_attention_bias" in name]
    assert "encoder.block.0.layer.0.SelfAttention.q" in found.linears
    assert all(name.endswith(".wo") for name in found.kept if name != "lm_head")  # T5 keeps wo in float32


def test_a_config_that_transformers_cannot_build_is_an_error_in_one_line():
    config = TINY | {"architectures": ["BertModel"], "model_type": "bert", "num_attention_heads": 5}
    with pytest.raises(SourceError, match=r"config\.json: transformers cannot build BertModel") as caught:
        read_structure(config, {"a.weight": TensorInfo("a.weight", "F16", (2, 2), "f")})
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_asked_for():
    config = TINY | {"architectures": ["X"], "model_type": "llama", "auto_map": {"AutoModel": "evil.py--X"}}
    tensors = {name: TensorInfo(name, "F16", (2, 2), "f") for name in ("h.mlp.weight", "wte.weight", "head.weight")}
    assert set(read_structure(config, tensors).linears) == {"h.mlp"}


@pytest.mark.parametrize(
    ("module", "patterns", "skipped"),
    [
        ("model.layers.1.mlp", ["model.layers.1"], True),
        ("model.layers.11.mlp", ["model.layers.1"], True),  # so transformers 5.20 has it
        ("model.layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate"], True),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.gate", "x.mlp.up_proj"], False),
        ("a.b.fc1", ["fc1"], True),
        ("lm_head", [], False),
        ("model.layers.3.mlp", [r"model.layers.[0-3]"], True),
    ],
)
def test_what_transformers_skips_is_known_to_be_skipped(module, patterns, skipped):
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert is_skipped(module, patterns) is skipped
    assert skipped or should_convert_module(module, patterns)
