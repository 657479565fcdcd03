"""The positions of tensors in the weight files."""

import json

import pytest

from quantize8 import OutputError
from quantize8.artifact.layout import OutTensor, index, parse_size, plan_shards


def groups(*sizes):
    return [
        [OutTensor(f"t{i}.weight", "I8", (size,)), OutTensor(f"t{i}.SCB", "F32", (1,))] for i, size in enumerate(sizes)
    ]


def test_a_modules_tensors_stay_in_one_file():
    shards = plan_shards(groups(90, 90, 10, 300), "100B")
    assert [sorted(tensor.name for tensor in shard.tensors) for shard in shards] == [
        ["t0.SCB", "t0.weight"],
        ["t1.SCB", "t1.weight"],
        ["t2.SCB", "t2.weight"],
        ["t3.SCB", "t3.weight"],  # larger than a file may be: alone
    ]
    assert next(shard.file for shard in shards) == "model-00001-of-00004.safetensors"


def test_offsets_tile_the_file_and_are_aligned():
    (shard,) = plan_shards(groups(3, 5, 7), "1GB")
    header = json.loads(shard.header[8:])
    assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8 and len(shard.header) % 8 == 0
    position = 0
    for tensor in shard.tensors:
        begin, end = header[tensor.name]["data_offsets"]
        assert begin == position and end - begin == tensor.nbytes
        assert shard.offsets[tensor.name] == begin + len(shard.header)
        assert begin % {"F32": 4, "I8": 1}[tensor.dtype] == 0
        position = end
    assert shard.nbytes == len(shard.header) + position


def test_one_file_needs_no_index_and_several_have_one():
    assert index(plan_shards(groups(10, 10), "1GB")) == {}
    shards = plan_shards(groups(10, 10), "14B")
    (content,) = index(shards).values()
    value = json.loads(content)
    assert value["metadata"]["total_size"] == 28
    assert value["weight_map"]["t1.SCB"] == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("7", 7), (" 3MB ", 3 * 10**6)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "0GB", "1e9", "5 5GB", "5GBB", "0.0001KB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OutputError, match="not a size"):
        parse_size(text)
