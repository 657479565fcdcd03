"""Conversions in parts: the same bytes as one process, whichever process wrote each file, and however often."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.artifacts import digests, opens
from helpers.gguf_files import assemble, config_of, folder_of
from helpers.making import llama, mixtral, word_tokenizer

from quantize8 import OutputError, SourceError, cli, convert, verify
from quantize8.commands.finalize import finalize
from quantize8.conversion import driver
from quantize8.conversion.driver import Writer
from quantize8.conversion.parts import Part, parse_part
from quantize8.destinations.journal import SUFFIX, _line
from quantize8.destinations.local import LocalFolder, Staging, partial_of

SIZE = {"max_shard_size": "6KB"}  # several files of the tiny Llama


@pytest.fixture
def source(tmp_path):
    return str(word_tokenizer(llama(tmp_path / "source", shards=2)))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8)
    return tmp_path / "text"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors", "float32"])
def test_parts_in_any_order_make_the_artifact_of_one_process(format, count, source, tmp_path):
    whole = convert(source, tmp_path / "whole", format=format, **SIZE)
    written = []
    for number in reversed(range(1, count + 1)):
        result = convert(source, tmp_path / "out", format=format, part=f"{number}/{count}", **SIZE)
        assert result.manifest is None and not (tmp_path / "out").exists()
        written += result.files
    assert sorted(written) == [shard.file for shard in whole.plan.shards]
    done = finalize(tmp_path / "out")
    assert done.errors == whole.errors and done.manifest == whole.manifest
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"smooth": 0.5, "scale": "mse"}], ids=str)
def test_outlier_columns_are_brought_together(options, source, text, tmp_path, monkeypatch):
    options = {**SIZE, **options, "calibrate": text, "outlier_columns": 3}
    convert(source, tmp_path / "whole", **options)
    convert(source, tmp_path / "out", part="2/2", **options)
    monkeypatch.setattr("quantize8.calibration.calibrate.calibrate", lambda *_, **__: pytest.fail("measured twice"))
    convert(source, tmp_path / "out", part="1/2", **options)
    text.unlink()  # what it said is known
    finalize(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")


def test_experts_and_quantized_sources(tmp_path):
    experts = mixtral(tmp_path / "mixtral")
    options = {"format": "compressed-tensors", "max_shard_size": "20KB"}
    convert(str(experts), tmp_path / "whole", **options)
    for number in (1, 2, 3):
        convert(str(experts), tmp_path / "out", part=f"{number}/3", **options)
    finalize(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    for number in (1, 2):
        convert(str(tmp_path / "out"), tmp_path / "plain", format="bfloat16", part=f"{number}/2", **SIZE)
    finalize(tmp_path / "plain")
    convert(str(tmp_path / "out"), tmp_path / "one", format="bfloat16", **SIZE)
    assert digests(tmp_path / "plain") == digests(tmp_path / "one")


def altered(value, path=()):
    """Copies of JSON's values, each with one of them left out or of another kind."""
    if isinstance(value, dict):
        for key in value:
            yield {name: each for name, each in value.items() if name != key}, (*path, key, "left out")
            for other, where in altered(value[key], (*path, key)):
                yield {**value, key: other}, where
        yield {**value, "more": 1}, (*path, "more")
    for other in (None, 5, "x", [], [[]], {}, True):
        if type(other) is not type(value):
            yield other, (*path, other)


