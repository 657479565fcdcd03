"""Inspecting: activation figures of a real model agree with known ones, weight figures with the reference."""

import json
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, convert, inspect
from quantize8.calibration.activations import activations, watch
from quantize8.files import TEXT
from quantize8.kernels import cpu, reference
from quantize8.runtime.loading import find_tokenizer
from quantize8.runtime.streaming import streamed
from quantize8.sources import open_checkpoint


@pytest.fixture(scope="module")
def smollm2_report(smollm2):
    return inspect(str(smollm2), text=TEXT)


def of(report, kind):
    return [entry for entry in report.linears if entry.module.endswith(kind)]


def test_feature_247_is_the_emergent_one_of_smollm2(smollm2_report):
    """Known beforehand from hooks written without this code, on the same text and its first 1024 tokens."""
    assert smollm2_report.tokens == 1024 and smollm2_report.layer_inputs == 60
    assert [feature.column for feature in smollm2_report.emergent] == [247]
    assert smollm2_report.emergent[0].max == pytest.approx(11.7, abs=0.05)
    over = [entry for entry in of(smollm2_report, "q_proj") if 247 in entry.columns]
    assert {int(entry.module.split(".")[2]) for entry in over} == {9, 10, *range(12, 25)}


def test_figures_of_smollm2_agree_with_those_known_beforehand(smollm2_report):
    linears = smollm2_report.linears
    assert len(linears) == 211 and sum(bool(entry.columns) for entry in linears) == 100
    share = sum(len(entry.columns) for entry in linears) / sum(entry.in_features for entry in linears)
    assert share == pytest.approx(0.0299, abs=0.0001)
    for kind, hit, most, peak in (("q_proj", 20, 2, 11.7), ("gate_proj", 2, 2, 25.9), ("down_proj", 28, 839, 2338)):
        entries = of(smollm2_report, kind)
        assert sum(bool(entry.columns) for entry in entries) == hit
        assert max(len(entry.columns) for entry in entries) == most
        assert max(entry.max for entry in entries) == pytest.approx(peak, rel=5e-3)
    assert sum(bool(entry.columns) for entry in of(smollm2_report, "o_proj")) == 7


def test_the_artifact_shows_the_same_emergent_feature(smollm2_int8):
    report = inspect(str(smollm2_int8), text=TEXT, layer="*.q_proj")
    assert [feature.column for feature in report.emergent] == [247]
    assert len(report.linears) == 30


def test_hidden_states_of_an_encoder_are_recognized(minilm):
    report = inspect(str(minilm), text=TEXT, tokens=128)
    assert report.layer_inputs == 12  # attention and feed-forward of six layers
    assert len(report.linears) == 37


def test_the_advice_is_a_threshold_within_the_budget(smollm2_report, smollm2):
    """The default budget is what the paper's threshold keeps to; the errors were measured once, see advice.py."""
    errors = {entry.threshold: entry.error for entry in smollm2_report.thresholds}
    assert errors[6.0] == pytest.approx(0.0244, abs=2e-4) and errors[2.0] == pytest.approx(0.0163, abs=2e-4)
    assert list(errors.values()) == sorted(errors.values())
    assert smollm2_report.advice.met and smollm2_report.advice.threshold == 6.0
    assert smollm2_report.weight_error == pytest.approx(0.0086, abs=5e-4)


def test_expected_errors_of_real_layers_are_near_the_measured_ones(smollm2):
    layers, measured = "model.layers.12.*", {}
    with streamed(open_checkpoint(str(smollm2))) as model, torch.no_grad():
        ids = find_tokenizer(open_checkpoint(str(smollm2)))(TEXT.read_text(), return_tensors="pt")["input_ids"][0, :128]

        def measure(name, module, x, y):
            if fnmatchcase(name, layers):
                codes, absmax = map(torch.from_numpy, cpu.quantize_rowwise(module.weight.numpy()))
                product = cpu.linear(x, reference.Int8Weight(codes, absmax), None, 4.0)
                measured[name] = float((product - y).norm() / y.norm())

        with watch(model, measure):
            model(ids[None])
        report = activations(model, ids, 6.0, layers)
    assert len(measured) == len(report.linears) == 7
    for entry in report.linears:
        assert entry.thresholds[2].error == pytest.approx(measured[entry.module], rel=0.1)


