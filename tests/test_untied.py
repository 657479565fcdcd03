"""Int8 embeddings for vLLM, and heads that were tied to them."""

import json

import numpy as np
import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantize8
from quantize8 import convert
from quantize8.kernels import reference
from quantize8.sources import open_checkpoint
from quantize8.sources.untied import UntiedHead

IDS = torch.arange(2, 26)[None]
EMBEDDINGS = {"format": "compressed-tensors", "recipe": "int8-embeddings"}


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_becomes_int8_and_a_tied_head_its_own_matrix(tied, scheme, tmp_path):
    source = llama(tmp_path / "source", tied=tied)
    result = convert(str(source), tmp_path / "out", scheme=scheme, check=True, **EMBEDDINGS)
    assert not result.plan.kept and result.plan.closed_to == {"transformers": "it cannot load an int8 embedding"}
    config = settings(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    groups = config["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["model.embed_tokens"] and groups["group_0"]["format"] == "pack-quantized"
    assert groups["group_1"]["targets"] == ["re:.*lm_head$", "Linear"]
    weight = load_file(source / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    codes, absmax = reference.quantize_rowwise(weight)
    stored = open_checkpoint(str(tmp_path / "out"))
    for name in ("model.embed_tokens", "lm_head") if tied else ("model.embed_tokens",):
        found = stored.int8_rows(f"{name}.weight", 0, len(codes))
        assert np.array_equal(found[0], codes) and np.array_equal(found[1], absmax)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours, _ = quantize8.load(tmp_path / "out", "cpu", dtype=torch.float32)
    with torch.no_grad():
        expected, actual = plain(IDS).logits, ours(IDS).logits
    assert (actual - expected).norm() < 0.1 * expected.norm()


def test_what_holds_no_embedding_names_it(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("threshold = 6.0\nembeddings = true\n")
    plan = convert(str(llama(tmp_path / "source", tied=True)), tmp_path / "out", recipe=str(recipe)).plan
    assert plan.kept["model.embed_tokens"] == "embedding" and settings(tmp_path / "out")["tie_word_embeddings"] is True


def test_an_int8_head_is_a_target_by_its_name(tmp_path):
    """vLLM's output head is no Linear layer by its class, and has no place for a scale unless it is a target."""
    convert(
        str(llama(tmp_path / "source", tied=False)), tmp_path / "out", format="compressed-tensors", recipe="int8-all"
    )
    groups = settings(tmp_path / "out")["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["re:.*lm_head$", "Linear"]]


def test_a_nested_setting_is_untied_too(tmp_path):
    source = open_checkpoint(str(llama(tmp_path / "source", tied=True)))
    untied = UntiedHead(source, "model.embed_tokens.weight", "lm_head.weight")
    path = source.folder / "config.json"
    path.write_text(json.dumps(settings(source.folder) | {"text_config": {"tie_word_embeddings": True, "x": 1}}))
    assert untied.config["text_config"] == {"tie_word_embeddings": False, "x": 1}
    assert untied.config["tie_word_embeddings"] is False
    assert untied.tensors["lm_head.weight"].shape == source.tensors["model.embed_tokens.weight"].shape
