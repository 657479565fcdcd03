"""A KV cache in preallocated buffers, so that a decode step copies the keys and values of one token only.

transformers' `DynamicCache` concatenates: every step copies the keys and values of all earlier tokens. Its
`StaticCache` does not, but it attends to the whole buffer under a mask, which on a CPU costs more than the copies.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

GROWTH = 2  # a full buffer is replaced with one for this many times the tokens


def preallocated_cache(model: Any, length: int) -> DynamicCache | None:
    """A KV cache for one model, with buffers for `length` tokens; it grows if there are more.

    Cache layers that are not plain ones (sliding windows, linear attention) stay transformers' own.

    Args:
        model: A transformers model.
        length: Number of tokens of the prompt and its continuation.

    Returns:
        The cache; None for a model for which `generate` would not make a plain `DynamicCache`.
    """
    if not _generates_with_dynamic_cache(model):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are views of the filled part of a buffer.

    The operations of `DynamicLayer` on them (crop, reorder, repeat) remain correct: if a tensor is not the view that
    the last update made, the next update copies it to a new buffer.

    Args:
        length: Number of tokens that the first buffers have space for.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._parts = (_Part(length), _Part(length))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; returns all keys and all values so far, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._parts
        self.keys = keys.append(self.keys, key_states)
        self.values = values.append(self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop the keys and values, and their buffers."""
        super().reset()
        self._parts = (_Part(self.length), _Part(self.length))


class _Part:
    """The buffer of the keys or of the values, and the view of its filled part."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.buffer: Tensor | None = None
        self.view: Tensor | None = None

    def append(self, before: Tensor, states: Tensor) -> Tensor:
        """Append states [B, H, T, D] to those of `before`; returns all of them, a view of the buffer."""
        start = before.shape[-2] if before.numel() else 0
        end = start + states.shape[-2]
        if self.buffer is None or before is not self.view or end > self.buffer.shape[-2]:
            tokens = self.length if end <= self.length else GROWTH * end
            self.buffer = states.new_empty(*states.shape[:-2], tokens, states.shape[-1])
            if start:
                self.buffer.narrow(-2, 0, start).copy_(before)
        self.buffer.narrow(-2, start, states.shape[-2]).copy_(states)
        self.view = self.buffer.narrow(-2, 0, end)
        return self.view


def _generates_with_dynamic_cache(model: Any) -> bool:
    settings = model.generation_config
    if model.config.is_encoder_decoder or settings.cache_implementation is not None or settings.use_cache is False:
        return False
    its_own = type(model)._prepare_cache_for_generation is not GenerationMixin._prepare_cache_for_generation
    named = "past_key_values" in inspect.signature(model.forward).parameters
    return named and not its_own and model._supports_default_dynamic_cache()
