"""The GPU script, rehearsed on the emulator with tiny shapes, so that it works when a GPU is available."""

import json
import sys

import pytest
import torch
from cuda_on_cpu.emulation import EmulatedGpu

from benchmarks import checkpoints, gpu_checks, gpu_speed, timing
from benchmarks import gpu as script
from quantize8.kernels import gpu

SIZES = {
    "ceilings": {"size": 64, "copy_bytes": 4096},
    "quantize": {"shapes": ((70, 64),)},
    "linear": {"shapes": ((48, 64),), "tokens": (1, 20)},
    "stack": {"layers": 1, "hidden": 512, "inner": 256},
}


@pytest.fixture
def rehearsal(monkeypatch) -> EmulatedGpu:
    emulated = EmulatedGpu((9, 0), order=2)
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)

    def once(calls) -> float:
        for call in calls[:1]:
            result = call()
            for each in result if isinstance(result, tuple) else (result,):
                assert not each.is_floating_point() or each.isfinite().all()
        return 1e-3

    for name in ("graph_time", "eager_time"):
        monkeypatch.setattr(gpu_speed, name, once)
    monkeypatch.setattr(gpu_speed, "_bitsandbytes", lambda: None)
    monkeypatch.setattr(script, "_sanitize", lambda left: [{"tool": "none", "result": "rehearsal"}])
    monkeypatch.setattr(gpu_speed, "Stack", lambda *a: gpu_speed_stack(*a, vocabulary=32))
    return emulated


gpu_speed_stack = gpu_speed.Stack


@pytest.fixture
def results(tmp_path) -> timing.Results:
    return timing.Results(tmp_path / "results" / "rehearsal.json", {"gpu": "emulated"})


def test_all_parts_run_and_are_written(rehearsal, results, monkeypatch):
    script.run(torch.device("cpu"), results, lambda: 100.0, SIZES)
    written = json.loads(results.path.read_text())
    assert written["finished"] is True and not [name for name in written if name.endswith("_failed")], written
    assert [check for check in written["checks"] if not check["ok"]] == []
    assert len(written["quantize"]) == 3 and len(written["stack"]) == 4
    assert {(row["M"], row["outliers"]) for row in written["linear"]} == {(1, 0), (20, 0), (20, 6), (20, 64)}
    text = "\n".join(script.tables(written))
    assert "float16 48 x 64, 64 outliers: 20: 1000.0, 1.00" in text and "BAD" not in text


def test_a_failing_part_does_not_cost_the_others(rehearsal, results, monkeypatch):
    monkeypatch.setattr(gpu_speed, "stack", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(gpu_checks, "check_dequantize", lambda *a: "planted")
    script.run(torch.device("cpu"), results, lambda: 100.0, SIZES)
    assert results.values["stack_failed"].startswith("ZeroDivisionError") and results.values["linear"]
    assert "BAD dequantize: planted" in "\n".join(script.tables(results.values))


def test_what_was_measured_is_kept_when_time_runs_out(rehearsal, results):
    script.run(torch.device("cpu"), results, lambda: 0.0, SIZES)
    written = json.loads(results.path.read_text())
    assert written["cut_short_in"] == "checks" and len(written["checks"]) == 1 and written["finished"] is False
    assert script.tables(written)


def test_without_a_gpu_nothing_is_claimed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert script.main() == 1 and "nothing was run" in capsys.readouterr().err


def test_artifacts_are_compared_byte_for_byte(monkeypatch):
    make, convert = checkpoints.make_llama, checkpoints.convert
    monkeypatch.setattr(checkpoints, "make_llama", lambda folder: make(folder, hidden=64, inner=48, layers=2, shards=2))
    monkeypatch.setattr(checkpoints, "convert", lambda source, out, device: convert(source, out, device="cpu"))
    assert checkpoints.converts_alike() is None

    def differing(source, out, device) -> None:
        convert(source, out, device="cpu", threshold=6.0 if device == "cpu" else 5.0)

    monkeypatch.setattr(checkpoints, "convert", differing)
    assert "config.json" in checkpoints.converts_alike()
