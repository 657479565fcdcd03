"""Activation statistics: planted outliers are found where they are, and predicted errors are near measured ones."""

import json
import shlex

import numpy as np
import pytest
import torch
from helpers.making import llama, mixtral, qwen3_moe, word_tokenizer

from quantize8 import Int8Linear, load
from quantize8.calibration.activations import activations, dense_weight, watch
from quantize8.calibration.advice import best_command, recommend
from quantize8.calibration.expected import (
    THRESHOLDS,
    input_errors,
    relative_error,
    rounding_share,
    static_errors,
    weight_error,
    without,
)
from quantize8.calibration.features import (
    MAP_FEATURES,
    LayerInput,
    affected,
    comparable,
    emergent_features,
    feature_map,
)
from quantize8.calibration.outliers import ActivationReport, Choice, StaticColumns, ThresholdReport
from quantize8.kernels import cpu, reference, rounding
from quantize8.reports import as_json
from quantize8.runtime.streaming import streamed
from quantize8.sources import open_checkpoint

LAYERS, TOKENS = 10, 100  # 20 layer inputs: 5 are a quarter, and 120 of 2000 places are 6%
LOUD = {  # features -> in how many layer inputs their gain is large, and the positions where they are not quiet
    3: (5, range(51, 75)),  # 24 positions: both limits met exactly
    7: (4, range(1, 100)),  # just below a quarter of the layer inputs
    11: (20, range(75, 81)),  # 6% of the positions exactly
    13: (20, range(75, 80)),  # just below 6%
    17: (5, range(51, 74)),  # 5.75% on average, over a quarter of the layer inputs
    19: (20, range(1)),  # the first position alone, and there nothing else
    23: (20, range(1, 51)),  # plainly emergent
}


def planted(folder):
    """A Llama whose layers add nothing to the embedding, so that only the gains of norms determine each layer's input.

    A token stands for the features that are loud at it; the others in LOUD are quiet there. Returns the token ids.
    """
    kinds = [frozenset(k for k, (_, where) in LOUD.items() if position in where) for position in range(TOKENS)]
    tokens = {kind: token for token, kind in enumerate(dict.fromkeys(kinds))}

    def edit(state):
        embedding = state["model.embed_tokens.weight"]
        embedding.copy_(torch.ones_like(embedding))
        embedding[:, ::2] = -1
        for kind, token in tokens.items():
            for column in LOUD:
                embedding[token, column] = 1 if column in kind else 0.1
            if 19 in kind:
                embedding[token] = torch.eye(32)[19]
        for name, value in state.items():
            if "o_proj" in name or "down_proj" in name:
                value.zero_()
        norms = [name for name in state if "layers" in name and "norm" in name]
        for column, (count, _) in LOUD.items():
            for name in norms[:count]:
                state[name][column] = 12

    return llama(folder, layers=LAYERS, dtype=torch.float32, edit=edit), torch.tensor([tokens[kind] for kind in kinds])


@pytest.fixture(scope="module")
def planted_report(tmp_path_factory):
    source, ids = planted(tmp_path_factory.mktemp("planted") / "source")
    with streamed(open_checkpoint(str(source))) as model:
        return activations(model, ids, 6.0)


def test_exactly_the_planted_features_are_emergent(planted_report):
    found = {feature.column: feature for feature in planted_report.emergent}
    assert set(found) == {3, 11, 23} and planted_report.layer_inputs == 2 * LAYERS
    assert planted_report.emergent[0].column == 23
    assert (found[3].layers, found[11].layers, found[23].layers) == (0.25, 1.0, 1.0)
    assert (found[3].positions, found[11].positions, found[23].positions) == (0.06, 0.06, 0.5)


def test_layers_and_positions_affected_are_those_of_the_paper(planted_report):
    """Features 23 and 11 at 56 positions of all 20 layer inputs, feature 3 at 24 more positions of 5 inputs."""
    assert planted_report.layers_affected == 1.0
    assert planted_report.positions_affected == (20 * 56 + 5 * 24) / 2000


