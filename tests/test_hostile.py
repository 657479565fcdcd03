"""Invalid input through the command line: one line on stderr, exit code 1, no output folder, the source unchanged.

What an interrupted conversion leaves behind for the next run is tested in test_resume.py.
"""

import errno
import hashlib
import json
import os
import shutil
import sys

import pytest
import torch
from helpers.making import llama
from safetensors.torch import save_file

from quantize8 import cli
from quantize8.destinations.local import Staging
from quantize8.sources import open_checkpoint

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def content(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def quantize8(*arguments: object) -> int:
    """Run the command line in this process; its exit code."""
    sys.argv = ["quantize8", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert, expect one line and exit code 1; returns the line.

    Nothing new is on the disk except, if a tensor was finished, the hidden folder from which the next run resumes.
    """

    def call(source, *options: object, out=None) -> str:
        place = tmp_path / "outputs"
        place.mkdir(exist_ok=True)
        out = place / "out" if out is None else out
        before = content(tmp_path), sorted(place.iterdir())
        code = quantize8("convert", source, "--out", out, *options)
        text, line = capsys.readouterr()
        assert code == 1 and text == ""
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        partial = out.parent / f".{out.name}.partial"
        if partial.exists():
            assert any(journal.read_text().count("\n") > 1 for journal in partial.glob("*.journal"))
            shutil.rmtree(partial)
        assert (content(tmp_path), sorted(place.iterdir())) == before
        return line

    return call


def with_value(value: float, name: str = WEIGHT, row: int = 5):
    def edit(state) -> None:
        state[name].view(len(state[name]), -1)[row, 0] = value

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_in_a_weight(refused, tmp_path, value, dtype):
    source = llama(tmp_path / "source", dtype=dtype, edit=with_value(value))
    assert f"{WEIGHT} row 5 holds NaN or infinity" in refused(source)


def test_nan_in_a_tensor_that_is_copied(refused, tmp_path):
    source = llama(tmp_path / "source", edit=with_value(float("nan"), "model.norm.weight"))
    assert "model.norm.weight row 5 holds NaN or infinity" in refused(source)


def test_the_row_is_counted_over_all_blocks(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize8.sources.base.BLOCK_BYTES", 1)
    name = "model.embed_tokens.weight"
    source = llama(tmp_path / "source", edit=with_value(float("nan"), name, 61))
    assert f"{name} row 61" in refused(source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_over_float16_and_the_remedy_that_the_line_names(refused, tmp_path, dtype):
    source = llama(tmp_path / "source", dtype=dtype, edit=with_value(-70000.0))
    line = refused(source)
    assert f"{WEIGHT} row 5 holds |w| = 7" in line and "over float16's 65504" in line
    skip = line[line.index("skip = [") : line.index("]") + 1]
    (tmp_path / "mine.toml").write_text(f"threshold = 6.0\n{skip}\n")
    assert quantize8("convert", source, "--out", tmp_path / "ok", "--recipe", tmp_path / "mine.toml") == 0
    assert (tmp_path / "ok" / "quantize8.json").is_file()


def test_of_several_failures_the_first_in_the_file_is_named(refused, tmp_path):
    def edit(state) -> None:
        for name in list(state):
            state[name].view(-1)[0] = float("nan")

    source = llama(tmp_path / "source", edit=edit)
    first = next(iter(open_checkpoint(str(source)).tensors))
    assert f": {first} row 0" in refused(source, "--workers", 8)


def test_missing_and_cut_files(refused, tmp_path):
    source = llama(tmp_path / "source", shards=2)
    second = source / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    assert "model-00002-of-00002.safetensors: not a whole safetensors file" in refused(source)
    second.unlink()
    assert "model-00002-of-00002.safetensors: missing" in refused(source)


def test_overlapping_offsets_and_a_lying_length(refused, tmp_path):
    source = llama(tmp_path / "source")
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 64]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "not a whole safetensors file" in refused(source)
    path.write_bytes((length * 1000).to_bytes(8, "little") + data[8:])
    assert "not a whole safetensors file" in refused(source)


def test_an_index_that_points_out_of_the_folder(refused, tmp_path):
    source = llama(tmp_path / "source", shards=2)
    shutil.move(source / "model-00001-of-00002.safetensors", tmp_path / "x")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "../x"))
    assert "'../x', outside the model folder" in refused(source)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb-ran",)


def test_a_pickle_with_code_in_it(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    torch.save({"x.weight": Bomb()}, tmp_path / "source" / "pytorch_model.bin")
    assert "pytorch_model.bin: holds objects or code" in refused(tmp_path / "source")
    assert not (tmp_path / "bomb-ran").exists()


def test_what_is_no_model(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not a model folder" in refused(empty)
    for text, message in (("{", "not readable as JSON"), ("[1]", "no JSON object"), ("{}", "has a config.json but no")):
        (empty / "config.json").write_text(text)
        assert message in refused(empty)
    assert "no such folder or file" in refused(tmp_path / "nothing")
    (empty / "notes.txt").write_text("x")
    assert "not a checkpoint file" in refused(empty / "notes.txt")
    save_file({"a.bias": torch.ones(3)}, empty / "model.safetensors")
    assert "has no weights of Linear layers: the largest tensor is a.bias [3], F32" in refused(empty)


def test_a_hub_id_that_cannot_be_had(refused):
    """The tests run with the hub switched off and an empty cache for this name."""
    assert "no-such-org/no-such-model" in refused("no-such-org/no-such-model")


def test_a_quantized_source(refused, tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "eetq"}}
    (source / "config.json").write_text(json.dumps(config))
    assert "is quantized by eetq, which is not read" in refused(source)


def test_a_source_with_scales_but_no_word_of_it(refused, tmp_path):
    def edit(state) -> None:
        state[WEIGHT.replace("weight", "SCB")] = torch.ones(48)

    assert "is quantized already" in refused(llama(tmp_path / "source", edit=edit))


def test_recipes(refused, tmp_path):
    source, recipe = llama(tmp_path / "source"), tmp_path / "mine.toml"
    recipe.write_text("threshold = 6.0\nblock_size = 64\n")
    assert "mine.toml: unknown key 'block_size'" in refused(source, "--recipe", recipe)
    assert "recipe nope: not found" in refused(source, "--recipe", "nope")
    assert "must be 0" in refused(source, "--threshold", "nan")
    assert "must be 0" in refused(source, "--threshold", "-3")


def test_other_options(refused, tmp_path):
    source = llama(tmp_path / "source")
    assert "not a size" in refused(source, "--max-shard-size", "lots")
    assert "must be 1 or more" in refused(source, "--workers", 0)
    assert "--device cpu" in refused(source, "--device", "cuda")


def test_folders_that_must_not_be_replaced(refused, tmp_path):
    source = llama(tmp_path / "source")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("irreplaceable")
    assert "exists; remove it, pass --overwrite" in refused(source, out=thesis)
    assert "is not an artifact" in refused(source, "--overwrite", out=thesis)
    (tmp_path / "link").symlink_to(thesis)
    assert "is not an artifact" in refused(source, "--overwrite", out=tmp_path / "link")
    assert "is not an artifact" in refused(source, "--overwrite", out=thesis / "chapter")
    assert "holds the source" in refused(source, "--overwrite", out=source)
    assert "holds the source" in refused(source, "--overwrite", out=tmp_path)
    assert "cannot be created" in refused(source, out=thesis / "chapter" / "out")


def test_an_artifact_is_replaced_when_asked(tmp_path):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    assert quantize8("convert", source, "--out", out, "--overwrite") == 0
    (out / "stale").write_text("x")
    assert quantize8("convert", source, "--out", out, "--overwrite") == 0
    assert not (out / "stale").exists() and (out / "quantize8.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_too_small_is_told_before_anything_is_made(refused, tmp_path, monkeypatch):
    source = llama(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(Staging, "__init__", lambda *_: pytest.fail("made a folder before checking the disk"))
    assert "the disk has 1,000 free" in refused(source)


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
def test_a_disk_that_fills_while_writing(refused, tmp_path, monkeypatch, call):
    source = llama(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    assert "No space left on device" in refused(source)


def test_another_writer_that_was_faster(refused, tmp_path, monkeypatch):
    """The folder appears between the check and the last step: the other result stays, ours is removed."""
    source, out = llama(tmp_path / "source"), tmp_path / "late"
    publish = Staging.publish

    def race(staging, *rest):
        out.mkdir()
        (out / "theirs").write_text("x")
        try:
            return publish(staging, *rest)
        finally:
            assert (out / "theirs").read_text() == "x"
            shutil.rmtree(out)

    monkeypatch.setattr(Staging, "publish", race)
    assert "appeared while converting" in refused(source, out=out)


def test_damaged_folders_do_not_run(tmp_path, capsys):
    source = llama(tmp_path / "source", shards=2)
    second = source / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    for message in ("not a whole safetensors file", "missing"):
        assert quantize8("run", source) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and message in line
        second.unlink(missing_ok=True)


def test_code_that_a_model_brings_is_never_run(tmp_path, monkeypatch, capsys):
    """The model has its own config class: transformers would ask, and run it if allowed."""
    source = llama(tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    text = tmp_path / "text"
    text.write_text("some words")
    assert quantize8("convert", source, "--out", tmp_path / "out") == 0  # by names and shapes
    capsys.readouterr()
    for arguments in (["run", source], ["inspect", source, "--text", text]):
        assert quantize8(*arguments) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "transformers has no model type 'evil'" in line
    assert not (tmp_path / "ran").exists()
