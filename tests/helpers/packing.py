"""Checkpoints of single quantized modules: written from integers, and read in every way."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from quantize8.sources.safetensors import SINGLE_NAME, SafetensorsCheckpoint


def opened(folder: Path, state: dict[str, torch.Tensor]) -> SafetensorsCheckpoint:
    """A checkpoint with exactly these tensors, written and opened."""
    folder.mkdir(parents=True, exist_ok=True)
    apart = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    save_file(apart, folder / SINGLE_NAME)
    return SafetensorsCheckpoint(folder, [SINGLE_NAME], {}, "tiny")


def in_words(values: np.ndarray, bits: int) -> torch.Tensor:
    """Pack numbers [R, C] of so many bits into int32 words, lowest bits first, one number at a time."""
    words = -(-values.shape[1] * bits // 32)
    rows = [sum(int(value) << bits * i for i, value in enumerate(row)) for row in values]
    return torch.from_numpy(np.stack([np.frombuffer(row.to_bytes(4 * words, "little"), np.int32) for row in rows]))


def rows_equal_the_whole(encoding) -> np.ndarray:
    """All rows of an encoding, after checking that reading them in other ways gives the same result."""
    rows = encoding.shape[0]
    whole = encoding.rows(0, rows)
    assert whole.dtype == np.float32 and whole.shape == encoding.shape and whole.flags["C_CONTIGUOUS"]
    for start, stop in [
        (0, 0),
        (0, 1),
        (1, 4),
        (rows // 3, rows - 1),
        (rows - 1, rows),
        (7, 23),
        (8, 16),
        (rows, rows),
    ]:
        start, stop = min(start, rows), min(stop, rows)
        assert np.array_equal(encoding.rows(start, stop), whole[start:stop], equal_nan=True), (start, stop)
    encoding.release()
    assert np.array_equal(encoding.rows(0, rows), whole, equal_nan=True)
    return whole
