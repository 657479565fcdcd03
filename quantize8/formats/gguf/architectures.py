"""What llama.cpp stores of each model that is written as GGUF: tensors, their names and order, and settings.

`FAMILIES` has an entry for each of transformers' model classes. Everything below follows from these entries: which
tensors a checkpoint must have and what becomes of each (`tensors_of`), which settings the file gets (`settings`), and
which models are refused because llama.cpp would compute something else (`architecture`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, GGUFValueType, Keys, get_tensor_name_map

from quantize8.errors import SourceError, first_line
from quantize8.formats.base import OutTensor
from quantize8.formats.gguf.settings import rope_factors
from quantize8.kernels.q8_0 import BLOCK, Q8_0
from quantize8.kernels.reference import Array
from quantize8.optional import require
from quantize8.sources.base import architecture_of
from quantize8.sources.guard import guarded

F32 = "F32"
ROUTE = "write bfloat16 or compressed-tensors instead, which llama.cpp's convert_hf_to_gguf.py can make a GGUF of"

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_O = "self_attn.o_proj"
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GATE, _UP, _DOWN = MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP
_IGNORED = ".rotary_emb.inv_freq"  # a buffer in old checkpoints, which transformers computes itself
_EXPERT_COUNTS = ("num_experts", "num_local_experts")
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"  # kinds of layers, in settings
_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Experts:
    """How a family stores its experts.

    Attributes:
        router: The module that chooses among the experts; llama.cpp keeps it in float32, as it is small.
        parts: Matrix of an expert, by its name after the number of the expert -> the tensors of the file in which it is
            one of E. Rows of a matrix that goes into two tensors alternate between them.
        count: The setting with the number of experts.
        size: The setting with their intermediate size, if llama.cpp reads it separately from that of a dense model.
        biased: Whether the router and each matrix have a bias.
        shared: Modules of the expert that every token passes through.
        shared_gate: The module with the weight [1, H] of that expert, which llama.cpp stores as [H] in float32.
    """

    router: str = "mlp.gate"
    parts: Mapping[str, tuple[MODEL_TENSOR, ...]] = field(
        default_factory=lambda: {"gate_proj": (_GATE,), "up_proj": (_UP,), "down_proj": (_DOWN,)}
    )
    count: str = "num_local_experts"
    size: str = "moe_intermediate_size"
    biased: bool = False
    shared: tuple[str, ...] = ()
    shared_gate: str = ""


@dataclass(frozen=True)
class Family:
    """One of transformers' model classes, as llama.cpp sees it.

    Attributes:
        arch: llama.cpp's architecture.
        linears: Modules of a layer with a weight [N, K].
        norms: Modules of a layer with a weight [N].
        biased: Modules that have a bias in any case.
        biases: Setting -> modules to which it gives a bias. Others must not have one.
        parameters: Parameters of a layer that are no weights of a module -> what llama.cpp calls them.
        experts: The experts that take the place of an MLP; None for a dense model.
        interleaved: Whether rows of query and key heads are stored interleaved (see `GgufTensor.arrange`).
        norm_offset: What the model adds to the weights of norms before it multiplies by them. llama.cpp does not.
        ropes: Types of rotary embedding that llama.cpp computes.
        rope_keys: Further settings of rotary embeddings that may have any value.
        square: Whether all heads together must be as wide as the hidden state.
        window_period: One layer in so many attends to all tokens, the others within a sliding window; 0 if all do.
        by_hidden_size: The number of layers with which llama.cpp takes a model for the one whose queries are scaled by
            hidden_size / heads instead of the size of a head.
        fixed: Setting -> the value that llama.cpp computes with.
        counts: Further keys of whole numbers -> the setting, or the number itself.
        reals: Further keys of real numbers -> the setting.
        renamed: Parts of tensor names -> what transformers' model has in their place.
        dropped: Beginnings of the names of tensors that are left out, as they are not part of the language model.
    """

    arch: MODEL_ARCH
    linears: tuple[str, ...] = (*_QKV, _O, *_MLP)
    norms: tuple[str, ...] = _NORMS
    biased: tuple[str, ...] = ()
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: Mapping[str, MODEL_TENSOR] = field(default_factory=dict)
    experts: Experts | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    rope_keys: tuple[str, ...] = ()
    square: bool = False
    window_period: int = 0
    by_hidden_size: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    counts: Mapping[str, str | int] = field(default_factory=dict)
    reals: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(MODEL_ARCH_NAMES[self.arch])


_LLAMA = Family(
    MODEL_ARCH.LLAMA,
    biases={"attention_bias": (*_QKV, _O), "mlp_bias": _MLP},
    interleaved=True,
    ropes=("default", "linear", "yarn", "llama3"),
)
_QWEN3 = Family(
    MODEL_ARCH.QWEN3,
    norms=(*_NORMS, *_HEAD_NORMS),
    fixed={"hidden_act": "silu", "attention_bias": False},
)
_GEMMA2 = Family(
    MODEL_ARCH.GEMMA2,
    norms=(*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    ropes=("default",),
    window_period=2,
    by_hidden_size=46,  # layers of Gemma 2 27B
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
    },
    counts={Keys.Attention.SLIDING_WINDOW: "sliding_window"},
    reals={
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING: "attn_logit_softcapping",
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: "final_logit_softcapping",
    },
)
_GEMMA3 = replace(
    _GEMMA2,
    arch=MODEL_ARCH.GEMMA3,
    norms=(*_GEMMA2.norms, *_HEAD_NORMS),
    ropes=("default", "linear"),
    window_period=6,
    by_hidden_size=62,  # layers of Gemma 3 27B
    fixed={**_GEMMA2.fixed, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    reals={},
)
MULTIMODAL = "Gemma3ForConditionalGeneration"  # of which only the language model is written
_ALL_LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # have experts

FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": replace(
        _LLAMA,
        linears=(*_QKV, _O),
        experts=Experts(parts={"w1": (_GATE,), "w3": (_UP,), "w2": (_DOWN,)}, size=""),
        renamed={".block_sparse_moe.": ".mlp."},
    ),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2, biased=_QKV, square=True),
    "Qwen2MoeForCausalLM": Family(
        MODEL_ARCH.QWEN2MOE,
        linears=(*_QKV, _O),
        biased=_QKV,
        experts=Experts(
            count="num_experts",
            shared=tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
            shared_gate="mlp.shared_expert_gate",
        ),
        square=True,
        fixed={
            "hidden_act": "silu",
            "qkv_bias": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            **_ALL_LAYERS,
        },
        counts={Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: "shared_expert_intermediate_size"},
    ),
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3MoeForCausalLM": replace(
        _QWEN3,
        arch=MODEL_ARCH.QWEN3MOE,
        linears=(*_QKV, _O),
        experts=Experts(count="num_experts"),
        fixed={**_QWEN3.fixed, "norm_topk_prob": True, **_ALL_LAYERS},
    ),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    MULTIMODAL: replace(
        _GEMMA3,
        renamed={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        dropped=tuple(
            f"{base}{part}." for base in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
        ),
    ),
    "Phi3ForCausalLM": Family(
        MODEL_ARCH.PHI3,
        linears=("self_attn.qkv_proj", _O, "mlp.gate_up_proj", "mlp.down_proj"),
        ropes=("default", "longrope"),
        rope_keys=("partial_rotary_factor",),
        square=True,
        counts={Keys.Attention.SLIDING_WINDOW: 0},  # without this key, llama.cpp assumes Phi-3-mini's window
    ),
    "GptOssForCausalLM": Family(
        MODEL_ARCH.GPT_OSS,
        linears=(*_QKV, _O),
        biased=(*_QKV, _O),
        parameters={"self_attn.sinks": MODEL_TENSOR.ATTN_SINKS},
        experts=Experts(
            router="mlp.router",
            parts={"gate_up_proj": (_GATE, _UP), "down_proj": (_DOWN,)},
            size="intermediate_size",
            biased=True,
        ),
        # llama.cpp always rounds the limits of YaRN's ramp to whole features, and gpt-oss does not
        rope_keys=("truncate",),
        window_period=2,
        fixed={
            "hidden_act": "silu",
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
        },
        counts={Keys.Attention.SLIDING_WINDOW: "sliding_window"},
    ),
}
COUNTS = {
    Keys.LLM.BLOCK_COUNT: "num_hidden_layers",
    Keys.LLM.CONTEXT_LENGTH: "max_position_embeddings",
    Keys.LLM.EMBEDDING_LENGTH: "hidden_size",
    Keys.LLM.FEED_FORWARD_LENGTH: "intermediate_size",
    Keys.Attention.HEAD_COUNT: "num_attention_heads",
    Keys.Attention.HEAD_COUNT_KV: "num_key_value_heads",
}
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("short_factor", "long_factor"),
    },
}
_ROPE_NEUTRAL = {"partial_rotary_factor": 1, "truncate": True, "beta_fast": 32, "beta_slow": 1}  # values without effect


class Field(NamedTuple):
    """An entry of the file's metadata; `items` is the type of an array's items."""

    key: str
    value: Any
    kind: GGUFValueType
    items: GGUFValueType | None = None


@dataclass(frozen=True)
class GgufTensor(OutTensor):
    """A tensor to be written, in Q8_0 or F32. Its shape is in NumPy's order, such as [N, K].

    Attributes:
        source: Name of the tensor in the checkpoint; None for a computed tensor.
        head: Number of rows of an attention head, if llama.cpp interleaves them; otherwise 0.
        offset: What is added to the values.
        rows: The rows of the source that it consists of.
        stack: Name of the tensor in the file, [E, N, K] or [E, N], of which this is one expert; empty for all others.
        values: The values of a computed tensor.
    """

    source: str | None = None
    head: int = 0
    offset: float = 0.0
    rows: tuple[int, int] = (0, 1)  # the first one, and the step
    stack: str = ""
    values: Array | None = field(default=None, compare=False)

    @property
    def multiple(self) -> int:
        """Rows of the source can be written in blocks of a multiple of this number."""
        return self.head or self.rows[1]

    def choose(self, rows: Array) -> Array:
        """The rows of the tensor among those of its source.

        Args:
            rows: Consecutive rows of the source [n, ...]; n and the index of the first are multiples of `multiple`.
        """
        first, step = self.rows
        return np.ascontiguousarray(rows[first::step]) if step > 1 else rows

    def arrange(self, rows: Array) -> Array:
        """Put rows into llama.cpp's order.

        Rotary embeddings pair neighboring rows of a head in llama.cpp, but rows of its two halves in transformers.

        Args:
            rows: Consecutive rows [n, ...]; n and the index of the first are multiples of `head`, if it is set.
        """
        if not self.head:
            return rows
        halves = rows.reshape(-1, 2, self.head // 2, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def architecture(config: Mapping[str, Any], where: object) -> str:
    """Look up llama.cpp's name of a model's architecture.

    Args:
        config: The contents of config.json.
        where: The model, for error messages.

    Raises:
        SourceError: The architecture is not supported, or llama.cpp would compute something else with these settings.
    """
    family, full = _family(config, where), complete(config, where)
    _check_rope(family, full, where)
    _check_window(family, full, where)
    for key, expected in family.fixed.items():
        value = full.get(key, expected)
        if value != expected and (value or expected):
            raise SourceError(
                f"{where}: {key} is {value!r}, but llama.cpp's {family.name} computes with {expected!r}; {ROUTE}"
            )
    for key in family.reals.values():
        if not full[key]:
            raise SourceError(f"{where}: {key} is {full[key]!r}, which llama.cpp's {family.name} cannot do; {ROUTE}")
    if "query_pre_attn_scalar" in full:
        _check_scale(family, full, where)
    if family.square and _head_dim(full) * full["num_attention_heads"] != full["hidden_size"]:
        raise SourceError(
            f"{where}: heads of {_head_dim(full)} do not add up to hidden_size, as llama.cpp's {family.name} requires; "
            f"{ROUTE}"
        )
    return family.name


def complete(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Complete a config.json with transformers' defaults.

    Args:
        config: The contents of config.json.
        where: The model, for error messages.

    Returns:
        The settings of the language model.

    Raises:
        SourceError: The architecture is not supported, or transformers cannot read the config.
        DependencyError: transformers or torch is not installed.
    """
    _family(config, where)
    require("to write GGUF", "transformers", "torch")
    from transformers import AutoConfig

    try:
        rest = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        with guarded():
            full: dict[str, Any] = AutoConfig.for_model(config["model_type"], **rest).get_text_config().to_dict()
        for one, other in (_EXPERT_COUNTS, _EXPERT_COUNTS[::-1]):  # releases of transformers differ in the name
            full[one] = full.get(other) if full.get(one) is None else full[one]
    except Exception as error:  # a config.json may contain anything, so any error may be raised
        raise SourceError(f"{where}: transformers cannot read its config.json ({first_line(error)}); fix it") from None
    return full


