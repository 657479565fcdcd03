"""Int8 with scales by group: the kernel against its definition, and what is written against the loaders' own."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from helpers.artifacts import check_same_logits
from helpers.making import llama, mixtral, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantize8 import ArtifactError, OutputError, SourceError, WeightError, convert, inspect, load, verify
from quantize8.kernels import cpu, groups
from quantize8.sources import open_checkpoint

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
G32 = {"format": "compressed-tensors", "scheme": "w8a16", "group_size": 32}
MODULE = "model.layers.0.mlp.up_proj"
IDS = torch.arange(2, 42)[None]


@pytest.fixture(params=["generic", cpu.available()[0]])
def way(request, monkeypatch):
    monkeypatch.setattr(cpu, "chosen", lambda: request.param)


def hostile(rows=64, columns=256):
    """Groups of all magnitudes, zeros, ties, and scales that are subnormal in float16 or round to 0."""
    rng = np.random.default_rng(1)
    values = rng.standard_t(2, (rows, columns)) * 10.0 ** rng.integers(-9, 3, (rows, 1))
    values[0] = 0
    values[1] = rng.integers(-254, 255, columns) / 2
    values[2, :128] = 0
    values[3] = 2.0**-24 * 127 * 1.4  # a scale of 1.4 steps
    return values.astype(np.float32)


def defined(values, size, dtype):
    """One group at a time, in Python's numbers as far as they go."""
    rows, columns = values.shape
    codes, scales = np.zeros((rows, columns), np.int8), np.zeros((rows, columns // size), dtype)
    for n in range(rows):
        for g in range(columns // size):
            group = values[n, g * size : (g + 1) * size]
            absmax = np.abs(group).max()
            scale = (absmax / np.float32(127)).astype(dtype)
            if absmax and not float(absmax) < 127.5 * float(scale):
                scale = np.nextafter(scale, dtype(1))
            scales[n, g] = scale
            with np.errstate(over="ignore", divide="ignore"):
                inverse = np.float32(1) / np.float32(scale)
            if np.isfinite(inverse):
                scaled = [float(np.float32(value) * inverse) for value in group]
                codes[n, g * size : (g + 1) * size] = [np.copysign(np.floor(abs(x) + 0.5), x) for x in scaled]
    return codes, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_equals_its_definition(size, dtype, way):
    values = hostile()
    codes, scales = groups.quantize_rows(values, size, np.dtype(dtype))
    expected = defined(values, size, dtype)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(codes, expected[0])
    assert abs(codes).max() == 127 and scales.dtype == dtype
    squares, errors = groups.row_errors(values, codes, scales)
    difference = values - codes * np.repeat(scales.astype(np.float32), size, axis=1)
    np.testing.assert_allclose(errors, np.square(difference, dtype=np.float64).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(squares, np.square(values, dtype=np.float64).sum(axis=1), rtol=1e-12)
    fit = scales.astype(np.float32) >= 2.0**-14
    steps = np.abs(difference.reshape(*scales.shape, size)).max(axis=2)[fit] / scales.astype(np.float32)[fit]
    assert steps.max() < 0.5 + 127 * 2.0**-9  # half a step, and what rounding the scale to 8 bits may add


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_scale(bad, dtype, way):
    values = hostile()
    values[5, 40] = bad
    _, scales = groups.quantize_rows(values, 32, np.dtype(dtype))
    fit = np.isfinite(scales.astype(np.float32))
    assert not fit[5, 1] and fit.sum() == fit.size - 1


def test_what_float16_cannot_hold_has_no_scale(way):
    values = np.full((1, 64), 65504 * 127, np.float32)
    values[0, 32] *= 1.1
    _, scales = groups.quantize_rows(values, 32, np.dtype(np.float16))
    assert scales.tolist() == [[65504, np.inf]]


def test_a_scale_that_loses_nothing_is_taken_where_there_is_one(way):
    values = np.tile(np.array([0.5, 1, 1.5, 2, 3, 4, 6, -6], np.float32), (2, 8))
    values[0, 32:] *= 2.0**-9
    values[1, 7] = 5.03
    codes, scales = groups.quantize_rows(values, 32, np.dtype(ml_dtypes.bfloat16), exact=True)
    assert scales.astype(np.float32).tolist() == [[2**-4, 2**-13], [np.float32(ml_dtypes.bfloat16(6 / 127)), 2**-4]]
    assert codes[0].tolist() == [8, 16, 24, 32, 48, 64, 96, -96] * 8
    assert groups.row_errors(values, codes, scales)[1][0] == 0 < groups.row_errors(values, codes, scales)[1][1]


def wide(folder, dtype=torch.bfloat16, hidden=128):
    return llama(folder, dtype=dtype, hidden=hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_is_written_is_what_the_package_and_we_read(size, dtype, tmp_path):
    source = wide(tmp_path / "source", dtype)
    result = convert(str(source), tmp_path / "out", **{**G32, "group_size": size})
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert "model.layers.0.mlp.down_proj" in result.plan.kept and MODULE in result.plan.modules
    kind = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}[dtype]
    codes, scales = groups.quantize_rows(original[f"{MODULE}.weight"].float().numpy(), size, np.dtype(kind))
    assert stored[f"{MODULE}.weight_scale"].dtype == dtype
    assert np.array_equal(stored[f"{MODULE}.weight_scale"].float().numpy(), scales.astype(np.float32))
    theirs = CompressedTensorsDequantizer(tmp_path / "out", dtype=torch.float32).process(dict(stored))
    ours = open_checkpoint(str(tmp_path / "out"))
    for name in original:
        values = torch.from_numpy(ours.rows(name, 0, len(original[name])).astype(np.float32))
        assert torch.equal(theirs[name].to(dtype), values.to(dtype)), name  # it multiplies in the model's dtype
    by_hand = codes * np.repeat(scales.astype(np.float32), size, axis=1)
    assert np.array_equal(ours.rows(f"{MODULE}.weight", 0, len(by_hand)), by_hand)
    record = result.manifest.tensors[f"{MODULE}.weight_packed"].quantized
    weight = original[f"{MODULE}.weight"].double().numpy()
    assert record.relative_error == pytest.approx(np.linalg.norm(weight - by_hand) / np.linalg.norm(weight), abs=1e-8)
    assert record.absmax_range == (0, np.abs(weight).max()) and verify(tmp_path / "out").tensors
    assert result.as_json()["exact"] is None


def test_transformers_computes_the_same(tmp_path):
    source = wide(tmp_path / "source", torch.float32)
    convert(str(source), tmp_path / "out", **G32)
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = entry["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["num_bits"]) == ("group", 32, 8)
    check_same_logits(tmp_path / "out", tmp_path / "float", IDS)


def test_experts_have_groups_too(tmp_path):
    source = mixtral(tmp_path / "source", inner=64)
    convert(str(source), tmp_path / "out", **G32, moe="transformers")
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    packed, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    with torch.inference_mode():
        assert (packed.eval()(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm() < 1e-6
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {stored[n].shape[1] for n in stored if n.endswith("weight_scale") and ".experts." in n} == {1, 2}


def test_experts_of_a_layer_have_groups_all_or_none(tmp_path):
    """Here groups do not divide the columns of w2, and loaders fuse the experts of a layer."""
    plan = convert(str(mixtral(tmp_path / "source", inner=48)), tmp_path / "out", **G32, dry_run=True).plan
    assert len(plan.modules) == 8 and not [name for name in plan.modules if ".experts." in name]
    reasons = {plan.kept[f"model.layers.0.block_sparse_moe.experts.1.{name}"] for name in ("w1", "w2", "w3")}
    assert reasons == {
        "vLLM fuses it with one of a layer's experts that stays in floating point",
        "48 columns, which groups of 32 do not divide",
    }


def test_inspect_reports_the_error_of_the_conversion(tmp_path):
    manifest = convert(str(wide(tmp_path / "source")), tmp_path / "out", **G32).manifest
    (report,) = inspect(str(tmp_path / "out"), layer=MODULE)
    assert report.relative_error == manifest.tensors[f"{MODULE}.weight_packed"].quantized.relative_error


def test_load_computes_with_the_dequantized_weights(tmp_path):
    convert(str(word_tokenizer(wide(tmp_path / "source"))), tmp_path / "out", **G32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours, _ = load(str(tmp_path / "out"))
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, packed(IDS).logits)


def test_codes_of_an_int8_source_are_kept(tmp_path):
    source = wide(tmp_path / "source")
    convert(str(source), tmp_path / "int8")
    result = convert(str(tmp_path / "int8"), tmp_path / "out", **G32)
    before, after = load_file(tmp_path / "int8" / "model.safetensors"), open_checkpoint(str(tmp_path / "out"))
    codes = after.encodings[f"{MODULE}.weight"].codes(0, 48)
    assert np.array_equal(codes, before[f"{MODULE}.weight"].numpy())
    scales = after.encodings[f"{MODULE}.weight"].scales(0, 48)
    expected = (before[f"{MODULE}.SCB"] / 127).bfloat16().float().numpy()
    assert np.array_equal(scales, np.repeat(expected[:, None], 4, axis=1))
    assert 0 < result.errors[f"{MODULE}.weight_packed"].relative_error < 2**-8  # the scale in bfloat16
    verify(tmp_path / "out")


def test_columns_that_groups_do_not_divide_stay_in_float(tmp_path):
    plan = convert(str(wide(tmp_path / "source")), tmp_path / "out", **G32, dry_run=True).plan
    assert plan.kept["model.layers.0.mlp.down_proj"] == "48 columns, which groups of 32 do not divide"
    with pytest.raises(SourceError, match="none of its weights would become int8"):
        convert(str(llama(tmp_path / "narrow", hidden=36)), tmp_path / "out", **G32)


@pytest.mark.parametrize("given", [{"scale": "mse"}, {"calibrate": "text.txt"}])
def test_what_is_defined_for_rows_alone_is_refused(given, tmp_path):
    with pytest.raises(OutputError, match=r"^(scale mse|calibrate text.txt): --format .* --group-size 32 does not"):
        convert(str(wide(tmp_path / "source")), tmp_path / "out", **G32, **given)


def spoiled(value, dtype):
    def edit(state):
        state[f"{MODULE}.weight"] = state[f"{MODULE}.weight"].to(dtype)
        state[f"{MODULE}.weight"][7, 100] = value

    return edit


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 7 holds NaN or infinity"), (1e7, "row 7 holds a value too large for a scale in F16")],
)
def test_what_has_no_scale_is_refused_with_its_row(value, message, tmp_path):
    source = llama(tmp_path / "source", hidden=128, edit=spoiled(value, torch.float32))
    with pytest.raises(WeightError, match=message):
        convert(str(source), tmp_path / "out", **G32)


@pytest.mark.parametrize("value", [-1.0, np.inf])
def test_verify_refuses_a_scale_that_quantization_never_gives(value, tmp_path):
    convert(str(wide(tmp_path / "source")), tmp_path / "out", **G32)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state[f"{MODULE}.weight_scale"][3, 1] = value
    save_file(state, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError):
        verify(tmp_path / "out")


def test_verify_tells_codes_without_a_scale(tmp_path):
    from quantize8.commands.verify import _check_codes

    convert(str(wide(tmp_path / "source")), tmp_path / "out", **G32)
    encoding = open_checkpoint(str(tmp_path / "out")).encodings[f"{MODULE}.weight"]
    _check_codes(encoding, 0, 48, "x")
    encoding.whole(f"{MODULE}.weight_scale")[3, 1] = 0
    with pytest.raises(ArtifactError, match="contains codes that quantization never produces"):
        _check_codes(encoding, 0, 48, "x")
