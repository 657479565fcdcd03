"""The hidden folder `.NAME.partial` beside the output, where an artifact grows until it is moved into place whole.

In it lie the artifact's files (`files`), a journal of each weight file that is begun, outlier columns until all are
brought together, and what calibration measured. Its name is always the same: the same command finds what was done,
and so does every process that writes a share of the weight files. It holds no model that a loader would open.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantize8.artifact.folder import WeightFile, check_output
from quantize8.artifact.journal import SUFFIX, Journal, read_heading
from quantize8.artifact.manifest import fits
from quantize8.artifact.units import Unit, beside
from quantize8.errors import OutputError
from quantize8.files import WINDOWS, flush

_TRIES = 5  # to make a folder that other processes, which failed, remove


class Staging:
    """The folder of `out`, with the journals of the weight files `names`: no other process writes these meanwhile."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.out, self.folder = out, partial_of(out)
        self.files, self._replaced = self.folder / "files", self.folder / "replaced"
        self.journals: dict[str, Journal] = {}
        try:
            for name in names:
                self.journals[name] = self._lock(name)
        except BaseException:
            self.leave()
            raise

    @property
    def calibration(self) -> Path:
        """The file for what calibration measured."""
        return self.folder / "calibration.safetensors"

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished that could be gone on from, by this process or another."""
        return not self.calibration.exists() and not any(journal.entries for journal in self.journals.values())

    def accept(self, decisions: dict[str, Any], start_over: bool) -> None:
        """Refuse to go on from other decisions; with `start_over` remove what came of them."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            own = self.journals.get(name)
            heading = own.heading if own else read_heading(path)
            other = unlike(heading, decisions)
            if other is None:
                continue
            if not start_over:
                raise OutputError(f"{self.out}: {self.folder.name} {other}")
            journal = own or Journal(path)
            self.calibration.unlink(missing_ok=True)
            _remove_files(self, name)
            if own is None:
                journal.remove()
            else:
                journal.forget()

    def publish(self, overwrite: bool) -> None:
        """Move the finished files to where they are wanted, in one step, and remove the rest."""
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

    def discard(self) -> None:
        """Remove what there is of the weight files, and let other processes have them."""
        for journal in self.journals.values():
            journal.forget()
        self.leave()

    def leave(self) -> None:
        """Let other processes have the weight files, without a trace of those of which nothing is finished."""
        is_empty = self.is_empty
        for name, journal in [*self.journals.items()]:
            if not journal.entries:
                _remove_files(self, name)
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


@contextlib.contextmanager
def staged(
    out: Path,
    names: Sequence[str],
    decisions: dict[str, Any],
    source: Path,
    *,
    overwrite: bool = False,
    start_over: bool = False,
) -> Iterator[Staging]:
    """The staging folder of `out` for a process that writes the weight files `names`.

    `overwrite`: `out` may be an artifact; `start_over`: what is there of other decisions may be removed. When the
    block fails with nothing finished, all that it made is removed; else it stays, for the next run.
    Raises OutputError where another process has it, where it is of other decisions, and for what the system refuses.
    """
    try:
        staging = Staging(out, names)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None
    try:
        _restore(out)
        check_output(out, overwrite, source)  # again: another process may have finished meanwhile
        staging.accept(decisions, start_over)
        yield staging
    except OSError as error:
        goes_on = "" if staging.is_empty else ", which goes on from here"
        staging.leave()
        where = f" at {error.filename}" if error.filename else ""
        raise OutputError(
            f"{out}: not written ({error.strerror or error}{where}); fix that and run the same command again{goes_on}"
        ) from None
    except BaseException:
        staging.leave()
        raise
    staging.close()


def partial_of(out: Path) -> Path:
    """Where an artifact grows."""
    out = out if out.name not in ("", "..") else out.resolve()
    return out.parent / f".{out.name}.partial"


def weight_files(out: Path, unit: Unit) -> list[WeightFile]:
    """The files of a unit in the staging folder: its weight file, and its outlier columns where it has some."""
    folder = partial_of(out)
    found = [WeightFile(folder / "files" / unit.shard.file, unit.shard.header, unit.shard.nbytes)]
    if unit.outliers is not None:
        found.append(WeightFile(folder / unit.outliers.file, unit.outliers.header, unit.outliers.nbytes))
    return found


def unlike(heading: dict[str, Any], decisions: dict[str, Any]) -> str | None:
    """What to say where a journal's heading is of other decisions; but for the times of the source's files."""
    stated = heading.get("decisions")
    if not heading or _timeless(stated) == _timeless(decisions):
        return None
    other = difference(_timeless(stated), _timeless(decisions))
    return f"holds an unfinished conversion with {other}; run that command again, or start over with --overwrite"


def difference(before: Any, now: dict[str, Any]) -> str:
    """In words, what two decisions do not share; those before may be of another version, or of nobody's making."""
    if not isinstance(before, dict):
        return "other options"
    words = {"layout": "another layout of files", "calibration": "another calibration"}
    for key in ("version", "format", "recipe", "scale", "calibration", "source", "layout"):
        old, new = before.get(key), now.get(key)
        if old != new and key == "source" and old and new:
            return _source_difference(old, new)
        if old != new:
            plain = isinstance(old, str) and key in ("version", "scale")
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


def _remove_files(staging: Staging, name: str) -> None:
    for path in (staging.files / name, staging.folder / beside(name)):
        WeightFile(path, b"", 0).remove()


def _restore(out: Path) -> None:
    """Bring back an artifact that was about to be replaced when its replacement failed, or was killed."""
    replaced = partial_of(out) / "replaced"
    if replaced.is_dir() and not out.exists():
        replaced.rename(out)
