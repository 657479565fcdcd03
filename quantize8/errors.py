"""Errors a user can cause or meet. Each message says what is wrong, where, and what to do, in one line.

Quantize8Error
├── SourceError      the checkpoint cannot be found, opened or trusted
├── WeightError      a tensor holds values that int8 cannot stand for
├── RecipeError      a recipe is unknown, or a key or value in it is wrong
├── OutputError      the output folder cannot be made, or must not be replaced
├── ArtifactError    an artifact is damaged, or breaks a promise of its format
└── DependencyError  a package or device that this command needs is missing

DeviceWarning        a GPU cannot be used, or not for an outlier mode; printed, and nothing stops
"""

from __future__ import annotations

import os
import re

_MESSAGE = 2000  # characters: a hostile file may give a name of megabytes
_SECRETS = re.compile(r"(?<=://)[^/\s@]+(?=@)|\b(?:hf|api_org)_[A-Za-z0-9]{8,}")  # user:password@ in a URL; a hub token
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


class Quantize8Error(Exception):
    """Base of all errors below; the command line prints it as one line and exits with code 1.

    The message is shown as `one_line` makes it, whatever name from a file, or text of another library, is in it.
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
    """The output folder cannot be made, is too small a disk, or must not be replaced."""


class ArtifactError(Quantize8Error):
    """An artifact is damaged, or breaks a promise of its format."""


class DependencyError(Quantize8Error):
    """A package or device that this command needs is missing."""


class DeviceWarning(UserWarning):
    """A GPU is there but cannot be used, so the CPU is; or it has no kernel for a mode, so another mode is."""


def one_line(text: str) -> str:
    """Text as one line that a terminal can show: no control characters, no secrets, cut where it is very long."""
    text = _SECRETS.sub("***", " ".join(text.split()))
    for token in filter(None, map(os.environ.get, _TOKENS)):
        text = text.replace(token, "***")
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= _MESSAGE else f"{text[:_MESSAGE]}..."


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
