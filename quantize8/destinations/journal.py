"""A journal records the finished tensors of a weight file: one line of JSON for each, appended when it is written.

The first line, the heading, records what decides the bytes. Lines are not flushed to the disk. An entry counts only if
the bytes that it describes have the digests that it records, so a journal need not be trusted, not even after a power
failure. Each line begins with a digest of itself, and everything from the first damaged line on is ignored.
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
Records = dict[str, TensorRecord]  # tensor name in the artifact -> record
Heading = dict[str, Any]  # first line of a journal: `decisions`, `request`, and `calibration_blake3`


class Journal:
    """The journal of one weight file, locked while it is open.

    Attributes:
        path: The journal's file.
        heading: The heading; {} in a new journal.
        entries: Source tensor that is finished -> the records of what it was written as.

    Raises:
        BlockingIOError: Another process has the journal open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lock_path = files.lock_of(path)
        self._lock = _open_locked(lock_path)
        self._descriptor = self._lock if lock_path == path else files.open_file(path, _APPENDED)
        self._append = threading.Lock()
        self.heading, self.entries, self._good = _read(self._descriptor)

    def begin(self, heading: dict[str, Any], entries: dict[str, Records]) -> None:
        """Start or resume the journal, and drop everything else that it contains.

        Args:
            heading: The heading.
            entries: The present entries that are still valid.
        """
        if self.heading == heading and self.entries == entries:
            os.ftruncate(self._descriptor, self._good)  # removes an incomplete line at the end
            return
        self.forget()
        self.heading, self.entries = heading, entries
        self._write(heading, *(_entry(source, records) for source, records in entries.items()))

    def forget(self) -> None:
        """Erase the heading and all entries."""
        self.heading, self.entries, self._good = {}, {}, 0
        os.ftruncate(self._descriptor, 0)

    def append(self, source: str, records: Records) -> None:
        """Record that a source tensor has been written; may be called from several threads.

        Args:
            source: Name of the source tensor.
            records: The records of what it was written as.
        """
        self._write(_entry(source, records))
        self.entries[source] = records

    def close(self) -> None:
        """Close the journal and release its lock."""
        for descriptor in dict.fromkeys((self._descriptor, self._lock)):
            os.close(descriptor)

    def remove(self) -> None:
        """Close the journal and delete its file."""
        if not files.WINDOWS:  # deleted while locked, so that no other process can take it first
            self.path.unlink(missing_ok=True)
            return self.close()
        self.close()
        for path in (self.path, files.lock_of(self.path)):
            with contextlib.suppress(OSError):  # another process has opened it in the meantime
                path.unlink()

    def _write(self, *values: dict[str, Any]) -> None:
        data = b"".join(map(_line, values))
        with self._append:
            try:
                if os.write(self._descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(self._descriptor, self._good)  # an incomplete line would invalidate the lines after it
                raise
            self._good += len(data)


def read_heading(path: Path) -> dict[str, Any]:
    """The heading of a journal that another process may be writing; {} if there is no heading or no journal."""
    try:
        descriptor = files.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        return _read(descriptor)[0]
    finally:
        os.close(descriptor)


def agrees(stated: Heading, heading: Heading) -> bool:
    """Whether two headings lead to the same bytes.

    Args:
        stated: The heading of a journal; it may be {}.
        heading: The heading of this conversion.
    """
    return all(stated.get(key) == heading[key] for key in ("decisions", "calibration_blake3"))


def begun(heading: dict[str, Any]) -> bytes:
    """The bytes of a journal with this heading and no entries."""
    return _line(heading)


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, Records]]:
    """Heading and entries of a journal, up to the first damaged line."""
    return _parse(io.BytesIO(data))[:2]


def records_of(entries: Mapping[str, Records]) -> Records:
    """The records of all entries of a journal, by tensor name in the artifact."""
    return {name: record for records in entries.values() for name, record in records.items()}


def is_locked(path: Path) -> bool:
    """Whether another process has the journal at `path` open for writing."""
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
            files.lock(descriptor)  # where there are no locks, two writers write the same bytes to the same offsets
        except BlockingIOError:
            os.close(descriptor)
            raise
        try:
            if files.WINDOWS or os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its owner finished and deleted it between the two calls
        os.close(descriptor)


def _read(descriptor: int) -> tuple[dict[str, Any], dict[str, Records], int]:
    with open(os.dup(descriptor), "rb") as file:  # noqa: PTH123
        file.seek(0)
        return _parse(file)


def _parse(lines: Iterable[bytes]) -> tuple[dict[str, Any], dict[str, Records], int]:
    """Heading, entries, and the size in bytes of the intact lines."""
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
    if not math.isfinite(value):  # a manifest must not contain NaN or infinity
        raise ValueError(text)
    return value


def _entry_of(value: dict[str, Any]) -> tuple[str, Records]:
    """Source tensor and records of a line; anything but an entry raises KeyError, TypeError or another exception."""
    source, records = value["source"], {name: record_of(entry) for name, entry in value["records"].items()}
    if not (fits(source, str) and fits(records, Records)):
        raise TypeError(source)
    return source, records


def _entry(source: str, records: Records) -> dict[str, Any]:
    return {"source": source, "records": {name: asdict(record) for name, record in records.items()}}


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    return digest(text).encode() + b" " + text + b"\n"
