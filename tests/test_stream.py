"""Weights streamed through an (emulated) GPU: the artifact equals that of the CPU, byte for byte."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_on_cpu.emulation import EmulatedGpu
from helpers.making import llama

from quantize8 import WeightError, convert
from quantize8.kernels import gpu, stream
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.kernels.reference import ColumnStats
from quantize8.kernels.stream import GpuQuantizer


@pytest.fixture
def emulated(monkeypatch) -> EmulatedGpu:
    """An emulated GPU for every part of the converter: tensors of "cuda:0" are in main memory."""
    found = EmulatedGpu(order=2)
    monkeypatch.setattr(gpu, "gpu_of", lambda index: found)
    monkeypatch.setattr("quantize8.conversion.driver.resolve", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(stream, "GpuQuantizer", lambda device: GpuQuantizer(torch.device("cpu")))
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_artifacts_of_gpu_and_cpu_are_the_same(tmp_path, emulated, monkeypatch, dtype):
    source = llama(tmp_path / "source", hidden=160, dtype=dtype)
    monkeypatch.setattr(GpuQuantizer, "block_bytes", 1)  # 64 rows at a time, so that both slots come round
    convert(str(source), tmp_path / "gpu", device="cuda", recipe="int8-all")
    assert "add_tiles" in emulated.launched
    monkeypatch.undo()
    convert(str(source), tmp_path / "cpu", device="cpu", recipe="int8-all")
    assert digests(tmp_path / "gpu") == digests(tmp_path / "cpu")


@pytest.mark.parametrize("rows", [1, 64, 65, 200, 449])
def test_blocks_come_back_in_order_with_their_own_results(emulated, rows):
    weight = np.random.default_rng(rows).normal(size=(rows, 40)).astype(np.float32)
    blocks = [weight[start : start + 64] for start in range(0, rows, 64)]
    theirs, ours = ColumnStats.empty(40), ColumnStats.empty(40)
    expected = [(block, codes.copy(), absmax) for block, codes, absmax in CpuQuantizer().quantize(iter(blocks), theirs)]
    quantizer = GpuQuantizer(torch.device("cpu"))
    for _ in range(2):  # buffers are used again
        found = [(b, c.copy(), a) for b, c, a in quantizer.quantize(iter(blocks), ours)]
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            for a, b in zip(mine, other, strict=True):
                np.testing.assert_array_equal(a, b)
    for name in vars(theirs):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_no_rows_at_all(emulated):
    stats = ColumnStats.empty(8)
    assert list(GpuQuantizer(torch.device("cpu")).quantize(iter([]), stats)) == [] and stats.rows == 0


def test_a_bad_weight_is_named_as_the_cpu_names_it(tmp_path, emulated):
    def edit(state):
        state["model.layers.0.self_attn.q_proj.weight"][70, 3] = torch.nan

    source = llama(tmp_path / "source", hidden=160, edit=edit)
    messages = []
    for device in ("cuda", "cpu"):
        with pytest.raises(WeightError) as raised:
            convert(str(source), tmp_path / "out", device=device)
        messages.append(str(raised.value))
        assert not (tmp_path / "out").exists()
    assert messages[0] == messages[1] and "q_proj.weight row 70" in messages[0]
