"""Running models in float64, although their code asks for float32 in places.

Results in floating point depend on the order of sums, and so on the processor and the number of threads. Codes that are
chosen from activations must not. In float64 these differences are so small, about 1e-15 of a value, that they vanish
when a value is rounded to bfloat16, unless it lies that close to the middle of two bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@contextmanager
def in_double() -> Iterator[None]:
    """Within the context, tensors are made in float64 by default, and code that asks for float32 gets float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def as_written() -> Iterator[None]:
    """Within the context, float32 means float32, also inside of `in_double`."""
    _Double.paused += 1
    try:
        yield
    finally:
        _Double.paused -= 1


class _Double(TorchFunctionMode):
    paused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = tuple(_wider(value) for value in args)
            kwargs = {name: _wider(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
