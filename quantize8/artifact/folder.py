"""The output folder: built aside under a hidden name, moved into place in one step when it is whole.

Whatever happens before that step, there is no output folder; after it, there is a complete one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quantize8.artifact.manifest import MANIFEST_NAME
from quantize8.errors import OutputError

_SLACK = 16 * 2**20  # room for the small files: tokenizer, config, manifest
_START_WRITING = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux: have the disk begin with a part of a file
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and wait for nothing


def check_output(out: Path, overwrite: bool, source: Path) -> None:
    """Refuse an output folder that exists (or, with `overwrite`, is no artifact) or that holds the source."""
    if source.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out}: holds the source; name another folder with --out")
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; remove it, pass --overwrite, or name another folder with --out")
    replaceable = out.is_dir() and not out.is_symlink() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
    if not replaceable:
        raise OutputError(f"{out}: is not an artifact of quantize8, and is not overwritten; remove it yourself")


def check_disk(out: Path, nbytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + _SLACK:
        raise OutputError(
            f"{out}: needs {nbytes + _SLACK:,} bytes, the disk has {free:,} free; make room, or use --out"
        )


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new empty folder that becomes `out` if the block succeeds, and is removed if it fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _flush(folder)
        _replace(folder, out, overwrite)
        _flush(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def create(path: Path, header: bytes, nbytes: int) -> int:
    """A file of `nbytes` that begins with `header`, its space reserved; an open descriptor for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.truncate(descriptor, nbytes)
    write_at(descriptor, header, 0)
    return descriptor


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place in an open file."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    if _START_WRITING is not None:  # or the system would wait for the end, and then there is nothing else to do
        _START_WRITING(descriptor, ctypes.c_int64(offset), ctypes.c_int64(len(view)), _WRITE)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, and have the disk hold it before going on."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(folder: Path, out: Path, overwrite: bool) -> None:
    old = None
    if overwrite and out.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise OutputError(f"{out}: appeared while converting; remove it, or name another folder with --out") from None
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
