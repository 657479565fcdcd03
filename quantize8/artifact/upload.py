"""Upload an artifact to the Hugging Face hub in one commit: its files and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantize8.artifact.card import CARD_NAME, card
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from quantize8.errors import ArtifactError, OutputError, Quantize8Error
from quantize8.sources.hub import clean

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ALWAYS_THERE = (".gitattributes", CARD_NAME)  # created by the hub in a new repository, and written by every upload


def prepare(repo_id: str, *, revision: str | None = None, token: str | None = None) -> None:
    """Check, before the conversion, that the hub knows the token and that the repository may be replaced.

    Args:
        repo_id: Model repository on the hub; it need not exist.
        revision: Branch to upload to; it need not exist. None is the main branch.
        token: Hub token. None uses the one that `hf auth login` stored.

    Raises:
        OutputError: The hub refuses the token, or the repository contains files that are not an artifact.
    """
    from huggingface_hub import HfApi

    with _sending(repo_id, token):
        api = HfApi(token=token)
        api.whoami()
        if api.repo_exists(repo_id):
            _replaced(api, repo_id, revision if revision and api.revision_exists(repo_id, revision) else None)


def upload(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Upload an artifact with its model card.

    The files of a previous artifact are removed. A repository with any other files is refused.

    Args:
        folder: The folder of the artifact.
        repo_id: Model repository on the hub. It is created if it does not exist.
        private: Create the repository as private.
        revision: Branch to upload to. It is created if it does not exist. None is the main branch.
        token: Hub token with write access. None uses the one that `hf auth login` stored.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: `folder` is not a complete artifact.
        OutputError: The hub refuses the upload, or the repository contains other files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    manifest = read_manifest(folder)
    files = artifact_files(folder, manifest)
    with _sending(repo_id, token):
        api = HfApi(token=token)
        # the id as the hub spells it: with the name of the user if none was given
        name = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        stale = sorted(_replaced(api, name, revision) - {*files})
        text = card(folder, manifest, name, _license(api, manifest)).encode()
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(file, folder / file) for file in files),
                CommitOperationAdd(CARD_NAME, text),
                *(CommitOperationDelete(file) for file in stale),
            ],
            commit_message=f"{manifest.format} artifact of {manifest.source['id']}, by quantize8 {manifest.version}",
            revision=revision,
        )
        return str(commit.commit_url)


def artifact_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of all files of an artifact; raises ArtifactError if one is missing."""
    names = [*manifest.headers, *manifest.files, MANIFEST_NAME]
    for name in names:
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: missing; copy the artifact again, or convert its source again")
    return names


def _replaced(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Files of the artifact that the repository contains; raises OutputError if it contains anything else."""
    existing = {*api.list_repo_files(repo_id, revision=revision)}
    if existing <= {*_ALWAYS_THERE}:
        return set()
    if MANIFEST_NAME in existing:
        path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=revision)
        manifest = read_manifest(Path(path).parent)
        return existing & {*manifest.headers, *manifest.files}
    raise OutputError(f"{repo_id}: contains files that are not an artifact of quantize8; use another repository")


def _license(api: HfApi, manifest: Manifest) -> str | None:
    """The license of the source from its model card on the hub; None if it has none."""
    if "revision" not in manifest.source:
        return None
    try:
        data = api.model_info(manifest.source["id"], revision=manifest.source["revision"]).card_data
    except Exception:  # deleted, gated or renamed since: then the card names no license
        return None
    found = data.get("license") if data is not None else None
    return found if isinstance(found, str) else None


@contextmanager
def _sending(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn errors of the hub into an OutputError of one line, without the token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except Quantize8Error:
        raise
    except HFValidationError:
        raise OutputError(f"{repo_id}: is not a valid model name on the hub; use one like me/model") from None
    except LocalTokenNotFoundError:
        raise OutputError(f"{repo_id}: uploading needs a token; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            why = "the token is missing, unknown, or has no write access"
            raise OutputError(f"{repo_id}: refused by the hub ({why}); run `hf auth login`") from None
        raise OutputError(f"{repo_id}: upload failed (HTTP status {status}); run `quantize8 push` again") from None
    except Exception as error:  # of the HTTP library, whose errors share no base class with those of the hub
        raise OutputError(
            f"{repo_id}: upload failed ({clean(error.__cause__ or error, token)}); run `quantize8 push` again"
        ) from None
