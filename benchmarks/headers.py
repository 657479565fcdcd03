"""Plans of large public models, from headers alone: what becomes int8, what stays in floating point, time and memory.

Names, shapes and dtypes are those of openai/gpt-oss-120b, Qwen/Qwen3-VL-30B-A3B-Instruct and
meta-llama/Llama-4-Scout-17B-16E-Instruct: transformers' model, built without storage from the settings of each
config.json, says which tensors there are. The weight files are sparse. For DeepSeek-V3 see `benchmarks.deepseek`.

Run: python -m benchmarks.headers [MODEL ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.deepseek import write_checkpoint
from quantize8 import convert
from quantize8.memory import peak_rss

_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "patch_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    },
    "Qwen3-VL-30B-A3B": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision_config": _VISION
        | {"model_type": "qwen3_vl_moe", "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]}
        | {"num_position_embeddings": 2304, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "tie_word_embeddings": False,
    },
    "Llama-4-Scout-17B-16E": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 202048,
        },
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 1408,
            "intermediate_size": 5632,
            "num_hidden_layers": 34,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projector_input_dim": 4096,
            "projector_output_dim": 4096,
            "vision_output_dim": 4096,
        },
        "tie_word_embeddings": False,
    },
}
TARGETS = {"compressed-tensors": {"format": "compressed-tensors"}, "bitsandbytes": {}}


def tensors(name: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield the name, dtype and shape of each tensor as the model is published."""
    from transformers.core_model_loading import revert_weight_conversion

    from quantize8.sources.native import build_meta_model

    config = {key: value for key, value in CONFIGS[name].items() if key != "quantization_config"}
    model = build_meta_model(config)
    for tensor, value in revert_weight_conversion(model, model.state_dict()).items():
        shape = tuple(value.shape)
        if name.startswith("gpt-oss") and len(shape) == 3:  # MXFP4: two numbers per byte, a scale for 32
            experts, columns, rows = shape
            yield f"{tensor}_blocks", "U8", (experts, rows, columns // 32, 16)
            yield f"{tensor}_scales", "U8", (experts, rows, columns // 32)
        elif name.startswith("Qwen3-VL") and len(shape) == 3 and ".experts." in tensor:  # published transposed
            yield tensor, "BF16", (shape[0], shape[2], shape[1])
        else:
            yield tensor, "BF16", shape


def make(folder: Path, name: str) -> Path:
    """Write the sparse checkpoint of a model in CONFIGS."""
    write_checkpoint(folder, CONFIGS[name] | {"dtype": "bfloat16"}, tensors(name))
    return folder


def measure(name: str, target: str, source: Path) -> dict[str, Any]:
    """Plan a conversion in this process."""
    start = time.perf_counter()
    plan = convert(str(source), source.parent / "out", dry_run=True, **TARGETS[target]).plan  # type: ignore[arg-type]
    reasons: dict[str, int] = {}
    for entry, why in plan.kept.items():
        reasons[why] = reasons.get(why, 0) + sum(tensor.nbytes for tensor in plan.outputs_of(entry))
    return {
        "model": name,
        "target": target,
        "weights": plan.weights,
        "int8": plan.int8_weights / plan.weights,
        "matrices": len(plan.modules),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "in_float": reasons,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(peak_rss() / 1e6),
    }


def main() -> None:
    """Plan each model for each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CONFIGS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", nargs=2, metavar=("TARGET", "SOURCE"))
    given = parser.parse_args()
    if given.in_process:
        target, source = given.in_process
        print(json.dumps(measure(given.models[0], target, Path(source))))
        return
    rows = []
    for name in given.models:
        with tempfile.TemporaryDirectory() as work:
            source = make(Path(work) / "source", name)
            for target in TARGETS:
                command = [sys.executable, "-m", "benchmarks.headers", name, "--in-process", target, str(source)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
