"""Writing an artifact's tensors: read a block of rows, quantize, hash, and put it in its place; from any thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from quantize8.artifact.folder import WeightFile
from quantize8.artifact.format import Int8Format
from quantize8.artifact.layout import OutTensor
from quantize8.artifact.manifest import TensorRecord, digest, summarize
from quantize8.artifact.outliers import OUTLIERS_NAME
from quantize8.artifact.plan import Plan
from quantize8.artifact.units import Unit
from quantize8.checkpoint import TensorInfo
from quantize8.checkpoint.base import DTYPES, FLOATING
from quantize8.errors import WeightError
from quantize8.files import write_at
from quantize8.ops import cpu, q8_0
from quantize8.ops.q8_0 import Q8_0
from quantize8.ops.reference import FLOAT16_MAX, STATS_TILE_ROWS, Array, ColumnStats, as_bytes, dequantize
from quantize8.ops.scales import ABSMAX, MSE, ScaleSearch

_PARAMETERS = ("weight", "bias")  # last names of tensors that a layer computes with
_OVER = "with --overwrite for the same --out"  # where an unfinished artifact of what failed may lie
Progress = Callable[[int, int], None]  # bytes of source done, bytes in all


class WeightQuantizer(Protocol):
    """What turns the rows of a weight into int8; one serves one thread at a time."""

    @property
    def block_bytes(self) -> int | None:
        """Of weight that it takes at a time; None for the checkpoint's own."""

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """(block, codes, absmax) of each block [n, K]; `stats` are the whole weight's once all have come."""


class CpuQuantizer:
    """The WeightQuantizer that needs no GPU, and the one that searches scales."""

    block_bytes = None

    def __init__(self, search: ScaleSearch | None = None) -> None:
        self._search = search

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """One fused pass over each block."""
        for block in blocks:
            yield (block, *cpu.quantize_rowwise(block, stats, self._search))


_Quantized = Iterator[tuple[Array, Array, Array]]  # blocks of a weight, their codes and absmax


class Place(NamedTuple):
    """Where a tensor of the artifact is written."""

    file: WeightFile
    offset: int  # of the tensor's first byte, from the start of the file
    name: str  # of the file that holds it in the artifact
    tensor: OutTensor


def places(unit: Unit, files: Sequence[WeightFile]) -> dict[str, Place]:
    """The place of each tensor of a unit in its files: the weight file, and the one of outlier columns."""
    found: dict[str, Place] = {}
    for shard, file, name in zip((unit.shard, unit.outliers), files, (unit.shard.file, OUTLIERS_NAME), strict=False):
        if shard is not None:
            found |= {each.name: Place(file, shard.offsets[each.name], name, each) for each in shard.tensors}
    return found


