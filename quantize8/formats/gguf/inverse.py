"""GGUF read by the table of `architectures`: config.json, and where each tensor of transformers' model is in the file.

This covers the models of the table that `settings` does not: those with experts, Gemma and Phi-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import Keys

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.formats.gguf import settings
from quantize8.formats.gguf.architectures import COUNTS, FAMILIES, Family, expected_tensors, expert_of
from quantize8.formats.gguf.header import Header, StoredTensor
from quantize8.formats.gguf.settings import Origin
from quantize8.kernels.reference import Array

MODEL_TYPES = {  # class -> its name in config.json
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "GptOssForCausalLM": "gpt_oss",
}
ARCHITECTURES = {FAMILIES[name].name: name for name in MODEL_TYPES if name != "MixtralForCausalLM"}
_MOST_EXPERTS = 512  # llama.cpp's own limit
_FACTORS = {f"rope_factors_{kind}.weight": f"{kind}_factor" for kind in ("short", "long")}  # -> in config.json
_LOCAL_THETA = 10000.0  # llama.cpp's default for the layers of Gemma 3 with a window


def class_of(header: Header) -> str | None:
    """The class of the model, if it is one of those that are read by the table."""
    arch = header.architecture
    if arch != "llama":
        return ARCHITECTURES.get(arch)
    return "MixtralForCausalLM" if header.value(f"{arch}.expert_count", 0) else None


def factors_of(header: Header) -> list[str]:
    """The tensors with rotary factors, which are settings in config.json, that the model may have."""
    name = class_of(header)
    return [*_FACTORS] if name is not None and "longrope" in FAMILIES[name].ropes else []


def read_config(
    header: Header, shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, Array | None]
) -> dict[str, Any]:
    """Derive the config.json of a model.

    Args:
        header: The header with the metadata.
        shapes: The shapes of the tensors, by llama.cpp's names.
        factors: The values of the tensors of `factors_of` that the file has; None if they are not float32 or too many.

    Returns:
        The contents of config.json, without `dtype`.

    Raises:
        SourceError: A setting is missing, invalid, or not supported by the model class.
    """
    name = class_of(header)
    assert name is not None
    family, arch = FAMILIES[name], header.architecture
    config: dict[str, Any] = {"architectures": [name], "model_type": MODEL_TYPES[name], **family.fixed}
    counts = COUNTS | {key: setting for key, setting in family.counts.items() if isinstance(setting, str)}
    if family.experts is not None:
        counts[Keys.LLM.EXPERT_COUNT] = family.experts.count
        counts[Keys.LLM.EXPERT_USED_COUNT] = "num_experts_per_tok"
        if family.experts.size:
            counts[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = family.experts.size
    for key, setting in counts.items():
        default = config.get("num_attention_heads") if key == Keys.Attention.HEAD_COUNT_KV else None
        config[setting] = settings.count(header, _short(key), default)
    if config["num_hidden_layers"] > limits.LAYERS:
        raise settings.unfit(header, "block_count", f"more than the {limits.LAYERS:,} that are read")
    if family.experts is not None and config[family.experts.count] > _MOST_EXPERTS:
        raise settings.unfit(header, "expert_count", f"more than the {_MOST_EXPERTS} that llama.cpp runs")
    for key, setting in {Keys.Attention.LAYERNORM_RMS_EPS: "rms_norm_eps", **family.reals}.items():
        config[setting] = settings.number(header, _short(key))
    config |= _heads(family, header, config)
    config |= _rotary(family, header, config, factors)
    if not header.value(f"{arch}.attention.causal", True):
        raise settings.unfit(header, "attention.causal", f"which {name} does not support")
    config |= {"pad_token_id": None, **settings.special_tokens(header)}  # a default may be beyond the vocabulary
    config["vocab_size"] = settings.vocabulary(header, shapes)
    config.setdefault("tie_word_embeddings", "output.weight" not in shapes)
    return config


def origins(config: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: object) -> dict[str, Origin]:
    """Find every tensor of a model in a file.

    Args:
        config: The settings of `read_config`.
        stored: The tensors of the file, without rotary factors.
        where: The file, for error messages.

    Returns:
        The tensors by transformers' names.

    Raises:
        SourceError: A tensor is missing, unknown, or has another shape than the metadata implies.
    """
    family = FAMILIES[config["architectures"][0]]
    found, used, shapes = dict[str, Origin](), set[str](), _shapes(family, config)
    for name, tensors in expected_tensors(family, config):
        parts = []
        for tensor in tensors:
            whole = tensor.stack or tensor.name
            if whole not in stored:
                raise SourceError(f"{where}: lacks {whole}, which this {family.name} must have; fetch it again")
            used.add(whole)
            shape = shapes[_module(name)] if name.endswith(".weight") else shapes[_module(name)][:1]
            shape = (shape[0] // len(tensors), *shape[1:])
            parts.append(_part(stored[whole], whole, tensor.name if tensor.stack else "", shape, config, where))
        for old, new in family.renamed.items():
            name = name.replace(new, old)
        found[name] = Origin(tuple(parts), tensors[0].offset)
    if unknown := [name for name in stored if name not in used]:
        raise SourceError(f"{where}: tensor {unknown[0]} is unknown for {family.name}; use a safetensors checkpoint")
    return found


def _part(
    whole: StoredTensor, name: str, expert: str, shape: tuple[int, ...], config: Mapping[str, Any], where: object
) -> StoredTensor:
    """A stored tensor, or one expert of it, checked against the shape that it must have."""
    family = FAMILIES[config["architectures"][0]]
    count = config[family.experts.count] if expert and family.experts is not None else 0
    expected = (count, *shape) if expert else shape
    if whole.shape != expected and (1, *whole.shape) != expected:
        raise SourceError(
            f"{where}: {name} is {list(whole.shape)}, but by the metadata {list(expected)}; fetch it again"
        )
    if not expert:
        return whole._replace(shape=shape)
    nbytes = whole.nbytes // count
    return whole._replace(shape=shape, offset=whole.offset + expert_of(expert) * nbytes, nbytes=nbytes)


def _short(key: str) -> str:
    """A key without the architecture."""
    return key.partition(".")[2]


def _heads(family: Family, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The size of a head, which must be the same for keys and values, and what follows from it."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    head = settings.count(header, "attention.key_length", usual or 1)
    if settings.count(header, "attention.value_length", head) != head:
        raise settings.unfit(header, "attention.value_length", f"not the {head} of keys")
    rotated = settings.count(header, "rope.dimension_count", head)
    partial = "partial_rotary_factor" in family.rope_keys
    if rotated != head and not (partial and rotated < head):
        raise settings.unfit(header, "rope.dimension_count", f"not the {head} of a head")
    if family.square and head != usual:
        raise settings.unfit(header, "attention.key_length", f"not the {usual} of heads as wide as the hidden state")
    found: dict[str, Any] = {} if family.square else {"head_dim": head}
    if rotated != head:
        found["partial_rotary_factor"] = rotated / head
    if family.norm_offset:  # Gemma scales its queries by this number
        wide = config["num_hidden_layers"] == family.by_hidden_size
        found["query_pre_attn_scalar"] = usual if wide else head
    return found


def _rotary(
    family: Family, header: Header, config: Mapping[str, Any], factors: Mapping[str, Array | None]
) -> dict[str, Any]:
    """The settings of rotary embeddings."""
    arch, context = header.architecture, config["max_position_embeddings"]
    if "longrope" in family.ropes:
        found: dict[str, Any] = {"rope_theta": settings.number(header, "rope.freq_base", 10000.0)}
        if not factors:
            return found
        scaling: dict[str, Any] = {"rope_type": "longrope"}
        for name, key in _FACTORS.items():
            values = factors.get(name)
            if values is None:
                raise SourceError(
                    f"{header.path}: {name} is no list of factors in float32; use a safetensors checkpoint"
                )
            scaling[key] = values.tolist()
        scaling["attention_factor"] = settings.number(header, "rope.scaling.attn_factor", 1.0)
        original = settings.count(header, "rope.scaling.original_context_length", context)
        return found | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    found = settings.rope(header, context)
    if arch == "gpt-oss" and "rope_scaling" not in found:  # transformers' default is scaled
        return {"rope_parameters": {"rope_type": "default", **found}}
    if scaling := found.get("rope_scaling", {}):
        if scaling["rope_type"] not in family.ropes:
            raise settings.unfit(header, "rope.scaling.type", f"which {config['architectures'][0]} does not support")
        if "truncate" in family.rope_keys:
            scaling["truncate"] = False  # as in all models of this class; llama.cpp does not store it
    if arch == "gemma3":
        found["rope_local_base_freq"] = settings.number(header, "rope.freq_base_swa", _LOCAL_THETA)
    return found


def _module(name: str) -> str:
    """The part of a tensor's name that decides its shape: the module without the layer and the expert."""
    words = name.removesuffix(".weight").removesuffix(".bias").split(".")
    return ".".join(words[-1:] if words[-2:-1] and words[-2].isdigit() else words[-2:])


def _shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of weights, by `_module`."""
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "model.norm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.qkv_proj": (queries + 2 * keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.sinks": (config["num_attention_heads"],),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return shapes | _norm_shapes(family, hidden) | _expert_shapes(family, config)


def _norm_shapes(family: Family, hidden: int) -> dict[str, tuple[int, ...]]:
    return {name: (hidden,) for name in family.norms if "." not in name}


def _expert_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if family.experts is None:
        return {}
    hidden = config["hidden_size"]
    size, count = config[family.experts.size or "intermediate_size"], config[family.experts.count]
    shapes: dict[str, tuple[int, ...]] = {family.experts.router: (count, hidden), "mlp.shared_expert_gate": (1, hidden)}
    for part in family.experts.parts:
        shapes[part] = (hidden, size) if part in ("down_proj", "w2") else (size, hidden)
    if "gate_up_proj" in family.experts.parts:
        shapes["gate_up_proj"] = (2 * size, hidden)
    shared = config.get("shared_expert_intermediate_size", 0)
    for part in ("gate_proj", "up_proj", "down_proj"):
        shapes[f"shared_expert.{part}"] = (hidden, shared) if part == "down_proj" else (shared, hidden)
    return shapes
