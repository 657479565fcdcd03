"""Remote files, read by range: from the hub over HTTP, and from whatever fsspec has a driver for.

A connection that is cut is taken up again from the byte where it was. How the hub is asked (endpoint, token, proxies,
certificates) is huggingface_hub's; the loop here adds what its own readers lack: memory for a range alone, going on
inside of a range, and a look at whether the server sent what was asked for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from threading import Event, Lock
from typing import Any, NamedTuple

from quantize8.errors import SourceError, first_line

TRIES = 10  # in a row that bring nothing: a minute and a half away, by the waits below
WAIT, MAX_WAIT = 0.5, 16.0  # seconds before the second try, doubled for each one after; the longest
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers after which another try may succeed
_EXPIRED = (401, 403)  # of a content server: the address that the hub gave has had its time


class Digest(NamedTuple):
    """What a file's content is promised to be."""

    kind: str  # sha256 of the bytes, or git-sha1, of a blob with these bytes
    value: str  # hexadecimal


class Interrupted(Exception):
    """A transfer that stopped, and may go on; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class RemoteFile(ABC):
    """A file elsewhere. `where` names it in messages; size in bytes; digest, None where nothing is promised."""

    def __init__(self, where: str, size: int | None, digest: Digest | None) -> None:
        self.where, self.digest = where, digest
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the file."""
        assert self._size is not None
        return self._size

    def read(self, start: int, stop: int, ended: Event | None = None) -> bytearray:
        """Bytes start..stop. Safe to call from several threads. Raises SourceError where they cannot be had.

        Once `ended` is set, nobody wants them any more, and no further try is made.
        """
        ended = ended or Event()
        data, failures = bytearray(), 0
        while len(data) < stop - start:
            had = len(data)
            try:
                self._fetch(start + had, stop, data)
                reason, wait = "it sends less than asked for", 0.0
            except Interrupted as error:
                reason, wait = str(error), error.wait
            if len(data) >= stop - start:
                break
            failures = 0 if len(data) > had else failures + 1
            if failures == TRIES or ended.is_set():
                raise SourceError(f"{self.where}: cannot be read ({reason}); run it again when the connection is back")
            ended.wait(max(wait, min(MAX_WAIT, WAIT * 2 ** max(0, failures - 1))))
        if len(data) > stop - start:
            raise self.changed("more bytes came than were asked for")
        return data

    def changed(self, how: str) -> SourceError:
        """The error for a file that is not what it was."""
        return SourceError(f"{self.where}: changed while it was read ({how}); run it again")

    def check_unchanged(self) -> None:  # noqa: B027 - a commit does not change
        """Refuse a file that was replaced since it was opened, where that can be told without its digest."""

    @abstractmethod
    def _fetch(self, start: int, stop: int, data: bytearray) -> None:
        """Append bytes start..stop, or the first of them, to `data`; raises Interrupted, or SourceError for good."""


