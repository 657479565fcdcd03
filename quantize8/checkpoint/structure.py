"""Which tensors of a checkpoint are the weights of Linear layers, by the architecture's own code in transformers.

The model is built without storage (torch's meta device), so that embeddings, routers and norms are told from Linear
layers by their type, and the layers that transformers itself would leave alone are known; and so is what the model
needs and the checkpoint lacks, or has in another shape. The common decoder families name their layers alike; where
one of them is there whole, names and shapes are enough, and neither torch nor transformers is imported (a test holds
the two answers equal). An architecture that transformers does not know is judged by names and shapes alone, and
`Structure.guessed` says so.

Some checkpoints hold an extra layer for multi-token prediction (MTP: `model.layers.61` of DeepSeek-V3, `mtp.` of
Qwen3-Next). transformers drops it, vLLM and SGLang run it, built from the same code as the layers before it. So each
of its weights is what its like in those layers is. What has no like stays as it is, as nn.Linear does in vLLM.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quantize8.checkpoint.base import Checkpoint, TensorInfo
from quantize8.checkpoint.native import architecture_of, build_meta_model, is_known
from quantize8.errors import SourceError
from quantize8.optional import require

LINEAR, CONV1D = "Linear", "Conv1D"  # Conv1D is GPT-2's Linear, with its weight stored [in, out]
EXPERT = "expert"  # one matrix of an expert, which checkpoints store apart and transformers joins with the others

# Decoder families of one layout -> the norms of a layer, and which of its Linear layers have a bias without a word
_PLAIN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LlamaForCausalLM": (("input_layernorm", "post_attention_layernorm"), ()),
    "MistralForCausalLM": (("input_layernorm", "post_attention_layernorm"), ()),
    "Qwen2ForCausalLM": (("input_layernorm", "post_attention_layernorm"), ("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": (
        ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
        (),
    ),
    "Gemma2ForCausalLM": (
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        (),
    ),
}
_PLAIN_LINEAR = {
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.model.")
_OLD_BUFFER = ".rotary_emb.inv_freq"  # which earlier releases of transformers saved
_IN_LAYER = re.compile(r"(.+?)\.\d+\.(.+)")  # a list of layers, and a module of one
_FURTHER = re.compile(r"(^|\.)mtp")  # a list of layers for multi-token prediction
# Mamba's forward multiplies by the weight itself instead of calling the layer, so that int8 codes would be taken for it
_READ_DIRECTLY = ("dt_proj",)
_FOREIGN = "no part of transformers' model"
_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|ln_|position|token_type|shared|relative_attention|router|gate$|head$")


@dataclass
class Structure:
    """The Linear-like modules of a model, and what it lacks.

    linears: module name in the checkpoint -> LINEAR or CONV1D, for each whose weight may become int8.
    kept: the same, for those that transformers' 8-bit loading leaves alone, or does not know -> why.
    output_head: which of `kept` is the output head and has a weight of its own (not tied), if there is one.
    model_names: module name in the checkpoint -> in the model, where they differ.
    absent: Linear modules of the model (by the model's names) that have no weight of their own in the checkpoint.
    experts: matrices that transformers joins into one tensor of experts, which is no Linear module.
    read_on_loading: modules whose weight transformers reads while it loads the model, whether or not it is stored so.
    missing: parameters that the model needs (by the model's names) and neither has nor ties.
    wrong_shapes: tensors that have another shape than config.json gives them, in words.
    wrapped: that the names begin as a wrapper of training left them, in words; empty where they do not.
    guessed: why modules were told by names alone, empty where they were not.
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
        """Raise SourceError where the checkpoint `where` lacks what the model needs, or has it in another shape."""
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
            raise SourceError(
                f"{where}: the model needs {self.missing[0]}{more}, which the checkpoint does not have"
                f"{self.wrapped or '; fetch it again, or correct config.json'}"
            )
        if self.wrong_shapes:
            raise SourceError(f"{where}: {self.wrong_shapes[0]}; fetch the checkpoint again, or correct config.json")

    def skip_list(self, quantized: set[str]) -> list[str]:
        """Every Linear module of the model that is not in `quantized`, by the names a loader of the model sees."""
        in_float = (set(self.linears) | set(self.kept)) - quantized
        return sorted({*(self.model_names.get(name, name) for name in in_float), *self.absent})


def structure_of(checkpoint: Checkpoint) -> Structure:
    """See `read_structure`; a checkpoint that sentence-transformers opens is a model without a head."""
    return read_structure(checkpoint.config, checkpoint.tensors, checkpoint.is_encoder)


def read_structure(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], encoder: bool = False) -> Structure:
    """Tell the Linear weights among the tensors of a checkpoint with this config.json; encoder, see `native_class`."""
    weights = [name.removesuffix(".weight") for name, info in tensors.items() if _is_matrix(info)]
    if not encoder and _is_plain_decoder(config, tensors):
        linears = {name: LINEAR for name in weights if name not in (_EMBEDDING, _HEAD)}
        untied = _HEAD in weights and not config.get("tie_word_embeddings", False)
        return Structure(linears, {_HEAD: "output head"}, _HEAD if untied else None)
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
    if own_code and foreign and structure.missing:  # not the model that transformers calls by this name
        return _by_names(weights, f"transformers' {type(model).__name__} has no {foreign[0]}")
    return structure


def is_skipped(module: str, patterns: list[str]) -> bool:
    """Whether some transformers 5 leaves a module alone for these entries of llm_int8_skip_modules.

    Its rule (`should_convert_module`): an entry is a regular expression for a prefix, or a plain suffix. Later
    releases ask the prefix to end at a dot; what the earlier ones would also match counts here.
    """
    return any(re.match(entry, module) or module.endswith(entry) for entry in patterns)


def _by_names(weights: list[str], why: str) -> Structure:
    doubtful = [name for name in weights if _NOT_LINEAR.search(name.rpartition(".")[2])]
    linears = {name: LINEAR for name in weights if name not in doubtful}
    return Structure(linears, dict.fromkeys(doubtful, "by its name an embedding, a router or a head"), guessed=why)


def _is_plain_decoder(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a checkpoint of a family in `_PLAIN` holds exactly the tensors, by name and shape, that the model has."""
    found = {name: info.shape for name, info in tensors.items() if not name.endswith(_OLD_BUFFER)}
    try:
        expected = _plain_tensors(config)
    except (KeyError, TypeError, ValueError, ArithmeticError):  # settings that are absent, or are not what they seem
        return False
    head = f"{_HEAD}.weight"
    if config.get("tie_word_embeddings", False) and head not in found:
        del expected[head]
    return found == expected


def _plain_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model of `_PLAIN`, an untied head among them; KeyError for another."""
    norms, biased = _PLAIN[architecture_of(config) or ""]
    hidden, inner, layers, vocabulary = (
        int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * size, int(config.get("num_key_value_heads") or heads) * size
    outs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    ins = {"o_proj": queries, "down_proj": inner}
    if config.get("attention_bias"):
        biased = (*biased, "q_proj", "k_proj", "v_proj", "o_proj")
    if config.get("mlp_bias"):
        biased = (*biased, "gate_proj", "up_proj", "down_proj")
    layer: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (size,) if name.startswith("self_attn") else (hidden,) for name in norms
    }
    for short, name in _PLAIN_LINEAR.items():
        layer[f"{name}.weight"] = (outs.get(short, hidden), ins.get(short, hidden))
        if short in biased:
            layer[f"{name}.bias"] = (outs.get(short, hidden),)
    matrix = (vocabulary, hidden)
    tensors = {f"{_EMBEDDING}.weight": matrix, "model.norm.weight": (hidden,), f"{_HEAD}.weight": matrix}
    return tensors | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _from_model(model: Any, tensors: Mapping[str, TensorInfo], weights: list[str]) -> Structure:
    """The structure by a model of transformers' without storage."""
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
    to_model = {name: targets[f"{name}.weight"].name.removesuffix(".weight") for name in weights}
    likes = _likes(to_model.values(), [name.removesuffix(".weight") for name in state])
    joined = [name for name in weights if targets[f"{name}.weight"].pattern is not None]
    fixed = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or []), *_READ_DIRECTLY]
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    structure, fused = Structure({}, experts=joined), set(joined)
    for name in weights:
        in_model, like = to_model[name], likes.get(to_model[name])
        if name in fused or (like is not None and like not in modules and like not in others):
            continue  # fused experts, an embedding, or a router
        if in_model != name:
            structure.model_names[name] = in_model
        if like is None or like in others:
            structure.kept[name] = others.get(like or "", _FOREIGN)
            continue
        if not is_skipped(in_model, fixed):
            structure.linears[name] = modules[like]
            continue
        is_head = head is not None and model.get_submodule(like) is head
        structure.kept[name] = "output head" if is_head else "kept in floating point by transformers"
        if in_model.endswith(_READ_DIRECTLY):
            structure.kept[name] = "its model reads the weight itself"
        if is_head and in_model not in tied:
            structure.output_head = name
    present = set(to_model.values())
    structure.absent = sorted(name for name in modules if name not in present)
    read = _read_on_loading(model)
    structure.read_on_loading = {name for name in weights if to_model[name] in read}
    structure.missing = [*_missing(model, targets), *_missing_parts(state, targets)]
    structure.wrapped = _wrapped(tensors)
    structure.wrong_shapes = _wrong_shapes(state, targets, tensors)
    return structure