def test_the_first_position_is_told_apart(planted_report):
    entry = next(entry for entry in planted_report.linears if entry.module == "model.layers.5.self_attn.q_proj")
    assert entry.max == pytest.approx(12 * 32**0.5, rel=1e-3) and entry.max_column == 19
    assert 6 <= entry.max_after_first < 15 and entry.max_after_first_column in (11, 13, 23)
    heat = planted_report.features
    k = heat.columns.index(19)
    assert {row[k] for row in heat.share} == {0.01} and {row[k] for row in heat.share_after_first} == {0.0}
    assert max(row[k] for row in heat.max_after_first) < 2 < min(row[k] for row in heat.max)


def test_the_map_holds_every_planted_feature_where_it_was_planted(planted_report):
    heat = planted_report.features
    assert set(heat.columns) == set(LOUD) and heat.left_out == 0
    assert heat.columns[0] == 23 and heat.columns[-1] == 19  # by the places that they fill
    assert heat.inputs[:2] == ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    for k, column in enumerate(heat.columns):
        count, where = LOUD[column]
        assert [row[k] for row in heat.share] == [len(where) / 100] * count + [0.0] * (20 - count)


def test_a_report_is_json(planted_report):
    value = json.loads(json.dumps(as_json(planted_report)))
    assert value["features"]["columns"][0] == 23 and value["thresholds"][4]["threshold"] == 6.0


def test_a_loaded_model_and_a_streamed_one_give_the_same_report(tmp_path):
    source = llama(tmp_path / "source")
    ids = torch.arange(60)
    whole = activations(load(source, "cpu", dtype="float32")[0], ids, 0.5)
    with streamed(open_checkpoint(str(source))) as model:
        assert activations(model, ids, 0.5) == whole


def test_each_figure_equals_a_count_by_hand(tmp_path):
    model, _ = load(llama(tmp_path / "source", dtype=torch.float32))
    layer = model.model.layers[1].mlp.down_proj
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach().abs().numpy()))
    report = activations(model, torch.arange(30), 0.05, "*.1.mlp.down_proj")
    hook.remove()
    (entry,), (x,) = report.linears, seen
    assert entry.module == "model.layers.1.mlp.down_proj" and (entry.in_features, entry.out_features) == (48, 32)
    assert entry.columns == np.flatnonzero((x >= 0.05).any(0)).tolist() != []
    assert entry.max == x.max() and entry.max_column == x.max(0).argmax()
    assert entry.max_after_first == x[1:].max() and entry.max_after_first_column == x[1:].max(0).argmax()
    assert entry.positions == pytest.approx((x >= 0.05).any(1).mean())
    assert entry.rms == pytest.approx(np.sqrt((x**2).mean()), rel=1e-5)
    for found in entry.thresholds:
        outliers = x >= found.threshold
        assert (found.columns, found.positions) == (outliers.any(0).sum(), outliers.any(1).mean())
        assert found.bytes == 2 * 32 * found.columns


def test_one_token_has_no_later_position(tmp_path):
    with streamed(open_checkpoint(str(llama(tmp_path / "source")))) as model:
        report = activations(model, torch.tensor([5]), 6.0)
    assert {entry.max_after_first for entry in report.linears} == {0.0} and report.tokens == 1
    assert all(entry.error > 0 for entry in report.thresholds)


