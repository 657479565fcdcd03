"""What a conversion will do: which tensors become int8, and the place of every byte. Read from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize8.artifact import bitsandbytes
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE, OutTensor, Shard, plan_shards
from quantize8.checkpoint import Checkpoint, TensorInfo
from quantize8.checkpoint.base import FLOATING, QUANTIZABLE
from quantize8.checkpoint.structure import CONV1D, LINEAR, Structure, is_skipped, read_structure
from quantize8.errors import SourceError
from quantize8.recipe import Recipe


@dataclass
class Plan:
    """What a conversion will do, from headers alone."""

    checkpoint: Checkpoint
    recipe: Recipe
    modules: dict[str, str]  # module that becomes int8 -> Linear or Conv1D
    kept: dict[str, str]  # Linear weight that does not -> why
    skip_list: list[str]
    shards: list[Shard]

    @property
    def output_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def int8_weights(self) -> int:
        """How many weights become int8."""
        return sum(math.prod(self.checkpoint.tensors[f"{name}.weight"].shape) for name in self.modules)

    @property
    def weights(self) -> int:
        """How many floating-point numbers the source holds."""
        return sum(math.prod(info.shape) for info in self.checkpoint.tensors.values() if info.dtype in FLOATING)

    def module_of(self, info: TensorInfo) -> str | None:
        """The module that a source tensor is the weight of, if it becomes int8."""
        return _module_of(info, self.modules)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, max_shard_size: str = DEFAULT_SHARD_SIZE) -> Plan:
    """Settle which tensors become int8 and where every byte of the output goes; reads headers only."""
    config = checkpoint.config
    if "quantization_config" in config:
        raise SourceError(f"{checkpoint.name}: is quantized already; name the original 16-bit or 32-bit checkpoint")
    structure = read_structure(config, checkpoint.tensors)
    modules, kept = _choose(structure, recipe, checkpoint.tensors)
    if not modules:
        raise SourceError(f"{checkpoint.name}: has no weights that the recipe {recipe.name} would make int8")
    groups = [_output(info, modules) for info in checkpoint.tensors.values()]
    names = [tensor.name for group in groups for tensor in group]
    if len(set(names)) != len(names):
        raise SourceError(f"{checkpoint.name}: holds tensors named like quantized ones (.SCB); it is quantized already")
    return Plan(
        checkpoint, recipe, modules, kept, structure.skip_list(set(modules)), plan_shards(groups, max_shard_size)
    )


def _choose(
    structure: Structure, recipe: Recipe, tensors: dict[str, TensorInfo]
) -> tuple[dict[str, str], dict[str, str]]:
    """Modules that become int8, and the Linear weights that do not with the reason."""
    modules = dict(structure.linears)
    kept = structure.kept | dict.fromkeys(structure.experts, "experts, which this format cannot hold in int8")
    if recipe.output_head and structure.output_head is not None:
        modules[structure.output_head] = LINEAR
        del kept[structure.output_head]
    for name in list(modules):
        if reason := _reason_to_keep(name, tensors[f"{name}.weight"], recipe):
            kept[name] = reason
            del modules[name]
    while True:  # an entry of the skip list also matches names that end with it; what it matches must be float as well
        patterns = structure.skip_list(set(modules))
        caught = [name for name in modules if is_skipped(structure.model_names.get(name, name), patterns)]
        if not caught:
            return modules, {name: why for name, why in kept.items() if f"{name}.weight" in tensors}
        for name in caught:
            kept[name] = "a loader cannot tell it from a module of like name that stays in floating point"
            del modules[name]


def _reason_to_keep(module: str, info: TensorInfo, recipe: Recipe) -> str | None:
    if recipe.skips(module):
        return f"recipe {recipe.name}"
    if info.dtype not in QUANTIZABLE:
        return f"dtype {info.dtype}"
    return "empty" if 0 in info.shape else None


def _module_of(info: TensorInfo, modules: dict[str, str]) -> str | None:
    module = info.name.removesuffix(".weight")
    return module if module != info.name and module in modules else None


def _output(info: TensorInfo, modules: dict[str, str]) -> list[OutTensor]:
    module = _module_of(info, modules)
    if module is None:
        return [OutTensor(info.name, info.dtype, info.shape)]
    rows, columns = info.shape if modules[module] != CONV1D else info.shape[::-1]
    return bitsandbytes.module_tensors(module, (rows, columns))
