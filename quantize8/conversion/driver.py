"""A conversion: writes the weight files of a plan to a destination, then the small files and the manifest.

    plan = make_plan(options)                     which tensors become int8, and the position of every byte
    write(plan, destination, ...)                 weight files by several threads, tensor by tensor, then the rest

The position of every byte is fixed beforehand, so the result depends neither on which process wrote it or when, nor on
how often the work was interrupted. The journal of a weight file lists its finished tensors. They are not written again
if their bytes still have the digests that the journal records.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

from blake3 import blake3

from quantize8 import __version__
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, Quantized, TensorRecord, digest
from quantize8.artifact.outliers import OUTLIERS_NAME
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import Plan, WorkUnit, recorded_plan
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import CALIBRATION_NAMES, Destination, Session
from quantize8.destinations.journal import Heading, Journal, Records
from quantize8.destinations.local import Staging, WeightFile, weight_files, write_file
from quantize8.errors import OutputError
from quantize8.files import flush, write_at
from quantize8.formats.base import OutTensor, Shard, WeightQuantizer, index
from quantize8.kernels import GPTQ, MSE
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.kernels.devices import resolve
from quantize8.kernels.reference import as_bytes
from quantize8.sources.base import CONFIG_NAME

Progress = Callable[[int, int], None]  # called with source bytes done, and source bytes in total
_Lane = list[tuple[int, str]]  # (unit, source tensor) pairs that one thread writes in order
_MAX_WORKERS = 8  # more threads do not help: the disk limits the speed
_COPY_BYTES = 4 * 2**20


def write(
    plan: Plan,
    destination: Destination,
    part: Part | None,
    quantizers: list[WeightQuantizer],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the weight files of a part, or resume writing them.

    Without a part, all weight files are written, and the artifact is finished. With as many parts as there are weight
    files, part k is weight file k. Any process may repeat the call at any time.

    Args:
        plan: The result of `make_plan`, not yet calibrated.
        destination: Where the artifact is written.
        part: The share of the weight files to write; None for all.
        quantizers: One quantizer per thread.
        overwrite: Replace an existing artifact, and discard unfinished work with other options.
        progress: Called with the number of source bytes done, and in total.

    Returns:
        The result; it has a manifest if the artifact is finished.

    Raises:
        OutputError: The destination refuses the artifact, a file cannot be written, or the source changed.
        SourceError: The source cannot be read.
        WeightError: A value is NaN or infinite, or too large for the output.
    """
    units = plan.units if part is None else part.of(plan.units)
    result = Conversion(destination.out, plan, part=part, files=[unit.shard.file for unit in units])
    if not units:
        return result
    decisions, records = plan.decisions(), Records()
    with destination.open(units, decisions, plan.checkpoint.folder, overwrite, overwrite) as session:
        plan, heading = _calibrated(plan, session, decisions, overwrite, progress)
        units = [unit for unit in plan.units if unit.shard.file in result.files]
        done, total = 0, sum(unit.read_bytes for unit in units)
        for batch in session.batches(units, heading):
            if batch.records is None:
                with session.staging(batch.units, heading) as staging:
                    work = _Work(plan, batch.units, staging, done, total, progress)
                    work.run(heading, quantizers)
                result.resumed, result.resumed_bytes = result.resumed + work.resumed, result.resumed_bytes + work.held
                records |= work.records
            else:
                result.resumed += sum(len(unit.sources) for unit in batch.units)
                result.resumed_bytes += sum(tensor.nbytes for unit in batch.units for tensor in unit.tensors)
                records |= batch.records
            done += sum(unit.read_bytes for unit in batch.units)
            if progress is not None and batch.records is not None:
                progress(done, total)
        if part is None:
            result.manifest = session.publish(plan.units, partial(assemble, plan, records), overwrite)
    result.plan, result.records = plan, records
    return result


