"""What a conversion will do: which tensors become int8, and the place of every byte. Read from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantize8.artifact.format import Format, Int8Format
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE, OutTensor, Shard, place
from quantize8.artifact.outliers import OUTLIERS_NAME, Calibrated
from quantize8.checkpoint import Checkpoint, TensorInfo
from quantize8.checkpoint.base import FLOATING, QUANTIZABLE, main_dtype, model_dtype
from quantize8.checkpoint.smoothing import SmoothedCheckpoint
from quantize8.checkpoint.structure import CONV1D, LINEAR, Structure, structure_of
from quantize8.errors import SourceError
from quantize8.ops.q8_0 import Q8_0
from quantize8.ops.scales import ScaleSearch
from quantize8.recipe import Recipe

if TYPE_CHECKING:
    from quantize8.artifact.gguf import GgufTensor


@dataclass
class Plan:
    """What a conversion will do, from headers alone."""

    checkpoint: Checkpoint
    format: Format
    recipe: Recipe
    modules: dict[str, str]  # module that becomes int8 -> LINEAR, CONV1D or EXPERT
    kept: dict[str, str]  # Linear weight that does not -> why
    skip_list: list[str]
    transposed: set[str]  # tensors whose two dimensions change places
    decoded_dtype: str  # of a quantized weight that becomes floating point
    main_dtype: str  # of most floating-point tensors, which a floating-point format changes
    outputs: dict[str, list[OutTensor]] = field(default_factory=dict)  # source tensor -> what becomes of it
    shards: list[Shard] = field(default_factory=list)
    gguf: dict[str, GgufTensor] = field(default_factory=dict)  # source tensor, or one that is computed -> its form
    calibrated: dict[str, Calibrated] = field(default_factory=dict)  # module -> its outlier columns
    outliers: Shard | None = None  # the file that holds them
    searches: dict[str, ScaleSearch] = field(default_factory=dict)  # source tensor -> its scales, if not by absmax
    guessed: str = ""  # why modules were told by names alone, empty where they were not

    @property
    def files(self) -> list[Shard]:
        """All files that hold tensors."""
        return self.shards if self.outliers is None else [*self.shards, self.outliers]

    @property
    def output_bytes(self) -> int:
        """Bytes of these files."""
        return sum(shard.nbytes for shard in self.files)

    @property
    def left_out(self) -> dict[str, str]:
        """Files of the source's folder that neither are read nor go into the artifact -> why."""
        return self.checkpoint.left_behind() if self.format.is_folder else {}

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors, as stored."""
        return self.checkpoint.stored_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes of the source's tensors as they are read, quantized ones decoded."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def int8_weights(self) -> int:
        """How many weights become int8."""
        return sum(math.prod(self.checkpoint.tensors[f"{name}.weight"].shape) for name in self.modules)

    @property
    def carries(self) -> bool:
        """Whether every int8 module has the codes that the source stores."""
        return bool(self.modules) and all(self.checkpoint.is_int8(f"{name}.weight") for name in self.modules)

    @property
    def quantized(self) -> list[str]:
        """Source tensors that become int8 and are not int8 already."""
        names = [f"{name}.weight" for name in self.modules]
        names += [name for name, tensor in self.gguf.items() if tensor.kind == Q8_0 and tensor.values is None]
        return [name for name in names if not self.checkpoint.is_int8(name)]

    @property
    def weights(self) -> int:
        """How many floating-point numbers the source stands for."""
        return sum(math.prod(info.shape) for info in self.checkpoint.tensors.values() if info.dtype in FLOATING)

    @property
    def smoothed(self) -> str:
        """How much of the source is smoothed, in words; empty where nothing is."""
        return self.checkpoint.summary if isinstance(self.checkpoint, SmoothedCheckpoint) else ""

    def shape_of(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape of a tensor of the source as it is written."""
        return info.shape[::-1] if info.name in self.transposed else info.shape

    def keep_outliers(self, calibrated: dict[str, Calibrated]) -> None:
        """Give the outlier columns of the int8 modules, where they were calibrated, a place in a file of their own."""
        self.calibrated = {name: found for name, found in calibrated.items() if name in self.modules}
        tensors = [tensor for name in self.calibrated for tensor in self.outlier_tensors(name)]
        self.outliers = place(Shard(OUTLIERS_NAME, tensors))

    def outlier_tensors(self, module: str) -> list[OutTensor]:
        """What is stored of a calibrated module's outlier columns."""
        rows = self.shape_of(self.checkpoint.tensors[f"{module}.weight"])[0]
        return self.calibrated[module].tensors(module, rows)

    def module_of(self, info: TensorInfo) -> str | None:
        """The module that a source tensor is the weight of, if it becomes int8."""
        module = info.name.removesuffix(".weight")
        return module if module != info.name and module in self.modules else None