def tensors_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> list[GgufTensor]:
    """Plan the tensors of a GGUF file from the shapes of a checkpoint's tensors.

    Args:
        config: The contents of config.json.
        shapes: Tensor of the checkpoint -> its shape.
        where: The model, for error messages.

    Returns:
        The computed tensors, followed by those of the checkpoint in its order. The experts of a tensor come one after
        the other, where the checkpoint has the first of them.

    Raises:
        SourceError: A tensor is missing, unknown to the architecture, or has a K that is not a multiple of 32.
    """
    architecture(config, where)
    family, full = _family(config, where), complete(config, where)
    names: dict[str, str] = {}
    for name in shapes:
        if not name.startswith(family.dropped):
            twin = names.setdefault(_in_model(family, name), name)
            if twin != name:
                raise SourceError(f"{where}: holds both {twin} and {name}, which are the same; remove one of them")
    expected = dict(expected_tensors(family, full))
    spare = {name for name in names if name.endswith(_IGNORED)}
    if full["tie_word_embeddings"]:
        spare.add(f"{_HEAD}.weight")
    if missing := sorted(expected.keys() - names.keys()):
        raise SourceError(f"{where}: lacks {missing[0]}, which {family.name} needs; fetch the checkpoint again")
    if unknown := [name for name in names if name not in expected and name not in spare]:
        raise SourceError(f"{where}: tensor {unknown[0]} does not exist in llama.cpp's {family.name}; {ROUTE}")
    tensors, stacks = _rope_tensors(full), dict[str, list[GgufTensor]]()
    for name, source in names.items():
        for tensor in expected.get(name, ()):
            placed = _shaped(tensor, source, shapes[source], where)
            stack = stacks.setdefault(placed.stack or placed.name, [])
            stack.append(placed)
            if placed.shape != stack[0].shape:
                raise SourceError(f"{where}: {source} has another shape than {stack[0].source}; fetch it again")
            if len(stack) == 1:
                tensors.append(placed)
    found = []
    for tensor in tensors:
        found += sorted(stacks.get(tensor.stack, [tensor]), key=lambda each: expert_of(each.name))
    return found


