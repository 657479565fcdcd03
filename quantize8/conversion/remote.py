"""A conversion to a store: each weight file is written here, put to its place whole, and removed here.

There are no locks in a store: two processes that write one file put the same bytes to the same place.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize8.artifact.folder import check_disk
from quantize8.artifact.journal import SUFFIX, Records, begun
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, digest
from quantize8.artifact.store import PARTIAL, Store
from quantize8.artifact.units import Unit
from quantize8.artifact.writer import Progress, WeightQuantizer
from quantize8.checkpoint.base import CONFIG_NAME
from quantize8.conversion.finish import assemble, check_finished
from quantize8.conversion.measure import measure
from quantize8.conversion.parts import Part
from quantize8.conversion.request import Job, job_of
from quantize8.conversion.result import Conversion, errors_of
from quantize8.conversion.staging import staged
from quantize8.conversion.stored import CALIBRATION, ENDING, Found, accept, look
from quantize8.conversion.write import Written, agrees, heading, missing_bytes, write_units
from quantize8.errors import OutputError, Quantize8Error
from quantize8.resources import cache_dir

_ELSE = "set XDG_CACHE_HOME to a folder on another disk"


def write_part(
    job: Job,
    store: Store,
    part: Part | None,
    quantizers: list[WeightQuantizer],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """See `steps.write_part`. The disk holds one weight file at a time; `overwrite` replaces no artifact."""
    names = [unit.shard.file for unit in (job.units if part is None else part.of(job.units))]
    done = Conversion(store, job.plan, part=part, files=names)
    if not names:
        return done
    found, decisions = look(store), job.decisions()
    accept(store, found, decisions, overwrite)
    head = heading(job, decisions, _measure(job, store, found, decisions, overwrite))
    units = [unit for unit in job.units if unit.shard.file in names]
    left = [unit for unit in units if not found.has(unit, head)]
    check_disk(scratch_of(store), max((missing_bytes(scratch_of(store), [unit]) for unit in left), default=0), _ELSE)
    records: Records = {}
    for unit, heard in zip(units, _each(job, units, progress), strict=True):
        if unit in left:
            written = _write(job, store, found, unit, head, quantizers, overwrite, heard)
        else:
            nbytes = sum(tensor.nbytes for shard in (unit.shard, unit.outliers) if shard for tensor in shard.tensors)
            written = Written(found.records(unit), len(unit.sources), nbytes)
            heard(0, 0)
        records |= written.records
        done.kept, done.kept_bytes = done.kept + written.kept, done.kept_bytes + written.kept_bytes
    if part is None:
        done.manifest = _end(job, store, head)
    done.errors = errors_of(records)
    return done


def end_parts(store: Store, token: str | None = None, job: Job | None = None) -> Conversion:
    """See `steps.end_parts`."""
    found = look(store)
    first = next((stated for stated, _ in found.journals.values() if stated), None)
    if first is None:
        raise OutputError(f"{store}: no part of it is here (in {PARTIAL}); run convert with --part first")
    job = job or job_of(first, store, token)
    decisions = job.decisions()
    accept(store, found, decisions, start_over=False)
    manifest = _end(job, store, heading(job, decisions, _measure(job, store, found, decisions)))
    files = [unit.shard.file for unit in job.units]
    return Conversion(store, job.plan, manifest=manifest, errors=errors_of(manifest.tensors), files=files)


def scratch_of(store: Store) -> Path:
    """Where weight files are written on this machine: the same for the same address, so that a run goes on."""
    return cache_dir("out") / digest(store.shown.encode())[:32] / "artifact"


def _measure(job: Job, store: Store, found: Found, decisions: dict[str, Any], start_over: bool = False) -> str:
    """Bring into the job's plan what its text decides, as it is in the store, or will be; returns its digest."""
    if not job.calibration:
        return ""
    with _folder(store) as folder:
        path, before = folder / "calibration.safetensors", ""
        if CALIBRATION in found.files:
            store.get(CALIBRATION, path)
            before = digest(path.read_bytes())
        try:
            measured = measure(job, path, decisions, start_over)
        except OutputError as error:
            raise OutputError(str(error).replace(str(path), f"{store}/{CALIBRATION}")) from None
        if measured != before:
            store.put(path, CALIBRATION)
    return measured


