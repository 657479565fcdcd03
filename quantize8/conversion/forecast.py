"""How long a conversion will take, and how much memory and disk: told by converting a few tensors of each kind.

They are read, quantized, hashed and written as the conversion will do it, by as many threads, into a file on the
output's disk that has no name and goes away. Tensors that are stored alike, and become alike, take as long a byte.
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
from quantize8.memory import peak_rss

MACHINES = (1, 8, 64)
_SECONDS = 0.5  # for each kind of tensor, of which there are two to eight
_SAMPLE_BYTES = 128 * 2**20  # of each kind, for each thread
_TENSOR_BYTES = 160 * 2**20  # a larger one is not tried: it takes long, and room on the disk
_LEADING_BYTES = 16 * 2**20  # of a file that is streamed: two requests
_SAMPLE_TENSORS = 256  # of a kind, at most
_DISK_BYTES = 96 * 2**20  # to measure the disk by
_BLOCK_BYTES = 4 * 2**20
_STREAMED = "streamed"  # there what is fetched takes the time, in the order of the files


@dataclass(frozen=True)
class Share:
    """What each of some machines has to do; of the one that takes longest."""

    machines: int
    files: int  # weight files that it writes
    written_bytes: int
    seconds: float  # with planning, which each does, and the end of the conversion


@dataclass(frozen=True)
class Forecast:
    """Time, memory and disk of a conversion by machines like this one, without what a text to calibrate by takes."""

    threads: int
    shares: list[Share]
    memory: int  # bytes: the most that this process has had, which has planned and converted a sample
    disk: int  # bytes that the output takes while it grows
    free: int  # bytes of that disk
    download: int  # bytes of the hub's that are stored here beforehand; times are of reading them without
    rates: dict[str, float]  # kind of tensor -> bytes read a second, decoded, by all threads together
    disk_rate: float  # bytes written a second, until the disk has them


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
    """What a conversion would do and take: from headers, and by converting a few tensors to nowhere.

    This is both `quantize8 plan` and `convert --dry-run`. The time of uploading to a store is not included.

    Args:
        options: What is asked for.
        destination: Where the artifact would go; None for the default folder.
        quantizers: One for each thread.
        part: The share of the weight files that would be written.
        machines: Numbers of machines to predict the time for.
        overwrite: An artifact may be there.
        token: Hub token.
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
    """Measure, and predict what writing these weight files takes.

    Args:
        plan: Of the conversion.
        units: The weight files to write.
        destination: Where they would go.
        quantizers: One for each thread.
        began: time.perf_counter() when planning began.
        machines: Numbers of machines to predict the time for.

    Raises:
        OutputError: Nothing can be written there; and what a conversion raises, where a sampled tensor shows it.
    """
    planning = time.perf_counter() - began
    folder = next(parent for parent in destination.scratch.absolute().parents if parent.exists())
    try:
        rates = {kind: _rate(plan, names, folder, quantizers) for kind, names in _to_try(plan, units).items()}
        disk_rate = _disk_rate(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); name another folder with --out") from None

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
    )


def _kinds(plan: Plan, units: Sequence[WorkUnit]) -> dict[str, list[str]]:
    """Source tensors by what they are stored as and become."""
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
    """What reading, quantizing, hashing and beginning to write these weight files takes."""
    tensors = plan.checkpoint.tensors
    kinds = {kind: sum(tensors[name].nbytes for name in names) for kind, names in _kinds(plan, units).items()}
    largest = max(rates.values(), default=0.0)  # of what was too large to try: that is mostly copied
    return sum(nbytes / rates.get(kind, largest) for kind, nbytes in kinds.items() if nbytes)


def _to_try(plan: Plan, units: Sequence[WorkUnit]) -> dict[str, list[str]]:
    """The kinds with tensors that are not empty, and not too large to try; all, if no kind has such."""
    kinds, tensors = _kinds(plan, units), plan.checkpoint.tensors
    if plan.checkpoint.one_reader_a_file:
        return kinds
    small = {kind: [n for n in names if 0 < tensors[n].nbytes <= _TENSOR_BYTES] for kind, names in kinds.items()}
    return {kind: names for kind, names in small.items() if names} or {
        kind: [min(names, key=lambda name: tensors[name].nbytes)] for kind, names in kinds.items()
    }


def _rate(plan: Plan, names: list[str], folder: Path, quantizers: Sequence[WeightQuantizer]) -> float:
    """Bytes of these tensors that all threads together read, and write what becomes of, in a second."""
    tensors, outputs = plan.checkpoint.tensors, plan.outputs
    choose = _leading if plan.checkpoint.one_reader_a_file else _spread
    lanes = choose(plan, names, len(quantizers))
    made = [tensor for lane in lanes for name in lane for tensor in outputs[name]]
    ends = [*accumulate(tensor.nbytes for tensor in made)]
    starts = {tensor.name: end - tensor.nbytes for tensor, end in zip(made, ends, strict=True)}
    shard = Shard("sample", made, b"", starts, ends[-1])  # in any order: nobody reads it
    queue: SimpleQueue[list[str]] = SimpleQueue()
    for lane in lanes:
        queue.put(lane)
    with _nameless(folder, shard) as file:
        writer = Writer(plan, places(WorkUnit(1, shard, [], 0), [file]))
        writer.write(lanes[0][0], quantizers[0])  # kernels are compiled, or loaded, when first called
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
    """Some tensors from everywhere, each by itself."""
    tensors = plan.checkpoint.tensors
    mean = max(1, sum(tensors[name].nbytes for name in names) // len(names))
    count = min(max(threads, threads * _SAMPLE_BYTES // mean), _SAMPLE_TENSORS)
    return [[name] for name in names[:: max(1, len(names) // count)]]


def _leading(plan: Plan, names: list[str], threads: int) -> list[list[str]]:
    """The first tensors of as many files as are read side by side: those of which the first tensors are smallest."""
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
    """Bytes that the disk takes in a second."""
    block = os.urandom(_BLOCK_BYTES)
    with _nameless(folder, Shard("sample", [], nbytes=_DISK_BYTES)) as file:
        start = time.perf_counter()
        for offset in range(0, _DISK_BYTES, len(block)):
            write_at(file.descriptor, block, offset)
        os.fsync(file.descriptor)
        return _DISK_BYTES / (time.perf_counter() - start)


@contextmanager
def _nameless(folder: Path, shard: Shard) -> Iterator[WeightFile]:
    """A file that is open, and in no folder any more, where the system allows that."""
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
