"""A remote file that is mostly read from beginning to end: it is fetched ahead and hashed, both in that order.

sha256 must be computed in the order of the file. So at any time a few chunks are in flight, starting with the first one
that is not hashed yet, on several connections. A sequential reader takes them, and each chunk that it has passed is
hashed. A chunk that is requested out of order is fetched separately. No byte escapes verification: the BLAKE3 of a
chunk is recorded when it first arrives, and the same chunk with other content is refused.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock
from typing import Any

from blake3 import blake3

from quantize8.errors import SourceError
from quantize8.sources.ranges import RemoteFile

CHUNK = 8 * 2**20  # bytes of a request: large enough that its latency is small compared to its transfer
AHEAD = 4  # chunks in flight, including the one being read, each on its own connection; at least 2
_BEHIND = 2  # chunks cached after the reader has passed them: a tensor's scales are often read along with it
_CONNECTIONS = 8  # to one source, at most
_HASHERS = 2


class Transfers:
    """The threads that fetch and hash for all files of a source. `close` ends them with the source."""

    def __init__(self) -> None:
        self.fetching = ThreadPoolExecutor(_CONNECTIONS, "fetch")
        self.hashing = ThreadPoolExecutor(_HASHERS, "hash")
        self.ended = Event()

    def close(self) -> None:
        """Drop what is queued and retry nothing; transfers in progress are not awaited."""
        self.ended.set()
        for pool in (self.fetching, self.hashing):
            pool.shutdown(wait=False, cancel_futures=True)


class OrderedFile:
    """A remote file that is fetched ahead and hashed. Several threads may read it; it holds AHEAD + _BEHIND chunks.

    Args:
        file: The remote file.
        transfers: The threads to use.
        beginning: Bytes at the start that have been read already; what is fetched must agree with them.
    """

    def __init__(self, file: RemoteFile, transfers: Transfers, beginning: bytes = b"") -> None:
        self.file, self._transfers, self._beginning = file, transfers, beginning
        self.count = -(-file.size // CHUNK)
        self.confirmed = False
        self._window: dict[int, Future[bytearray]] = {}
        self._front = 0  # chunks before this one are hashed, or are being hashed
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        self._seen: dict[int, bytes] = {}
        self._hash = _hash(file)
        self._hashing: Future[None] | None = None
        self._lock = Lock()

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the file's bytes from `position` on. Raises SourceError if they cannot be read."""
        done = 0
        while done < len(target):
            number, offset = divmod(position + done, CHUNK)
            piece = memoryview(self._chunk(number))[offset : offset + len(target) - done]
            target[done : done + len(piece)] = piece
            done += len(piece)

    def supply(self, data: bytearray) -> None:
        """Add the next chunk, which is on disk already, to the hash."""
        self._seen[self._front] = blake3(data).digest()
        self._hash_next(data)

    def confirm(self) -> None:
        """Raise SourceError if the content does not have the promised digest; fetch and hash what was not read."""
        if self.confirmed:
            return
        if self.file.digest is None:
            self.file.check_unchanged()
        with self._lock:
            if self.file.digest is not None:
                self._advance(self.count)
            if self._hashing is not None:
                self._hashing.result()
            if self.file.digest is not None and self._hash.hexdigest() != self.file.digest.value:
                kind = self.file.digest.kind
                raise SourceError(
                    f"{self.file.where}: its content does not have the {kind} that the hub lists; try again"
                )
            self.confirmed = True
            self._window.clear()
            self._kept.clear()

    def _chunk(self, number: int) -> bytearray:
        with self._lock:
            if self._front <= number < self._front + AHEAD:
                self._advance(number)
                return self._next().result()
            if number in self._kept:
                return self._kept[number]
        data = self._fetch(number)
        with self._lock:
            self._keep(number, data)
        return data

    def _advance(self, number: int) -> None:
        """Hash all chunks before chunk `number`."""
        while self._front < number:
            data = self._next().result()
            del self._window[self._front]
            self._keep(self._front, data)
            self._hash_next(data)

    def _next(self) -> Future[bytearray]:
        """The first chunk that is not hashed; start to fetch it and the chunks after it."""
        for number in range(self._front, min(self._front + AHEAD, self.count)):
            if number not in self._window:
                self._window[number] = self._transfers.fetching.submit(self._fetch, number)
        return self._window[self._front]

    def _fetch(self, number: int) -> bytearray:
        start = number * CHUNK
        data = self.file.read(start, min(start + CHUNK, self.file.size), self._transfers.ended)
        expected = self._beginning[start : start + CHUNK]
        content = blake3(data).digest()
        if self._seen.setdefault(number, content) != content or data[: len(expected)] != expected:
            raise self.file.changed("two reads of the same place differ")
        return data

    def _keep(self, number: int, data: bytearray) -> None:
        self._kept[number] = data
        while len(self._kept) > _BEHIND:
            self._kept.popitem(last=False)

    def _hash_next(self, data: bytearray) -> None:
        if self._hashing is not None:
            self._hashing.result()  # hashing is sequential, and at most one chunk waits for it
        self._hashing = self._transfers.hashing.submit(self._hash.update, data)
        self._front += 1


def _hash(file: RemoteFile) -> Any:
    """A hash of the promised kind; git's begins with the type of the object and its length."""
    if file.digest is not None and file.digest.kind == "git-sha1":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()
