"""Quantization on a GPU, block by block: while the GPU works on one block, the next is read and the last is written.

There are two slots, each with memory on the host and on the GPU. Host memory is pinned, so that copies overlap with
kernels. Each slot has an event that is recorded after the copy of its results back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quantize8.kernels import gpu
from quantize8.kernels.reference import Array, ColumnStats

BLOCK_BYTES = 8 * 2**20  # of weight at a time, so that copying takes far longer than starting a copy
_SLOTS = 2
_DTYPES = {
    np.dtype(np.float16): (torch.float16, np.int16, torch.int16),
    np.dtype(ml_dtypes.bfloat16): (torch.bfloat16, np.int16, torch.int16),
    np.dtype(np.float32): (torch.float32, np.float32, torch.float32),
}


class GpuQuantizer:
    """Quantizes weights on one GPU. Only one thread at a time may use an instance."""

    block_bytes = BLOCK_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(device) for _ in range(_SLOTS)]

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Quantize a weight that is given in blocks of its rows.

        Args:
            blocks: float16, bfloat16 or float32 [n, K]; n is a multiple of 64 in all blocks but the last.
            stats: Gets the column statistics of the whole weight when the last block has been yielded.

        Yields:
            (block, codes int8 [n, K], absmax float32 [n]) for each block, in order. The codes are valid until the next
            block is requested.
        """
        device_stats: gpu.DeviceStats | None = None
        in_flight: list[tuple[_Slot, Array]] = []
        for number, block in enumerate(blocks):
            slot = self._slots[number % _SLOTS]
            with self._on_stream():
                if device_stats is None:
                    device_stats = gpu.DeviceStats.empty(block.shape[1], self._device)
                slot.start(block, device_stats)
            in_flight.append((slot, block))
            if len(in_flight) == _SLOTS:
                yield _finished(*in_flight.pop(0))
        for slot, block in in_flight:
            yield _finished(slot, block)
        if device_stats is not None:
            with self._on_stream():
                device_stats.read_into(stats)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Slot:
    """Host and device memory for one block and its results."""

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
        return codes.numpy(), absmax.numpy().copy()  # callers hold the scales of all blocks until the weight's end

    def _host(self, name: str, dtype: torch.dtype, shape: Any) -> Tensor:
        """A host tensor of this shape in a buffer that is reused, as pinning memory is slow."""
        count = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < count:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype, pin_memory=self._pinned)
        return buffer[:count].view(*shape)


def _finished(slot: _Slot, block: Array) -> tuple[Array, Array, Array]:
    return (block, *slot.finish())
