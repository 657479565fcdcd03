"""A folder on this machine. The artifact grows in the hidden folder `.NAME.partial` beside it, and is moved whole.

In that folder lie the artifact's files (`files`), a journal of each weight file that is begun, outlier columns until
all are merged, and what calibration measured. Its name is always the same: the same command finds what was done, and
so does every process that writes a share of the weight files. It holds no model that a loader would open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, fits
from quantize8.artifact.outliers import PART_SUFFIX
from quantize8.destinations.base import Batch, Build, Destination
from quantize8.destinations.journal import SUFFIX, Heading, Journal, Records, agrees, read_heading, records_of
from quantize8.errors import OutputError
from quantize8.files import WINDOWS, flush, open_file, read_at, stored_bytes, write_at

if TYPE_CHECKING:
    from quantize8.conversion.plan import WorkUnit

_TRIES = 5  # to make a folder that other processes, which failed, remove
_SLACK = 16 * 2**20  # room for the small files: tokenizer, config, manifest
_UNFINISHED = ".unfinished"
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class LocalFolder(Destination):
    """The folder `out`, which is not there yet, or is an artifact to be replaced."""

    out: Path

    @property
    def partial(self) -> Path:
        """See `Destination.partial`."""
        return partial_of(self.out)

    @property
    def scratch(self) -> Path:
        """See `Destination.scratch`."""
        return self.out

    def check(self, source: Path, overwrite: bool) -> None:
        """See `Destination.check`."""
        out = self.out
        if source.resolve().is_relative_to(out.resolve()):
            raise OutputError(f"{out}: holds the source; name another folder with --out")
        if not (out.exists() or out.is_symlink()):
            return
        if not overwrite:
            raise OutputError(f"{out}: exists; remove it, pass --overwrite, or name another folder with --out")
        is_artifact = (out / MANIFEST_NAME).is_file()
        if not out.is_dir() or out.is_symlink() or not (is_artifact or not any(out.iterdir())):
            raise OutputError(f"{out}: is not an artifact of quantize8, and is not overwritten; remove it yourself")

    def disk_bytes(self, units: Sequence[WorkUnit]) -> int:
        """See `Destination.disk_bytes`: all of them, and the merged outlier columns."""
        return sum(unit.nbytes + (unit.outliers.nbytes if unit.outliers else 0) for unit in units)

    def recorded(self) -> Heading | None:
        """See `Destination.recorded`."""
        paths = sorted(partial_of(self.out).glob(f"*{SUFFIX}"))
        return next((heading for heading in map(read_heading, paths) if heading), None)

    def missing_bytes(self, units: Sequence[WorkUnit]) -> int:
        """What the disk must still hold for these weight files."""
        files = [file for unit in units for file in weight_files(self.out, unit)]
        merged = sum(unit.outliers.nbytes for unit in units if unit.outliers)
        return merged + sum(file.nbytes - file.held_bytes for file in files)

    @contextlib.contextmanager
    def open(
        self,
        units: Sequence[WorkUnit],
        decisions: dict[str, Any],
        source: Path,
        overwrite: bool = False,
        start_over: bool = False,
    ) -> Iterator[Staging]:
        """See `Destination.open`.

        When the block fails with nothing finished, all that it made is removed; else it stays, for the next run.
        """
        out = self.out
        check_disk(out, self.missing_bytes(units))
        try:
            staging = Staging(self, [unit.shard.file for unit in units])
        except OSError as error:
            raise OutputError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None
        try:
            _restore(out)
            self.check(source, overwrite)  # again: another process may have finished meanwhile
            staging.accept(decisions, start_over)
            yield staging
        except OSError as error:
            goes_on = "" if staging.is_empty else ", which goes on from here"
            staging.leave()
            where = f" at {error.filename}" if error.filename else ""
            raise OutputError(
                f"{out}: not written ({error.strerror or error}{where}); fix that and run the same command "
                f"again{goes_on}"
            ) from None
        except BaseException:
            staging.leave()
            raise
        staging.close()


class Staging:
    """The folder that an artifact grows in, with the journals of the weight files `names`, locked for this process.

    Attributes:
        out: Where the artifact goes.
        folder: The staging folder.
        files: The folder of the artifact's files in it.
        journals: Weight file -> its journal.
    """

    def __init__(self, destination: LocalFolder, names: Sequence[str]) -> None:
        self._destination, self.out = destination, destination.out
        self.folder = partial_of(self.out)
        self.files, self._replaced = self.folder / "files", self.folder / "replaced"
        self.journals: dict[str, Journal] = {}
        try:
            for name in names:
                self.journals[name] = self._lock(name)
        except BaseException:
            self.leave()
            raise

    @contextlib.contextmanager
    def calibration(self) -> Iterator[Path]:
        """See `Session.calibration`."""
        yield self._calibration

    def batches(self, units: Sequence[WorkUnit], heading: Heading) -> list[Batch]:
        """See `Session.batches`: all at once."""
        check_disk(self.out, self._destination.missing_bytes(units))
        return [Batch(units)]

    @contextlib.contextmanager
    def staging(self, units: Sequence[WorkUnit], heading: Heading) -> Iterator[Staging]:
        """See `Session.staging`."""
        yield self

    def collect(self, units: Sequence[WorkUnit], heading: Heading) -> tuple[Records, list[WorkUnit]]:
        """See `Session.collect`."""
        records: Records = {}
        missing: list[WorkUnit] = []
        for unit in units:
            journal = self.journals[unit.shard.file]
            whole = all(file.is_whole for file in weight_files(self.out, unit))
            if not (whole and agrees(journal.heading, heading) and journal.entries.keys() >= {*unit.sources}):
                missing.append(unit)
            records |= records_of(journal.entries)
        return records, missing

    def publish(self, units: Sequence[WorkUnit], build: Build, overwrite: bool) -> Manifest:
        """See `Session.publish`: the finished files are moved to where they are wanted in one step."""
        manifest = build(self.files, self.folder)
        flush(self.files)
        if overwrite and self.out.is_dir():
            self.out.rename(self._replaced)
        try:
            self.files.rename(self.out)
        except OSError:
            _restore(self.out)
            raise OutputError(
                f"{self.out}: appeared while converting; remove it and run the same command again"
            ) from None
        flush(self.out.parent)
        if WINDOWS:  # which removes nothing that is open
            self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished that could be gone on from, by this process or another."""
        return not self._calibration.exists() and not any(journal.entries for journal in self.journals.values())

    def accept(self, decisions: dict[str, Any], start_over: bool) -> None:
        """Refuse to go on from other decisions; with `start_over` remove what was written with them."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            own = self.journals.get(name)
            heading = own.heading if own else read_heading(path)
            other = unlike(heading, decisions) if heading else None
            if other is None:
                continue
            if not start_over:
                raise OutputError(f"{self.out}: {self.folder.name} {other}")
            journal = own or Journal(path)
            self._calibration.unlink(missing_ok=True)
            self._remove_files(name)
            if own is None:
                journal.remove()
            else:
                journal.forget()

    def discard(self) -> None:
        """Remove these weight files, and let other processes have them."""
        for journal in self.journals.values():
            journal.forget()
        self.leave()

    def leave(self) -> None:
        """Let other processes have the weight files, without a trace of those of which nothing is finished."""
        is_empty = self.is_empty
        for name, journal in [*self.journals.items()]:
            if not journal.entries:
                self._remove_files(name)
                self.journals.pop(name).remove()
        if is_empty and not any(self.folder.glob(f"*{SUFFIX}")):  # and no other process is at work there
            for folder in (self.files, self.folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self.close()

    def close(self) -> None:
        """Let other processes have the weight files."""
        while self.journals:
            self.journals.popitem()[1].close()

    @property
    def _calibration(self) -> Path:
        return self.folder / "calibration.safetensors"

    def _remove_files(self, name: str) -> None:
        for path in (self.files / name, self.folder / f"{name}{PART_SUFFIX}"):
            WeightFile(path, b"", 0).remove()

    def _lock(self, name: str) -> Journal:
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    return Journal(self.folder / f"{name}{SUFFIX}")
                except BlockingIOError:
                    raise OutputError(
                        f"{self.out}: another process is writing its {name}; wait for that one, or end it"
                    ) from None
        raise OutputError(f"{self.folder}: is removed again and again by another process; end that one")


class WeightFile:
    """A file of known size, written in any order by any thread; it has another name until it is whole."""

    def __init__(self, path: Path, header: bytes, nbytes: int) -> None:
        self.path, self._unfinished = path, path.with_name(path.name + _UNFINISHED)
        self._header, self.nbytes = header, nbytes
        self._opening = threading.Lock()
        self._descriptor: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the file has its name."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the disk that it has already."""
        there = [path for path in (self.path, self._unfinished) if path.is_file()]
        return sum(min(stored_bytes(path), self.nbytes) for path in there[:1])

    def reserve(self) -> bool:
        """Reserve disk space for it; returns whether something of it was there, which is not whole any more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self._unfinished)
        there = self._unfinished.exists()
        descriptor = open_file(self._unfinished, os.O_RDWR | os.O_CREAT)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.nbytes)
            os.ftruncate(descriptor, self.nbytes)
            write_at(descriptor, self._header, 0)
            if there and hasattr(os, "posix_fadvise"):
                # what is cached may be what the disk has refused: it is read anew
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return there

    @property
    def descriptor(self) -> int:
        """The open file; opened when it is first asked for, as there may be more files than may be open."""
        with self._opening:
            if self._descriptor is None:
                self._descriptor = open_file(self._unfinished, os.O_RDWR)
            return self._descriptor

    def digest(self, offset: int, nbytes: int) -> str:
        """BLAKE3 of a part of it."""
        content, end = blake3(), offset + nbytes
        buffer = memoryview(bytearray(min(_READ_BYTES, nbytes)))
        while offset < end:
            count = read_at(self.descriptor, buffer[: end - offset], offset)
            if not count:
                break
            content.update(buffer[:count])
            offset += count
        return str(content.hexdigest())

    def finish(self) -> None:
        """Flush it to the disk, and give it its name."""
        os.fsync(self.descriptor)
        self.close()
        self._unfinished.replace(self.path)

    def close(self) -> None:
        """Close it, if it is open."""
        with self._opening:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def remove(self) -> None:
        """Remove what there is of it."""
        for path in (self.path, self._unfinished):
            path.unlink(missing_ok=True)


def partial_of(out: Path) -> Path:
    """The staging folder of an artifact."""
    out = out if out.name not in ("", "..") else out.resolve()
    return out.parent / f".{out.name}.partial"


def weight_files(out: Path, unit: WorkUnit) -> list[WeightFile]:
    """The files of a unit in the staging folder: its weight file, and its outlier columns where it has some."""
    folder, shard = partial_of(out), unit.shard
    files = [WeightFile(folder / "files" / shard.file, shard.header, shard.nbytes)]
    if unit.outliers is not None:
        files.append(WeightFile(folder / unit.outliers.file, unit.outliers.header, unit.outliers.nbytes))
    return files


def check_disk(out: Path, nbytes: int, otherwise: str = "use --out") -> None:
    """Raise OutputError where the disk has no room for so many bytes; `otherwise` is what helps besides making room."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + _SLACK:
        needs = f"needs {nbytes + _SLACK:,} bytes, the disk has {free:,} free"
        raise OutputError(f"{out}: {needs}; make room, or {otherwise}")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, and flush it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unlike(heading: Heading, decisions: dict[str, Any]) -> str | None:
    """What to say where a journal's heading has other decisions; the times of the source's files may differ."""
    stated = heading.get("decisions")
    if not heading or _timeless(stated) == _timeless(decisions):
        return None
    other = difference(_timeless(stated), _timeless(decisions))
    return f"holds an unfinished conversion with {other}; run that command again, or start over with --overwrite"


