"""Predicted time, memory and disk: sums of what was measured, from a sample that leaves nothing behind."""

import json
import os
import shutil
import sys
import time

import pytest
import torch
from helpers.gguf_files import assemble, config_of, folder_of, write_tokenizer
from helpers.making import llama, mixtral, word_tokenizer
from safetensors.torch import load_file, save_file

from benchmarks import deepseek
from quantize8 import OutputError, SourceError, WeightError, cli, convert, plan
from quantize8.conversion import forecast as module
from quantize8.conversion.driver import Writer
from quantize8.conversion.forecast import forecast
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import make_plan
from quantize8.destinations.local import LocalFolder
from quantize8.kernels.cpu import CpuQuantizer


@pytest.fixture
def source(tmp_path):
    return str(word_tokenizer(llama(tmp_path / "source", shards=2)))


def told(plan, tmp_path, units=None, **options):
    return forecast(
        plan, units or plan.units, LocalFolder(tmp_path / "out"), [CpuQuantizer()], time.perf_counter(), **options
    )


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors", "gguf", "float32"])
def test_nothing_is_left_and_nothing_is_missing(format, source, tmp_path):
    if format == "gguf":
        source = str(folder_of(tmp_path / "gguf", config_of("llama"), tokenizer=False))
        write_tokenizer(tmp_path / "words")
        shutil.copytree(tmp_path / "words", source, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    found = plan(source, tmp_path / "out", format=format)
    assert sorted(tmp_path.rglob("*")) == before
    made = convert(source, tmp_path / "out", format=format)
    shares = found.forecast.shares
    assert found.dry_run and found.out == made.out and found.as_json()["files"] == made.as_json()["files"]
    assert [share.machines for share in shares] == [1, 8, 64]
    assert shares[0].written_bytes == found.forecast.disk == made.plan.output_bytes
    assert found.forecast.disk_rate > 0 and all(rate > 0 for rate in found.forecast.rates.values())
    assert 30e6 < found.forecast.memory < 64e9 and found.forecast.free > 0 and found.forecast.download == 0


def test_times_are_sums_of_what_was_measured(source, tmp_path, monkeypatch):
    """For each share: its bytes of each kind over the rates, or bytes written over the disk's rate, plus planning."""
    plan = make_plan(ConvertOptions(source, max_shard_size="6KB"))
    rates = {"F16 to I8, matrices": 7.0, "F16 to F16, matrices": 11.0, "F16 to F16, vectors": 3.0}
    monkeypatch.setattr(module, "_rate", lambda plan, names, *_: rates[module._kind(plan, names[0])])
    count = len(plan.units)
    for disk_rate in (1e9, 0.5):  # tensors take the time, or the disk does
        monkeypatch.setattr(module, "_disk_rate", lambda _, rate=disk_rate: rate)
        found = told(plan, tmp_path, machines=[1, 2, count, count + 5])
        assert found.rates == rates
        state = load_file(tmp_path / "source" / "model-00001-of-00002.safetensors")
        state |= load_file(tmp_path / "source" / "model-00002-of-00002.safetensors")
        reading, by_file = 0.0, {}
        for unit in plan.units:
            for name in unit.sources:
                int8 = name.endswith("proj.weight")
                kind = "I8, matrices" if int8 else "F16, matrices" if state[name].ndim > 1 else "F16, vectors"
                seconds = state[name].numel() * 2 / rates[f"F16 to {kind}"]
                by_file[unit.number] = by_file.get(unit.number, 0.0) + seconds
                reading += seconds
        writing = {unit.number: unit.nbytes / disk_rate for unit in plan.units}
        one, two, each, more = found.shares
        assert one.seconds == pytest.approx(max(reading, sum(writing.values())), rel=1e-3)
        assert each.seconds == pytest.approx(max(max(by_file[n], writing[n]) for n in by_file), rel=1e-3)
        assert (one.files, each.files, more.files) == (count, 1, 1) and each.seconds == pytest.approx(more.seconds)
        halves = [Part(number, 2).of(plan.units) for number in (1, 2)]
        sums = [max(sum(d[unit.number] for unit in half) for d in (by_file, writing)) for half in halves]
        assert two.seconds == pytest.approx(max(sums), rel=1e-3)
        part = told(plan, tmp_path, Part(2, count).of(plan.units), machines=[1]).shares
        assert part[0].seconds == pytest.approx(max(by_file[2], writing[2]), rel=1e-3) and part[0].files == 1


def test_planning_counts_once_on_one_machine_and_twice_on_several(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_rate", lambda *_: 1e12)
    monkeypatch.setattr(module, "_disk_rate", lambda _: 1e12)
    plan, began = make_plan(ConvertOptions(source)), time.perf_counter() - 1000
    one, many = forecast(plan, plan.units, LocalFolder(tmp_path / "out"), [CpuQuantizer()], began, [1, 8]).shares
    assert one.seconds == pytest.approx(1000, abs=1) and many.seconds == pytest.approx(2000, abs=1)


def test_rates_are_bytes_a_second_of_all_threads(source, tmp_path, monkeypatch):
    """A writer that takes 20 ms per tensor, whatever its size, and two threads."""
    plan = make_plan(ConvertOptions(source))
    names = [name for name in plan.quantized if "gate_proj" in name]
    monkeypatch.setattr(Writer, "write", lambda *_: time.sleep(0.02))
    one, two = (module._rate(plan, names, tmp_path, [None] * threads) for threads in (1, 2))
    nbytes = plan.checkpoint.tensors[names[0]].nbytes
    assert nbytes / 0.03 < one <= nbytes / 0.02 and 1.4 * nbytes / 0.02 < two <= 2 * nbytes / 0.02


def test_the_sample_is_from_everywhere_and_of_bounded_size(tmp_path, monkeypatch):
    deepseek.make(tmp_path / "source", layers=4, experts=8)
    plan = make_plan(ConvertOptions(str(tmp_path / "source"), format="compressed-tensors"))
    tensors = plan.checkpoint.tensors
    kinds, tried = module._kinds(plan, plan.units), module._to_try(plan, plan.units)
    assert kinds.keys() - tried.keys() == set()
    for kind, names in tried.items():
        sample = [name for (name,) in module._spread(plan, names, 2)]
        nbytes = sum(tensors[name].nbytes for name in sample)
        assert 1 <= len(sample) <= 2 * module._SAMPLE_TENSORS and nbytes < 6 * module._SAMPLE_BYTES
        largest = max(tensors[name].nbytes for name in sample)
        assert largest <= module._TENSOR_BYTES
        if len(sample) > 4:
            assert names.index(sample[-1]) > len(names) / 2, kind


def test_a_kind_of_large_tensors_alone_is_not_tried(source, tmp_path, monkeypatch):
    """It is assumed to be as fast as the fastest kind, unless all kinds are large."""
    monkeypatch.setattr(module, "_TENSOR_BYTES", 32 * 32 * 2)  # not the embedding, and not what is 48 wide
    monkeypatch.setattr(module, "_disk_rate", lambda _: 1e12)
    plan = make_plan(ConvertOptions(source))
    tensors = plan.checkpoint.tensors
    rates = {"F16 to I8, matrices": 7.0, "F16 to F16, vectors": 3.0}
    monkeypatch.setattr(module, "_rate", lambda plan, names, *_: rates[module._kind(plan, names[0])])
    found = told(plan, tmp_path, machines=[1])
    assert found.rates == rates
    vectors = sum(info.nbytes for info in tensors.values() if len(info.shape) == 1)
    others = sum(info.nbytes for info in tensors.values()) - vectors
    assert found.shares[0].seconds == pytest.approx(vectors / 3 + others / 7, rel=1e-3)
    monkeypatch.setattr(module, "_TENSOR_BYTES", 0)
    assert {len(names) for names in module._to_try(plan, plan.units).values()} == {1}


@pytest.mark.parametrize(
    "options", [{"scale": "mse"}, {"scheme": "w8a16", "format": "compressed-tensors"}, {"workers": 3}], ids=str
)
def test_options_that_take_time(options, source, tmp_path):
    found = plan(source, tmp_path / "out", **options).forecast
    assert found.threads == options.get("workers", min(8, os.cpu_count())) and found.shares[0].seconds > 0


def test_empty_tensors_take_no_time(tmp_path):
    def add(state):
        state["empty"], state["nothing.weight"] = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5)

    source = str(llama(tmp_path / "source", edit=add))
    found = plan(source, tmp_path / "out").forecast
    assert found.shares[0].seconds > 0 and not any("I64" in kind for kind in found.rates)


def test_sources_of_other_kinds(tmp_path):
    experts, gguf = mixtral(tmp_path / "mixtral"), tmp_path / "model.gguf"
    assemble(folder_of(tmp_path / "folder", config_of("llama")), gguf)
    convert(str(experts), tmp_path / "int8", format="compressed-tensors")
    for given in (experts, gguf, tmp_path / "int8"):
        found = plan(str(given), tmp_path / "out", format="bfloat16")
        assert found.forecast.shares[0].written_bytes == found.plan.output_bytes


def test_what_converting_would_refuse_is_refused(source, tmp_path):
    state = load_file(tmp_path / "source" / "model-00001-of-00002.safetensors")
    for tensor in state.values():
        tensor.view(-1)[-1] = torch.nan
    save_file(state, tmp_path / "source" / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightError, match="NaN"):
        plan(source, tmp_path / "out")
    with pytest.raises(SourceError):
        plan(str(tmp_path / "nothing"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(OutputError, match="is not an artifact"):
        plan(source, tmp_path / "full")
    added = {tmp_path / "full", tmp_path / "full" / "something"}
    assert {*tmp_path.rglob("*")} == {*before, *added}


def test_a_place_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: cannot be written \(Not a directory\); choose another folder"):
        plan(source, tmp_path / "file" / "out")


def test_a_disk_that_is_full(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); choose another folder"):
        plan(source, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_hub_model_is_planned_without_a_download(hub, tmp_path):
    large = sum(path.stat().st_size for path in hub.models["org/tiny"].glob("model*.safetensors"))
    found = plan("org/tiny", tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert found.forecast.download == found.plan.source_bytes and list(found.forecast.rates) == ["streamed"]
    assert plan("org/tiny", tmp_path / "out", stream=True).forecast.download == 0
    assert convert("org/tiny", tmp_path / "out", dry_run=True).forecast.download > 0
    made = convert("org/tiny", tmp_path / "out")
    assert found.as_json()["files"] == made.as_json()["files"]
    hub.sent = 0
    there = plan("org/tiny", tmp_path / "out").forecast  # it is in the cache now
    assert hub.sent == 0 < large and there.download == 0 and "streamed" not in there.rates
    hub.stop()
    assert plan("org/tiny", tmp_path / "out").forecast.download == 0


def test_only_the_beginnings_of_files_are_streamed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LEADING_BYTES", 1)
    read = []
    write = Writer.write
    monkeypatch.setattr(
        Writer, "write", lambda self, name, quantizer: read.append(name) or write(self, name, quantizer)
    )
    found = plan("org/tiny", tmp_path / "out", workers=2)
    first = {}
    for info in found.plan.checkpoint.tensors.values():
        first.setdefault(info.file, info)
    assert {*read} == {info.name for info in first.values()} and len(first) == 2


def test_a_hub_model_that_is_no_safetensors_is_fetched(hub, tmp_path):
    folder = hub.models["org/tiny"]
    state = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert plan("org/tiny", tmp_path / "out").forecast.download == 0


def test_the_command_and_a_dry_run_say_it(source, tmp_path, monkeypatch, capsys):
    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantize8", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        assert end.value.code == (1 if captured.err else 0)
        return captured.out + captured.err

    out = ("--out", tmp_path / "out")
    text = said("plan", source, *out, "--machines", "1,3", "--max-shard-size", "6KB", "--workers", "1")
    for fact in ("machines  files per machine", "with 1 thread(s)", "F16 to I8, matrices: ", "are free", "would write"):
        assert fact in text, fact
    shares = json.loads(said("plan", source, *out, "--machines", "1,3", "--json"))["forecast"]["shares"]
    assert [share["machines"] for share in shares] == [1, 3]
    assert len(json.loads(said("convert", source, *out, "--dry-run", "--json"))["forecast"]["shares"]) == 1
    assert "machines 1;2: not a list of numbers" in said("plan", source, *out, "--machines", "1;2")
    assert "machines: must be numbers of at least 1" in said("plan", source, *out, "--machines", "8,0")
    (tmp_path / "text").write_text("w1 w2 w3")
    planned = said("convert", source, *out, "--dry-run", "--calibrate", tmp_path / "text")
    assert "the time and memory of --calibrate" in planned and not (tmp_path / "out").exists()


def test_times_are_written_in_their_unit():
    from quantize8.reports.tables import duration

    assert [duration(value) for value in (0.04, 119.9, 120, 7199, 7200, 90000)] == [
        "0.0 s", "119.9 s", "2.0 min", "120.0 min", "2.0 h", "25.0 h",
    ]  # fmt: skip
