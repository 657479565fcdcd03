"""The end of a conversion: outlier columns brought together, the small files, the manifest, and the move into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from quantize8 import __version__
from quantize8.artifact.folder import write_file
from quantize8.artifact.journal import Records, records_of
from quantize8.artifact.layout import Shard, index
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, digest
from quantize8.artifact.store import Store
from quantize8.artifact.units import Unit
from quantize8.checkpoint.base import CONFIG_NAME
from quantize8.conversion.request import Job
from quantize8.conversion.staging import Staging, weight_files
from quantize8.conversion.write import agrees
from quantize8.errors import OutputError
from quantize8.files import flush, write_at

_COPY_BYTES = 4 * 2**20


class Folders(Protocol):
    """Where an artifact is put together."""

    files: Path  # its files
    folder: Path  # the outlier columns of each weight file


def finish(job: Job, units: Sequence[Unit], staging: Staging, overwrite: bool) -> Manifest:
    """Make an artifact of weight files that are all there, and move it to its place; returns its manifest.

    Stopped at any moment, it can be called again.
    """
    records: Records = {}
    for unit in units:
        records |= records_of(staging.journals[unit.shard.file].entries)
    manifest = assemble(job, units, staging, records)
    staging.publish(overwrite)
    return manifest


def unfinished(units: Sequence[Unit], staging: Staging, heading: dict[str, Any]) -> list[Unit]:
    """The units that are not whole, or not all of whose tensors are in a journal of this heading's decisions."""
    found = []
    for unit in units:
        journal = staging.journals[unit.shard.file]
        whole = all(file.is_whole for file in weight_files(staging.out, unit))
        if not (whole and agrees(journal.heading, heading) and journal.entries.keys() >= set(unit.sources)):
            found.append(unit)
    return found


def check_finished(job: Job, missing: Sequence[Unit], out: Path | Store) -> None:
    """Raise OutputError where a unit is not finished, with the command for the first."""
    if missing:
        files = ", ".join(unit.shard.file for unit in missing)
        again = f"{job.request.command(out)} --part {missing[0].number}/{len(job.units)}"
        raise OutputError(f"{out}: not finished: {files}; run {again}")


def assemble(job: Job, units: Sequence[Unit], staging: Folders, records: Records) -> Manifest:
    """Put all other files beside the weight files, which may be elsewhere; the manifest is written last."""
    plan, folder, checkpoint = job.plan, staging.files, job.plan.checkpoint
    _clear(folder, {unit.shard.file for unit in units})
    manifest = Manifest(
        __version__,
        plan.format.name,
        checkpoint.identity,
        plan.recipe.as_json(),
        plan.source_bytes,
        kept=plan.kept,
        calibration=job.calibration,
        tensors=records,
        headers={shard.file: digest(shard.header) for shard in plan.files},
    )
    if plan.outliers is not None:
        _gather(plan.outliers, units, staging)
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


def _gather(outliers: Shard, units: Sequence[Unit], staging: Folders) -> None:
    """Write the file of all outlier columns from those that were written beside each weight file."""
    with (staging.files / outliers.file).open("wb+") as target:
        write_at(target.fileno(), outliers.header, 0)
        for part in (unit.outliers for unit in units):
            if part is None:
                continue
            with (staging.folder / part.file).open("rb") as source:
                for tensor in part.tensors:
                    _copy(source, part.offsets[tensor.name], target, outliers.offsets[tensor.name], tensor.nbytes)
    flush(staging.files / outliers.file)


def _copy(source: BinaryIO, start: int, target: BinaryIO, offset: int, nbytes: int) -> None:
    source.seek(start)
    while nbytes:
        data = source.read(min(nbytes, _COPY_BYTES))
        if not data:
            raise OutputError(f"{source.name}: ends early; remove it and run the same command again")
        write_at(target.fileno(), data, offset)
        offset, nbytes = offset + len(data), nbytes - len(data)


def _clear(folder: Path, names: set[str]) -> None:
    """Remove what an earlier end of this conversion, which was stopped, had written."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()
