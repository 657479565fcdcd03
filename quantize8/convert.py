"""Checkpoint to int8 artifact, streaming: memory holds a few blocks of rows, never a weight file or the model.

Everything that can be known from headers alone is settled first (names, shapes, places in the output, disk space).
Then each tensor is read, quantized, hashed and written block by block, by several threads in any order: every byte
has its place beforehand, so the result does not depend on who wrote it when.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from quantize8 import __version__
from quantize8.artifact import bitsandbytes
from quantize8.artifact.folder import check_disk, check_output, create, staged, write_at, write_file
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE, OutTensor, Shard, index, plan_shards
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, Quantized, TensorRecord, digest, summarize
from quantize8.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from quantize8.checkpoint.base import CONFIG_NAME, DTYPES, FLOATING, QUANTIZABLE
from quantize8.errors import DependencyError, OutputError, SourceError, WeightError
from quantize8.model.structure import CONV1D, Structure, is_skipped, read_structure
from quantize8.ops import cpu
from quantize8.ops.reference import FLOAT16_MAX, STATS_TILE_ROWS, Array, ColumnStats, as_bytes
from quantize8.recipe import DEFAULT_RECIPE, Recipe, load_recipe

_BLOCK_BYTES = 4 * 2**20  # read at a time: several fit a core's share of the last-level cache
_MAX_WORKERS = 8  # beyond this many threads the disk is the limit

Progress = Callable[[int, int], None]  # bytes of source done, bytes in all


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
        return sum(self.checkpoint.tensors[f"{name}.weight"].nbytes // self._width(name) for name in self.modules)

    @property
    def weights(self) -> int:
        """How many floating-point numbers the source holds."""
        tensors = self.checkpoint.tensors.values()
        return sum(info.nbytes // DTYPES[info.dtype].itemsize for info in tensors if info.dtype in FLOATING)

    def _width(self, module: str) -> int:
        return DTYPES[self.checkpoint.tensors[f"{module}.weight"].dtype].itemsize


@dataclass
class Conversion:
    """What `convert` did, or with dry_run would do."""

    out: Path
    plan: Plan
    seconds: float = 0.0
    manifest: Manifest | None = None  # None after a dry run
    errors: dict[str, Quantized] = field(default_factory=dict)  # by weight


def convert(
    source: str,
    out: str | Path | None = None,
    *,
    threshold: float | None = None,
    recipe: str = DEFAULT_RECIPE,
    device: str = "auto",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write an int8 artifact of a checkpoint in the bitsandbytes format.

    Args: source, a hub id, folder or file; out, the new folder (default: `<name>-int8` in the current one); threshold,
    in place of the recipe's; recipe, a shipped name or a .toml file; device, auto or cpu; workers, threads that read,
    quantize and write side by side (default: one a processor); progress, called with bytes of source done and in all.
    Raises: SourceError, WeightError, RecipeError or OutputError; then no output folder is left.
    """
    if device not in ("auto", "cpu"):
        raise DependencyError(f"device {device}: this version converts on the CPU only; use --device cpu")
    if workers is not None and workers < 1:
        raise OutputError(f"workers {workers}: must be 1 or more")
    start = time.perf_counter()
    chosen = load_recipe(recipe, threshold)
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    target = Path(out) if out is not None else Path(f"{checkpoint.name}-int8")
    check_output(target, overwrite, checkpoint.folder)
    plan = make_plan(checkpoint, chosen, max_shard_size)
    if dry_run:
        return Conversion(target, plan, time.perf_counter() - start)
    check_disk(target, plan.output_bytes)
    with staged(target, overwrite) as folder:
        try:
            manifest = _write(plan, folder, workers or min(os.cpu_count() or 1, _MAX_WORKERS), progress)
        except OSError as error:
            raise OutputError(
                f"{target}: writing failed ({error.strerror or error}); make room and run again"
            ) from None
    errors = {name: record.quantized for name, record in manifest.tensors.items() if record.quantized}
    return Conversion(target, plan, time.perf_counter() - start, manifest, errors)


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
    modules, kept = dict(structure.linears), dict(structure.kept)
    if recipe.output_head and structure.output_head is not None:
        modules[structure.output_head] = "Linear"
        del kept[structure.output_head]
    for name in list(modules):
        info = tensors[f"{name}.weight"]
        reason = (
            f"recipe {recipe.name}"
            if recipe.skips(name)
            else f"dtype {info.dtype}"
            if info.dtype not in QUANTIZABLE
            else "empty"
            if 0 in info.shape
            else None
        )
        if reason:
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


def _output(info: TensorInfo, modules: dict[str, str]) -> list[OutTensor]:
    module = info.name.removesuffix(".weight")
    if module == info.name or module not in modules:
        return [OutTensor(info.name, info.dtype, info.shape)]
    rows, columns = info.shape if modules[module] != CONV1D else info.shape[::-1]
    return bitsandbytes.module_tensors(module, (rows, columns))


