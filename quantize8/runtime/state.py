"""A checkpoint as a state_dict for transformers: under the names of our layers' tensors, each read when requested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize8.formats.bitsandbytes import LAYOUT, SCALE
from quantize8.kernels.reference import Array
from quantize8.runtime.experts import SCALE as EXPERT_SCALE
from quantize8.sources import Checkpoint
from quantize8.sources.structure import structure_of, with_fused_experts

_DTYPES = {"BF16": torch.bfloat16}  # dtypes that torch.from_numpy does not take


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a state_dict that is read when it is indexed with `...`, as transformers reads from safetensors."""

    read: Callable[[], Array]
    dtype: str  # safetensors' name of the dtype

    def __getitem__(self, _: Any) -> Tensor:
        return to_torch(self.read(), self.dtype)

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        return self.dtype


def to_torch(values: Array, dtype: str) -> Tensor:
    """An array as a tensor that shares its memory; dtype is safetensors' name."""
    if dtype in _DTYPES:
        return torch.from_numpy(values.view(np.int16)).view(_DTYPES[dtype])
    return torch.from_numpy(values)


@dataclass(frozen=True)
class LoadPlan:
    """What from_pretrained needs to load a checkpoint through quantize8's readers."""

    state: dict[str, LazyTensor]  # tensors by name
    skip_modules: list[str]  # Linear modules that are not int8
    int8_experts: bool  # whether experts are int8
    rotations: dict[str, int]  # module in the model -> the blocks of input features by which its weight is rotated


def plan_loading(checkpoint: Checkpoint) -> LoadPlan:
    """Plan the loading of a checkpoint.

    Linear weights and experts that are stored as int8 stay int8. Everything else is loaded in floating point, and
    decoded if it is quantized in another way.
    """
    checkpoint, structure = with_fused_experts(checkpoint, structure_of(checkpoint))
    infos = checkpoint.tensors.values()
    int8 = {info.name.removesuffix(".weight"): info.rotation for info in infos if info.is_int8 or info.rotation}
    linears = {name for name in (*structure.linears, *structure.kept) if name in int8}
    experts = {*structure.experts, *(name for name in structure.others if name in int8)}
    int8_experts = bool(experts) and int8.keys() >= experts and not structure.slices and structure.runs_experts
    experts = experts if int8_experts else set()
    state: dict[str, LazyTensor] = {}
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if (name != module and module in linears) or module in experts:
            scale = f"{module}.{SCALE}" if module in linears else f"{name}{EXPERT_SCALE}"
            state[name] = LazyTensor(_int8(checkpoint, name, 0), "I8")
            state[scale] = LazyTensor(_int8(checkpoint, name, 1), "F32")
            if module in linears:
                state[f"{module}.{LAYOUT}"] = LazyTensor(lambda: np.zeros((), np.uint8), "U8")
        else:
            state[name] = LazyTensor(_rows(checkpoint, name), checkpoint.tensors[name].dtype)
    rotations = {structure.model_names.get(name, name): int8[name] for name in linears if int8[name]}
    return LoadPlan(state, structure.skip_list(linears), int8_experts, rotations)


def _int8(checkpoint: Checkpoint, name: str, part: int) -> Callable[[], Array]:
    return lambda: checkpoint.int8_rows(name, 0, checkpoint.tensors[name].shape[0])[part]


def _rows(checkpoint: Checkpoint, name: str) -> Callable[[], Array]:
    shape = checkpoint.tensors[name].shape
    return lambda: checkpoint.rows(name, 0, shape[0] if shape else 1)