def test_journals_that_are_no_journals(source, tmp_path, monkeypatch):
    """A heading, or an entry, as another version would have it, or an enemy: one line, or what convert makes."""
    whole = convert(source, tmp_path / "whole", **SIZE)
    convert(source, tmp_path / "out", part="1/1", **SIZE)
    path = partial_of(tmp_path / "out") / f"{whole.plan.shards[0].file}{SUFFIX}"
    heading, *entries = (json.loads(line.split(b" ", 1)[1]) for line in path.read_bytes().splitlines())
    refused, taken = [], []
    shutil.copytree(partial_of(tmp_path / "out"), tmp_path / "kept")
    monkeypatch.setattr(Staging, "publish", lambda *_: whole.manifest)  # where it comes so far
    cases = [([other, *entries], where) for other, where in altered(heading)]
    cases += [([heading, other, *entries[1:]], where) for other, where in altered(entries[0])]

    def lay(lines, out):
        shutil.rmtree(partial_of(out), ignore_errors=True)
        shutil.copytree(tmp_path / "kept", partial_of(out))
        (partial_of(out) / path.name).write_bytes(b"".join(map(_line, lines)))

    for lines, where in cases:
        lay(lines, tmp_path / "out")
        try:
            driver.finalize(LocalFolder(tmp_path / "out"))
        except (OutputError, SourceError) as error:
            assert "\n" not in str(error) and str(error), where
            refused.append(where)
        else:
            taken.append(where)
    assert len(refused) > 5 * len(taken) > 0
    assert not [where for where in taken if where[0] == "decisions"]
    monkeypatch.undo()
    for number, (lines, _) in enumerate(cases[::7]):  # and what convert goes on from
        lay(lines, tmp_path / f"new-{number}")
        try:
            convert(source, tmp_path / f"new-{number}", **SIZE)
        except OutputError as error:
            assert "\n" not in str(error) and "holds an unfinished conversion" in str(error)
            convert(source, tmp_path / f"new-{number}", overwrite=True, **SIZE)
        assert digests(tmp_path / f"new-{number}") == digests(tmp_path / "whole")


