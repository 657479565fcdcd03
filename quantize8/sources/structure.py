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
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quantize8.errors import SourceError
from quantize8.optional import require
from quantize8.sources.base import Checkpoint, TensorInfo, architecture_of
from quantize8.sources.native import build_meta_model, is_known
from quantize8.sources.reading import read_by_code, read_on_loading

LINEAR, CONV1D = "Linear", "Conv1D"  # Conv1D is GPT-2's Linear, with its weight stored [in, out]
EXPERT = "expert"  # a matrix of one expert, which checkpoints store separately and transformers joins with the others

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.model.")
_OLD_BUFFER = ".rotary_emb.inv_freq"  # which earlier releases of transformers saved
_IN_LAYER = re.compile(r"(.+?)\.\d+\.(.+)")  # a list of layers, and a module of one
_FURTHER = re.compile(r"(^|\.)mtp")  # a list of layers for multi-token prediction
READ_BY_CODE = "the model's code reads its weight, and would take int8 codes for it"
_SCALE = "scale"  # a tensor of a quantized module besides its weight, by any name
_CONVERTED = "transformers splits it, or joins it with others, while it loads the model"
_RENAMED = "transformers renames its weight while it loads the model, but would not rename its scales"
_FOREIGN = "not part of transformers' model"
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
        model_names: The module name in the model, by module name in the checkpoint, if they differ.
        absent: Linear modules of the model (by the model's names) that have no weight of their own in the checkpoint.
        experts: Matrices that transformers joins into one tensor of experts, which is not a Linear module.
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
    model_names: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
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

    def skip_list(self, quantized: set[str]) -> list[str]:
        """The sorted names, as a loader of the model sees them, of all Linear modules that are not in `quantized`."""
        in_float = (set(self.linears) | set(self.kept)) - quantized
        return sorted({*(self.model_names.get(name, name) for name in in_float), *self.absent})


def structure_of(checkpoint: Checkpoint) -> Structure:
    """The structure of a checkpoint. One that sentence-transformers opens is a model without a head."""
    return read_structure(checkpoint.config, checkpoint.tensors, checkpoint.is_encoder)


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
    if not encoder and _is_plain_decoder(config, tensors):
        linears = {name: LINEAR for name in weights if name not in (EMBEDDING, HEAD)}
        untied = HEAD in weights and not config.get("tie_word_embeddings", False)
        return Structure(linears, {HEAD: "output head"}, HEAD if untied else None)
    model_type = config.get("model_type")
    require(f"to find the Linear layers of {architecture_of(config) or model_type}", "transformers", "torch")
    if not is_known(config):
        return _by_names(weights, f"transformers knows no model type {model_type!r}")
    own_code = bool(config.get("auto_map"))
    try:
        model = build_meta_model(config, tensors, encoder)
    except SourceError as error:
        if not own_code:
            raise
        return _by_names(weights, str(error))
    structure = _from_model(model, tensors, weights)
    foreign = [name for name, why in structure.kept.items() if why == _FOREIGN]
    if own_code and foreign and structure.missing:  # another model than the one that transformers has by this name
        return _by_names(weights, f"transformers' {type(model).__name__} has no {foreign[0]}")
    return structure


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


def _by_names(weights: list[str], why: str) -> Structure:
    doubtful = [name for name in weights if _NOT_LINEAR.search(name.rpartition(".")[2])]
    linears = {name: LINEAR for name in weights if name not in doubtful}
    return Structure(linears, dict.fromkeys(doubtful, "by name an embedding, a router or a head"), guessed=why)


def _is_plain_decoder(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool:
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
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    modules = linear_kinds(model)
    others = {
        name: f"a {type(module).__name__}, which 8-bit loaders do not replace"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in modules
    }
    state = model.state_dict()
    targets = targets_in_model(model, tensors)
    found = {name: targets[f"{name}.weight"] for name in weights}
    to_model = {name: target.name.removesuffix(".weight") for name, target in found.items()}
    likes = _likes(to_model.values(), [name.removesuffix(".weight") for name in state])
    fixed = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    by_code, alone = read_by_code(model), _renamed_alone(model, to_model)
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    converted = {name for name, target in found.items() if target.pattern is not None}
    of_linears = {name for name in converted if likes.get(to_model[name]) in modules}
    experts = [name for name in weights if name in converted - of_linears and _is_stacked(state, found[name])]
    structure = Structure({}, dict.fromkeys(sorted(of_linears), _CONVERTED), experts=experts)
    for name in weights:
        in_model, like = to_model[name], likes.get(to_model[name])
        if name in converted or (like is not None and like not in modules and like not in others):
            continue  # experts, an embedding, or a router
        if in_model != name:
            structure.model_names[name] = in_model
        if like is None or like in others:
            structure.kept[name] = others.get(like or "", _FOREIGN)
            continue
        if not (name in alone or like in by_code or is_skipped(in_model, fixed)):
            structure.linears[name] = modules[like]
            continue
        is_head = head is not None and model.get_submodule(like) is head
        unfit = _RENAMED if name in alone else READ_BY_CODE if like in by_code else ""
        structure.kept[name] = unfit or ("output head" if is_head else "kept in floating point by transformers")
        if is_head and not unfit and in_model not in tied:
            structure.output_head = name
    present = {to_model[name] for name in weights if name not in of_linears}
    structure.absent = sorted(name for name in modules if name not in present)
    read = read_on_loading(model)
    structure.read_on_loading = {name for name in weights if to_model[name] in read}
    structure.missing = [*_missing(model, targets), *_missing_parts(state, targets)]
    structure.wrapped = _wrapped(tensors)
    structure.wrong_shapes = _wrong_shapes(state, targets, tensors)
    return structure


def _is_stacked(state: Mapping[str, Any], target: Target) -> bool:
    """Whether a tensor is joined with others to one of experts, which has three dimensions.

    So is one that belongs to another model, such as that for a further token, of which nothing is known.
    """
    value = state.get(target.name)
    return value is None or value.dim() == 3


def _wrapped(names: Collection[str]) -> str:
    prefix = next((each for each in _WRAPPERS if all(name.startswith(each) for name in names)), "")
    return f": its names begin with {prefix!r}; save the model inside of the wrapper" if prefix and names else ""


class Target(NamedTuple):
    """The parameters or buffers of the model into which transformers loads a tensor of a checkpoint."""

    name: str  # of the parameter or buffer; of the first, if the tensor is split
    pattern: str | None  # of the conversion that joins or splits the tensor; None if the tensor is at most renamed
    others: tuple[str, ...] = ()  # the other parameters, if the tensor is split


def targets_in_model(model: Any, names: Collection[str], further: Collection[str] = ()) -> dict[str, Target]:
    """Find where transformers loads the tensors of a checkpoint.

    Args:
        model: A transformers model.
        names: The names of the tensors.
        further: Names of parameters that the model has besides its own.

    Returns:
        The target of each tensor by name, in the order of `names`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    made = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    state, prefix = {**model.state_dict(), **dict.fromkeys(further, True)}, model.base_model_prefix
    found: dict[str, Target] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # the model has this very name
            target, pattern = rename_source_key(name, [], [], prefix, state)
        first, *rest = made.get(pattern, ("",))
        found[name] = Target(target, pattern, tuple(target.replace(first, other) for other in rest))
    return found


def _renamed_alone(model: Any, to_model: Mapping[str, str]) -> set[str]:
    """Modules (in the checkpoint) whose weight gets a name in the model that their scale would not get."""
    scales = {f"{name}.{_SCALE}": f"{inside}.{_SCALE}" for name, inside in to_model.items() if name != inside}
    targets = targets_in_model(model, scales, {*scales.values()})
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
