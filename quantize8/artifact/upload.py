"""An artifact to the Hugging Face hub, in one commit: its files, and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantize8.artifact.card import CARD_NAME, card
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from quantize8.checkpoint.hub import clean
from quantize8.errors import ArtifactError, OutputError, Quantize8Error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ALWAYS_THERE = (".gitattributes", CARD_NAME)  # what the hub itself puts into a new model, and what is written anew


def prepare(repo_id: str, *, revision: str | None = None, token: str | None = None) -> None:
    """Refuse, before there is an artifact, a token that the hub does not know, and a model that must not be replaced.

    Raises OutputError.
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
    """Upload an artifact with its card to a model, which is made where there is none; the address of the commit.

    Files of an artifact that was there before are removed; a model that holds anything else is refused.
    Raises ArtifactError where `folder` is no whole artifact, OutputError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    manifest = read_manifest(folder)
    files = artifact_files(folder, manifest)
    with _sending(repo_id, token):
        api = HfApi(token=token)
        # the hub's own spelling of the id: with the user's name where none was given
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
    """Names of all files of an artifact; raises ArtifactError where one is missing."""
    names = [*manifest.headers, *manifest.files, MANIFEST_NAME]
    for name in names:
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: missing; copy the artifact again, or convert its source again")
    return names


def _replaced(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Files of the artifact that is there already; a model that holds something else is refused."""
    there = {*api.list_repo_files(repo_id, revision=revision)}
    if there <= {*_ALWAYS_THERE}:
        return set()
    if MANIFEST_NAME in there:
        path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=revision)
        manifest = read_manifest(Path(path).parent)
        return there & {*manifest.headers, *manifest.files}
    raise OutputError(f"{repo_id}: holds files that are no artifact of quantize8, and is not overwritten; name another")


def _license(api: HfApi, manifest: Manifest) -> str | None:
    """The source's license, where its card on the hub tells it."""
    if "revision" not in manifest.source:
        return None
    try:
        data = api.model_info(manifest.source["id"], revision=manifest.source["revision"]).card_data
    except Exception:  # gone, gated or renamed since: then the card says nothing of a license
        return None
    found = data.get("license") if data is not None else None
    return found if isinstance(found, str) else None


@contextmanager
def _sending(repo_id: str, token: str | None) -> Iterator[None]:
    """What the hub refuses, in one line of ours that holds no token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except Quantize8Error:
        raise
    except HFValidationError:
        raise OutputError(f"{repo_id}: is no name of a model on the hub; name one like me/model") from None
    except LocalTokenNotFoundError:
        raise OutputError(f"{repo_id}: uploading takes a token; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            why = "the token is missing, unknown, or has no right to write there"
            raise OutputError(f"{repo_id}: refused by the hub ({why}); run `hf auth login`") from None
        raise OutputError(f"{repo_id}: upload failed (answer {status}); run `quantize8 push` again") from None
    except Exception as error:  # of the HTTP library, which share no base class with the hub's
        raise OutputError(
            f"{repo_id}: upload failed ({clean(error.__cause__ or error, token)}); run `quantize8 push` again"
        ) from None
