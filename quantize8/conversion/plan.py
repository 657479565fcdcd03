"""What a conversion will do, decided from headers alone: which tensors become int8, and where every byte goes.

A plan is immutable. Calibration, which needs the weights, derives a new plan from it (`Plan.with_calibration`). The
units of work are the weight files: any process can write one, and two plans with the same `decisions` write the same
bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8 import __version__
from quantize8.artifact.manifest import digest, fits
from quantize8.artifact.outliers import OUTLIERS_NAME, PART_SUFFIX, Calibrated
from quantize8.conversion.options import ConvertOptions
from quantize8.errors import OutputError, SourceError
from quantize8.formats.base import Format, Int8Format, OutTensor, Shard, make_format, place
from quantize8.kernels import MSE, ROTATIONS, cpu
from quantize8.kernels.reference import Array
from quantize8.kernels.scales import ScaleSearch
from quantize8.optional import require
from quantize8.recipe import Recipe, load_recipe
from quantize8.sources import open_checkpoint
from quantize8.sources.base import FLOATING, QUANTIZABLE, Checkpoint, TensorInfo, main_dtype, model_dtype
from quantize8.sources.smoothing import SmoothedCheckpoint
from quantize8.sources.structure import (
    CONV1D,
    EMBEDDED,
    LINEAR,
    Structure,
    structure_of,
    with_fused_experts,
    with_separate_experts,
)
from quantize8.sources.untied import UntiedHead

if TYPE_CHECKING:
    from quantize8.conversion.calibration import Calibration
    from quantize8.conversion.rounding import RoundedWeights


NAMED = 0.01  # share of the weights above which a tensor in floating point, with that of other layers, is reported
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class WorkUnit:
    """One weight file, which any process can write.

    Attributes:
        number: Its number among the weight files, from 1.
        shard: Layout of the file.
        sources: Keys of `Plan.outputs` that go into it: source tensors in storage order, then computed tensors.
        read_bytes: Size of the source tensors that are read for it; quantized ones count at their decoded size.
        outliers: Layout of a file with the outlier columns of its modules. The files of all units are merged at the
            end.
    """

    number: int
    shard: Shard
    sources: list[str]
    read_bytes: int
    outliers: Shard | None = None

    @property
    def nbytes(self) -> int:
        """Size of the unit's files in bytes."""
        return self.shard.nbytes + (self.outliers.nbytes if self.outliers else 0)

    @property
    def tensors(self) -> list[OutTensor]:
        """All tensors in the unit's files."""
        return [*self.shard.tensors, *(self.outliers.tensors if self.outliers else [])]


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        options: The options of the conversion.
        checkpoint: The source; after calibration with `smooth`, the source with its smoothing factors applied.
        format: The output format.
        recipe: Which modules become int8, and the outlier threshold.
        modules: Module that becomes int8 -> LINEAR, CONV1D, EXPERT or PACKED_EXPERT.
        kept: Linear module that is left in floating point -> the reason. Also any other tensor that has more than
            NAMED of the weights, together with that of the same name in other layers; without ".weight" in its name.
        unloaded: Source tensor that is written, but not loaded by transformers -> the reason.
        closed_to: Loader of the format that cannot open the artifact -> the reason.
        guessed: Why modules were recognized by their names alone; empty if the architecture's code was used.
        skip_list: Linear modules that are left in floating point, by the names that loaders use.
        transposed: Source tensors that are written transposed.
        calibration: What the manifest records about the calibration; empty without one.
        text: The calibration text, if this process has read it.
        outputs: Source tensor, or computed tensor -> the tensors of the artifact that are made from it.
        units: The weight files.
        searches: Source tensor -> what the search for its scales minimizes, if they are searched.
        calibrated: Module -> what calibration decided for it.
        outliers: Layout of the file with all outlier columns.
        rotations: Source tensor -> the blocks of input features by which it is rotated before it becomes int8.
        rounded: The codes that calibration chose, with their scales.
    """

    options: ConvertOptions
    checkpoint: Checkpoint
    format: Format
    recipe: Recipe
    modules: dict[str, str]
    kept: dict[str, str]
    unloaded: dict[str, str]
    closed_to: dict[str, str]
    guessed: str
    skip_list: list[str]
    transposed: set[str]
    calibration: dict[str, Any] = field(default_factory=dict)
    text: str | None = field(default=None, repr=False)
    outputs: Mapping[str, list[OutTensor]] = field(default_factory=dict)
    units: list[WorkUnit] = field(default_factory=list)
    searches: dict[str, ScaleSearch] = field(default_factory=dict)
    calibrated: dict[str, Calibrated] = field(default_factory=dict)
    outliers: Shard | None = None
    rotations: dict[str, int] = field(default_factory=dict)
    rounded: RoundedWeights | None = None

    @cached_property
    def main_dtype(self) -> str:
        """Most common dtype of the tensors stored in floating point; a floating-point format converts these."""
        return main_dtype(self._plain)

    @cached_property
    def decoded_dtype(self) -> str:
        """Dtype in which a quantized weight is written when it becomes floating point: the model's dtype."""
        return model_dtype(self.checkpoint.config, self._plain)

    @property
    def _plain(self) -> list[TensorInfo]:
        return [info for info in self.checkpoint.tensors.values() if info.name not in self.checkpoint.decoded]

    @property
    def default_out(self) -> Path:
        """Where the artifact goes if no output is given."""
        return Path(f"{self.checkpoint.name}-{self.format.suffix}")

    @property
    def shards(self) -> list[Shard]:
        """The weight files."""
        return [unit.shard for unit in self.units]

    @property
    def files(self) -> list[Shard]:
        """All files that contain tensors: the weight files, and the file of outlier columns if there is one."""
        return self.shards if self.outliers is None else [*self.shards, self.outliers]

    @property
    def output_bytes(self) -> int:
        """Size of all files that contain tensors, in bytes."""
        return sum(shard.nbytes for shard in self.files)

    @property
    def left_out(self) -> dict[str, str]:
        """Files of the source's folder that are neither read nor copied -> the reason."""
        return self.checkpoint.left_behind() if self.format.is_folder else {}

    @property
    def source_bytes(self) -> int:
        """Size of the source's tensors as stored, in bytes."""
        return self.checkpoint.stored_bytes

    @property
    def int8_weights(self) -> int:
        """Number of weight values that are int8 in the artifact."""
        return sum(math.prod(self.checkpoint.tensors[f"{name}.weight"].shape) for name in self.modules)

    @property
    def carries(self) -> bool:
        """Whether the int8 codes of all modules are copied from the source."""
        return bool(self.modules) and all(self.keeps_codes(f"{name}.weight") for name in self.modules)

    @property
    def quantized(self) -> list[str]:
        """Source tensors that become int8 and are not int8 already."""
        return [name for name in self.format.quantizes(self) if not self.keeps_codes(name)]

    @property
    def weights(self) -> int:
        """Number of floating-point values in the source, counting quantized weights as decoded."""
        return sum(math.prod(info.shape) for info in self.checkpoint.tensors.values() if info.dtype in FLOATING)

    @property
    def smoothed(self) -> str:
        """A description of how much of the source is smoothed; empty if nothing is."""
        return self.checkpoint.summary if isinstance(self.checkpoint, SmoothedCheckpoint) else ""

    def keeps_codes(self, source: str) -> bool:
        """Whether a source tensor is int8, and becomes int8 with the same codes."""
        return self.checkpoint.tensors[source].is_int8 and source not in self.rotations

    def outputs_of(self, kept: str) -> list[OutTensor]:
        """The tensors of the artifact for an entry of `kept`."""
        return self.outputs.get(f"{kept}.weight") or self.outputs.get(kept, [])

    def shape_of(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape in which a source tensor is written."""
        return info.shape[::-1] if info.name in self.transposed else info.shape

    def blocks(self, info: TensorInfo, size: int | None = None, multiple: int = 1) -> Iterator[tuple[int, Array]]:
        """Read a source tensor as it is quantized or written, block by block: transposed or rotated, if it is so.

        Args:
            info: The source tensor.
            size: Approximate size of a block in bytes; None for the default. A transposed tensor is one block.
            multiple: The number of rows in every block but the last is a multiple of this.

        Yields:
            The number of the first row, and the rows.
        """
        transposed, rotation, row = info.name in self.transposed, self.rotations.get(info.name, 0), 0
        for block in self.checkpoint.blocks(info.name, info.nbytes if transposed else size, multiple):
            values = np.ascontiguousarray(block.T) if transposed else block
            yield row, cpu.rotate(values, rotation) if rotation else values
            row += len(block) if block.ndim else 1

    def tensors_of(self, source: str) -> list[OutTensor]:
        """All tensors of the artifact that are made from a source tensor, including its outlier columns."""
        module = source.removesuffix(".weight")
        calibrated = self.calibrated.get(module) if module != source else None
        if calibrated is None:
            return self.outputs[source]
        rows = self.shape_of(self.checkpoint.tensors[source])[0]
        return [*self.outputs[source], *calibrated.tensors(module, rows)]

    def decisions(self) -> dict[str, Any]:
        """All that decides the bytes, as JSON values: two plans with the same decisions make the same artifact.

        Raises:
            SourceError: A file of the source cannot be read.
        """
        layout = "".join(f"{shard.file} {digest(shard.header)} {shard.nbytes}\n" for shard in self.shards)
        config = json.dumps(self.checkpoint.config, sort_keys=True, default=str)
        source = {**self.checkpoint.identity, "config": digest(config.encode()), "files": self.checkpoint.fingerprint()}
        return {
            "version": __version__,
            "source": source,
            "format": asdict(self.format),
            "recipe": self.recipe.as_json(),
            **self.options.decisions(),
            "calibration": self.calibration,
            "layout": digest(layout.encode()),
        }

    def with_calibration(self, found: Calibration) -> Plan:
        """The plan with the results of calibration: smoothing, outlier columns, and what the scale search minimizes."""
        plan = replace(self, checkpoint=found.smoothed(self.checkpoint))
        if "columns" in self.format.options:
            plan = replace(plan, calibrated={name: one for name, one in found.modules.items() if name in self.modules})
            names = [f"{module}.weight" for module in plan.calibrated]
            plan = replace(plan, outliers=place(OUTLIERS_NAME, _outlier_tensors(plan, names)))
            plan = replace(plan, units=_units(plan, self.shards))
        known = {f"{name}.weight": one.search for name, one in found.modules.items()}
        return replace(plan, searches={name: known.get(name, search) for name, search in self.searches.items()})


def make_plan(options: ConvertOptions, token: str | None = None, *, download: bool = True) -> Plan:
    """Open the source, and decide which tensors become int8 and where every byte of the output goes.

    Args:
        options: The options of the conversion.
        token: Hub token.
        download: Download the weights of a hub model that are not on this machine; otherwise only their headers.

    Raises:
        RecipeError: The recipe is missing or invalid.
        SourceError: The source cannot be read, or not be converted with these options.
        OutputError: The options do not fit the source.
        DependencyError: Calibration needs a package that is missing.
    """
    recipe, text, calibration = load_recipe(options.recipe, options.threshold), None, {}
    if options.calibrate is not None:
        require("for --calibrate")
        from quantize8.calibration.text import read_text
        from quantize8.conversion.calibration import calibration_entry

        text = read_text(Path(options.calibrate))
        calibration = calibration_entry(options, text)
    stream = options.stream or (False if download else None)
    checkpoint = open_checkpoint(
        options.source, revision=options.revision, token=token, stream=stream, adapter=options.adapter
    )
    return plan_of(options, checkpoint, recipe, calibration=calibration, text=text)


def plan_of(
    options: ConvertOptions,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    calibration: dict[str, Any] | None = None,
    text: str | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint that is open already; see `make_plan`.

    Args:
        options: The options of the conversion.
        checkpoint: The source.
        recipe: Which modules become int8, and the outlier threshold.
        calibration: What the manifest records about the calibration, if there is one.
        text: The calibration text, if this process has read it.

    Raises:
        SourceError: The source cannot be converted with these options.
        OutputError: The options do not fit the source.
    """
    output = make_format(options.format, options.scheme, options.moe, options.group_size, options.rotate)
    structure = structure_of(checkpoint)
    structure.require_complete(checkpoint.name)
    if structure.slices or structure.fusions:
        arrange = with_separate_experts if output.holds_experts(structure) else with_fused_experts
        checkpoint, structure = arrange(checkpoint, structure)
    if recipe.embeddings and output.holds_embeddings and structure.embedding and structure.tied_head:
        head = structure.tied_head
        checkpoint = UntiedHead(checkpoint, f"{structure.embedding}.weight", f"{head}.weight")
        structure = replace(structure, output_head=head, kept=structure.kept | {head: "output head"})
        recipe = replace(recipe, output_head=True)
    modules, kept = _choose(structure, recipe, output, checkpoint)
    # an int8 Conv1D is stored [out, in] in every format, a floating-point one [in, out]
    conv1d = {f"{name}.weight" for name, kind in structure.linears.items() if kind == CONV1D}
    transposed = {name for name in conv1d if (name in checkpoint.decoded) != (name.removesuffix(".weight") in modules)}
    rotations = _rotations(modules, output, checkpoint) if isinstance(output, Int8Format) and output.rotate else {}
    is_special = bool({*modules.values()} - {LINEAR, CONV1D})
    closed_to = output.closed_to(modules, structure, checkpoint.tensors) if is_special or rotations else {}
    plan = Plan(
        options, checkpoint, output, recipe, modules, kept, structure.unloaded, closed_to, structure.guessed,
        structure.skip_list(set(modules)), transposed, calibration or {}, text,
        rotations=rotations,
    )  # fmt: skip
    outputs, shards = output.lay_out(plan, options.max_shard_size)
    names = [tensor.name for group in outputs.values() for tensor in group]
    if len(set(names)) != len(names):
        raise SourceError(f"{checkpoint.name}: has tensor names of a quantized model, so it is quantized already")
    plan = replace(plan, outputs=outputs)
    if output.is_folder:
        checkpoint.require_companions()  # now, because they are written last, after hours of work
    if options.smooth is not None:
        from quantize8.calibration.smoothing import check_smoothable

        check_smoothable(checkpoint)
    if options.scale == MSE:
        plan = replace(plan, searches={name: ScaleSearch() for name in plan.quantized})
        if not plan.searches:
            raise OutputError(f"scale {MSE}: {checkpoint.name} is int8 already, with its scales; leave it out")
    return replace(plan, units=_units(plan, shards))


def recorded_plan(heading: dict[str, Any], out: object, token: str | None = None) -> Plan:
    """Rebuild the plan that a journal's heading records; the calibration text and the recipe file are not needed.

    Args:
        heading: The heading of a journal, which contains the recipe and a record of the calibration.
        out: The output that the error message names.
        token: Hub token.

    Raises:
        OutputError: The heading was written by another version.
        SourceError: The source cannot be opened.
    """
    try:
        options, decisions = ConvertOptions(**heading["request"]), heading["decisions"]
        revision = decisions["source"].get("revision", options.revision)
        recipe = Recipe(**{**decisions["recipe"], "skip": tuple(decisions["recipe"]["skip"])})
        known = fits(options, ConvertOptions) and fits(recipe, Recipe) and fits(revision, str | None)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known or not fits(decisions.get("calibration"), dict[str, Any]):
        raise OutputError(
            f"{out}: its parts were not written by quantize8 {__version__}; finish it with the version that wrote "
            "them, or start over with convert --overwrite"
        )
    checkpoint = open_checkpoint(
        options.source, revision=revision, token=token, stream=options.stream, adapter=options.adapter
    )
    return plan_of(options, checkpoint, recipe, calibration=decisions["calibration"])


def _choose(
    structure: Structure, recipe: Recipe, output: Format, checkpoint: Checkpoint
) -> tuple[dict[str, str], dict[str, str]]:
    """The modules that become int8 with their kind, and the Linear modules that do not with the reason."""
    if not isinstance(output, Int8Format):
        return {}, {}
    tensors, head = checkpoint.tensors, structure.output_head
    linears, refused = output.linears(structure)
    modules, kept = dict(linears), structure.kept | refused
    if recipe.embeddings and structure.embedding and output.holds_embeddings:
        modules[structure.embedding] = EMBEDDED
    if head is not None and (recipe.output_head or checkpoint.tensors[f"{head}.weight"].is_int8):
        modules[head] = LINEAR
        del kept[head]
    for name in list(modules):
        info, part = tensors[f"{name}.weight"], structure.towers.get(structure.model_names.get(name, name), "")
        outside = f"in {part}, outside of the language model" if part and not recipe.towers else ""
        unfit = f"dtype {info.dtype}" if info.dtype not in QUANTIZABLE else "empty" if 0 in info.shape else ""
        if output.group_size is not None and info.shape[-1] % output.group_size:
            unfit = unfit or f"{info.shape[-1]} columns, which groups of {output.group_size} do not divide"
        if reason := f"recipe {recipe.name}" if recipe.skips(name) else unfit or outside:
            kept[name] = reason
            del modules[name]
    while misfits := output.misfits(modules, structure):
        kept |= misfits
        modules = {name: kind for name, kind in modules.items() if name not in misfits}
    kept = {name: why for name, why in kept.items() if f"{name}.weight" in tensors}
    if not modules:
        raise SourceError(_nothing(checkpoint, structure, kept, output))
    sizes = Counter[str]()  # by name without numbers: the same tensor of all layers
    for name, info in tensors.items():
        sizes[_NUMBER.sub("*", name)] += math.prod(info.shape) if info.dtype in FLOATING else 0
    large = [name for name in structure.others if sizes[_NUMBER.sub("*", name)] > NAMED * sizes.total()]
    reasons = {name.removesuffix(".weight"): structure.others[name] for name in large}
    return modules, kept | {name: why for name, why in reasons.items() if name not in modules}


def _rotations(modules: Mapping[str, str], output: Int8Format, checkpoint: Checkpoint) -> dict[str, int]:
    """See `Plan.rotations`; raises OutputError if nothing can be rotated."""
    rotations = {}
    for name, kind in modules.items():
        if size := output.rotation(name, checkpoint.tensors[f"{name}.weight"].shape[-1], kind):
            rotations[f"{name}.weight"] = size
    if not rotations:
        raise OutputError(f"rotate {output.rotate}: no layer has a multiple of {ROTATIONS[-1]} inputs; leave it out")
    return rotations


def _nothing(checkpoint: Checkpoint, structure: Structure, kept: dict[str, str], output: Int8Format) -> str:
    """The error message when no weight becomes int8, with one weight as an example."""
    if refused := output.linears(structure)[1]:
        why = next(iter(refused.values()))
        return f"{checkpoint.name}: all its Linear weights are {why}; choose another --format than {output.name}"
    if kept:
        name, why = max(kept.items(), key=lambda item: math.prod(checkpoint.tensors[f"{item[0]}.weight"].shape))
        return f"{checkpoint.name}: none of its weights would become int8; for example {name}.weight does not ({why})"
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes, default=None)
    if largest is None:
        return f"{checkpoint.name}: contains no tensors; fetch it again"
    return (
        f"{checkpoint.name}: has no weights of Linear layers: the largest tensor is {largest.name} "
        f"{list(largest.shape)}, {largest.dtype}"
    )


def _units(plan: Plan, shards: list[Shard]) -> list[WorkUnit]:
    """One unit per weight file; all tensors that are made from a source tensor are in the same unit."""
    numbers = {tensor.name: number for number, shard in enumerate(shards) for tensor in shard.tensors}
    sources: list[list[str]] = [[] for _ in shards]
    tensors = plan.checkpoint.tensors
    for name in [*tensors, *(name for name in plan.outputs if name not in tensors)]:
        if name in plan.outputs:  # a GGUF file does not contain all tensors
            sources[numbers[plan.outputs[name][0].name]].append(name)
    units = []
    for number, (shard, names) in enumerate(zip(shards, sources, strict=True), 1):
        read_bytes = sum(tensors[name].nbytes for name in names if name in tensors)
        outliers = _outlier_tensors(plan, names) if plan.calibrated else []
        file = place(f"{shard.file}{PART_SUFFIX}", outliers) if outliers else None
        units.append(WorkUnit(number, shard, names, read_bytes, file))
    return units


def _outlier_tensors(plan: Plan, sources: list[str]) -> list[OutTensor]:
    """The tensors that store the outlier columns of these weights."""
    return [tensor for name in sources for tensor in plan.tensors_of(name)[len(plan.outputs[name]) :]]
