"""Calibration: exactly the planted columns are chosen, and statistics equal those of a plain run of the model."""

import numpy as np
import pytest
import torch
from helpers.making import llama, mixtral, word_tokenizer
from test_encoders import t5
from torch import nn

from quantize8 import SourceError, load
from quantize8.calibration.calibrate import calibrate
from quantize8.calibration.columns import choose_columns
from quantize8.calibration.expected import weight_error
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import read_structure

TEXT = " ".join(f"w{i * i * 7 % 63}" for i in range(100))


def case(columns: int = 256, positions: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [T, K] and a weight [N, K] without outliers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(positions, columns, generator=generator), torch.randn(60, columns, generator=generator)


def test_a_large_column_is_stored_and_comes_first():
    x, weight = case()
    x[:, 17] *= 40
    x[:, 90] *= 20
    columns, exact = choose_columns(x, weight_error(weight))
    assert columns[:2].tolist() == [17, 90] and exact == 2
    assert len(columns) == 256 // 8 and len(set(columns.tolist())) == len(columns)


def test_order_is_by_what_a_column_costs_the_output():
    """The rounding error of the weight counts: a large input that meets exact weights is not worth storing."""
    x, weight = case()
    x[:, 17] *= 40
    weight[:, 17] = 0
    x[:, 200] *= 10
    columns, exact = choose_columns(x, weight_error(weight))
    assert columns[0] == 200 and exact == 1 and 17 in columns.tolist()[1:]  # for it sets the step of the others
    costs = x.double().square().sum(0) * weight_error(weight).squares
    assert columns[:1].tolist() == costs.topk(1).indices.tolist()


def test_frequent_peaks_are_kept_in_the_activation_alone():
    """A column that is the largest of many tokens, and 0 at most others, adds little error through its weight."""
    x, weight = case()
    weight[:, 33] *= 1e-3
    x[::4, 33] = 12
    columns, exact = choose_columns(x, weight_error(weight))
    assert 33 in columns[exact:].tolist() and 33 not in columns[:exact].tolist()


def test_one_massive_token_is_not_everything():
    """It gets its columns, and leaves room for those that are large at other tokens."""
    x, weight = case()
    x[0] = 0
    x[0, 5] = 3000
    x[1::2, 60] = 14
    columns, _ = choose_columns(x, weight_error(weight))
    assert {5, 60} <= set(columns.tolist())
    x[1:, 5] = 0
    weight[:, 5] = 0
    assert {5, 60} <= set(choose_columns(x, weight_error(weight))[0].tolist())


@pytest.mark.parametrize(("width", "count"), [(1, 0), (7, 0), (8, 1), (100, 12), (511, 63), (512, 64), (2000, 64)])
def test_at_most_an_eighth_of_the_columns_and_64(width, count):
    x, weight = case(width, 20)
    columns, exact = choose_columns(x, weight_error(weight))
    assert len(columns) == count and exact <= min(16, count)


def test_at_most_16_are_stored():
    x, weight = case(512)
    x[:, :30] *= 100
    columns, exact = choose_columns(x, weight_error(weight))
    assert exact == 16 and set(columns[:16].tolist()) <= set(range(30)) <= set(columns.tolist())


@pytest.mark.parametrize("most", [0, 1, 5, 256, 1000])
def test_a_number_asked_for_is_stored_whatever_it_is_worth(most):
    x, weight = case()
    x[:, 17] *= 40
    columns, exact = choose_columns(x, weight_error(weight), most)
    assert len(columns) == exact == min(most, 256) and len(set(columns.tolist())) == exact
    assert most == 0 or columns[0] == 17


def test_inputs_of_zeros_need_nothing_stored():
    _, weight = case()
    columns, exact = choose_columns(torch.zeros(5, 256), weight_error(weight))
    assert exact == 0 and len(set(columns.tolist())) == len(columns) == 32
    x, _ = case()
    x[:3] = 0  # some zero tokens
    assert choose_columns(x, weight_error(torch.zeros(60, 256)))[1] == 0


def calibrated(source, text: str = TEXT, **options):
    checkpoint = open_checkpoint(str(source))
    modules = read_structure(checkpoint.config, checkpoint.tensors).linears
    return calibrate(checkpoint, text, modules=[*modules, "lm_head"], **options)


def plainly(source, ids: list[int]):
    """Inputs of all Linear layers by name, as transformers computes them."""
    model, _ = load(source, "cpu", dtype=torch.float32)
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def note(module, inputs, name=name):
                seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return model, seen


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) + 1 for word in text.split()]


