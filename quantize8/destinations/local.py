"""Write an artifact to a folder on this machine.

The artifact is built in the hidden folder `.NAME.partial` next to its destination, and moved into place in one step
when it is complete. This staging folder contains the artifact's files (in `files`), a journal for each weight file that
was started, the outlier columns until they are merged, and the results of calibration. Its name depends on the output
alone, so the same command finds earlier work there, and so does every process that writes a share of the weight files.
No loader would take it for a model.
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
from quantize8.destinations.base import CALIBRATION_NAMES, Batch, Build, Destination
from quantize8.destinations.journal import SUFFIX, Heading, Journal, Records, agrees, read_heading, records_of
from quantize8.errors import OutputError
from quantize8.files import WINDOWS, flush, open_file, read_at, stored_bytes, write_at

if TYPE_CHECKING:
    from quantize8.conversion.plan import WorkUnit

_TRIES = 5  # attempts to make a folder while other processes that fail remove it
_SLACK = 16 * 2**20  # bytes to leave for the small files: tokenizer, config, manifest
_UNFINISHED = ".unfinished"
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class LocalFolder(Destination):
    """The folder `out`, which does not exist yet, or is an artifact to be replaced."""

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
            raise OutputError(f"{out}: is not an artifact of quantize8, so it is not overwritten; remove it yourself")

    def disk_bytes(self, units: Sequence[WorkUnit]) -> int:
        """See `Destination.disk_bytes`: all files of the units, and the merged outlier columns."""
        return sum(unit.nbytes + (unit.outliers.nbytes if unit.outliers else 0) for unit in units)

    def recorded(self) -> Heading | None:
        """See `Destination.recorded`."""
        paths = sorted(partial_of(self.out).glob(f"*{SUFFIX}"))
        return next((heading for heading in map(read_heading, paths) if heading), None)

    def missing_bytes(self, units: Sequence[WorkUnit]) -> int:
        """Disk space that these weight files still need, in bytes."""
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

        If the block fails before anything is finished, all that it created is removed. Otherwise it stays for the next
        run to resume.
        """
        out = self.out
        check_disk(out, self.missing_bytes(units))
        try:
            staging = Staging(self, [unit.shard.file for unit in units])
        except OSError as error:
            raise OutputError(f"{out}: cannot be created ({error.strerror}); name another folder with --out") from None
        try:
            _restore(out)
            self.check(source, overwrite)  # again: another process may have finished in the meantime
            staging.accept(decisions, start_over)
            yield staging
        except OSError as error:
            resumes = "" if staging.is_empty else ", which resumes from here"
            staging.leave()
            where = f" at {error.filename}" if error.filename else ""
            raise OutputError(
                f"{out}: not written ({error.strerror or error}{where}); fix that and run the same command "
                f"again{resumes}"
            ) from None
        except BaseException:
            staging.leave()
            raise
        staging.close()


class Staging:
    """The folder in which an artifact is built, with the journals of this process's weight files, which it locks.

    Args:
        destination: Where the artifact goes.
        names: Names of the weight files that this process writes.

    Attributes:
        out: Where the artifact goes.
        folder: The staging folder.
        files: The folder inside it with the artifact's files.
        journals: Weight file -> its journal.

    Raises:
        OutputError: Another process is writing one of the weight files.
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
        yield self.folder

    def batches(self, units: Sequence[WorkUnit], heading: Heading) -> list[Batch]:
        """See `Session.batches`: one batch with all weight files."""
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
            complete = all(file.is_whole for file in weight_files(self.out, unit))
            if not (complete and agrees(journal.heading, heading) and journal.entries.keys() >= {*unit.sources}):
                missing.append(unit)
            records |= records_of(journal.entries)
        return records, missing

    def publish(self, units: Sequence[WorkUnit], build: Build, overwrite: bool) -> Manifest:
        """See `Session.publish`: the folder of finished files is moved into place in one step."""
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
        if WINDOWS:  # Windows cannot delete open files
            self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished that this process or another could resume from."""
        measured = any((self.folder / name).exists() for name in CALIBRATION_NAMES)
        return not measured and not any(journal.entries for journal in self.journals.values())

    def accept(self, decisions: dict[str, Any], start_over: bool) -> None:
        """Check that unfinished work in the staging folder was made with the same decisions.

        Args:
            decisions: What decides the bytes (`Plan.decisions`).
            start_over: Remove work with other decisions instead of refusing it.

        Raises:
            OutputError: There is work with other decisions, or another process is writing it.
        """
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
            for part in CALIBRATION_NAMES:
                (self.folder / part).unlink(missing_ok=True)
            self._remove_files(name)
            if own is None:
                journal.remove()
            else:
                journal.forget()

    def discard(self) -> None:
        """Erase this process's journals, then release its weight files as `leave` does, which deletes them."""
        for journal in self.journals.values():
            journal.forget()
        self.leave()

    def leave(self) -> None:
        """Release the weight files, and delete those of which nothing is finished."""
        is_empty = self.is_empty
        for name, journal in [*self.journals.items()]:
            if not journal.entries:
                self._remove_files(name)
                self.journals.pop(name).remove()
        if is_empty and not any(self.folder.glob(f"*{SUFFIX}")):  # no other process is working there either
            for folder in (self.files, self.folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self.close()

    def close(self) -> None:
        """Release the weight files to other processes."""
        while self.journals:
            self.journals.popitem()[1].close()

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
                        f"{self.out}: another process is writing its {name}; wait until it finishes, or stop it"
                    ) from None
        raise OutputError(f"{self.folder}: another process removes it repeatedly; stop that process")


