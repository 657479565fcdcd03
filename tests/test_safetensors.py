"""Reading safetensors: values equal the library's own, and malformed files or indexes are refused by name."""

import errno
import json
import os
import struct

import numpy as np
import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file, save_file

from quantize8 import SourceError
from quantize8.sources import open_checkpoint
from quantize8.sources.safetensors import read_header

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64]


def folder_of(tmp_path, tensors, name="model.safetensors"):
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / name)
    return tmp_path


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (3, 2, 4)])
def test_values_equal_the_librarys(dtype, shape, tmp_path):
    value = torch.randn(shape, dtype=torch.float64).mul(50).to(dtype)
    checkpoint = open_checkpoint(str(folder_of(tmp_path, {"x": value, "other": torch.ones(3)})))
    rows = shape[0] if shape else 1
    got = checkpoint.rows("x", 0, rows)
    assert got.shape == shape and got.tobytes() == bits(value)
    if rows > 2:
        assert checkpoint.rows("x", 1, rows - 1).tobytes() == bits(value[1 : rows - 1])


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_blocks_join_to_the_whole(multiple, size, tmp_path):
    value = torch.randn(133, 9)
    checkpoint = open_checkpoint(str(folder_of(tmp_path, {"x": value})))
    blocks = list(checkpoint.blocks("x", size, multiple))
    np.testing.assert_array_equal(np.concatenate(blocks), value.numpy())
    assert all(len(block) % multiple == 0 for block in blocks[:-1])


def test_many_files_with_and_without_an_index(tmp_path):
    source = llama(tmp_path / "source", shards=3)
    indexed = open_checkpoint(str(source))
    (source / "model.safetensors.index.json").unlink()
    found = open_checkpoint(str(source))
    assert list(indexed.tensors.values()) == list(found.tensors.values())
    for path in source.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert indexed.tensors[name].file == path.name
            assert indexed.rows(name, 0, len(value)).tobytes() == bits(value)


def write(path, header, data: bytes, length: int | None = None) -> None:
    """A safetensors file written by hand, with any errors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_tensors_come_in_the_order_of_storage(tmp_path):
    places = {"b": [4, 8], "a": [8, 12], "c": [0, 4]}
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in places.items()}
    write(tmp_path / "model.safetensors", header, bytes(12))
    (tmp_path / "config.json").write_text("{}")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["c", "b", "a"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "length over the file": ({"x": ENTRY}, bytes(8), 10_000),
    "length over all memory": ({"x": ENTRY}, bytes(8), 2**63),
    "length too short": ({"x": ENTRY}, bytes(8), 5),
    "data missing": ({"x": ENTRY}, bytes(7), None),
    "data left over": ({"x": ENTRY}, bytes(9), None),
    "overlap": ({"x": ENTRY, "y": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), None),
    "gap": ({"x": ENTRY, "y": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20), None),
    "size unlike the shape": ({"x": {**ENTRY, "shape": [3]}}, bytes(8), None),
    "negative": ({"x": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), None),
    "unknown dtype": ({"x": {**ENTRY, "dtype": "Q7"}}, bytes(8), None),
    "no JSON": (b"{x", bytes(8), None),
    "no object": (b"[1]     ", bytes(8), None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, *LIES[lie])
    with pytest.raises(SourceError, match=r"model\.safetensors: not a whole safetensors file") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\xff" * 8])
def test_files_too_short_for_a_header(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_dtype_of_less_than_a_byte_is_named(tmp_path):
    write(tmp_path / "model.safetensors", {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="x has dtype F4"):
        open_checkpoint(str(tmp_path))


def test_a_file_cut_while_it_is_read(tmp_path):
    checkpoint = open_checkpoint(str(folder_of(tmp_path, {"x": torch.ones(1000)})))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(SourceError, match="x ends early"):
        checkpoint.rows("x", 0, 1000)


def test_a_disk_that_cannot_read(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(folder_of(tmp_path, {"x": torch.ones(1000)})))

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SourceError, match="x cannot be read"):
        checkpoint.rows("x", 0, 1000)


def test_the_same_tensor_in_two_files(tmp_path):
    folder_of(tmp_path, {"x": torch.ones(2)}, "a.safetensors")
    folder_of(tmp_path, {"x": torch.zeros(2)}, "b.safetensors")
    with pytest.raises(SourceError, match=r"x is also in a\.safetensors"):
        open_checkpoint(str(tmp_path))


def edit_index(source, change) -> None:
    path = source / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}), "outside the model"),
        (lambda index: index["weight_map"].update({"model.norm.weight": "/etc/passwd"}), "outside the model"),
        (lambda index: index["weight_map"].update({"model.norm.weight": 7}), "outside the model"),
        (lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}), "ghost is in"),
        (lambda index: index["weight_map"].update({"x": "model-00009-of-00002.safetensors"}), "00009.*missing"),
        (lambda index: index.update(weight_map=[]), "has no weight_map"),
        (lambda index: index.pop("weight_map"), "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(change, message, tmp_path):
    source = llama(tmp_path / "source", shards=2)
    edit_index(source, change)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(str(source))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_an_index_that_is_no_json_object(content, tmp_path):
    source = llama(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"index\.json"):
        open_checkpoint(str(source))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(name, tmp_path):
    source = llama(tmp_path / "source")
    (source / name).rename(tmp_path / "outside")
    (source / name).symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(str(source))


def test_a_linked_tokenizer_is_not_copied_out(tmp_path):
    source = llama(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(str(source)).write_companions(tmp_path / "out")


def test_the_hub_caches_links_are_followed(tmp_path):
    real = llama(tmp_path / "real")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in real.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert "model.norm.weight" in open_checkpoint(str(snapshot)).tensors
