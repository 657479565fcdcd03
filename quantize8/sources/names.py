"""Under which names a checkpoint stores the weights of modules that are named as in a transformers model."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

from quantize8.errors import SourceError
from quantize8.optional import require
from quantize8.sources.base import Checkpoint, architecture_of
from quantize8.sources.native import build_meta_model, is_known
from quantize8.sources.structure import (
    CONV1D,
    EMBEDDING,
    HEAD,
    Target,
    is_plain_decoder,
    linear_kinds,
    targets_in_model,
)


class Stack(NamedTuple):
    """A parameter of a module of experts.

    Attributes:
        name: Its name in the model.
        shape: Its shape, with the number of experts first.
        transposed: Whether each expert's matrix is [K, N], and not [N, K] as that of a Linear layer.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


class Part(NamedTuple):
    """A tensor of the checkpoint that is the matrix of one expert, or some of its rows.

    Attributes:
        name: The name of the tensor.
        expert: The number of the expert.
        start: The first of the rows.
    """

    name: str
    expert: int
    start: int


class ModelNames:
    """The tensors of a checkpoint by the names of the model, of this or an earlier release of transformers.

    Args:
        checkpoint: The checkpoint.
        asked: The names of weights that will be looked up, such as "model.layers.0.mlp.up_proj.weight".

    Raises:
        DependencyError: torch and transformers are needed for this model, and missing.
    """

    def __init__(self, checkpoint: Checkpoint, asked: Collection[str]) -> None:
        self._tensors = checkpoint.tensors
        self._in_model: dict[str, Target] = {}  # tensors of the checkpoint, and names that are asked for -> parameter
        self._stored: dict[str, str] = {}  # parameter -> the one tensor that is read into it
        self._shared: dict[str, set[str]] = {}  # parameter -> all that are the same, with itself
        self._conv1d: set[str] | None = set()  # modules of the model; None if its code is not known
        self._model: Any = None  # without storage; None if it is not needed or not known
        config = checkpoint.config
        if not checkpoint.is_encoder and is_plain_decoder(config, checkpoint.tensors):
            prefix = EMBEDDING.partition(".")[0]  # which the model without its head does not have
            whole = {name: f"{prefix}.{name}" for name in asked if name not in self._tensors}
            self._in_model = {name: Target(full, None) for name, full in whole.items() if full in self._tensors}
            self._stored = {name: name for name in checkpoint.tensors}
            if config.get("tie_word_embeddings", False):
                self._share(f"{EMBEDDING}.weight", f"{HEAD}.weight")
            return
        require(f"to find the layers of {architecture_of(config) or config.get('model_type')}", "transformers", "torch")
        model = None
        if is_known(config):
            try:
                model = build_meta_model(config, checkpoint.tensors, checkpoint.is_encoder)
            except SourceError:
                if not config.get("auto_map"):
                    raise
        if model is None:
            self._conv1d = None
            return
        self._model, found = model, targets_in_model(model, checkpoint.tensors)
        self._in_model = {**targets_in_model(model, asked), **found}
        self._stored = {target.name: name for name, target in found.items() if target.pattern is None}
        self._conv1d = {name for name, kind in linear_kinds(model).items() if kind == CONV1D}
        for target, source in model.all_tied_weights_keys.items():
            self._share(source, target)

    def stored(self, weight: str) -> str | None:
        """The tensor of the checkpoint that is this weight alone; None if there is none."""
        if weight in self._tensors:
            return weight
        target = self._in_model.get(weight, Target(weight, None))
        return self._stored.get(target.name) if target.pattern is None else None

    def is_conv1d(self, name: str, otherwise: bool) -> bool:
        """Whether a tensor of the checkpoint is the weight of a Conv1D; `otherwise` if the model is not known."""
        return otherwise if self._conv1d is None else self._parameter(name).removesuffix(".weight") in self._conv1d

    def tied(self, name: str) -> list[str]:
        """The other parameters of the model that are the same as that of a weight; usually none."""
        parameter = self._parameter(name)
        return sorted(self._shared.get(parameter, set()) - {parameter})

    def apart(self, name: str) -> tuple[str, str] | None:
        """A pair of tied parameters, of which the checkpoint stores one under its own name, and the other not at all.

        Args:
            name: One of them, in the model or in the checkpoint.

        Returns:
            The stored one and the other; None if the weight is not one of such a pair.
        """
        group = self._shared.get(self._parameter(name), set())
        read = [each for each in group if each in self._stored or each in self._tensors]
        if len(group) != 2 or len(read) != 1 or self._stored.get(read[0]) != read[0]:
            return None
        (other,) = group - set(read)
        return read[0], other

    def stacks(self, module: str) -> list[Stack]:
        """The parameters of a module itself, in the order of the model; none if the model has no such module."""
        for name in () if self._model is None else (module, f"{self._model.base_model_prefix}.{module}"):
            try:
                owner = self._model.get_submodule(name)
            except AttributeError:
                continue
            transposed = bool(getattr(owner, "is_transposed", False))
            parameters = owner.named_parameters(recurse=False)
            return [Stack(f"{name}.{last}", tuple(value.shape), transposed) for last, value in parameters]
        return []

    def parts(self, stack: Stack) -> list[Part]:
        """The tensors that transformers joins into a parameter, one after the other; none if it does more than that."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        found = self._joined.get(stack.name, {})
        converter = self._converters.get(next(iter(found), ""))
        if converter is None or set(converter.source_patterns) != set(found) or len(converter.target_patterns) > 1:
            return []
        expected = [(MergeModulelist, 0), (Concatenate, 1)][: len(converter.operations)]
        if [(type(each), getattr(each, "dim", None)) for each in converter.operations] != expected:
            return []
        parts, start = [], 0
        for pattern in converter.source_patterns:
            rows = {self._tensors[name].shape[0] for name in found[pattern]}
            if len(found[pattern]) != stack.shape[0] or len(rows) != 1:
                return []
            parts += [Part(name, expert, start) for expert, name in enumerate(found[pattern])]
            start += rows.pop()
        return parts if start == stack.shape[1] else []

    @cached_property
    def _converters(self) -> dict[str, Any]:
        """What joins tensors, by each of its patterns for their names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        entries = (entry for entry in get_model_conversion_mapping(self._model) if isinstance(entry, WeightConverter))
        return {pattern: entry for entry in entries for pattern in entry.source_patterns}

    @cached_property
    def _joined(self) -> dict[str, dict[str, list[str]]]:
        """Parameter -> pattern -> the tensors that are joined into it, experts by number, as transformers does."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, dict[str, list[str]]] = {}
        for name in sorted(self._tensors, key=dot_natural_key):
            target = self._in_model[name]
            if target.pattern is not None:
                found.setdefault(target.name, {}).setdefault(target.pattern, []).append(name)
        return found

    def _parameter(self, name: str) -> str:
        target = self._in_model.get(name)
        return name if target is None else target.name

    def _share(self, one: str, other: str) -> None:
        group = self._shared.get(one, {one}) | self._shared.get(other, {other})
        self._shared |= dict.fromkeys(group, group)
