"""compressed-tensors: written for its loaders, and read as its own package decompresses it."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers.artifacts import check_same_logits
from helpers.making import llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import deepseek
from quantize8 import SourceError, convert, verify
from quantize8.kernels import reference
from quantize8.sources import open_checkpoint

MODULE = "model.layers.0.mlp.down_proj"
IDS = torch.arange(2, 42)[None]


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def dequantized_by_the_package(folder, dtype=torch.float32):
    return CompressedTensorsDequantizer(folder, dtype=dtype).process(load_file(folder / "model.safetensors"))


def all_rows(checkpoint, name):
    return checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("hidden", [32, 36])
def test_the_package_and_we_read_the_same_weights(scheme, hidden, tmp_path):
    source = llama(tmp_path / "source", hidden=hidden, dtype=torch.float32)
    result = convert(str(source), tmp_path / "out", format="compressed-tensors", scheme=scheme)
    theirs, ours = dequantized_by_the_package(tmp_path / "out"), open_checkpoint(str(tmp_path / "out"))
    original = load_file(source / "model.safetensors")
    assert set(theirs) - {name for name in theirs if name.endswith("_shape")} == set(ours.tensors) == set(original)
    for name in original:
        assert torch.equal(theirs[name], torch.from_numpy(all_rows(ours, name))), name
        if name.removesuffix(".weight") in result.plan.modules:
            codes, absmax = reference.quantize_rowwise(original[name].numpy())
            stored_codes, stored_absmax = ours.int8_rows(name, 0, len(codes))
            assert np.array_equal(stored_codes, codes) and np.array_equal(stored_absmax, absmax)


def test_packed_weights_in_transformers_give_the_logits_of_the_dequantized_model(tmp_path):
    source = llama(tmp_path / "source", dtype=torch.float32)
    convert(str(source), tmp_path / "out", format="compressed-tensors", scheme="w8a16")
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    check_same_logits(tmp_path / "out", tmp_path / "float", IDS)


def test_w8a8_in_transformers_is_near_the_dequantized_model(tmp_path):
    source = llama(tmp_path / "source", dtype=torch.float32)
    convert(str(source), tmp_path / "out", format="compressed-tensors")
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    quantized, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    with torch.inference_mode():
        ours, theirs = plain(IDS).logits, quantized.eval()(IDS).logits
    assert 0 < (ours - theirs).norm() / ours.norm() < 0.06  # their activations are int8 as well


def test_a_module_that_vllm_would_join_with_one_in_float_stays_in_float(tmp_path):
    source = llama(tmp_path / "source")
    recipe = tmp_path / "mine.toml"
    recipe.write_text("threshold = 6.0\nskip = ['model.layers.0.self_attn.k_proj', 'model.layers.1.mlp.up_proj']\n")
    plan = convert(str(source), tmp_path / "out", format="compressed-tensors", recipe=str(recipe), dry_run=True).plan
    joined = {name for name, why in plan.kept.items() if "vLLM" in why}
    assert joined == {f"model.layers.0.self_attn.{name}_proj" for name in "qv"} | {"model.layers.1.mlp.gate_proj"}
    assert "model.layers.0.self_attn.o_proj" in plan.modules


def test_what_vllm_joins_is_told_of_in_one_order(tmp_path):
    """In the order of the source: the manifest of the same conversion has the same bytes."""
    source = llama(tmp_path / "source", layers=8)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("threshold = 6.0\nskip = ['*.k_proj']\n")
    plan = convert(str(source), tmp_path / "out", format="compressed-tensors", recipe=str(recipe), dry_run=True).plan
    joined = [f"{name}.weight" for name, why in plan.kept.items() if "vLLM" in why]
    assert len(joined) == 16 and joined == [name for name in plan.checkpoint.tensors if name in joined]


def test_multi_head_latent_attention_is_joined_too(tmp_path):
    deepseek.make(tmp_path / "source", layers=1, experts=2)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("threshold = 6.0\nskip = ['model.layers.0.self_attn.q_a_proj']\n")
    options = {"format": "compressed-tensors", "recipe": str(recipe), "dry_run": True}
    plan = convert(str(tmp_path / "source"), tmp_path / "out", **options).plan
    joined = {name for name, why in plan.kept.items() if "vLLM" in why}
    assert joined == {"model.layers.0.self_attn.kv_a_proj_with_mqa"}


def test_the_gate_of_a_shared_expert_stays_in_float(tmp_path):
    """In vLLM's Qwen2-MoE and Qwen3-Next it is a plain layer, which would use codes as weights."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "num_experts": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=16, pad_token_id=0))
    model.save_pretrained(tmp_path / "source")
    gate = "model.layers.0.mlp.shared_expert_gate"
    plan = convert(str(tmp_path / "source"), tmp_path / "out", format="compressed-tensors").plan
    assert "vLLM" in plan.kept[gate] and "model.layers.0.mlp.shared_expert.up_proj" in plan.modules
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert gate in entry["ignore"] and verify(tmp_path / "out")


def test_conv1d_is_refused_with_another_format(mgm, tmp_path):
    with pytest.raises(SourceError, match=r"a Conv1D, which .* choose another --format"):
        convert(str(mgm), tmp_path / "out", format="compressed-tensors")


