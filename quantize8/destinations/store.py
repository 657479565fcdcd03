"""A destination in an object store for which fsspec has a driver, such as s3://bucket/model.

The only requirement on a store is that uploads are atomic; nothing is renamed, appended to or locked. Each weight file
is written on this machine, uploaded as a whole, and removed here. The folder `.partial` beside the artifact's files
has a journal for each weight file that was started: before the upload only its heading, afterwards all of it. The
journals therefore tell which conversion the files belong to, and which of them are finished: those that have the right
size and whose journal lists all of their tensors. Two processes that write the same file upload the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, digest, files_of
from quantize8.artifact.outliers import PART_SUFFIX
from quantize8.destinations.base import CALIBRATION_NAMES, Batch, Build, Destination
from quantize8.destinations.journal import SUFFIX, Heading, Records, agrees, begun, parse, records_of
from quantize8.destinations.local import LocalFolder, Staging, check_disk, unlike
from quantize8.errors import OutputError, Quantize8Error
from quantize8.files import cache_dir
from quantize8.sources.address import HUB_SCHEME, file_system, reason, scheme_of, without_secrets
from quantize8.sources.base import CONFIG_NAME

if TYPE_CHECKING:
    from quantize8.conversion.plan import WorkUnit

PARTIAL = ".partial"  # folder beside the artifact's files for what is removed when the conversion ends
ENDING = f"{PARTIAL}/{MANIFEST_NAME}"  # early copy of the manifest: lists the small files, if publishing is interrupted
_CALIBRATION = tuple(f"{PARTIAL}/{name}" for name in CALIBRATION_NAMES)
_OTHERWISE = "set XDG_CACHE_HOME to a folder on another disk"
# These stores have no folders, only names with slashes. Asking their drivers for a folder could create a bucket.
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
# files that the hub itself adds to a new model
_OF_THE_HUB = (".gitattributes", "README.md")


class ObjectStore(Destination):
    """The destination at an address. Every driver error is raised as a one-line OutputError without secrets.

    Args:
        address: The address, such as s3://bucket/model.
        token: Hub token, for an hf:// address.

    Raises:
        DependencyError: The driver is not installed.
    """

    out: str

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address, self._token = address.rstrip("/"), token
        self.out = without_secrets(self._address)
        self._is_hub = address.startswith(HUB_SCHEME)
        options = {"token": token} if self._is_hub and token else {}
        self._system, root = file_system(self._address, OutputError, **options)
        self._root = root.rstrip("/")
        self._has_folders = scheme_of(address) not in _WITHOUT_FOLDERS

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, str | None]]:
        return ObjectStore, (self._address, self._token)

    def __str__(self) -> str:
        return self.out

    @property
    def partial(self) -> str:
        """See `Destination.partial`."""
        return PARTIAL

    @property
    def scratch(self) -> Path:
        """See `Destination.scratch`; it depends on the address alone, so that an interrupted conversion can resume."""
        return cache_dir("out") / digest(self.out.encode())[:32] / "artifact"

    def check(self, source: Path, overwrite: bool) -> None:
        """See `Destination.check`; an existing artifact is refused even with `overwrite`."""
        look(self)

    def disk_bytes(self, units: Sequence[WorkUnit]) -> int:
        """See `Destination.disk_bytes`; weight files are staged one at a time."""
        return max((unit.nbytes for unit in units), default=0)

    def recorded(self) -> Heading | None:
        """See `Destination.recorded`."""
        return next((heading for heading, _ in look(self).journals.values() if heading), None)

    @contextmanager
    def open(
        self,
        units: Sequence[WorkUnit],
        decisions: dict[str, Any],
        source: Path,
        overwrite: bool = False,
        start_over: bool = False,
    ) -> Iterator[StoreSession]:
        """See `Destination.open`."""
        content = look(self)
        _accept(self, content, decisions, start_over)
        with ExitStack() as until_closed:
            yield StoreSession(self, content, source, start_over, until_closed)

    def files(self) -> dict[str, int | None]:
        """File name -> size in bytes, including the files in PARTIAL; None for other folders."""
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
        """Upload a file under a name; an existing file is replaced."""
        with self._telling("written"):
            self._make_folder(name)
            if not (self._is_hub and self._commit(path, name)):
                self._system.put_file(str(path), self._at(name))

    def write(self, name: str, data: bytes) -> None:
        """Upload small contents from memory under a name; an existing file is replaced."""
        with self._telling("written"):
            self._make_folder(name)
            self._system.pipe_file(self._at(name), data)

    def get(self, name: str, path: Path) -> None:
        """Download a file to a path on this machine."""
        with self._telling("read"):
            self._system.get_file(self._at(name), str(path))

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Read small files; b"" for one that does not exist."""
        if not names:
            return []
        with self._telling("read"):
            paths = [self._at(name) for name in names]
            found = self._system.cat_ranges(paths, None, None, on_error="return")  # drivers can read them concurrently
            for data in found:
                if isinstance(data, BaseException) and not isinstance(data, FileNotFoundError):
                    raise data
        return [data if isinstance(data, bytes) else b"" for data in found]

    def remove(self, names: Sequence[str]) -> None:
        """Remove files in the given order; it is no error if one does not exist."""
        with self._telling("written"):
            for name in names:
                with suppress(FileNotFoundError):
                    self._system.rm_file(self._at(name))
            if self._has_folders:
                for folder in {name.rpartition("/")[0] for name in names} - {""}:
                    with suppress(Exception):  # it is not empty, or was removed with its last file
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
            elif entry["type"] == "file" and not full.endswith("/"):  # an empty file with a slash stands for a folder
                raise OutputError(f"{self.out}: is a file; choose another address with --out")
        return found

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._system.makedirs(self._at(name).rpartition("/")[0] or "/", exist_ok=True)

    def _commit(self, path: Path, name: str) -> bool:
        """Commit a file to a model on the hub, because its driver would first copy the file on this disk.

        Returns:
            Whether this was done; a bucket of the hub has no commits.
        """
        from huggingface_hub import HfApi

        at: Any = self._system.resolve_path(self._at(name))
        if not hasattr(at, "repo_id"):  # a bucket of the hub
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
        except Exception as error:  # drivers raise errors of their own, which may contain the address
            why = reason(error, self._address)
            raise OutputError(
                f"{self.out}: cannot be {what} ({why}); fix that and run the same command again"
            ) from None