def settings(config: Mapping[str, Any], name: str, where: object) -> list[Field]:
    """Make the metadata that comes from config.json: sizes, norms and rotary embeddings.

    Args:
        config: The contents of config.json.
        name: Name of the model.
        where: The model, for error messages.

    Raises:
        SourceError: llama.cpp would compute something else with these settings.
    """
    arch, family, full = architecture(config, where), _family(config, where), complete(config, where)
    whole = {key: full[setting] for key, setting in COUNTS.items()}
    whole |= {
        Keys.Attention.KEY_LENGTH: _head_dim(full),
        Keys.Attention.VALUE_LENGTH: _head_dim(full),
        Keys.Rope.DIMENSION_COUNT: _rotated(full),
        Keys.LLM.VOCAB_SIZE: full["vocab_size"],
    }
    if family.experts is not None:
        whole |= {Keys.LLM.EXPERT_COUNT: full[family.experts.count]}
        whole |= {Keys.LLM.EXPERT_USED_COUNT: full["num_experts_per_tok"]}
        if family.experts.size:
            whole |= {Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: full[family.experts.size]}
    whole |= {key: full[value] if isinstance(value, str) else value for key, value in family.counts.items()}
    rope = _rope(full)
    real = {Keys.Attention.LAYERNORM_RMS_EPS: full["rms_norm_eps"], Keys.Rope.FREQ_BASE: rope["rope_theta"]}
    real |= {key: full[setting] for key, setting in family.reals.items()}
    fields = [Field(Keys.General.TYPE, "model", GGUFValueType.STRING)]
    fields.append(Field(Keys.General.NAME, name, GGUFValueType.STRING))
    if (scaling := rope.get("rope_type")) in ("linear", "yarn"):
        fields.append(Field(Keys.Rope.SCALING_TYPE.format(arch=arch), scaling, GGUFValueType.STRING))
    scaled, context = _scaling(full)
    real, whole = real | scaled, whole | context
    for entries, kind in ((whole, GGUFValueType.UINT32), (real, GGUFValueType.FLOAT32)):
        fields += [Field(key.format(arch=arch), value, kind) for key, value in entries.items()]
    return fields