class Writer:
    """Writes one source tensor at a time to its places in the output, from any thread."""

    def __init__(self, plan: Plan, places: Mapping[str, Place], read_bytes: int, progress: Progress | None) -> None:
        self._plan, self._places = plan, places
        self._progress, self._read_bytes, self._done = progress, read_bytes, 0

    def holds(self, name: str, records: Mapping[str, TensorRecord]) -> bool:
        """Whether what a source tensor became is there already, by the digests of its bytes."""
        for record_name, record in records.items():
            place = self._places.get(record_name)
            if place is None or (place.tensor.dtype, place.tensor.shape) != (record.dtype, record.shape):
                return False
            if place.file.digest(place.offset, place.tensor.nbytes) != record.blake3:
                return False
        if name in self._plan.checkpoint.tensors:
            self._advance(self._plan.checkpoint.tensors[name].nbytes)
        return True

    def written_bytes(self, records: Mapping[str, TensorRecord]) -> int:
        """Bytes of these tensors of the output."""
        return sum(self._places[name].tensor.nbytes for name in records)

    def write(self, info: TensorInfo, quantizer: WeightQuantizer) -> dict[str, TensorRecord]:
        """Read a source tensor, write what becomes of it, and say what was written."""
        if module := self._plan.module_of(info):
            return self._quantize(info, module, quantizer)
        if self._plan.gguf:
            return self._encode(info)
        (out,) = self._plan.outputs[info.name]
        position, content = 0, blake3()
        for first_row, block in self._blocks(info):
            if info.dtype in FLOATING:
                _check_finite(block, info, first_row)
            values = block if out.dtype == info.dtype else _rounded(block, out, info, first_row)
            content.update(as_bytes(values))
            self._put(out.name, values, position)
            position += values.nbytes
            self._advance(block.nbytes)
        return {out.name: self._record(out.name, content.hexdigest())}

    def _blocks(self, info: TensorInfo, size: int | None = None, multiple: int = 1) -> Iterator[tuple[int, Array]]:
        """Blocks of a tensor with the number of their first row; one that is transposed comes whole."""
        turned, row = info.name in self._plan.transposed, 0
        for block in self._plan.checkpoint.blocks(info.name, info.nbytes if turned else size, multiple):
            yield row, np.ascontiguousarray(block.T) if turned else block
            row += len(block) if block.ndim else 1

    def _quantize(self, info: TensorInfo, module: str, quantizer: WeightQuantizer) -> dict[str, TensorRecord]:
        """Quantize a weight block by block, or carry over the codes that it is stored as."""
        plan, kind, output = self._plan, self._plan.modules[module], self._plan.format
        assert isinstance(output, Int8Format)  # no other has modules
        weight, *others = plan.outputs[info.name]
        rows, columns = plan.shape_of(info)
        stats, source, content, position = ColumnStats.empty(columns), blake3(), blake3(), 0
        absmax: list[Array] = []
        exact: list[Array] = []
        calibrated = plan.calibrated.get(module)
        carried = plan.checkpoint.is_int8(info.name)
        for values, codes, peaks in (self._carry if carried else self._rows)(info, quantizer, stats, source):
            if not np.isfinite(peaks).all():
                raise _unfit(values, peaks, info, sum(len(done) for done in absmax))
            absmax.append(peaks)
            if calibrated is not None:
                exact.append(calibrated.exact_rows(values))
            packed = output.pack(codes, kind)
            content.update(as_bytes(packed))
            self._put(weight.name, packed, position)
            position += packed.nbytes
            self._advance(values.nbytes)
        scales = np.concatenate(absmax)
        record = self._record(weight.name, content.hexdigest())
        dtype = plan.checkpoint.stored_dtype(info.name)
        record.quantized = summarize(stats, scales, dtype, source.hexdigest(), info.name in plan.transposed)
        record.quantized.scale = MSE if info.name in plan.searches else ABSMAX
        records = {weight.name: record}
        arrays = list(zip(others, output.scales(scales, (rows, columns), kind), strict=True))
        if calibrated is not None:
            found = [*calibrated.values(), np.concatenate(exact)]
            arrays += zip(calibrated.tensors(module, rows), found, strict=True)
        for out, other in arrays:
            self._put(out.name, other, 0)
            records[out.name] = self._record(out.name, digest(as_bytes(other)))
        return records

    def _rows(self, info: TensorInfo, quantizer: WeightQuantizer, stats: ColumnStats, source: Any) -> _Quantized:
        if search := self._plan.searches.get(info.name):
            quantizer = CpuQuantizer(search)

        def rows() -> Iterator[Array]:
            for _, block in self._blocks(info, quantizer.block_bytes, STATS_TILE_ROWS):
                source.update(as_bytes(block))
                yield block

        return quantizer.quantize(rows(), stats)

    def _carry(self, info: TensorInfo, _: WeightQuantizer, stats: ColumnStats, source: Any) -> _Quantized:
        """The codes of an int8 source. Statistics are of what they stand for; an error has only what holds -128."""
        errors = np.zeros_like(stats.sum_error)
        for first_row, block in self._blocks(info, None, STATS_TILE_ROWS):
            codes, absmax = self._plan.checkpoint.int8_rows(info.name, first_row, first_row + len(block))
            source.update(as_bytes(codes))
            cpu.quantize_rowwise(block, stats)
            difference = block - dequantize(codes, absmax)
            if difference.any():
                errors += np.square(difference).sum(axis=0, dtype=np.float64)
            stats.sum_error[:] = errors
            yield block, codes, absmax

    def write_computed(self, name: str) -> dict[str, TensorRecord]:
        """Write a tensor that no tensor of the source becomes."""
        values = self._plan.gguf[name].values
        assert values is not None
        self._put(name, values, 0)
        return {name: self._record(name, digest(as_bytes(values)))}

    def _encode(self, info: TensorInfo) -> dict[str, TensorRecord]:
        """Write a tensor as llama.cpp has it: a vector in float32, a matrix in Q8_0, with the codes of an int8 one."""
        tensor, checkpoint = self._plan.gguf[info.name], self._plan.checkpoint
        stats, source, content, position = ColumnStats.empty(info.shape[-1]), blake3(), blake3(), 0
        peaks: list[Array] = []
        squares: list[Array] = []
        errors: list[Array] = []
        for first_row, block in self._blocks(info, None, math.lcm(STATS_TILE_ROWS, tensor.head or 1)):
            _check_finite(block, info, first_row)
            source.update(as_bytes(block))
            values = data = np.ascontiguousarray(tensor.arrange(block), np.float32)
            if tensor.kind == Q8_0 and checkpoint.is_int8(info.name):
                rows = checkpoint.int8_rows(info.name, first_row, first_row + len(block))
                data = q8_0.carry_rows(*map(tensor.arrange, rows))
            elif tensor.kind == Q8_0:
                data = q8_0.quantize_rows(values, self._plan.searches.get(info.name))
            if tensor.kind == Q8_0:
                _check_scales(data, info, first_row)
                cpu.quantize_rowwise(values, stats)
                peaks.append(np.abs(values).max(axis=1, initial=0))
                for sums, part in zip((squares, errors), q8_0.row_errors(values, data), strict=True):
                    sums.append(part)
            content.update(as_bytes(data))
            self._put(tensor.name, data, position)
            position += data.nbytes
            self._advance(block.nbytes)
        record = self._record(tensor.name, content.hexdigest())
        if tensor.kind == Q8_0:
            stats.sum_square, stats.sum_error = np.concatenate(squares), np.concatenate(errors)
            dtype = checkpoint.stored_dtype(info.name)
            record.quantized = summarize(stats, np.concatenate(peaks), dtype, source.hexdigest(), False)
            record.quantized.scale = MSE if info.name in self._plan.searches else ABSMAX
        return {tensor.name: record}

    def _put(self, name: str, values: Array, position: int) -> None:
        place = self._places[name]
        write_at(place.file.descriptor, as_bytes(values), place.offset + position)

    def _record(self, name: str, content: str) -> TensorRecord:
        place = self._places[name]
        return TensorRecord(place.name, place.tensor.dtype, place.tensor.shape, content)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes  # a lost update between threads only makes the progress bar late
        if self._progress is not None:
            self._progress(self._done, self._read_bytes)


