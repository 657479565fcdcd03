"""Limits and secrets: files that claim too much, point elsewhere, or contain what no message or file may show."""

import json
import os
import pickle
import socket
import struct
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.fuzzing import gguf, torch_zip
from helpers.making import llama, word_tokenizer

from quantize8 import ArtifactError, DependencyError, Quantize8Error, SourceError, convert, limits, load, verify
from quantize8.artifact.manifest import digest, read_manifest
from quantize8.errors import one_line
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.recipe import load_recipe
from quantize8.sources import open_checkpoint
from quantize8.sources.base import TensorInfo, check_settings
from quantize8.sources.structure import build_meta_model, read_structure
from quantize8.sources.tokenizer import check_tokenizer

TOKEN = "hf_" + "abcdefghijklmnop"


@pytest.fixture
def model(tmp_path) -> Path:
    return word_tokenizer(llama(tmp_path / "model"))


@pytest.fixture
def artifact(tmp_path, model) -> Path:
    convert(str(model), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def little_memory():
    """Allow the process 2 GiB more than it has now, so that allocating a claimed terabyte fails."""
    resource = pytest.importorskip("resource", reason="this system has no limit on the memory of a process")
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much memory a process has")
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- sizes ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "quantize8.json"])
def test_a_small_file_that_is_not_small_is_refused(name, model, artifact, monkeypatch):
    for limit in ("CONFIG_BYTES", "INDEX_BYTES", "TOKENIZER_BYTES", "MANIFEST_BYTES"):
        monkeypatch.setattr(limits, limit, 100_000)
    folder = artifact if name == "quantize8.json" else model
    (folder / name).write_text("{" + " " * 100_000 + "}")
    with pytest.raises(Quantize8Error, match=r"larger than the 100,000 bytes"):
        open_checkpoint(str(model))
        check_tokenizer(model)
        read_manifest(artifact)


def test_json_nested_beyond_the_limit(model):
    nested = lambda depth: json.loads("[" * depth + "]" * depth)  # noqa: E731
    for depth, good in ((limits.JSON_DEPTH - 2, True), (limits.JSON_DEPTH + 1, False)):
        (model / "config.json").write_text(json.dumps({"x": nested(depth)}))
        if good:
            open_checkpoint(str(model))
            continue
        with pytest.raises(SourceError, match="nested deeper than 64 levels"):
            open_checkpoint(str(model))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a", (2**32, 2**32)),  # a product of 0 in 64 bits
        ("a", (2**62, 2)),
        ("a", (0, 2**40)),  # no values, and yet a scale for each row
        ("a", (1,) * 17),
        ("a", (-1, 4)),
        ("a" * 2000, (1,)),
        ("a\x1b[2Jb", (1,)),
        ("a\ud800", (1,)),
        ("", (1,)),
    ],
)
def test_names_and_shapes_that_no_file_holds(name, shape):
    with pytest.raises(SourceError) as caught:
        TensorInfo(name, "F16", shape, "x")
    assert str(caught.value).isprintable()


def test_a_safetensors_header_of_a_terabyte(model, little_memory):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": [2**60, 0]},
        {"counts": [0, 2**60]},
        {"fields": [["x", 9, [0, [], 2**62]]]},  # bytes without end, each an object
        {"fields": [["x", 9, [8, [], 2**62]]]},
        {"fields": [["x", 9, [9, [[9, [[9, []]]]]]]]},
        {"tensors": [["token_embd.weight", [2**32, 2**32], 0, 0]]},
        {"tensors": [["token_embd.weight", [2**40], 0, 0]]},
        {"tensors": [["token_embd.weight", [64], 0, 2**63]]},
    ],
)
def test_a_gguf_header_that_claims_too_much(changes, tmp_path, little_memory):
    (tmp_path / "x.gguf").write_bytes(
        gguf({"fields": [["general.architecture", 8, "llama"]], "tensors": [], **changes})
    )
    with pytest.raises(SourceError, match="not a whole GGUF file"):
        GgufCheckpoint(tmp_path / "x.gguf", {}, "x")


