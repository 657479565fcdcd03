"""Errors that a user can cause or encounter. Each message is one line: what is wrong, where, and what to do.

Quantize8Error
├── SourceError      the checkpoint cannot be found, opened or trusted
├── WeightError      a tensor holds values that int8 cannot represent
├── RecipeError      a recipe is unknown, or a key or value in it is wrong
├── OutputError      the output folder cannot be created, or must not be replaced
├── ArtifactError    an artifact is damaged, or breaks a promise of its format
└── DependencyError  a package or device that this command needs is missing

DeviceWarning        a GPU cannot be used, or not for an outlier mode; printed, and the command continues
"""

from __future__ import annotations

import os
import re

_MESSAGE = 2000  # characters: a hostile file may give a name of megabytes
_SECRETS = re.compile(r"(?<=://)[^/\s@]+(?=@)|\b(?:hf|api_org)_[A-Za-z0-9]{8,}")  # user:password@ in a URL; a hub token
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


class Quantize8Error(Exception):
    """Base of all errors below; the command line prints it as one line and exits with code 1.

    The message is passed through `one_line`, because it may contain names from files or text of other libraries.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class SourceError(Quantize8Error):
    """A checkpoint cannot be found, opened or trusted."""


class WeightError(Quantize8Error):
    """A tensor holds NaN, infinity, or magnitudes that the target format cannot hold."""


class RecipeError(Quantize8Error):
    """A recipe is unknown, or one of its keys or values is wrong."""


class OutputError(Quantize8Error):
    """The output folder cannot be created or must not be replaced, or the disk is too small."""


class ArtifactError(Quantize8Error):
    """An artifact is damaged, or breaks a promise of its format."""


class DependencyError(Quantize8Error):
    """A package or device that this command needs is missing."""


class DeviceWarning(UserWarning):
    """A GPU is present but cannot be used, so the CPU is; or it has no kernel for a mode, so another mode is used."""


def one_line(text: str) -> str:
    """Text as one line that is safe to print: without control characters and secrets, truncated if it is very long."""
    text = _SECRETS.sub("***", " ".join(text.split()))
    for token in filter(None, map(os.environ.get, _TOKENS)):
        text = text.replace(token, "***")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}..."


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
