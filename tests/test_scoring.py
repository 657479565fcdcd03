"""Scoring: likelihoods, KL divergence and layer errors against float64 NumPy, on tiny models and planted logits."""

import types

import numpy as np
import pytest
import torch
from helpers.making import llama

from quantize8 import SourceError, convert, load
from quantize8.calibration import scoring
from quantize8.calibration.scoring import compare, compare_continuation, likelihoods


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model in int8 with every layer in int8, and its source, both in float32."""
    folder = tmp_path_factory.mktemp("scoring")
    source = llama(folder / "source", dtype=torch.float32)
    convert(str(source), folder / "int8", recipe="int8-all")
    return load(folder / "int8", "cpu")[0], load(source, "cpu")[0]


def token_ids(count):
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(1))


def log_softmax(model, window):
    """Of each position [T, V], in float64 by NumPy."""
    with torch.inference_mode():
        logits = model(window[None]).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(model, reference, ids, context):
    """The figures of `Pairs` but the layers', in float64."""
    rows = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        q, p = log_softmax(model, window), log_softmax(reference, window)
        for t in range(1, len(window)):
            kl = (np.exp(p[t - 1]) * (p[t - 1] - q[t - 1])).sum()
            target, same = window[t], q[t - 1].argmax() == p[t - 1].argmax()
            rows.append((t, -q[t - 1, target], -p[t - 1, target], kl, same))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("chunk", [1, 64 * 7, 1 << 22])
def test_figures_equal_float64_whatever_the_chunks(pair, chunk, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    model, reference = pair
    ids = token_ids(75)
    found = compare(model, reference, ids, 32)
    positions, nll, reference_nll, kl, same = by_hand(model, reference, ids, 32)
    assert found.positions.tolist() == positions.tolist() == [*range(1, 32), *range(1, 32), *range(1, 11)]
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(found.reference_nll, reference_nll, rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl, atol=1e-6)  # float32 logarithms of about 5, some 1e-7 off
    assert kl.mean() > 1e-4 and found.kl.dtype == np.float64
    assert found.same_top1.tolist() == same.tolist()
    np.testing.assert_array_equal(likelihoods(model, ids, 32), found.nll)


def test_a_model_beside_itself_is_at_no_distance(pair):
    model, _ = pair
    found = compare(model, model, token_ids(70), 32, layers=True)
    assert not found.kl.any() and found.same_top1.all() and (found.nll == found.reference_nll).all()
    assert found.layers == {"model.layers.0": 0, "model.layers.1": 0}


def test_layer_errors_are_over_all_tokens_of_all_windows(pair):
    model, reference = pair
    ids = token_ids(50)
    states = []
    for each in pair:
        with torch.inference_mode():
            parts = [each(part[None], output_hidden_states=True).hidden_states[1:] for part in (ids[:32], ids[32:])]
        states.append([torch.cat(layer, 1).double().numpy() for layer in zip(*parts, strict=True)])
    found = compare(model, reference, ids, 32, layers=True).layers
    assert list(found) == ["model.layers.0", "model.layers.1"]
    for value, h, h_ref in zip(found.values(), *states, strict=True):
        assert value == pytest.approx(np.linalg.norm(h - h_ref) / np.linalg.norm(h_ref), rel=1e-6)
        assert value > 1e-3
    assert compare(model, reference, ids, 32).layers == {}


@pytest.mark.parametrize(("count", "scored"), [(2, 1), (32, 31), (33, 31), (34, 32), (64, 62), (65, 62)])
def test_edges_of_windows(pair, count, scored):
    """A last token alone has nothing before it in its window."""
    assert len(likelihoods(pair[0], token_ids(count), 32)) == scored
    assert len(compare(*pair, token_ids(count), 32).kl) == scored


@pytest.mark.parametrize(("count", "context", "message"), [(0, 32, "fewer than two"), (1, 32, "fewer"), (9, 1, "2 or")])
def test_nothing_to_score(pair, count, context, message):
    with pytest.raises(SourceError, match=message):
        likelihoods(pair[0], token_ids(count), context)
    with pytest.raises(SourceError, match=message):
        compare(*pair, token_ids(count), context)


def test_a_continuation_is_scored_given_all_before_it(pair):
    ids = token_ids(40)
    whole, found = compare(*pair, ids, 40), compare_continuation(*pair, ids, 20)  # over 16, where int8 heads decode
    assert found.positions.tolist() == list(range(20, 40))
    for name in ("nll", "reference_nll", "kl"):  # a head over fewer tokens may sum in another order
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[19:], rtol=1e-4, atol=1e-6)


