"""A checkpoint whose output head is tied to its embedding, read as one with a head of its own.

Loaders that hold an int8 embedding look rows up in it, and do not multiply by it (vllm 0.32,
CompressedTensorsEmbeddingWNA16Int.apply). So the head needs a copy of the matrix, which becomes int8 as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint
from quantize8.sources.wrapper import Wrapper

_TIED = "tie_word_embeddings"


class UntiedHead(Wrapper):
    """A checkpoint with a copy of its embedding as the output head.

    Args:
        inner: The checkpoint.
        embedding: Name of the embedding's tensor [V, K].
        head: Name of the head's tensor, which the checkpoint does not have.
    """

    def __init__(self, inner: Checkpoint, embedding: str, head: str) -> None:
        copy = replace(inner.tensors[embedding], name=head)
        super().__init__(inner, {**inner.tensors, head: copy})
        self.decoded |= {head} if embedding in inner.decoded else set()
        self._stored = {head: embedding}

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model, without tied embeddings."""
        config = {**super().config, _TIED: False}
        text = config.get("text_config")
        if isinstance(text, dict) and _TIED in text:
            config["text_config"] = {**text, _TIED: False}
        return config

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        return super().rows(self._stored.get(name, name), start, stop)

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """See `Checkpoint.int8_rows`."""
        return super().int8_rows(self._stored.get(name, name), start, stop)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        return self.inner.blocks(self._stored.get(name, name), block_bytes, multiple)
