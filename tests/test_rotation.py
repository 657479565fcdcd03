"""Rotated artifacts: the transform_config as compressed-tensors applies it, read again in any format, and run."""

import json
import re

import numpy as np
import pytest
import torch
from compressed_tensors.transform import TransformConfig, TransformFactory, TransformLocation
from compressed_tensors.utils import match_named_modules
from helpers.making import SIZES, llama, mixtral, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from quantize8 import OutputError, SourceError, WeightError, convert, load, verify
from quantize8.kernels import cpu, reference
from quantize8.runtime.linear import Int8Linear
from quantize8.runtime.training import requantize
from quantize8.sources import open_checkpoint

IDS = torch.arange(2, 42)[None]
ROTATED = {"format": "compressed-tensors", "rotate": 256}
# hidden 64 in blocks of 64, the inputs of down_proj (272) in blocks of 16
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 272}


@pytest.fixture
def source(tmp_path):
    """A Llama whose inputs have outliers: some gains of its norms are large."""
    folder = saved(tmp_path / "source", LlamaForCausalLM, **WIDE)
    state = load_file(folder / "model.safetensors")
    for name, value in state.items():
        if name.endswith("layernorm.weight"):
            value[5] = 40
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def all_rows(checkpoint, name):
    return checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])


def transform_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_codes_are_those_of_the_rotated_weight(scheme, source, tmp_path):
    result = convert(str(source), tmp_path / "out", **ROTATED, scheme=scheme)
    original, ours = load_file(source / "model.safetensors"), open_checkpoint(str(tmp_path / "out"))
    assert len(result.plan.rotations) == 14 and set(result.plan.rotations.values()) == {16, 64}
    for name, size in result.plan.rotations.items():
        weight = original[name].float().numpy()
        turned = reference.rotate(weight, size)
        codes, absmax = reference.quantize_rowwise(turned)
        stored = ours.int8_rows(name, 0, len(codes))
        np.testing.assert_array_equal(stored[0], codes)
        np.testing.assert_array_equal(stored[1], absmax)
        info = ours.tensors[name]
        assert (info.rotation, info.is_int8, info.stored_dtype) == (size, False, "I32" if scheme == "w8a16" else "I8")
        np.testing.assert_array_equal(all_rows(ours, name), reference.rotate(reference.dequantize(codes, absmax), size))
        error = np.linalg.norm(all_rows(ours, name) - weight) / np.linalg.norm(weight)
        assert 0.001 < error < 0.01
    verify(tmp_path / "out")


