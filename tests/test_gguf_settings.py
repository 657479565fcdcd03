"""config.json from GGUF: what transformers derives, and what it omits."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from helpers.gguf_files import HEAD, HIDDEN, TinyGguf
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantize8 import SourceError
from quantize8.sources import open_checkpoint

UINT32, FLOAT32, STRING, BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL


def ours_and_theirs(path):
    """Our config.json and the one that transformers derives, with the defaults of the model's class."""
    ours = open_checkpoint(str(path)).config
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    full = CONFIG_MAPPING[ours["model_type"]].from_dict(ours).to_dict()
    for config in (full, theirs):
        for key in ("architectures", "dtype", "_name_or_path", "_model_name_or_path"):  # which are not in the metadata
            config.pop(key, None)
    return full, theirs


def tiny(architecture, tied=True):
    """With tokens, and sizes that are nobody's defaults; transformers takes Qwen3's head size for 128."""
    model = TinyGguf(architecture)
    model.fields["tokenizer.ggml.tokens"] = [f"t{number}" for number in range(32)], GGUFValueType.ARRAY
    for name, number in (("bos", 3), ("eos", 4), ("padding", 5), ("unknown", 6)):
        model.fields[f"tokenizer.ggml.{name}_token_id"] = number, UINT32
    if not tied:
        model.add("output.weight", "lm_head.weight", (32, HIDDEN))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_equal_to_what_transformers_derives(architecture, tied, tmp_path):
    tiny(architecture, tied).write(tmp_path / "tiny.gguf")
    ours, theirs = ours_and_theirs(tmp_path / "tiny.gguf")
    if architecture == "qwen3":  # it does not read the head size, and takes that of the published models
        assert (ours.pop("head_dim"), theirs.pop("head_dim")) == (HEAD, 128)
    assert ours == theirs
    assert ours["tie_word_embeddings"] == tied and ours["rope_parameters"]["rope_theta"] == 5e5
    assert (ours["bos_token_id"], ours["eos_token_id"], ours["pad_token_id"]) == (3, 4, 5)


def test_equal_for_a_real_file(smollm2_gguf):
    ours, theirs = ours_and_theirs(smollm2_gguf)
    assert ours == theirs
    config = open_checkpoint(str(smollm2_gguf)).config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float16"
    assert config["rms_norm_eps"] == float(np.float32(1e-5)) and config["vocab_size"] == 49152


def config_with(folder, architecture="llama", **fields):
    """The config.json of a tiny model with these fields; a value of None removes one."""
    model = tiny(architecture)
    for key, field in fields.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        if field is None:
            del model.fields[key]
        else:
            model.fields[key] = field
    model.write(folder / "tiny.gguf")
    return open_checkpoint(str(folder / "tiny.gguf")).config


def rope_with(folder, architecture="llama", **fields):
    """What transformers makes of the rotary settings, those of older releases included."""
    config = config_with(folder, architecture, **fields)
    assert "rope_parameters" not in config  # which releases before 5 do not know
    return CONFIG_MAPPING[architecture].from_dict(config).rope_parameters


def test_scaled_rotary_embeddings(tmp_path):
    """transformers leaves these out, and the model would compute something else."""
    default = {"rope_type": "default", "rope_theta": 5e5}
    factor = {"rope__scaling__factor": (4.0, FLOAT32)}
    assert rope_with(tmp_path, **factor) == {**default, "rope_type": "linear", "factor": 4.0}
    kind = {"rope__scaling__type": ("yarn", STRING), "rope__scaling__finetuned": (True, BOOL), **factor}
    yarn = {**default, "rope_type": "yarn", "factor": 4.0}
    rope = rope_with(tmp_path, "qwen2", **kind, rope__scaling__original_context_length=(32, UINT32))
    assert rope == {**yarn, "original_max_position_embeddings": 32}
    assert rope_with(tmp_path, "qwen2", **kind) == {**yarn, "original_max_position_embeddings": 128}
    assert rope_with(tmp_path, rope__scaling__type=("none", STRING), **factor) == default
    assert rope_with(tmp_path, rope__freq_base=None) == {**default, "rope_theta": 10000.0}


def test_key_heads_that_are_not_said_are_as_many_as_query_heads(tmp_path):
    """As llama.cpp takes it; Qwen2's class would take 32."""
    model = tiny("qwen2")
    del model.fields["qwen2.attention.head_count_kv"]
    for layer in range(2):
        for name in ("attn_k", "attn_v"):
            for end, shape in (("weight", (HIDDEN, HIDDEN)), ("bias", (HIDDEN,))):
                ones = np.ones(shape, np.float32)
                model.tensors[f"blk.{layer}.{name}.{end}"] = ones, GGMLQuantizationType.F32
    model.write(tmp_path / "tiny.gguf")
    assert open_checkpoint(str(tmp_path / "tiny.gguf")).config["num_key_value_heads"] == 4


def test_biases_are_in_the_settings(tmp_path):
    both = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
    for biased, found in (((), (None, None)), (both[0], (True, None)), ((*both[0], *both[1]), (True, True))):
        TinyGguf(biased=biased).write(tmp_path / "tiny.gguf")
        config = open_checkpoint(str(tmp_path / "tiny.gguf")).config
        assert (config.get("attention_bias"), config.get("mlp_bias")) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_count": None}, "its metadata lacks llama.block_count"),
        ({"block_count": (5000, UINT32)}, "llama.block_count is 5000, more than the 4,096 that are read"),
        ({"embedding_length": (0, UINT32)}, "llama.embedding_length is 0, not a valid count"),
        (
            {"attention__head_count": ([4, 4], GGUFValueType.ARRAY)},
            "llama.attention.head_count is an array, not a valid count",
        ),
        ({"attention__head_count": ("4", STRING)}, "llama.attention.head_count is '4', not a valid count"),
        ({"attention__layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"attention__value_length": (8, UINT32)}, "llama.attention.value_length is 8, not the 16"),
        ({"rope__dimension_count": (8, UINT32)}, "llama.attention.key_length is 16, not the 8"),
        (
            {"rope__scaling__type": ("longrope", STRING)},
            "llama.rope.scaling.type is 'longrope', which config.json cannot express",
        ),
        (
            {"rope__scaling__attn_factor": (1.5, FLOAT32)},
            "llama.rope.scaling.attn_factor is 1.5, which config.json cannot express",
        ),
        (
            {"rope__scaling__mystery": (1.0, FLOAT32)},
            "llama.rope.scaling.mystery is 1.0, which config.json cannot express",
        ),
        ({"rope__freq_base": ("x", STRING)}, "llama.rope.freq_base is 'x', not a number"),
        ({"rope__scaling__factor": (2, UINT32)}, "llama.rope.scaling.factor is 2, not a number"),
        ({"attention__causal": (False, BOOL)}, "llama.attention.causal is False, which LlamaForCausalLM does"),
        ({"expert_count": (8, UINT32)}, "lacks llama.expert_used_count"),
    ],
)
def test_settings_that_are_missing_or_not_these_models_are_refused(fields, message, tmp_path):
    with pytest.raises(SourceError, match=message) as caught:
        config_with(tmp_path, **fields)
    assert "\n" not in str(caught.value) and "tiny.gguf: " in str(caught.value)


def test_more_tokens_than_rows(tmp_path):
    model = tiny("llama")
    model.fields["tokenizer.ggml.tokens"] = ["x"] * 33, GGUFValueType.ARRAY
    model.write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match="has 33 tokens but 32 rows in token_embd"):
        open_checkpoint(str(tmp_path / "tiny.gguf"))