def test_a_gguf_header_without_end(tmp_path, monkeypatch):
    """Strings that the file does hold, and that would fill the memory."""
    monkeypatch.setattr(limits, "GGUF_HEADER_BYTES", 5000)
    for length in (2000, 6000):
        fields = [["general.architecture", 8, "llama"], ["x", 9, [8, ["y" * length]]], ["z", 9, [4, [1] * 100]]]
        (tmp_path / "x.gguf").write_bytes(gguf({"fields": fields, "tensors": []}))
        message = "holds no weights" if length < 5000 else "has more than 5,000 bytes before its tensors"
        with pytest.raises(SourceError, match=message):
            GgufCheckpoint(tmp_path / "x.gguf", {}, "x")


def test_gguf_tensors_over_each_other(tmp_path):
    fields = [["general.architecture", 8, "llama"]]
    for places in ((0, 0, 0), (0, 1024, 1020), (4, 0, 1028)):
        tensors = [[f"blk.{i}.ffn_up.weight", [256], 0, place] for i, place in enumerate(places)]
        content = gguf({"fields": fields, "tensors": tensors}) + bytes(4096)
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(SourceError, match="overlap each other"):
            GgufCheckpoint(tmp_path / "x.gguf", {}, "x")


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu"
BUILT = b"K\0K\4\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"


def a_tensor(count: bytes) -> bytes:
    """A pickle of {"a": a tensor of 4} in a storage of `count` elements."""
    return b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + count + b"tQ" + BUILT + b"s."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (a_tensor(b"\x8a\x08" + struct.pack("<q", 2**50)), "larger than the file"),
        (a_tensor(b"J\xff\xff\xff\xff"), "a storage that is not valid"),
        (b"\x80\2cbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85R.", "holds objects or code"),  # 4 GiB of zeros
        (b"\x80\2ctorch\nFloatStorage\n\x8a\5\0\0\0\0\1\x85R.", "holds objects or code"),
        (b"\x80\2}N" + b"q\0h\0\x86" * 60 + b"K\1s.", "holds objects or code"),  # a key whose hash takes 2^60 steps
        (b"\x80\2ccollections\nOrderedDict\n)R}X\5\0\0\0itemsNsb.", "plain dictionary"),
    ],
)
@pytest.mark.timeout(20)
def test_a_pickle_that_asks_for_too_much(content, message, tmp_path, little_memory):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(torch_zip(content))
    if message == "plain dictionary":  # an attribute of the same name as a method does not matter
        assert open_checkpoint(str(tmp_path)).tensors == {}
        return
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(tmp_path))