def test_statistics_are_those_of_the_model_run_plainly(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", hidden=64))
    found = calibrated(source)
    model, seen = plainly(source, ids_of(TEXT))
    assert set(found) == set(seen) and "lm_head" in found
    for name, entry in found.items():
        x, weight = seen[name], model.get_submodule(name).weight.detach()
        np.testing.assert_allclose(entry.mean_square, x.double().square().mean(0), rtol=1e-5)
        np.testing.assert_array_equal(entry.absmax, x.abs().amax(0))
        columns, exact = choose_columns(x, weight_error(weight))
        assert (entry.columns.tolist(), entry.exact) == (columns.tolist(), exact) and len(columns) == x.shape[1] // 8


def test_a_planted_feature_is_found_in_each_layer_that_reads_it(tmp_path):
    def edit(state):
        for name in list(state):
            if "layernorm" in name:
                state[name][11] = 50

    found = calibrated(word_tokenizer(llama(tmp_path / "source", hidden=64, edit=edit)))
    read = [entry for name, entry in found.items() if name.endswith(("q_proj", "k_proj", "v_proj", "up_proj"))]
    assert len(read) == 8 and all(entry.columns[0] == 11 and entry.exact for entry in read)


def test_only_the_modules_asked_for_and_so_many_columns(tmp_path):
    checkpoint = open_checkpoint(str(word_tokenizer(llama(tmp_path / "source"))))
    name = "model.layers.1.mlp.up_proj"
    found = calibrate(checkpoint, TEXT, 3, modules=[name])
    assert set(found) == {name} and (len(found[name].columns), found[name].exact) == (3, 3)
    assert calibrate(checkpoint, TEXT, modules=[]) == {}


def test_one_token_and_more_than_the_model_takes(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    name = "model.layers.0.self_attn.q_proj"
    _, seen = plainly(source, ids_of("w5"))
    for found in (calibrated(source, "w5"), calibrated(source, "w5 w6 w7", tokens=1)):
        np.testing.assert_array_equal(found[name].absmax, seen[name].abs()[0])
    long = TEXT + " " + TEXT  # 200 tokens, of which the model takes 128
    np.testing.assert_array_equal(
        calibrated(source, long)[name].mean_square, calibrated(source, " ".join(long.split()[:128]))[name].mean_square
    )


def test_modules_that_the_checkpoint_names_otherwise(minilm, tmp_path):
    """An encoder saved without the prefix that its model has, and GPT-2's Conv1D: names are the checkpoint's."""
    checkpoint = open_checkpoint(str(minilm))
    structure = read_structure(checkpoint.config, checkpoint.tensors)
    found = calibrate(checkpoint, "Some text", modules=structure.linears)
    assert set(found) <= {name.removesuffix(".weight") for name in checkpoint.tensors} and len(found) >= 36


def test_names_are_mapped_back_to_the_checkpoint(tmp_path):
    """transformers renames modules on loading; results use the names of the tensors on disk."""
    source = word_tokenizer(mixtral(tmp_path / "mixtral"))
    checkpoint = open_checkpoint(str(source))
    structure = read_structure(checkpoint.config, checkpoint.tensors)
    everything = [*structure.linears, *structure.kept, *structure.experts]
    found = calibrate(checkpoint, TEXT, modules=everything)
    stored = {name.removesuffix(".weight") for name in checkpoint.tensors}
    assert set(found) <= stored and not set(found) & set(structure.experts)
    assert {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"} <= set(found)


def test_what_cannot_be_calibrated_is_said_in_one_line(mgm, tmp_path):
    def spoil(state):
        state["model.layers.0.mlp.up_proj.weight"][5, 5] = float("nan")

    with pytest.raises(SourceError, match="has no tokenizer"):
        calibrated(mgm)
    with pytest.raises(SourceError, match="encoder-decoder"):
        calibrated(word_tokenizer(t5(tmp_path / "t5")[0]))
    with pytest.raises(SourceError, match=r"input of model\.layers\.0\.mlp\.down_proj NaN or infinite") as caught:
        calibrated(word_tokenizer(llama(tmp_path / "nan", edit=spoil)))
    assert "\n" not in str(caught.value)