def _check_finite(block: Array, info: TensorInfo, first_row: int) -> None:
    """Refuse NaN in any tensor, and infinity in what is computed with; a mask may be made of -inf."""
    computed = info.name.rpartition(".")[2] in _PARAMETERS
    if not cpu.all_finite(block) and (computed or np.isnan(block).any()):
        finite = np.isfinite(block).reshape(len(block) if block.ndim else 1, -1).all(axis=1)
        row = first_row + int(np.argmin(finite))
        raise WeightError(f"{info.file}: {info.name} row {row} holds NaN or infinity; repair or replace the checkpoint")


def _rounded(block: Array, out: OutTensor, info: TensorInfo, first_row: int) -> Array:
    """Values in the output's dtype; an error where it cannot hold their magnitude."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(block, np.float32).astype(DTYPES[out.dtype])
    if cpu.all_finite(values):
        return values
    fits = (np.isfinite(values) | ~np.isfinite(block)).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
    if not fits.all():
        row = first_row + int(np.argmin(fits))
        raise WeightError(
            f"{info.file}: {info.name} row {row} holds a magnitude that {out.dtype} cannot; "
            f"choose another --format, {_OVER}"
        )
    return values


def _check_scales(packed: Array, info: TensorInfo, first_row: int) -> None:
    row = q8_0.first_unfit(packed)
    if row is not None:
        where = f"{info.file}: {info.name} row {first_row + row}"
        raise WeightError(
            f"{where} holds a magnitude that Q8_0's float16 scale cannot; choose another --format, {_OVER}"
        )


def _unfit(values: Array, absmax: Array, info: TensorInfo, first_row: int) -> WeightError:
    """The error for the first row that cannot be quantized: NaN and infinity, or too large for float16."""
    row = int(np.argmin(np.isfinite(absmax)))
    where = f"{info.file}: {info.name} row {first_row + row}"
    magnitudes: Any = np.abs(values[row].astype(np.float32))
    if np.isfinite(magnitudes).all():
        return WeightError(
            f"{where} holds |w| = {magnitudes.max():g}, over float16's {FLOAT16_MAX:g}, which int8 here starts from; "
            f"keep it in floating point by a recipe with skip = [{info.name.removesuffix('.weight')!r}], {_OVER}"
        )
    return WeightError(f"{where} holds NaN or infinity; repair or replace the checkpoint")
