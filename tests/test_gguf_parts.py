"""GGUF in parts and in folders: all parts form one checkpoint, whichever is named; ambiguity is an error."""

import shutil

import numpy as np
import pytest
from gguf import GGUFValueType
from helpers.gguf_files import TinyGguf

from quantize8 import SourceError, convert
from quantize8.sources import open_checkpoint


def split(folder, per_part=8):
    """A tiny model in three parts."""
    folder.mkdir()
    parts = TinyGguf().write(folder / "tiny.gguf", per_part)
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return parts


def test_whichever_part_or_the_folder_is_named(tmp_path):
    parts, tiny = split(tmp_path / "model"), TinyGguf()
    tiny.write(tmp_path / "tiny.gguf")
    whole = open_checkpoint(str(tmp_path / "tiny.gguf"))
    for source in (*parts, tmp_path / "model"):
        checkpoint = open_checkpoint(str(source))
        assert list(checkpoint.tensors) == list(whole.tensors) and checkpoint.config == whole.config
        assert checkpoint.name == ("model" if source.is_dir() else "tiny")
        assert set(checkpoint.fingerprint()) == {part.name for part in parts}
        for name, values in tiny.expected.items():
            np.testing.assert_array_equal(checkpoint.rows(name, 0, len(values)), values.astype(np.float16), name)
    files = [info.file for info in checkpoint.tensors.values()]
    assert files == [parts[0].name] * 8 + [parts[1].name] * 8 + [parts[2].name] * 4


def test_a_first_part_without_tensors_counts_too(tmp_path):
    """As llama.cpp's gguf-split --no-tensor-first-split makes it: the metadata alone."""
    TinyGguf().write(tmp_path / "m", split=10, small_first=True)
    checkpoint = open_checkpoint(str(tmp_path / "m-00002-of-00003.gguf"))
    before = checkpoint.fingerprint()
    assert set(before) == {f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)}
    assert checkpoint.tensors["model.embed_tokens.weight"].file == "m-00002-of-00003.gguf"
    first = tmp_path / "m-00001-of-00003.gguf"
    first.write_bytes(first.read_bytes().replace(b"freq_base", b"freq_bass"))
    after = open_checkpoint(str(first)).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {first.name}


