"""The gguf format: a single file in Q8_0 that llama.cpp runs, for Llama, Mistral, Qwen2 and Qwen3.

llama.cpp has its own tensor names, row order and settings, and supports less than transformers does: a model that it
would compute differently is refused. The position of every byte follows from headers alone, so tensors can be written
in any order.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    get_tensor_name_map,
)

from quantize8.artifact.manifest import summarize
from quantize8.errors import SourceError, first_line
from quantize8.formats import GGUF
from quantize8.formats.base import (
    Format,
    Layout,
    Measured,
    OutTensor,
    Piece,
    Pieces,
    Shard,
    WeightQuantizer,
    cannot_hold,
    check_finite,
)
from quantize8.formats.gguf.header import Header as GgufHeader
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.formats.gguf.settings import rope_factors
from quantize8.kernels import ABSMAX, MSE, q8_0
from quantize8.kernels.q8_0 import BLOCK, Q8_0
from quantize8.kernels.reference import STATS_TILE_ROWS, Array, ColumnStats, as_bytes
from quantize8.optional import require
from quantize8.sources.base import FLOAT4, architecture_of
from quantize8.sources.guard import guarded

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan

F32 = "F32"
ROUTE = "write bfloat16 or compressed-tensors instead, which llama.cpp's convert_hf_to_gguf.py can make a GGUF of"

_ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
_ATTENTION = {name: f"self_attn.{name}_proj" for name in "qkvo"}
_MLP = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_IGNORED = ".rotary_emb.inv_freq"  # a buffer in old checkpoints, which transformers computes itself
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
_ROPE_NEUTRAL = {"partial_rotary_factor": 1, "truncate": True, "beta_fast": 32, "beta_slow": 1}  # values without effect
_OWN_KEYS = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION}
_OWN_KEYS |= {Keys.General.ALIGNMENT, Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT}
_OWN_KEYS.add(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)


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
        values: The values of a computed tensor.
    """

    source: str | None = None
    head: int = 0
    values: Array | None = field(default=None, compare=False)

    def arrange(self, rows: Array) -> Array:
        """Put rows of the source into llama.cpp's order.

        Rotary embeddings pair neighboring rows of a head in llama.cpp, but rows of its two halves in transformers.

        Args:
            rows: Consecutive rows [n, ...]. If `head` is set, n and the index of the first row are multiples of it.
        """
        if not self.head:
            return rows
        halves = rows.reshape(-1, 2, self.head // 2, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


class Header(NamedTuple):
    """The header of a file, the offset of each tensor from the start of the file, and its size; gaps are zeros."""

    content: bytes
    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class Gguf(Format):
    """One file in which every matrix is Q8_0 and every vector float32, with llama.cpp's names and settings."""

    name: str = GGUF
    suffix: str = GGUF
    options: ClassVar[frozenset[str]] = frozenset({"scale"})
    is_folder: ClassVar[bool] = False
    loaders: ClassVar[tuple[str, ...]] = ("llama.cpp", "quantize8")

    def lay_out(self, plan: Plan, max_shard_size: str) -> Layout:
        """See `Format.lay_out`; makes a single file of any size."""
        from quantize8.formats.gguf.tokenizer import tokenizer_fields

        checkpoint = plan.checkpoint
        config, where = checkpoint.config, checkpoint.name
        tensors = tensors_of(config, {name: info.shape for name, info in checkpoint.tensors.items()}, where)
        if isinstance(origin := checkpoint.origin, GgufCheckpoint):
            fields = carried(origin.header)
        else:
            fields = [*settings(config, where, where), *tokenizer_fields(checkpoint.folder, config)]
        start = header(architecture(config, where), fields, tensors)
        outputs: dict[str, list[OutTensor]] = {tensor.source or tensor.name: [tensor] for tensor in tensors}
        return Layout(outputs, [Shard(f"{where}-{Q8_0}.gguf", [*tensors], *start)])

    def quantizes(self, plan: Plan) -> list[str]:
        """See `Format.quantizes`; every matrix is quantized."""
        return [name for name, (tensor,) in plan.outputs.items() if tensor.dtype == Q8_0]

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """See `Format.encode`; a vector becomes float32, a matrix Q8_0, keeping the codes if it is int8 already."""
        (tensor,) = plan.outputs[name]
        assert isinstance(tensor, GgufTensor)
        if tensor.values is not None:
            yield Piece(tensor.name, tensor.values)
            return None
        checkpoint, info = plan.checkpoint, plan.checkpoint.tensors[name]
        measured = Measured(ColumnStats.empty(info.shape[-1]))
        for first_row, block in plan.blocks(info, None, math.lcm(STATS_TILE_ROWS, tensor.head or 1)):
            check_finite(block, info, first_row)
            measured.source.update(as_bytes(block))
            values = data = np.ascontiguousarray(tensor.arrange(block), np.float32)
            if tensor.dtype == Q8_0:
                if info.is_int8:
                    rows = checkpoint.int8_rows(name, first_row, first_row + len(block))
                    data = q8_0.carry_rows(*map(tensor.arrange, rows))
                else:
                    data = q8_0.quantize_rows(values, plan.searches.get(name), info.stored_dtype in FLOAT4)
                if (row := q8_0.first_unfit(data)) is not None:
                    raise cannot_hold(info, first_row + row, "Q8_0's float16 scale")
                measured.add(values, q8_0.row_errors(values, data))
            yield Piece(tensor.name, data, block.nbytes)
        if tensor.dtype != Q8_0:
            return None
        stats, peaks = measured.complete()
        scale = MSE if name in plan.searches else ABSMAX
        return summarize(stats, peaks, info.stored_dtype, measured.source.hexdigest(), False, scale)

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """Not called, because the settings are in the GGUF file."""
        raise NotImplementedError(self.name)


def architecture(config: Mapping[str, Any], where: object) -> str:
    """Look up llama.cpp's name of a model's architecture.

    Args:
        config: The contents of config.json.
        where: The model, for error messages.

    Raises:
        SourceError: The architecture is not supported, or llama.cpp would compute something else with these settings.
    """
    full = complete(config, where)
    kind = _kind(config, where)
    rope = full["rope_parameters"]
    known = _ROPE_KEYS.get(rope.get("rope_type", "default"))
    if known is None or (kind != MODEL_ARCH.LLAMA and rope["rope_type"] == "llama3"):
        raise SourceError(f"{where}: rope type {rope.get('rope_type')!r} is not written for {_name(kind)}; {ROUTE}")
    for key, value in rope.items():
        if key not in known | {"rope_type", "type", "rope_theta"} and value not in (None, _ROPE_NEUTRAL.get(key)):
            raise SourceError(f"{where}: rope has {key} = {value!r}, which GGUF's {_name(kind)} lacks; {ROUTE}")
    window = full.get("sliding_window")
    if window is not None and window < full["max_position_embeddings"]:
        raise SourceError(
            f"{where}: attention looks back {window} tokens, but at all tokens in llama.cpp's {_name(kind)}; "
            f"set max_position_embeddings in config.json to {window}, up to which both compute the same"
        )
    if full["hidden_act"] != "silu":
        raise SourceError(f"{where}: llama.cpp's {_name(kind)} has no activation {full['hidden_act']!r}; {ROUTE}")
    if kind == MODEL_ARCH.QWEN3 and full.get("attention_bias"):
        raise SourceError(f"{where}: attention biases would be lost, as llama.cpp's qwen3 has none; {ROUTE}")
    if kind == MODEL_ARCH.QWEN2 and _head_dim(full) * full["num_attention_heads"] != full["hidden_size"]:
        raise SourceError(
            f"{where}: heads of {_head_dim(full)} do not add up to hidden_size, as llama.cpp's qwen2 requires; {ROUTE}"
        )
    return _name(kind)


def complete(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Complete a config.json with transformers' defaults.

    Args:
        config: The contents of config.json.
        where: The model, for error messages.

    Raises:
        SourceError: The architecture is not supported, or transformers cannot read the config.
        DependencyError: transformers or torch is not installed.
    """
    _kind(config, where)
    require("to write GGUF", "transformers", "torch")
    from transformers import AutoConfig

    try:
        rest = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        with guarded():
            full: dict[str, Any] = AutoConfig.for_model(config["model_type"], **rest).to_dict()
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
        The computed tensors, followed by those of the checkpoint in its order.

    Raises:
        SourceError: A tensor is missing, unknown to the architecture, or has a K that is not a multiple of 32.
    """
    architecture(config, where)
    kind, full = _kind(config, where), complete(config, where)
    head = full["head_dim"] if kind == MODEL_ARCH.LLAMA else 0
    names = get_tensor_name_map(kind, full["num_hidden_layers"])
    expected = set(_expected(full, kind))
    spare = {name for name in shapes if name.endswith(_IGNORED)}
    if full["tie_word_embeddings"]:
        spare.add("lm_head.weight")
    if missing := sorted(expected - set(shapes)):
        raise SourceError(f"{where}: lacks {missing[0]}, which {_name(kind)} needs; fetch the checkpoint again")
    if unknown := [name for name in shapes if name not in expected | spare]:
        raise SourceError(f"{where}: tensor {unknown[0]} does not exist in llama.cpp's {_name(kind)}; {ROUTE}")
    tensors = _rope_tensors(full)
    for source in shapes:
        if source in expected:
            shape, (module, _, end) = shapes[source], source.rpartition(".")
            stored = f"{names.get_name(module)}.{end}"
            turned = head if module.endswith((_ATTENTION["q"], _ATTENTION["k"])) else 0
            tensors.append(GgufTensor(stored, Q8_0 if len(shape) == 2 else F32, shape, source, turned))
            _check_shape(tensors[-1], where)
    return tensors


def settings(config: Mapping[str, Any], name: str, where: object) -> list[Field]:
    """Make the metadata that comes from config.json: sizes, norms and rotary embeddings.

    Args:
        config: The contents of config.json.
        name: Name of the model.
        where: The model, for error messages.

    Raises:
        SourceError: llama.cpp would compute something else with these settings.
    """
    arch, full = architecture(config, where), complete(config, where)
    whole = {
        Keys.LLM.BLOCK_COUNT: full["num_hidden_layers"],
        Keys.LLM.CONTEXT_LENGTH: full["max_position_embeddings"],
        Keys.LLM.EMBEDDING_LENGTH: full["hidden_size"],
        Keys.LLM.FEED_FORWARD_LENGTH: full["intermediate_size"],
        Keys.Attention.HEAD_COUNT: full["num_attention_heads"],
        Keys.Attention.HEAD_COUNT_KV: full["num_key_value_heads"],
        Keys.Attention.KEY_LENGTH: _head_dim(full),
        Keys.Attention.VALUE_LENGTH: _head_dim(full),
        Keys.Rope.DIMENSION_COUNT: _head_dim(full),
        Keys.LLM.VOCAB_SIZE: full["vocab_size"],
    }
    rope = full["rope_parameters"]
    real = {Keys.Attention.LAYERNORM_RMS_EPS: full["rms_norm_eps"], Keys.Rope.FREQ_BASE: rope["rope_theta"]}
    fields = [Field(Keys.General.TYPE, "model", GGUFValueType.STRING)]
    fields.append(Field(Keys.General.NAME, name, GGUFValueType.STRING))
    if (scaling := rope.get("rope_type")) in ("linear", "yarn"):
        fields.append(Field(Keys.Rope.SCALING_TYPE.format(arch=arch), scaling, GGUFValueType.STRING))
        original = rope.get("original_max_position_embeddings") or full["max_position_embeddings"]
        real[Keys.Rope.SCALING_FACTOR] = rope.get("factor") or full["max_position_embeddings"] / original
        if scaling == "yarn":
            whole[Keys.Rope.SCALING_ORIG_CTX_LEN] = original
    for entries, kind in ((whole, GGUFValueType.UINT32), (real, GGUFValueType.FLOAT32)):
        fields += [Field(key.format(arch=arch), value, kind) for key, value in entries.items()]
    return fields


def carried(source: GgufHeader) -> list[Field]:
    """Copy the metadata of a GGUF file, with its tokenizer, but without the entries on how weights are stored."""
    fields = []
    for key, entry in source.entries.items():
        if key not in _OWN_KEYS:
            items = None if entry.items is None else GGUFValueType(entry.items)
            fields.append(Field(key, source.value(key), GGUFValueType(entry.kind), items))
    return fields


def header(arch: str, fields: Iterable[Field], tensors: Sequence[GgufTensor]) -> Header:
    """Make the header of a file with llama.cpp's own writer; the same arguments give the same bytes.

    Args:
        arch: llama.cpp's name of the architecture.
        fields: The metadata.
        tensors: The tensors in storage order.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = GGUFWriter(path, arch)
        for entry in fields:
            if not (entry.kind == GGUFValueType.ARRAY and not entry.value):  # the type of an empty array is unknown
                writer.add_key_value(entry.key, entry.value, entry.kind, entry.items)
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = path.read_bytes()
    content += bytes(-len(content) % writer.data_alignment)
    offsets, position = {}, len(content)
    for tensor in tensors:
        offsets[tensor.name] = position
        position += GGUFWriter.ggml_pad(tensor.nbytes, writer.data_alignment)
    return Header(content, offsets, position)


def _kind(config: Mapping[str, Any], where: object) -> MODEL_ARCH:
    named = architecture_of(config)
    if named not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise SourceError(f"{where}: architecture {named} is not written as gguf (only {known}); {ROUTE}")
    return _ARCHITECTURES[named]


def _name(kind: MODEL_ARCH) -> str:
    return str(MODEL_ARCH_NAMES[kind])


def _head_dim(full: Mapping[str, Any]) -> int:
    return int(full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"])


def _expected(full: Mapping[str, Any], kind: MODEL_ARCH) -> Iterable[str]:
    """Names of the tensors that a model has in transformers."""
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not full["tie_word_embeddings"]:
        yield "lm_head.weight"
    biased = [*_ATTENTION.values()] if full.get("attention_bias") else []
    if kind == MODEL_ARCH.QWEN2:
        biased = [_ATTENTION[name] for name in "qkv"]
    biased += [*_MLP.values()] if full.get("mlp_bias") else []
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if kind == MODEL_ARCH.QWEN3 else []
    for layer in range(full["num_hidden_layers"]):
        for module in (*_ATTENTION.values(), *_MLP.values(), *norms):
            yield f"model.layers.{layer}.{module}.weight"
        yield from (f"model.layers.{layer}.{module}.bias" for module in biased)


def _check_shape(tensor: GgufTensor, where: object) -> None:
    if len(tensor.shape) not in (1, 2) or (tensor.head and tensor.shape[0] % tensor.head):
        raise SourceError(f"{where}: {tensor.source} has the shape {list(tensor.shape)}; fetch the checkpoint again")
    if tensor.dtype == Q8_0 and tensor.shape[1] % BLOCK:
        raise SourceError(
            f"{where}: {tensor.source} has {tensor.shape[1]} columns, not a multiple of Q8_0's {BLOCK}; {ROUTE}"
        )


def _rope_tensors(full: Mapping[str, Any]) -> list[GgufTensor]:
    """The factors by which llama.cpp divides the rotary frequencies, if a model has llama3 scaling."""
    rope = full["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return []
    values = rope_factors(rope["rope_theta"], _head_dim(full), rope)
    return [GgufTensor("rope_freqs.weight", F32, values.shape, values=values)]
