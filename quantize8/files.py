"""Packaged resources, the cache folder, and portable functions to read, write, flush and lock files.

Linux reads and writes at an offset in one call. Windows has no such call, so there the file position is moved under a
lock. Windows also cannot move or remove an open file, and blocks other processes from reading locked bytes.
"""

from __future__ import annotations

import ctypes
import io
import os
import threading
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
TEXT = _PACKAGE / "texts" / "sotu-1981.txt"  # beginning of the 1981 State of the Union: public domain (US government)
WINDOWS = os.name == "nt"
_BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows translates line endings
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start writing back, without waiting
_MOVING = threading.Lock()  # held while a seek and its read or write share the one position of a descriptor


def _from_libc(name: str) -> Any:
    """A function of the C library; None if the library does not have it or cannot be opened."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows does not accept None
        return None


_START_WRITING = _from_libc("sync_file_range")  # Linux: start writing a range of a file to the disk


def resource_dir(name: str) -> Path:
    """The folder `cuda` or `configs`: inside the package in a wheel, next to it in a checkout."""
    inside, beside = _PACKAGE / name, _PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def cache_dir(name: str) -> Path:
    """A folder in the user's cache; it may not exist yet."""
    from platformdirs import user_cache_path

    return user_cache_path("quantize8", appauthor=False) / name


def is_url(text: str) -> bool:
    """Whether a source or an output is an address with a scheme, such as s3://bucket/model, rather than a path."""
    return "://" in text


def open_file(path: Path, flags: int) -> int:
    """Open a file in binary mode and return its descriptor; `flags` are those of `os.open`."""
    return os.open(path, flags | _BINARY, 0o666)


def read_at(descriptor: int, target: memoryview, position: int) -> int:
    """Read from an open file with one system call, which may return less than was asked for.

    Args:
        descriptor: The open file.
        target: Buffer to fill.
        position: Offset in the file, in bytes.

    Returns:
        Number of bytes read; 0 at the end of the file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], position)
    with _MOVING, io.FileIO(descriptor, closefd=False) as file:
        file.seek(position)
        return file.readinto(target) or 0


def fill_from(descriptor: int, target: memoryview, position: int) -> bool:
    """Fill a buffer from an open file.

    Args:
        descriptor: The open file.
        target: Buffer to fill.
        position: Offset in the file, in bytes.

    Returns:
        False if the file ended before the buffer was full.
    """
    done = 0
    while done < len(target):
        count = read_at(descriptor, target[done:], position + done)
        if count == 0:
            return False
        done += count
    return True


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` to an open file, at `offset` bytes."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    done = 0
    while done < len(view):
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, view[done:], offset + done)
            continue
        with _MOVING:
            os.lseek(descriptor, offset + done, os.SEEK_SET)
            done += os.write(descriptor, view[done:])
    if _START_WRITING is not None:  # else the system delays most writes to the final flush, when nothing overlaps them
        _START_WRITING(descriptor, ctypes.c_int64(offset), ctypes.c_int64(len(view)), _WRITE)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if WINDOWS and path.is_dir():  # Windows cannot open a folder; NTFS journals its entries
        return
    descriptor = open_file(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows only flushes writable descriptors
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_of(path: Path) -> Path:
    """The file to lock so that only one process at a time writes `path`, while others can still read it."""
    return path.with_name(f"{path.name}.lock") if WINDOWS else path


def lock(descriptor: int) -> None:
    """Lock an open file until it is closed. Does nothing on a file system without locks.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    from filelock import lock_descriptor  # imported here because it is slow to import

    try:
        locked = lock_descriptor(descriptor, blocking=False)
    except OSError:
        return
    if not locked:
        raise BlockingIOError


def stored_bytes(path: Path) -> int:
    """Disk space that a file occupies, in bytes; its size where the system does not report that."""
    status = path.stat()
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else int(blocks) * 512