def test_a_split_model_converts_as_the_whole_one_does(tmp_path):
    parts = split(tmp_path / "parts")
    TinyGguf().write(tmp_path / "tiny.gguf")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "whole")
    convert(str(parts[1]), tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_split_model_becomes_one_gguf_file(tmp_path):
    """The file does not mention parts: llama.cpp would look for them."""
    parts = split(tmp_path / "parts")
    TinyGguf().write(tmp_path / "tiny.gguf")
    for source, out in ((tmp_path / "tiny.gguf", "whole"), (parts[2], "out")):
        convert(str(source), tmp_path / out, format="gguf")
    whole, out = (tmp_path / name / "tiny-Q8_0.gguf" for name in ("whole", "out"))
    assert out.read_bytes() == whole.read_bytes() and b"split." not in out.read_bytes()


@pytest.mark.parametrize("named", [0, 1, 2])
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_missing_part_is_named(named, absent, tmp_path):
    parts = split(tmp_path / "model")
    parts[absent].unlink()
    source = parts[named] if named != absent else tmp_path / "model"
    with pytest.raises(SourceError, match=rf"{parts[absent].name}: missing; tiny-.* is one of 3 parts") as caught:
        open_checkpoint(str(source))
    assert "\n" not in str(caught.value)


def test_a_part_under_another_name(tmp_path):
    parts = split(tmp_path / "model")
    parts[1].rename(tmp_path / "model" / "second.gguf")
    with pytest.raises(
        SourceError, match=r"is part 2 of 3 by its metadata, but not by its name; rename it to \.\.\.-00002"
    ):
        open_checkpoint(str(tmp_path / "model" / "second.gguf"))


@pytest.mark.parametrize(
    "number", [(3, GGUFValueType.UINT16), ("one", GGUFValueType.STRING), (0.5, GGUFValueType.FLOAT32)]
)
def test_a_part_that_cannot_be(number, tmp_path):
    tiny = TinyGguf()
    tiny.fields |= {"split.no": number, "split.count": (3, GGUFValueType.UINT16)}
    tiny.write(tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(SourceError, match=r"says split\.no = .* of 3 parts; fetch it again"):
        open_checkpoint(str(tmp_path))


def test_parts_that_changed_places(tmp_path):
    parts = split(tmp_path / "model")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(SourceError, match=r"00002-of-00003\.gguf: says split\.no = 2, but as a part of .* be 1"):
        open_checkpoint(str(parts[0]))


def test_a_part_of_another_model(tmp_path):
    parts, others = split(tmp_path / "model"), split(tmp_path / "other", 7)
    shutil.copy(others[1], parts[1])
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_gate\.weight is also in tiny-00001"):
        open_checkpoint(str(parts[0]))
    tiny = TinyGguf()
    del tiny.tensors["output_norm.weight"]
    shutil.copy(tiny.write(tmp_path / "tiny.gguf", 8)[1], parts[1])
    with pytest.raises(SourceError, match=r"says split\.tensors\.count = 19, but as a part .* it must be 20"):
        open_checkpoint(str(parts[0]))


def test_fewer_tensors_than_the_parts_are_said_to_hold(tmp_path):
    parts = split(tmp_path / "model")
    for part in parts:
        content = part.read_bytes()
        place = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
        part.write_bytes(content[:place] + (21).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(SourceError, match="says that its parts hold 21 tensors, but they hold 20"):
        open_checkpoint(str(parts[0]))


def test_a_part_that_lies_outside_the_folder(tmp_path):
    parts = split(tmp_path / "model")
    parts[1].rename(tmp_path / "elsewhere")
    parts[1].symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(str(parts[0]))


@pytest.mark.parametrize("name", ["tiny.GGUF", "sha256-0123abcd", "tiny.q8.bin"])
def test_a_file_is_known_by_its_first_bytes(name, tmp_path):
    tiny = TinyGguf()
    tiny.write(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf").rename(tmp_path / name)
    assert set(open_checkpoint(str(tmp_path / name)).tensors) == set(tiny.expected)


@pytest.mark.parametrize("beside", [(), ("config.json",), ("README.md", "model.safetensors"), ("training_args.bin",)])
def test_a_folder_with_one_gguf_file_is_that_file(beside, tmp_path):
    TinyGguf().write(tmp_path / "tiny.gguf")
    for name in beside:
        (tmp_path / name).write_text("{}")
    assert open_checkpoint(str(tmp_path)).name == tmp_path.name
    assert open_checkpoint(str(tmp_path)).config["model_type"] == "llama"


def test_a_folder_with_several_models(tmp_path):
    for name in ("a-Q8_0", "b-Q4_0", "c", "d"):
        TinyGguf().write(tmp_path / f"{name}.gguf")
    message = r"holds 4 models in GGUF \(a-Q8_0\.gguf, b-Q4_0\.gguf, c\.gguf, \.\.\.\); name one of them"
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_split_model_beside_another(tmp_path):
    parts = split(tmp_path / "model")
    TinyGguf().write(tmp_path / "model" / "other.gguf")
    with pytest.raises(SourceError, match=r"holds 2 models in GGUF \(other\.gguf, tiny-\*-of-00003\.gguf\)"):
        open_checkpoint(str(tmp_path / "model"))
    assert open_checkpoint(str(parts[1])).name == "tiny"


def test_a_model_and_its_vision_projector(tmp_path):
    TinyGguf().write(tmp_path / "tiny.gguf")
    TinyGguf("clip", biased=()).write(tmp_path / "mmproj-tiny.gguf")
    with pytest.raises(SourceError, match=r"holds tiny\.gguf and a vision projector \(mmproj-tiny\.gguf\).*name tiny"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "other.gguf").write_bytes(b"")
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}]')
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.left_behind() == {"mmproj-tiny.gguf": "a vision projector, which is not read"}
    assert not checkpoint.is_encoder
    message = r"mmproj-tiny\.gguf: holds a vision projector \(mmproj\), not a language model"
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(tmp_path / "mmproj-tiny.gguf"))


def test_files_that_hold_no_model(tmp_path):
    tiny = TinyGguf()
    tiny.tensors.clear()
    tiny.write(tmp_path / "nothing.gguf")
    tiny.fields["tokenizer.ggml.tokens"] = ["a", "b"], GGUFValueType.ARRAY
    tiny.write(tmp_path / "vocabulary.gguf")
    adapter = TinyGguf()
    adapter.fields["general.type"] = "adapter", GGUFValueType.STRING
    adapter.write(tmp_path / "adapter.gguf")
    for name, message in (
        ("nothing", "holds no weights; name"),
        ("vocabulary", "holds no weights, only a tokenizer; name the model's file"),
        ("adapter", "is of type 'adapter', not a model; name the model's file"),
    ):
        with pytest.raises(SourceError, match=message):
            open_checkpoint(str(tmp_path / f"{name}.gguf"))
