"""Reading .bin files: values equal torch's, tied weights appear once, and only tensors are ever unpickled."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from quantize8 import SourceError
from quantize8.sources import open_checkpoint


def folder_of(tmp_path, state, config=None, **options):
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    torch.save(state, tmp_path / "pytorch_model.bin", **options)
    return str(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_values_equal_torchs(dtype, zipped, tmp_path):
    state = {
        "a.weight": torch.randn(7, 3).to(dtype),
        "n": torch.tensor(3.0).to(dtype),
        "e": torch.empty(0, 2, dtype=dtype),
    }
    source = folder_of(tmp_path, state, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(source)
    for name, value in state.items():
        rows = len(value) if value.dim() else 1
        got = checkpoint.rows(name, 0, rows)
        assert got.shape == tuple(value.shape)
        if dtype == torch.bfloat16:
            assert got.dtype == ml_dtypes.bfloat16
            got, value = got.astype(np.float32), value.float()
        np.testing.assert_array_equal(got, value.numpy())
    np.testing.assert_array_equal(
        checkpoint.rows("a.weight", 2, 5).astype(np.float32), state["a.weight"][2:5].float().numpy()
    )


def test_transposed_views_are_read_in_their_own_order(tmp_path):
    value = torch.arange(12.0).view(3, 4)
    checkpoint = open_checkpoint(folder_of(tmp_path, {"a": value.T, "b": value}, {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(checkpoint.rows("a", 1, 3), value.T[1:3].numpy())
    np.testing.assert_array_equal(checkpoint.rows("b", 0, 3), value.numpy())


def test_tied_weights_are_one_tensor_unless_the_config_says_otherwise(tmp_path):
    shared = torch.randn(5, 4)
    state = {"wte.weight": shared, "lm_head.weight": shared, "alike.weight": shared.clone()}
    assert list(open_checkpoint(folder_of(tmp_path, state)).tensors) == ["wte.weight", "alike.weight"]
    untied = open_checkpoint(folder_of(tmp_path, state, {"tie_word_embeddings": False}))
    assert list(untied.tensors) == list(state)


def test_many_files_with_an_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weight_map = {}
    for i in range(2):
        torch.save({f"t{i}": torch.full((2,), float(i))}, tmp_path / f"pytorch_model-{i}.bin")
        weight_map[f"t{i}"] = f"pytorch_model-{i}.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert [checkpoint.rows(f"t{i}", 0, 2).tolist() for i in range(2)] == [[0, 0], [1, 1]]
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(SourceError, match=r"pytorch_model-1\.bin: missing"):
        open_checkpoint(str(tmp_path))


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(zipped, tmp_path):
    source = folder_of(tmp_path, {"x": Bomb(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match="objects or code besides tensors") as caught:
        open_checkpoint(source)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [[torch.ones(2)], {"x": torch.ones(2), "y": 3}, torch.ones(2)])
def test_what_is_no_dictionary_of_tensors_is_refused(state, tmp_path):
    with pytest.raises(SourceError, match="not a plain dictionary of tensors"):
        open_checkpoint(folder_of(tmp_path, state))


def test_dtypes_without_a_name_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"complex64, which quantize8 cannot read"):
        open_checkpoint(folder_of(tmp_path, {"x": torch.ones(2, dtype=torch.complex64)}))


@pytest.mark.parametrize("damage", [b"", b"garbage", pickle.dumps({"a": 1}), "truncated"])
def test_damaged_files_are_refused_in_one_line(damage, tmp_path):
    source = folder_of(tmp_path, {"x": torch.ones(1000)})
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000] if damage == "truncated" else damage)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin") as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    source = folder_of(tmp_path / "model", {"x": torch.ones(2)})
    (tmp_path / "model" / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    (tmp_path / "model" / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(source)


def test_a_file_by_its_name(tmp_path):
    folder_of(tmp_path, {"x": torch.ones(2)})
    assert list(open_checkpoint(str(tmp_path / "pytorch_model.bin")).tensors) == ["x"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_modules_own_state_and_parameters_are_read(zipped, tmp_path):
    """state_dict() brings metadata along, and keep_vars parameters."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).half()
    for state in (module.state_dict(), module.state_dict(keep_vars=True), dict(module.named_parameters())):
        checkpoint = open_checkpoint(folder_of(tmp_path, state, _use_new_zipfile_serialization=zipped))
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: tuple(value.shape) for name, value in state.items()
        }
        np.testing.assert_array_equal(checkpoint.rows("0.weight", 0, 2), module[0].weight.detach().numpy())
