"""The class with which transformers runs a checkpoint, chosen and built as its own loaders do, but without storage.

A `model_type` that transformers knows decides, even if config.json also names code of its own: `auto_map`, which many
public copies still contain from the time before transformers supported the model. That code is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quantize8 import limits
from quantize8.errors import SourceError, first_line
from quantize8.sources.base import architecture_of
from quantize8.sources.guard import guarded

_FLOAT = "__float__"  # transformers 5 writes {"__float__": "Infinity"}, as JSON has no infinity
_DTYPES = ("dtype", "torch_dtype")
_QUANTIZATION = "quantization_config"
# The suffix that names a task in a class of config.json -> transformers' table of the classes for that task. It is used
# for class names that transformers does not have, such as MPTForCausalLM or RWForCausalLM.
_TASKS = {
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "LMHeadModel": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "ForConditionalGeneration": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "ForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


@dataclass(frozen=True)
class Native:
    """A model class of transformers, with its settings and further arguments of its constructor."""

    kind: Any
    settings: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, **given: Any) -> Any:
        """Build the model with initial weights, on torch's default device; transformers' errors are passed on."""
        make = getattr(self.kind, "_from_config", None) or self.kind.from_config
        return make(self.settings, **self.arguments, **given)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has classes for the `model_type` of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def native_class(config: Mapping[str, Any], names: Collection[str] = (), encoder: bool = False) -> Native:
    """Choose the class that loads a checkpoint of a known `model_type`.

    Args:
        config: The contents of config.json.
        names: The names of the tensors. They decide if config.json names no class, and whether the model has a pooling
            layer, which transformers would otherwise initialize at random.
        encoder: Whether sentence-transformers opens the checkpoint; it takes the model without a head, whatever class
            config.json names.

    Returns:
        The class, its settings, and the arguments to build it with.

    Raises:
        SourceError: transformers cannot read the settings.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with guarded():
            settings = CONFIG_MAPPING[config["model_type"]].from_dict(_decoded(config))
        kind = _class_of(settings, architecture_of(config), names, encoder)
    except Exception as error:  # a config.json may contain anything, so transformers may raise anything
        raise SourceError(f"config.json: transformers cannot read its settings ({first_line(error)})") from None
    pools = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    has_pooler = any("pooler." in name for name in names) or not names
    return Native(kind, settings, {"add_pooling_layer": False} if pools and not has_pooler else {})


def build_meta_model(config: Mapping[str, Any], names: Collection[str] = (), encoder: bool = False) -> Any:
    """Build the transformers model of a config.json, without storage.

    Args:
        config: The contents of config.json.
        names: See `native_class`.
        encoder: See `native_class`.

    Returns:
        The model on the meta device, None if transformers does not know its `model_type`.

    Raises:
        SourceError: transformers cannot read the settings or build the model, or it has more modules than MODULES.
    """
    import torch

    if not is_known(config):
        return None
    native = native_class(config, names, encoder)
    try:
        with torch.device("meta"), guarded(), _counted_modules():
            return native.build()
    except Exception as error:  # as above
        raise SourceError(
            f"config.json: transformers cannot build {native.kind.__name__} from it ({first_line(error)})"
        ) from None


def _class_of(settings: Any, architecture: str | None, names: Collection[str], encoder: bool) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    kind = type(settings)
    base = _first(modeling_auto.MODEL_MAPPING.get(kind, transformers.AutoModel))
    if encoder:
        # sentence-transformers takes only the encoder of an encoder-decoder model
        return getattr(transformers, f"{base.__name__.removesuffix('Model')}EncoderModel", base)
    named = getattr(transformers, architecture or "", None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    causal = _first(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, base))
    if architecture is None:
        prefix = f"{getattr(causal, 'base_model_prefix', None) or 'model'}."
        return causal if any(name.startswith(prefix) for name in names) else base
    for ending, table in _TASKS.items():
        if architecture.endswith(ending):
            return _first(getattr(modeling_auto, table).get(kind, base))
    return base


def _first(kinds: Any) -> Any:
    """The class of an entry of transformers' tables, or the first if it lists several."""
    return kinds[0] if isinstance(kinds, tuple) else kinds


def _decoded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare a config.json for transformers: decode infinities and NaN, and drop "auto" dtypes and quantization."""

    def value_of(value: Any) -> Any:
        if isinstance(value, list):
            return [value_of(each) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: value_of(each) for key, each in value.items() if not (key in _DTYPES and each == "auto")}

    result: dict[str, Any] = value_of({key: value for key, value in config.items() if key != _QUANTIZATION})
    return result


@contextmanager
def _counted_modules() -> Iterator[None]:
    """Raise ValueError within the block once a model has more modules than MODULES."""
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
