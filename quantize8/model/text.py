"""Text for models: a file read, and a model opened together with the tokenizer that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize8.checkpoint import Checkpoint
from quantize8.errors import SourceError
from quantize8.model.loading import find_tokenizer, load, quiet
from quantize8.ops.choice import resolve
from quantize8.ops.reference import OutlierMode


def read_text(path: Path) -> str:
    """A text file in UTF-8; raises SourceError where it cannot be read, or holds nothing but blanks."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SourceError(f"{path}: cannot be read as text ({reason}); give a text file") from None
    if not content.strip():
        raise SourceError(f"{path}: is empty; give some text")
    return content


def open_for_text(
    model: str,
    device: str,
    mode: OutlierMode | None = None,
    revision: str | None = None,
    token: str | None = None,
    threshold: float | None = None,
) -> tuple[Any, Any]:
    """Load a model that can generate: (model, tokenizer); raises SourceError where it cannot, or has no tokenizer."""
    place = "cpu" if resolve(device) == "cpu" else "auto"
    loaded, tokenizer = load(model, place, mode=mode, threshold=threshold, revision=revision, token=token)
    if tokenizer is None:
        raise SourceError(f"{model}: has no tokenizer, so no text can be given to it")
    if not loaded.can_generate():
        raise SourceError(f"{model}: is a {type(loaded).__name__}, which does not generate text")
    return loaded, tokenizer


@contextmanager
def streamed_with_text(checkpoint: Checkpoint, text: str, tokens: int) -> Iterator[tuple[Any, Any]]:
    """A streamed model, and the first tokens of a text as ids [T], at most as many as the model takes.

    Raises SourceError where the model has no tokenizer, or is an encoder-decoder.
    """
    from quantize8.model.streaming import streamed

    with streamed(checkpoint) as model:
        with quiet():
            tokenizer = find_tokenizer(checkpoint)
        if tokenizer is None:
            raise SourceError(f"{checkpoint.name}: has no tokenizer, so no text can be given to it")
        if model.config.is_encoder_decoder:
            raise SourceError(f"{checkpoint.name}: is an encoder-decoder, to which one text cannot be given")
        limit = min(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
        with quiet():
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)["input_ids"][0]
        model.config.use_cache = False  # nothing follows that would read keys and values again
        yield model, ids
