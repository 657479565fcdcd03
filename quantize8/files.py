"""Files: those that ship with the package, the cache, and reading, writing and locking them on every system.

Linux reads and writes at a position in one call; Windows moves the position of a descriptor, under a lock. Windows
neither moves nor removes a file that is open, and lets nobody else read bytes that are locked.
"""

from __future__ import annotations

import ctypes
import io
import os
import threading
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
TEXT = _PACKAGE / "texts" / "sotu-1981.txt"  # the address's beginning: public domain (US government)
WINDOWS = os.name == "nt"
_BINARY = getattr(os, "O_BINARY", 0)  # or Windows translates the ends of lines
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing
_MOVING = threading.Lock()  # where a read or write takes two calls, as a descriptor has one position


def _from_libc(name: str) -> Any:
    """A function of the C library, None where it has none of that name or cannot be asked."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows takes no None
        return None


_START_WRITING = _from_libc("sync_file_range")  # Linux: have the disk begin with a part of a file


def resource_dir(name: str) -> Path:
    """Folder `cuda` or `configs`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = _PACKAGE / name, _PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def cache_dir(name: str) -> Path:
    """A folder of the user's cache, which need not be there yet."""
    from platformdirs import user_cache_path

    return user_cache_path("quantize8", appauthor=False) / name


def is_url(text: str) -> bool:
    """Whether a source or an output is an address with a scheme, such as s3://bucket/model, and not a path."""
    return "://" in text


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a file of bytes; `flags` are those of os.open."""
    return os.open(path, flags | _BINARY, 0o666)


def read_at(descriptor: int, target: memoryview, position: int) -> int:
    """Read from a place in an open file on, as much as the system gives at once; how many bytes, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], position)
    with _MOVING, io.FileIO(descriptor, closefd=False) as file:
        file.seek(position)
        return file.readinto(target) or 0


def fill_from(descriptor: int, target: memoryview, position: int) -> bool:
    """Fill `target` from a place in an open file on; whether the file had so much."""
    done = 0
    while done < len(target):
        count = read_at(descriptor, target[done:], position + done)
        if count == 0:
            return False
        done += count
    return True


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place in an open file."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    done = 0
    while done < len(view):
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, view[done:], offset + done)
            continue
        with _MOVING:
            os.lseek(descriptor, offset + done, os.SEEK_SET)
            done += os.write(descriptor, view[done:])
    if _START_WRITING is not None:  # or the system would wait for the end, and then there is nothing else to do
        _START_WRITING(descriptor, ctypes.c_int64(offset), ctypes.c_int64(len(view)), _WRITE)


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    if WINDOWS and path.is_dir():  # which Windows opens for nobody; NTFS has a journal of names
        return
    descriptor = open_file(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_of(path: Path) -> Path:
    """The file to lock, so that one process at a time writes the one at `path` while others may read it."""
    return path.with_name(f"{path.name}.lock") if WINDOWS else path


def lock(descriptor: int) -> None:
    """Lock an open file, as long as it is open; BlockingIOError where another process has it.

    On a file system without locks nothing is locked.
    """
    from filelock import lock_descriptor  # which takes a while to import

    try:
        locked = lock_descriptor(descriptor, blocking=False)
    except OSError:
        return
    if not locked:
        raise BlockingIOError


def stored_bytes(path: Path) -> int:
    """Bytes of the disk that a file has; its size where the system does not tell."""
    found = path.stat()
    blocks = getattr(found, "st_blocks", None)
    return found.st_size if blocks is None else int(blocks) * 512
