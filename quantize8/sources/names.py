"""Under which names a checkpoint stores the weights of modules that are named as in a transformers model."""

from __future__ import annotations

from collections.abc import Collection

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
        self._shared: dict[str, str] = {}  # parameter -> another one that is the same
        self._conv1d: set[str] | None = set()  # modules of the model; None if its code is not known
        config = checkpoint.config
        if not checkpoint.is_encoder and is_plain_decoder(config, checkpoint.tensors):
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
        found = targets_in_model(model, checkpoint.tensors)
        self._in_model = {**targets_in_model(model, asked), **found}
        self._stored = {target.name: name for name, target in found.items() if target.pattern is None}
        self._conv1d = {name for name, kind in linear_kinds(model).items() if kind == CONV1D}
        for target, source in model.all_tied_weights_keys.items():
            self._share(source, target)

    def stored(self, weight: str) -> str | None:
        """The tensor of the checkpoint that is this weight alone; None if there is none."""
        if weight in self._tensors:
            return weight
        target = self._in_model.get(weight)
        return self._stored.get(target.name) if target is not None and target.pattern is None else None

    def is_conv1d(self, name: str, otherwise: bool) -> bool:
        """Whether a tensor of the checkpoint is the weight of a Conv1D; `otherwise` if the model is not known."""
        return otherwise if self._conv1d is None else self._parameter(name).removesuffix(".weight") in self._conv1d

    def tied(self, name: str) -> str | None:
        """Another parameter of the model that is the same as that of a tensor of the checkpoint; None without one."""
        return self._shared.get(self._parameter(name))

    def _parameter(self, name: str) -> str:
        target = self._in_model.get(name)
        return name if target is None else target.name

    def _share(self, one: str, other: str) -> None:
        self._shared |= {one: other, other: one}
