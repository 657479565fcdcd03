import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.experts import SETTINGS, fused, model_class
from safetensors.torch import load_file, save_file

import quantize8
from quantize8 import SourceError, convert
from quantize8.commands.finalize import finalize
from quantize8.kernels import reference
from quantize8.runtime.experts import Int8Experts
from quantize8.runtime.quantizer import Int8Config
from quantize8.sources import open_checkpoint
from quantize8.sources.experts import FusedExperts, SplitExperts, layouts_of
from quantize8.sources.structure import structure_of, with_fused_experts, with_separate_experts

IDS = torch.arange(3, 27)[None]
W8A8 = {"format": "compressed-tensors"}
# model type -> fused tensors of the first layer with experts, and how an expert's matrices are found in them
LAYER = {
    "gpt_oss": "model.layers.0.mlp",
    "llama4": "language_model.model.layers.0.feed_forward",
    "qwen3_vl_moe": "model.language_model.layers.0.mlp",
    "granitemoe": "model.layers.0.block_sparse_moe",
    "gemma4": "model.language_model.layers.0",
}


def expected_parts(model_type: str, state: dict[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    """The matrices of one expert, written out for each layout, by their names in a quantized artifact."""
    layer = LAYER[model_type]
    if model_type == "granitemoe":
        up, down = state[f"{layer}.input_linear.weight"][expert], state[f"{layer}.output_linear.weight"][expert]
    else:
        up, down = state[f"{layer}.experts.gate_up_proj"][expert], state[f"{layer}.experts.down_proj"][expert]
    if model_type in ("gpt_oss", "llama4"):
        up, down = up.T, down.T
    half = len(up) // 2
    parts = {"gate_proj": up[:half], "up_proj": up[half:], "down_proj": down}
    if model_type == "gpt_oss":
        parts = {"gate_up_proj": up, "down_proj": down}
    return {f"{layer}.experts.{expert}.{name}": value for name, value in parts.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("model_type", LAYER)
def test_each_expert_is_quantized_as_a_matrix_of_its_own(model_type, tmp_path):
    source = fused(tmp_path / "source", model_type)
    result = convert(str(source), tmp_path / "out", **W8A8)
    state, stored = load_file(source / "model.safetensors"), open_checkpoint(str(tmp_path / "out"))
    for expert in (0, 3):
        for name, weight in expected_parts(model_type, state, expert).items():
            codes, absmax = reference.quantize_rowwise(weight.float().numpy())
            found = stored.int8_rows(f"{name}.weight", 0, len(codes))
            assert np.array_equal(found[0], codes) and np.array_equal(found[1], absmax), name
    assert not any("experts" in name and "router" not in name for name in result.plan.kept)


def test_biases_of_experts_follow_their_matrices(tmp_path):
    source = fused(tmp_path / "source", "gpt_oss")
    state = load_file(source / "model.safetensors")
    biases = torch.arange(4 * 192, dtype=torch.float32).reshape(4, 192)
    state["model.layers.1.mlp.experts.gate_up_proj_bias"] = biases.bfloat16()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out", **W8A8)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.layers.1.mlp.experts.2.w13_bias"], biases.bfloat16()[2])
    fused_again, _ = with_fused_experts(checkpoint := open_checkpoint(str(tmp_path / "out")), structure_of(checkpoint))
    name = "model.layers.1.mlp.experts.gate_up_proj_bias"
    assert np.array_equal(fused_again.rows(name, 1, 3).view(np.uint16), state[name][1:3].view(torch.uint16).numpy())


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("options", [{}, W8A8, W8A8 | {"moe": "transformers"}], ids=["bnb", "vllm", "transformers"])
def test_artifacts_compute_what_their_source_computes(model_type, options, tmp_path):
    source = fused(tmp_path / "source", model_type)
    convert(str(source), tmp_path / "out", **options)
    plain = model_class(model_type).from_pretrained(source, dtype=torch.float32)
    ours, _ = quantize8.load(tmp_path / "out", "cpu", dtype=torch.float32)
    # what int8 activations change is a router's choice now and then; a wrong layout gives an error near 1.4
    assert (logits(ours) - logits(plain)).norm() < 0.2 * logits(plain).norm()
    assert any(isinstance(module, Int8Experts) for module in ours.modules()) == any(
        ".experts." in name for name in convert(str(source), tmp_path / "dry", dry_run=True, **options).plan.modules
    )


@pytest.mark.parametrize("model_type", SETTINGS)
def test_int8_experts_compute_what_their_dequantized_weights_do(model_type, tmp_path):
    source = fused(tmp_path / "source", model_type)
    model = model_class(model_type).from_pretrained(
        source, dtype=torch.float32, quantization_config=Int8Config(mode="dynamic")
    )
    name, experts = next((name, m) for name, m in model.named_modules() if isinstance(m, Int8Experts))
    torch.manual_seed(1)
    hidden = torch.randn(24, 64)
    given = [hidden]
    if model_type == "llama4":
        hidden.view(4, 6, 64)[1, 2:] = 0  # not chosen for that expert
        hidden.view(4, 6, 64)[2] = 0
    else:
        given += [torch.randint(0, 4, (24, 2)), torch.rand(24, 2)]
    with torch.no_grad():
        found, expected = experts(*given), experts.to_float(torch.float32)(*given)
    assert expected.shape == found.shape and (found - expected).norm() < 0.02 * expected.norm(), name


def test_gpt_oss_becomes_int8_almost_entirely(tmp_path):
    source = fused(tmp_path / "source", "gpt_oss")
    plan = convert(str(source), tmp_path / "out", dry_run=True, **W8A8).plan
    inside = {name: info for name, info in plan.checkpoint.tensors.items() if ".layers." in name}
    matrices = sum(np.prod(info.shape) for info in inside.values())
    assert plan.int8_weights > 0.98 * matrices and plan.int8_weights > 0.9 * plan.weights
    assert set(plan.kept) == {"lm_head", "model.embed_tokens"}


def test_what_a_format_cannot_hold_is_named(tmp_path):
    source = fused(tmp_path / "source", "gpt_oss")
    plan = convert(str(source), tmp_path / "out").plan
    reason = "experts in one tensor, which this format cannot hold in int8"
    assert plan.kept["model.layers.1.mlp.experts.gate_up_proj"] == reason
    assert plan.outputs_of("model.layers.1.mlp.experts.gate_up_proj")[0].nbytes == 4 * 64 * 192 * 2
    manifest = json.loads((tmp_path / "out" / "quantize8.json").read_text())
    assert manifest["kept"] == plan.kept
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.experts.down_proj"],
        load_file(source / "model.safetensors")["model.layers.1.mlp.experts.down_proj"],
    )