def finalize(
    destination: Destination, overwrite: bool = False, token: str | None = None, plan: Plan | None = None
) -> Conversion:
    """Make an artifact of the weight files that all parts have written.

    Args:
        destination: Where the artifact is written.
        overwrite: Replace an existing artifact.
        token: Hub token.
        plan: The plan of the conversion, not yet calibrated; None to restore it from the journals.

    Returns:
        The result with the manifest.

    Raises:
        OutputError: A weight file is missing, incomplete, or was written with other options than the rest.
    """
    out, heading = destination.out, destination.recorded()
    if heading is None:
        raise OutputError(f"{out}: no part of it is here (in {destination.partial}); run convert with --part first")
    plan = plan or recorded_plan(heading, out, token)
    source, decisions = plan.checkpoint.folder, plan.decisions()
    destination.check(source, overwrite)
    with destination.open(plan.units, decisions, source, overwrite, start_over=False) as session:
        plan, heading = _calibrated(plan, session, decisions)
        records, missing = session.collect(plan.units, heading)
        if missing:
            files = ", ".join(unit.shard.file for unit in missing)
            again = f"{plan.options.command(out)} --part {missing[0].number}/{len(plan.units)}"
            raise OutputError(f"{out}: not finished: {files}; run {again}")
        manifest = session.publish(plan.units, partial(assemble, plan, records), overwrite)
    names = [unit.shard.file for unit in plan.units]
    return Conversion(out, plan, manifest=manifest, records=manifest.tensors, files=names)


def make_quantizers(device: str, scale: str, workers: int | None) -> list[WeightQuantizer]:
    """Make one quantizer per worker thread; with several GPUs, at least one for each GPU.

    Args:
        device: auto, cpu or cuda.
        scale: How scales are chosen, absmax or mse; the search for mse runs on the CPU.
        workers: Number of threads; None for the number of CPUs, but at most 8.

    Raises:
        OutputError: `workers` is below 1, or `scale` is mse and `device` is cuda.
    """
    check_workers(workers)
    if scale == MSE and device == "cuda":
        raise OutputError("scale mse: the search runs on the CPU; leave out --device cuda")
    device = "cpu" if scale == MSE and device == "auto" else resolve(device)
    count = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
    if device == "cpu":
        return [CpuQuantizer() for _ in range(count)]
    import torch

    from quantize8.kernels.stream import GpuQuantizer

    gpus = torch.cuda.device_count()
    return [GpuQuantizer(torch.device("cuda", i % gpus)) for i in range(max(count, gpus))]


def check_workers(workers: int | None) -> None:
    """Raise OutputError if the number of threads is below 1."""
    if workers is not None and workers < 1:
        raise OutputError(f"workers {workers}: must be 1 or more")


class Place(NamedTuple):
    """Where a tensor of the artifact is written."""

    file: WeightFile
    offset: int  # offset of the tensor's first byte from the start of the file
    name: str  # name of the file that holds the tensor in the artifact
    tensor: OutTensor


def places(unit: WorkUnit, files: Sequence[WeightFile]) -> dict[str, Place]:
    """Find where each tensor of a unit is written.

    Args:
        unit: The unit.
        files: Its weight file, and its file of outlier columns if it has one.

    Returns:
        Output tensor -> its place.
    """
    found: dict[str, Place] = {}
    for shard, file, name in zip((unit.shard, unit.outliers), files, (unit.shard.file, OUTLIERS_NAME), strict=False):
        if shard is not None:
            found |= {each.name: Place(file, shard.offsets[each.name], name, each) for each in shard.tensors}
    return found


@dataclass(frozen=True)
class Writer:
    """Converts one source tensor at a time and writes the result to its place; can be used from any thread.

    Attributes:
        plan: The plan of the conversion.
        places: Output tensor -> where it is written.
        advance: Called with the number of source bytes that were read.
    """

    plan: Plan
    places: Mapping[str, Place]
    advance: Callable[[int], None] | None = None

    def holds(self, source: str, records: Mapping[str, TensorRecord]) -> bool:
        """Whether the output of a source tensor has been written already, according to the digests of its bytes.

        Args:
            source: Name of the source tensor.
            records: The records of its output tensors in a journal.
        """
        for name, record in records.items():
            place = self.places.get(name)
            if place is None or (place.tensor.dtype, place.tensor.shape) != (record.dtype, record.shape):
                return False
            if place.file.digest(place.offset, place.tensor.nbytes) != record.blake3:
                return False
        if self.advance is not None and source in self.plan.checkpoint.tensors:
            self.advance(self.plan.checkpoint.tensors[source].nbytes)
        return True

    def write(self, source: str, quantizer: WeightQuantizer) -> Records:
        """Encode a source tensor, write the resulting output tensors, and return their records."""
        digests = {tensor.name: blake3() for tensor in self.plan.tensors_of(source)}
        positions = dict.fromkeys(digests, 0)
        pieces, quantized = self.plan.format.encode(self.plan, source, quantizer), dict[str, Quantized]()
        while True:
            try:
                name, values, read = next(pieces)
            except StopIteration as end:
                quantized = dict(end.value)
                break
            data, place = as_bytes(values), self.places[name]
            digests[name].update(data)
            write_at(place.file.descriptor, data, place.offset + positions[name])
            positions[name] += len(data)
            if self.advance is not None:
                self.advance(read)
        records: Records = {}
        for name, content in digests.items():
            _, _, file, tensor = self.places[name]
            records[name] = TensorRecord(file, tensor.dtype, tensor.shape, content.hexdigest(), quantized.get(name))
        return records