def difference(before: Any, now: dict[str, Any]) -> str:
    """What two decisions do not share, in words; those `before` may be of another version, or not be decisions."""
    if not isinstance(before, dict):
        return "other options"
    words = {"layout": "another layout of files", "calibration": "another calibration"}
    first = ("version", "format", "recipe", "scale", "calibration", "source")
    for key in (*first, *(key for key in now if key not in (*first, "layout")), "layout"):
        old, new = before.get(key), now.get(key)
        if old != new and key == "source" and old and new:
            return _source_difference(old, new)
        if old != new:
            plain = isinstance(old, str) and key not in ("calibration", "layout")
            return words.get(key, f"{key} {old}" if plain else f"another {key}")
    return "other options"


def _source_difference(old: Any, new: dict[str, Any]) -> str:
    if not fits(old, dict[str, Any]) or not fits(old.get("files"), dict[str, Any]) or "id" not in old:
        return "another source"
    if old["files"].keys() != new["files"].keys() or old["id"] != new["id"]:
        return f"another source ({old['id']})"
    changed = [file for file, stamp in old["files"].items() if new["files"][file] != stamp]
    if changed:
        return f"a source that has changed since ({changed[0]})"
    return "a source of another revision, or with another config.json"


def _timeless(decisions: Any) -> Any:
    """Decisions without the times of the source's files: what came of a file with another time is written again."""
    try:
        files = {file: [nbytes, head] for file, (nbytes, _, head) in decisions["source"]["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return decisions  # not of this version: like no others
    return {**decisions, "source": {**decisions["source"], "files": files}}


def _restore(out: Path) -> None:
    """Bring back an artifact that was about to be replaced when its replacement failed, or was killed."""
    replaced = partial_of(out) / "replaced"
    if replaced.is_dir() and not out.exists():
        replaced.rename(out)
