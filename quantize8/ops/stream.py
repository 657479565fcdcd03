"""Weights through a GPU, block after block: while it works on one, the next is read and the last is written.

Two slots, each with memory on both sides. Host memory is pinned, so that copies run beside the kernels; each slot has
an event that says when its results are back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quantize8.ops import gpu
from quantize8.ops.reference import Array, ColumnStats

BLOCK_BYTES = 8 * 2**20  # of weight at a time: its copy takes many times as long as starting one
_SLOTS = 2
_DTYPES = {
    np.dtype(np.float16): (torch.float16, np.int16, torch.int16),
    np.dtype(ml_dtypes.bfloat16): (torch.bfloat16, np.int16, torch.int16),
    np.dtype(np.float32): (torch.float32, np.float32, torch.float32),
}


class GpuQuantizer:
    """Quantizes weights on one GPU; for one thread at a time."""

    block_bytes = BLOCK_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(device) for _ in range(_SLOTS)]

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Of each block [n, K] of a weight's rows, n a multiple of 64 but in the last: (block, codes, absmax).

        Codes and absmax hold until the next one is asked for. After the last, `stats` are the whole weight's.
        """
        found: gpu.DeviceStats | None = None
        under_way: list[tuple[_Slot, Array]] = []
        for number, block in enumerate(blocks):
            slot = self._slots[number % _SLOTS]
            with self._on_stream():
                if found is None:
                    found = gpu.DeviceStats.empty(block.shape[1], self._device)
                slot.start(block, found)
            under_way.append((slot, block))
            if len(under_way) == _SLOTS:
                yield _finished(*under_way.pop(0))
        for each in under_way:
            yield _finished(*each)
        if found is not None:
            with self._on_stream():
                found.read_into(stats)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Slot:
    """Memory for one block on its way, and for its results on their way back."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._event = torch.cuda.Event() if self._pinned else None
        self._buffers: dict[str, Tensor] = {}
        self._results: tuple[Tensor, Tensor] | None = None

    def start(self, block: Array, stats: gpu.DeviceStats) -> None:
        dtype, bits, bits_dtype = _DTYPES[block.dtype]
        source = self._host("weight", bits_dtype, block.shape)
        np.copyto(source.numpy(), block.view(bits))
        weight = source.to(self._device, non_blocking=True).view(dtype)
        codes, absmax = gpu.quantize_rowwise(weight, stats)
        self._results = (
            self._host("codes", torch.int8, codes.shape).copy_(codes, non_blocking=True),
            self._host("absmax", torch.float32, absmax.shape).copy_(absmax, non_blocking=True),
        )
        if self._event is not None:
            self._event.record()

    def finish(self) -> tuple[Array, Array]:
        assert self._results is not None
        if self._event is not None:
            self._event.synchronize()
        codes, absmax = self._results
        return codes.numpy(), absmax.numpy().copy()  # callers keep the scales of a weight until its end

    def _host(self, name: str, dtype: torch.dtype, shape: Any) -> Tensor:
        """Room of a shape in a buffer that is kept, as pinning memory is slow."""
        count = int(np.prod(shape))
        kept = self._buffers.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < count:
            kept = self._buffers[name] = torch.empty(count, dtype=dtype, pin_memory=self._pinned)
        return kept[:count].view(*shape)


def _finished(slot: _Slot, block: Array) -> tuple[Array, Array, Array]:
    return (block, *slot.finish())
