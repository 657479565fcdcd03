"""Upload a local artifact to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize8.artifact.manifest import read_manifest
from quantize8.artifact.upload import artifact_files, prepare, upload
from quantize8.destinations.base import path_of


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, and its address on the hub."""

    artifact: Path
    repo_id: str
    url: str  # of the commit
    files: int  # number of files, without the model card
    nbytes: int  # size of these files


def push(
    artifact: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload an artifact with a model card, in one commit.

    An artifact that the repository already contains is replaced. A repository with any other files is refused.

    Args:
        artifact: The folder of the artifact.
        repo_id: Model repository on the hub, such as me/model. It is created if it does not exist.
        private: Create the repository as private.
        revision: Branch to upload to. It is created if it does not exist. None is the main branch.
        token: Hub token with write access. None uses the one that `hf auth login` stored.

    Returns:
        What was uploaded, and the address of the commit.

    Raises:
        ArtifactError: The folder is not a complete artifact.
        OutputError: The hub refuses the upload, or the repository contains other files.
    """
    folder = path_of(artifact)
    files = artifact_files(folder, read_manifest(folder))
    prepare(repo_id, revision=revision, token=token)
    url = upload(folder, repo_id, private=private, revision=revision, token=token)
    return Pushed(folder, repo_id, url, len(files), sum((folder / name).stat().st_size for name in files))
