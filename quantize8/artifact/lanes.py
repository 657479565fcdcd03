"""The order in which threads write tensors: each by itself, or all of a file by one thread, where it is a stream."""

from __future__ import annotations

from threading import Event

from quantize8.artifact.manifest import TensorRecord
from quantize8.artifact.writer import WeightQuantizer, Writer
from quantize8.checkpoint import Checkpoint, TensorInfo

Lane = list[TensorInfo]  # tensors that one thread writes, in this order


def lanes(checkpoint: Checkpoint) -> list[Lane]:
    """All tensors of a checkpoint, in the order of storage."""
    found: dict[str, Lane] = {}
    for info in checkpoint.tensors.values():
        found.setdefault(info.file if checkpoint.one_reader_a_file else info.name, []).append(info)
    return list(found.values())


def write_lane(
    writer: Writer, checkpoint: Checkpoint, lane: Lane, quantizer: WeightQuantizer, stopped: Event
) -> dict[str, TensorRecord]:
    """Write the tensors of a lane until `stopped`, and refuse a file that turns out not to be what was promised."""
    records: dict[str, TensorRecord] = {}
    for info in lane:
        if stopped.is_set():
            return records
        records |= writer.write(info, quantizer)
    if checkpoint.one_reader_a_file:
        checkpoint.confirm(lane[0].file)
    return records
