"""Conversions that stop, through any error or kill -9: the same command resumes, and the artifact is the same."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.artifacts import digests, opens
from helpers.gguf_files import assemble, config_of, folder_of, write_tokenizer
from helpers.making import llama, word_tokenizer
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import make_llama
from benchmarks.faults import SHARD_SIZE, begin, kill_and_resume
from quantize8 import OutputError, SourceError, WeightError, convert, verify
from quantize8.conversion import driver
from quantize8.conversion.driver import Writer
from quantize8.destinations.local import partial_of
from quantize8.kernels.cpu import CpuQuantizer

TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8


class Killed(Exception):
    """The error that kills a worker thread."""


@pytest.fixture
def stop_after(monkeypatch):
    """Let conversions write so many source tensors and then fail; None: all of them."""

    def set_to(count: int | None, error: BaseException | None = None) -> None:
        done = iter(range(10**6 if count is None else count))

        def write(self, info, quantizer):
            if next(done, None) is None:
                raise error or Killed
            return original(self, info, quantizer)

        monkeypatch.setattr(Writer, "write", write)

    original = Writer.write
    return set_to


def text_in(folder: Path) -> Path:
    (folder / "text").write_text(TEXT)
    return folder / "text"


@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "10KB", "scale": "mse"},
        {"format": "compressed-tensors", "scheme": "w8a16", "max_shard_size": "20KB"},
        {"format": "bfloat16"},
        {"calibrate": "text", "max_shard_size": "10KB", "outlier_columns": 3},
        {"calibrate": "text", "smooth": 0.5, "scale": "mse"},
    ],
    ids=str,
)
def test_the_artifact_is_the_one_of_a_run_without_a_stop(options, count, tmp_path, stop_after):
    source = word_tokenizer(llama(tmp_path / "source", shards=2))
    options = options | ({"calibrate": text_in(tmp_path)} if "calibrate" in options else {})
    convert(str(source), tmp_path / "whole", **options)
    stop_after(count)
    with pytest.raises(Killed):
        convert(str(source), tmp_path / "out", workers=1, **options)
    assert not (tmp_path / "out").exists()
    stop_after(None)
    result = convert(str(source), tmp_path / "out", **options)
    assert result.resumed == count and result.resumed_bytes > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()


def test_gguf_goes_on_too(tmp_path, stop_after):
    assemble(folder_of(tmp_path / "folder", config_of("qwen3")), tmp_path / "model.gguf")
    source = str(tmp_path / "model.gguf")
    convert(source, tmp_path / "whole", format="gguf")
    stop_after(5)
    with pytest.raises(Killed):
        convert(source, tmp_path / "out", format="gguf", workers=1)
    stop_after(None)
    assert convert(source, tmp_path / "out", format="gguf").resumed == 5
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_kill_at_any_moment(tmp_path):
    """Four moments here; benchmarks/faults.py tries as many as requested."""
    make_llama(tmp_path / "source", hidden=512, inner=1408, layers=8, vocabulary=512, shards=2)
    convert(str(tmp_path / "source"), tmp_path / "whole", max_shard_size=SHARD_SIZE)
    found = kill_and_resume(tmp_path / "source", tmp_path / "whole", tmp_path / "out", [0.02, 0.06, 0.1])
    assert sum(found[state] for state in ("absent", "resumable", "complete"))
    shutil.rmtree(tmp_path / "out")
    kill_and_resume(tmp_path / "source", tmp_path / "whole", tmp_path / "out", [0.04])


def test_a_partial_folder_is_no_model(tmp_path, stop_after):
    source = word_tokenizer(llama(tmp_path / "source"))
    stop_after(20)
    with pytest.raises(Killed):
        convert(str(source), tmp_path / "out", max_shard_size="10KB", workers=1)
    assert not opens(tmp_path / "out") and not opens(partial_of(tmp_path / "out"))


@pytest.fixture
def stopped(tmp_path, stop_after):
    """A source, the output of a conversion killed after 12 tensors, and the digests of a complete conversion."""
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    convert(str(source), tmp_path / "whole")
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out, workers=1)
    stop_after(None)
    return source, out, digests(tmp_path / "whole")


def test_bytes_that_are_not_those_of_the_journal_are_written_again(stopped):
    """As after a power failure: the journal is on disk, and a block of the weights is not."""
    source, out, whole = stopped
    unfinished = partial_of(out) / "files" / "model.safetensors.unfinished"
    data = bytearray(unfinished.read_bytes().rstrip(b"\0"))
    data[-100:] = bytes(100)  # of the last codes that were written
    unfinished.write_bytes(data)
    assert 0 < convert(str(source), out).resumed < 12
    assert digests(out) == whole


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:700] + b"\0" * 90 + data[790:], lambda _: b""]
)
def test_a_torn_journal_counts_as_far_as_it_is_whole(damage, stopped):
    source, out, whole = stopped
    (journal,) = partial_of(out).glob("*.journal")
    journal.write_bytes(damage(journal.read_bytes()))
    assert convert(str(source), out).resumed < 12
    assert digests(out) == whole


def test_weights_that_vanished_leave_a_journal_that_counts_for_nothing(tmp_path, stop_after):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out)
    stop_after(None)
    shutil.rmtree(partial_of(out) / "files")
    assert convert(str(source), out).resumed == 0 and verify(out)


CHANGES = [
    ({"threshold": 5.0}, "another recipe"),
    ({"recipe": "int8-all"}, "another recipe"),
    ({"scale": "mse"}, "scale absmax"),
    ({"format": "compressed-tensors"}, "another format"),
    ({"max_shard_size": "10KB"}, "another layout of files"),
    ({"calibrate": "text"}, "another calibration"),
]


@pytest.mark.parametrize(("options", "message"), CHANGES, ids=str)
def test_other_decisions_are_named_and_nothing_is_touched(options, message, tmp_path, stop_after):
    source, out = word_tokenizer(llama(tmp_path / "source")), tmp_path / "out"
    options = options | ({"calibrate": text_in(tmp_path)} if "calibrate" in options else {})
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out)
    stop_after(None)
    before = digests(tmp_path)
    with pytest.raises(OutputError, match=f"holds an unfinished conversion with {message}.*--overwrite") as caught:
        convert(str(source), out, **options)
    assert "\n" not in str(caught.value) and digests(tmp_path) == before
    assert convert(str(source), out, overwrite=True, **options).resumed == 0
    convert(str(source), tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole") and not partial_of(out).exists()


UNFIT = [  # a --format, and what is advised where it cannot hold a number
    ("float16", {"format": "float32"}),
    ("gguf", {"format": "float32"}),
    ("bitsandbytes", {"recipe": "mine.toml"}),
]


@pytest.mark.parametrize(("format", "advised"), UNFIT, ids=[format for format, _ in UNFIT])
def test_the_advice_on_a_number_that_a_format_cannot_hold_works_as_it_is(format, advised, tmp_path, monkeypatch):
    source = folder_of(tmp_path / "source", config_of("llama"), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", source, dirs_exist_ok=True)
    state = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    state[f"{name}.weight"][7, 3] = 1e9
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(f"threshold = 6.0\nskip = [{name!r}]\n")
    with pytest.raises(WeightError, match=r"up_proj.weight row 7 holds .*, with --overwrite for the same --out$"):
        convert("source", "out", format=format, workers=1)
    assert partial_of(tmp_path / "out").exists()  # some tensors are finished
    convert("source", "out", overwrite=True, **advised)
    convert("source", "none finished", overwrite=True, **advised)
    assert verify("out") and digests(tmp_path / "out") == digests(tmp_path / "none finished")
    assert not partial_of(tmp_path / "out").exists()


def test_another_version_does_not_go_on(tmp_path, stop_after, monkeypatch):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out)
    monkeypatch.setattr("quantize8.conversion.plan.__version__", "99")
    with pytest.raises(OutputError, match=r"with version 0\.1"):
        convert(str(source), out)


def test_overwrite_goes_on_where_the_decisions_are_the_same(tmp_path, stop_after):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    convert(str(source), out, recipe="int8")
    first = digests(out)
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out, overwrite=True)
    assert digests(out) == first
    stop_after(None)
    assert convert(str(source), out, overwrite=True).resumed == 12
    assert digests(out) != first and verify(out)


def spoil(source: Path, value: float) -> None:
    """Change a number in the last file of a checkpoint in place."""
    path = sorted(source.glob("*.safetensors"))[-1]
    state = load_file(path)
    state["model.norm.weight"][3] = value
    save_file(state, path, metadata={"format": "pt"})


def test_a_source_file_with_another_time_is_converted_again_and_no_other(tmp_path, stop_after):
    source, out = llama(tmp_path / "source", shards=2), tmp_path / "out"
    convert(str(source), tmp_path / "before")
    spoil(source, float("nan"))
    with pytest.raises(WeightError, match="norm"):
        convert(str(source), out, workers=1)
    spoil(source, 3.0)
    result = convert(str(source), out)
    first = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert result.resumed == sum(file.startswith("model-00001") for file in first)
    convert(str(source), tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole") != digests(tmp_path / "before")


@pytest.mark.parametrize("change", ["size", "head", "config", "gone"])
def test_another_source_is_named(change, tmp_path, stop_after):
    source, out = llama(tmp_path / "source", shards=2), tmp_path / "out"
    stop_after(12)
    with pytest.raises(Killed):
        convert(str(source), out)
    stop_after(None)
    path = sorted(source.glob("*.safetensors"))[-1]
    state = load_file(path)
    if change == "config":
        (source / "config.json").write_text((source / "config.json").read_text().replace("128", "129"))
    elif change == "gone":
        path.rename(tmp_path / "apart")
    else:
        state["model.norm.weight"] = state["model.norm.weight"].to(
            torch.float32 if change == "size" else torch.bfloat16
        )
        save_file(state, path, metadata={"format": "pt"})
    error, message = (
        (SourceError, "missing") if change == "gone" else (OutputError, "unfinished conversion with a source")
    )
    with pytest.raises(error, match=message):
        convert(str(source), out)
    if change == "gone":
        (tmp_path / "apart").rename(path)
        assert convert(str(source), out).resumed == 12


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    source, out = llama(tmp_path / "source", shards=2), tmp_path / "out"
    write, path = Writer.write, sorted(source.glob("*.safetensors"))[-1]

    def rewrite(self, info, quantizer):
        os.utime(path, ns=(1, 1))
        return write(self, info, quantizer)

    monkeypatch.setattr(Writer, "write", rewrite)
    with pytest.raises(OutputError, match="changed while it was read; run the same command again"):
        convert(str(source), out)
    monkeypatch.setattr(Writer, "write", write)
    assert 0 < convert(str(source), out).resumed < 22 and verify(out)


def test_what_calibration_measured_is_not_measured_again(tmp_path, stop_after, monkeypatch):
    source, out = word_tokenizer(llama(tmp_path / "source")), tmp_path / "out"
    options = {"calibrate": text_in(tmp_path), "smooth": 0.5}
    convert(str(source), tmp_path / "whole", **options)
    stop_after(0)  # nothing but the calibration is finished
    with pytest.raises(Killed):
        convert(str(source), out, **options)
    stop_after(None)
    with monkeypatch.context() as patch:
        patch.setattr("quantize8.calibration.calibrate.calibrate", lambda *_, **__: pytest.fail("measured again"))
        assert not list(partial_of(out).glob("*.journal")) and (partial_of(out) / "calibration.safetensors").exists()
        with pytest.raises(OutputError, match="is of other options or another source; start over with --overwrite"):
            convert(str(source), out, calibrate=text_in(tmp_path), smooth=0.4)
        convert(str(source), out, **options)
    assert digests(out) == digests(tmp_path / "whole")


def test_of_two_writers_the_second_is_told(tmp_path, monkeypatch):
    source, out, seen = llama(tmp_path / "source"), tmp_path / "out", []
    write = Writer.write

    def meanwhile(self, info, quantizer):
        monkeypatch.setattr(Writer, "write", write)
        before = digests(partial_of(out))
        for overwrite in (False, True):
            command = [sys.executable, "-m", "quantize8", "convert", str(source), "--out", str(out)]
            command += ["--overwrite", "--threshold", "5"] if overwrite else []
            seen.append(subprocess.run(command, capture_output=True, text=True))
        assert digests(partial_of(out)) == before
        return write(self, info, quantizer)

    monkeypatch.setattr(Writer, "write", meanwhile)
    convert(str(source), out, workers=1)
    for second in seen:
        assert second.returncode == 1 and second.stderr.count("\n") == 1
        assert "another process is writing its model.safetensors" in second.stderr
    assert len(seen) == 2 and verify(out)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()]
)
def test_whatever_stops_the_first_tensor_leaves_no_trace(error, tmp_path, stop_after):
    source = llama(tmp_path / "source")
    stop_after(0, error)
    with pytest.raises((KeyboardInterrupt, OutputError, MemoryError)):
        convert(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_exception_in_a_quantizer(tmp_path, monkeypatch):
    source, out = llama(tmp_path / "source"), tmp_path / "out"

    def dies(self, blocks, stats):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CpuQuantizer, "quantize", dies)
        with pytest.raises(Killed):
            convert(str(source), out)
    assert convert(str(source), out).resumed and verify(out)


FULL = ["posix_fallocate", "pwrite", "write", "fsync", "ftruncate", "open"]


@pytest.mark.parametrize("call", FULL)
def test_disks_that_fill_at_any_call(call, tmp_path, monkeypatch):
    """The same conversion again and again, each stopping at a later call and resuming from the one before."""
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    options = {"max_shard_size": "10KB", "workers": 1}
    convert(str(source), tmp_path / "whole", **options)
    original, before = getattr(os, call), digests(source)
    for stop in (0, 1, 2, 5, 11, 23):
        calls = iter(range(stop))

        def full(*arguments: object, calls=calls, **named: object) -> object:
            reads = call == "open" and not arguments[1] & os.O_CREAT
            if not reads and next(calls, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                convert(str(source), out, **options)
            except (OutputError, SourceError) as error:
                assert "No space left on device" in str(error) and "\n" not in str(error), error
        if out.exists():
            break
    if not out.exists():
        convert(str(source), out, **options)
    assert digests(out) == digests(tmp_path / "whole") and digests(source) == before


@pytest.mark.parametrize("name", ["quantize8.json", "config.json", "model.safetensors.index.json"])
def test_a_disk_that_fills_at_a_small_file(name, tmp_path, monkeypatch):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    write = driver.write_file

    def full(path, data):
        if path.name == name:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "write_file", full)
        with pytest.raises(OutputError, match=r"not written .No space left on device at .* which resumes from here"):
            convert(str(source), out, max_shard_size="10KB")
    assert not out.exists() and not opens(partial_of(out))
    assert convert(str(source), out, max_shard_size="10KB").resumed == 22 - 1 and verify(out)


def test_a_move_that_fails_and_one_that_is_killed_lose_no_artifact(tmp_path, monkeypatch):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    convert(str(source), out, recipe="int8")
    first, rename = digests(out), Path.rename

    def refused(self, target):
        if self.name == "files":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(OutputError, match="appeared while converting"):
            convert(str(source), out, overwrite=True)
    assert digests(out) == first
    out.rename(partial_of(out) / "replaced")  # as a process leaves it that is killed between the two moves
    with pytest.raises(OutputError, match="exists"):
        convert(str(source), out)
    assert digests(out) == first
    convert(str(source), out, overwrite=True)
    assert digests(out) != first and verify(out) and not partial_of(out).exists()


def test_an_output_folder_that_cannot_be_written_to(tmp_path):
    source, place = llama(tmp_path / "source"), tmp_path / "place"
    place.mkdir(mode=0o555)
    command = [sys.executable, "-m", "quantize8", "convert", str(source), "--out", str(place / "out")]
    with immutable(place) as kept:
        done = subprocess.run(command, capture_output=True, text=True)
    if kept:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be created" in done.stderr
        assert list(place.iterdir()) == []


@contextlib.contextmanager
def immutable(folder: Path):
    """A folder that not even root can write to, where the file system supports that."""
    root = os.geteuid() == 0
    kept = not root or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode == 0
    yield kept
    if root and kept:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_sigterm(tmp_path):
    """The process ends at once, and the same command resumes."""
    make_llama(tmp_path / "source", hidden=512, inner=1408, layers=8, vocabulary=512, shards=2)
    process = begin(tmp_path / "source", tmp_path / "out")
    while not any(path.stat().st_size > 10_000 for path in partial_of(tmp_path / "out").glob("*.journal")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    if not (tmp_path / "out").exists():
        assert convert(str(tmp_path / "source"), tmp_path / "out", max_shard_size=SHARD_SIZE).resumed
    assert verify(tmp_path / "out")
