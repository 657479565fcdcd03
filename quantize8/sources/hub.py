"""Checkpoints on the Hugging Face hub: lists the files of a model, and downloads the small ones to the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from quantize8.errors import SourceError, first_line
from quantize8.formats.gguf.parts import group_parts
from quantize8.sources import safetensors, torch_bin
from quantize8.sources.base import CONFIG_NAME, QUANT_CONFIG_NAME, files_to_copy
from quantize8.sources.ranges import Digest, HubFile, Interrupted

_MANIFEST = "quantize8.json"


@dataclass(frozen=True)
class Listing:
    """The files of a hub model at one commit that a conversion reads.

    Attributes:
        repo_id: The id of the model.
        revision: The revision that was requested; None for the main branch.
        commit: The commit that the revision stands for.
        token: The hub token; None for the stored one.
        weights: The weight files by name, with sizes and digests.
        small: The names of the other files.
    """

    repo_id: str
    revision: str | None
    commit: str
    token: str | None
    weights: dict[str, HubFile]
    small: list[str]


def find(repo_id: str, revision: str | None, token: str | None) -> Listing:
    """Look up a model on the hub.

    Args:
        repo_id: The id of the model.
        revision: A branch, tag or commit; None for the main branch.
        token: A hub token; None for the stored one.

    Returns:
        The commit, and the files that a conversion reads.

    Raises:
        OfflineError: The hub cannot be reached.
        SourceError: The model does not exist, access is denied, or it has no weights that are read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with asking(repo_id, revision, token):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:  # no connection; the HTTP library's errors share no base class with the hub's
            raise OfflineError(f"{repo_id}: the hub cannot be reached ({clean(error, token)}); try again") from None
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        weights, small = needed_files(list(siblings))
        if not weights and (models := group_parts(name for name in siblings if "/" not in name)):
            raise SourceError(
                f"{repo_id}: holds {len(models)} models in GGUF; download one (hf download {repo_id} FILE) and name it"
            )
        if not weights:
            raise SourceError(f"{repo_id}: holds neither safetensors nor {torch_bin.SINGLE_NAME}; name another model")
        commit = str(info.sha)
        files = {}
        for name in weights:
            sibling = siblings[name]
            lfs, blob = sibling.lfs, sibling.blob_id
            digest = Digest("sha256", lfs.sha256) if lfs else Digest("git-sha1", blob) if blob else None
            files[name] = HubFile(repo_id, name, commit, token, lfs.size if lfs else sibling.size, digest)
        return Listing(repo_id, revision, commit, token, files, small)


def snapshot(listing: Listing, names: list[str]) -> Path:
    """Download files of a model to the hub's cache.

    Args:
        listing: The model.
        names: The files to download.

    Returns:
        The folder of the snapshot, with these files in it.
    """
    from huggingface_hub import snapshot_download

    with asking(listing.repo_id, listing.commit, listing.token):
        wanted = [_literal(name) for name in names]
        folder = snapshot_download(listing.repo_id, revision=listing.commit, token=listing.token, allow_patterns=wanted)
        _note(Path(folder).parent.parent, listing)
        return Path(folder)


def _note(folder: Path, listing: Listing) -> None:
    """Record in the cache which commit a branch or tag stands for, so that it is found when the hub is unreachable."""
    name = listing.revision or "main"
    note = folder / "refs" / name
    if name != listing.commit and not (note.is_file() and note.read_text() == listing.commit):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(listing.commit)


def cached(repo_id: str, revision: str | None) -> Path:
    """Find the folder of a model that was downloaded earlier, for use when the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG_NAME, _MANIFEST):  # an artifact in GGUF has no config.json
        path = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(path, str) and needed_files([file.name for file in Path(path).parent.iterdir()])[0]:
            return Path(path).parent
    raise SourceError(f"{repo_id}: the hub cannot be reached and the model is not in the cache; try again later")


class OfflineError(SourceError):
    """The hub cannot be reached."""


@contextmanager
def asking(repo_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn the hub's errors within the block into a SourceError of one line that contains no token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (SourceError, Interrupted):
        raise
    except GatedRepoError:
        raise SourceError(f"{repo_id}: gated; ask for access on its page, then run `hf auth login`") from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{repo_id}: has no revision {revision!r}; leave --revision out, or name an existing one"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SourceError(
            f"{repo_id}: no such folder here and no such model on the hub; "
            "check the spelling, or run `hf auth login` if it is private"
        ) from None
    except Exception as error:  # the HTTP library's errors share no base class with the hub's
        raise SourceError(f"{repo_id}: download failed ({clean(error, token)}); run it again to resume") from None


def clean(error: BaseException, token: str | None) -> str:
    """The first line of an error, without the token: an error about an invalid header quotes the whole header."""
    from huggingface_hub import get_token

    text = first_line(error)
    for secret in (token, get_token()):
        for form in (secret or "", repr(secret or "")[1:-1], (secret or "").strip()):
            text = text.replace(form, "<token>") if form else text
    return text


def needed_files(names: list[str]) -> tuple[list[str], list[str]]:
    """Select the files of a hub model that a conversion reads.

    Args:
        names: All files of the model.

    Returns:
        The sorted names of the weight files, and of the other files. Weights are at the top level, in one format:
        safetensors if there are any, otherwise .bin, otherwise GGUF if there is exactly one model.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if safetensors.INDEX_NAME not in top and safetensors.SINGLE_NAME in weights:
        weights = [safetensors.SINGLE_NAME]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    models = list(group_parts(top).values())
    weights = weights or (models[0] if len(models) == 1 else [])
    settings = (CONFIG_NAME, QUANT_CONFIG_NAME, _MANIFEST)
    small = {name for name in top if name in settings or name.endswith(".index.json")}
    return sorted(weights), sorted(small.union(files_to_copy(names)))


def _literal(name: str) -> str:
    """A glob pattern that matches only this name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
