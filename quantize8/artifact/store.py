"""An artifact's place in a store that fsspec has a driver for.

Of a store no more is asked than that a file is put whole, or not at all: nothing is renamed, appended to or locked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantize8.checkpoint.address import HUB_SCHEME, file_system, is_url, reason, scheme_of, without_secrets
from quantize8.errors import ArtifactError, OutputError, Quantize8Error

PARTIAL = ".partial"  # the folder beside an artifact's files for what a conversion keeps until it ends
_FILE = "file://"
# Their folders are parts of names. To ask their drivers for a folder would make a bucket that is not there.
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
# what the hub itself puts into a new model
_OF_THE_HUB = (".gitattributes", "README.md")


class Store:
    """The place at `address`; every failure of its driver is an OutputError, in one line without secrets.

    Raises DependencyError where the driver is not installed.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address, self._token = address.rstrip("/"), token
        self.shown = without_secrets(self._address)
        self._is_hub = address.startswith(HUB_SCHEME)
        options = {"token": token} if self._is_hub and token else {}
        self._system, root = file_system(self._address, OutputError, **options)
        self._root = root.rstrip("/")
        self._has_folders = scheme_of(address) not in _WITHOUT_FOLDERS

    def __reduce__(self) -> tuple[type[Store], tuple[str, str | None]]:
        return Store, (self._address, self._token)

    def __str__(self) -> str:
        return self.shown

    def files(self) -> dict[str, int | None]:
        """Bytes of each file, by its name, those in PARTIAL too; None for any other folder."""
        with self._telling("read"):
            self._system.invalidate_cache()
            found = self._list("")
            if PARTIAL in found:
                del found[PARTIAL]
                found |= {f"{PARTIAL}/{name}": nbytes for name, nbytes in self._list(PARTIAL).items()}
            if self._is_hub:
                found = {name: nbytes for name, nbytes in found.items() if name not in _OF_THE_HUB}
        return found

    def put(self, path: Path, name: str) -> None:
        """Put a file of this machine to a name; one that is there is replaced."""
        with self._telling("written"):
            self._make_folder(name)
            if not (self._is_hub and self._commit(path, name)):
                self._system.put_file(str(path), self._at(name))

    def write(self, name: str, data: bytes) -> None:
        """The same for a small one that is in memory."""
        with self._telling("written"):
            self._make_folder(name)
            self._system.pipe_file(self._at(name), data)

    def get(self, name: str, path: Path) -> None:
        """Copy a file to this machine."""
        with self._telling("read"):
            self._system.get_file(self._at(name), str(path))

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Small files; b"" for one that is not there."""
        if not names:
            return []
        with self._telling("read"):
            paths = [self._at(name) for name in names]
            found = self._system.cat_ranges(paths, None, None, on_error="return")  # a good driver reads them together
            for data in found:
                if isinstance(data, BaseException) and not isinstance(data, FileNotFoundError):
                    raise data
        return [data if isinstance(data, bytes) else b"" for data in found]

    def remove(self, names: Sequence[str]) -> None:
        """Remove these files, in this order; one that is not there is none too few."""
        with self._telling("written"):
            for name in names:
                with suppress(FileNotFoundError):
                    self._system.rm_file(self._at(name))
            if self._has_folders:
                for folder in {name.rpartition("/")[0] for name in names} - {""}:
                    with suppress(Exception):  # it holds more, or went with its last file
                        self._system.rmdir(self._at(folder))

    def _list(self, folder: str) -> dict[str, int | None]:
        path = self._at(folder)
        try:
            entries = self._system.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        found: dict[str, int | None] = {}
        for entry in entries:
            full = str(entry["name"])
            if full.strip("/") != path.strip("/"):
                found[full.rstrip("/").rpartition("/")[2]] = entry["size"] if entry["type"] == "file" else None
            elif entry["type"] == "file" and not full.endswith("/"):  # that would be an empty file that means a folder
                raise OutputError(f"{self.shown}: is a file; name another place with --out")
        return found

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._system.makedirs(self._at(name).rpartition("/")[0] or "/", exist_ok=True)

    def _commit(self, path: Path, name: str) -> bool:
        """Commit a file to a model; the hub's driver would first make a copy of it on this disk."""
        from huggingface_hub import HfApi

        at: Any = self._system.resolve_path(self._at(name))
        if not hasattr(at, "repo_id"):  # in a bucket of the hub
            return False
        HfApi(token=self._token).upload_file(
            path_or_fileobj=path, path_in_repo=at.path_in_repo, repo_id=at.repo_id, repo_type=at.repo_type,
            revision=at.revision, commit_message=f"{name}, by quantize8",
        )  # fmt: skip
        return True

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except Quantize8Error:
            raise
        except Exception as error:  # each driver has errors of its own, which may quote the address
            why = reason(error, self._address)
            raise OutputError(
                f"{self.shown}: cannot be {what} ({why}); fix that and run the same command again"
            ) from None


def place_of(out: str | Path, token: str | None = None) -> Path | Store:
    """Where an artifact goes: a path, that of file:// too, or a place in a store; `token` is the hub's."""
    if isinstance(out, str) and is_url(out) and not out.startswith(_FILE):
        return Store(out, token)
    return Path(str(out).removeprefix(_FILE))


def path_of(artifact: str | Path) -> Path:
    """The folder of an artifact that is here; raises ArtifactError for an address of any other place."""
    text = str(artifact).removeprefix(_FILE)
    if is_url(text):
        raise ArtifactError(f"{without_secrets(text)}: only convert and finalize take addresses; copy it here first")
    return Path(text)
