"""Published models with fused experts, planned from their headers: what becomes int8, and what is named."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import headers
from quantize8 import convert

ROOT = Path(__file__).parent.parent
PARAMETERS = {  # as published
    "gpt-oss-120b": 116_829_156_672,
    "Qwen3-VL-30B-A3B": 31_070_754_032,
    "Llama-4-Scout-17B-16E": 108_641_793_536,
}
OUTSIDE = {
    "gpt-oss-120b": set(),
    "Qwen3-VL-30B-A3B": {"model.visual"},
    "Llama-4-Scout-17B-16E": {"vision_model", "multi_modal_projector"},
}


@pytest.mark.parametrize("name", headers.CONFIGS)
def test_nearly_all_of_a_published_model_becomes_int8(name, tmp_path):
    source = headers.make(tmp_path / "source", name)
    plan = convert(str(source), tmp_path / "out", dry_run=True, format="compressed-tensors").plan
    assert plan.weights == PARAMETERS[name]
    assert plan.int8_weights > 0.96 * plan.weights
    parts = {why.partition(",")[0].removeprefix("in ") for why in plan.kept.values() if why.startswith("in ")}
    assert parts == OUTSIDE[name]
    named, limit = plan.modules.keys() | plan.kept.keys(), 0.01 * PARAMETERS[name]
    large = [info.name for info in plan.checkpoint.tensors.values() if math.prod(info.shape) > limit]
    assert all(tensor.removesuffix(".weight") in named for tensor in large)
    assert sum(path.stat().st_blocks * 512 for path in source.iterdir()) < 8e6 < plan.source_bytes  # sparse files


def test_the_page_has_the_measured_numbers():
    rows = json.loads((ROOT / "benchmarks" / "results" / "headers.json").read_text())
    page = (ROOT / "docs" / "planning.md").read_text()
    assert len(rows) == 6
    for row in rows:
        size = f"{row['source_bytes'] / 1e9:.1f} GB -> {row['output_bytes'] / 1e9:.1f} GB"
        cells = (row["model"], row["target"], f"{row['int8']:.1%}", size, f"{row['matrices']:,}")
        assert f"| {' | '.join(cells)} | {row['seconds']} s, {row['peak_mb']} MB |" in page
