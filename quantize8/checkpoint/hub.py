"""Checkpoints on the Hugging Face hub: what a model consists of, and the small files, into the hub's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from quantize8.checkpoint import safetensors, torch_bin
from quantize8.checkpoint.base import CONFIG_NAME
from quantize8.checkpoint.companions import files_to_copy
from quantize8.checkpoint.gguf_parts import group_parts
from quantize8.checkpoint.ranges import Digest, HubFile, Interrupted
from quantize8.errors import SourceError, first_line

_MANIFEST = "quantize8.json"


@dataclass(frozen=True)
class Listing:
    """A hub model at one commit: the files that a conversion reads, weights with sizes and digests."""

    repo_id: str
    revision: str | None  # as it was asked for
    commit: str
    token: str | None
    weights: dict[str, HubFile]
    small: list[str]


def find(repo_id: str, revision: str | None, token: str | None) -> Listing:
    """What the hub says of a model. Raises OfflineError where it cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with asking(repo_id, revision, token):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception as error:  # no connection: the HTTP library's errors share no base class with the hub's
            raise OfflineError(f"{repo_id}: the hub cannot be reached ({clean(error, token)}); try again") from None
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        weights, small = needed_files(list(siblings))
        if not weights and (models := group_parts(name for name in siblings if "/" not in name)):
            raise SourceError(
                f"{repo_id}: holds {len(models)} models in GGUF; download one (hf download {repo_id} FILE), and name it"
            )
        if not weights:
            raise SourceError(f"{repo_id}: holds no safetensors and no {torch_bin.SINGLE_NAME}; name another model")
        commit = str(info.sha)
        files = {}
        for name in weights:
            found = siblings[name]
            lfs, blob = found.lfs, found.blob_id
            digest = Digest("sha256", lfs.sha256) if lfs else Digest("git-sha1", blob) if blob else None
            files[name] = HubFile(repo_id, name, commit, token, lfs.size if lfs else found.size, digest)
        return Listing(repo_id, revision, commit, token, files, small)


def snapshot(listing: Listing, names: list[str]) -> Path:
    """The folder of a model in the hub's cache, with these files in it."""
    from huggingface_hub import snapshot_download

    with asking(listing.repo_id, listing.commit, listing.token):
        wanted = [_literal(name) for name in names]
        folder = snapshot_download(listing.repo_id, revision=listing.commit, token=listing.token, allow_patterns=wanted)
        _note(Path(folder).parent.parent, listing)
        return Path(folder)


def _note(folder: Path, listing: Listing) -> None:
    """Note in the cache which commit a branch or tag is: it is found by that when the hub is away."""
    name = listing.revision or "main"
    note = folder / "refs" / name
    if name != listing.commit and not (note.is_file() and note.read_text() == listing.commit):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(listing.commit)


def cached(repo_id: str, revision: str | None) -> Path:
    """The folder of a model that was downloaded before, when the hub cannot be asked."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG_NAME, _MANIFEST):  # an artifact in GGUF has no config.json
        path = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(path, str) and needed_files([file.name for file in Path(path).parent.iterdir()])[0]:
            return Path(path).parent
    raise SourceError(f"{repo_id}: the hub cannot be reached and the model is not in the cache; try again")


class OfflineError(SourceError):
    """The hub cannot be reached."""


@contextmanager
def asking(repo_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """What the hub refuses, in one line of ours that holds no token."""
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
            f"{repo_id}: has no revision {revision!r}; leave --revision out, or name one it has"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise SourceError(
            f"{repo_id}: no such folder here and no such model on the hub; "
            "check the spelling, or run `hf auth login` if it is private"
        ) from None
    except Exception as error:  # of the HTTP library, which share no base class with the hub's
        raise SourceError(f"{repo_id}: download failed ({clean(error, token)}); run it again to go on") from None


def clean(error: BaseException, token: str | None) -> str:
    """What an error says, in one line, without the token: a header that cannot be sent is quoted whole."""
    from huggingface_hub import get_token

    text = first_line(error)
    for secret in (token, get_token()):
        for form in (secret or "", repr(secret or "")[1:-1], (secret or "").strip()):
            text = text.replace(form, "<token>") if form else text
    return text


def needed_files(names: list[str]) -> tuple[list[str], list[str]]:
    """The files of a hub model that a conversion reads, (weights, small ones): safetensors before .bin, at the top."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if safetensors.INDEX_NAME not in top and safetensors.SINGLE_NAME in weights:
        weights = [safetensors.SINGLE_NAME]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    models = list(group_parts(top).values())
    weights = weights or (models[0] if len(models) == 1 else [])
    small = {name for name in top if name in (CONFIG_NAME, _MANIFEST) or name.endswith(".index.json")}
    return sorted(weights), sorted(small.union(files_to_copy(names)))


def _literal(name: str) -> str:
    """A pattern that only this name fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
