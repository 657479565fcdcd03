"""A checkpoint whose output head is tied to its embedding, read as one with a head of its own.

Loaders that hold an int8 embedding look rows up in it, and do not multiply by it (vllm 0.32,
CompressedTensorsEmbeddingWNA16Int.apply). So the head needs a copy of the matrix, which becomes int8 as well.
"""

from __future__ import annotations

from typing import Any

from quantize8.sources.base import Checkpoint
from quantize8.sources.wrapper import Renamed

_TIED = "tie_word_embeddings"


class UntiedHead(Renamed):
    """A checkpoint with a copy of its embedding as the output head.

    Args:
        inner: The checkpoint.
        embedding: Name of the embedding's tensor [V, K].
        head: Name of the head's tensor, which the checkpoint does not have.
    """

    def __init__(self, inner: Checkpoint, embedding: str, head: str) -> None:
        super().__init__(inner, {head: embedding})
        self.tensors = {**inner.tensors, head: self.tensors[head]}
        self.decoded |= inner.decoded

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model, without tied embeddings."""
        config = {**super().config, _TIED: False}
        text = config.get("text_config")
        if isinstance(text, dict) and _TIED in text:
            config["text_config"] = {**text, _TIED: False}
        return config
