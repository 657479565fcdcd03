"""Which tensors of a checkpoint are the weights of Linear layers, according to transformers' code of the architecture.

The model is built without storage (on torch's meta device). This distinguishes Linear layers from embeddings, routers
and norms by their type. It also shows which layers transformers itself leaves in float, and which tensors the model
needs but the checkpoint lacks or has in another shape. The common decoder families name their layers alike: if a
checkpoint has exactly the tensors of one of them, names and shapes are enough, and neither torch nor transformers is
imported (a test checks that both ways give the same answer). If transformers does not know the architecture, only
names and shapes decide, and `Structure.guessed` says so.

Some checkpoints have an extra layer for multi-token prediction (MTP: `model.layers.61` of DeepSeek-V3, `mtp.` of
Qwen3-Next). transformers drops it; vLLM and SGLang run it, with the same code as the layers before it. So each of its
weights is treated like its counterpart in those layers. A weight without a counterpart stays in float, as it is an
nn.Linear in vLLM.

In a language model that also takes images or sound, only the language model becomes int8: the encoders (towers) and
projectors before it are small, and sensitive to rounding.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from quantize8.errors import SourceError
from quantize8.optional import require
from quantize8.sources.base import FLOATING, Checkpoint, TensorInfo, architecture_of
from quantize8.sources.experts import (
    OF_EXPERT,
    FusedExperts,
    Fusion,
    Slice,
    SplitExperts,
    fusions_of,
    layouts_of,
    slices_of,
)
from quantize8.sources.native import build_meta_model, is_known
from quantize8.sources.reading import read_by_code, read_on_loading

LINEAR, CONV1D = "Linear", "Conv1D"  # Conv1D is GPT-2's Linear, with its weight stored [in, out]
EXPERT = "expert"  # a matrix of one expert, which checkpoints store separately and transformers joins with the others
# A matrix of an expert whose gate and up projection are one matrix with alternating rows (gpt-oss). vLLM's loader of
# such a model takes int8 only if it is packed (vllm 0.32, models/gpt_oss.py, GptOssRoutedExperts.weight_loader).
PACKED_EXPERT = "packed expert"
EMBEDDED = "Embedding"  # the input embedding

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.model.")
_OLD_BUFFER = ".rotary_emb.inv_freq"  # which earlier releases of transformers saved
_IN_LAYER = re.compile(r"(.+?)\.\d+\.(.+)")  # a list of layers, and a module of one
_FURTHER = re.compile(r"(^|\.)mtp")  # a list of layers for multi-token prediction
READ_BY_CODE = "the model's code reads its weight, and would take int8 codes for it"
_SCALE = "scale"  # a tensor of a quantized module besides its weight, by any name
_CONVERTED = "transformers splits it, or joins it with others, while it loads the model"
_RENAMED = "transformers renames its weight while it loads the model, but would not rename its scales"
_FOREIGN = "not part of transformers' model"
FUSED_EXPERTS = "experts in one tensor, which this format cannot hold in int8"
_MTP = "a layer for multi-token prediction, which vLLM runs and transformers does not load"
_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|ln_|position|token_type|shared|relative_attention|router|gate$|head$")


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


@dataclass
class Structure:
    """The Linear-like modules of a model, and what the checkpoint lacks.

    Attributes:
        linears: LINEAR or CONV1D, by module name in the checkpoint, for each module whose weight may become int8.
        kept: The reason, by module name in the checkpoint, for each module that stays in float because transformers'
            8-bit loading leaves it alone or does not know it.
        output_head: The module of `kept` that is the output head and has its own weight (not tied), if there is one.
        embedding: The module of the input embedding, if it is an ordinary one.
        tied_head: The output head, if it has no weight of its own but that of the embedding.
        model_names: The module name in the model, by module name in the checkpoint, if they differ.
        absent: Linear modules of the model (by the model's names) that have no weight of their own in the checkpoint.
        experts: Matrices of single experts, which transformers joins into one tensor that is not a Linear module.
        slices: Matrix or bias of one expert -> its place in a fused tensor of the checkpoint, by name of that tensor.
        fusions: Fused parameter -> the tensors of `experts` that it consists of, if transformers does not join them.
        joinable: Whether transformers joins the matrices that `slices` names while loading.
        runs_experts: Whether all experts are of a layout that is known, so that they can run in int8.
        replaced: Whether transformers replaces these experts with Linear layers when it loads quantized ones.
        others: The reason, by tensor name, for each floating-point tensor that is not the weight of a Linear module.
        towers: The part of the model, by module name in the checkpoint, of each module that is outside of the language
            model, if that is only a part of the model.
        unloaded: The reason, by tensor name, for each tensor that transformers does not load.
        read_on_loading: Modules whose weight transformers reads while it loads the model, even if the checkpoint
            stores the weight under another name.
        missing: Parameters (by the model's names) that the model needs and that are neither stored nor tied.
        wrong_shapes: A sentence for each tensor whose shape differs from what config.json implies.
        wrapped: A sentence if the names have the prefix of a training wrapper, otherwise empty.
        guessed: Why modules were classified by name alone; empty if they were not.
    """

    linears: dict[str, str]
    kept: dict[str, str] = field(default_factory=dict)
    output_head: str | None = None
    embedding: str | None = None
    tied_head: str | None = None
    model_names: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    slices: dict[str, dict[str, Slice]] = field(default_factory=dict)
    fusions: dict[str, Fusion] = field(default_factory=dict)
    joinable: bool = True
    runs_experts: bool = True
    replaced: bool = False
    others: dict[str, str] = field(default_factory=dict)
    towers: dict[str, str] = field(default_factory=dict)
    unloaded: dict[str, str] = field(default_factory=dict)
    read_on_loading: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    wrong_shapes: list[str] = field(default_factory=list)
    wrapped: str = ""
    guessed: str = ""

    def require_complete(self, where: object) -> None:
        """Check that the checkpoint has what the model needs.

        Args:
            where: The checkpoint, for the message.

        Raises:
            SourceError: The checkpoint lacks a parameter, or has a tensor of another shape.
        """
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
            raise SourceError(
                f"{where}: the model needs {self.missing[0]}{more}, which the checkpoint does not have"
                f"{self.wrapped or '; fetch it again, or correct config.json'}"
            )
        if self.wrong_shapes:
            raise SourceError(f"{where}: {self.wrong_shapes[0]}; fetch the checkpoint again, or correct config.json")

    def with_separate_experts(self) -> Structure:
        """The structure of the checkpoint with its fused experts read as one matrix for each expert."""
        split = [name.removesuffix(".weight") for names in self.slices.values() for name in names]
        others = {name: why for name, why in self.others.items() if name not in self.slices}
        weights = [name for name in split if not name.endswith(".bias")]
        if self.replaced:
            return replace(self, linears=self.linears | dict.fromkeys(weights, LINEAR), others=others, slices={})
        return replace(self, experts=[*self.experts, *weights], others=others, slices={})

    def with_fused_experts(self) -> Structure:
        """The structure of the checkpoint with the experts of `fusions` read as transformers' parameters."""
        parts = {name.removesuffix(".weight") for fusion in self.fusions.values() for e in fusion.parts for name in e}
        others = self.others | dict.fromkeys(self.fusions, FUSED_EXPERTS)
        experts = [name for name in self.experts if name not in parts]
        return replace(self, experts=experts, others=others, fusions={})

    def skip_list(self, quantized: set[str]) -> list[str]:
        """The sorted names, as a loader of the model sees them, of all Linear modules that are not in `quantized`."""
        in_float = (set(self.linears) | set(self.kept)) - quantized
        return sorted({*(self.model_names.get(name, name) for name in in_float), *self.absent})


def structure_of(checkpoint: Checkpoint) -> Structure:
    """The structure of a checkpoint. One that sentence-transformers opens is a model without a head."""
    return read_structure(checkpoint.config, checkpoint.tensors, checkpoint.is_encoder)


def with_separate_experts(checkpoint: Checkpoint, structure: Structure) -> tuple[Checkpoint, Structure]:
    """The checkpoint and its structure with one matrix for each expert, as quantized experts are stored."""
    if not structure.slices:
        return checkpoint, structure
    slices = {name: part for parts in structure.slices.values() for name, part in parts.items()}
    return SplitExperts(checkpoint, slices), structure.with_separate_experts()


def with_fused_experts(checkpoint: Checkpoint, structure: Structure) -> tuple[Checkpoint, Structure]:
    """The checkpoint and its structure with experts as transformers loads them."""
    if not structure.fusions:
        return checkpoint, structure
    return FusedExperts(checkpoint, structure.fusions), structure.with_fused_experts()


def read_structure(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], encoder: bool = False) -> Structure:
    """Find the Linear weights among the tensors of a checkpoint.

    Args:
        config: The contents of config.json.
        tensors: The tensors by name.
        encoder: Whether sentence-transformers opens the checkpoint, which takes the model without a head.

    Returns:
        The structure.

    Raises:
        SourceError: transformers cannot build the model from config.json.
    """
    weights = [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    if not encoder and is_plain_decoder(config, tensors):
        linears = {name: LINEAR for name in weights if name not in (EMBEDDING, HEAD)}
        untied = HEAD in weights and not config.get("tie_word_embeddings", False)
        rest = tensors.keys() - {f"{name}.weight" for name in (*linears, HEAD)}
        others = {name: "embedding" if name == f"{EMBEDDING}.weight" else "norm or bias" for name in rest}
        found = Structure(linears, {HEAD: "output head"}, others=others, embedding=EMBEDDING)
        return replace(found, output_head=HEAD) if untied else replace(found, tied_head=HEAD)
    model_type = config.get("model_type")
    require(f"to find the Linear layers of {architecture_of(config) or model_type}", "transformers", "torch")
    if not is_known(config):
        return _by_names(tensors, weights, f"transformers knows no model type {model_type!r}")
    own_code = bool(config.get("auto_map"))
    try:
        model = build_meta_model(config, tensors, encoder)
    except SourceError as error:
        if not own_code:
            raise
        return _by_names(tensors, weights, str(error))
    structure = _from_model(model, tensors, weights)
    foreign = [name for name, why in structure.kept.items() if why == _FOREIGN]
    if own_code and foreign and structure.missing:  # another model than the one that transformers has by this name
        return _by_names(tensors, weights, f"transformers' {type(model).__name__} has no {foreign[0]}")
    return structure


def as_transformers_loads(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with experts as transformers loads them: itself unless it has a matrix for each, unjoined."""
    if not any(map(OF_EXPERT.fullmatch, checkpoint.tensors)):  # without a model, which takes a while to build
        return checkpoint
    return with_fused_experts(checkpoint, structure_of(checkpoint))[0]


def is_skipped(module: str, patterns: list[str]) -> bool:
    """Whether any release of transformers 5 skips a module for these entries of llm_int8_skip_modules.

    The rule of `should_convert_module`: an entry is a regular expression for a prefix, or a plain suffix. Later
    releases require the prefix to end at a dot; this function also counts what the earlier ones match.

    Args:
        module: The name of the module in the model.
        patterns: The entries.
    """
    return any(re.match(entry, module) or module.endswith(entry) for entry in patterns)


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


def _by_names(tensors: Mapping[str, TensorInfo], weights: list[str], why: str) -> Structure:
    doubtful = [name for name in weights if _NOT_LINEAR.search(name.rpartition(".")[2])]
    linears = {name: LINEAR for name in weights if name not in doubtful}
    kept = dict.fromkeys(doubtful, "by name an embedding, a router or a head")
    rest = [name for name in tensors if name.removesuffix(".weight") not in linears.keys() | kept.keys()]
    others = {name: f"of {len(tensors[name].shape)} dimensions, not the weight of a Linear layer" for name in rest}
    return Structure(linears, kept, others=others, guessed=why)


def is_plain_decoder(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a checkpoint is a plain decoder that has exactly the model's tensors, by name and shape."""
    found = {name: info.shape for name, info in tensors.items() if not name.endswith(_OLD_BUFFER)}
    try:
        expected = dict(plain_tensors(architecture_of(config), config))
    except (KeyError, TypeError, ValueError, ArithmeticError):  # settings that are absent or not numbers
        return False
    head = f"{HEAD}.weight"
    if config.get("tie_word_embeddings", False) and head not in found:
        del expected[head]
    return found == expected


def _from_model(model: Any, tensors: Mapping[str, TensorInfo], weights: list[str]) -> Structure:
    """The structure according to a transformers model without storage."""
    from transformers.quantizers.base import get_keys_to_not_convert

    state, conversions = model.state_dict(), conversions_of(model)
    targets = targets_in_model(model, tensors, conversions)
    structure = Structure({}, towers=_outside_of_language(model))
    _add_experts(structure, model, tensors, targets, conversions)
    fixed = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    _add_linears(structure, model, {name: targets[f"{name}.weight"] for name in weights}, fixed)
    _add_others(structure, model, tensors, targets)
    _add_embedding(structure, model, targets)
    _add_unloaded(structure, state, targets)
    present = {targets[f"{name}.weight"].module for name in weights}
    structure.absent = sorted(name for name in linear_kinds(model) if name not in present)
    read = read_on_loading(model)
    structure.read_on_loading = {name for name in weights if targets[f"{name}.weight"].module in read}
    fused = {fusion.parameter for fusion in structure.fusions.values()}
    structure.missing = [name for name in _missing(model, targets) if name not in fused]
    structure.missing += _missing_parts(state, targets)
    structure.wrapped = _wrapped(tensors)
    structure.wrong_shapes = _wrong_shapes(state, targets, tensors)
    return structure


def _add_linears(structure: Structure, model: Any, targets: Mapping[str, Target], fixed: list[str]) -> None:
    """Add the modules with a matrix, by name in the checkpoint, to `linears` or `kept`; skip other kinds of modules."""
    from torch import nn

    modules = linear_kinds(model)
    others = {
        name: f"a {type(module).__name__}, which 8-bit loaders do not replace"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in modules
    }
    known = [name.removesuffix(".weight") for name in model.state_dict()]
    likes = _likes([target.module for target in targets.values()], known)
    head, by_code = model.get_output_embeddings(), read_by_code(model)
    alone = _renamed_alone(model, {name: target.module for name, target in targets.items() if target.pattern is None})
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    experts = set(structure.experts)
    for name, target in targets.items():
        in_model, like = target.module, likes.get(target.module)
        if name in experts or (like is not None and like not in modules and like not in others):
            continue  # an expert, an embedding, or a router
        if in_model != name:
            structure.model_names[name] = in_model
        if target.pattern is not None:
            structure.kept[name] = _CONVERTED
        elif like is None or like in others:
            structure.kept[name] = others.get(like or "", _FOREIGN)
        elif name in alone:
            structure.kept[name] = _RENAMED
        elif like in by_code:
            structure.kept[name] = READ_BY_CODE
        elif not is_skipped(in_model, fixed):
            structure.linears[name] = modules[like]
        else:
            is_head = head is not None and model.get_submodule(like) is head
            structure.kept[name] = "output head" if is_head else "kept in floating point by transformers"
            if is_head and in_model not in tied:
                structure.output_head = name


def _add_experts(
    structure: Structure,
    model: Any,
    tensors: Mapping[str, TensorInfo],
    targets: Mapping[str, Target],
    conversions: Sequence[Any],
) -> None:
    """Add the experts that the checkpoint stores in one tensor, or one by one."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    layouts, state = layouts_of(model, joined_by(conversions)), model.state_dict()
    kinds = {type(model.get_submodule(path)).__name__ for path in layouts}
    structure.replaced = bool(kinds) and kinds <= MODULES_TO_PATCH_FOR_QUANTIZATION.keys()
    for name, target in targets.items():
        steps = [type(step).__name__ for step in target.steps]
        module, _, parameter = target.name.rpartition(".")
        layout = layouts.get(module)
        is_matrix = name.endswith(".weight") and len(tensors[name].shape) == 2
        # of an MTP layer, which the model does not have, only the pattern of the names is known
        stacks = state[target.name].dim() == 3 if target.name in state else "*" in (target.pattern or "")
        if target.pattern is not None and is_matrix and stacks:
            structure.experts.append(name.removesuffix(".weight"))
            structure.runs_experts &= layout is not None or target.name not in state
            continue
        found = layout and layout.find(parameter)
        if layout is None or not found or target.name not in state:
            continue
        shape = tuple(state[target.name].shape)
        if len(tensors[name].shape) == len(shape) and len(steps) <= 1 and {*steps} <= {"Transpose", "Interleave"}:
            always = any(not getattr(step, "check_dims", True) for step in target.steps)
            turned = "Transpose" in steps and (always or tensors[name].shape != shape)
            structure.slices[name] = slices_of(tensors[name], parameter, layout, turned, "Interleave" in steps)
            structure.joinable &= found[0].known and not layout.interleaved
    unknown = {name: target.name for name, target in targets.items() if target.name not in state}
    structure.fusions = fusions_of(unknown, layouts)
    for fusion in structure.fusions.values():
        names = [name for parts in fusion.parts for name in parts]
        structure.experts += [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _add_others(
    structure: Structure, model: Any, tensors: Mapping[str, TensorInfo], targets: Mapping[str, Target]
) -> None:
    """Add the reason for each floating-point tensor that is not the weight of a Linear module."""
    named = structure.linears.keys() | structure.kept.keys() | set(structure.experts)
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, info in tensors.items():
        if info.dtype not in FLOATING or name.removesuffix(".weight") in named:
            continue
        module = targets[name].name.rpartition(".")[0]
        kind = types.get(module, "")
        structure.others[name] = f"a parameter of {kind}" if kind else _FOREIGN
        if kind.endswith("Embedding"):
            structure.others[name] = "embedding"
        if name in structure.slices:
            structure.others[name] = FUSED_EXPERTS


def _add_unloaded(structure: Structure, state: Mapping[str, Any], targets: Mapping[str, Target]) -> None:
    """Add the tensors that the model has no place for."""
    fused = {part for fusion in structure.fusions.values() for parts in fusion.parts for part in parts}
    names = [name for name, target in targets.items() if target.name not in state and not name.endswith(_OLD_BUFFER)]
    likes = _likes([targets[name].module for name in names], [name.removesuffix(".weight") for name in state])
    further = {_layer(name) for name in names if targets[name].module in likes}
    for name in names:
        if name not in fused:
            is_mtp = _layer(name) in further or _FURTHER.search(name)
            structure.unloaded[name] = _MTP if is_mtp else "transformers does not load it"


def _layer(name: str) -> str:
    """The layer that a tensor belongs to, such as model.layers.61; its whole name if there is none."""
    match = _IN_LAYER.fullmatch(name)
    return name.removesuffix(f".{match[2]}") if match else name


def _add_embedding(structure: Structure, model: Any, targets: Mapping[str, Target]) -> None:
    """Add the input embedding, and the output head that shares its weight."""
    from torch import nn

    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # a model with several embeddings, or none
        return
    if not isinstance(embedding, nn.Embedding):
        return
    weight = f"{names[id(embedding)]}.weight"
    stored = [name for name, target in targets.items() if target.name == weight and target.pattern is None]
    if len(stored) != 1 or not stored[0].endswith(".weight"):
        return
    structure.embedding = stored[0].removesuffix(".weight")
    tied = model.all_tied_weights_keys
    name = f"{names.get(id(head), '')}.weight"
    is_tied = type(head) is nn.Linear and tied.get(name) == weight and name not in targets
    if is_tied and targets_in_model(model, [name])[name].name == name:
        structure.tied_head = name.removesuffix(".weight")


def _outside_of_language(model: Any) -> dict[str, str]:
    """The modules outside of the language model -> the part of the model that they belong to.

    Empty unless the model takes text and something else, and has a part for the latter with settings of its own. The
    language model is the part that has the text settings; without such a part, only the other parts are meant.
    """
    from transformers import PreTrainedModel

    if "text" not in _modalities(model) or _modalities(model) == {"text"}:
        return {}
    parts = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    own = {name: module for name, module in parts.items() if module.config is not model.config}
    settings = set()
    for module in parts.values():
        for side in ({"decoder": True}, {"encoder": True}):
            with contextlib.suppress(ValueError):  # several settings for text
                text = module.config.get_text_config(**side)
                settings |= {id(text)} if text is not module.config else set()
    languages = [name for name, module in own.items() if id(module.config) in settings]
    towers = [name for name, module in own.items() if "text" not in _modalities(module)]
    head, outside = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if languages and not any(name == one or name.startswith(f"{one}.") for one in languages):
            words = name.split(".")
            tops = (".".join(words[: i + 1]) for i in range(len(words)))
            outside[name] = next((top for top in tops if not any(_holds(top, one) for one in languages)), "")
        elif not languages and (tower := next((one for one in towers if _holds(one, name)), "")):
            outside[name] = tower
    return {name: part for name, part in outside.items() if part}


def _holds(module: str, other: str) -> bool:
    """Whether a module is the other one, or contains it."""
    return other == module or other.startswith(f"{module}.")


def _modalities(module: Any) -> set[str]:
    """What a model takes: text, image, video or audio."""
    taken = module.input_modalities
    return {taken} if isinstance(taken, str) else set(taken)


def _wrapped(names: Collection[str]) -> str:
    prefix = next((each for each in _WRAPPERS if all(name.startswith(each) for name in names)), "")
    return f": its names begin with {prefix!r}; save the model inside of the wrapper" if prefix and names else ""


class Target(NamedTuple):
    """The parameters or buffers of the model into which transformers loads a tensor of a checkpoint."""

    name: str  # of the parameter or buffer; of the first, if the tensor is split
    pattern: str | None  # of the conversion that joins or splits the tensor; None if the tensor is at most renamed
    others: tuple[str, ...] = ()  # the other parameters, if the tensor is split
    steps: tuple[Any, ...] = ()  # transformers' operations of the conversion

    @property
    def module(self) -> str:
        """The module that has the weight."""
        return self.name.removesuffix(".weight")


def conversions_of(model: Any) -> list[Any]:
    """transformers' rules for loading the tensors of a checkpoint into a model: renamings and converters."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def joined_by(conversions: Sequence[Any]) -> dict[str, list[str]]:
    """What transformers joins while loading: the end of a parameter's name -> the patterns of what it is made of."""
    return {
        entry.target_patterns[0].replace("\\", ""): entry.source_patterns
        for entry in conversions
        if any(type(step).__name__ == "MergeModulelist" for step in getattr(entry, "operations", ()))
        and len(entry.target_patterns) == 1
    }


def targets_in_model(
    model: Any,
    names: Collection[str],
    conversions: Sequence[Any] | None = None,
    further: Collection[str] = (),
) -> dict[str, Target]:
    """Find where transformers loads the tensors of a checkpoint.

    Args:
        model: A transformers model.
        names: The names of the tensors.
        conversions: The rules, as of `conversions_of`; None if they are not known yet.
        further: Names of parameters that the model has besides its own.

    Returns:
        The target of each tensor by name, in the order of `names`.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = conversions_of(model) if conversions is None else conversions
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    made = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = {**model.state_dict(), **dict.fromkeys(further, True)}, model.base_model_prefix
    found: dict[str, Target] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # the model has this very name
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            found[name] = Target(target, None)
        else:
            first, *rest = made[pattern].target_patterns
            others = tuple(target.replace(first, other) for other in rest)
            found[name] = Target(target, pattern, others, tuple(made[pattern].operations))
    return found


def _renamed_alone(model: Any, to_model: Mapping[str, str]) -> set[str]:
    """Modules (in the checkpoint) whose weight gets a name in the model that their scale would not get."""
    scales = {f"{name}.{_SCALE}": f"{inside}.{_SCALE}" for name, inside in to_model.items() if name != inside}
    targets = targets_in_model(model, scales, further={*scales.values()})
    return {name.removesuffix(f".{_SCALE}") for name, wanted in scales.items() if targets[name].name != wanted}


def _missing(model: Any, targets: Mapping[str, Target]) -> list[str]:
    """Parameters that no tensor is loaded into and that transformers neither ties nor initializes by design."""
    present = {name for target in targets.values() for name in (target.name, *target.others)}
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        groups[source] |= {target, source}
    for names in groups.values():
        if names & present:
            present |= names
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in present and not any(pattern.search(name) for pattern in ignored)
    ]


def _missing_parts(state: Mapping[str, Any], targets: Mapping[str, Target]) -> list[str]:
    """A description of each joined tensor of experts for which there are fewer parts than experts."""
    parts: dict[str, Counter[str]] = defaultdict(Counter)
    for target in targets.values():
        if target.pattern is not None and target.name in state:
            parts[target.name][target.pattern] += 1
    return [
        f"{target} ({count} of {len(state[target])} of its {pattern})"
        for target, counts in parts.items()
        for pattern, count in counts.items()
        if max(counts.values()) > 1 and count < len(state[target])
    ]


def _wrong_shapes(
    state: Mapping[str, Any], targets: Mapping[str, Target], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """A sentence for each tensor whose shape differs from the model's; joined and split tensors are not compared."""
    found = []
    for name, target in targets.items():
        if target.pattern is None and target.name in state:
            shape, expected = tensors[name].shape, tuple(state[target.name].shape)
            # a quantized Conv1D is stored transposed
            if sorted(shape) != sorted(expected) or (len(shape) != 2 and shape != expected):
                found.append(f"{name} has the shape {list(shape)}, but config.json says {list(expected)}")
    return found


def linear_kinds(model: Any) -> dict[str, str]:
    """Find the modules that transformers' 8-bit loading replaces, by its own test: exactly nn.Linear, or Conv1D.

    Args:
        model: A transformers model.

    Returns:
        LINEAR or CONV1D by module name.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: CONV1D if isinstance(module, Conv1D) else LINEAR
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def _likes(modules: Collection[str], known: Sequence[str]) -> dict[str, str]:
    """Map each module that the model has to itself, and each module of an MTP layer to its counterpart.

    The counterpart has the same name in another layer of the same list of layers, or of any list if the list itself is
    one of MTP layers.
    """
    found = {name: name for name in known}
    places: dict[str, dict[str, str]] = {}  # name in a layer -> {list: first module of that name}
    for name in known:
        if match := _IN_LAYER.fullmatch(name):
            places.setdefault(match[2], {}).setdefault(match[1], name)
    for name in modules:
        if name not in found and (match := _IN_LAYER.fullmatch(name)):
            lists = places.get(match[2], {})
            like = next(iter(lists.values()), None) if _FURTHER.search(match[1]) else lists.get(match[1])
            if like is not None:
                found[name] = like
    return found
