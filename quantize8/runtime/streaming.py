"""Running a model that is larger than memory: each weight is read when its module computes, and dropped afterwards.

The model is built without storage. Its weights are read in units. A unit is a block of layers that transformers never
splits over devices (a decoder layer, whose forward may use any of its weights), or, outside of such blocks, a single
module. Reading a unit follows transformers' own rules for loading: its conversion mapping maps names and joins the
experts of a layer.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize8.errors import SourceError, first_line
from quantize8.kernels.reference import Array
from quantize8.memory import giving_back
from quantize8.runtime.double import as_written
from quantize8.runtime.loading import native_of, quiet
from quantize8.runtime.state import LazyTensor, to_torch
from quantize8.sources import Checkpoint
from quantize8.sources.base import FLOATING
from quantize8.sources.guard import guarded
from quantize8.sources.structure import CONV1D, linear_kinds, structure_of, targets_in_model, with_fused_experts


@contextmanager
def streamed(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, narrow: Collection[str] = ()) -> Iterator[Any]:
    """The transformers model of a checkpoint on the CPU, for any number of forward passes.

    Memory holds the buffers, and the weights of the unit that is computing: a decoder layer, or the embedding.
    Quantized weights are dequantized, and the model computes in floating point. `model.device` is meta, but inputs
    must be on the CPU. A module's weights are available in its forward pre-hooks, and in its forward hooks if these are
    registered with `prepend=True`. Results equal those of the same model loaded whole, bit for bit.

    A model is loaded whole if its weights do not map one to one, or many to one, to those of the checkpoint: if
    transformers would split a stored tensor, or generates by design what is not stored.

    Args:
        checkpoint: The checkpoint.
        dtype: The dtype in which the model computes: float32, or float64 within `in_double`.
        narrow: Parameters that are left in float32, for a caller who converts them when they are used. They can be
            added while the context lasts. A model that is loaded whole is in `dtype` altogether.

    Yields:
        The model in eval mode.

    Raises:
        SourceError: transformers cannot run the architecture, or a weight is missing or has another shape than in the
            model.
    """
    with quiet():
        structure = structure_of(checkpoint)
        structure.require_complete(checkpoint.name)
        checkpoint, _ = with_fused_experts(checkpoint, structure)
        model = empty_model(checkpoint, dtype)
        with as_written():
            weights = Weights(model, checkpoint)
        if not weights.complete:
            yield whole_model(checkpoint, dtype)
            return
        _convert_buffers(model, dtype)
        hooks = []
        for module, parameters in _units(model):
            unit = _Unit(weights, parameters, dtype, narrow)
            hooks.append(module.register_forward_pre_hook(unit.read))
            hooks.append(module.register_forward_hook(unit.drop, always_call=True))
    try:
        with giving_back():
            yield model
    finally:
        for hook in hooks:
            hook.remove()


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model with its parameters on the meta device and its buffers initialized; SourceError if that fails."""
    from accelerate import init_empty_weights

    native = native_of(checkpoint)
    try:
        with init_empty_weights(include_buffers=False), guarded():
            return native.build(dtype=dtype).eval()
    except Exception as error:  # a config.json with wrong settings can cause errors of any kind
        raise SourceError(
            f"{checkpoint.folder}: transformers cannot build {native.kind.__name__} from its config "
            f"({first_line(error)})"
        ) from None


