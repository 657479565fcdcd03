"""Every source to every target on tiny models, in each loader; the documentation shows what was measured."""

import json
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import config_of, folder_of, write_tokenizer
from helpers.making import mixtral, qwen3_moe
from safetensors.torch import load_file, save_file

from benchmarks import loaders, loaders_table
from benchmarks.loaders import Subject
from quantize8 import convert

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

ROOT = Path(__file__).parent.parent
IDS = torch.arange(2, 2 + loaders.TOKENS)[None]


def llama_with_tokenizer(folder):
    """A Llama that GGUF can hold."""
    folder_of(folder, config_of("llama"), tokenizer=False)
    write_tokenizer(folder / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).rename(folder / name)
    (folder / "tokenizer").rmdir()
    return folder


def statuses(rows):
    """Status of each (source, target)."""
    return {(row["source"], row["target"]): row["status"] for row in rows}


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_models_with_experts(make, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "SOURCES", ("original", "w8a16", "gguf"))
    rows = loaders.measure(Subject("tiny", make(tmp_path / "source"), IDS, experts=True), tmp_path / "work")
    found = statuses(rows)
    assert len(found) == 3 * len(loaders.TARGETS)
    for (source, target), status in found.items():
        expected = {"gguf": "refused", "w8a8": "cannot"}.get(target, "agrees")
        assert status == ("no source" if source == "gguf" else expected), (source, target)
    refused = next(row for row in rows if row["status"] == "refused")
    reasons = {mixtral: "48 columns, not a multiple of Q8_0's 32", qwen3_moe: "norm_topk_prob is False"}
    assert reasons[make] in refused["reason"]
    assert all("weights" in row["load"] for row in rows if "load" in row)
    # codes that are carried over make the same artifact, so that it is opened once
    assert {row["opened"] for row in rows if row["source"] == "w8a16" and row["target"] == "w8a8"} == {"original"}


def test_a_llama_in_every_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "SOURCES", ("original", "gguf"))
    rows = loaders.measure(Subject("tiny", llama_with_tokenizer(tmp_path / "source"), IDS), tmp_path / "work")
    assert set(statuses(rows).values()) == {"agrees"} and len(rows) == 2 * 7
    assert all(row["loader"]["apart"] > 0 for row in rows if row["target"] == "gguf")


@pytest.mark.parametrize("target", ["bitsandbytes", "w8a16"])
def test_a_scale_that_is_wrong_by_a_little_fails(target, tmp_path):
    subject = Subject("tiny", llama_with_tokenizer(tmp_path / "source"), IDS)
    convert(str(subject.source), tmp_path / "out", **loaders.TARGETS[target])
    convert(str(tmp_path / "out"), tmp_path / "plain", format="float32")
    truth = subject.outputs(subject.original())
    assert loaders.judge(subject, target, tmp_path / "out", truth, tmp_path / "plain")["status"] == "agrees"
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    state[f"model.layers.1.mlp.up_proj.{'SCB' if target == 'bitsandbytes' else 'weight_scale'}"][5] *= 1.01
    save_file(state, path, metadata={"format": "pt"})
    cell = loaders.judge(subject, target, tmp_path / "out", truth, tmp_path / "plain")
    assert cell["status"] == "fails" and "weights" in cell["reason"]


def test_a_tensor_that_is_missing_fails(tmp_path):
    subject = Subject("tiny", llama_with_tokenizer(tmp_path / "source"), IDS)
    convert(str(subject.source), tmp_path / "out", format="float32")
    convert(str(subject.source), tmp_path / "plain", format="float32")
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weights"] = state.pop("model.norm.weight")
    save_file(state, path, metadata={"format": "pt"})
    cell = loaders.judge(subject, "float32", tmp_path / "out", subject.outputs(subject.original()), tmp_path / "plain")
    assert cell["status"] == "fails" and "model.norm.weight" in str(cell["loader"])


def test_the_documented_table_is_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "loaders.json").read_text())["rows"]
    page = (ROOT / "docs" / "loaders.md").read_text()
    assert "\n".join(loaders_table.table(rows)) in page
    assert "\n".join(loaders_table.worst(rows)) in page
    assert "\n".join(loaders_table.reasons(rows)) in page
    assert not [row for row in rows if row["status"] == "fails"]
