"""What becomes int8 and why not: the plan matches what the loader makes of the folder."""

import json
import math

import torch
from helpers.making import llama
from safetensors.torch import load_file, save_file

from benchmarks import deepseek
from quantize8 import convert
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.plan import plan_of as plan_with
from quantize8.recipe import Recipe, load_recipe
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import is_skipped


def plan_of(source, recipe=None):
    return plan_with(ConvertOptions(str(source)), open_checkpoint(str(source)), recipe or load_recipe("llm-int8"))


def test_headers_of_deepseek_v3_are_those_that_were_published():
    tensors = {name: math.prod(shape) for name, _, shape in deepseek.tensors(61, 256)}
    weights = {name: count for name, count in tensors.items() if not name.endswith("scale_inv")}
    assert len(tensors) == 91_991
    assert sum(count for name, count in weights.items() if ".layers.61." not in name) == 671_026_419_200


def test_deepseek_v3_is_planned_from_headers_alone(tmp_path):
    """Three dense layers, one with experts, and the MTP layer, which transformers does not have."""
    source = tmp_path / "source"
    deepseek.make(source, layers=4, experts=6)
    plan = convert(str(source), tmp_path / "out", format="compressed-tensors", dry_run=True).plan
    attention, gated = 5, 3
    assert len(plan.modules) == 5 * attention + 3 * gated + 2 * (1 + 6) * gated
    foreign = [f"model.layers.4.{name}" for name in ("eh_proj", "embed_tokens", "shared_head.head")]
    large = {"lm_head": "output head", "model.embed_tokens": "embedding"}
    assert plan.kept == large | dict.fromkeys(foreign, "not part of transformers' model")
    matrices = {name.removesuffix(".weight") for name, info in plan.checkpoint.tensors.items() if len(info.shape) == 2}
    others = matrices - plan.modules.keys() - plan.kept.keys()
    assert others == {"model.layers.3.mlp.gate", "model.layers.4.mlp.gate"}
    ignored = plan.format.edit_config({}, plan)["quantization_config"]["ignore"]
    assert {*plan.kept, *others} == {*ignored} - {r"re:.*\.gate$"}
    held = sum(path.stat().st_blocks * 512 for path in source.iterdir())
    assert held < 2**20 < plan.source_bytes  # the rest are holes
    assert sum(shard.nbytes for shard in plan.shards) == plan.output_bytes > plan.source_bytes


def test_processes_make_index_and_manifest_of_deepseek_v3_without_the_arithmetic(tmp_path):
    found = deepseek.simulate(tmp_path, 3, 2, "compressed-tensors", [2], 2)
    (made,) = found["conversions"]
    shares = found["plan"]["shares"]
    assert (made["workers"], shares[0]["machines"]) == (2, 2) and made["files"] == 3
    assert (
        made["tensors"] > 2 * found["modules"] and found["source_bytes"] < made["bytes"] < 1.1 * found["source_bytes"]
    )


def test_counts_of_weights_and_bytes(tmp_path):
    source = llama(tmp_path / "source", dtype=torch.float32)
    plan = plan_of(source)
    state = load_file(source / "model.safetensors")
    assert plan.source_bytes == sum(value.nbytes for value in state.values())
    assert plan.weights == sum(value.numel() for value in state.values())
    assert plan.int8_weights == sum(state[f"{name}.weight"].numel() for name in plan.modules)


def test_no_int8_module_is_matched_by_the_skip_list(tmp_path):
    """Suffixes match: leaving module 'proj' in float would make a loader leave every '...proj' in float as well."""
    state = {f"{name}.weight": torch.ones(4, 4) for name in ("proj", "a.proj", "a.fc")}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    plan = plan_of(tmp_path, Recipe("mine", 6.0, skip=("proj",)))
    assert set(plan.modules) == {"a.fc"}
    assert plan.kept == {
        "proj": "recipe mine",
        "a.proj": "loaders cannot distinguish it by name from a module that stays in floating point",
    }
    assert not any(is_skipped(name, plan.skip_list) for name in plan.modules)


def test_weights_of_other_dtypes_and_empty_ones_stay(tmp_path):
    source = llama(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].double()
    state["model.layers.2.mlp.up_proj.weight"] = torch.empty(0, 32)  # of a layer that predicts a further token
    save_file(state, source / "model.safetensors")
    kept = plan_of(source).kept
    assert kept["model.layers.0.mlp.up_proj"] == "dtype F64" and kept["model.layers.2.mlp.up_proj"] == "empty"