def test_a_continuation_computes_the_logits_of_its_tokens_only(pair, monkeypatch):
    seen = []
    hooks = [model.register_forward_hook(lambda _, __, output: seen.append(output.logits.shape[1])) for model in pair]
    compare_continuation(*pair, token_ids(40), 30)
    for hook in hooks:
        hook.remove()
    assert seen == [11, 11]


class Planted(torch.nn.Module):
    """A model that returns given logits [T, V]."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, ids, output_hidden_states=False):
        states = (torch.zeros(1, 2, 3),) * 3 if output_hidden_states else ()
        return types.SimpleNamespace(logits=self.logits[None, : ids.shape[1]], hidden_states=states)


def planted(*rows):
    return Planted(np.array(rows, np.float32))


INF, NAN = float("inf"), float("nan")


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log(2 / sqrt 3), which KL(q || p) is not."""
    reference, model = planted([0, 0], [0, 0]), planted([0, np.log(3)], [0, 0])
    found = compare(model, reference, torch.tensor([0, 1]), 8)
    assert found.kl == pytest.approx([np.log(2 / np.sqrt(3))], abs=1e-7)
    assert found.nll == pytest.approx([-np.log(0.75)]) and found.reference_nll == pytest.approx([np.log(2)])
    assert found.same_top1.tolist() == [False]


def test_tokens_that_both_models_mask_add_nothing():
    reference, model = planted([0, 0, -INF], [0, 0, 0]), planted([0, np.log(3), -INF], [0, 0, 0])
    assert compare(model, reference, torch.tensor([0, 1]), 8).kl == pytest.approx([np.log(2 / np.sqrt(3))], abs=1e-7)
    reference = planted([0, 0, -INF], [0, 0, 0])  # what the reference masks alone adds p log p = 0
    assert compare(planted([0, 0, 0], [0, 0, 0]), reference, torch.tensor([0, 1]), 8).kl == pytest.approx([np.log(1.5)])


def test_logits_far_apart_neither_overflow_nor_cancel():
    found = compare(planted([0, 1e4], [0, 0]), planted([1e4, 0], [0, 0]), torch.tensor([0, 1]), 8)
    assert found.kl.tolist() == [1e4] and found.reference_nll.tolist() == [1e4] and found.nll.tolist() == [0]


def test_half_precision_logits_are_widened_before_the_softmax():
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).half()
    ids = torch.arange(5)
    assert likelihoods(Planted(rows), ids, 8).tolist() == likelihoods(Planted(rows.float()), ids, 8).tolist()


@pytest.mark.parametrize("bad", [[NAN, 0, 0], [INF, 0, 0], [-INF, -INF, -INF], [0, -INF, 0]])
def test_logits_that_are_not_finite_are_said_in_one_line(bad):
    good, broken, ids = planted([0, 0, 0], [0, 0, 0]), planted(bad, [0, 0, 0]), torch.tensor([0, 1])
    for call in (lambda: likelihoods(broken, ids, 8), lambda: compare(broken, good, ids, 8)):
        with pytest.raises(SourceError, match="the model gives logits that are NaN or infinite"):
            call()
    with pytest.raises(SourceError, match="the reference gives logits that are NaN or infinite"):
        compare(good, broken, ids, 8)


def test_a_token_that_the_model_alone_masks():
    with pytest.raises(SourceError, match="probability 0 that the reference does not, so KL is infinite"):
        compare(planted([0, 0, -INF], [0, 0, 0]), planted([0, 0, 0], [0, 0, 0]), torch.tensor([0, 1]), 8)


def test_a_last_token_whose_logits_are_not_used_may_be_anything():
    assert likelihoods(planted([0, 0], [NAN, NAN]), torch.tensor([0, 1]), 8) == pytest.approx([np.log(2)])


def test_vocabularies_of_different_sizes():
    with pytest.raises(SourceError, match="vocabulary has 2 tokens, the reference's 3"):
        compare(planted([0, 0], [0, 0]), planted([0, 0, 0], [0, 0, 0]), torch.tensor([0, 1]), 8)


def test_hidden_states_of_different_sizes(pair, tmp_path):
    other, _ = load(llama(tmp_path / "deep", layers=3, dtype=torch.float32), "cpu")
    with pytest.raises(SourceError, match="hidden states of different sizes; leave --layers out"):
        compare(pair[0], other, token_ids(20), 16, layers=True)
    assert len(compare(pair[0], other, token_ids(20), 16).kl) == 18


def test_hidden_states_of_zeros_and_layers_without_a_name():
    """No division by zero; a model without a list of layers has them by number."""
    zeros = planted([0, 0], [0, 0])
    assert compare(zeros, zeros, torch.tensor([0, 1]), 8, layers=True).layers == {"0": 0.0, "1": 0.0}
    assert scoring._ratio(1.0, 0.0) == INF