def weight_args(**given):
    return QuantizationArgs(**{"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True} | given)


def encode(weight, args, form, scale_dtype):
    """What the package's compressor stores for a weight [N, K], with scales and zero points chosen here."""
    rows, columns = weight.shape
    across = {"tensor": None, "channel": 1}.get(args.strategy, 0)
    if args.strategy == "block":
        down, wide = (math.ceil(size / block) for size, block in zip(weight.shape, args.block_structure, strict=True))
        shape = (down, wide)
    else:
        shape = (1,) if across is None else (rows, across or columns // args.group_size)
    generator = torch.Generator().manual_seed(1)
    scale = (torch.rand(shape, generator=generator) + 0.5).mul(0.01).to(scale_dtype)
    state = {"weight": weight.to(scale_dtype), "weight_scale": scale}
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    parts = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    return {name: value.contiguous() for name, value in parts.items()}, scheme


CASES = {
    "int8 per channel": (weight_args(), "int-quantized"),
    "int8 per tensor": (weight_args(strategy="tensor"), "int-quantized"),
    "int8 with zero points": (weight_args(symmetric=False), "int-quantized"),
    "int8 in groups": (weight_args(strategy="group", group_size=16), "naive-quantized"),
    "packed int8": (weight_args(), "pack-quantized"),
    "packed int4 in groups": (weight_args(num_bits=4, strategy="group", group_size=16), "pack-quantized"),
    "packed int4 with zero points": (
        weight_args(num_bits=4, strategy="group", group_size=8, symmetric=False),
        "pack-quantized",
    ),
    "float8 per channel": (weight_args(type="float"), "float-quantized"),
    "float8 per tensor": (weight_args(type="float", strategy="tensor"), "float-quantized"),
    "float8 in blocks": (weight_args(type="float", strategy="block", block_structure=[16, 32]), "float-quantized"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_that_is_read_equals_the_package_and_converts(case, dtype, tmp_path):
    args, form = CASES[case]
    folder, theirs = tmp_path / "source", {}
    package = BaseCompressor.get_value_from_registry(form)

    def edit(state):
        theirs.update(state)
        for name in [name for name in state if "_proj" in name]:
            parts, scheme = encode(state.pop(name), args, form, dtype)
            theirs[name] = package.decompress(parts, scheme)["weight"]
            state |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}

    llama(folder, dtype=dtype, edit=edit)
    group = QuantizationScheme(targets=["Linear"], weights=args, format=form).model_dump(mode="json")
    entry = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    entry |= {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    edit_config(folder, lambda config: config.update(quantization_config=entry))
    ours = open_checkpoint(str(folder))
    for name in ours.tensors:
        values = torch.from_numpy(all_rows(ours, name).astype(np.float32)).to(dtype)
        assert torch.equal(values, theirs[name]), name
        cuts = [0, 1, 7, len(values)]
        parts = [ours.rows(name, start, stop) for start, stop in pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), all_rows(ours, name))
    plan = convert(str(folder), tmp_path / "out", format="float32").plan
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(ours.tensors)
    assert plan.source_bytes == sum(value.nbytes for value in load_file(folder / "model.safetensors").values())


def test_minus_128_is_quantized_again_and_only_there(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "out", format="compressed-tensors")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state[f"{MODULE}.weight"][3, 5] = -128
    save_file(state, tmp_path / "out" / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    codes, absmax = checkpoint.int8_rows(f"{MODULE}.weight", 0, 32)
    before, scale = state[f"{MODULE}.weight"].numpy(), state[f"{MODULE}.weight_scale"].numpy()[:, 0]
    assert codes.min() == -127 and codes[3, 5] == -127
    assert np.array_equal(np.delete(codes, 3, 0), np.delete(before, 3, 0))
    error = np.abs(reference.dequantize(codes, absmax)[3] - before[3] * scale[3])
    assert error.max() <= scale[3] * 128 / 127 / 2 * 1.001  # half a step of the new, wider scale
    manifest = convert(str(tmp_path / "out"), tmp_path / "int8").manifest
    errors = {name: record.quantized.relative_error for name, record in manifest.tensors.items() if record.quantized}
    original = reference.dequantize(before, scale * 127)
    assert errors.pop(f"{MODULE}.weight") == pytest.approx(np.linalg.norm(error) / np.linalg.norm(original), rel=1e-3)
    assert not any(errors.values())  # and the other modules have none


def bad_status(config, state):
    config["quantization_config"]["quantization_status"] = "frozen"


def bad_groups(config, state):
    config["quantization_config"]["config_groups"] = []


def bad_format(config, state):
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "mxfp6-pack-quantized"


INPUT = {"targets": ["Linear"], "location": "input"}


def rotated(config, state):
    config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard", "apply": [INPUT]}}}


def no_weight(config, state):
    del state[f"{MODULE}.weight_packed"]


def no_shape(config, state):
    del state[f"{MODULE}.weight_shape"]


def wrong_shape(config, state):
    state[f"{MODULE}.weight_shape"] = torch.tensor([32, 4800])


def wrong_scale(config, state):
    state[f"{MODULE}.weight_scale"] = torch.ones(7, 1)


def wrong_dtype(config, state):
    state[f"{MODULE}.weight_packed"] = state[f"{MODULE}.weight_packed"].float()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_status, "quantization_status = 'frozen'"),
        (bad_groups, "no config_groups"),
        (bad_format, "mxfp6-pack-quantized, which is not read"),
        (rotated, "hadamard transform of input that is not read"),
        (no_weight, "has weight_scale but no weight"),
        (no_shape, "no weight_shape"),
        (wrong_shape, "packs 4800 columns into 12 words"),
        (wrong_scale, "which do not fit"),
        (wrong_dtype, "stores its weight as F32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(damage, message, tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out", format="compressed-tensors", scheme="w8a16")
    state = load_file(tmp_path / "out" / "model.safetensors")
    edit_config(tmp_path / "out", lambda config: damage(config, state))
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(SourceError, match=message) as caught:
        open_checkpoint(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
