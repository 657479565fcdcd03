"""The steps of a conversion, for one process or many: look ahead, write weight files, end it when all are there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantize8.artifact.folder import check_disk, check_output
from quantize8.artifact.journal import SUFFIX, read_heading
from quantize8.artifact.store import Store
from quantize8.artifact.writer import Progress, WeightQuantizer
from quantize8.conversion import remote
from quantize8.conversion.finish import check_finished, finish, unfinished
from quantize8.conversion.forecast import forecast
from quantize8.conversion.measure import measure
from quantize8.conversion.parts import Part
from quantize8.conversion.request import Job, Request, job_of
from quantize8.conversion.result import Conversion, errors_of
from quantize8.conversion.staging import partial_of, staged
from quantize8.conversion.stored import look
from quantize8.conversion.write import heading, missing_bytes, write_units
from quantize8.errors import OutputError


def check_place(out: Path | Store, overwrite: bool, source: Path) -> None:
    """Refuse an output that must not be written to: see `check_output`, and for a store `stored.look`."""
    if isinstance(out, Store):
        look(out)
    else:
        check_output(out, overwrite, source)


def write_part(
    job: Job,
    out: Path | Store,
    part: Part | None,
    quantizers: list[WeightQuantizer],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the weight files of a part, or go on with them; without a part write all of them, and end the conversion.

    Part k of as many as there are `job.units` is weight file k alone. The job is as `Request.prepare` gives it, and
    is used up: its plan gets what is calibrated. It may be called again, at any time and by any process.
    """
    if isinstance(out, Store):
        return remote.write_part(job, out, part, quantizers, overwrite, progress)
    units = job.units if part is None else part.of(job.units)
    names = [unit.shard.file for unit in units]
    found = Conversion(out, job.plan, part=part, files=names)
    if not units:
        return found
    check_disk(out, missing_bytes(out, units))
    decisions, source = job.decisions(), job.plan.checkpoint.folder
    with staged(out, names, decisions, source, overwrite=overwrite, start_over=overwrite) as staging:
        measured = measure(job, staging.calibration, decisions, start_over=overwrite)
        units = [unit for unit in job.units if unit.shard.file in staging.journals]
        written = write_units(job, units, staging, heading(job, decisions, measured), quantizers, progress)
        if part is None:
            found.manifest = finish(job, units, staging, overwrite)
    found.errors, found.kept, found.kept_bytes = errors_of(written.records), written.kept, written.kept_bytes
    return found


def look_ahead(
    request: Request,
    out: Path | Store | None,
    part: Part | None,
    quantizers: list[WeightQuantizer],
    *,
    machines: Sequence[int] = (1,),
    overwrite: bool = False,
    token: str | None = None,
) -> Conversion:
    """What a conversion would do, and take: from headers, and by converting a few tensors to nowhere.

    To a store, the time that putting files takes is not in it.
    """
    start = time.perf_counter()
    job = request.prepare(token, download=False)
    target = out or job.default_out
    check_place(target, overwrite, job.plan.checkpoint.folder)
    units = part.of(job.units) if part else job.units
    local = remote.scratch_of(target) if isinstance(target, Store) else target
    found = forecast(job, units, local, quantizers, start, machines)
    if isinstance(target, Store):  # the disk holds one weight file at a time
        found = replace(found, disk=max((unit.nbytes for unit in units), default=0))
    files, calibrates = [unit.shard.file for unit in units], bool(job.calibration)
    return Conversion(target, job.plan, dry_run=True, part=part, files=files, forecast=found, to_calibrate=calibrates)


def end_parts(
    out: Path | Store, overwrite: bool = False, token: str | None = None, job: Job | None = None
) -> Conversion:
    """Make an artifact of the weight files that all parts have written; see `operations.finalize`.

    Without a `job`, which is used up, it is the one that their journals tell of.
    """
    if isinstance(out, Store):
        return remote.end_parts(out, token, job)
    paths = sorted(partial_of(out).glob(f"*{SUFFIX}"))
    first = next((found for found in map(read_heading, paths) if found), None)
    if first is None:
        raise OutputError(f"{out}: no part of it is here (in {partial_of(out)}); run convert with --part first")
    job = job or job_of(first, out, token)
    check_output(out, overwrite, job.plan.checkpoint.folder)
    decisions = job.decisions()
    names = [unit.shard.file for unit in job.units]
    with staged(out, names, decisions, job.plan.checkpoint.folder, overwrite=overwrite) as staging:
        measured = measure(job, staging.calibration, decisions)
        units = job.units
        check_finished(job, unfinished(units, staging, heading(job, decisions, measured)), out)
        manifest = finish(job, units, staging, overwrite)
    return Conversion(out, job.plan, manifest=manifest, errors=errors_of(manifest.tensors), files=names)
