"""The tokenizer of a GGUF file: the same files that transformers itself would save."""

import json

import pytest
import transformers
from gguf import GGUFValueType
from helpers.gguf_files import VOCABULARY, TinyGguf, assemble, config_of, folder_of
from transformers import AutoTokenizer

from quantize8 import SourceError, convert, load
from quantize8.formats.gguf import inverse
from quantize8.formats.gguf import vocabulary as gguf_vocabulary
from quantize8.formats.gguf.settings import ARCHITECTURES
from quantize8.runtime.loading import find_tokenizer
from quantize8.sources import open_checkpoint

ARRAY, STRING, UINT32, BOOL = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.BOOL
TEXTS = ("hat cat the", "a that", "<end>the <think>", "  x\n\u00e9")


def byte_level(architecture, **changes):
    """A model with a few tokens in GPT-2's alphabet: merges, special ones, and one that is only added."""
    tiny = TinyGguf(architecture)
    tokens = [*"thecano", "\u0120", "th", "the", "at", "\u0120t", "\u0120th", "hat", "<end>", "<think>", "<pad>"]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), VOCABULARY)]
    kinds = [{"<end>": 3, "<pad>": 3, "<think>": 4}.get(token, 5 if "PAD" in token else 1) for token in tokens]
    fields = {"ggml.model": ("gpt2", STRING), "ggml.pre": ("qwen2", STRING), "ggml.tokens": (tokens, ARRAY)}
    fields |= {"ggml.token_type": (kinds, ARRAY), "ggml.eos_token_id": (tokens.index("<end>"), UINT32)}
    fields["ggml.merges"] = ["t h", "th e", "a t", "\u0120 t", "\u0120t h", "h at"], ARRAY
    fields |= {"ggml.padding_token_id": (tokens.index("<pad>"), UINT32), "ggml.add_bos_token": (False, BOOL)}
    fields["chat_template"] = "{{ messages[0]['content'] }}", STRING
    tiny.fields |= {f"tokenizer.{key}": value for key, value in {**fields, **changes}.items() if value is not None}
    return tiny


def assert_saved_alike(path, folder):
    """Our tokenizer's files are transformers' own, but for how it was opened, which is of no meaning after."""
    folder.mkdir(exist_ok=True)
    open_checkpoint(str(path)).write_companions(folder / "ours")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.save_pretrained(folder / "theirs")
    names = {entry.name for entry in (folder / "theirs").iterdir()}
    assert names == {entry.name for entry in (folder / "ours").iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    for name in names - {"tokenizer_config.json"}:
        assert (folder / "ours" / name).read_text() == (folder / "theirs" / name).read_text(), name
    settings = [json.loads((folder / part / "tokenizer_config.json").read_text()) for part in ("ours", "theirs")]
    for key in ("is_local", "local_files_only"):
        del settings[1][key]
    assert settings[0] == settings[1]
    again = AutoTokenizer.from_pretrained(folder / "ours")
    for text in TEXTS:
        assert again(text)["input_ids"] == theirs(text)["input_ids"], text


def test_of_a_real_file(smollm2_gguf, tmp_path):
    assert_saved_alike(smollm2_gguf, tmp_path / "saved")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_byte_level(architecture, tmp_path):
    byte_level(architecture).write(tmp_path / "tiny.gguf")
    assert_saved_alike(tmp_path / "tiny.gguf", tmp_path / "saved")


def test_sentencepiece(tmp_path):
    assemble(folder_of(tmp_path / "model", config_of("llama")), tmp_path / "tiny.gguf")
    assert_saved_alike(tmp_path / "tiny.gguf", tmp_path / "saved")


def test_sentencepiece_of_a_qwen_would_not_outlive_saving(tmp_path):
    assemble(folder_of(tmp_path / "model", config_of("qwen3")), tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match="transformers would open the 'llama' tokenizer of this qwen3 as another"):
        find_tokenizer(open_checkpoint(str(tmp_path / "tiny.gguf")))


def test_the_classes_are_those_of_transformers():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    assert set(gguf_vocabulary._CLASSES) == {*ARCHITECTURES, *inverse.ARCHITECTURES}
    types = {arch: inverse.MODEL_TYPES[name] for arch, name in inverse.ARCHITECTURES.items()}
    for architecture, name in gguf_vocabulary._CLASSES.items():
        assert (TOKENIZER_MAPPING_NAMES.get(types.get(architecture, architecture)) or "TokenizersBackend") == name
        assert getattr(transformers, name).__name__ == name


def test_it_is_made_once(tmp_path, monkeypatch):
    byte_level("llama").write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    first = find_tokenizer(checkpoint)
    monkeypatch.setattr(gguf_vocabulary, "_build", lambda _: pytest.fail("made again"))
    checkpoint.write_companions(tmp_path / "saved")
    assert find_tokenizer(checkpoint) is first and (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_file_without_tokens_has_none(tmp_path):
    TinyGguf().write(tmp_path / "tiny.gguf")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert load(tmp_path / "tiny.gguf", "cpu")[1] is None


def test_tokens_that_would_take_hours_to_cut(tmp_path):
    changes = {"ggml.model": ("llama", STRING), "ggml.merges": None, "ggml.tokens": (["x" * 40_000] * 2, ARRAY)}
    byte_level("llama", **changes, **{"ggml.scores": ([0.0, 1.0], ARRAY)}).write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match="tokens are too long to derive merges"):
        find_tokenizer(open_checkpoint(str(tmp_path / "tiny.gguf")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.eos_token_id": (99, UINT32)}, "list index out of range"),
        ({"ggml.model": ("mystery", STRING)}, "stating tokenizer 'mystery'"),
        ({"ggml.model": None}, "stating tokenizer None"),
        ({"ggml.merges": (["t h", "t zz"], ARRAY)}, "cannot read its tokenizer"),
    ],
)
def test_what_transformers_cannot_read_is_one_line(changes, message, tmp_path):
    byte_level("llama", **changes).write(tmp_path / "tiny.gguf")
    with pytest.raises(SourceError, match=message) as caught:
        find_tokenizer(open_checkpoint(str(tmp_path / "tiny.gguf")))
    assert "\n" not in str(caught.value) and "tiny.gguf: " in str(caught.value)