def whole_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model with all its weights, dequantized."""
    state = {name: LazyTensor(partial(_rows, checkpoint, name), "F32") for name in checkpoint.tensors}
    given = {"state_dict": state, "dtype": dtype, "device_map": "cpu"}
    native = native_of(checkpoint)
    with guarded():
        return native.kind.from_pretrained(None, config=native.settings, **native.arguments, **given).eval()


def _rows(checkpoint: Checkpoint, name: str) -> Array:
    values: Array = _read(checkpoint, name).numpy()
    return values


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    """A stored tensor, in float32 if it is floating point. It is read in blocks, so that memory holds it once."""
    info = checkpoint.tensors[name]
    if info.dtype not in FLOATING or not info.shape:
        value = to_torch(checkpoint.rows(name, 0, info.shape[0] if info.shape else 1), info.dtype)
        return value.float() if value.is_floating_point() else value
    values, start = torch.empty(info.shape, dtype=torch.float32), 0
    for block in checkpoint.blocks(name):
        values[start : start + len(block)] = to_torch(block, info.dtype)
        start += len(block)
    return values


class Weights:
    """The mapping of a model's parameters to tensors of a checkpoint, through which their values are read.

    Persistent buffers are read into the model at once if the mapping is complete.

    Args:
        model: The model, as of `empty_model`.
        checkpoint: The checkpoint.

    Attributes:
        complete: Whether every parameter maps to stored tensors, and none of them would have to be split.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self._model, self._checkpoint = model, checkpoint
        joining = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in joining for pattern in entry.source_patterns}
        # parameter or buffer -> stored tensors, each with the pattern of the converter that joins them (None: renamed)
        self._sources: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
        self._state = model.state_dict()
        self._conv1d = {name for name, kind in linear_kinds(model).items() if kind == CONV1D}
        in_order = sorted(checkpoint.tensors, key=dot_natural_key)  # experts by number, as transformers joins them
        for name, target in targets_in_model(model, in_order).items():
            if target.name in self._state:
                self._sources[target.name].append((target.pattern, name))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._tie(parameters)
        split = any(self._splits(entries) for entries in self._sources.values())
        self.complete = not split and all(name in self._sources for name in parameters)
        if self.complete:
            self._read_buffers(set(parameters))

    def stored_as(self, name: str) -> list[str]:
        """The names of the stored tensors that a parameter or buffer is made from."""
        return [stored for _, stored in self._sources[name]]

    def is_transposed(self, name: str) -> bool:
        """Whether a parameter is the weight [K, N] of a Conv1D but is stored quantized as [N, K]."""
        module, _, last = name.rpartition(".")
        stored = self._sources[name][0][1]
        return last == "weight" and module in self._conv1d and stored in self._checkpoint.decoded

    def is_one_tensor(self, name: str) -> bool:
        """Whether a parameter is exactly one stored tensor, so that `rows` can read some of its rows."""
        entries = self._sources[name]
        return len(entries) == 1 and entries[0][0] is None and not self.is_transposed(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows from start to before stop of a parameter for which `is_one_tensor` is true, float32."""
        ((_, stored),) = self._sources[name]
        return to_torch(self._checkpoint.rows(stored, start, stop), self._checkpoint.tensors[stored].dtype).float()

    def read(self, name: str) -> Tensor:
        """The value of a parameter or buffer, by its name in the model.

        Raises:
            SourceError: Stored tensors cannot be joined, or the shape is not that of the model.
        """
        entries = self._sources[name]
        pattern, stored = entries[0]
        value = _read(self._checkpoint, stored) if pattern is None else self._joined(name, pattern, entries)
        if self.is_transposed(name):
            value = value.t().contiguous()
        expected = self._state[name].shape
        if value.shape != expected:
            raise SourceError(
                f"{self._checkpoint.folder}: {stored} gives {name} the shape {list(value.shape)}, but config.json "
                f"requires {list(expected)}; fetch the checkpoint again"
            )
        return value

    def _tie(self, parameters: dict[str, Any]) -> None:
        """Map all parameters of a tied group to the stored tensor of the one that is stored."""
        groups: dict[str, set[str]] = defaultdict(set)
        for target, source in self._model.all_tied_weights_keys.items():
            groups[source] |= {target, source}
        for names in groups.values():
            stored = next((self._sources[name] for name in sorted(names) if name in self._sources), None)
            if stored is not None:
                for name in names & set(parameters):
                    self._sources.setdefault(name, stored)

    def _splits(self, entries: list[tuple[str | None, str]]) -> bool:
        pattern = entries[0][0]
        return pattern is not None and len(self._converters[pattern].target_patterns) > 1

    def _joined(self, name: str, pattern: str, entries: list[tuple[str | None, str]]) -> Tensor:
        """The tensor that transformers makes from several stored tensors."""
        converter = copy.deepcopy(self._converters[pattern])
        for source_pattern, stored in entries:
            converter.add_tensor(name, stored, source_pattern, partial(_read, self._checkpoint, stored))
        try:
            joined = converter.convert(name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise SourceError(
                f"{self._checkpoint.folder}: {entries[0][1]} and others cannot be joined into {name} "
                f"({first_line(error)}); fetch the checkpoint again"
            ) from None
        value: Tensor = joined[name][0] if isinstance(joined[name], list) else joined[name]
        return value

    def _read_buffers(self, parameters: set[str]) -> None:
        for name in self._sources.keys() - parameters:
            module, _, last = name.rpartition(".")
            buffers = self._model.get_submodule(module)._buffers
            if last in buffers:
                buffers[last] = self.read(name)


class _Unit:
    """Hooks on a module: its parameters are read before its forward, and dropped afterwards.

    Each parameter is given as (owner, name in the owner, name in the model).
    """

    def __init__(
        self,
        weights: Weights,
        parameters: list[tuple[nn.Module, str, str]],
        dtype: torch.dtype,
        narrow: Collection[str],
    ) -> None:
        self._weights, self._dtype, self._narrow = weights, dtype, narrow
        self._parameters = [  # each with the parameter without values that replaces it
            (owner, last, name, owner._parameters[last]) for owner, last, name in parameters
        ]

    def read(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if any(isinstance(value, Tensor) and value.is_meta for value in inputs):  # torch would compute with noise
            raise ValueError("a streamed model takes its inputs on the CPU, not on model.device")
        for owner, last, name, _empty in self._parameters:
            with as_written():
                value = self._weights.read(name)
                value = value if name in self._narrow or not value.is_floating_point() else value.to(self._dtype)
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)

    def drop(self, *_: Any) -> None:
        for owner, last, _name, empty in self._parameters:
            owner._parameters[last] = empty


def _convert_buffers(model: Any, dtype: torch.dtype) -> None:
    for module in model.modules():
        for last, value in module._buffers.items():
            if value is not None and value.is_floating_point():
                module._buffers[last] = value.to(dtype)


def _units(model: Any) -> list[tuple[nn.Module, list[tuple[nn.Module, str, str]]]]:
    """The modules that are units, with their parameters as (owner, name in the owner, name in the model)."""
    blocks, units = set(model._no_split_modules or ()), []

    def visit(module: nn.Module, prefix: str) -> None:
        whole = bool(prefix) and (type(module).__name__ in blocks or isinstance(module, nn.MultiheadAttention))
        owners = dict(module.named_modules()) if whole else {"": module}
        parameters = [
            (owner, last, ".".join(filter(None, (prefix, path, last))))
            for path, owner in owners.items()
            for last, value in owner._parameters.items()
            if value is not None
        ]
        if parameters:
            units.append((module, parameters))
        for last, child in () if whole else module.named_children():
            visit(child, ".".join(filter(None, (prefix, last))))

    visit(model, "")
    return units
