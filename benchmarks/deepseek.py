"""Planning at scale: DeepSeek-V3 as published, 671 billion float8 weights and a layer more; only its headers exist.

Names, shapes and dtypes are those of deepseek-ai/DeepSeek-V3 (config.json, and its inference code); the values are
holes in sparse files. A dry run settles every byte of the artifact; its time and its peak memory are printed.

Run: python -m benchmarks.deepseek [--layers 61] [--format compressed-tensors]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quantize8 import convert

Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, shape
BLOCK = 128  # rows and columns of a weight that share a scale
SHARD_BYTES = 4.3e9  # 163 files
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    },
}  # fmt: skip


def make(folder: Path, layers: int = 61, experts: int = 256) -> None:
    """The checkpoint with its first so many layers, and one more for predicting two tokens; experts of each."""
    config = CONFIG | {"num_hidden_layers": layers, "n_routed_experts": experts}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: list[Header] = [{}]
    size = 0.0
    for name, dtype, shape in tensors(layers, experts):
        nbytes = math.prod(shape) * SIZES[dtype]
        if size + nbytes > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = (dtype, shape)
        size += nbytes
    weight_map = {}
    for number, header in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):06}.safetensors"
        write_sparse(folder / file, header)
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(layers: int, experts: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, in the order of storage."""
    hidden, heads = 7168, 128
    yield "model.embed_tokens.weight", "BF16", (129280, hidden)
    for i in range(layers + 1):
        layer = f"model.layers.{i}"
        if i == layers:
            yield f"{layer}.embed_tokens.weight", "BF16", (129280, hidden)
            yield from ((f"{layer}.{norm}.weight", "BF16", (hidden,)) for norm in ("enorm", "hnorm"))
            yield f"{layer}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
        yield from _float8(f"{layer}.self_attn.q_a_proj", 1536, hidden)
        yield f"{layer}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield from _float8(f"{layer}.self_attn.q_b_proj", heads * 192, 1536)
        yield from _float8(f"{layer}.self_attn.kv_a_proj_with_mqa", 512 + 64, hidden)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from _float8(f"{layer}.self_attn.kv_b_proj", heads * 256, 512)
        yield from _float8(f"{layer}.self_attn.o_proj", hidden, heads * 128)
        if i < min(3, layers):
            yield from _gated(f"{layer}.mlp", 18432, hidden)
        else:
            yield f"{layer}.mlp.gate.weight", "BF16", (experts, hidden)
            yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,)
            yield from _gated(f"{layer}.mlp.shared_experts", 2048, hidden)
            for expert in range(experts):
                yield from _gated(f"{layer}.mlp.experts.{expert}", 2048, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", "BF16", (hidden,)
        if i == layers:
            yield f"{layer}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{layer}.shared_head.head.weight", "BF16", (129280, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (129280, hidden)


def _gated(name: str, inner: int, hidden: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for part, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        yield from _float8(f"{name}.{part}", *shape)


def _float8(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def write_sparse(path: Path, header: Header) -> None:
    """A safetensors file with this header, and holes for values."""
    entries, position = {}, 0
    for name, (dtype, shape) in sorted(header.items(), key=lambda item: -SIZES[item[1][0]]):  # aligned, wide ones first
        end = position + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)


def main() -> None:
    """Make the headers, plan, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--format", default="compressed-tensors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "DeepSeek-V3"
        make(source, options.layers, options.experts)
        start = time.perf_counter()
        plan = convert(str(source), Path(name) / "out", format=options.format, dry_run=True).plan
        seconds = time.perf_counter() - start
    source_tensors = f"{len(plan.checkpoint.tensors):,} tensors, {plan.source_bytes:,} bytes"
    print(f"{plan.weights / 1e9:.1f} billion numbers in {source_tensors}")
    print(f"{len(plan.modules):,} int8 modules; {len(plan.shards)} files, {plan.output_bytes:,} bytes")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"planned in {seconds:.1f} s; peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