def test_the_pickle_above_is_read_where_it_is_true(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(torch_zip(a_tensor(b"K\x10")))
    assert open_checkpoint(str(tmp_path)).tensors["a"].shape == (4,)


def test_a_bomb_in_a_zip(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(SourceError, match="is compressed"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_that_repeats_its_storage_claims_more_than_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(1).expand(10**9, 10**3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="a has more values than the file"):
        open_checkpoint(str(tmp_path))


def test_a_sparse_tensor_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="holds objects or code"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "config", [{"n_layer": 10**9}, {"text_config": {"num_hidden_layers": 1e9}}, {"vocab_size": 2**40}]
)
def test_settings_that_would_fill_the_memory(config):
    with pytest.raises(SourceError, match="more than the"):
        check_settings(config, Path("config.json"))


def test_a_model_of_too_many_modules(monkeypatch):
    monkeypatch.setattr(limits, "MODULES", 20)
    with pytest.raises(SourceError, match="more than 20 modules"):
        build_meta_model({"model_type": "gpt2", "n_layer": 8, "n_embd": 8, "n_head": 2})


@pytest.mark.parametrize("place", ["vocab", "added"])
@pytest.mark.timeout(20)
def test_a_token_of_a_very_large_id(place, model):
    path = model / "tokenizer.json"
    state = json.loads(path.read_text())
    if place == "vocab":
        state["model"]["vocab"]["w1"] = 2**31
    else:
        state["added_tokens"].append({**state["added_tokens"][0], "content": "<x>", "id": 2**31})
    path.write_text(json.dumps(state))
    with pytest.raises(SourceError, match="a token with id 2147483648"):
        load(model)


def test_a_tokenizer_on_which_the_package_panics(model, capfd):
    path = model / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"] = {"type": "BPE", "vocab": {"ab": 0, "c": 1, "a": 2}, "merges": [["ab", "c"]]}
    state["model"]["continuing_subword_prefix"] = "xxxxxxx"
    path.write_text(json.dumps(state))
    with pytest.raises((DependencyError, SourceError), match="tokenizer"):
        load(model)


@pytest.mark.parametrize(
    "text", ["threshold = " + "9" * 5000, "threshold = 1" + "0" * 400, "a = " + "[" * 20_000, "threshold = 0xZ"]
)
def test_recipes_that_stop_the_parser(text, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(Quantize8Error, match=r"x\.toml"):
        load_recipe(str(tmp_path / "x.toml"))


# --- places ---


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for(model):
    for name in ("config.json", "model.safetensors"):
        (model / name).rename(model / "kept")
        os.mkfifo(model / name)
        with pytest.raises(SourceError):
            open_checkpoint(str(model))
        (model / name).unlink()
        (model / "kept").rename(model / name)


@pytest.mark.parametrize(
    "file", ["/etc/hostname", "../x.safetensors", "a/b.safetensors", "a\0b", "a\nb", "..", ".", "", "x" * 300]
)
def test_index_entries_that_are_no_file_of_the_folder(file, model):
    index = {"weight_map": {"model.norm.weight": file}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(model))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "loop"])
def test_small_files_that_lead_elsewhere_are_not_opened(name, kind, model, tmp_path):
    path = model / name
    path.unlink(missing_ok=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / path.name).write_text("{}")
    if kind == "folder" and path.parent != model:
        path.parent.symlink_to(tmp_path / "secret")
    else:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(path.name if kind == "loop" else tmp_path / "secret" / path.name)
    if kind == "loop":
        open_checkpoint(str(model))  # a link to itself holds nothing
        return
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(str(model))


def test_a_tokenizers_settings_cannot_name_a_file_elsewhere(model, tmp_path):
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    (tmp_path / "secret.json").write_text("{}")
    path.write_text(json.dumps({**settings, "vocab_file": str(tmp_path / "secret.json")}))
    with pytest.raises(SourceError, match="points outside its model folder"):
        load(model)
    path.write_text(json.dumps({**settings, "special_tokens_map_file": "/root/.cache/left/over.json"}))
    load(model)


def test_an_adapter_beside_a_model_is_not_loaded(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    with pytest.raises(SourceError, match="holds an adapter"):
        load(model)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "./config.json", ""])
@pytest.mark.parametrize("field", ["files", "headers", "tensors"])
def test_a_manifest_cannot_name_a_file_elsewhere(name, field, artifact, tmp_path):
    (tmp_path / "secret").write_text("secret")
    manifest = read_manifest(artifact)
    if field == "tensors":
        next(iter(manifest.tensors.values())).file = name
    else:
        getattr(manifest, field)[name] = digest(b"secret")
    (artifact / "quantize8.json").write_bytes(manifest.to_bytes())
    with pytest.raises(ArtifactError, match="has fields of the wrong type"):
        verify(artifact)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "quantize8.json", "new", "folder"]
)
def test_an_artifacts_links_out_of_it_are_refused(name, artifact, tmp_path):
    path = artifact / name
    if path.exists():
        path.rename(tmp_path / name)
    elif name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("x")
    path.symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match="is a link to outside the artifact"):
        verify(artifact)