def _write(plan: Plan, folder: Path, workers: int, progress: Progress | None) -> Manifest:
    """Fill an empty folder with the artifact; returns its manifest, which is written last."""
    checkpoint = plan.checkpoint
    manifest = Manifest(
        __version__, bitsandbytes.NAME, checkpoint.identity, plan.recipe.as_json(), plan.source_bytes, kept=plan.kept
    )
    writer = _Writer(plan, folder, progress)
    try:
        for record in _in_threads(writer.write, list(checkpoint.tensors.values()), workers):
            manifest.tensors.update(record)
    finally:
        writer.close()
    manifest.headers = {shard.file: digest(shard.header) for shard in plan.shards}
    checkpoint.write_companions(folder)
    config = {
        **checkpoint.config,
        "quantization_config": bitsandbytes.quantization_config(plan.recipe.threshold, plan.skip_list),
    }
    for name, data in {**index(plan.shards), CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}.items():
        write_file(folder / name, data)
    others = (path for path in sorted(folder.rglob("*")) if path.is_file())
    manifest.files = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        for path in others
        if path.name not in manifest.headers
    }
    write_file(folder / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _in_threads(
    work: Callable[[TensorInfo], dict[str, TensorRecord]], items: list[TensorInfo], workers: int
) -> list[dict[str, TensorRecord]]:
    """Results of `work` on each item; the first failure stops the rest and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[dict[str, TensorRecord]]] = [pool.submit(work, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
        # of several failures the earliest in storage order, so that the message does not depend on the threads
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in (failed or futures)]


class _Place(NamedTuple):
    descriptor: int
    offset: int  # of the tensor's first byte, from the start of the file
    file: str
    tensor: OutTensor


class _Writer:
    """Writes one source tensor at a time to its places in the output, from any thread."""

    def __init__(self, plan: Plan, folder: Path, progress: Progress | None) -> None:
        self._plan, self._progress, self._done = plan, progress, 0
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []
        for shard in plan.shards:
            self._descriptors.append(create(folder / shard.file, shard.header, shard.nbytes))
            for tensor in shard.tensors:
                self._places[tensor.name] = _Place(
                    self._descriptors[-1], shard.offsets[tensor.name], shard.file, tensor
                )

    def close(self) -> None:
        """Have the disk hold all weight files, and close them."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
            os.close(descriptor)

    def write(self, info: TensorInfo) -> dict[str, TensorRecord]:
        """Read a source tensor, write what becomes of it, and say what was written."""
        module = info.name.removesuffix(".weight")
        if module != info.name and module in self._plan.modules:
            return self._quantize(info, module)
        position, content = 0, blake3()
        for block in self._plan.checkpoint.blocks(info.name, _BLOCK_BYTES):
            if info.dtype in FLOATING:
                _check_finite(block, info, 0 if info.shape == () else position * info.shape[0] // max(1, info.nbytes))
            content.update(as_bytes(block))
            self._put(info.name, block, position)
            position += block.nbytes
            self._advance(block.nbytes)
        return {info.name: self._record(info.name, content.hexdigest())}

    def _quantize(self, info: TensorInfo, module: str) -> dict[str, TensorRecord]:
        """Quantize a weight block by block; GPT-2's Conv1D, stored [in, out], is turned over whole."""
        transposed = self._plan.modules[module] == CONV1D
        weight, scale, layout = (tensor.name for tensor in bitsandbytes.module_tensors(module, (0, 0)))
        stats = ColumnStats.empty(info.shape[0] if transposed else info.shape[1])
        source, content, position = blake3(), blake3(), 0
        absmax: list[Array] = []
        size = info.nbytes if transposed else _BLOCK_BYTES
        for block in self._plan.checkpoint.blocks(info.name, size, multiple=STATS_TILE_ROWS):
            source.update(as_bytes(block))
            values = np.ascontiguousarray(block.T) if transposed else block
            codes, peaks = cpu.quantize_rowwise(values, stats)
            if not np.isfinite(peaks).all():
                raise _unfit(values, peaks, info, sum(len(done) for done in absmax))
            absmax.append(peaks)
            content.update(as_bytes(codes))
            self._put(weight, codes, position)
            position += codes.nbytes
            self._advance(block.nbytes)
        scales, row_major = np.concatenate(absmax), np.zeros((), np.uint8)
        self._put(scale, scales, 0)
        self._put(layout, row_major, 0)
        record = self._record(weight, content.hexdigest())
        record.quantized = summarize(stats, scales, info.dtype, source.hexdigest(), transposed)
        return {
            weight: record,
            scale: self._record(scale, digest(as_bytes(scales))),
            layout: self._record(layout, digest(as_bytes(row_major))),
        }

    def _put(self, name: str, values: Array, position: int) -> None:
        place = self._places[name]
        write_at(place.descriptor, as_bytes(values), place.offset + position)

    def _record(self, name: str, content: str) -> TensorRecord:
        place = self._places[name]
        return TensorRecord(place.file, place.tensor.dtype, place.tensor.shape, content)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes  # a lost update between threads only makes the progress bar late
        if self._progress is not None:
            self._progress(self._done, self._plan.source_bytes)


def _check_finite(block: Array, info: TensorInfo, first_row: int) -> None:
    finite = np.isfinite(block).reshape(len(block) if block.ndim else 1, -1).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise WeightError(f"{info.file}: {info.name} row {row} holds NaN or infinity; repair or replace the checkpoint")


def _unfit(values: Array, absmax: Array, info: TensorInfo, first_row: int) -> WeightError:
    """The error for the first row that cannot be quantized: NaN and infinity, or too large for float16."""
    row = int(np.argmin(np.isfinite(absmax)))
    where = f"{info.file}: {info.name} row {first_row + row}"
    magnitudes: Any = np.abs(values[row].astype(np.float32))
    if np.isfinite(magnitudes).all():
        return WeightError(
            f"{where} holds |w| = {magnitudes.max():g}, over float16's {FLOAT16_MAX:g}, which int8 here starts from; "
            f"keep it in floating point by a recipe with skip = [{info.name.removesuffix('.weight')!r}]"
        )
    return WeightError(f"{where} holds NaN or infinity; repair or replace the checkpoint")