def hostile_inputs() -> torch.Tensor:
    """Outliers in a column, in single elements, huge ones, a zero row, tiny rows, exact thresholds."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 6
    x[::3, 9] += 9
    x[0, 5], x[5], x[6] = 2e4, 0, 1e-20
    x[8, 11], x[9, 12] = 6.0, -6.0
    return x


def test_errors_of_inputs_are_those_of_their_codes():
    x = hostile_inputs()
    for found, threshold in zip(input_errors(x), THRESHOLDS, strict=True):
        codes, scale, outliers = reference.quantize_activations(x.numpy(), threshold)
        error = x.numpy() - codes * scale[:, None].astype(np.float64)
        error[:, outliers.any(0)] = 0
        assert found.threshold == threshold and found.columns == outliers.any(0).sum()
        assert found.positions == outliers.any(1).mean()
        assert np.allclose(found.squares, (error**2).sum(0), rtol=1e-4, atol=1e-12)


def test_expected_errors_are_near_the_measured_ones():
    """On random layers. On layers of a real model they are closer, as the module says."""
    generator = torch.Generator().manual_seed(1)
    x, weight = hostile_inputs(), torch.randn(80, 96, generator=generator) * 0.1
    weight[:, 7] *= 4
    codes, absmax = (torch.from_numpy(part) for part in cpu.quantize_rowwise(weight.numpy()))
    y, known = x @ weight.t(), x.double().square().sum(0)
    y_energy, rounded = float(y.double().square().sum()), weight_error(weight)
    for found in input_errors(x):
        product = cpu.linear(x, reference.Int8Weight(codes, absmax), None, found.threshold)
        measured = float((product - y).norm() / y.norm())
        assert relative_error(found.squares, known, rounded, y_energy) == pytest.approx(measured, rel=0.15)
    alone = float((x @ (codes.float() * (absmax / 127)[:, None]).t() - y).norm() / y.norm())
    assert relative_error(0.0, known, rounded, y_energy) == pytest.approx(alone, rel=0.15)


def test_a_layer_without_output_has_no_error():
    zero = torch.zeros(4, 8)
    found = input_errors(zero)[0]
    assert relative_error(found.squares, torch.zeros(8).double(), weight_error(torch.ones(3, 8)), 0.0) == 0.0


def test_a_layer_that_cannot_be_int8_is_left_out_of_the_errors(tmp_path):
    def edit(state):
        state["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6

    source = llama(tmp_path / "source", dtype=torch.float32, edit=edit)
    with streamed(open_checkpoint(str(source))) as model:
        report = activations(model, torch.arange(30), 6.0)
    assert [entry.module for entry in report.linears if entry.weight_error is None] == [
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]
    assert all(0 < entry.error < 1 for entry in report.thresholds)


def test_watchers_see_inputs_outputs_and_weights_of_a_streamed_model(tmp_path, mgm):
    for source in (llama(tmp_path / "source"), mgm):
        seen = {}

        def note(name, module, x, y, seen=seen):
            seen[name] = y is not None
            if y is not None:
                bias = 0 if module.bias is None else module.bias
                assert torch.allclose(x @ dense_weight(module).t() + bias, y, atol=1e-5)
            assert x.shape == (20, dense_weight(module).shape[1]) and x.dtype == torch.float32

        with streamed(open_checkpoint(str(source))) as model, watch(model, note), torch.no_grad():
            assert model(torch.arange(5, 25)[None]).logits.shape[1] == 1  # the head computes the last position
        assert [name for name, whole in seen.items() if not whole] == ["lm_head"]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_weights_of_int8_layers_are_dequantized(tmp_path):
    from quantize8 import convert

    convert(str(llama(tmp_path / "source")), tmp_path / "int8")
    report = activations(load(tmp_path / "int8", "cpu")[0], torch.arange(40), 6.0)
    assert len(report.linears) == 15
    assert max(entry.weight_error for entry in report.linears if entry.weight_error is not None) < 1e-3  # its own codes


def test_conv1d_inputs_are_seen(mgm):
    model, _ = load(mgm)
    report = activations(model, torch.arange(5, 25), 6.0)
    assert report.layer_inputs == 16 and len(report.linears) == 33
    entry = next(entry for entry in report.linears if entry.module.endswith("c_attn"))
    assert (entry.in_features, entry.out_features) == (256, 768)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_what_experts_read_is_a_layer_input(make, tmp_path):
    with streamed(open_checkpoint(str(make(tmp_path / "source")))) as model:
        report = activations(model, torch.arange(5, 45), 1.0)
    assert report.features.inputs[1] == "model.layers.0.post_attention_layernorm" and report.layer_inputs == 4


def layer_input(columns: int, over: int, tokens: int = 8) -> LayerInput:
    x = torch.ones(tokens, columns)
    x[:, :over] = torch.arange(7.0, 7.0 + over)
    return LayerInput.of("norm", x, 6.0)


def test_the_map_is_cut_to_the_features_that_fill_most():
    heat = feature_map([layer_input(200, 100)])
    assert len(heat.columns) == MAP_FEATURES and heat.left_out == 100 - MAP_FEATURES
    assert heat.columns[0] == 99  # all fill the same: the largest first


def test_layer_inputs_of_other_shapes_are_left_out():
    inputs = [layer_input(8, 2), layer_input(4, 3), layer_input(8, 2), layer_input(8, 1, tokens=1)]
    assert len(comparable(inputs)) == 2
    assert [feature.column for feature in emergent_features(inputs)] == [0, 1]
    assert affected(inputs, emergent_features(inputs)) == (1.0, 1.0)


def test_no_layer_inputs_have_no_features():
    assert emergent_features([]) == [] and affected([], []) == (0.0, 0.0) and feature_map([]) is None


def table(*errors: float) -> ActivationReport:
    rows = [
        ThresholdReport(2.0 + i, 1000 - i, 10**6 * (10 - i), error, 2 * error, "layer")
        for i, error in enumerate(errors)
    ]
    return ActivationReport(10, 6.0, thresholds=rows, weight_error=0.008)


def test_the_highest_threshold_within_the_budget_is_advised():
    advice = recommend(table(0.010, 0.011, 0.012, 0.013, 0.02, 0.03), 0.012)
    assert (advice.threshold, advice.met) == (4.0, True)
    assert "0.0120 with 998 columns in 16-bit (8.0 MB)" in advice.reason
    assert "the paper's 6 has 0.0200 with 996 columns" in advice.reason
    assert recommend(table(0.01, 0.01, 0.01, 0.01, 0.01), 0.01).reason.count("columns") == 1  # 6 itself


def test_without_one_within_the_budget_the_least_error_is_advised():
    advice = recommend(table(0.010, 0.010, 0.012), 0.009)
    assert (advice.threshold, advice.met) == (3.0, False)
    assert advice.reason.startswith("no threshold keeps the expected error within 0.009; the least is 0.0100")
    assert "0.0080 comes from rounding the weights" in advice.reason


def test_stored_columns_are_advised_where_no_threshold_keeps_the_budget():
    report = table(0.010, 0.010, 0.012)
    report.static = StaticColumns(640, 2 * 10**6, 0.006)
    advice = recommend(report, 0.009)
    assert (advice.calibrate, advice.met) == (True, True)
    assert advice.reason.startswith("0.0060 with 640 columns stored by --calibrate (2.0 MB); no threshold keeps")
    assert not recommend(report, 0.005).met and recommend(report, 0.005).calibrate
    assert not recommend(report, 0.011).calibrate  # a threshold does, and needs no artifact of another kind
    report.static = StaticColumns(640, 2 * 10**6, 0.02)
    assert not recommend(report, 0.009).calibrate


def test_the_expected_error_with_stored_columns_is_near_the_measured_one():
    """Against the reference's mode static, with these columns exact in the activation, and some also in the weight."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 96)).astype(np.float32)
    x[:, [5, 40]] *= [30, 12]
    weight = random.normal(size=(64, 96)).astype(np.float16)
    columns = torch.tensor([5, 40, 7])
    rounded = weight_error(torch.from_numpy(weight).float())
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    energy = torch.from_numpy(x).square().sum(0).double()
    for exact in (0, 1, 3):
        left = without(rounded, columns[:exact])
        squares = static_errors(torch.from_numpy(x), columns)
        expected = relative_error(squares, energy, left, float((y * y).sum()))
        layer = reference.Int8Weight(
            *reference.quantize_rowwise(weight), columns.numpy(), weight[:, columns[:exact].numpy()]
        )
        measured = np.linalg.norm(reference.mixed_matmul(x, layer, None, 6.0, "static") - y) / np.linalg.norm(y)
        assert 0.9 < expected / measured < 1.1
    assert not squares[columns].any()


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs of which few directions have most of the energy, with two outlier features."""
    random = torch.Generator().manual_seed(7)
    few = torch.randn(tokens, 6, generator=random) @ torch.randn(6, columns, generator=random)
    x = few + 0.3 * torch.randn(tokens, columns, generator=random)
    x[:, [5, 40]] *= 30
    return x


def test_the_share_of_chosen_codes_is_near_the_measured_one():
    """Codes are chosen by the first half of the positions, and both errors measured on the second."""
    x, weight = correlated(2048, 64), np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    scales = (np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    gram = np.zeros((64, 64))
    rounding.accumulate(gram, x[:1024].bfloat16().float().numpy())
    chosen = rounding.round_codes(weight, scales, *rounding.factor(gram))
    nearest = rounding.nearest_codes(weight, scales)
    errors = [np.square(x[1024:].numpy() @ (weight - codes * scales).T).sum() for codes in (chosen, nearest)]
    share = rounding_share(x)
    assert share < 0.5 and share == pytest.approx(errors[0] / errors[1], rel=0.25)


@pytest.mark.parametrize("tokens", [0, 1])
def test_too_few_positions_have_no_share(tokens):
    assert rounding_share(torch.ones(tokens, 16)) is None


@pytest.fixture(scope="module")
def chosen_report(tmp_path_factory):
    """The report of a Llama with an outlier feature, and the model."""

    def edit(state):
        for name, value in state.items():
            if "layernorm" in name:
                value[11] = 60

    source = llama(tmp_path_factory.mktemp("choices") / "source", hidden=64, dtype=torch.float32, edit=edit)
    ids = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(3))
    checkpoint = open_checkpoint(str(source))
    with streamed(checkpoint) as model:
        return activations(model, ids, 6.0), source, ids


def test_the_largest_input_before_and_after_rotation(chosen_report):
    report, source, ids = chosen_report
    seen = {}
    with (
        streamed(open_checkpoint(str(source))) as model,
        watch(model, lambda name, module, x, y: seen.update({name: x.numpy()})),
        torch.no_grad(),
    ):
        model(ids[None])
    rotated = {entry.module: entry for entry in report.linears if entry.rotated is not None}
    assert len(rotated) == 14  # all but the head
    for name, entry in rotated.items():
        size = 64 if seen[name].shape[1] == 64 else 16
        turned = np.abs(reference.rotate(seen[name], size)).max()
        assert entry.rotated.size == size and entry.rotated.max == pytest.approx(turned, rel=1e-6)
        assert entry.max == pytest.approx(np.abs(seen[name]).max(), rel=1e-6)
    spread = rotated["model.layers.1.mlp.up_proj"]
    assert spread.rotated.max < spread.max / 3


def test_the_expected_errors_of_choices_are_near_the_measured_ones(chosen_report):
    report, source, ids = chosen_report
    names = [choice.options for choice in report.choices]
    assert names == [
        "--calibrate FILE",
        "--threshold 6",
        "--calibrate FILE --rounding gptq",
        "--rotate",
        "--rotate --calibrate FILE --rounding gptq",
    ]
    measured = {"--rotate": [], "--threshold 6": []}

    def note(name, module, x, y):
        if y is None:
            return
        for options, found in measured.items():
            rotation = reference.rotation_of(x.shape[1]) if options == "--rotate" else 0
            layer = Int8Linear.from_float(module, 6.0, rotation)
            layer.mode = "dynamic"
            found.append(float((layer(x) - y).norm() / y.norm()))

    with streamed(open_checkpoint(str(source))) as model, watch(model, note), torch.no_grad():
        model(ids[None])
    for choice in report.choices:
        if choice.options in measured:
            assert choice.error == pytest.approx(np.mean(measured[choice.options]), rel=0.1)
            assert choice.bytes == 0
    assert report.choices[0].bytes > 0


def test_the_best_command_can_be_run(chosen_report, monkeypatch, tmp_path, capsys):
    from quantize8 import cli

    report, source, _ = chosen_report
    word_tokenizer(source)
    text = tmp_path / "a text.txt"
    text.write_text(" ".join(f"w{i * 7 % 60}" for i in range(200)))
    for choice in report.choices:
        one = ActivationReport(**{**vars(report), "choices": [choice, Choice("worse", choice.error + 1)]})
        command = best_command(one, str(source), str(text))
        assert f"'{text}'" in command or "FILE" not in choice.options
        monkeypatch.setattr("sys.argv", [*shlex.split(command), "--dry-run", "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        assert found["rounding"] == ("gptq" if "gptq" in command else "nearest")
        assert ("--rotate" in command) == ("rotated" in found["format"])
