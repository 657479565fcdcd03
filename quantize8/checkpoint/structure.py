"""Which tensors of a checkpoint are the weights of Linear layers, by the architecture's own code in transformers.

The model is built without storage (torch's meta device), so that embeddings, routers and norms are told from Linear
layers by their type, and the layers that transformers itself would leave alone are known. The common decoder
families name their layers alike; for them the names are enough, and neither torch nor transformers is imported (a
test holds the two answers equal). An architecture that transformers does not know is judged by names and shapes.

Some checkpoints hold a layer more, which predicts a further token (MTP: `model.layers.61` of DeepSeek-V3, `mtp.` of
Qwen3-Next). transformers drops it, vLLM and SGLang run it, built from the same code as the layers before it. So each
of its weights is what its like in those layers is. What has no like stays as it is, as nn.Linear does in vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quantize8 import limits
from quantize8.checkpoint.base import TensorInfo
from quantize8.checkpoint.guard import guarded
from quantize8.errors import SourceError, first_line

LINEAR, CONV1D = "Linear", "Conv1D"  # Conv1D is GPT-2's Linear, with its weight stored [in, out]
EXPERT = "expert"  # one matrix of an expert, which checkpoints store apart and transformers joins with the others

_NAMES_SUFFICE = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"}
)
_DECODER_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
_IN_LAYER = re.compile(r"(.+?)\.\d+\.(.+)")  # a list of layers, and a module of one
_FURTHER = re.compile(r"(^|\.)mtp")  # a list of layers that predict further tokens
_FOREIGN = "no part of transformers' model"
_NOT_LINEAR = re.compile(r"embed|wte|wpe|norm|ln_|position|token_type|shared|relative_attention|router|gate$|head$")


@dataclass
class Structure:
    """The Linear-like modules of a model.

    linears: module name in the checkpoint -> LINEAR or CONV1D, for each whose weight may become int8.
    kept: the same, for those that transformers' 8-bit loading leaves alone, or does not know -> why.
    output_head: which of `kept` is the output head and has a weight of its own (not tied), if there is one.
    model_names: module name in the checkpoint -> in the model, where they differ.
    absent: Linear modules of the model (by the model's names) that have no weight of their own in the checkpoint.
    experts: matrices that transformers joins into one tensor of experts, which is no Linear module.
    """

    linears: dict[str, str]
    kept: dict[str, str] = field(default_factory=dict)
    output_head: str | None = None
    model_names: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)

    def skip_list(self, quantized: set[str]) -> list[str]:
        """Every Linear module of the model that is not in `quantized`, by the names a loader of the model sees."""
        in_float = (set(self.linears) | set(self.kept)) - quantized
        return sorted({*(self.model_names.get(name, name) for name in in_float), *self.absent})


def read_structure(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Structure:
    """Tell the Linear weights among the tensors of a checkpoint with this config.json."""
    weights = [name.removesuffix(".weight") for name, info in tensors.items() if _is_matrix(info)]
    architecture = architecture_of(config)
    if architecture in _NAMES_SUFFICE:
        linears = {name: LINEAR for name in weights if _DECODER_LINEAR.fullmatch(name)}
        kept = {name: _FOREIGN for name in weights if name not in linears and name != "model.embed_tokens"}
        kept["lm_head"] = "output head"
        untied = "lm_head" in weights and not config.get("tie_word_embeddings", False)
        return Structure(linears, kept, "lm_head" if untied else None)
    return _from_transformers(config, architecture, weights) or _by_names(weights)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The model class that a config.json names first, None where it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def is_skipped(module: str, patterns: list[str]) -> bool:
    """Whether some transformers 5 leaves a module alone for these entries of llm_int8_skip_modules.

    Its rule (`should_convert_module`): an entry is a regular expression for a prefix, or a plain suffix. Later
    releases ask the prefix to end at a dot; what the earlier ones would also match counts here.
    """
    return any(re.match(entry, module) or module.endswith(entry) for entry in patterns)


def _by_names(weights: list[str]) -> Structure:
    doubtful = [name for name in weights if _NOT_LINEAR.search(name.rpartition(".")[2])]
    linears = {name: LINEAR for name in weights if name not in doubtful}
    return Structure(linears, dict.fromkeys(doubtful, "by its name an embedding, a router or a head"))


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2


def _from_transformers(config: Mapping[str, Any], architecture: str | None, weights: list[str]) -> Structure | None:
    from transformers.quantizers.base import get_keys_to_not_convert

    model = build_meta_model(config, architecture)
    if model is None:
        return None
    modules = linear_kinds(model)
    state = model.state_dict()
    to_model, experts = _names_in_model(model, state, weights)
    likes, joined = _likes(to_model.values(), [name.removesuffix(".weight") for name in state]), set(experts)
    fixed = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    structure = Structure({}, experts=experts)
    for name in weights:
        in_model, like = to_model[name], likes.get(to_model[name])
        if name in joined or (like is not None and like not in modules):
            continue  # fused experts, an embedding, or a router
        if in_model != name:
            structure.model_names[name] = in_model
        if like is None:
            structure.kept[name] = _FOREIGN
            continue
        if not is_skipped(in_model, fixed):
            structure.linears[name] = modules[like]
            continue
        is_head = head is not None and model.get_submodule(like) is head
        structure.kept[name] = "output head" if is_head else "kept in floating point by transformers"
        if is_head and in_model not in tied:
            structure.output_head = name
    present = {to_model[name] for name in weights}
    structure.absent = sorted(name for name in modules if name not in present)
    return structure


def build_meta_model(config: Mapping[str, Any], architecture: str | None) -> Any:
    """The transformers model of a config.json, without storage; None where transformers does not know it."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or config.get("auto_map"):
        return None
    try:
        with guarded():
            settings = CONFIG_MAPPING[model_type].from_dict(
                {key: value for key, value in config.items() if key != "quantization_config"}
            )
        with torch.device("meta"), guarded(), _counted_modules():
            kind: Any = getattr(transformers, architecture or "", None)
            is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
            return kind._from_config(settings) if is_model else transformers.AutoModel.from_config(settings)
    except Exception as error:  # of any kind, as what a config.json may say
        raise SourceError(
            f"config.json: transformers cannot build {architecture or model_type} from it ({first_line(error)})"
        ) from None


@contextmanager
def _counted_modules() -> Iterator[None]:
    """Stop a model that is built with more modules than MODULES."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limits.MODULES:
            raise ValueError(f"it has more than {limits.MODULES:,} modules")

    hook = register_module_module_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


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
    """Each module that the model knows -> itself; one of a layer that predicts further tokens -> its like.

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


def _names_in_model(model: Any, state: Mapping[str, Any], weights: list[str]) -> tuple[dict[str, str], list[str]]:
    """Each weight's module name as transformers renames it on loading, and the weights that it joins with others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names, joined = {}, []
    for name in weights:
        key, converter = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
        names[name] = key.removesuffix(".weight")
        if converter is not None:
            joined.append(name)
    return names, joined