def test_what_is_missing_is_named_with_the_command_for_it(source, tmp_path):
    out = tmp_path / "an out"
    with pytest.raises(OutputError, match="no part of it is here"):
        finalize(out)
    files = len(convert(source, out, part="1/2", threshold=5.0, **SIZE).plan.shards)
    first = files - files // 2 + 1  # that is missing
    before = digests(partial_of(out))
    with pytest.raises(OutputError, match=f"not finished: model-{first:05}-of-{files:05}") as caught:
        finalize(out)
    assert "\n" not in str(caught.value) and not out.exists() and not opens(partial_of(out))
    assert digests(partial_of(out)).items() >= before.items()
    command = str(caught.value).partition("; run quantize8 ")[2]
    assert (
        command.endswith(f"--part {first}/{files}")
        and "--threshold 5.0" in command
        and "--max-shard-size 6KB" in command
    )
    while True:  # do as it says, as often as it says so
        subprocess.run(f"{sys.executable} -m quantize8 {command}", shell=True, check=True, capture_output=True)
        try:
            finalize(out)
            break
        except OutputError as error:
            command = str(error).partition("; run quantize8 ")[2]
    convert(source, tmp_path / "whole", threshold=5.0, **SIZE)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_dry_run_of_a_part_names_its_files(source, tmp_path, capsys, monkeypatch):
    arguments = ["convert", source, "--out", str(tmp_path / "out"), "--part", "2/2", "--max-shard-size", "6KB"]
    monkeypatch.setattr(sys, "argv", ["quantize8", *arguments, "--dry-run", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    planned = json.loads(capsys.readouterr().out)
    assert planned["dry_run"] and not partial_of(tmp_path / "out").exists()
    assert planned["part"] == {"part": "2/2", "files": convert(source, tmp_path / "out", part="2/2", **SIZE).files}


def test_convert_without_a_part_ends_what_parts_began(source, tmp_path):
    convert(source, tmp_path / "out", part="2/3", **SIZE)
    assert convert(source, tmp_path / "out", **SIZE).resumed
    convert(source, tmp_path / "whole", **SIZE)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_part_that_was_killed_or_is_run_again(source, tmp_path, monkeypatch):
    write, done = Writer.write, iter(range(3))

    def dies(self, info, quantizer):
        if next(done, None) is None:
            raise KeyboardInterrupt
        return write(self, info, quantizer)

    convert(source, tmp_path / "out", part="2/2", **SIZE)
    monkeypatch.setattr(Writer, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", part="1/2", workers=1, **SIZE)
    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(OutputError, match="not finished: model-0000"):
        finalize(tmp_path / "out")
    assert convert(source, tmp_path / "out", part="1/2", **SIZE).resumed == 3
    again = convert(source, tmp_path / "out", part="1/2", **SIZE)
    assert again.resumed > 3 and not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", part="3/5", **SIZE)  # another number of parts: the same files
    finalize(tmp_path / "out")
    convert(source, tmp_path / "whole", **SIZE)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_part_that_fails_at_once_leaves_the_others_alone(source, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    convert(source, tmp_path / "out", part="2/2", **SIZE)
    before = digests(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", part="1/2", **SIZE)
    assert digests(tmp_path) == before


def test_parts_of_other_options_do_not_mix(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, part="1/2", **SIZE)
    before = digests(partial_of(out))
    for options in ({"threshold": 5.0, **SIZE}, {"max_shard_size": "20KB"}):
        with pytest.raises(OutputError, match="holds an unfinished conversion with another"):
            convert(source, out, part="2/2", **options)
    assert digests(partial_of(out)) == before
    for part in ("1/2", "2/2"):
        convert(source, out, part=part, max_shard_size="20KB", overwrite=part == "1/2")
    finalize(out)
    convert(source, tmp_path / "whole", max_shard_size="20KB")
    assert digests(out) == digests(tmp_path / "whole")


def test_a_source_that_changed_between_the_parts(source, tmp_path):
    convert(source, tmp_path / "out", part="1/2", **SIZE)
    os.utime(sorted(Path(source).glob("*.safetensors"))[0], ns=(1, 1))
    convert(source, tmp_path / "out", part="2/2", **SIZE)
    with pytest.raises(OutputError, match="not finished: model-00001"):
        finalize(tmp_path / "out")
    convert(source, tmp_path / "out", part="1/2", **SIZE)
    finalize(tmp_path / "out")
    Path(source).rename(tmp_path / "moved")
    convert(str(tmp_path / "moved"), tmp_path / "other", part="1/1", **SIZE)
    (tmp_path / "moved").rename(tmp_path / "gone")
    with pytest.raises(SourceError, match="no such folder"):
        finalize(tmp_path / "other")


def test_an_artifact_is_replaced_only_when_asked(source, tmp_path):
    convert(source, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "out", part="1/1", **SIZE)
    convert(source, tmp_path / "out", part="1/1", overwrite=True, **SIZE)
    before = digests(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        finalize(tmp_path / "out")
    assert digests(tmp_path / "out") == before
    finalize(tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") != before


def test_gguf_is_one_part(tmp_path, capsys, monkeypatch):
    assemble(folder_of(tmp_path / "folder", config_of("qwen3")), tmp_path / "model.gguf")
    source, out = str(tmp_path / "model.gguf"), tmp_path / "out"
    convert(source, tmp_path / "whole", format="gguf")
    arguments = ["quantize8", "convert", source, "--format", "gguf", "--out", str(out)]
    for part, says in (("2/2", "nothing to do"), ("1/2", "finalize")):
        monkeypatch.setattr(sys, "argv", [*arguments, "--part", part])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and says in capsys.readouterr().out
        assert partial_of(out).exists() == (part == "1/2")
    assert not opens(partial_of(out))
    monkeypatch.setattr(sys, "argv", ["quantize8", "finalize", str(out), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("files", range(1, 9))
@pytest.mark.parametrize("count", range(1, 12))
def test_shares_cover_all_files_once(files, count):
    units = list(range(files))
    shares = [Part(number, count).of(units) for number in range(1, count + 1)]
    assert [unit for share in shares for unit in share] == units
    assert max(map(len, shares)) - min(len(share) for share in shares if share) <= 1
    assert shares[0] and (count > files or all(shares))


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}


@pytest.mark.parametrize(
    ("text", "environment", "found"),
    [
        ("2/4", {}, Part(2, 4)),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "2"}, Part(3, 4)),
        ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "3", "RANK": "9", "WORLD_SIZE": "10"}, Part(1, 4)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "8"}, Part(1, 8)),
        ("auto", {"RANK": "7", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_STEP": "2"}, Part(8, 8)),
    ],
)
def test_shares_by_name_and_by_environment(text, environment, found):
    assert parse_part(text, environment) == found


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        *((text, {}, "not a share; write for example 1/4") for text in ("", "0/4", "5/4", "1", "a/b", "1/0", "-1/4")),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID nor RANK is set"),
        ("auto", {"RANK": "1"}, "RANK and WORLD_SIZE are not two numbers"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "are not two numbers"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is beyond WORLD_SIZE 2"),
        ("auto", SLURM, "SLURM_ARRAY_TASK_ID 7 is beyond SLURM_ARRAY_TASK_COUNT 4"),
    ],
)
def test_shares_that_cannot_be(text, environment, message):
    with pytest.raises(OutputError, match=message) as caught:
        parse_part(text, environment)
    assert "\n" not in str(caught.value)