@dataclass
class Content:
    """The contents of a store that has no finished artifact.

    Attributes:
        files: File name -> size in bytes; None for a folder.
        journals: Weight file -> the heading and the entries of its journal.
        small: The files that the early copy of the manifest lists, if publishing was started.
        leftovers: Files that are removed when the conversion ends.
    """

    files: dict[str, int | None]
    journals: dict[str, tuple[Heading, dict[str, Records]]]
    small: list[str]
    leftovers: list[str]

    def finished(self, unit: WorkUnit, heading: Heading) -> Records | None:
        """The records of a weight file's tensors; None if it or its outlier columns are not finished."""
        stated, entries = self.journals.get(unit.shard.file, ({}, {}))
        expected = {unit.shard.file: unit.shard.nbytes}
        if unit.outliers is not None:
            expected[f"{PARTIAL}/{unit.outliers.file}"] = unit.outliers.nbytes
        whole = all(self.files.get(name) == nbytes for name, nbytes in expected.items())
        complete = whole and agrees(stated, heading) and entries.keys() >= set(unit.sources)
        return records_of(entries) if complete else None


class StoreSession:
    """See `destinations.base.Session`."""

    def __init__(
        self, store: ObjectStore, content: Content, source: Path, start_over: bool, until_closed: ExitStack
    ) -> None:
        self._store, self._content, self._source, self._start_over = store, content, source, start_over
        self._until_closed = until_closed

    @contextmanager
    def calibration(self) -> Iterator[Path]:
        """See `Session.calibration`."""
        folder, before = self._until_closed.enter_context(_folder(self._store)), dict[str, str]()
        for name in CALIBRATION_NAMES:
            if f"{PARTIAL}/{name}" in self._content.files:
                self._store.get(f"{PARTIAL}/{name}", folder / name)
                before[name] = _digest(folder / name)
        try:
            yield folder
        except OutputError as error:
            raise OutputError(str(error).replace(str(folder), f"{self._store}/{PARTIAL}")) from None
        for name in CALIBRATION_NAMES:
            if (folder / name).exists() and _digest(folder / name) != before.get(name):
                self._store.put(folder / name, f"{PARTIAL}/{name}")

    def batches(self, units: Sequence[WorkUnit], heading: Heading) -> list[Batch]:
        """See `Session.batches`; each weight file is a batch."""
        batches = [Batch([unit], self._content.finished(unit, heading)) for unit in units]
        scratch = LocalFolder(self._store.scratch)
        needed = [scratch.missing_bytes(batch.units) for batch in batches if batch.records is None]
        check_disk(scratch.out, max(needed, default=0), _OTHERWISE)
        return batches

    @contextmanager
    def staging(self, units: Sequence[WorkUnit], heading: Heading) -> Iterator[Staging]:
        """See `Session.staging`; a weight file is uploaded when it is written, and its journal after it."""
        (unit,), store, scratch = units, self._store, LocalFolder(self._store.scratch)
        file, journal = unit.shard.file, f"{PARTIAL}/{unit.shard.file}{SUFFIX}"
        claims = not agrees(self._content.journals.get(file, ({}, {}))[0], heading)
        with scratch.open(units, heading["decisions"], self._source, start_over=self._start_over) as staging:
            if claims:  # before any work, so that missing permissions show up at once
                store.write(journal, begun(heading))
            try:
                yield staging
            except BaseException:
                with suppress(Quantize8Error):
                    if claims and file not in store.files():  # another process may have uploaded it meanwhile
                        store.remove([journal])
                raise
            store.put(staging.files / file, file)
            if unit.outliers is not None:
                store.put(staging.folder / unit.outliers.file, f"{PARTIAL}/{unit.outliers.file}")
            store.put(staging.journals[file].path, journal)
            staging.discard()
        with suppress(OSError):
            scratch.out.parent.rmdir()

    def collect(self, units: Sequence[WorkUnit], heading: Heading) -> tuple[Records, list[WorkUnit]]:
        """See `Session.collect`."""
        self._content = look(self._store)
        records: Records = {}
        missing: list[WorkUnit] = []
        for unit in units:
            finished = self._content.finished(unit, heading)
            if finished is None:
                missing.append(unit)
            else:
                records |= finished
        return records, missing

    def publish(self, units: Sequence[WorkUnit], build: Build, overwrite: bool) -> Manifest:
        """See `Session.publish`; config.json is uploaded after the weights, so loaders open nothing incomplete."""
        parts = [unit.outliers for unit in units if unit.outliers is not None]
        self._content = look(self._store)  # with what was uploaded since the session was opened
        with _folder(self._store) as folder:
            if parts:  # the parts, and the file that they are merged into
                check_disk(folder, 2 * sum(part.nbytes for part in parts), _OTHERWISE)
            (folder / "files").mkdir()
            for part in parts:
                self._store.get(f"{PARTIAL}/{part.file}", folder / part.file)
            manifest = build(folder / "files", folder)
            self._put_small(folder / "files")
        root = self._store.scratch.parent
        for leftover in (root, *root.parent.glob(f"{root.name}-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        return manifest

    def _put_small(self, folder: Path) -> None:
        store, content = self._store, self._content
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        last = [name for name in (CONFIG_NAME, MANIFEST_NAME) if name in names]
        store.put(folder / MANIFEST_NAME, ENDING)
        store.remove(sorted({*content.small} - names - {*content.journals}))  # of an earlier attempt
        for name in [*sorted(names - {*last}), *last]:
            store.put(folder / name, name)
        with suppress(OutputError):  # the artifact is complete; credentials may only allow uploads
            store.remove([*content.leftovers, ENDING])


def look(store: ObjectStore) -> Content:
    """List the contents of a store.

    Raises:
        OutputError: There is a finished artifact, or a file that does not belong to an unfinished conversion.
    """
    files = store.files()
    leftovers = [name for name, nbytes in files.items() if nbytes is not None and _is_leftover(name)]
    if MANIFEST_NAME in files and files.get(ENDING, files[MANIFEST_NAME]) == files[MANIFEST_NAME]:  # and is whole
        with suppress(OutputError):
            store.remove(leftovers)  # of the conversion that made it, if it was interrupted just before it ended
        raise OutputError(
            f"{store}: exists, and a store cannot replace an artifact in one step; remove it, or choose another --out"
        )
    names = [name for name in leftovers if name.endswith(SUFFIX)]
    weights = [name.removeprefix(f"{PARTIAL}/").removesuffix(SUFFIX) for name in names]
    journals = dict(zip(weights, map(parse, store.read(names)), strict=True))
    (ending,) = store.read([ENDING]) if ENDING in files else (b"",)
    content = Content(files, journals, files_of(ending), leftovers)
    known = {MANIFEST_NAME, *leftovers, *weights, *(name.partition("/")[0] for name in content.small)}
    foreign = sorted(files.keys() - known)
    if foreign:
        raise OutputError(f"{store}: holds {foreign[0]}, which is not part of a conversion; choose an empty --out")
    return content


def _accept(store: ObjectStore, content: Content, decisions: dict[str, Any], start_over: bool) -> None:
    """Refuse unfinished work with other decisions, or with `start_over` remove it, the journals last."""
    others = {name: other for name, (stated, _) in content.journals.items() if (other := unlike(stated, decisions))}
    if not others:
        return
    if not start_over:
        raise OutputError(f"{store}: {PARTIAL} {next(iter(others.values()))}")
    parts = (f"{PARTIAL}/{name}{PART_SUFFIX}" for name in others)
    names = [MANIFEST_NAME, CONFIG_NAME, *content.small, *others, *parts, *_CALIBRATION]
    names += [*(f"{PARTIAL}/{name}{SUFFIX}" for name in others), ENDING]
    store.remove([name for name in names if name in content.files or name in content.small])
    content.files = {name: nbytes for name, nbytes in content.files.items() if name not in names}
    content.journals = {name: journal for name, journal in content.journals.items() if name not in others}
    content.small, content.leftovers = [], [name for name in content.leftovers if name not in names]


def _is_leftover(name: str) -> bool:
    """Whether a file is removed when the conversion ends."""
    return name in (*_CALIBRATION, ENDING) or (name.startswith(f"{PARTIAL}/") and name.endswith((SUFFIX, PART_SUFFIX)))


def _digest(path: Path) -> str:
    return str(blake3().update_mmap(path).hexdigest())


@contextmanager
def _folder(store: ObjectStore) -> Iterator[Path]:
    """A temporary folder on this machine, which is removed when the block ends."""
    root = store.scratch.parent
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}-") as name:
            yield Path(name)
    except OSError as error:
        why = f"{error.strerror or error} at {error.filename or root.parent}"
        raise OutputError(
            f"{store}: cannot write files on this machine ({why}); fix that, or {_OTHERWISE}, and run it again"
        ) from None
