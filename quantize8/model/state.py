"""A checkpoint as transformers loads it: names of our layers' tensors, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize8.checkpoint import Checkpoint
from quantize8.checkpoint.bitsandbytes import LAYOUT, SCALE
from quantize8.checkpoint.structure import structure_of
from quantize8.model.experts import SCALE as EXPERT_SCALE
from quantize8.ops.reference import Array

_DTYPES = {"BF16": torch.bfloat16}  # where NumPy's own name of a dtype is not torch's


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a state_dict, made when it is indexed with `...`, as transformers indexes slices of safetensors."""

    read: Callable[[], Array]
    dtype: str  # by its safetensors name

    def __getitem__(self, _: Any) -> Tensor:
        return to_torch(self.read(), self.dtype)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return self.dtype


def to_torch(values: Array, dtype: str) -> Tensor:
    """An array as a tensor on the same memory; dtype, by its safetensors name."""
    if dtype in _DTYPES:
        return torch.from_numpy(values.view(np.int16)).view(_DTYPES[dtype])
    return torch.from_numpy(values)


@dataclass(frozen=True)
class LoadPlan:
    """What from_pretrained needs: tensors by name, Linear modules that are not int8, and whether experts are."""

    state: dict[str, LazyTensor]
    skip_modules: list[str]
    int8_experts: bool


def plan_loading(checkpoint: Checkpoint) -> LoadPlan:
    """Linear weights and experts that are stored as int8 stay so; all else is floating point, decoded if need be."""
    structure = structure_of(checkpoint)
    linears = {name for name in (*structure.linears, *structure.kept) if checkpoint.is_int8(f"{name}.weight")}
    int8_experts = bool(structure.experts) and all(checkpoint.is_int8(f"{name}.weight") for name in structure.experts)
    experts = set(structure.experts if int8_experts else ())
    state: dict[str, LazyTensor] = {}
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if name != module and module in linears | experts:
            scale = f"{module}.{SCALE}" if module in linears else f"{name}{EXPERT_SCALE}"
            state[name] = LazyTensor(_int8(checkpoint, name, 0), "I8")
            state[scale] = LazyTensor(_int8(checkpoint, name, 1), "F32")
            if module in linears:
                state[f"{module}.{LAYOUT}"] = LazyTensor(lambda: np.zeros((), np.uint8), "U8")
        else:
            state[name] = LazyTensor(_rows(checkpoint, name), checkpoint.tensors[name].dtype)
    return LoadPlan(state, structure.skip_list(linears), int8_experts)


def _int8(checkpoint: Checkpoint, name: str, part: int) -> Callable[[], Array]:
    return lambda: checkpoint.int8_rows(name, 0, checkpoint.tensors[name].shape[0])[part]


def _rows(checkpoint: Checkpoint, name: str) -> Callable[[], Array]:
    shape = checkpoint.tensors[name].shape
    return lambda: checkpoint.rows(name, 0, shape[0] if shape else 1)