def test_layers_are_chosen_before_the_model_runs(smollm2):
    report = inspect(str(smollm2), text=TEXT, tokens=40, layer="*.3.mlp.up_proj", budget=0.001)
    assert [entry.module for entry in report.linears] == ["model.layers.3.mlp.up_proj"]
    assert not report.advice.met and {entry.worst for entry in report.thresholds} == {"model.layers.3.mlp.up_proj"}
    head = inspect(str(smollm2), text=TEXT, tokens=40, layer="lm_head")
    assert head.thresholds == [] and head.advice is None and head.linears[0].in_features == 576


def test_weight_figures_equal_the_reference(tmp_path):
    source = llama(tmp_path / "source")
    (report,) = inspect(str(source), layer="model.layers.0.self_attn.k_proj")
    weight = load_file(source / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].float().numpy()
    codes, absmax = reference.quantize_rowwise(weight)
    stats = reference.column_stats(weight, codes, absmax)
    assert (report.dtype, report.shape) == ("F16", weight.shape)
    assert report.absmax == np.abs(weight).max()
    assert report.rms == pytest.approx(np.sqrt((weight**2).mean()), rel=1e-5)
    assert report.outliers == stats.outliers.sum()
    error = np.linalg.norm(weight - reference.dequantize(codes, absmax)) / np.linalg.norm(weight)
    assert report.relative_error == pytest.approx(error, rel=1e-4)


def test_an_artifact_is_reported_like_its_source(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "out")
    ours, theirs = inspect(str(tmp_path / "out"), layer="model.*"), inspect(str(source), layer="model.*")
    assert [entry.module for entry in theirs if entry.module in {e.module for e in ours}] != []
    by_name = {entry.module: entry for entry in theirs}
    for entry in ours:
        source_entry = by_name[entry.module]
        assert entry.dtype == "I8" and entry.relative_error == source_entry.relative_error
        assert entry.rms == pytest.approx(source_entry.rms, rel=0.01)


def test_an_int8_folder_without_a_manifest_has_no_known_error(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    (tmp_path / "out" / "quantize8.json").unlink()
    assert {entry.relative_error for entry in inspect(str(tmp_path / "out"))} == {None}


def test_gpt2_weights_are_reported_as_linear_ones(mgm):
    reports = {entry.module: entry for entry in inspect(str(mgm))}
    assert reports["transformer.h.0.attn.c_attn"].shape == (768, 256)  # stored [256, 768]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "nothing*"}, "no Linear layer matches"),
        ({"text": "missing.txt"}, "cannot be read as text"),
        ({"text": TEXT, "threshold": 0.0}, "must be positive"),
        ({"text": TEXT, "budget": 0.0}, "budget 0: must be positive"),
        ({"text": TEXT}, "has no tokenizer"),
    ],
)
def test_what_cannot_be_inspected_is_said_in_one_line(options, message, tmp_path):
    source = llama(tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match=message):
        inspect(str(source), **options)


def test_empty_and_binary_texts_are_refused(tmp_path, smollm2):
    for content, message in ((b"  \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(SourceError, match=message):
            inspect(str(smollm2), text=tmp_path / "text")


def test_scales_that_do_not_fit_their_weight_are_refused(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    path, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.SCB"
    state = load_file(path)
    for bad in (state[name][:5], state[name].half(), state[name][:, None]):
        save_file(state | {name: bad.clone()}, path)
        with pytest.raises(SourceError, match=r"up_proj is not int8 \[N, K\] with float32 SCB"):
            inspect(str(tmp_path / "out"))
    del state[name.replace("SCB", "weight")]
    save_file(state, path)
    with pytest.raises(SourceError, match="has SCB but no weight"):
        inspect(str(tmp_path / "out"))


def test_experts_are_reported_one_by_one(tmp_path):
    def edit(state) -> None:
        for name in ("w1", "w2", "w3"):
            state[f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"] = torch.ones(8, 8)

    source = llama(tmp_path / "source", edit=edit)
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    (source / "config.json").write_text(json.dumps(config))
    assert len(inspect(str(source), layer="*.experts.0.w*")) == 3


def test_an_encoder_decoder_is_not_run_on_a_text(tmp_path, minilm):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40000}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    with pytest.raises(SourceError, match="is an encoder-decoder"):
        inspect(str(tmp_path), text=TEXT)


def test_another_quantization_is_not_read_as_weights(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "eetq"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="is quantized by eetq, which is not read"):
        inspect(str(source))