class WeightFile:
    """A file of known size that threads write in any order; it has a temporary name until it is complete.

    Args:
        path: Final name of the file.
        header: Bytes to write at its beginning.
        nbytes: Size of the file in bytes.
    """

    def __init__(self, path: Path, header: bytes, nbytes: int) -> None:
        self.path, self._unfinished = path, path.with_name(path.name + _UNFINISHED)
        self._header, self.nbytes = header, nbytes
        self._opening = threading.Lock()
        self._descriptor: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the file is complete: it has its final name and its full size."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    @property
    def held_bytes(self) -> int:
        """Disk space that the file occupies already, in bytes."""
        existing = [path for path in (self.path, self._unfinished) if path.is_file()]
        return sum(min(stored_bytes(path), self.nbytes) for path in existing[:1])

    def reserve(self) -> bool:
        """Reserve disk space for the file, under its temporary name, and write its header.

        Returns:
            Whether the file, or a part of it, was there already.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self._unfinished)
        existed = self._unfinished.exists()
        descriptor = open_file(self._unfinished, os.O_RDWR | os.O_CREAT)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.nbytes)
            os.ftruncate(descriptor, self.nbytes)
            write_at(descriptor, self._header, 0)
            if existed and hasattr(os, "posix_fadvise"):
                # the page cache may contain data that the disk failed to store: drop it, so that reads see the disk
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return existed

    @property
    def descriptor(self) -> int:
        """Descriptor of the file, which is opened on first use: there may be more files than can be open at once."""
        with self._opening:
            if self._descriptor is None:
                self._descriptor = open_file(self._unfinished, os.O_RDWR)
            return self._descriptor

    def digest(self, offset: int, nbytes: int) -> str:
        """BLAKE3 of `nbytes` bytes of the file, starting at `offset`, as hexadecimal digits."""
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
        """Flush the file to the disk, and give it its final name."""
        os.fsync(self.descriptor)
        self.close()
        self._unfinished.replace(self.path)

    def close(self) -> None:
        """Close the file if it is open."""
        with self._opening:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def remove(self) -> None:
        """Delete the file, finished or not."""
        for path in (self.path, self._unfinished):
            path.unlink(missing_ok=True)


def partial_of(out: Path) -> Path:
    """The staging folder of an artifact."""
    out = out if out.name not in ("", "..") else out.resolve()
    return out.parent / f".{out.name}.partial"


def weight_files(out: Path, unit: WorkUnit) -> list[WeightFile]:
    """The files of a unit in the staging folder: its weight file, and its outlier columns if it has any."""
    folder, shard = partial_of(out), unit.shard
    files = [WeightFile(folder / "files" / shard.file, shard.header, shard.nbytes)]
    if unit.outliers is not None:
        files.append(WeightFile(folder / unit.outliers.file, unit.outliers.header, unit.outliers.nbytes))
    return files


def check_disk(out: Path, nbytes: int, otherwise: str = "use --out") -> None:
    """Check that the disk has enough free space.

    Args:
        out: Path on the disk; it need not exist.
        nbytes: Size of what will be written, in bytes.
        otherwise: What the error message suggests besides freeing space.

    Raises:
        OutputError: The disk is too small.
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + _SLACK:
        needs = f"needs {nbytes + _SLACK:,} bytes, the disk has {free:,} free"
        raise OutputError(f"{out}: {needs}; free some space, or {otherwise}")


def write_file(path: Path, data: bytes) -> None:
    """Write a new small file, and flush it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unlike(heading: Heading, decisions: dict[str, Any]) -> str | None:
    """Describe how a journal's heading differs from this conversion.

    Args:
        heading: The heading of a journal; it may be {}.
        decisions: What decides the bytes of this conversion (`Plan.decisions`).

    Returns:
        The text of an error message; None if there is no difference apart from modification times of source files.
    """
    stated = heading.get("decisions")
    if not heading or _timeless(stated) == _timeless(decisions):
        return None
    other = difference(_timeless(stated), _timeless(decisions))
    return f"holds an unfinished conversion with {other}; run that command again, or start over with --overwrite"


def difference(before: Any, now: dict[str, Any]) -> str:
    """Name the first difference between two decisions, for an error message.

    Args:
        before: Earlier decisions, possibly of another version or damaged.
        now: The decisions of this conversion.
    """
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
    if any(old.get(key) != new.get(key) for key in ("adapter", "adapter_blake3", "adapter_config_blake3")):
        return f"another adapter ({old['adapter']})" if "adapter" in old else "no adapter"
    if old["files"].keys() != new["files"].keys() or old["id"] != new["id"]:
        return f"another source ({old['id']})"
    changed = [file for file, stamp in old["files"].items() if new["files"][file] != stamp]
    if changed:
        return f"a source that has changed since ({changed[0]})"
    return "a source of another revision, or with another config.json"


def _timeless(decisions: Any) -> Any:
    """Decisions without modification times: work from a file with another time is rewritten, but not refused."""
    try:
        files = {file: [nbytes, head] for file, (nbytes, _, head) in decisions["source"]["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return decisions  # of another version, so equal to none of this version
    return {**decisions, "source": {**decisions["source"], "files": files}}


def _restore(out: Path) -> None:
    """Restore an artifact that was moved aside to be replaced, if its replacement failed or was killed."""
    replaced = partial_of(out) / "replaced"
    if replaced.is_dir() and not out.exists():
        replaced.rename(out)