def make_plan(checkpoint: Checkpoint, recipe: Recipe, output: Format, max_shard_size: str = DEFAULT_SHARD_SIZE) -> Plan:
    """Settle which tensors become int8 and where every byte of the output goes; reads headers only."""
    structure = structure_of(checkpoint)
    structure.require_complete(checkpoint.name)
    modules, kept = _choose(structure, recipe, output, checkpoint)
    if not modules and isinstance(output, Int8Format):
        raise SourceError(_nothing(checkpoint, structure, kept, output))
    skip_list = structure.skip_list(set(modules))
    # an int8 Conv1D is stored [out, in] in every format, a floating-point one [in, out]
    turned = {f"{name}.weight" for name, kind in structure.linears.items() if kind == CONV1D}
    turned = {name for name in turned if (name in checkpoint.decoded) != (name.removesuffix(".weight") in modules)}
    plain = [info for info in checkpoint.tensors.values() if info.name not in checkpoint.decoded]
    dtypes = model_dtype(checkpoint.config, plain), main_dtype(plain)
    plan = Plan(checkpoint, output, recipe, modules, kept, skip_list, turned, *dtypes, guessed=structure.guessed)
    output.lay_out(plan, max_shard_size)
    names = [tensor.name for group in plan.outputs.values() for tensor in group]
    if len(set(names)) != len(names):
        raise SourceError(f"{checkpoint.name}: holds tensors named like quantized ones; it is quantized already")
    return plan


def _choose(
    structure: Structure, recipe: Recipe, output: Format, checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, str]]:
    """Modules that become int8, and the Linear weights that do not with the reason."""
    if not isinstance(output, Int8Format):
        return {}, {}
    tensors, head = checkpoint.tensors, structure.output_head
    linears, refused = output.linears(structure)
    modules, kept = dict(linears), structure.kept | refused
    if head is not None and (recipe.output_head or checkpoint.is_int8(f"{head}.weight")):
        modules[head] = LINEAR
        del kept[head]
    for name in list(modules):
        if reason := _reason_to_keep(name, tensors[f"{name}.weight"], recipe):
            kept[name] = reason
            del modules[name]
    while misfits := output.misfits(modules, structure):
        kept |= misfits
        modules = {name: kind for name, kind in modules.items() if name not in misfits}
    return modules, {name: why for name, why in kept.items() if f"{name}.weight" in tensors}


def _reason_to_keep(module: str, info: TensorInfo, recipe: Recipe) -> str | None:
    if recipe.skips(module):
        return f"recipe {recipe.name}"
    if info.dtype not in QUANTIZABLE:
        return f"dtype {info.dtype}"
    return "empty" if 0 in info.shape else None


def _nothing(checkpoint: Checkpoint, structure: Structure, kept: dict[str, str], output: Int8Format) -> str:
    """Why not a single weight becomes int8, by the example of one."""
    if refused := output.linears(structure)[1]:
        why = next(iter(refused.values()))
        return f"{checkpoint.name}: all its Linear weights are {why}; choose another --format than {output.name}"
    if kept:
        name, why = max(kept.items(), key=lambda item: math.prod(checkpoint.tensors[f"{item[0]}.weight"].shape))
        return f"{checkpoint.name}: none of its weights would become int8: {name}.weight does not ({why})"
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes, default=None)
    if largest is None:
        return f"{checkpoint.name}: holds no tensors; fetch it again"
    return (
        f"{checkpoint.name}: has no weights of Linear layers: the largest tensor is {largest.name} "
        f"{list(largest.shape)}, {largest.dtype}"
    )
