"""Writing an artifact's tensors: read a block of rows, quantize, hash, and put it in its place; from any thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from quantize8.artifact import bitsandbytes
from quantize8.artifact.folder import create, write_at
from quantize8.artifact.layout import OutTensor
from quantize8.artifact.manifest import TensorRecord, digest, summarize
from quantize8.artifact.plan import Plan
from quantize8.checkpoint import TensorInfo
from quantize8.checkpoint.base import FLOATING
from quantize8.checkpoint.structure import CONV1D
from quantize8.errors import WeightError
from quantize8.ops import cpu
from quantize8.ops.reference import FLOAT16_MAX, STATS_TILE_ROWS, Array, ColumnStats, as_bytes

Progress = Callable[[int, int], None]  # bytes of source done, bytes in all


class WeightQuantizer(Protocol):
    """What turns the rows of a weight into int8; one serves one thread at a time."""

    @property
    def block_bytes(self) -> int | None:
        """Of weight that it takes at a time; None for the checkpoint's own."""

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """(block, codes, absmax) of each block [n, K]; `stats` are the whole weight's once all have come."""


class CpuQuantizer:
    """The WeightQuantizer that needs no GPU."""

    block_bytes = None

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """One fused pass over each block."""
        for block in blocks:
            yield (block, *cpu.quantize_rowwise(block, stats))


class _Place(NamedTuple):
    descriptor: int
    offset: int  # of the tensor's first byte, from the start of the file
    file: str
    tensor: OutTensor


class Writer:
    """Writes one source tensor at a time to its places in the output, from any thread."""

    def __init__(self, plan: Plan, folder: Path, progress: Progress | None) -> None:
        self._plan, self._progress, self._done = plan, progress, 0
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []
        with contextlib.ExitStack() as files:
            for shard in plan.shards:
                descriptor = create(folder / shard.file, shard.header, shard.nbytes)
                files.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                for tensor in shard.tensors:
                    place = _Place(descriptor, shard.offsets[tensor.name], shard.file, tensor)
                    self._places[tensor.name] = place
            self._files = files.pop_all()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def flush(self) -> None:
        """Have the disk hold all weight files before going on."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)

    def write(self, info: TensorInfo, quantizer: WeightQuantizer) -> dict[str, TensorRecord]:
        """Read a source tensor, write what becomes of it, and say what was written."""
        if module := self._plan.module_of(info):
            return self._quantize(info, module, quantizer)
        position, content = 0, blake3()
        for block in self._plan.checkpoint.blocks(info.name):
            if info.dtype in FLOATING:
                _check_finite(block, info, 0 if info.shape == () else position * info.shape[0] // max(1, info.nbytes))
            content.update(as_bytes(block))
            self._put(info.name, block, position)
            position += block.nbytes
            self._advance(block.nbytes)
        return {info.name: self._record(info.name, content.hexdigest())}

    def _quantize(self, info: TensorInfo, module: str, quantizer: WeightQuantizer) -> dict[str, TensorRecord]:
        """Quantize a weight block by block; GPT-2's Conv1D, stored [in, out], is turned over whole."""
        transposed = self._plan.modules[module] == CONV1D
        weight, scale, layout = (tensor.name for tensor in bitsandbytes.module_tensors(module, (0, 0)))
        stats = ColumnStats.empty(info.shape[0] if transposed else info.shape[1])
        source, content, position = blake3(), blake3(), 0
        absmax: list[Array] = []

        def rows() -> Iterator[Array]:
            size = info.nbytes if transposed else quantizer.block_bytes
            for block in self._plan.checkpoint.blocks(info.name, size, multiple=STATS_TILE_ROWS):
                source.update(as_bytes(block))
                yield np.ascontiguousarray(block.T) if transposed else block

        for values, codes, peaks in quantizer.quantize(rows(), stats):
            if not np.isfinite(peaks).all():
                raise _unfit(values, peaks, info, sum(len(done) for done in absmax))
            absmax.append(peaks)
            content.update(as_bytes(codes))
            self._put(weight, codes, position)
            position += codes.nbytes
            self._advance(values.nbytes)
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
    if not cpu.all_finite(block):
        finite = np.isfinite(block).reshape(len(block) if block.ndim else 1, -1).all(axis=1)
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
