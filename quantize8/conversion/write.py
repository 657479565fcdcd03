"""Writing weight files: every tensor that a journal does not have yet, by several threads, in any order.

Every byte has its place beforehand, so the result depends neither on who wrote it nor on when, nor on how often the
work was interrupted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from quantize8.artifact.folder import WeightFile, check_disk
from quantize8.artifact.journal import Journal, Records
from quantize8.artifact.units import Unit
from quantize8.artifact.writer import CpuQuantizer, Place, Progress, WeightQuantizer, Writer, places
from quantize8.checkpoint import Checkpoint
from quantize8.conversion.request import Job
from quantize8.conversion.staging import Staging, weight_files
from quantize8.errors import OutputError
from quantize8.ops.choice import resolve
from quantize8.ops.scales import MSE

Lane = list[tuple[int, str]]  # tensors that one thread writes, in this order: unit, source tensor
_MAX_WORKERS = 8  # beyond this many threads the disk is the limit


@dataclass
class Written:
    """What has become of some weight files."""

    records: Records  # of all their tensors
    kept: int = 0  # source tensors that an earlier run had finished
    kept_bytes: int = 0  # of them, as they are written


def check_workers(workers: int | None) -> None:
    """Refuse a number of threads that is none."""
    if workers is not None and workers < 1:
        raise OutputError(f"workers {workers}: must be 1 or more")


def make_quantizers(device: str, scale: str, workers: int | None) -> list[WeightQuantizer]:
    """One for each worker; several GPUs get at least one each. `device` is auto, cpu or cuda."""
    check_workers(workers)
    if scale == MSE and device == "cuda":
        raise OutputError("scale mse: is searched on the CPU; leave out --device cuda")
    device = "cpu" if scale == MSE and device == "auto" else resolve(device)
    count = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
    if device == "cpu":
        return [CpuQuantizer() for _ in range(count)]
    import torch

    from quantize8.ops.stream import GpuQuantizer

    gpus = torch.cuda.device_count()
    return [GpuQuantizer(torch.device("cuda", i % gpus)) for i in range(max(count, gpus))]


def heading(job: Job, decisions: dict[str, Any], measured: str) -> dict[str, Any]:
    """What a journal begins with: what decides the bytes, and the request, for who ends the conversion elsewhere."""
    return {"decisions": decisions, "request": asdict(job.request.noted()), "calibration_blake3": measured}


def agrees(found: dict[str, Any], heading: dict[str, Any]) -> bool:
    """Whether a journal with the heading `found` is of the same bytes."""
    return all(found.get(key) == heading[key] for key in ("decisions", "calibration_blake3"))


def missing_bytes(out: Path, units: Sequence[Unit]) -> int:
    """What the disk must still hold; outlier columns count twice, as they are brought together at the end."""
    wanted = sum(unit.nbytes + (unit.outliers.nbytes if unit.outliers else 0) for unit in units)
    return wanted - sum(file.held_bytes for unit in units for file in weight_files(out, unit))


def write_units(
    job: Job,
    units: Sequence[Unit],
    staging: Staging,
    heading: dict[str, Any],
    quantizers: list[WeightQuantizer],
    progress: Progress | None = None,
) -> Written:
    """Write these weight files into the staging folder, or finish them; each has its name there when it is whole.

    What their journals have is kept, where its bytes still have the digests that were noted.
    """
    work = _Work(job, units, staging, progress)
    check_disk(staging.out, missing_bytes(staging.out, units))
    work.begin(heading)
    try:
        for records in _in_threads(work.write, work.lanes, quantizers):
            work.written.records.update(records)
    finally:
        for file in work.files:
            file.close()
    if job.plan.checkpoint.fingerprint() != heading["decisions"]["source"]["files"]:
        raise OutputError(f"{staging.out}: the source changed while it was read; run the same command again")
    return work.written


class _Work:
    """The state that threads share."""

    def __init__(self, job: Job, units: Sequence[Unit], staging: Staging, progress: Progress | None) -> None:
        self._units, self._checkpoint, self._tensors = units, job.plan.checkpoint, job.plan.checkpoint.tensors
        self._decoded = bool(job.plan.checkpoint.decoded)
        self._journals = {unit.number: staging.journals[unit.shard.file] for unit in units}
        self._files = {unit.number: weight_files(staging.out, unit) for unit in units}
        self._left = {unit.number: len(unit.sources) for unit in units}
        self._count = threading.Lock()
        order = {name: position for position, name in enumerate(self._tensors)}
        pairs = [(unit.number, name) for unit in units for name in unit.sources]
        pairs.sort(key=lambda pair: order.get(pair[1], len(order)))
        self.lanes = _lanes(self._checkpoint, pairs)
        self.written = Written({})
        found: dict[str, Place] = {}
        for unit in units:
            found |= places(unit, self._files[unit.number])
        read = sum(map(job.read_bytes, units))
        self._writer = Writer(job.plan, found, read, progress)

    @property
    def files(self) -> list[WeightFile]:
        """All that are written."""
        return [file for files in self._files.values() for file in files]

    def begin(self, heading: dict[str, Any]) -> None:
        """Reserve the disk's space, and begin the journals or go on with them."""
        for unit in self._units:
            journal, there = self._journals[unit.number], [file.reserve() for file in self._files[unit.number]]
            journal.begin(heading, self._usable(journal, heading) if all(there) else {})

    def _usable(self, journal: Journal, heading: dict[str, Any]) -> dict[str, Records]:
        """The entries of a journal but for those whose source file has another time: it was mended, or copied."""
        before, now = journal.heading.get("decisions"), heading["decisions"]
        if before is None or journal.heading.get("calibration_blake3") != heading["calibration_blake3"]:
            return {}
        stamps = before["source"]["files"]
        touched = {file for file, stamp in now["source"]["files"].items() if stamps[file] != stamp}
        if touched and self._decoded:  # a weight may be of several files
            return {}
        entries = journal.entries.items()
        return {name: records for name, records in entries if not touched or self._file_of(name) not in touched}

    def _file_of(self, name: str) -> str:
        return self._tensors[name].file if name in self._tensors else ""

    def write(self, lane: Lane, quantizer: WeightQuantizer, stopped: threading.Event) -> Records:
        """Write what becomes of the tensors of a lane, or find that it is there; noted when their file is confirmed."""
        made: list[tuple[int, str, Records]] = []
        found: Records = {}
        for number, name in lane:
            if stopped.is_set():
                return {}
            records = self._journals[number].entries.get(name)
            if records is not None and self._writer.holds(name, records):
                with self._count:
                    self.written.kept += 1
                    self.written.kept_bytes += self._writer.written_bytes(records)
                self._done(number)
            else:
                info = self._tensors.get(name)
                records = self._writer.write(info, quantizer) if info else self._writer.write_computed(name)
                made.append((number, name, records))
            found |= records
        if made and self._checkpoint.one_reader_a_file and made[0][1] in self._tensors:
            self._checkpoint.confirm(self._file_of(made[0][1]))
        for number, name, records in made:
            self._journals[number].append(name, records)
            self._done(number)
        return found

    def _done(self, number: int) -> None:
        """One more tensor of a weight file is there; the last gives the file its name."""
        with self._count:
            self._left[number] -= 1
            last = self._left[number] == 0
        if last:
            for file in self._files[number]:
                file.finish()


def _lanes(checkpoint: Checkpoint, pairs: list[tuple[int, str]]) -> list[Lane]:
    """Each tensor by itself, or all of a source's file together, where that is a stream."""
    found: dict[str, Lane] = {}
    for number, name in pairs:
        info = checkpoint.tensors.get(name)
        found.setdefault(info.file if info and checkpoint.one_reader_a_file else name, []).append((number, name))
    return list(found.values())


def _in_threads(
    work: Callable[[Lane, WeightQuantizer, threading.Event], Records],
    items: list[Lane],
    quantizers: list[WeightQuantizer],
) -> list[Records]:
    """Results of `work` on each item, as many at once as there are quantizers; the first failure stops the rest."""
    free: SimpleQueue[WeightQuantizer] = SimpleQueue()
    stopped = threading.Event()
    for quantizer in quantizers:
        free.put(quantizer)

    def with_one(item: Lane) -> Records:
        quantizer = free.get()
        try:
            return work(item, quantizer, stopped)
        finally:
            free.put(quantizer)

    with ThreadPoolExecutor(len(quantizers)) as pool:
        futures: list[Future[Records]] = [pool.submit(with_one, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
        # of several failures the earliest in storage order, so that the message does not depend on the threads
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in (failed or futures)]
