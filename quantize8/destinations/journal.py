"""What is finished of a weight file: lines of JSON, one appended for each source tensor when its bytes are written.

The first line, the heading, says what decides those bytes. No line is flushed to the disk: an entry counts only where
the bytes that it speaks of have the digests that it records, so that none of it has to be trusted, not even after the
power failed. Each line begins with a digest of its own; what follows the first damaged one is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize8 import files
from quantize8.artifact.manifest import TensorRecord, digest, fits, record_of

SUFFIX = ".journal"
_APPENDED = os.O_RDWR | os.O_CREAT | os.O_APPEND
Records = dict[str, TensorRecord]  # by name in the artifact
Heading = dict[str, Any]  # what a journal begins with: `decisions`, `request`, and `calibration_blake3`


class Journal:
    """The journal of one weight file, locked as long as it is open: BlockingIOError while another process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        place = files.lock_of(path)
        self._lock = _open_locked(place)
        self._descriptor = self._lock if place == path else files.open_file(path, _APPENDED)
        self._append = threading.Lock()
        self.heading, self.entries, self._good = _read(self._descriptor)

    def begin(self, heading: dict[str, Any], entries: dict[str, Records]) -> None:
        """Go on with this heading and, of the entries that are there, with these."""
        if self.heading == heading and self.entries == entries:
            os.ftruncate(self._descriptor, self._good)  # without a torn line at the end
            return
        self.forget()
        self.heading, self.entries = heading, entries
        self._write(heading, *(_entry(source, records) for source, records in entries.items()))

    def forget(self) -> None:
        """Start over."""
        self.heading, self.entries, self._good = {}, {}, 0
        os.ftruncate(self._descriptor, 0)

    def append(self, source: str, records: Records) -> None:
        """Note that a source tensor is written; from any thread."""
        self._write(_entry(source, records))
        self.entries[source] = records

    def close(self) -> None:
        """Let others have it."""
        for descriptor in dict.fromkeys((self._descriptor, self._lock)):
            os.close(descriptor)

    def remove(self) -> None:
        """Close it, and leave nothing of it."""
        if not files.WINDOWS:  # no other process has it between the two
            self.path.unlink(missing_ok=True)
            return self.close()
        self.close()
        for path in (self.path, files.lock_of(self.path)):
            with contextlib.suppress(OSError):  # another process has opened it meanwhile
                path.unlink()

    def _write(self, *values: dict[str, Any]) -> None:
        data = b"".join(map(_line, values))
        with self._append:
            try:
                if os.write(self._descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(self._descriptor, self._good)  # or half a line would hide those that come after it
                raise
            self._good += len(data)


def read_heading(path: Path) -> dict[str, Any]:
    """The heading of a journal that another process may be writing; {} where there is none yet, or none any more."""
    try:
        descriptor = files.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        return _read(descriptor)[0]
    finally:
        os.close(descriptor)


def agrees(stated: Heading, heading: Heading) -> bool:
    """Whether two headings are of the same bytes."""
    return all(stated.get(key) == heading[key] for key in ("decisions", "calibration_blake3"))


def begun(heading: dict[str, Any]) -> bytes:
    """A journal with this heading, and nothing finished."""
    return _line(heading)


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, Records]]:
    """Heading and entries of a whole journal, as far as it is not damaged."""
    return _parse(io.BytesIO(data))[:2]


def records_of(entries: Mapping[str, Records]) -> Records:
    """Of all entries of a journal."""
    return {name: record for records in entries.values() for name, record in records.items()}


def is_locked(path: Path) -> bool:
    """Whether another process has the journal there open to write."""
    try:
        descriptor = files.open_file(files.lock_of(path), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        files.lock(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open_locked(path: Path) -> int:
    while True:
        descriptor = files.open_file(path, _APPENDED)
        try:
            files.lock(descriptor)  # without locks two writers would write the same bytes to the same places
        except BlockingIOError:
            os.close(descriptor)
            raise
        try:
            if files.WINDOWS or os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its owner finished, and removed it, between the two calls
        os.close(descriptor)


def _read(descriptor: int) -> tuple[dict[str, Any], dict[str, Records], int]:
    with open(os.dup(descriptor), "rb") as file:  # noqa: PTH123
        file.seek(0)
        return _parse(file)


def _parse(lines: Iterable[bytes]) -> tuple[dict[str, Any], dict[str, Records], int]:
    """Heading, entries, and the bytes of whole lines."""
    heading: dict[str, Any] = {}
    entries: dict[str, Records] = {}
    good = 0
    for line in lines:
        try:
            stated, text = line[:-1].split(b" ", 1)
            if line[-1:] != b"\n" or stated.decode() != digest(text):
                break
            value = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if good == 0 and fits(value, dict[str, Any]):
                heading = value
            else:
                source, records = _entry_of(value)
                entries[source] = records
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        good += len(line)
    return heading, entries, good


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # which no manifest may have
        raise ValueError(text)
    return value


def _entry_of(value: dict[str, Any]) -> tuple[str, Records]:
    """Source tensor and records of a line; of one that is no entry it raises what comes of it."""
    source, records = value["source"], {name: record_of(entry) for name, entry in value["records"].items()}
    if not (fits(source, str) and fits(records, Records)):
        raise TypeError(source)
    return source, records


def _entry(source: str, records: Records) -> dict[str, Any]:
    return {"source": source, "records": {name: asdict(record) for name, record in records.items()}}


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    return digest(text).encode() + b" " + text + b"\n"
