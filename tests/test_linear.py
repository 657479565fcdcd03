"""Int8Linear in modes static and hybrid: its layout for each mode, and its columns after copying and casting."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from quantize8 import Int8Linear
from quantize8.kernels import reference
from quantize8.kernels.reference import Int8Weight

MODES = ("static", *reference.MODES)
COLUMNS = [7, 39, 0]


def layer(mode: str = "static") -> Int8Linear:
    torch.manual_seed(0)
    source = nn.Linear(40, 24)
    made = Int8Linear.from_float(source)
    made.mode, made.outlier_columns = mode, torch.tensor(COLUMNS, dtype=torch.int32)
    made.outlier_weight = source.weight.detach()[:, COLUMNS[:2]].half()
    return made


def tokens(count: int = 30, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, 40, generator=torch.Generator().manual_seed(seed))
    x[:, COLUMNS[0]] *= 30
    x[3, 20] = 9
    return x


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("count", [5, 30])
def test_static_mode_is_that_of_the_reference(count, unit, monkeypatch):
    if not unit:
        monkeypatch.setattr(Int8Linear, "_packs_for", lambda self, x: False)
    made, x = layer(), tokens(count)
    fields = (made.weight, made.SCB, made.outlier_columns, made.outlier_weight)
    weight = Int8Weight(*(field.detach().clone().numpy() for field in fields))
    exact = reference.linear(x.numpy(), weight, made.bias.detach().numpy(), 6.0, "static")
    with torch.no_grad():
        off = np.linalg.norm(made(x).double().numpy() - exact) / np.linalg.norm(exact)
    assert off < 1e-3


@pytest.mark.parametrize("count", [5, 30])
def test_a_change_of_mode_gives_what_a_new_layer_gives(count):
    x, changed = tokens(count), layer()
    with torch.no_grad():
        for mode in (*MODES, *reversed(MODES), "static"):
            changed.mode = mode
            assert torch.equal(changed(x), layer(mode)(x)), mode


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_hybrid_mode_is_that_of_the_reference_with_and_without_stored_columns(stored, unit, monkeypatch):
    if not unit:
        monkeypatch.setattr(Int8Linear, "_packs_for", lambda self, x: False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 200, generator=generator)
    x[torch.arange(30), torch.arange(30) * 5] = 25
    made = Int8Linear.from_float(nn.Linear(200, 9))
    made.mode = "hybrid"
    columns, exact = torch.zeros(0, dtype=torch.int32), torch.zeros(9, 0, dtype=torch.float16)
    if stored:
        columns = made.outlier_columns = torch.tensor([7, 100], dtype=torch.int32)
        exact = made.outlier_weight = (made.dequantize()[:, [7]] * 1.001).half()
    weight = Int8Weight(made.codes().numpy(), made.SCB.detach().numpy(), columns.numpy(), exact.numpy())
    expected = reference.linear(x.numpy(), weight, made.bias.detach().numpy(), 6.0, "hybrid")
    errors = {}
    with torch.no_grad():
        for made.mode in ("hybrid", "static"):
            errors[made.mode] = np.linalg.norm(made(x).double().numpy() - expected) / np.linalg.norm(expected)
    assert errors["hybrid"] < 2e-3 and errors["static"] > 5 * errors["hybrid"]


def test_a_layer_without_stored_columns_has_no_outliers_in_mode_static():
    made = layer()
    made.outlier_columns = made.outlier_weight = None
    plain = layer("dynamic")
    plain.threshold = 0.0
    with torch.no_grad():
        torch.testing.assert_close(made(tokens()), plain(tokens()))


@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "cpu"])
def test_casting_keeps_scales_and_exact_columns_as_they_are(move):
    made = layer()
    with torch.no_grad():
        expected = made(tokens())
    scale, exact = made.SCB.clone(), made.outlier_weight.clone()
    getattr(made, move)()
    assert made.SCB.dtype == torch.float32 and torch.equal(made.SCB, scale)
    assert made.outlier_weight.dtype == torch.float16 and torch.equal(made.outlier_weight, exact)
    assert made.outlier_columns.dtype == torch.int32 and made.outlier_columns.tolist() == COLUMNS
    made.bias.data = layer().bias.data
    with torch.no_grad():
        assert torch.equal(made(tokens()), expected)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_compute_the_same(how):
    made = layer()
    with torch.no_grad():
        expected = made(tokens())
        other = how(made)
        assert torch.equal(other(tokens()), expected) and torch.equal(made(tokens()), expected)


def test_a_state_dict_holds_no_outlier_columns():
    made = layer()
    with torch.no_grad():
        made(tokens())
    assert sorted(made.state_dict()) == ["SCB", "bias", "weight", "weight_format"]
    made.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(made(tokens()), layer()(tokens()))


def test_threads_may_share_a_layer_even_while_its_mode_changes():
    made, inputs = layer(), [tokens(20, seed) for seed in range(40)]
    expected = {mode: [layer(mode)(x) for x in inputs] for mode in ("static", "dynamic")}

    def compute(item: tuple[int, torch.Tensor]) -> bool:
        with torch.no_grad():
            y = made(item[1])
        return any(torch.allclose(y, found[item[0]], atol=1e-5) for found in expected.values())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, enumerate(inputs)))
        done = pool.map(compute, enumerate(inputs * 1))
        for mode in ("dynamic", "static") * 10:
            made.mode = mode
        assert all(done)
    made.mode = "dynamic"
    assert torch.equal(made.codes(), layer().weight)


@pytest.mark.parametrize("mode", ["static", "hybrid"])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("unit", [True, False])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(length, mode, unit, monkeypatch):
    if not unit:
        monkeypatch.setattr(Int8Linear, "_packs_for", lambda self, x: False)
    made = layer(mode)
    batch = tokens(8 * length).view(8, length, 40)
    batch[3:] *= 10
    with torch.no_grad():
        together = made(batch)
        for i in range(8):
            alone = made(batch[i : i + 1])[0]
            assert torch.equal(alone, together[i])


def test_in_mode_dynamic_a_neighbours_outlier_shows():
    made, batch = layer("dynamic"), torch.randn(2, 20, 40)
    batch[1, 4, 11] = 50
    with torch.no_grad():
        assert not torch.equal(made(batch)[0], made(batch[:1])[0])
