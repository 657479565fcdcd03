"""What an output format decides: which modules become int8, which tensors those are, and what config.json says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize8.artifact.layout import OutTensor, plan_shards
from quantize8.checkpoint import TensorInfo
from quantize8.checkpoint.base import FLOATING
from quantize8.checkpoint.structure import Structure
from quantize8.ops.reference import Array

if TYPE_CHECKING:
    from quantize8.artifact.plan import Plan


@dataclass(frozen=True)
class Format(ABC):
    """An output format. `name` is its `--format`; `suffix` ends the default name of an artifact's folder."""

    name: str
    suffix: str

    @property
    def title(self) -> str:
        """The format with what was chosen of it."""
        return self.name

    @property
    def is_folder(self) -> bool:
        """Whether an artifact is a model folder of transformers', with its config.json and small files."""
        return True

    def lay_out(self, plan: Plan, max_shard_size: str) -> None:
        """Set the plan's outputs and the place of every byte of them: safetensors."""
        plan.outputs = {info.name: self.outputs(plan, info) for info in plan.checkpoint.tensors.values()}
        plan.shards = plan_shards(plan.outputs.values(), max_shard_size)

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """What becomes of a tensor of the source, by default itself; a decoded one has the model's dtype."""
        decoded = info.name in plan.checkpoint.decoded
        dtype = plan.decoded_dtype if decoded else info.dtype
        if dtype in FLOATING:
            dtype = self.float_dtype(dtype, decoded or dtype == plan.main_dtype)
        return [OutTensor(info.name, dtype, plan.shape_of(info))]

    def float_dtype(self, dtype: str, main: bool) -> str:
        """What a floating-point tensor is written as; `main` says that `dtype` is the model's own."""
        return dtype

    @abstractmethod
    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The artifact's config.json, from the source's without quantization."""


class Int8Format(Format):
    """A format that holds int8 codes with one scale for each row."""

    @abstractmethod
    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """The modules that this format can hold in int8 -> their kind, and those that it cannot -> why."""

    @abstractmethod
    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """Of these int8 modules, those that must stay in floating point because others do -> why."""

    @abstractmethod
    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """Tensors of an int8 module with a weight [N, K], the codes first."""

    def pack(self, codes: Array, kind: str) -> Array:
        """Codes int8 [n, K] as the first of `module_tensors` holds them."""
        return codes

    @abstractmethod
    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """Values of the other `module_tensors`, in their order, for absmax float32 [N]."""

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """See `Format.outputs`: of the weight of an int8 module, that module's tensors."""
        if module := plan.module_of(info):
            rows, columns = plan.shape_of(info)
            return self.module_tensors(module, (rows, columns), plan.modules[module])
        return super().outputs(plan, info)


def in_float(plan: Plan) -> Iterable[str]:
    """Modules with a matrix that stays in floating point, by the names of the checkpoint and of the model."""
    for info in plan.checkpoint.tensors.values():
        module = info.name.removesuffix(".weight")
        if len(info.shape) == 2 and module != info.name and module not in plan.modules:
            yield module
    yield from plan.skip_list
