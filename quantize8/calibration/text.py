"""Reading a text file, and opening a model together with the tokenizer that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize8.errors import SourceError
from quantize8.kernels.devices import resolve
from quantize8.kernels.reference import OutlierMode
from quantize8.runtime.loading import find_tokenizer, load, quiet
from quantize8.sources import Checkpoint


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file; SourceError if it cannot be read, or contains only white space."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SourceError(f"{path}: cannot be read as text ({reason}); use a UTF-8 text file") from None
    if not content.strip():
        raise SourceError(f"{path}: is empty; use a file that contains text")
    return content


def open_for_text(
    model: str,
    device: str,
    mode: OutlierMode | None = None,
    revision: str | None = None,
    token: str | None = None,
    threshold: float | None = None,
) -> tuple[Any, Any]:
    """Load a model that can generate text, and its tokenizer.

    Args:
        model: Folder, GGUF file or hub id.
        device: "auto", "cpu" or "cuda".
        mode: Outlier mode; None for the default of `load`.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.
        threshold: Outlier threshold; None for the stored one.

    Returns:
        The model and its tokenizer.

    Raises:
        SourceError: As in `load`; or the model has no tokenizer, or cannot generate text.
    """
    device_map = "cpu" if resolve(device) == "cpu" else "auto"
    loaded, tokenizer = load(model, device_map, mode=mode, threshold=threshold, revision=revision, token=token)
    if tokenizer is None:
        raise SourceError(f"{model}: has no tokenizer, which is needed to read text; add its tokenizer files")
    if not loaded.can_generate():
        raise SourceError(f"{model}: is a {type(loaded).__name__}, which does not generate text; use a language model")
    return loaded, tokenizer


@contextmanager
def streamed_with_text(checkpoint: Checkpoint, text: str, tokens: int) -> Iterator[tuple[Any, Any]]:
    """Open a checkpoint as a streamed model, together with the first tokens of a text.

    Args:
        checkpoint: The checkpoint.
        text: The text.
        tokens: Number of tokens to use; fewer if the model's context or the text is shorter.

    Yields:
        The streamed model, and the token ids int64 [T].

    Raises:
        SourceError: The model has no tokenizer, or is an encoder-decoder.
    """
    from quantize8.runtime.streaming import streamed

    with streamed(checkpoint) as model:
        yield model, first_ids(checkpoint, model, text, min(tokens, context_of(model) or tokens))


def context_of(model: Any) -> int | None:
    """The largest number of tokens that a model takes at once; None if its settings do not say it."""
    return getattr(model.config, "max_position_embeddings", None) or None


def first_ids(checkpoint: Checkpoint, model: Any, text: str, tokens: int) -> Any:
    """The ids int64 [T] of the first tokens of a text, for a model that makes one pass and so keeps no keys and values.

    Raises:
        SourceError: The model has no tokenizer, or is an encoder-decoder.
    """
    with quiet():
        tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        raise SourceError(f"{checkpoint.name}: has no tokenizer, which is needed to read text; add its files")
    if model.config.is_encoder_decoder:
        raise SourceError(
            f"{checkpoint.name}: is an encoder-decoder, which needs two texts; use a decoder or an encoder"
        )
    model.config.use_cache = False
    with quiet():
        return tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"][0]