@pytest.mark.parametrize("model_type", LAYER)
def test_experts_are_split_and_fused_again_without_change(model_type, tmp_path):
    source = open_checkpoint(str(fused(tmp_path / "source", model_type)))
    split, _ = with_separate_experts(source, structure_of(source))
    assert isinstance(split, SplitExperts)
    again, structure = with_fused_experts(split, structure_of(split))
    assert isinstance(again, FusedExperts) and not structure.missing
    layouts = [name for name in again.fusions if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(layouts) == 4
    for name in layouts:
        stored = source.tensors.get(name) or source.tensors[_granite(name)]
        assert again.tensors[name].shape == stored.shape
        for rows in ((0, 4), (2, 3)):
            assert np.array_equal(
                again.rows(name, *rows).view(np.uint16), source.rows(stored.name, *rows).view(np.uint16)
            )


def _granite(name: str) -> str:
    ends = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight"}
    return next(name.replace(end, stored) for end, stored in ends.items() if name.endswith(end))


def test_a_missing_expert_is_named(tmp_path):
    convert(str(fused(tmp_path / "source", "gpt_oss")), tmp_path / "out", **W8A8)
    path = tmp_path / "out" / "model.safetensors"
    state = {name: value for name, value in load_file(path).items() if ".layers.1.mlp.experts.2.w2_weight" not in name}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"the model needs model\.layers\.1\.mlp\.experts\.down_proj"):
        convert(str(tmp_path / "out"), tmp_path / "again", format="bfloat16")


def test_separate_gate_and_up_projections_of_gpt_oss_are_read(tmp_path):
    """As llm-compressor writes them: the even rows are the gate's."""
    source = fused(tmp_path / "source", "gpt_oss")
    state = load_file(source / "model.safetensors")
    for name in [name for name in state if ".experts." in name]:
        value = state.pop(name)
        base, _, kind = name.rpartition(".")
        is_bias = kind.endswith("_bias")
        for expert, part in enumerate(value):
            matrix, last = (part, "bias") if is_bias else (part.T, "weight")
            if kind.startswith("gate_up"):
                state[f"{base}.{expert}.gate_proj.{last}"] = matrix[::2].contiguous()
                state[f"{base}.{expert}.up_proj.{last}"] = matrix[1::2].contiguous()
            else:
                state[f"{base}.{expert}.down_proj.{last}"] = matrix.contiguous()
    separate = tmp_path / "separate"
    separate.mkdir()
    (separate / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(state, separate / "model.safetensors", metadata={"format": "pt"})
    convert(str(separate), tmp_path / "out", format="bfloat16")
    back, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in back)


def test_parts_and_resume_write_the_same_bytes(tmp_path):
    source = fused(tmp_path / "source", "llama4")
    options = W8A8 | {"max_shard_size": "40KB"}
    convert(str(source), tmp_path / "whole", **options)
    for number in (2, 1):
        convert(str(source), tmp_path / "parts", part=f"{number}/2", **options)
    finalize(tmp_path / "parts")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert len(names) > 5
    for name in names - {"quantize8.json"}:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_vl_moe", "gemma4"])
def test_towers_stay_in_floating_point_unless_a_recipe_asks(model_type, tmp_path):
    source = fused(tmp_path / "source", model_type)
    plan = convert(str(source), tmp_path / "out", **W8A8).plan
    tower = {"llama4": "vision_model", "qwen3_vl_moe": "model.visual", "gemma4": "model.vision_tower"}[model_type]
    original, written = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    inside = [name for name in original if name.startswith((tower, "multi_modal_projector", "model.embed_vision"))]
    assert len(inside) > 5 and all(torch.equal(original[name], written[name]) for name in inside)
    assert f"in {tower}, outside of the language model" in plan.kept.values()
    towers = Path(tmp_path / "towers.toml")
    towers.write_text("threshold = 6.0\ntowers = true\n")
    asked = convert(str(source), tmp_path / "asked", recipe=str(towers), dry_run=True, **W8A8).plan
    assert any(name.startswith(tower) for name in asked.modules)
    assert not any(name.startswith(tower) for name in plan.modules)


def test_a_module_of_unknown_layout_has_none():
    class Odd(torch.nn.Module):
        has_gate = True

        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(shape))
            self.down_proj = torch.nn.Parameter(torch.empty(2, 8, 6))

    assert layouts_of(Odd(2, 12, 8), {}).keys() == {""}  # [E, 2 I, H] and [E, H, I]
    assert layouts_of(Odd(2, 12, 7), {}) == {} and layouts_of(Odd(2, 12), {}) == {}
