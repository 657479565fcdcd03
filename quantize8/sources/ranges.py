"""Remote files that are read by range: from the hub over HTTP, and from any store that fsspec has a driver for.

A broken transfer resumes at the byte where it stopped. Requests to the hub use huggingface_hub's settings (endpoint,
token, proxies, certificates). The loop here adds what its readers lack: memory for no more than the range, resuming
within a range, and a check that the server sent what was requested.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from threading import Event, Lock
from typing import Any, NamedTuple

from quantize8.errors import SourceError, first_line

TRIES = 10  # in a row without a byte before giving up: about a minute and a half, with the waits below
WAIT, MAX_WAIT = 0.5, 16.0  # seconds before the second try, doubled for each further one; the maximum
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes after which another try may succeed
_EXPIRED = (401, 403)  # status codes of a content server: the address that the hub gave has expired


class Digest(NamedTuple):
    """The digest that the hub lists for a file."""

    kind: str  # sha256, of the bytes; or git-sha1, of a git blob with these bytes
    value: str  # hexadecimal


class Interrupted(Exception):
    """A transfer stopped and may be resumed; `wait` is the delay that the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class RemoteFile(ABC):
    """A file on another machine.

    Args:
        where: The name of the file in messages.
        size: The size in bytes; None if it is not known yet.
        digest: The promised digest; None if there is none.
    """

    def __init__(self, where: str, size: int | None, digest: Digest | None) -> None:
        self.where, self.digest = where, digest
        self._size = size

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        assert self._size is not None
        return self._size

    def read(self, start: int, stop: int, ended: Event | None = None) -> bytearray:
        """Read bytes start..stop, with retries. Safe to call from several threads.

        Args:
            start: The first byte.
            stop: The byte after the last one.
            ended: When this is set, the bytes are no longer needed, and no further try is made.

        Returns:
            The bytes.

        Raises:
            SourceError: The bytes cannot be read, or the file has changed.
        """
        ended = ended or Event()
        data, failures = bytearray(), 0
        while len(data) < stop - start:
            had = len(data)
            try:
                self._fetch(start + had, stop, data)
                reason, wait = "it sends less than requested", 0.0
            except Interrupted as error:
                reason, wait = str(error), error.wait
            if len(data) >= stop - start:
                break
            failures = 0 if len(data) > had else failures + 1
            if failures == TRIES or ended.is_set():
                raise SourceError(f"{self.where}: cannot be read ({reason}); run it again when the connection is back")
            ended.wait(max(wait, min(MAX_WAIT, WAIT * 2 ** max(0, failures - 1))))
        if len(data) > stop - start:
            raise self.changed("more bytes arrived than were requested")
        return data

    def changed(self, how: str) -> SourceError:
        """Build the error for a file that has changed."""
        return SourceError(f"{self.where}: changed while it was read ({how}); run it again")

    def check_unchanged(self) -> None:  # noqa: B027 - a commit does not change
        """Raise SourceError if the file was replaced since it was opened, as far as that shows without a digest."""

    @abstractmethod
    def _fetch(self, start: int, stop: int, data: bytearray) -> None:
        """Append bytes start..stop, or the first of them, to `data`.

        Raises Interrupted if another try may succeed, otherwise SourceError.
        """


