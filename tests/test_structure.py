"""Which tensors are Linear weights: where names alone decide, the result must agree with transformers."""

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from quantize8 import SourceError
from quantize8.sources import open_checkpoint, structure
from quantize8.sources.base import TensorInfo
from quantize8.sources.structure import CONV1D, LINEAR, is_skipped, read_structure, structure_of

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


@pytest.mark.parametrize("architecture", sorted(structure.FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_names_give_the_same_answer_as_transformers_where_they_are_trusted(architecture, tied, biased, monkeypatch):
    model_type = architecture.removesuffix("ForCausalLM").lower()
    config = TINY | {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": tied}
    if biased and model_type in ("llama", "qwen3", "gemma2"):
        config |= {"attention_bias": True, "mlp_bias": model_type == "llama"}
    _, tensors = meta(config)
    assert structure.is_plain_decoder(config, tensors)
    for name in tensors:  # each of them is needed
        assert not structure.is_plain_decoder(config, {key: info for key, info in tensors.items() if key != name})
    by_names = read_structure(config, tensors)
    monkeypatch.setattr(structure, "FAMILIES", {})
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


_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 1, "tie_word_embeddings": False}
_GROUPED = _EXPERTS | {"n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPED |= {"n_group": 1, "topk_group": 1}
_MULTI_HEAD = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
_GATED_DELTA = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
FURTHER = {  # architecture: config, its last layer, the one for a further token, what that one has besides
    "DeepseekV3ForCausalLM": (
        _GROUPED | _MULTI_HEAD | {"model_type": "deepseek_v3"},
        "model.layers.1.",
        "model.layers.2.",
        ["embed_tokens", "eh_proj", "shared_head.head"],
    ),
    "Glm4MoeForCausalLM": (
        _GROUPED | {"model_type": "glm4_moe"},
        "model.layers.1.",
        "model.layers.2.",
        ["embed_tokens", "eh_proj", "shared_head.head"],
    ),
    "Qwen3NextForCausalLM": (
        _EXPERTS | _GATED_DELTA | {"model_type": "qwen3_next", "num_experts": 2, "num_hidden_layers": 4},
        "model.layers.3.",
        "mtp.layers.0.",
        ["fc"],
    ),
}


@pytest.mark.parametrize("architecture", FURTHER)
def test_a_layer_that_predicts_a_further_token_is_what_its_like_is(architecture):
    """transformers has no MTP layers. Embeddings, projections and heads that only they have are reported."""
    config, last, further, besides = FURTHER[architecture]
    config = TINY | config | {"architectures": [architecture]}
    _, tensors = meta(config)
    besides = [f"{further.removesuffix('layers.0.')}{name}" for name in besides]
    likes = {name: further + name.removeprefix(last) for name in tensors if name.startswith(last)}
    experts = [f"{layer}mlp.experts.1.{name}_proj" for layer in (last, further) for name in ("gate", "up", "down")]
    for name in [*likes.values(), *(f"{module}.weight" for module in [*besides, *experts])]:
        shape = next((tensors[like].shape for like, own in likes.items() if own == name), (4, 4))
        tensors[name] = TensorInfo(name, "F16", shape, "f")
    found = read_structure(config, tensors)
    own = {name.removeprefix(last): kind for name, kind in found.linears.items() if name.startswith(last)}
    assert {name.removeprefix(further): kind for name, kind in found.linears.items() if name.startswith(further)} == own
    assert {"self_attn.o_proj", "mlp.gate"} - own.keys() == {"mlp.gate"}  # the router is no Linear layer
    assert found.kept == {"lm_head": "output head"} | dict.fromkeys(besides, "not part of transformers' model")
    assert sorted(found.experts) == sorted(experts)
    assert set(found.skip_list({*found.linears})) == {"lm_head", *besides}


def test_a_weight_that_no_module_of_the_model_has_is_told_of():
    config = TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    _, tensors = meta(config)
    names = ("v_head.summary", "medusa_head.0.0.linear", "lm_head.0")
    tensors |= {f"{name}.weight": TensorInfo(f"{name}.weight", "F16", (4, 4), "f") for name in names}
    expected = {"lm_head": "output head"} | dict.fromkeys(names, "not part of transformers' model")
    assert read_structure(config, tensors).kept == expected
    config |= {"architectures": ["LlamaForSequenceClassification"]}
    del expected["lm_head"], tensors["lm_head.weight"]
    assert read_structure(config, tensors).kept == expected


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


@pytest.mark.parametrize(
    ("model_type", "module", "why"),
    [
        ("unlimited_ocr", "model.projector.layers", "would not rename its scales"),
        ("nomic_bert", "nomic_bert.encoder.layers.0.attn.Wqkv", "splits it"),
        ("mamba", "backbone.layers.0.mixer.dt_proj", "code reads its weight"),
    ],
)
def test_why_a_layer_of_a_saved_model_stays_in_float(model_type, module, why, tmp_path):
    found = structure_of(open_checkpoint(str(saved_as_transformers_does(model_type, tmp_path))))
    assert why in found.kept[module] and module not in found.linears
    skipped = found.skip_list(set(found.linears))
    assert not set(skipped) & set(found.linears)


def test_a_router_that_transformers_transposes_is_no_expert(tmp_path):
    """ERNIE's checkpoints store routers the other way round, and the experts for text and images in one list."""
    found = structure_of(open_checkpoint(str(saved_as_transformers_does("ernie4_5_vl_moe", tmp_path))))
    assert found.experts and all(".experts." in name for name in found.experts)


def saved_as_transformers_does(model_type, folder):
    """A tiny model of a type, under the names that checkpoints have."""
    from benchmarks.architectures_models import build, subjects

    build(next(each for each in subjects() if each.model_type == model_type)).save_pretrained(folder)
    return folder