def test_the_manifests_layout_is_part_of_what_is_verified(artifact):
    """Other text with the same values: an exponent in capitals is one flipped bit."""
    manifest = read_manifest(artifact)
    quantized = next(record.quantized for record in manifest.tensors.values() if record.quantized)
    quantized.relative_error = 1e-05
    path = artifact / "quantize8.json"
    path.write_bytes(manifest.to_bytes())
    verify(artifact)
    good = path.read_bytes()
    for old, new in ((b"1e-05", b"1E-05"), (b"\n", b"\n "), (b"1e-05", b"0.1e-04"), (b'"version"', b'"\\u0076ersion"')):
        path.write_bytes(good.replace(old, new, 1))
        with pytest.raises(ArtifactError, match="own digest"):
            verify(artifact)


# --- the network, and code ---


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_: object) -> None:
        raise AssertionError("went for the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.parametrize("model_type", ["detr", "maskformer", "upernet"])
def test_a_config_cannot_have_a_backbone_looked_for_on_the_hub(model_type, no_network):
    config = {"model_type": model_type, "backbone": "some/model", "use_timm_backbone": False}
    tensors = {"a.weight": TensorInfo("a.weight", "F16", (4, 4), "x")}
    with pytest.raises(SourceError) as caught:
        read_structure(config, tensors)
    assert "network" not in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_cannot_name_kernels_on_the_hub(key, model):
    """transformers downloads and runs them, where the package kernels is installed."""
    for nested in (False, True):
        config = json.loads((model / "config.json").read_text())
        (config.setdefault("text_config", {}) if nested else config)[key] = "evil/kernel"
        with pytest.raises(SourceError, match="names code on the hub"):
            check_settings(config, model / "config.json")


@pytest.mark.filterwarnings("ignore")  # what some configurations say of themselves
def test_the_settings_that_transformers_starts_from_are_within_the_limits():
    """Of every model type: layers are counted from the end (vision_feature_layer -2), and named in lists."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    checked = 0
    for model_type in CONFIG_MAPPING:
        try:
            settings = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # of one that is made of others only
            continue
        check_settings(settings, Path(model_type))
        checked += 1
    assert checked > 500


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "utils", "__name__", "AutoModelForCausalLM"])
def test_an_architecture_is_a_model_class_or_nothing(name, model):
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "architectures": [name]}
    expected = "GPT2LMHeadModel" if name.endswith("ForCausalLM") else "GPT2Model"
    assert type(build_meta_model(config)).__name__ == expected


# --- secrets, and what a terminal would obey ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot use {TOKEN} here", "cannot use *** here"),
        ("https://user:password@host/x", "https://***@host/x"),
        ("https://token@host/x and ftp://a:b@c", "https://***@host/x and ftp://***@c"),
        ("one\n two\r\n\tthree", "one two three"),
        ("a\x1b[2Jb\x07\u202e", "a\\x1b[2Jb\\x07\\u202e"),
        ("x" * 5000, "x" * 2000 + "..."),
    ],
)
def test_messages_are_one_line_without_secrets(text, shown):
    assert str(SourceError(text)) == one_line(text) == shown


def test_the_token_of_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-some-other-form")
    assert str(SourceError("hub: of-some-other-form is wrong")) == "hub: *** is wrong"


def test_a_source_with_a_password_is_not_repeated():
    with pytest.raises(SourceError) as caught:
        open_checkpoint("https://user:secret@host/org/model", token=TOKEN)
    assert "secret" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_token_is_in_no_file_result_or_page(model, tmp_path, monkeypatch):
    from quantize8 import reports
    from quantize8.commands.inspect import inspect
    from quantize8.reports.pages import build

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = convert(str(model), tmp_path / "out", token=TOKEN)
    build.write(str(tmp_path / "page.html"), inspect(str(tmp_path / "out"), token=TOKEN), str(tmp_path / "out"))
    shown = json.dumps(reports.as_json(result)) + repr(asdict(read_manifest(tmp_path / "out")))
    written = b"".join(
        path.read_bytes() for path in [*(tmp_path / "out").rglob("*"), tmp_path / "page.html"] if path.is_file()
    )
    assert TOKEN not in shown and TOKEN.encode() not in written


def test_pickled_errors_keep_their_line():
    assert str(pickle.loads(pickle.dumps(SourceError("a\nb")))) == "a b" and sys.exc_info() == (None, None, None)