def _read_on_loading(model: Any) -> set[str]:
    """Linear modules whose weight is read by the initialization of a module around them.

    transformers runs `_init_weights` of a module that has no parameters of its own after loading, too, and trusts that
    tensors that are loaded are not changed; a layer without a tensor called weight fails there. Told by running it, for
    one module of each type, on a model without storage.
    """
    from torch import nn

    def watched(layer: nn.Module, name: str) -> None:
        """Note when `layer.weight` is read, until its class is put back."""

        def weight(self: nn.Module) -> Any:
            found.add(name)
            return self._parameters["weight"]

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"weight": property(weight)})

    result: set[str] = set()
    readers: dict[type, set[str]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in readers:
            found: set[str] = set()
            layers = {path: layer for path, layer in module.named_modules() if path and type(layer) is nn.Linear}
            try:
                for path, layer in layers.items():
                    watched(layer, path)
                with contextlib.suppress(Exception):  # what is initialized in another way is not read in this one
                    model._init_weights(module)
            finally:
                for layer in layers.values():
                    layer.__class__ = nn.Linear
            readers[kind] = found
        result |= {f"{name}.{path}".lstrip(".") for path in readers[kind]}
    return result


def _wrapped(names: Collection[str]) -> str:
    prefix = next((each for each in _WRAPPERS if all(name.startswith(each) for name in names)), "")
    return f": its names begin with {prefix!r}; save the model inside of the wrapper" if prefix and names else ""


class Target(NamedTuple):
    """Where transformers loads a tensor of a checkpoint to."""

    name: str  # of a parameter or buffer of the model; of the first, where the tensor is split
    pattern: str | None  # of the conversion that joins or splits the tensor, None where it is renamed at most
    others: tuple[str, ...] = ()  # the rest of what it is split into


def targets_in_model(model: Any, names: Collection[str]) -> dict[str, Target]:
    """Where transformers loads each of these tensors of a checkpoint to, in the order of `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    made = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Target] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # a name that is the model's own already
            target, pattern = rename_source_key(name, [], [], prefix, state)
        first, *rest = made.get(pattern, ("",))
        found[name] = Target(target, pattern, tuple(target.replace(first, other) for other in rest))
    return found


def _missing(model: Any, targets: Mapping[str, Target]) -> list[str]:
    """Parameters that no tensor goes to and that transformers neither ties nor makes up by design."""
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
    """Tensors of experts that are joined from fewer parts than there are experts, in words."""
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
    """Tensors that are neither joined nor split and have another shape than the model's, in words."""
    found = []
    for name, target in targets.items():
        if target.pattern is None and target.name in state:
            shape, expected = tensors[name].shape, tuple(state[target.name].shape)
            # a quantized Conv1D is stored transposed
            if sorted(shape) != sorted(expected) or (len(shape) != 2 and shape != expected):
                found.append(f"{name} has the shape {list(shape)}, and config.json says {list(expected)}")
    return found


def linear_kinds(model: Any) -> dict[str, str]:
    """Modules that transformers' 8-bit loading replaces, by its own test: exactly nn.Linear, or Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: CONV1D if isinstance(module, Conv1D) else LINEAR
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def _likes(modules: Collection[str], known: Sequence[str]) -> dict[str, str]:
    """Each module that the model knows -> itself; one of an MTP layer -> its like.

    Its like has the same name in another layer of the list, or in any where the list itself is for such layers.
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