def _each(job: Job, units: list[Unit], progress: Progress | None) -> Iterator[Progress]:
    """What hears of the bytes that are read for each weight file, and tells of all."""
    nbytes = [job.read_bytes(unit) for unit in units]
    before, total = 0, sum(nbytes)
    for own in nbytes:

        def heard(done: int, of: int, before: int = before, own: int = own) -> None:
            if progress is not None:
                progress(before + (done if of else own), total)  # nothing is read for one that is there

        yield heard
        before += own


def _write(
    job: Job,
    store: Store,
    found: Found,
    unit: Unit,
    head: dict[str, Any],
    quantizers: list[WeightQuantizer],
    overwrite: bool,
    progress: Progress,
) -> Written:
    """Write a weight file here, or finish it, and put it to its place; its journal follows when it is there."""
    file, journal = unit.shard.file, f"{PARTIAL}/{unit.shard.file}{SUFFIX}"
    claims = not agrees(found.journals.get(file, ({}, {}))[0], head)
    scratch, source = scratch_of(store), job.plan.checkpoint.folder
    with staged(scratch, [file], head["decisions"], source, start_over=overwrite) as staging:
        if claims:  # before any work: what the store refuses, it refuses now
            store.write(journal, begun(head))
        try:
            written = write_units(job, [unit], staging, head, quantizers, progress)
        except BaseException:
            with suppress(Quantize8Error):
                if claims and file not in store.files():  # nor put by another process meanwhile
                    store.remove([journal])
            raise
        store.put(staging.files / file, file)
        if unit.outliers is not None:
            store.put(staging.folder / unit.outliers.file, f"{PARTIAL}/{unit.outliers.file}")
        store.put(staging.journals[file].path, journal)
        staging.discard()
    with suppress(OSError):
        scratch.parent.rmdir()
    return written


def _end(job: Job, store: Store, head: dict[str, Any]) -> Manifest:
    """Make an artifact of weight files that are all there: the small files, config.json, and last the manifest."""
    found, units = look(store), job.units
    missing = [unit for unit in units if not found.has(unit, head)]
    check_finished(job, missing, store)
    records: Records = {}
    for unit in units:
        records |= found.records(unit)
    with _folder(store) as folder:
        if job.plan.outliers is not None:  # those of each weight file, and all together
            check_disk(folder, 2 * job.plan.outliers.nbytes, _ELSE)
        ending = _Ending(folder / "files", folder)
        ending.files.mkdir()
        for outliers in filter(None, (unit.outliers for unit in units)):
            store.get(f"{PARTIAL}/{outliers.file}", folder / outliers.file)
        manifest = assemble(job, units, ending, records)
        _publish(store, ending.files, found)
    root = scratch_of(store).parent
    for left in (root, *root.parent.glob(f"{root.name}-*")):
        shutil.rmtree(left, ignore_errors=True)
    return manifest


@dataclass
class _Ending:
    """See `finish.Folders`."""

    files: Path
    folder: Path


def _publish(store: Store, folder: Path, found: Found) -> None:
    """Put the small files; a loader finds no config.json before all else is there."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    last = [name for name in (CONFIG_NAME, MANIFEST_NAME) if name in names]
    store.put(folder / MANIFEST_NAME, ENDING)
    store.remove(sorted({*found.small} - names - {*found.journals}))  # of an end that had other small files
    for name in [*sorted(names - {*last}), *last]:
        store.put(folder / name, name)
    with suppress(OutputError):  # the artifact is there; credentials need not be good for more than putting files
        store.remove([*found.kept, ENDING])


@contextmanager
def _folder(store: Store) -> Iterator[Path]:
    """A folder on this machine that ends with the block."""
    root = scratch_of(store).parent
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}-") as name:
            yield Path(name)
    except OSError as error:
        why = f"{error.strerror or error} at {error.filename or root.parent}"
        raise OutputError(f"{store}: not written here ({why}); fix that, or {_ELSE}, and run it again") from None
