"""Checkpoints on the Hugging Face hub: the files that are needed, and no others, into the hub's own cache."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from quantize8.checkpoint import safetensors, torch_bin
from quantize8.checkpoint.base import COMPANIONS, CONFIG_NAME
from quantize8.errors import SourceError, first_line


def download(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    """A snapshot of a hub model with its weights in one format: (folder, commit). Uses the cache when offline."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision)
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception:  # offline, or no connection: the HTTP library's errors share no base class with the hub's
            folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
            return Path(folder), Path(folder).name
        needed = needed_files([sibling.rfilename for sibling in info.siblings or []])
        if not needed:
            raise SourceError(f"{repo_id}: holds no safetensors and no {torch_bin.SINGLE_NAME}; name another model")
        return Path(snapshot_download(repo_id, revision=info.sha, token=token, allow_patterns=needed)), str(info.sha)
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
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{repo_id}: the hub cannot be reached and the model is not in the cache; try again"
        ) from None
    except SourceError:
        raise
    except Exception as error:  # as above
        raise SourceError(f"{repo_id}: download failed ({first_line(error)}); run it again to go on") from None


def needed_files(names: list[str]) -> list[str]:
    """The files of a hub model that a conversion reads: safetensors before .bin, at the top, and small files."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if safetensors.INDEX_NAME not in top and safetensors.SINGLE_NAME in weights:
        weights = [safetensors.SINGLE_NAME]
    weights = weights or [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    if not weights:
        return []
    small = [name for name in names if any(fnmatch(name, pattern) for pattern in (CONFIG_NAME, *COMPANIONS))]
    return sorted({*weights, *(name for name in small if name in top or fnmatch(name, COMPANIONS[-1]))})
