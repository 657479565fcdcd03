"""The CPU benchmarks run on small shapes, and the documentation shows what they measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints, convert, cpu, linear_cpu, model_cpu, quality, rotation_cpu, training

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_spread_is_the_middle_of_the_runs():
    assert cpu.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert cpu.spread([1.0]) == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_linear_layers_are_timed_side_by_side():
    rows = linear_cpu.measure(64, 200, (1, 20), rounds=2)
    assert [row["M"] for row in rows] == [1, 20]
    assert all({"float32", "bfloat16", "quantize8, float32"} <= set(row["seconds"]) for row in rows)
    assert re.fullmatch(
        r"64 x 200, M 1: float32 [\d.]+ ms, quantize8, float32 .*: [\d.]+/[\d.]+.*", linear_cpu.line(rows[0])
    )


def test_a_forced_unit_without_avx512_holds_torch_to_avx2(monkeypatch):
    runs = []
    for name in cpu.AVX2_ONLY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu.os, "execve", lambda *given: runs.append(given))
    for unit in ("amx", "avx2"):
        monkeypatch.setattr("quantize8.kernels.cpu.chosen", lambda unit=unit: unit)
        cpu.hold_torch_to_unit("benchmarks.linear_cpu")
    ((_, command, environment),) = runs
    assert command[1:3] == ["-m", "benchmarks.linear_cpu"] and environment["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    for name, value in cpu.AVX2_ONLY.items():
        monkeypatch.setenv(name, value)
    cpu.hold_torch_to_unit("benchmarks.linear_cpu")
    assert len(runs) == 1


def test_a_slow_variant_is_called_less_often(monkeypatch):
    monkeypatch.setattr(cpu, "SLOW", 0.0)
    calls = {"slow": 0}
    cpu.interleaved({"slow": lambda _: calls.update(slow=calls["slow"] + 1)}, rounds=9, warm=2)
    assert calls["slow"] == cpu.MEDIAN_OF


def test_conversions_are_timed_as_processes(tmp_path, monkeypatch):
    checkpoints.make_llama(tmp_path / "source", hidden=64, inner=48, layers=2, vocabulary=64, shards=2)
    monkeypatch.setattr(convert, "has", lambda package: False)
    monkeypatch.setattr(convert, "DROP", tmp_path / "absent")
    rows = convert.measure(tmp_path / "source", tmp_path / "target", 1, None)
    assert [(row["what"], row["cache"]) for row in rows] == [("cp -r", "warm"), ("quantize8 convert", "warm")]
    assert rows[1]["peak_rss"] > 20e6 and not (tmp_path / "target").exists()


def test_a_model_is_timed_beside_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(model_cpu, "PROMPT", 20)
    monkeypatch.setattr(model_cpu, "STEPS", 2)
    checkpoints.make_llama(tmp_path / "source", hidden=64, inner=48, layers=1, vocabulary=64)
    monkeypatch.setattr(model_cpu, "has", lambda package: False)
    row = model_cpu.measure(tmp_path / "source", tmp_path / "work", rounds=1)
    assert row["tokens_per_s"]["quantize8"]["decode"]["median"] > 0
    assert re.fullmatch(r"\| source (\| \d+ / [\d.]+ ){3}(\| - ){2}\|", model_cpu.line(row))


def test_the_documented_tables_are_the_results():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    results = sorted(RESULTS.glob("linear-cpu-*.json"))
    assert {"linear-cpu-avx2", "linear-cpu-amx"} <= {path.stem for path in results}
    for path in results:
        unit = path.stem.removeprefix("linear-cpu-")
        for row in json.loads(path.read_text())["rows"]:
            line = next(each for each in page.splitlines() if each.startswith(f"| {unit}, {row['N']} x {row['K']} |"))
            assert linear_cpu.cell(row) == line.split("|")[2 + linear_cpu.TOKENS.index(row["M"])].strip()
    for row in json.loads((RESULTS / "convert.json").read_text())["rows"]:
        assert f"| {row['what']}, {row['cache']} | {row['seconds']['median']:.2f} s |" in page
    for path in RESULTS.glob("model-cpu-*.json"):
        unit = path.stem.removeprefix("model-cpu-")
        for row in json.loads(path.read_text())["rows"]:
            assert f"| {unit}, {model_cpu.line(row).removeprefix('| ')}" in page


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's
def test_training_is_measured_in_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 1)
    checkpoints.make_llama(tmp_path / "source", hidden=64, inner=48, layers=1, vocabulary=64)
    sequences = torch.arange((training.HELD_OUT + 2) * 20).view(-1, 20) % 64
    found = training.measure(tmp_path / "source", sequences, steps=2)
    assert set(found["int8_above_plain"]) == {"full", "lora", "merged"}
    assert found["within"] and found["losses"]["full, int8"]["last"] != found["losses"]["full, plain"]["last"]


def test_the_training_page_shows_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    losses, apart = found["losses"], found["int8_above_plain"]
    page = (ROOT / "docs" / "training.md").read_text()
    for how, title in (("full", "all weights"), ("lora", "LoRA")):
        plain, int8 = losses[f"{how}, plain"], losses[f"{how}, int8"]
        cells = [f"{plain[key]:.3f} / {int8[key]:.3f} ({apart[how][key]:+.2%})" for key in ("last", "held_out")]
        assert f"| {title}, plain / int8 | {cells[0]} | {cells[1]} |" in page
    merged = losses["lora, int8, merged"]["held_out"]
    assert f"| LoRA over int8, merged | | {merged:.3f} ({apart['merged']['held_out']:+.2%}) |" in page
    nearest = losses["lora, int8, merged to the nearest code"]["held_out"]
    assert f"(held out {losses['lora, int8']['held_out']:.3f} before merging, {nearest:.3f} after)" in page
    assert found["within"] and all(abs(value) <= 0.02 for how in ("full", "lora") for value in apart[how].values())


def test_quality_is_measured_of_every_kind_of_variant(tmp_path, monkeypatch):
    source = tmp_path / "source"
    checkpoints.make_llama(source, hidden=64, inner=128, layers=3, vocabulary=checkpoints.TOKENIZER_SIZE)
    checkpoints.add_tokenizer(source)
    for name, value in {"TOKENS": 48, "CONTEXT": 24, "ROUNDS": 1, "TIMED_TOKENS": 20}.items():
        monkeypatch.setattr(quality, name, value)
    names = ["bitsandbytes, threshold 6", "plain int8, no outliers", "static, 8 columns", "hybrid, auto"]
    names += ["rotated, gptq", "weights only, auto", "weights only, rotated, gptq"]
    chosen = [variant for variant in quality.variants() if variant.name in names]
    (tmp_path / "work").mkdir()
    work = quality.Work(str(source), tmp_path / "work")
    found = quality.scores(work, chosen)
    rows = found["rows"]
    quality.add_costs(work, chosen, rows)
    assert set(rows) == set(names) and found["tokens"] == 48
    assert all(row["scored"] == 46 and row["kl"] >= 0 for row in rows.values())
    assert rows["bitsandbytes, threshold 6"]["ratio"] == 1
    assert rows["plain int8, no outliers"]["cost"] == 1 and "cost" not in rows["weights only, auto"]
    assert rows["rotated, gptq"]["cost"] > 0
    assert rows["weights only, auto"]["median"] != rows["hybrid, auto"]["median"]  # the same artifact
    assert rows["static, 8 columns"]["bytes"] > rows["plain int8, no outliers"]["bytes"]
    assert quality.table(rows).count("\n") == 1 + len(names)


def test_rotation_is_timed_beside_plain_int8():
    row = rotation_cpu.measure(256, 20, rounds=2)
    assert set(row["seconds"]) == {"plain", "hybrid", "columns", "rotated"} and min(row["seconds"].values()) > 0
    assert re.fullmatch(
        r"\| random weights, K = N = 256, 20 tokens \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", rotation_cpu.line(row)
    )


def test_the_page_on_accuracy_shows_the_times_of_rotation():
    page = (ROOT / "docs" / "accuracy.md").read_text()
    units = [json.loads((RESULTS / f"rotation-cpu-{unit}.json").read_text())["rows"] for unit in ("avx512vnni", "avx2")]
    for ours, avx2 in zip(*units, strict=True):
        times, slower = ours["seconds"], avx2["seconds"]
        hybrid, columns, rotated = (times[name] / times["plain"] for name in ("hybrid", "columns", "rotated"))
        what = f"random weights, K = N = {ours['size']}, {ours['tokens']} token{'s' * (ours['tokens'] > 1)}"
        line = (
            f"| {what} | {rotated:.2f} ({slower['rotated'] / slower['plain']:.2f}) | {hybrid:.2f} / {columns:.2f} | | |"
        )
        assert line in page


@pytest.mark.parametrize("result", sorted(RESULTS.glob("quality-*.json")), ids=lambda path: path.stem)
def test_the_page_on_accuracy_shows_what_was_measured(result):
    page = (ROOT / "docs" / "accuracy.md").read_text()
    assert quality.table(json.loads(result.read_text())["rows"]) in page
