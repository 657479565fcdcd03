"""A stack with the shapes of Llama-3-8B on random weights, with any kind of linear layer: for timing, not for text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor], Tensor]
HEAD = 128  # size of an attention head
QUERIES_PER_KEY = 4
VOCABULARY = 128256


class Stack:
    """Layers of attention and gated MLP, and an output head in float."""

    def __init__(
        self,
        linear_of: Callable[[Tensor], Linear],
        layers: int,
        hidden: int,
        inner: int,
        dtype: torch.dtype,
        device: torch.device,
        vocabulary: int = VOCABULARY,
    ) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5

        self.hidden, self.heads = hidden, hidden // HEAD
        self.keys = self.heads // QUERIES_PER_KEY
        attention = hidden + 2 * self.keys * HEAD  # queries, keys and values in one product
        shapes = {"qkv": (attention, hidden), "o": (hidden, hidden), "up": (2 * inner, hidden), "down": (hidden, inner)}
        self.layers = [{name: linear_of(weight(*shape)) for name, shape in shapes.items()} for _ in range(layers)]
        self.head = weight(vocabulary, hidden)
        self.dtype, self.device = dtype, device

    def decode(self, batch: int, past: int) -> Callable[[], Tensor]:
        """One decode step: one token per sequence, with `past` tokens in the key-value cache."""
        x = torch.randn(batch, 1, self.hidden, device=self.device, dtype=self.dtype)
        shape = (2, batch, self.keys, past, HEAD)
        caches = [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in self.layers]
        return lambda: self._forward(x, caches)

    def prefill(self, tokens: int) -> Callable[[], Tensor]:
        """One pass over a prompt."""
        x = torch.randn(1, tokens, self.hidden, device=self.device, dtype=self.dtype)
        return lambda: self._forward(x, None)

    def _forward(self, x: Tensor, caches: list[Tensor] | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer["o"](self._attention(layer["qkv"](_norm(x)), None if caches is None else caches[i]))
            gate, up = layer["up"](_norm(x)).chunk(2, dim=-1)
            x = x + layer["down"](functional.silu(gate) * up)
        return functional.linear(_norm(x)[:, -1], self.head)

    def _attention(self, qkv: Tensor, cache: Tensor | None) -> Tensor:
        batch, tokens, _ = qkv.shape
        split = qkv.view(batch, tokens, self.heads + 2 * self.keys, HEAD).transpose(1, 2)
        q, k, v = split.split([self.heads, self.keys, self.keys], dim=1)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return y.transpose(1, 2).reshape(batch, tokens, self.hidden)


def _norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:])
