"""Derives config.json from the metadata of a GGUF file, and the tensors that a model with these settings has.

A setting that llama.cpp supports but the model class in transformers does not is refused. The settings equal those that
transformers derives, with three that it omits: scaled rotary embeddings, biases, and the head size of Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.formats.gguf.header import Header, StoredTensor
from quantize8.kernels.reference import Array
from quantize8.sources.structure import EMBEDDING, FINAL_NORM, HEAD, LAYERS, OPTIONAL_BIASES, plain_tensors

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_COUNTS = {  # key of the metadata -> key of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "block_count": "num_hidden_layers",
}
_TOKEN_IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_ROPE = "rope.scaling."
_ROPE_NEUTRAL = {"finetuned": None, "attn_factor": 1, "yarn_ext_factor": 1, "yarn_attn_factor": 1}
_ROPE_NEUTRAL |= {"yarn_beta_fast": 32, "yarn_beta_slow": 1}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = tuple(2**power for power in range(6, 21))
_NEUTRAL = {"attention.causal": True, "expert_count": 0}  # settings of llama.cpp alone -> the value without effect
_STORED_MODULES = {  # transformers' name of a module of a layer -> llama.cpp's name
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_STORED_ENDS = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_BIAS_SETTINGS = {  # architecture -> the settings of config.json that give biases to a group of layers or to none
    "llama": ("attention_bias", "mlp_bias"),
    "qwen2": (),
    "qwen3": ("attention_bias",),
}


class Named(NamedTuple):
    """A tensor with both of its names."""

    stored: str  # llama.cpp's name
    name: str  # transformers' name
    shape: tuple[int, ...]


class Origin(NamedTuple):
    """Where the values of a tensor are in a file.

    Attributes:
        parts: The stored tensors; of several, the rows alternate.
        offset: What is subtracted from the stored values.
    """

    parts: tuple[StoredTensor, ...]
    offset: float = 0.0


def read_config(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Derive the config.json of a model.

    Args:
        header: The header with the metadata.
        shapes: The shapes of the tensors, by llama.cpp's names.

    Returns:
        The contents of config.json, without `dtype`.

    Raises:
        SourceError: A setting is missing, invalid, or not supported by the model class.
    """
    arch = header.architecture
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[arch]], "model_type": arch}
    for key, name in _COUNTS.items():
        config[name] = count(header, key)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = count(header, "attention.head_count_kv", heads)  # llama.cpp's default
    if config["num_hidden_layers"] > limits.LAYERS:
        raise unfit(header, "block_count", f"more than the {limits.LAYERS:,} that are read")
    head = _head_dim(header, config["hidden_size"] // heads)
    if arch != "qwen2" or head * heads != config["hidden_size"]:
        config["head_dim"] = head
    config["rms_norm_eps"] = number(header, "attention.layer_norm_rms_epsilon")
    config |= rope(header, config["max_position_embeddings"])
    for key, neutral in _NEUTRAL.items():
        if header.value(f"{arch}.{key}", neutral) != neutral:
            raise unfit(header, key, f"which {ARCHITECTURES[arch]} does not support")
    config |= {name: True for name in _BIAS_SETTINGS[arch] if _any_bias(shapes, OPTIONAL_BIASES[name])}
    config |= special_tokens(header)
    config["vocab_size"] = vocabulary(header, shapes)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    return config


def named_tensors(config: Mapping[str, Any]) -> Iterator[Named]:
    """The tensors that a file must hold for a model with the settings of `read_config`, in llama.cpp's order."""
    for name, shape in plain_tensors(ARCHITECTURES[config["model_type"]], config):
        module, _, kind = name.rpartition(".")
        if module in _STORED_ENDS:
            if module != HEAD or not config["tie_word_embeddings"]:
                yield Named(f"{_STORED_ENDS[module]}.{kind}", name, shape)
        else:
            layer, _, part = module.removeprefix(f"{LAYERS}.").partition(".")
            yield Named(f"blk.{layer}.{_STORED_MODULES[part]}.{kind}", name, shape)


def count(header: Header, key: str, default: int | None = None) -> int:
    """A positive whole number of the metadata; SourceError if it is missing or not valid."""
    value = header.value(f"{header.architecture}.{key}", default)
    if type(value) is not int or not 0 < value <= limits.EMPTY_LENGTH:
        raise unfit(header, key, "not a valid count")
    return value


def number(header: Header, key: str, default: float | None = None) -> float:
    """A real number of the metadata; SourceError if it is missing or not valid."""
    value = header.value(f"{header.architecture}.{key}", default)
    if not isinstance(value, float):
        raise unfit(header, key, "not a number")
    return value


def special_tokens(header: Header) -> dict[str, int]:
    """The entries of config.json for the tokens that begin or end a text, are unknown, or pad it."""
    found = {}
    for theirs, ours in _TOKEN_IDS.items():
        if isinstance(value := header.value(f"tokenizer.ggml.{theirs}_token_id"), int):
            found[f"{ours}_token_id"] = value
    return found


def _head_dim(header: Header, usual: int) -> int:
    """The size of a head. It must be the same for keys and values, and the whole head must be rotated."""
    rotated = count(header, "rope.dimension_count", count(header, "attention.key_length", usual or 1))
    for key in ("attention.key_length", "attention.value_length"):
        if count(header, key, rotated) != rotated:
            raise unfit(
                header, key, f"not the {rotated} of rope.dimension_count, as it must be for {header.architecture}"
            )
    return rotated


def rope(header: Header, context: int) -> dict[str, Any]:
    """The rotary settings, in the form that every release of transformers reads.

    A factor without a type is linear scaling, as in llama.cpp.
    """
    arch = header.architecture
    theta = header.value(f"{arch}.rope.freq_base", 10000.0)
    factor = header.value(f"{arch}.{_ROPE}factor") or header.value(f"{arch}.rope.scale_linear") or 1.0
    kind = header.value(f"{arch}.{_ROPE}type", "linear")
    for key, value in (("rope.freq_base", theta), (f"{_ROPE}factor", factor)):
        if not isinstance(value, float):
            raise unfit(header, key, "not a number")
    known = {f"{_ROPE}type", f"{_ROPE}factor", f"{_ROPE}original_context_length"}
    for key in (key.removeprefix(f"{arch}.") for key in header.entries if key.startswith(f"{arch}.{_ROPE}")):
        neutral = _ROPE_NEUTRAL.get(key.removeprefix(_ROPE), "")
        if key not in known and neutral is not None and header.value(f"{arch}.{key}") != neutral:
            raise unfit(header, key, "which config.json cannot express exactly")
    if kind not in ("none", "linear", "yarn"):
        raise unfit(header, f"{_ROPE}type", "which config.json cannot express exactly")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_theta": theta}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = count(header, f"{_ROPE}original_context_length", context)
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_factors(theta: float, head_dim: int, scaling: Mapping[str, float]) -> Array:
    """Compute the divisors of the rotary frequencies for llama3 scaling.

    The formula is that of transformers' `_compute_llama3_parameters`, which llama.cpp's converter also uses.

    Args:
        theta: The base of the frequencies, `rope_theta`.
        head_dim: The size of a head.
        scaling: `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`.

    Returns:
        The divisors, float32 [head_dim / 2].
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * np.pi)  # over the pretraining context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the original frequency; the rest is divided
    factors: Array = (1 / (share + (1 - share) / scaling["factor"])).astype(np.float32)
    return factors


def llama3_scaling(config: Mapping[str, Any], factors: Array) -> dict[str, Any] | None:
    """Recover the llama3 scaling from its divisors.

    GGUF holds the divisors (`rope_freqs.weight`), not the settings that they were computed from. The largest is
    `factor`; `low_freq_factor` and `high_freq_factor` are 1 and 4 in every published model, and the pretraining context
    is a power of two. The intermediate divisors differ between contexts, so a match identifies the context.

    Args:
        config: The settings derived so far.
        factors: The divisors, float32 [head_dim / 2].

    Returns:
        The entry of config.json, or None if the divisors match no llama3 scaling.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    largest = float(factors.max(initial=1))
    between = ((factors > 1) & (factors < largest)).any()
    if "rope_scaling" in config or factors.shape != (head_dim // 2,) or not between:
        return None
    for context in _CONTEXTS:
        scaling = {"factor": largest, **_LLAMA3, "original_max_position_embeddings": context}
        if np.allclose(factors, rope_factors(config["rope_theta"], head_dim, scaling), rtol=1e-4):
            return {"rope_scaling": {"rope_type": "llama3", **scaling}}
    return None


def _any_bias(shapes: Mapping[str, tuple[int, ...]], modules: tuple[str, ...]) -> bool:
    biases = tuple(f".{_STORED_MODULES[module]}.bias" for module in modules)
    return any(name.endswith(biases) for name in shapes)


def vocabulary(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of rows of the embedding; SourceError if there are more tokens."""
    rows, tokens = shapes.get("token_embd.weight", (0,))[0], header.length("tokenizer.ggml.tokens") or 0
    if rows < tokens and rows:
        raise SourceError(f"{header.path}: has {tokens:,} tokens but {rows:,} rows in token_embd; fetch it again")
    return rows


def unfit(header: Header, key: str, why: str) -> SourceError:
    """Build the error for a setting that is missing or not supported."""
    key = f"{header.architecture}.{key}"
    if key not in header.entries:
        return SourceError(f"{header.path}: its metadata lacks {key}; fetch it again")
    value = "an array" if header.length(key) is not None else repr(header.value(key))
    return SourceError(f"{header.path}: {key} is {value}, {why}; use a safetensors checkpoint")