def _scaling(full: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """The settings of scaled rotary embeddings, apart from their type: real numbers, and whole ones."""
    rope, context = _rope(full), full["max_position_embeddings"]
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings") or context
    factor = rope.get("factor") or context / original
    real: dict[str, float] = {}
    if kind in ("linear", "yarn"):
        real[Keys.Rope.SCALING_FACTOR] = factor
    if kind == "longrope":
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        real[Keys.Rope.SCALING_ATTN_FACTOR] = rope.get("attention_factor") or usual
    if local := full["rope_parameters"].get(_LOCAL):
        real[Keys.Rope.FREQ_BASE_SWA] = local["rope_theta"]
    return real, {Keys.Rope.SCALING_ORIG_CTX_LEN: original} if kind in ("yarn", "longrope") else {}


def _family(config: Mapping[str, Any], where: object) -> Family:
    named = architecture_of(config)
    if named not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SourceError(f"{where}: architecture {named} is not written as gguf (only {known}); {ROUTE}")
    return FAMILIES[named]


def _check_rope(family: Family, full: Mapping[str, Any], where: object) -> None:
    """Refuse rotary embeddings that llama.cpp does not compute."""
    for rope, kinds in ((_rope(full), family.ropes), (full["rope_parameters"].get(_LOCAL) or {}, ("default",))):
        kind = rope.get("rope_type", "default")
        if kind not in kinds:
            raise SourceError(f"{where}: rope type {kind!r} is not written for {family.name}; {ROUTE}")
        known = _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta", *family.rope_keys}
        for key, value in rope.items():
            if key not in known and value not in (None, _ROPE_NEUTRAL.get(key)):
                raise SourceError(f"{where}: rope has {key} = {value!r}, which GGUF's {family.name} lacks; {ROUTE}")
        if kind == "longrope" and not rope["original_max_position_embeddings"] > 1:
            raise SourceError(f"{where}: rope has original_max_position_embeddings below 2; fix its config.json")


def _check_scale(family: Family, full: Mapping[str, Any], where: object) -> None:
    """Refuse attention that is scaled otherwise than in llama.cpp."""
    scale, expected = full["query_pre_attn_scalar"], _head_dim(full)
    if full["num_hidden_layers"] == family.by_hidden_size:
        expected = full["hidden_size"] // full["num_attention_heads"]
    if scale != expected:
        raise SourceError(
            f"{where}: query_pre_attn_scalar is {scale!r}, but llama.cpp's {family.name} computes with {expected}; "
            f"{ROUTE}"
        )


def _check_window(family: Family, full: Mapping[str, Any], where: object) -> None:
    """Refuse a sliding window that llama.cpp does not compute."""
    window = full.get("sliding_window") if full.get("use_sliding_window", True) else None
    if period := family.window_period:
        kinds = [_LOCAL if number % period else _GLOBAL for number in range(1, 1 + full["num_hidden_layers"])]
        if not window or full["layer_types"] != kinds:
            raise SourceError(
                f"{where}: layer_types and sliding_window differ from llama.cpp's {family.name}, where one layer in "
                f"{period} attends to all tokens and the others have a window; {ROUTE}"
            )
    elif window is not None and window < full["max_position_embeddings"]:
        raise SourceError(
            f"{where}: attention looks back {window} tokens, but at all tokens in llama.cpp's {family.name}; "
            f"set max_position_embeddings in config.json to {window}, up to which both compute the same"
        )


def _rope(full: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding of the layers that attend to all tokens."""
    rope: dict[str, Any] = full["rope_parameters"]
    rope = rope.get(_GLOBAL, rope)
    return rope


def _head_dim(full: Mapping[str, Any]) -> int:
    return int(full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"])


def _rotated(full: Mapping[str, Any]) -> int:
    """The number of features of a head that are rotated."""
    return int(_head_dim(full) * (_rope(full).get("partial_rotary_factor") or 1))


def _in_model(family: Family, name: str) -> str:
    """The name that a tensor of the checkpoint has in transformers' model."""
    for old, new in family.renamed.items():
        name = name.replace(old, new)
    return name


def expected_tensors(family: Family, full: Mapping[str, Any]) -> Iterator[tuple[str, list[GgufTensor]]]:
    """The tensors that a model has in transformers -> what is written of each, without source and shape."""
    layers, head = full["num_hidden_layers"], _head_dim(full) if family.interleaved else 0
    names = get_tensor_name_map(family.arch, layers)
    biased = {*family.biased, *(name for key, group in family.biases.items() if full.get(key) for name in group)}

    def of_module(module: str, kind: str = Q8_0, of_head: int = 0, ends: Iterable[str] = ("weight",)) -> Any:
        offset = family.norm_offset if module.endswith("norm") else 0.0
        for end in ends:
            stored = GgufTensor(f"{names.get_name(module)}.{end}", F32 if end == "bias" else kind, (), None, of_head)
            yield f"{module}.{end}", [replace(stored, offset=offset)]

    yield from of_module(_EMBEDDING)
    yield from of_module(_FINAL_NORM, F32)
    if not full["tie_word_embeddings"]:
        yield from of_module(_HEAD)
    for layer in range(layers):
        base = f"model.layers.{layer}."
        for module in family.linears:
            ends = ("weight", "bias") if module in biased else ("weight",)
            yield from of_module(base + module, Q8_0, head if module in _QKV[:2] else 0, ends)
        for module in family.norms:
            yield from of_module(base + module, F32)
        for parameter, tensor in family.parameters.items():
            yield base + parameter, [GgufTensor(f"{_named(tensor, layer)}.weight", F32, ())]
        if family.experts is not None:
            ends = ("weight", "bias") if family.experts.biased else ("weight",)
            yield from of_module(base + family.experts.router, F32, 0, ends)
            for module in family.experts.shared:
                yield from of_module(base + module)
            if family.experts.shared_gate:
                yield from of_module(base + family.experts.shared_gate, F32)
            yield from _of_experts(family.experts, full, layer, ends)


def _of_experts(
    experts: Experts, full: Mapping[str, Any], layer: int, ends: Iterable[str]
) -> Iterator[tuple[str, list[GgufTensor]]]:
    """The tensors of the experts of a layer, as `expected_tensors` gives them."""
    module = f"model.layers.{layer}.{experts.router.rpartition('.')[0]}.experts"
    for number in range(full[experts.count]):
        for part, tensors in experts.parts.items():
            for end in ends:
                kind, stacks = F32 if end == "bias" else Q8_0, [f"{_named(each, layer)}.{end}" for each in tensors]
                yield (
                    f"{module}.{number}.{part}.{end}",
                    [
                        GgufTensor(f"{stack}[{number}]", kind, (), rows=(first, len(stacks)), stack=stack)
                        for first, stack in enumerate(stacks)
                    ],
                )


def _named(tensor: MODEL_TENSOR, layer: int) -> str:
    return str(TENSOR_NAMES[tensor]).format(bid=layer)


def expert_of(name: str) -> int:
    """The number of the expert that a tensor is; 0 if it is none."""
    return int(name.rpartition("[")[2].rstrip("]")) if name.endswith("]") else 0


def _shaped(tensor: GgufTensor, source: str, shape: tuple[int, ...], where: object) -> GgufTensor:
    """A tensor with its source, and the shape that follows from the source's."""
    if tensor.dtype == F32 and len(shape) == 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) not in (1, 2) or shape[0] % tensor.multiple or (tensor.dtype == Q8_0 and len(shape) == 1):
        raise SourceError(f"{where}: {source} has the shape {list(shape)}; fetch the checkpoint again")
    if tensor.dtype == Q8_0 and shape[1] % BLOCK:
        raise SourceError(f"{where}: {source} has {shape[1]} columns, not a multiple of Q8_0's {BLOCK}; {ROUTE}")
    return replace(tensor, source=source, shape=(shape[0] // tensor.rows[1], *shape[1:]))


def _rope_tensors(full: Mapping[str, Any]) -> list[GgufTensor]:
    """The factors by which llama.cpp divides the rotary frequencies, if a model has llama3 or longrope scaling.

    Of longrope's, llama.cpp takes the long ones if its context is longer than the original one.
    """
    rope, factors = _rope(full), dict[str, Array]()
    if rope.get("rope_type") == "llama3":
        factors["rope_freqs"] = rope_factors(rope["rope_theta"], _head_dim(full), rope)
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            factors[f"rope_factors_{kind}"] = np.asarray(rope[f"{kind}_factor"], np.float32)
    return [GgufTensor(f"{name}.weight", F32, values.shape, values=values) for name, values in factors.items()]
