"""Files and the disk: what may be written to, whether it fits, and files that keep their name until they are whole."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from blake3 import blake3

from quantize8.artifact.manifest import MANIFEST_NAME
from quantize8.errors import OutputError
from quantize8.files import open_file, read_at, stored_bytes, write_at

_SLACK = 16 * 2**20  # room for the small files: tokenizer, config, manifest
_UNFINISHED = ".unfinished"
_READ_BYTES = 4 * 2**20


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


def check_disk(out: Path, nbytes: int, otherwise: str = "use --out") -> None:
    """Refuse to begin what the disk cannot hold; `otherwise` is what helps, unless there is room."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + _SLACK:
        needs = f"needs {nbytes + _SLACK:,} bytes, the disk has {free:,} free"
        raise OutputError(f"{out}: {needs}; make room, or {otherwise}")


class WeightFile:
    """A file of known size, written in any order by any thread; it has another name until it is whole."""

    def __init__(self, path: Path, header: bytes, nbytes: int) -> None:
        self.path, self._unfinished = path, path.with_name(path.name + _UNFINISHED)
        self._header, self._nbytes = header, nbytes
        self._open = threading.Lock()
        self._descriptor: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the file has its name."""
        return self.path.is_file() and self.path.stat().st_size == self._nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of the disk that it has already."""
        there = [path for path in (self.path, self._unfinished) if path.is_file()]
        return sum(min(stored_bytes(path), self._nbytes) for path in there[:1])

    def reserve(self) -> bool:
        """Have the disk keep room for it; whether something was there of it, which is not whole any more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self._unfinished)
        there = self._unfinished.exists()
        descriptor = open_file(self._unfinished, os.O_RDWR | os.O_CREAT)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self._nbytes)
            os.ftruncate(descriptor, self._nbytes)
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
        with self._open:
            if self._descriptor is None:
                self._descriptor = open_file(self._unfinished, os.O_RDWR)
            return self._descriptor

    def digest(self, offset: int, nbytes: int) -> str:
        """BLAKE3 of a part of it."""
        content, end = blake3(), offset + nbytes
        part = memoryview(bytearray(min(_READ_BYTES, nbytes)))
        while offset < end:
            count = read_at(self.descriptor, part[: end - offset], offset)
            if not count:
                break
            content.update(part[:count])
            offset += count
        return str(content.hexdigest())

    def finish(self) -> None:
        """Have the disk hold all of it, and give it its name."""
        os.fsync(self.descriptor)
        self.close()
        self._unfinished.replace(self.path)

    def close(self) -> None:
        """Close it, if it is open."""
        with self._open:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def remove(self) -> None:
        """Remove what there is of it."""
        for path in (self.path, self._unfinished):
            path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, and have the disk hold it before going on."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
