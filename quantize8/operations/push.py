"""An artifact that is on this machine, to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize8.artifact.manifest import read_manifest
from quantize8.artifact.upload import artifact_files, prepare, upload
from quantize8.destinations.base import path_of


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and where it is now."""

    artifact: Path
    repo_id: str
    url: str  # of the commit
    files: int
    nbytes: int


def push(
    artifact: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload an artifact with a model card, in one commit.

    Args: repo_id, a model id like me/model, made (`private` or not) where there is none; revision, a branch, made where
    there is none. An artifact that is there already is replaced; a model that holds anything else is refused.
    Raises ArtifactError where the folder is no whole artifact, OutputError where the hub refuses.
    """
    folder = path_of(artifact)
    files = artifact_files(folder, read_manifest(folder))
    prepare(repo_id, revision=revision, token=token)
    url = upload(folder, repo_id, private=private, revision=revision, token=token)
    return Pushed(folder, repo_id, url, len(files), sum((folder / name).stat().st_size for name in files))
