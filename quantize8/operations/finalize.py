"""The end of a conversion in parts: an artifact of the weight files that several processes have written."""

from __future__ import annotations

import time
from pathlib import Path

from quantize8.artifact.folder import check_output
from quantize8.artifact.journal import SUFFIX, read_heading
from quantize8.conversion.finish import finish, unfinished
from quantize8.conversion.measure import measure
from quantize8.conversion.request import job_of
from quantize8.conversion.result import Conversion, errors_of
from quantize8.conversion.staging import partial_of, staged
from quantize8.conversion.write import heading
from quantize8.errors import OutputError


def finalize(out: str | Path, *, overwrite: bool = False, token: str | None = None) -> Conversion:
    """Write index, config and manifest beside the weight files that `convert --part` wrote, and move all into place.

    The source is opened again, for its headers and small files. Raises OutputError, in one line that names what is
    missing and the command for it, where a weight file is not there, not whole, or of other options than the rest.
    """
    start = time.perf_counter()
    target = Path(out)
    paths = sorted(partial_of(target).glob(f"*{SUFFIX}"))
    first = next((found for found in map(read_heading, paths) if found), None)
    if first is None:
        raise OutputError(f"{target}: no part of it is here (in {partial_of(target)}); run convert with --part first")
    job = job_of(first, token)
    check_output(target, overwrite, job.plan.checkpoint.folder)
    decisions = job.decisions()
    names = [unit.shard.file for unit in job.units]
    with staged(target, names, decisions, job.plan.checkpoint.folder, overwrite=overwrite) as staging:
        measured = measure(job, staging.calibration, decisions)
        units = job.units
        missing = unfinished(units, staging, heading(job, decisions, measured))
        if missing:
            files = ", ".join(unit.shard.file for unit in missing)
            again = f"{job.request.command(target)} --part {missing[0].number}/{len(units)}"
            raise OutputError(f"{target}: not finished: {files}; run {again}")
        manifest = finish(job, units, staging, overwrite)
    seconds = time.perf_counter() - start
    return Conversion(target, job.plan, seconds, manifest, errors_of(manifest.tensors), files=names)
