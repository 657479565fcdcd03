"""Conversion at scale: DeepSeek-V3 with 671 billion float8 weights and the MTP layer, as headers without values.

Names, shapes and dtypes are those of deepseek-ai/DeepSeek-V3 (config.json and inference code); the weight files are
sparse. The model is planned, and then converted by 1, 8 and 64 processes that do everything except the arithmetic:
each process opens the source, and locks and creates its weight files (which are sparse, too) and their journals;
`finalize` writes the index, config.json and the manifest. The time and peak memory of each process are measured. 2 GB
of disk space are enough.

Run: python -m benchmarks.deepseek [--layers 61] [--format compressed-tensors] [--workers 1,8,64] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from quantize8 import convert, plan
from quantize8.artifact.manifest import MANIFEST_NAME, Quantized, TensorRecord, digest, read_manifest, summarize
from quantize8.commands.finalize import finalize
from quantize8.conversion import driver
from quantize8.conversion.driver import Writer
from quantize8.kernels.reference import ColumnStats
from quantize8.memory import peak_rss
from quantize8.sources.safetensors import INDEX_NAME

Header = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, shape
BLOCK = 128  # rows and columns of a weight block with one scale
SHARD_BYTES = 4.3e9  # 163 files
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
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
    """Write a sparse checkpoint with the first `layers` layers, the MTP layer, and `experts` experts per layer."""
    config = CONFIG | {"num_hidden_layers": layers, "n_routed_experts": experts}
    write_checkpoint(folder, config, tensors(layers, experts))


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Write a sparse checkpoint with tensors given as (name, dtype, shape) in storage order."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files: list[Header] = [{}]
    size = 0.0
    for name, dtype, shape in tensors:
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
    """Yield the name, dtype and shape of each tensor in storage order."""
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
    """Write a sparse safetensors file with this header and no values."""
    entries, position = {}, 0
    for name, (dtype, shape) in sorted(
        header.items(), key=lambda item: -SIZES[item[1][0]]
    ):  # wide dtypes first, for alignment
        end = position + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)


class SparseWriter(Writer):
    """A `Writer` that writes no values, and returns the records that a weight of zeros would have."""

    def write(self, source: str, quantizer: Any) -> Any:
        """See `Writer.write`."""
        records = {}
        for out in self.plan.outputs[source]:
            file = self.places[out.name].name
            records[out.name] = TensorRecord(file, out.dtype, out.shape, digest(out.name.encode()))
        if source.removesuffix(".weight") in self.plan.modules:
            info = self.plan.checkpoint.tensors[source]
            next(iter(records.values())).quantized = _of_zeros(info.shape, info.stored_dtype)
        return records


@functools.cache
def _of_zeros(shape: tuple[int, int], dtype: str) -> Quantized:
    return summarize(ColumnStats.empty(shape[1]), np.zeros(shape[0], np.float32), dtype, digest(b""), False)


def work(source: str, out: str, part: str, format: str) -> None:
    """In one process, write a share of the weight files, or finish the artifact if part is 0."""
    start = time.perf_counter()
    if part == "0":
        finalize(out)
    else:
        os.posix_fallocate = lambda *_: None  # otherwise the disk would have to be as large as the model
        shutil.disk_usage = lambda _: SimpleNamespace(free=2**60)  # type: ignore[assignment,return-value]
        driver.Writer = SparseWriter  # type: ignore[misc]
        convert(source, out, part=part, format=format)
    print(json.dumps([time.perf_counter() - start, peak_rss() / 2**20]))


def convert_by(workers: int, source: Path, out: Path, format: str, at_once: int) -> dict[str, Any]:
    """Convert with a number of processes, and finish the artifact.

    Args:
        workers: Number of processes, each of which writes one part.
        source: The checkpoint.
        out: The artifact.
        format: The output format.
        at_once: Number of processes that run at the same time.

    Returns:
        The time of the slowest process, the peak memory of the largest, the same for `finalize`, and sizes.
    """

    def run(part: str) -> tuple[float, float]:
        command = [sys.executable, "-m", "benchmarks.deepseek", "--do", str(source), str(out), part, "--format", format]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds, memory = json.loads(done.stdout)
        return seconds, memory

    with ThreadPoolExecutor(at_once) as pool:
        parts = list(pool.map(run, [f"{number}/{workers}" for number in range(1, workers + 1)]))
    end_seconds, end_memory = run("0")
    index, manifest = json.loads((out / INDEX_NAME).read_text()), read_manifest(out)
    assert index["weight_map"].keys() <= manifest.tensors.keys()
    assert {*index["weight_map"].values()} == manifest.headers.keys()
    small = [path for path in sorted(out.iterdir()) if path.name not in manifest.headers]
    return {
        "workers": workers,
        "seconds": max(seconds for seconds, _ in parts),
        "MiB": max(memory for _, memory in parts),
        "end_seconds": end_seconds,
        "end_MiB": end_memory,
        "files": len(manifest.headers),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "tensors": len(manifest.tensors),
        "index_bytes": (out / INDEX_NAME).stat().st_size,
        "manifest_bytes": (out / MANIFEST_NAME).stat().st_size,
        "digest": digest(b"".join(path.read_bytes() for path in small)),
    }


def simulate(folder: Path, layers: int, experts: int, format: str, workers: list[int], at_once: int) -> dict[str, Any]:
    """Make the checkpoint, plan the conversion, convert without arithmetic, and return times and peak memory."""
    source = folder / "DeepSeek-V3"
    make(source, layers, experts)
    start = time.perf_counter()
    found = plan(str(source), folder / "out", format=format, machines=workers)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "source_tensors": len(found.plan.checkpoint.tensors),
        "source_bytes": found.plan.source_bytes,
        "weights": found.plan.weights,
        "modules": len(found.plan.modules),
        "plan": {"seconds": seconds, "MiB": peak_rss() / 2**20, **found.as_json()["forecast"]},
        "conversions": [],
    }
    for count in workers:
        result["conversions"].append(convert_by(count, source, folder / f"out-{count}", format, at_once))
        shutil.rmtree(folder / f"out-{count}")
    assert len({each["digest"] for each in result["conversions"]}) == 1  # index, config and manifest are the same
    return result


def main() -> None:
    """Run the benchmark, and print times and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--workers", default="1,8,64")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="processes side by side on this machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        work(*options.do, options.format)
        return
    workers = [int(word) for word in options.workers.split(",")]
    with tempfile.TemporaryDirectory() as name:
        model = (options.layers, options.experts, options.format)
        result = simulate(Path(name), *model, workers, options.at_once)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['weights'] / 1e9:.1f} billion numbers, {result['source_bytes']:,} bytes")
    print(f"planned in {result['plan']['seconds']:.1f} s, {result['plan']['MiB']:.0f} MiB")
    for share, done in zip(result["plan"]["shares"], result["conversions"], strict=True):
        print(
            f"{done['workers']} workers: plan says {share['seconds']:.0f} s, {share['files']} files each; without "
            f"arithmetic {done['seconds']:.1f} s, {done['MiB']:.0f} MiB; "
            f"end {done['end_seconds']:.1f} s, {done['end_MiB']:.0f} MiB"
        )
    print(f"{done['files']} files, {done['tensors']:,} tensors, manifest {done['manifest_bytes']:,} bytes")


if __name__ == "__main__":
    main()
