"""Names and shapes of the tensors of plain decoders: families whose layers all have the same layout.

The names are those of transformers. `structure` recognizes a plain decoder by them without building the model, and
`gguf_settings` derives from them what a GGUF file must hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """What distinguishes the layers of one model class from those of the others."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # each [hidden_size]
    biased: tuple[str, ...] = ()  # Linear layers that have a bias without a setting in config.json
    head_norms: tuple[str, ...] = ()  # each [head_dim]


EMBEDDING, FINAL_NORM, HEAD, LAYERS = "model.embed_tokens", "model.norm", "lm_head", "model.layers"
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "Qwen3ForCausalLM": Family(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "Gemma2ForCausalLM": Family(
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
}
OPTIONAL_BIASES = {  # setting of config.json -> the Linear layers to which it gives a bias
    "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The model class that a config.json names first; None if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def plain_tensors(architecture: str | None, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a plain decoder, in the order of the model.

    Args:
        architecture: The model class, such as "LlamaForCausalLM".
        config: The settings of config.json.

    Yields:
        The embedding [V, H], each layer, the final norm [H], and the output head [V, H] whether or not it is tied.

    Raises:
        KeyError: The architecture is not a plain decoder, or a setting is missing.
        TypeError, ValueError, ArithmeticError: A setting is not a usable number.
    """
    norms, biased, head_norms = FAMILIES[architecture or ""]
    hidden, inner, layers, vocabulary = (
        int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased += tuple(name for setting, names in OPTIONAL_BIASES.items() if config.get(setting) for name in names)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if name in biased:
            shapes[f"{name}.bias"] = shape[:1]
    shapes |= {f"{name}.weight": (head_dim,) for name in head_norms}
    yield f"{EMBEDDING}.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name, shape in shapes.items():
            yield f"{LAYERS}.{layer}.{name}", shape
    yield f"{FINAL_NORM}.weight", (hidden,)
    yield f"{HEAD}.weight", (vocabulary, hidden)
