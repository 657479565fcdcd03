"""The matrices of fused experts under the names that a checkpoint with one matrix for each expert has for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantize8.kernels.reference import Array
from quantize8.runtime.double import as_written
from quantize8.runtime.experts import SeparateExperts
from quantize8.sources import Checkpoint
from quantize8.sources.experts import BIAS, OF_EXPERT, Layout, layouts_of
from quantize8.sources.structure import Structure, Target, conversions_of, joined_by, targets_in_model

# Called with the name of a weight, the weight float32 [N, K] and its input [..., K]; returns what to compute with
Replace = Callable[[str, Array, Tensor], Array]


class Part(NamedTuple):
    """A stored matrix of one expert, and its rows among those of the projection [N, K]."""

    name: str
    rows: slice


Parts = Mapping[str, Mapping[int, list[Part]]]  # parameter of the model -> number of the expert -> its matrices


def experts_of(model: Any, checkpoint: Checkpoint, structure: Structure) -> tuple[dict[str, Layout], Parts]:
    """The fused experts of a model, and what their parameters consist of.

    Args:
        model: A transformers model of the checkpoint.
        checkpoint: The checkpoint as it is stored.
        structure: Its structure.

    Returns:
        The layout by name of the module; and the parts, named as by `with_separate_experts`. Experts of a layout that
        is not known have none.
    """
    conversions = conversions_of(model)
    layouts = layouts_of(model, joined_by(conversions))
    if not layouts:
        return {}, {}
    targets = targets_in_model(model, checkpoint.tensors, conversions)
    found: dict[str, dict[int, list[Part]]] = defaultdict(lambda: defaultdict(list))
    for tensor, slices in structure.slices.items():
        for name, piece in slices.items():
            if name.endswith(".weight"):
                found[targets[tensor].name][piece.expert].append(Part(name, piece.rows))
    for module in structure.experts:
        name = f"{module}.weight"
        place = _joined_place(model, layouts, name, targets.get(name))
        if place is not None:
            parameter, expert, rows = place
            found[parameter][expert].append(Part(name, rows))
    for fusion in structure.fusions.values():
        for expert, names in enumerate(fusion.parts):
            for i, name in enumerate(names):
                if name.endswith(".weight"):
                    rows = _rows(checkpoint.tensors[name].shape[0], i, len(names), fusion.alternate)
                    found[fusion.parameter][expert].append(Part(name, rows))
    return layouts, found


class RoundedExperts(SeparateExperts):
    """transformers' experts, computed one after the other, each matrix replaced when its input is known.

    Args:
        path: Name of the module in the model.
        source: The module, whose parameters [E, N, K] may be in another dtype than its inputs.
        layout: Its layout.
        parts: The parts of all parameters.
        wanted: The names of the matrices to replace.
        replace: What they are replaced by.
    """

    def __init__(
        self, path: str, source: nn.Module, layout: Layout, parts: Parts, wanted: Collection[str], replace: Replace
    ) -> None:
        super().__init__(source, layout)
        self._path, self._parts, self._wanted, self._replace = path, parts, wanted, replace

    def project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        """See `SeparateExperts.project`."""
        values: Tensor = getattr(self._source, name)[expert].detach()
        biases = getattr(self._source, name + BIAS, None)
        with as_written():
            turned = values.t() if self.layout.projections[name].transposed else values
            weight: Array = np.array(turned.float().numpy(), order="C")
            for part in self._parts.get(f"{self._path}.{name}", {}).get(expert, []):
                if part.name in self._wanted:
                    weight[part.rows] = self._replace(part.name, np.ascontiguousarray(weight[part.rows]), inputs)
            whole = torch.from_numpy(weight).to(inputs.dtype)
        return linear(inputs, whole, None if biases is None else biases[expert].to(inputs.dtype))


def _joined_place(
    model: Any, layouts: Mapping[str, Layout], name: str, target: Target | None
) -> tuple[str, int, slice] | None:
    """Parameter, expert and rows of a matrix that transformers joins with others; None if it does not."""
    module, _, last = target.name.rpartition(".") if target is not None else ("", "", "")
    layout, match = layouts.get(module), OF_EXPERT.fullmatch(name)
    projection = layout.projections.get(last) if layout is not None else None
    if target is None or target.pattern is None or projection is None or match is None:
        return None
    if match["part"] not in projection.parts:
        return None
    shape = model.get_submodule(module)._parameters[last].shape
    count, height = len(projection.parts), shape[2 if projection.transposed else 1]
    rows = _rows(height // count, projection.parts.index(match["part"]), count, alternate=False)
    return target.name, int(match["number"]), rows


def _rows(height: int, index: int, count: int, alternate: bool) -> slice:
    """The rows of one of `count` parts of equal height."""
    return slice(index, None, count) if alternate else slice(index * height, (index + 1) * height)
