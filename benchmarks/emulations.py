"""Int8 layers that compute differently within a `with` block: more exact elements, or the decode path at any length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantize8 import Int8Linear
from quantize8.kernels.reference import DECODE_TOKENS


@contextlib.contextmanager
def exact(model: Any, top: int) -> Iterator[None]:
    """The `top` largest elements of each token are exact, besides the stored columns (emulated)."""

    def wrapped(layer: Int8Linear, x: Tensor) -> Tensor:
        known = torch.zeros(layer.in_features, dtype=torch.bool)
        if layer.mode == "static" and layer.outlier_columns is not None:
            known[layer.outlier_columns.long()] = True
        largest = x.masked_fill(known, 0).abs().topk(top, -1).indices
        rest = x.scatter(-1, largest, 0)
        return Int8Linear.forward(layer, rest) + functional.linear(x - rest, _dense(layer))

    with _forwards(model, wrapped):
        yield


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


def _dense(layer: Int8Linear) -> Tensor:
    weight = layer.dequantize()
    if layer.outlier_columns is not None and layer.outlier_weight is not None:
        weight[:, layer.outlier_columns[: layer.outlier_weight.shape[1]].long()] = layer.outlier_weight.float()
    return weight
