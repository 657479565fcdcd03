"""Int8 layers that compute differently within a `with` block: the decode path at any length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize8 import Int8Linear
from quantize8.kernels.reference import DECODE_TOKENS


@contextlib.contextmanager
def decode(model: Any, only: str = "") -> Iterator[None]:
    """Use the decode path for any number of tokens, in layers whose names contain `only`."""

    def wrapped(layer: Int8Linear, x: Tensor) -> Tensor:
        few = x.reshape(-1, layer.in_features).split(DECODE_TOKENS)
        return torch.cat([Int8Linear.forward(layer, part) for part in few]).view(*x.shape[:-1], -1)

    with _forwards(model, wrapped, only):
        yield


def int8_layers(model: Any) -> dict[str, nn.Module]:
    """Int8 layers by name: ours and bitsandbytes'."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.int8
    }


@contextlib.contextmanager
def _forwards(model: Any, wrapped: Callable[[Any, Tensor], Tensor], only: str = "") -> Iterator[None]:
    layers = [layer for name, layer in int8_layers(model).items() if only in name]
    for layer in layers:
        layer.forward = partial(wrapped, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