class HubFile(RemoteFile):
    """A file of a hub model at one commit.

    Another server may serve its content, at an address that is valid for some minutes.

    Args:
        repo_id: The id of the model.
        name: The name of the file in it.
        commit: The commit.
        token: A hub token; None for the stored one.
        size: The size in bytes; None if the listing does not say.
        digest: The digest that the hub lists; None if it lists none.
    """

    def __init__(
        self, repo_id: str, name: str, commit: str, token: str | None, size: int | None, digest: Digest | None
    ) -> None:
        super().__init__(f"{repo_id}: {name}", size, digest)
        self.repo_id, self.name, self.commit, self.token = repo_id, name, commit, token
        self._lock = Lock()
        self._address: tuple[str, dict[str, str]] | None = None  # of the content; the headers to send there
        self._etag: str | None = None  # as the content server reports it

    @property
    def size(self) -> int:
        """The size of the file in bytes; the hub is asked if the listing does not say."""
        if self._size is None:
            try:
                self._resolve()
            except Interrupted as error:
                raise SourceError(f"{self.where}: its size cannot be read ({error}); run it again") from None
        return super().size

    def _resolve(self) -> tuple[str, dict[str, str]]:
        """The address of the content, and the headers to send there; only the hub itself is sent the token."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked

        from quantize8.sources.hub import asking

        with self._lock, asking(self.repo_id, self.commit, self.token):
            if self._address is None:
                url = hf_hub_url(self.repo_id, self.name, revision=self.commit)
                try:
                    metadata = get_hf_file_metadata(url, token=self.token)
                except _transport_error() as error:
                    raise Interrupted(type(error).__name__) from None
                except HfHubHTTPError as error:
                    if error.response.status_code in _BUSY:
                        raise Interrupted(f"HTTP status {error.response.status_code}") from None
                    raise
                if metadata.commit_hash not in (None, self.commit):
                    raise self.changed(f"commit {metadata.commit_hash} instead of {self.commit}")
                if metadata.size is None or self._size not in (None, metadata.size):
                    raise self.changed(f"{metadata.size} bytes instead of {self._size}")
                self._size = metadata.size
                own = metadata.location.split("/")[:3] == url.split("/")[:3]
                headers = build_hf_headers(token=self.token if own else False)
                self._address = metadata.location, {**headers, "Accept-Encoding": "identity"}
            return self._address

    def _fetch(self, start: int, stop: int, data: bytearray) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, not marked

        fresh = self._address is None
        url, headers = self._resolve()
        headers = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                if response.status_code in _EXPIRED and not fresh:
                    self._address = None
                self._check(response, start, stop, fresh)
                for piece in response.iter_raw():
                    data += piece
        except _transport_error() as error:
            self._address = None  # the next try may be directed to another server
            raise Interrupted(type(error).__name__) from None

    def _check(self, response: Any, start: int, stop: int, fresh: bool) -> None:
        """Raise an error if a response is not the range that was requested."""
        status = response.status_code
        if status in _BUSY or (status in _EXPIRED and not fresh):
            wait = response.headers.get("Retry-After", "")
            raise Interrupted(f"HTTP status {status}", min(float(wait), 300.0) if wait.isdecimal() else 0.0)
        if status == 200 and (start, stop) != (0, self.size):
            raise SourceError(f"{self.where}: its server does not support range requests; leave --stream out")
        if status == 416:
            raise self.changed("it is shorter than it was")
        if status not in (200, 206):
            raise SourceError(f"{self.where}: cannot be read (HTTP status {status}); try again later")
        if status == 206 and response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size}":
            raise self.changed(f"the server sent {first_line_of(response.headers.get('Content-Range'))}")
        etag = response.headers.get("ETag")
        if self._etag is not None and etag is not None and etag != self._etag:
            raise self.changed("another ETag")
        self._etag = etag or self._etag


def _transport_error() -> Any:
    """The class of connection errors of the HTTP library that huggingface_hub uses: httpx, in later releases httpx2."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, not marked

    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError


class FsspecFile(RemoteFile):
    """A file that fsspec opens, such as s3://bucket/model/model.safetensors.

    Args:
        system: fsspec's file system.
        path: The path in it.
        where: The name of the file in messages.
        size: The size in bytes.
    """

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
            raise SourceError(f"{self.where}: may not be read with these credentials; check them") from None
        except Exception as error:  # each driver has its own errors
            raise Interrupted(type(error).__name__) from None

    def check_unchanged(self) -> None:
        """Raise SourceError if the size, time or ETag of the file has changed."""
        try:
            key = self._asked()
        except OSError:
            raise self.changed("it is gone") from None
        if key != self._key:
            raise self.changed("another size, time or ETag")

    def _asked(self) -> Any:
        """The key of the file's present version, from a request for the file itself.

        The driver's cache is cleared first: a key from a cached listing has another form.
        """
        self._system.invalidate_cache()
        return self._system.ukey(self._path)


def first_line_of(value: object) -> str:
    """Any value as one line, for a message."""
    return first_line(ValueError(str(value)))
