"""Checks the tokenizer files of a model folder before the transformers and tokenizers packages trust them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.sources.base import companions, contained

_NAME, _CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"


def check_tokenizer(folder: Path) -> None:
    """Check the tokenizer files of a model folder.

    Args:
        folder: The folder.

    Raises:
        SourceError: A small file of the folder points outside of it, or a token has an id beyond VOCABULARY: the
            tokenizers package allocates memory up to the largest id, however few ids are used.
    """
    companions(folder)
    if (folder / _CONFIG_NAME).is_file():
        settings = limits.read_object(folder / _CONFIG_NAME, limits.CONFIG_BYTES, SourceError)
        for key, value in settings.items():  # transformers opens these; most are stale and name no file
            if key.endswith("_file") and isinstance(value, str) and _exists(folder / value):
                contained(folder / value, folder)
        _check_ids(settings.get("added_tokens_decoder"), folder / _CONFIG_NAME)
    if (folder / _NAME).is_file():
        state = limits.read_object(folder / _NAME, limits.TOKENIZER_BYTES, SourceError)
        model, added = state.get("model"), state.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            _check_ids(vocabulary.values(), folder / _NAME)
        if isinstance(added, list):
            _check_ids([token.get("id") for token in added if isinstance(token, dict)], folder / _NAME)


def _check_ids(ids: Any, path: Path) -> None:
    for number in ids or ():
        number = int(number) if isinstance(number, str) and re.fullmatch("[0-9]{1,18}", number) else number
        if isinstance(number, int | float) and not 0 <= number < limits.VOCABULARY:
            raise SourceError(f"{path}: has a token with id {number!r}, beyond {limits.VOCABULARY:,}; fetch it again")


def _exists(path: Path) -> bool:
    try:
        return path.is_symlink() or path.exists()
    except (OSError, ValueError):  # not a valid file name
        return False
