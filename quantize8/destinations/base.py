"""What a conversion needs of the place where its artifact goes.

    with destination.open(units, decisions, source, overwrite) as session:
        with session.calibration() as path: ...       # the file that keeps what calibration measured
        for batch in session.batches(units, heading):
            with session.staging(batch.units, heading) as staging: ...   # write these weight files
        records, missing = session.collect(units, heading)
        session.publish(build, overwrite)             # the small files and the manifest, and the artifact appears

A process may be killed at any of these points, and several may write to one destination: the next one goes on with
what is finished, and refuses what other options have left there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quantize8.artifact.manifest import Manifest
from quantize8.destinations.journal import Heading, Records
from quantize8.errors import ArtifactError
from quantize8.files import is_url

if TYPE_CHECKING:
    from quantize8.conversion.plan import WorkUnit
    from quantize8.destinations.local import Staging

_FILE = "file://"
Build = Callable[[Path, Path], Manifest]  # (folder of the artifact's files, folder of outlier parts) -> the manifest


class Batch(NamedTuple):
    """Weight files that are written together, or that are finished already with these records."""

    units: Sequence[WorkUnit]
    records: Records | None = None


class Session(Protocol):
    """A destination that is open for one process."""

    def calibration(self) -> AbstractContextManager[Path]:
        """The file that keeps what calibration measured, on this machine; kept at the destination afterwards."""

    def batches(self, units: Sequence[WorkUnit], heading: Heading) -> Iterable[Batch]:
        """These weight files in the groups in which they are written; raises OutputError if the disk is too small."""

    def staging(self, units: Sequence[WorkUnit], heading: Heading) -> AbstractContextManager[Staging]:
        """Where to write these weight files; when the block ends they are at the destination."""

    def collect(self, units: Sequence[WorkUnit], heading: Heading) -> tuple[Records, list[WorkUnit]]:
        """Records of all tensors of these weight files, and the weight files that are not finished."""

    def publish(self, units: Sequence[WorkUnit], build: Build, overwrite: bool) -> Manifest:
        """Have `build` make the small files and the manifest, and make the artifact appear."""


class Destination(ABC):
    """Where an artifact goes: `out` is its path, or its address without secrets."""

    out: Path | str

    @property
    @abstractmethod
    def partial(self) -> Path | str:
        """What keeps an unfinished artifact there."""

    @property
    @abstractmethod
    def scratch(self) -> Path:
        """The folder on this machine that weight files are staged beside."""

    @abstractmethod
    def check(self, source: Path, overwrite: bool) -> None:
        """Raise OutputError where something is there that must not be written to, or that holds the source."""

    @abstractmethod
    def disk_bytes(self, units: Sequence[WorkUnit]) -> int:
        """The most bytes that this machine's disk holds of these weight files at once."""

    @abstractmethod
    def recorded(self) -> Heading | None:
        """The heading of a journal that is there; None where no conversion was begun."""

    @abstractmethod
    def open(
        self, units: Sequence[WorkUnit], decisions: dict[str, Any], source: Path, overwrite: bool, start_over: bool
    ) -> AbstractContextManager[Session]:
        """Open it to write these weight files.

        Args:
            units: Weight files that no other process writes meanwhile.
            decisions: What decides their bytes. Unfinished work with other decisions is refused.
            source: Folder of the source, which is never written to.
            overwrite: An artifact may be there, to be replaced at the end.
            start_over: Remove unfinished work with other decisions instead of refusing it.

        Raises:
            OutputError: Another process has it, or the system refuses something.
        """


def destination_of(out: str | Path, token: str | None = None) -> Destination:
    """The destination at a path, a file:// address too, or at an address in a store; `token` is the hub's."""
    if isinstance(out, str) and is_url(out) and not out.startswith(_FILE):
        from quantize8.destinations.store import ObjectStore

        return ObjectStore(out, token)
    from quantize8.destinations.local import LocalFolder

    return LocalFolder(Path(str(out).removeprefix(_FILE)))


def path_of(artifact: str | Path) -> Path:
    """The folder of an artifact on this machine; raises ArtifactError for an address of any other place."""
    text = str(artifact).removeprefix(_FILE)
    if is_url(text):
        from quantize8.sources.address import without_secrets

        raise ArtifactError(f"{without_secrets(text)}: only convert and finalize take addresses; copy it here first")
    return Path(text)