def test_compressed_tensors_rotates_the_inputs_of_the_same_layers_by_the_same_matrix(source, tmp_path):
    """Its transforms, applied to a model with the rotated weights, give the outputs of the weights as we read them."""
    plan = convert(str(source), tmp_path / "out", **ROTATED).plan
    ours = open_checkpoint(str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, size in plan.rotations.items():
        rows = torch.from_numpy(all_rows(ours, name))
        plain.get_parameter(name).data.copy_(rows)
        model.get_parameter(name).data.copy_(torch.from_numpy(reference.rotate(rows.numpy(), size)))
    config = TransformConfig.model_validate(transform_config(tmp_path / "out"))
    for name, scheme in config.config_groups.items():
        online = [each for each in scheme.apply if each.location == TransformLocation.INPUT]
        targets = {found for each in online for found, _ in match_named_modules(model, each.targets, each.ignore)}
        size = scheme.head_dim
        assert targets == {each.removesuffix(".weight") for each, by in plan.rotations.items() if by == size}
        factory = TransformFactory.from_scheme(scheme.model_copy(update={"apply": online}), name=name)
        factory.apply_to_model(model, use_tqdm=False)
    with torch.inference_mode():
        expected, actual = plain(IDS).logits, model(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert (expected - AutoModelForCausalLM.from_pretrained(source)(IDS).logits).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_our_loader_rotates(scheme, source, tmp_path):
    convert(str(source), tmp_path / "out", **ROTATED, scheme=scheme)
    convert(str(source), tmp_path / "plain", format="compressed-tensors", scheme=scheme)
    reference_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model, plain = (load(tmp_path / name, "cpu", dtype="float32", threshold=0)[0] for name in ("out", "plain"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    assert {layer.rotation for layer in layers.values()} == {16, 64} and len(layers) == 14
    with torch.inference_mode():
        expected = reference_model(IDS).logits
        errors = [float((each(IDS).logits - expected).norm() / expected.norm()) for each in (model, plain)]
    assert 0 < errors[0] < 0.7 * errors[1]  # what rotation gains where inputs have outliers
    weights = load_file(source / "model.safetensors")
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].float()
        assert (layer.dequantize() - weight).norm() / weight.norm() < 0.01


def test_another_format_gets_the_weights_in_their_own_basis(source, tmp_path):
    convert(str(source), tmp_path / "out", **ROTATED)
    original = load_file(source / "model.safetensors")
    for target in ({"format": "float32"}, {"format": "bitsandbytes"}, {"format": "compressed-tensors"}):
        folder = tmp_path / target["format"]
        result = convert(str(tmp_path / "out"), folder, **target)
        assert not result.plan.carries and "transform_config" not in (folder / "config.json").read_text()
        again = open_checkpoint(str(folder))
        for name in result.plan.rotations or original:
            weight = original[name].float().numpy()
            assert np.linalg.norm(all_rows(again, name) - weight) <= 0.02 * np.linalg.norm(weight), name


def test_a_rotated_artifact_of_int8_requantizes(source, tmp_path):
    convert(str(source), tmp_path / "int8")
    result = convert(str(tmp_path / "int8"), tmp_path / "out", **ROTATED)
    assert not result.plan.carries
    ours, theirs = open_checkpoint(str(tmp_path / "out")), open_checkpoint(str(tmp_path / "int8"))
    for name in result.plan.rotations:
        expected = all_rows(theirs, name)
        assert np.linalg.norm(all_rows(ours, name) - expected) < 0.01 * np.linalg.norm(expected)


def test_transformers_refuses_the_artifact_and_the_manifest_says_so(source, tmp_path):
    plan = convert(str(source), tmp_path / "out", **ROTATED).plan
    assert plan.closed_to == {"transformers": "it does not rotate inputs"}
    with pytest.raises(ValueError, match=r"requires_transform_config\n *Extra inputs are not permitted"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_vllm_cannot_rotate_the_inputs_of_layers_with_a_bias(tmp_path):
    source = saved(tmp_path / "source", Qwen2ForCausalLM, **WIDE)
    plan = convert(str(source), tmp_path / "out", **ROTATED).plan
    assert plan.closed_to["vllm"] == (
        "it cannot rotate the inputs of layers with a bias, such as model.layers.0.self_attn.k_proj"
    )
    assert "vLLM" not in (tmp_path / "out" / "quantize8.json").read_text()


def test_experts_and_the_head_are_not_rotated(tmp_path):
    plan = convert(str(mixtral(tmp_path / "source", inner=64)), tmp_path / "out", **ROTATED, recipe="int8-all").plan
    assert plan.rotations and not any("expert" in name or "lm_head" in name for name in plan.rotations)
    config = TransformConfig.model_validate(transform_config(tmp_path / "out"))
    targets = [each for scheme in config.config_groups.values() for part in scheme.apply for each in part.targets]
    assert all(re.fullmatch(r"re:\.\*layers\\\.\\d\+\\\.self_attn\\\.[qkvo]_proj\$", each) for each in targets)


def test_layers_that_stay_in_float_are_exceptions(source, tmp_path):
    (tmp_path / "mine.toml").write_text("threshold = 6.0\nskip = ['model.layers.1.mlp.down_proj']\n")
    convert(str(source), tmp_path / "out", **ROTATED, recipe=str(tmp_path / "mine.toml"))
    (scheme,) = (
        each for each in transform_config(tmp_path / "out")["config_groups"].values() if each["head_dim"] == 16
    )
    assert {tuple(each["ignore"]) for each in scheme["apply"]} == {("model.layers.1.mlp.down_proj",)}
    assert open_checkpoint(str(tmp_path / "out")).tensors["model.layers.1.mlp.down_proj.weight"].rotation == 0


def test_groups_can_be_rotated(tmp_path):
    source = saved(tmp_path / "source", LlamaForCausalLM, **SIZES | {"hidden_size": 64, "intermediate_size": 256})
    result = convert(str(source), tmp_path / "out", **ROTATED, scheme="w8a16", group_size=32)
    ours, original = open_checkpoint(str(tmp_path / "out")), load_file(source / "model.safetensors")
    for name in result.plan.rotations:
        weight = original[name].float().numpy()
        assert 0.001 < np.linalg.norm(all_rows(ours, name) - weight) / np.linalg.norm(weight) < 0.006


def test_rows_are_rotated_the_same_in_blocks_of_any_size(source, tmp_path):
    convert(str(source), tmp_path / "out", **ROTATED)
    ours = open_checkpoint(str(tmp_path / "out"))
    name = "model.layers.0.mlp.down_proj.weight"
    parts = [ours.rows(name, start, min(start + 7, 64)) for start in range(0, 64, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), all_rows(ours, name))


@pytest.mark.parametrize("rotate", [64, 16])
def test_smaller_blocks_can_be_asked_for(rotate, source, tmp_path):
    plan = convert(str(source), tmp_path / "out", format="compressed-tensors", rotate=rotate).plan
    assert max(plan.rotations.values()) == rotate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "bitsandbytes", "rotate": 256}, r"^rotate 256: needs --format compressed-tensors; leave it out"),
        ({"format": "gguf", "rotate": 64}, r"^rotate 64: needs --format compressed-tensors"),
        ({**ROTATED, "rotate": 128}, r"^rotate 128: unknown; name one of 256, 64, 16"),
        ({**ROTATED, "calibrate": "text.txt"}, r"--rotate 256 does not store outlier columns; leave it out$"),
        ({**ROTATED, "calibrate": "text.txt", "smooth": 0.5}, r"^(smooth|calibrate)"),
    ],
)
def test_what_does_not_fit_is_refused(given, message, source, tmp_path):
    with pytest.raises(OutputError, match=message):
        convert(str(source), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_block_that_fits_is_refused(tmp_path):
    source = llama(tmp_path / "source", hidden=36)
    with pytest.raises(OutputError, match=r"^rotate 256: no layer has a multiple of 16 inputs"):
        convert(str(source), tmp_path / "out", **ROTATED, recipe=str(skipping_down(tmp_path)))


def skipping_down(folder):
    path = folder / "mine.toml"
    path.write_text("threshold = 6.0\nskip = ['*.down_proj']\n")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scheme: scheme.update(type="random-hadamard"), "random-hadamard transform of input that is not read"),
        (lambda scheme: scheme.update(randomize=True), "transform of input that is not read"),
        (lambda scheme: scheme.update(head_dim=None), "that is not read"),
        (lambda scheme: scheme.update(head_dim=32), "that is not read"),
        (lambda scheme: scheme.update(apply=None), "transform_config is not valid"),
        (lambda scheme: scheme["apply"][1].update(location="output"), "transform of output that is not read"),
        (lambda scheme: scheme["apply"][1].update(targets=["Linear"], ignore=[]), "two rotations of its input"),
        (lambda scheme: scheme.update(head_dim=256), "64 columns, which blocks of 256 do not divide"),
    ],
)
def test_other_transforms_are_refused_in_one_line(change, message, source, tmp_path):
    convert(str(source), tmp_path / "out", **ROTATED)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["transform_config"]["config_groups"]["rotate_64"])
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_transforms_of_weights_alone_are_part_of_them(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "out", format="compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config, before = json.loads(path.read_text()), open_checkpoint(str(tmp_path / "out"))
    offline = {"targets": ["re:.*v_proj$"], "location": "weight_output", "inverse": False}
    scheme = {"type": "random-hadamard", "apply": [offline, {**offline, "location": "weight_input"}], "head_dim": 8}
    config["quantization_config"]["transform_config"] = {"config_groups": {"R2": scheme}}
    path.write_text(json.dumps(config))
    after = open_checkpoint(str(tmp_path / "out"))
    for name in before.tensors:
        assert np.array_equal(all_rows(before, name), all_rows(after, name))


def test_cpu_and_reference_rotate_alike():
    values = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for size in (256, 64, 16):
        np.testing.assert_array_equal(cpu.rotate(values, size), reference.rotate(values, size))


def test_a_rotated_model_is_not_saved_in_a_format_without_rotation(source, tmp_path):
    convert(str(source), tmp_path / "out", **ROTATED)
    model, _ = load(tmp_path / "out", "cpu", dtype="float32")
    with pytest.raises(WeightError, match=r"q_proj: is rotated, and a model is saved in the bitsandbytes format"):
        model.save_pretrained(tmp_path / "saved")
    expected = model(IDS).logits
    plain = model.dequantize(torch.float32)
    assert (plain(IDS).logits - expected).norm() / expected.norm() < 0.05


def test_what_is_added_to_a_rotated_layer_is_rotated():
    """A merged weight is in the basis of the source, and its codes are in that of the layer."""
    torch.manual_seed(0)
    layer = Int8Linear.from_float(torch.nn.Linear(256, 40), threshold=0, rotation=256)
    merged = layer.dequantize() + torch.randn(40, 2) @ torch.randn(2, 256) * 0.01
    requantize(layer, merged)
    assert (layer.dequantize() - merged).norm() / merged.norm() < 0.02
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t() + layer.bias, rtol=1e-4, atol=1e-4)
