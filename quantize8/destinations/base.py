"""The interface of destinations, the places that artifacts are written to.

    with destination.open(units, decisions, source, overwrite, start_over) as session:
        with session.calibration() as found: ...      # the folder with the results of calibration
        for batch in session.batches(units, heading):
            with session.staging(batch.units, heading) as staging: ...   # write these weight files
        records, missing = session.collect(units, heading)
        session.publish(units, build, overwrite)      # write the small files and the manifest; the artifact appears

A process may be killed at any of these points, and several processes may write to one destination. The next process
resumes with what is finished, and refuses to resume a conversion with other options.
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
Build = Callable[[Path, Path], Manifest]  # (folder of the artifact's files, folder of the outlier parts) -> manifest


class Batch(NamedTuple):
    """Weight files that are written together; with records if they are finished already."""

    units: Sequence[WorkUnit]
    records: Records | None = None


# The results of calibration: columns, scales and smoothing factors; and codes with their index
CALIBRATION_NAMES = ("calibration.safetensors", "rounding.codes", "rounding.index")


class Session(Protocol):
    """A destination that one process has opened for writing."""

    def calibration(self) -> AbstractContextManager[Path]:
        """Provide the folder on this machine for files of CALIBRATION_NAMES, with those at the destination.

        What is there when the block ends stays at the destination. The folder stays until the session is closed.
        """

    def batches(self, units: Sequence[WorkUnit], heading: Heading) -> Iterable[Batch]:
        """Group weight files into batches that are written together.

        Args:
            units: The weight files.
            heading: The heading of their journals.

        Raises:
            OutputError: The disk is too small.
        """

    def staging(self, units: Sequence[WorkUnit], heading: Heading) -> AbstractContextManager[Staging]:
        """Provide the place to write weight files to; when the block ends, they are at the destination."""

    def collect(self, units: Sequence[WorkUnit], heading: Heading) -> tuple[Records, list[WorkUnit]]:
        """Read the records of all tensors of these weight files; also returns the weight files that are unfinished."""

    def publish(self, units: Sequence[WorkUnit], build: Build, overwrite: bool) -> Manifest:
        """Write the small files and the manifest, which makes the artifact appear.

        Args:
            units: All weight files of the artifact.
            build: Makes the small files and the manifest.
            overwrite: Replace an existing artifact.
        """


class Destination(ABC):
    """The place that an artifact is written to.

    Attributes:
        out: The path of the artifact, or its address without secrets.
    """

    out: Path | str

    @property
    @abstractmethod
    def partial(self) -> Path | str:
        """The place of an unfinished artifact at this destination."""

    @property
    @abstractmethod
    def scratch(self) -> Path:
        """The path on this machine next to which weight files are staged."""

    @abstractmethod
    def check(self, source: Path, overwrite: bool) -> None:
        """Check that an artifact can be written here.

        Args:
            source: Folder of the source.
            overwrite: An existing artifact may be replaced.

        Raises:
            OutputError: Something is there that must not be overwritten, or that contains the source.
        """

    @abstractmethod
    def disk_bytes(self, units: Sequence[WorkUnit]) -> int:
        """Largest number of bytes of these weight files that are on this machine's disk at the same time."""

    @abstractmethod
    def recorded(self) -> Heading | None:
        """The heading of an existing journal; None if no conversion was started here."""

    @abstractmethod
    def open(
        self, units: Sequence[WorkUnit], decisions: dict[str, Any], source: Path, overwrite: bool, start_over: bool
    ) -> AbstractContextManager[Session]:
        """Open the destination to write weight files.

        Args:
            units: Weight files, which no other process writes at the same time.
            decisions: Everything that determines their bytes. Unfinished work with other decisions is refused.
            source: Folder of the source, which is never written to.
            overwrite: An existing artifact may be replaced at the end.
            start_over: Remove unfinished work with other decisions instead of refusing it.

        Raises:
            OutputError: Another process is writing here, there is unfinished work with other decisions, or a file
                cannot be written.
        """


def destination_of(out: str | Path, token: str | None = None) -> Destination:
    """Make the destination for a path or address.

    Args:
        out: A path, a file:// address, or an address in an object store.
        token: Hub token.
    """
    if isinstance(out, str) and is_url(out) and not out.startswith(_FILE):
        from quantize8.destinations.store import ObjectStore

        return ObjectStore(out, token)
    from quantize8.destinations.local import LocalFolder

    return LocalFolder(Path(str(out).removeprefix(_FILE)))


def path_of(artifact: str | Path) -> Path:
    """The folder of an artifact on this machine; raises ArtifactError for an address in a store."""
    text = str(artifact).removeprefix(_FILE)
    if is_url(text):
        from quantize8.sources.address import without_secrets

        raise ArtifactError(f"{without_secrets(text)}: only convert and finalize take addresses; copy it here first")
    return Path(text)
