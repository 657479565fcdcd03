"""Predicts the time, memory and disk space of a conversion, by converting a few tensors of each kind.

These are read, quantized, hashed and written as in the conversion, by the same number of threads, to a temporary file
on the output's disk. The time per byte is assumed to be the same for all tensors with the same source and output dtype.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from quantize8.conversion.driver import Writer, places
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import Plan, WorkUnit, make_plan
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import Destination
from quantize8.destinations.local import LocalFolder, WeightFile
from quantize8.errors import OutputError
from quantize8.files import WINDOWS, write_at
from quantize8.formats.base import Shard, WeightQuantizer
from quantize8.kernels import GPTQ
from quantize8.memory import peak_rss

if TYPE_CHECKING:
    from quantize8.conversion.rounding import RoundingCost

MACHINES = (1, 8, 64)
_SECONDS = 0.5  # for each kind of tensor; a model has two to eight kinds
_SAMPLE_BYTES = 128 * 2**20  # per kind and thread
_TENSOR_BYTES = 160 * 2**20  # larger tensors are not sampled: they take too much time and disk space
_LEADING_BYTES = 16 * 2**20  # of a streamed file: two requests
_SAMPLE_TENSORS = 256  # per kind, at most
_DISK_BYTES = 96 * 2**20  # written to measure the speed of the disk
_BLOCK_BYTES = 4 * 2**20
_STREAMED = "streamed"  # the only kind of a streamed source: its files are fetched in order, which dominates the time


@dataclass(frozen=True)
class Share:
    """The work of one machine if a conversion is divided among several; that of the slowest machine."""

    machines: int
    files: int  # number of weight files that it writes
    written_bytes: int
    seconds: float  # with planning, which each machine does, and finalizing


@dataclass(frozen=True)
class Forecast:
    """Predicted time, memory and disk space of a conversion on machines like this one, without calibration."""

    threads: int
    shares: list[Share]
    memory: int  # bytes: peak memory of this process, after planning and converting the sample
    disk: int  # bytes that the output takes during the conversion
    free: int  # free bytes on that disk
    download: int  # bytes to download from the hub first; times do not include the download
    rates: dict[str, float]  # kind of tensor -> decoded source bytes per second, all threads together
    disk_rate: float  # bytes written per second, including the sync to disk
    rounding: RoundingCost | None = None  # of choosing codes, which one machine does before all others begin


def look_ahead(
    options: ConvertOptions,
    destination: Destination | None,
    quantizers: Sequence[WeightQuantizer],
    *,
    part: Part | None = None,
    machines: Sequence[int] = (1,),
    overwrite: bool = False,
    token: str | None = None,
) -> Conversion:
    """Plan a conversion and predict its time, memory and disk space, without keeping any output.

    This implements both `quantize8 plan` and `convert --dry-run`. The time to upload to a store is not included.

    Args:
        options: The options of the conversion.
        destination: Where the artifact would be written; None for the default folder.
        quantizers: One quantizer per thread.
        part: The share of the weight files that would be written; None for all.
        machines: Numbers of machines to predict the time for.
        overwrite: An existing artifact may be replaced.
        token: Hub token.

    Returns:
        The result of a dry run, with the forecast.

    Raises:
        OutputError: The destination refuses the artifact, or its disk cannot be written.
    """
    began = time.perf_counter()
    plan = make_plan(options, token, download=False)
    destination = destination or LocalFolder(plan.default_out)
    destination.check(plan.checkpoint.folder, overwrite)
    units = part.of(plan.units) if part else plan.units
    return Conversion(
        destination.out,
        plan,
        dry_run=True,
        part=part,
        files=[unit.shard.file for unit in units],
        forecast=forecast(plan, units, destination, quantizers, began, machines),
        to_calibrate=bool(plan.calibration),
    )


def forecast(
    plan: Plan,
    units: Sequence[WorkUnit],
    destination: Destination,
    quantizers: Sequence[WeightQuantizer],
    began: float,
    machines: Sequence[int] = MACHINES,
) -> Forecast:
    """Measure a sample, and predict the cost of writing some weight files.

    Args:
        plan: The plan of the conversion.
        units: The weight files to write.
        destination: Where they would be written.
        quantizers: One quantizer per thread.
        began: time.perf_counter() when planning began.
        machines: Numbers of machines to predict the time for.

    Raises:
        OutputError: The destination's disk cannot be written.
        Quantize8Error: Converting a sampled tensor failed, as the conversion would.
    """
    planning = time.perf_counter() - began
    folder = next(parent for parent in destination.scratch.absolute().parents if parent.exists())
    try:
        rates = {kind: _rate(plan, names, folder, quantizers) for kind, names in _to_try(plan, units).items()}
        disk_rate = _disk_rate(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder with --out") from None

    def share(count: int) -> Share:
        found = []
        for number in range(1, count + 1):
            own = Part(number, count).of(units)
            nbytes = sum(unit.nbytes for unit in own)
            found.append((max(_seconds(plan, own, rates), nbytes / disk_rate), nbytes, len(own)))
        seconds, nbytes, files = max(found, default=(0.0, 0, 0))
        return Share(count, files, nbytes, seconds + planning * (1 if count == 1 else 2))

    shares = [share(count) for count in machines]
    stored = plan.options.stream or not plan.checkpoint.one_reader_a_file
    return Forecast(
        threads=len(quantizers),
        shares=shares,
        memory=peak_rss(),
        disk=destination.disk_bytes(units),
        free=shutil.disk_usage(folder).free,
        download=0 if stored else plan.source_bytes,
        rates=rates,
        disk_rate=disk_rate,
        rounding=_rounding_cost(plan),
    )


def _rounding_cost(plan: Plan) -> RoundingCost | None:
    if plan.options.rounding != GPTQ:
        return None
    from quantize8.conversion.rounding import cost_of

    return cost_of(plan)


def _kinds(plan: Plan, units: Sequence[WorkUnit]) -> dict[str, list[str]]:
    """Group the source tensors by kind."""
    found: dict[str, list[str]] = {}
    for unit in units:
        for name in unit.sources:
            if name in plan.checkpoint.tensors:
                found.setdefault(_kind(plan, name), []).append(name)
    return found


def _kind(plan: Plan, name: str) -> str:
    checkpoint = plan.checkpoint
    if checkpoint.one_reader_a_file:
        return _STREAMED
    what = "matrices" if len(checkpoint.tensors[name].shape) > 1 else "vectors"
    return f"{checkpoint.tensors[name].stored_dtype} to {plan.outputs[name][0].dtype}, {what}"


def _seconds(plan: Plan, units: Sequence[WorkUnit], rates: dict[str, float]) -> float:
    """Predict the seconds to read, quantize, hash and write these weight files, without the sync to disk."""
    tensors = plan.checkpoint.tensors
    kinds = {kind: sum(tensors[name].nbytes for name in names) for kind, names in _kinds(plan, units).items()}
    largest = max(rates.values(), default=0.0)  # for kinds too large to sample, which are mostly copied
    return sum(nbytes / rates.get(kind, largest) for kind, nbytes in kinds.items() if nbytes)


def _to_try(plan: Plan, units: Sequence[WorkUnit]) -> dict[str, list[str]]:
    """Select the tensors to sample, by kind: neither empty nor too large. If there are none, the smallest of each."""
    kinds, tensors = _kinds(plan, units), plan.checkpoint.tensors
    if plan.checkpoint.one_reader_a_file:
        return kinds
    small = {kind: [n for n in names if 0 < tensors[n].nbytes <= _TENSOR_BYTES] for kind, names in kinds.items()}
    return {kind: names for kind, names in small.items() if names} or {
        kind: [min(names, key=lambda name: tensors[name].nbytes)] for kind, names in kinds.items()
    }


def _rate(plan: Plan, names: list[str], folder: Path, quantizers: Sequence[WeightQuantizer]) -> float:
    """Measure how many bytes of these tensors all threads together convert per second, in source bytes."""
    tensors, outputs = plan.checkpoint.tensors, plan.outputs
    choose = _leading if plan.checkpoint.one_reader_a_file else _spread
    lanes = choose(plan, names, len(quantizers))
    made = [tensor for lane in lanes for name in lane for tensor in outputs[name]]
    ends = [*accumulate(tensor.nbytes for tensor in made)]
    starts = {tensor.name: end - tensor.nbytes for tensor, end in zip(made, ends, strict=True)}
    shard = Shard("sample", made, b"", starts, ends[-1])  # the order does not matter, as the file is never read
    queue: SimpleQueue[list[str]] = SimpleQueue()
    for lane in lanes:
        queue.put(lane)
    with _nameless(folder, shard) as file:
        writer = Writer(plan, places(WorkUnit(1, shard, [], 0), [file]))
        writer.write(lanes[0][0], quantizers[0])  # the first call compiles or loads the kernels
        deadline = time.perf_counter() + _SECONDS

        def work(quantizer: WeightQuantizer) -> float:
            done, start = 0, time.perf_counter()
            while done == 0 or time.perf_counter() < deadline:
                try:
                    lane = queue.get_nowait()
                except Empty:
                    break
                for name in lane:
                    writer.write(name, quantizer)
                    done += tensors[name].nbytes
            return done / (time.perf_counter() - start)

        with ThreadPoolExecutor(len(quantizers)) as pool:
            return sum(pool.map(work, quantizers))


def _spread(plan: Plan, names: list[str], threads: int) -> list[list[str]]:
    """Choose tensors spread over the whole model, one per lane."""
    tensors = plan.checkpoint.tensors
    mean = max(1, sum(tensors[name].nbytes for name in names) // len(names))
    count = min(max(threads, threads * _SAMPLE_BYTES // mean), _SAMPLE_TENSORS)
    return [[name] for name in names[:: max(1, len(names) // count)]]


def _leading(plan: Plan, names: list[str], threads: int) -> list[list[str]]:
    """Choose the first tensors of one file per thread, preferring files whose first tensors are small."""
    tensors = plan.checkpoint.tensors
    files: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    wanted = {*names}
    for name in filter(wanted.__contains__, tensors):
        file = tensors[name].file
        if sizes.get(file, 0) < _LEADING_BYTES:
            files.setdefault(file, []).append(name)
            sizes[file] = sizes.get(file, 0) + tensors[name].nbytes
    return [files[file] for file in sorted(files, key=lambda file: sizes[file])[:threads]]


def _disk_rate(folder: Path) -> float:
    """Measure how many bytes per second the disk writes."""
    block = os.urandom(_BLOCK_BYTES)
    with _nameless(folder, Shard("sample", [], nbytes=_DISK_BYTES)) as file:
        start = time.perf_counter()
        for offset in range(0, _DISK_BYTES, len(block)):
            write_at(file.descriptor, block, offset)
        os.fsync(file.descriptor)
        return _DISK_BYTES / (time.perf_counter() - start)


@contextmanager
def _nameless(folder: Path, shard: Shard) -> Iterator[WeightFile]:
    """Open a temporary file, which is already deleted from its folder if the system allows that."""
    file = WeightFile(folder / f".quantize8-{uuid.uuid4().hex}", shard.header, shard.nbytes)
    try:
        file.reserve()
        assert file.descriptor
        if not WINDOWS:
            file.remove()
        yield file
    finally:
        file.close()
        file.remove()