class HubFile(RemoteFile):
    """A file of a hub model at one commit. Its content may be served from elsewhere, at an address for some minutes."""

    def __init__(
        self, repo_id: str, name: str, commit: str, token: str | None, size: int | None, digest: Digest | None
    ) -> None:
        super().__init__(f"{repo_id}: {name}", size, digest)
        self.repo_id, self.name, self.commit, self.token = repo_id, name, commit, token
        self._lock = Lock()
        self._address: tuple[str, dict[str, str]] | None = None  # where the content is, headers that it takes
        self._etag: str | None = None  # as the content's server tells it

    @property
    def size(self) -> int:
        """Bytes of the file; asked for where the listing does not say."""
        if self._size is None:
            try:
                self._resolve()
            except Interrupted as error:
                raise SourceError(f"{self.where}: its size cannot be had ({error}); run it again") from None
        return super().size

    def _resolve(self) -> tuple[str, dict[str, str]]:
        """The address of the content and the headers to send there: no token to another server than the hub."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked

        from quantize8.checkpoint.hub import asking

        with self._lock, asking(self.repo_id, self.commit, self.token):
            if self._address is None:
                url = hf_hub_url(self.repo_id, self.name, revision=self.commit)
                try:
                    found = get_hf_file_metadata(url, token=self.token)
                except _transport_error() as error:
                    raise Interrupted(type(error).__name__) from None
                except HfHubHTTPError as error:
                    if error.response.status_code in _BUSY:
                        raise Interrupted(f"answer {error.response.status_code}") from None
                    raise
                if found.commit_hash not in (None, self.commit):
                    raise self.changed(f"commit {found.commit_hash} instead of {self.commit}")
                if found.size is None or self._size not in (None, found.size):
                    raise self.changed(f"{found.size} bytes instead of {self._size}")
                self._size = found.size
                own = found.location.split("/")[:3] == url.split("/")[:3]
                headers = build_hf_headers(token=self.token if own else False)
                self._address = found.location, {**headers, "Accept-Encoding": "identity"}
            return self._address

    def _fetch(self, start: int, stop: int, data: bytearray) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, not marked

        fresh = self._address is None
        url, headers = self._resolve()
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        try:
            with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
                if response.status_code in _EXPIRED and not fresh:
                    self._address = None
                self._check(response, start, stop, fresh)
                for piece in response.iter_raw():
                    data += piece
        except _transport_error() as error:
            self._address = None  # the next try may be sent elsewhere
            raise Interrupted(type(error).__name__) from None

    def _check(self, response: Any, start: int, stop: int, fresh: bool) -> None:
        """Refuse an answer that is not the range that was asked for."""
        status = response.status_code
        if status in _BUSY or (status in _EXPIRED and not fresh):
            wait = response.headers.get("Retry-After", "")
            raise Interrupted(f"answer {status}", min(float(wait), 300.0) if wait.isdecimal() else 0.0)
        if status == 200 and (start, stop) != (0, self.size):
            raise SourceError(f"{self.where}: its server gives no parts of files (Range); leave --stream out")
        if status == 416:
            raise self.changed("it is shorter than it was")
        if status not in (200, 206):
            raise SourceError(f"{self.where}: cannot be read (answer {status}); try again later")
        if status == 206 and response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size}":
            raise self.changed(f"the server sent {first_line_of(response.headers.get('Content-Range'))}")
        etag = response.headers.get("ETag")
        if self._etag is not None and etag is not None and etag != self._etag:
            raise self.changed("another ETag")
        self._etag = etag or self._etag


def _transport_error() -> Any:
    """The class of errors of connections, in the HTTP library that huggingface_hub uses: httpx, later httpx2."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, not marked

    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError


class FsspecFile(RemoteFile):
    """A file that fsspec opens, such as s3://bucket/model/model.safetensors."""

    def __init__(self, system: Any, path: str, where: str, size: int) -> None:
        self._system, self._path = system, path
        self._key = self._asked()
        super().__init__(where, size, None)

    def _fetch(self, start: int, stop: int, data: bytearray) -> None:
        try:
            data += self._system.cat_file(self._path, start=start, end=stop)
        except FileNotFoundError:
            raise self.changed("it is gone") from None
        except PermissionError:
            raise SourceError(f"{self.where}: must not be read with these credentials; look at them") from None
        except Exception as error:  # each driver has errors of its own
            raise Interrupted(type(error).__name__) from None

    def check_unchanged(self) -> None:
        """Refuse a file whose size, time or ETag is another now."""
        try:
            key = self._asked()
        except OSError:
            raise self.changed("it is gone") from None
        if key != self._key:
            raise self.changed("another size, time or ETag")

    def _asked(self) -> Any:
        """What the store says of the file itself: of a listing, which a driver keeps, it is in other words."""
        self._system.invalidate_cache()
        return self._system.ukey(self._path)


def first_line_of(value: object) -> str:
    """Any value in one line, for a message."""
    return first_line(ValueError(str(value)))