class _Work:
    """Writes some weight files with several threads."""

    def __init__(
        self,
        plan: Plan,
        units: Sequence[WorkUnit],
        staging: Staging,
        done: int,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._plan, self._units, self._out = plan, units, staging.out
        self._checkpoint, self._tensors = plan.checkpoint, plan.checkpoint.tensors
        self._journals = {unit.number: staging.journals[unit.shard.file] for unit in units}
        self._files = {unit.number: weight_files(staging.out, unit) for unit in units}
        self._left = {unit.number: len(unit.sources) for unit in units}
        self._count = threading.Lock()
        self._done, self._total, self._progress = done, total, progress
        self._places = {name: each for unit in units for name, each in places(unit, self._files[unit.number]).items()}
        self._writer = Writer(plan, self._places, self._advance if progress else None)
        self._free: SimpleQueue[WeightQuantizer] = SimpleQueue()
        self._stopped = threading.Event()
        self.records, self.resumed, self.held = Records(), 0, 0

    def run(self, heading: Heading, quantizers: list[WeightQuantizer]) -> None:
        """Write the weight files, or resume; each gets its final name in the staging folder when it is complete."""
        for quantizer in quantizers:
            self._free.put(quantizer)
        for unit in self._units:
            journal, there = self._journals[unit.number], [file.reserve() for file in self._files[unit.number]]
            journal.begin(heading, self._usable(journal, heading) if all(there) else {})
        try:
            self._in_threads(self._lanes(), len(quantizers))
        finally:
            for file in (file for files in self._files.values() for file in files):
                file.close()
        if self._checkpoint.fingerprint() != heading["decisions"]["source"]["files"]:
            raise OutputError(f"{self._out}: the source changed while it was read; run the same command again")

    def _lanes(self) -> list[_Lane]:
        """One lane per tensor, or one per source file if files are streamed, which needs a single reader in order."""
        order = {name: position for position, name in enumerate(self._tensors)}
        pairs = [(unit.number, name) for unit in self._units for name in unit.sources]
        pairs.sort(key=lambda pair: order.get(pair[1], len(order)))
        lanes: dict[str, _Lane] = {}
        for number, name in pairs:
            key = self._file_of(name) if self._checkpoint.one_reader_a_file and name in self._tensors else name
            lanes.setdefault(key, []).append((number, name))
        return list(lanes.values())

    def _usable(self, journal: Journal, heading: Heading) -> dict[str, Records]:
        """The entries of a journal, except those whose source file has been replaced or copied since."""
        before, now = journal.heading.get("decisions"), heading["decisions"]
        if before is None or journal.heading.get("calibration_blake3") != heading["calibration_blake3"]:
            return {}
        stamps = before["source"]["files"]
        touched = {file for file, stamp in now["source"]["files"].items() if stamps[file] != stamp}
        if touched and self._checkpoint.decoded:  # a weight may come from several files
            return {}
        entries = journal.entries.items()
        return {name: records for name, records in entries if not touched or self._file_of(name) not in touched}

    def _file_of(self, name: str) -> str:
        return self._tensors[name].file if name in self._tensors else ""

    def _in_threads(self, lanes: list[_Lane], threads: int) -> None:
        """Write all lanes with `threads` threads; the first failure stops the others."""
        with ThreadPoolExecutor(threads) as pool:
            futures: list[Future[Records]] = [pool.submit(self._write, lane) for lane in lanes]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stopped.set()
                for future in futures:
                    future.cancel()
            # of several failures, report the first in storage order, so that the message does not depend on timing
            failed = [future for future in futures if not future.cancelled() and future.exception()]
            for future in failed or futures:
                self.records.update(future.result())

    def _write(self, lane: _Lane) -> Records:
        """Write the tensors of a lane that are not there yet.

        New tensors are entered in the journal only after their source file is confirmed to be intact.
        """
        quantizer, made, result = self._free.get(), list[tuple[int, str, Records]](), Records()
        try:
            for number, name in lane:
                if self._stopped.is_set():
                    return {}
                records = self._journals[number].entries.get(name)
                if records is not None and self._writer.holds(name, records):
                    with self._count:
                        self.resumed += 1
                        self.held += sum(self._places[record].tensor.nbytes for record in records)
                    self._one_done(number)
                else:
                    records = self._writer.write(name, quantizer)
                    made.append((number, name, records))
                result |= records
            if made and self._checkpoint.one_reader_a_file and made[0][1] in self._tensors:
                self._checkpoint.confirm(self._file_of(made[0][1]))
            for number, name, records in made:
                self._journals[number].append(name, records)
                self._one_done(number)
        finally:
            self._free.put(quantizer)
        return result

    def _one_done(self, number: int) -> None:
        """Count a tensor of a weight file as done; after the last one, give the file its final name."""
        with self._count:
            self._left[number] -= 1
            last = self._left[number] == 0
        if last:
            for file in self._files[number]:
                file.finish()

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes  # an update lost between threads only delays the progress bar
        if self._progress is not None:
            self._progress(self._done, self._total)


def _calibrated(
    plan: Plan,
    session: Session,
    decisions: dict[str, Any],
    start_over: bool = False,
    progress: Progress | None = None,
) -> tuple[Plan, Heading]:
    """Return the plan with the results of calibration, and the heading of the journals of its weight files.

    The heading also contains the options, for a process elsewhere that finalizes the conversion.
    """
    measured = ""
    if plan.calibration:
        from quantize8.conversion.calibration import calibrated
        from quantize8.conversion.rounding import rounded

        with session.calibration() as folder:
            plan, measured = calibrated(plan, folder / CALIBRATION_NAMES[0], decisions, start_over)
            if plan.options.rounding == GPTQ:
                plan, chosen = rounded(plan, folder, decisions, start_over, progress)
                measured = digest(f"{measured} {chosen}".encode())
    return plan, {"decisions": decisions, "request": plan.options.recorded(), "calibration_blake3": measured}


def assemble(plan: Plan, records: Records, folder: Path, parts: Path) -> Manifest:
    """Write all files of an artifact except the weight files; the manifest is written last.

    If this is interrupted at any point, it can be called again.

    Args:
        plan: The plan of the conversion, calibrated.
        records: The records of all output tensors.
        folder: The folder of the artifact's files; the weight files may be elsewhere.
        parts: The folder with the outlier columns of each weight file.

    Returns:
        The manifest.
    """
    checkpoint = plan.checkpoint
    for path in folder.iterdir():  # left by an earlier, interrupted call
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in {shard.file for shard in plan.shards}:
            path.unlink()
    manifest = Manifest(
        __version__,
        plan.format.name,
        checkpoint.identity,
        plan.recipe.as_json(),
        checkpoint.stored_bytes,
        kept=plan.kept,
        calibration=plan.calibration,
        closed_to=plan.closed_to,
        tensors=records,
        headers={shard.file: digest(shard.header) for shard in (*plan.shards, plan.outliers) if shard is not None},
    )
    if plan.outliers is not None:
        _merge(plan.outliers, plan.units, folder, parts)
    if plan.format.is_folder:
        checkpoint.write_companions(folder)
        config = plan.format.edit_config(checkpoint.config, plan)
        indexed = index(plan.shards, always=plan.outliers is not None)
        for name, data in {**indexed, CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}.items():
            write_file(folder / name, data)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    others = {name: path for name, path in paths.items() if name not in manifest.headers}
    for path in others.values():
        flush(path)
    manifest.files = {name: digest(path.read_bytes()) for name, path in others.items()}
    write_file(folder / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _merge(outliers: Shard, units: Sequence[WorkUnit], folder: Path, parts: Path) -> None:
    """Merge the outlier columns that were written beside each weight file into a single file."""
    with (folder / outliers.file).open("wb+") as target:
        write_at(target.fileno(), outliers.header, 0)
        for part in (unit.outliers for unit in units):
            if part is None:
                continue
            with (parts / part.file).open("rb") as source:
                for tensor in part.tensors:
                    _copy(source, part.offsets[tensor.name], target, outliers.offsets[tensor.name], tensor.nbytes)
    flush(folder / outliers.file)


def _copy(source: BinaryIO, start: int, target: BinaryIO, offset: int, nbytes: int) -> None:
    source.seek(start)
    while nbytes:
        data = source.read(min(nbytes, _COPY_BYTES))
        if not data:
            raise OutputError(f"{source.name}: is truncated; remove it and run the same command again")
        write_at(target.fileno(), data, offset)
        offset, nbytes = offset + len(data), nbytes - len(data)
