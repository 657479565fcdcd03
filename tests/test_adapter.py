"""LoRA adapters that `--adapter` merges: PEFT's numbers, in any format, and one line for what cannot be merged."""

import io
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from helpers.adapters import CONFIG, WEIGHTS, merge, settings, tensors, train
from helpers.artifacts import digests
from helpers.experts import SETTINGS, fused, model_class
from helpers.gguf_files import config_of, folder_of
from helpers.making import GPT2, SIZES, llama, mixtral, qwen3_moe, saved, word_tokenizer
from peft import LoraConfig, PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from quantize8 import (
    ArtifactError,
    ConvertOptions,
    OutputError,
    SourceError,
    WeightError,
    convert,
    plan,
    reports,
    verify,
)
from quantize8.artifact.card import card
from quantize8.artifact.manifest import digest, read_manifest
from quantize8.cli import main
from quantize8.commands.finalize import finalize
from quantize8.conversion.driver import Writer
from quantize8.kernels import reference
from quantize8.runtime.check import check
from quantize8.sources import open_checkpoint
from quantize8.sources.experts import FusedExperts, Fusion
from quantize8.sources.names import ModelNames

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT's name
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]

ATTENTION = ["q_proj", "v_proj"]
LAYER = "model.layers.0"


def rows_of(checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    return checkpoint.rows(name, 0, info.shape[0] if info.shape else 1)


def compare(adapted, merged: Path, tolerance: float = 1e-6) -> set[str]:
    """Compare all tensors with those that PEFT merged; returns the names of those that are not the base's."""
    expected = open_checkpoint(str(merged))
    assert set(expected.tensors) == set(adapted.tensors)
    for name in expected.tensors:
        ours, theirs = rows_of(adapted, name).astype(np.float32), rows_of(expected, name).astype(np.float32)
        assert ours.shape == theirs.shape
        scale = np.abs(theirs).max(initial=1e-3)
        assert np.abs(ours - theirs).max(initial=0) <= tolerance * scale, name
    return set(adapted.changes)


def check_against_peft(root: Path, base: Path, kind=transformers.AutoModelForCausalLM, **config):
    adapter = train(base, root / "adapter", kind, **config)
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    changed = compare(adapted, merge(base, adapter, root / "merged", kind))
    assert changed
    return adapted


CASES = {
    "plain": {"target_modules": [*ATTENTION, "down_proj"], "r": 3, "lora_alpha": 7},
    "all linear": {"target_modules": "all-linear", "r": 4},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True, "r": 5, "lora_alpha": 8},
    "rank larger than the weight": {"target_modules": ["k_proj"], "r": 70},
    "patterns": {
        "target_modules": [*ATTENTION, "up_proj"],
        # PEFT sorts them when it saves them, and the first that fits counts
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 3, "layers.1.self_attn.q_proj": 2, "up_proj": 6},
        "alpha_pattern": {r"model.layers.\d.mlp.up_proj": 5, "up_proj": 7, "v_proj": 1},
    },
    "rslora with patterns": {
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "dora": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True, "r": 4},
    "output head": {"target_modules": ["lm_head", "o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 2},
    "embedding with dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "modules to save": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding to save": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_llama_is_what_peft_merges(name, tmp_path):
    check_against_peft(tmp_path, llama(tmp_path / "base", dtype=torch.bfloat16), **CASES[name])


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor")  # of the biases of B
@pytest.mark.parametrize("asked", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_biases(asked, tmp_path):
    base = saved(tmp_path / "base", transformers.LlamaForCausalLM, **SIZES, attention_bias=True)
    adapted = check_against_peft(tmp_path, base, target_modules=ATTENTION, **asked)
    found = {name for name in adapted.changes if name.endswith("bias")}
    assert (f"{LAYER}.self_attn.q_proj.bias" in found) and (f"{LAYER}.self_attn.k_proj.bias" in found) == (
        asked.get("bias") == "all"
    )


@pytest.mark.parametrize("dora", [False, True])
def test_a_conv1d_is_stored_the_other_way_round(dora, tmp_path):
    """attn.c_proj is square, so that shapes do not tell."""
    base = saved(tmp_path / "base", transformers.GPT2LMHeadModel, **GPT2, tie_word_embeddings=False)
    adapted = check_against_peft(tmp_path, base, target_modules=["c_attn", "c_proj", "wte"], use_dora=dora, r=3)
    assert "transformer.h.0.attn.c_proj.weight" in adapted.changes


def test_an_int8_conv1d_is_stored_as_a_linear(tmp_path):
    base = saved(tmp_path / "base", transformers.GPT2LMHeadModel, **GPT2)
    convert(str(base), tmp_path / "int8")
    convert(str(tmp_path / "int8"), tmp_path / "float", format="float32")
    adapter = train(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], use_dora=True)
    merged = merge(tmp_path / "float", adapter, tmp_path / "merged")
    convert(str(tmp_path / "int8"), tmp_path / "ours", format="float32", adapter=str(adapter))
    ours, theirs = open_checkpoint(str(tmp_path / "ours")), open_checkpoint(str(merged))
    for name in theirs.tensors:
        np.testing.assert_allclose(rows_of(ours, name), rows_of(theirs, name), atol=1e-6)


def test_an_int8_conv1d_is_not_replaced(tmp_path):
    """It is square and stored the other way round, so that nothing else would tell."""
    base = saved(tmp_path / "base", transformers.GPT2LMHeadModel, **GPT2)
    convert(str(base), tmp_path / "int8")
    adapter = train(base, tmp_path / "adapter", target_modules=["c_attn"], modules_to_save=["attn.c_proj"])
    compare(open_checkpoint(str(base), adapter=str(adapter)), merge(base, adapter, tmp_path / "merged"))
    with pytest.raises(SourceError, match=r"replaces .*attn\.c_proj\.weight, a Conv1D that is quantized"):
        open_checkpoint(str(tmp_path / "int8"), adapter=str(adapter))


def experts_by_hand(base: Path, folder: Path, projections: list[str], names: list[str] | None = None) -> Path:
    """An adapter of every expert, as PEFT saved it when transformers had a module for each."""
    folder.mkdir()
    generator, state = torch.Generator().manual_seed(0), {}
    for name, info in open_checkpoint(str(base)).tensors.items():
        if (name in names) if names else name.split(".")[-2] in (*projections, "q_proj"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{module}.lora_A.weight"] = torch.randn(2, info.shape[1], generator=generator) / 10
            state[f"{module}.lora_B.weight"] = torch.randn(info.shape[0], 2, generator=generator) / 10
    save_file(state, folder / WEIGHTS)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[*projections, "q_proj"], base_model_name_or_path=str(base))
    config.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT's own, of experts
def test_separate_experts(tmp_path):
    base = mixtral(tmp_path / "base")
    adapter = experts_by_hand(base, tmp_path / "adapter", ["w1", "w2", "w3"])
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    changed = compare(adapted, merge(base, adapter, tmp_path / "merged"))
    assert sum("experts" in name for name in changed) == 2 * 4 * 3


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # but they are used
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
@pytest.mark.parametrize(
    "asked",
    [
        {"target_parameters": BOTH, "target_modules": ["q_proj"]},
        {"target_parameters": BOTH[1:]},
        {"target_parameters": BOTH[::-1], "rank_pattern": {"experts.down_proj": 5}, "use_rslora": True},
        {"target_parameters": [*BOTH, "o_proj.weight"], "alpha_pattern": {"o_proj.weight": 3, ".*gate_up_proj": 2}},
    ],
    ids=str,
)
def test_experts_that_transformers_joins(make, asked, tmp_path):
    base = make(tmp_path / "base")
    adapted = check_against_peft(tmp_path, base, r=3, **asked)
    matrices = 12 if "experts.gate_up_proj" in asked["target_parameters"] else 4
    assert sum("experts" in name for name in adapted.changes) == 2 * matrices


@pytest.mark.parametrize("kind", [transformers.GptOssForCausalLM, transformers.Llama4ForCausalLM])
def test_experts_that_are_stored_as_one_tensor(kind, tmp_path):
    """gpt-oss stores the matrices of its experts [K, N]; PEFT takes those of Llama 4 for [N, K], which they are not."""
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    base = saved(tmp_path / "base", kind, **sizes)
    adapted = check_against_peft(tmp_path, base, r=3, target_parameters=BOTH, target_modules=["q_proj"])
    names = {name for name in adapted.changes if "experts" in name}
    assert len(names) == 4 and all(len(adapted.tensors[name].shape) == 3 for name in names)
    for name in names:
        whole = rows_of(adapted, name)
        np.testing.assert_array_equal(np.concatenate(list(adapted.blocks(name, 1))), whole)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_fused_experts_become_int8_after_merging(model_type, tmp_path):
    base, kind = fused(tmp_path / "base", model_type), model_class(model_type)
    asked = ["up_proj", "down_proj"] if model_type == "nemotron_h" else ["gate_up_proj", "down_proj"]
    adapter = train(base, tmp_path / "adapter", kind, target_parameters=[f"experts.{name}" for name in asked], r=2)
    merged = merge(base, adapter, tmp_path / "merged", kind)
    for name in ("config.json", "generation_config.json"):  # PEFT's is in float32
        (merged / name).write_bytes((base / name).read_bytes())
    compare(open_checkpoint(str(base), adapter=str(adapter)), merged)
    convert(str(base), tmp_path / "ours", format="compressed-tensors", adapter=str(adapter))
    convert(str(merged), tmp_path / "theirs", format="compressed-tensors")
    ours, theirs = (open_checkpoint(str(tmp_path / name)) for name in ("ours", "theirs"))
    experts = {name for name in theirs.tensors if ".experts." in name and theirs.tensors[name].is_int8}
    assert experts and ours.tensors.keys() == theirs.tensors.keys()
    for name in experts:
        codes, expected = (found.int8_rows(name, 0, found.tensors[name].shape[0])[0] for found in (ours, theirs))
        assert np.abs(codes.astype(int) - expected).max() <= 1


def test_experts_of_which_some_are_adapted(tmp_path):
    """One matrix of one expert is float32 then, and where experts are read as one tensor, all of it is."""
    base = fused(tmp_path / "base", "nemotron_h")
    stored = [name for name in open_checkpoint(str(base)).tensors if "experts." in name and ".up_proj" in name]
    names = sorted(name for name in stored if "shared" not in name)
    adapter = experts_by_hand(base, tmp_path / "adapter", [], names[2:3])
    convert(str(base), tmp_path / "ours", format="compressed-tensors", adapter=str(adapter), check=True)
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    whole = FusedExperts(adapted, {"all": Fusion("all", tuple((name,) for name in names), False, False)})
    assert (whole.tensors["all"].dtype, whole.tensors["all"].float_dtype) == ("F32", "BF16")
    values = rows_of(whole, "all")
    assert values.dtype == np.float32 and whole.rows("all", 0, 1).dtype == np.float32
    for matrix, name in zip(values, names, strict=True):
        np.testing.assert_array_equal(matrix, rows_of(adapted, name).astype(np.float32))


def test_experts_in_int8(tmp_path):
    base = qwen3_moe(tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", target_parameters=BOTH)
    options = {"format": "compressed-tensors", "moe": "transformers", "adapter": str(adapter)}
    result = convert(str(base), tmp_path / "out", check=True, **options)
    assert result.check.parameters and sum("experts" in name for name in result.plan.modules) == 24


def test_experts_whose_parts_are_not_what_the_adapter_says(tmp_path):
    base = mixtral(tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", target_parameters=BOTH[1:], r=3)
    settings(adapter, r=2)
    with pytest.raises(SourceError, match=r"experts\.lora_A\.weight has the shape \[12, 48\], .* \[8, 48\]"):
        open_checkpoint(str(base), adapter=str(adapter))
    settings(adapter, r=3, target_parameters=[])
    with pytest.raises(SourceError, match=r"experts\.lora_A\.weight has no counterpart"):
        open_checkpoint(str(base), adapter=str(adapter))


def test_stacks_that_do_not_fit(tmp_path):
    base = open_checkpoint(str(mixtral(tmp_path / "base")))
    names = ModelNames(base, [])
    up, down = names.stacks("model.layers.0.mlp.experts")
    assert names.stacks("layers.0.mlp.experts") == [up, down] and names.stacks("model.nothing") == []
    assert [part.start for part in names.parts(up)] == [0] * 4 + [48] * 4 and len(names.parts(down)) == 4
    for wrong in ({"name": "x"}, {"shape": (5, 96, 32)}, {"shape": (4, 95, 32)}):
        assert names.parts(up._replace(**wrong)) == []


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_experts_that_are_changed_twice_or_that_are_no_matrices(tmp_path, monkeypatch):
    base = mixtral(tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", target_parameters=BOTH[1:], r=2)
    by_hand = load_file(experts_by_hand(base, tmp_path / "other", ["w2"]) / WEIGHTS)
    tensors(shutil.copytree(adapter, tmp_path / "both"), lambda state: state | by_hand)
    settings(tmp_path / "both", lora_alpha=6)
    with pytest.raises(SourceError, match=r"and another tensor both change .*experts\.\d\.w2\.weight"):
        open_checkpoint(str(base), adapter=str(tmp_path / "both"))
    monkeypatch.setattr(ModelNames, "parts", lambda *_: [])
    with pytest.raises(SourceError, match="does not store as matrices of its experts; merge it with PEFT"):
        open_checkpoint(str(base), adapter=str(adapter))


def llava(folder: Path) -> Path:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=63,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_names_of_the_model_that_the_checkpoint_does_not_have(old, tmp_path):
    """transformers 5 has model.language_model.layers, and stores language_model.model.layers as its releases before."""
    base, kind = llava(tmp_path / "base"), transformers.LlavaForConditionalGeneration
    adapter = train(base, tmp_path / "adapter", kind, target_modules=["q_proj", "linear_1"])
    assert not set(load_file(adapter / WEIGHTS)) & set(load_file(base / "model.safetensors"))
    merged = merge(base, adapter, tmp_path / "merged", kind)
    if old:
        names = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
        tensors(adapter, lambda state: {_renamed(key, names): value for key, value in state.items()})
    changed = compare(open_checkpoint(str(base), adapter=str(adapter)), merged)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed


def _renamed(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize("kind", ["lora_A", "modules_to_save"])
def test_two_names_of_the_same_weight(kind, tmp_path):
    base, model = llava(tmp_path / "base"), transformers.LlavaForConditionalGeneration
    asked = {"modules_to_save": ["down_proj"]} if kind == "modules_to_save" else {}
    adapter = train(base, tmp_path / "adapter", model, target_modules=["q_proj"], **asked)

    def both(state):
        last = "down_proj" if asked else "q_proj"
        names = {"model.language_model.": "language_model.model."}
        return state | {_renamed(key, names): value.clone() for key, value in state.items() if last in key}

    tensors(adapter, both)
    with pytest.raises(SourceError, match=r"both (replace|change) language_model\.model\.layers\.0"):
        open_checkpoint(str(base), adapter=str(adapter))


@pytest.mark.parametrize("changes", [{"architectures": ["Own"], "model_type": "own"}, {"num_attention_heads": -1}])
def test_a_model_that_transformers_does_not_know(changes, tmp_path):
    base = llama(tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION)
    merged = merge(base, adapter, tmp_path / "merged")
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}, **changes}
    (base / "config.json").write_text(json.dumps(config))
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    compare(adapted, merged)
    convert(str(base), tmp_path / "int8", adapter=str(adapter))
    # of a square weight, only the settings tell
    square, name = train_square(tmp_path / "square"), f"{LAYER}.self_attn.o_proj.weight"
    plain = rows_of(open_checkpoint(str(base)), name).astype(np.float32)
    straight = rows_of(open_checkpoint(str(base), adapter=str(square)), name) - plain
    settings(square, fan_in_fan_out=True)
    turned = rows_of(open_checkpoint(str(base), adapter=str(square)), name) - plain
    np.testing.assert_allclose(turned, straight.T, atol=1e-6)


def train_square(folder: Path) -> Path:
    """An adapter of a weight with as many rows as columns, made without a model."""
    folder.mkdir()
    generator, key = torch.Generator().manual_seed(0), f"base_model.model.{LAYER}.self_attn.o_proj.lora"
    state = {f"{key}_{part}.weight": torch.randn(32, 32, generator=generator) / 10 for part in "AB"}
    save_file(state, folder / WEIGHTS)
    LoraConfig(r=32, lora_alpha=32).save_pretrained(folder)
    return folder


def test_a_base_without_a_head(tmp_path):
    """The adapter of a model without the head, whose names have no model. before them."""
    base = llama(tmp_path / "base")
    kind = transformers.LlamaModel
    adapter = train(base, tmp_path / "adapter", kind, target_modules=ATTENTION)
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    merged = open_checkpoint(str(merge(base, adapter, tmp_path / "merged", kind)))
    for name in adapted.changes:
        theirs = rows_of(merged, name.removeprefix("model."))
        np.testing.assert_allclose(rows_of(adapted, name), theirs, atol=1e-6)


def test_a_pickled_adapter(tmp_path):
    base = llama(tmp_path / "base")
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION)
    merged = merge(base, adapter, tmp_path / "merged")
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    compare(open_checkpoint(str(base), adapter=str(adapter)), merged)
    torch.save({"base_model.model.q_proj.lora_A.weight": Path("x")}, adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"adapter_model\.bin: holds objects or code besides tensors"):
        open_checkpoint(str(base), adapter=str(adapter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_16_bits_is_taken_as_it_is(dtype, tmp_path):
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION, r=4, lora_alpha=2)
    tensors(adapter, lambda state: {key: value.to(dtype) for key, value in state.items()})
    adapted, state = open_checkpoint(str(base), adapter=str(adapter)), load_file(adapter / WEIGHTS)
    name = f"{LAYER}.self_attn.q_proj"
    a, b = (state[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    expected = load_file(base / "model.safetensors")[f"{name}.weight"].double() + 0.5 * b @ a
    np.testing.assert_allclose(rows_of(adapted, f"{name}.weight"), expected.float().numpy(), atol=1e-6)


# Blocks, threads and memory


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A base, and an adapter with DoRA of its weights and its embedding."""
    root = tmp_path_factory.mktemp("adapter")
    base = word_tokenizer(llama(root / "base", dtype=torch.bfloat16))
    targets = ["embed_tokens", *ATTENTION, "down_proj"]
    return base, train(base, root / "adapter", target_modules=targets, use_dora=True, modules_to_save=["lm_head"])


def test_the_same_bytes_whatever_the_blocks(made):
    base, adapter = made
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    for name in adapted.tensors:
        whole = rows_of(adapted, name)
        for size in (1, 300, 1000, None):
            again = open_checkpoint(str(base), adapter=str(adapter))
            blocks = list(again.blocks(name, size, 1 if size != 1000 else 4))
            np.testing.assert_array_equal(np.concatenate(blocks), whole)
            assert size is None or len(blocks) > 1 or whole.ndim == 1


def test_the_same_bytes_for_any_number_of_threads(made, tmp_path):
    base, adapter = made
    for workers in (1, 2, 5):
        convert(str(base), tmp_path / f"{workers}", adapter=str(adapter), workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "5")


def test_memory_holds_a_few_blocks(tmp_path):
    base = llama(tmp_path / "base", hidden=1024, layers=1, dtype=torch.float32)
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    adapted, name = open_checkpoint(str(base), adapter=str(adapter)), f"{LAYER}.self_attn.q_proj.weight"
    size = 64 * 2**10
    next(adapted.blocks(name, size))  # the matrices of the adapter stay
    tracemalloc.start()
    for _ in adapted.blocks(name, size):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert adapted.tensors[name].nbytes == 4 * 2**20 and peak < 10 * size


# Formats


def test_int8_is_rounded_from_the_merged_numbers(made, tmp_path):
    base, adapter = made
    adapted = open_checkpoint(str(base), adapter=str(adapter))
    result = convert(str(base), tmp_path / "int8", adapter=str(adapter), check=True)
    assert result.check.parameters and result.check.error < 0.1
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    for module in result.plan.modules:
        codes, absmax = reference.quantize_rowwise(rows_of(adapted, f"{module}.weight"))
        np.testing.assert_array_equal(stored[f"{module}.weight"].numpy(), codes)
        np.testing.assert_array_equal(stored[f"{module}.SCB"].numpy(), absmax)
    embedding = rows_of(adapted, "model.embed_tokens.weight")
    assert stored["model.embed_tokens.weight"].dtype == stored["lm_head.weight"].dtype == torch.bfloat16
    expected = embedding.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"].float().numpy(), expected)
    verify(tmp_path / "int8")
    record = read_manifest(tmp_path / "int8").tensors[f"{LAYER}.self_attn.q_proj.weight"]
    assert record.quantized.source_dtype == "BF16"


@pytest.mark.parametrize("format", ["bfloat16", "float16", "float32", "compressed-tensors"])
def test_other_formats(format, made, tmp_path):
    base, adapter = made
    merged = merge(base, adapter, tmp_path / "merged")
    options = {"format": format, "check": True}
    convert(str(base), tmp_path / "ours", adapter=str(adapter), **options)
    ours, theirs = open_checkpoint(str(tmp_path / "ours")), open_checkpoint(str(merged))
    step = {"compressed-tensors": 1 / 127, "bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6}[format]
    for name, info in theirs.tensors.items():
        if format not in ("compressed-tensors", "float32"):
            assert ours.tensors[name].dtype == {"bfloat16": "BF16", "float16": "F16"}[format], name
        expected = rows_of(theirs, name)
        scale = np.abs(expected).max(axis=-1, keepdims=len(info.shape) > 1)
        assert (np.abs(rows_of(ours, name).astype(np.float32) - expected) <= step * scale + 1e-7).all(), name


def test_tensors_keep_the_dtype_of_the_base(tmp_path):
    """A weight that the base has in float32 beside bfloat16 stays float32, adapted or not."""

    def edit(state):
        state[f"{LAYER}.self_attn.q_proj.weight"] = state[f"{LAYER}.self_attn.q_proj.weight"].float()

    base = llama(tmp_path / "base", dtype=torch.bfloat16, edit=edit)
    adapter = train(base, tmp_path / "adapter", target_modules="all-linear")
    found = plan(str(base), format="float16", adapter=str(adapter)).plan
    assert found.main_dtype == "BF16"
    assert found.outputs[f"{LAYER}.self_attn.q_proj.weight"][0].dtype == "F32"
    assert found.outputs[f"{LAYER}.self_attn.v_proj.weight"][0].dtype == "F16"


def test_int8_sources_keep_the_codes_of_what_is_not_adapted(made, tmp_path):
    base, _ = made
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION)
    convert(str(base), tmp_path / "int8")
    result = convert(str(tmp_path / "int8"), tmp_path / "again", adapter=str(adapter), check=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("int8", "again"))
    same = {name for name in after if after[name].equal(before[name])}
    assert f"{LAYER}.self_attn.k_proj.weight" in same and f"{LAYER}.self_attn.q_proj.weight" not in same
    assert not result.plan.carries
    convert(str(tmp_path / "int8"), tmp_path / "float", format="float32")
    merged = open_checkpoint(str(merge(tmp_path / "float", adapter, tmp_path / "merged")))
    adapted = open_checkpoint(str(tmp_path / "int8"), adapter=str(adapter))
    for name in adapted.changes:
        np.testing.assert_allclose(rows_of(adapted, name), rows_of(merged, name), atol=1e-6)


def test_gguf_to_and_from(tmp_path):
    base = folder_of(tmp_path / "base", config_of("llama"))
    shutil.copytree(base / "tokenizer", base, dirs_exist_ok=True)
    shutil.rmtree(base / "tokenizer")
    adapter = train(base, tmp_path / "adapter", target_modules=[*ATTENTION, "down_proj"])
    merged = merge(base, adapter, tmp_path / "merged")
    shutil.copytree(base, tmp_path / "as merged")
    save_file(load_file(merged / "model.safetensors"), tmp_path / "as merged" / "model.safetensors")
    convert(str(base), tmp_path / "ours", format="gguf", adapter=str(adapter))
    convert(str(tmp_path / "as merged"), tmp_path / "theirs", format="gguf")
    convert(str(base), tmp_path / "plain", format="gguf")
    again = convert(str(tmp_path / "plain"), tmp_path / "from gguf", format="gguf", adapter=str(adapter))
    assert again.manifest.source["adapter"] == "adapter"
    ours, theirs, twice = (open_checkpoint(str(tmp_path / name)) for name in ("ours", "theirs", "from gguf"))
    for name in theirs.tensors:
        expected = rows_of(theirs, name).astype(np.float32)
        for found in (ours, twice):
            off = np.abs(rows_of(found, name).astype(np.float32) - expected).max()
            assert off <= 0.03 * np.abs(expected).max(), name


# What is recorded, and resuming


def test_everything_names_the_adapter(made, tmp_path):
    base, adapter = made
    result = convert(str(base), tmp_path / "int8", adapter=str(adapter))
    source = read_manifest(tmp_path / "int8").source
    assert source == {
        "id": "base",
        "adapter": "adapter",
        "adapter_blake3": digest((adapter / WEIGHTS).read_bytes()),
        "adapter_config_blake3": digest((adapter / CONFIG).read_bytes()),
        "adapter_base": "base",
    }
    text = card(tmp_path / "int8", result.manifest, "me/model", None)
    assert "base with the adapter adapter merged" in text and source["adapter_blake3"] in text
    assert result.plan.default_out == Path("base-adapter-int8")
    assert result.as_json()["source"]["adapter"] == "adapter"


def test_the_page_and_the_command_line(made, tmp_path, monkeypatch, capsys):
    base, adapter = made
    words = ["convert", base, "--adapter", adapter, "--out", tmp_path / "out", "--report", tmp_path / "page.html"]
    monkeypatch.setattr("sys.argv", ["quantize8", *map(str, words)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "adapter, merged into base" in capsys.readouterr().out
    assert "with the adapter <code>adapter</code> merged" in (tmp_path / "page.html").read_text()
    assert read_manifest(tmp_path / "out").source["adapter"] == "adapter"


@pytest.mark.parametrize(
    ("base", "recorded"),
    [
        ("org/model", "org/model"),
        ("/home/me/model/", "model"),
        ("C:\\models\\base", "base"),
        ("./x", "x"),
        ("a/b/c", "c"),
    ],
)
def test_no_path_of_the_base_is_recorded(base, recorded, made, tmp_path):
    adapter = shutil.copytree(made[1], tmp_path / "adapter")
    settings(adapter, base_model_name_or_path=base)
    assert open_checkpoint(str(made[0]), adapter=str(adapter)).identity["adapter_base"] == recorded


def another(adapter: Path, folder: Path) -> Path:
    """The same adapter with one other number."""

    def edit(state):
        next(iter(state.values())).view(-1)[0] += 1

    shutil.copytree(adapter, folder)
    tensors(folder, edit)
    return folder


def test_parts_and_finalize(made, tmp_path, monkeypatch):
    base, adapter = made
    monkeypatch.chdir(adapter.parent)  # the journals record the absolute path
    out, size = tmp_path / "out", {"max_shard_size": "10KB"}
    for part in ("1/2", "2/2"):
        convert("base", out, adapter="adapter", part=part, **size)
    with pytest.raises(OutputError, match=r"another adapter \(adapter\)"):
        convert("base", out, adapter=str(another(adapter, tmp_path / "adapter")), part="1/2", **size)
    with pytest.raises(OutputError, match="another adapter"):
        convert("base", out, part="1/2", **size)
    monkeypatch.chdir(tmp_path)
    finalize(out)
    convert(str(base), tmp_path / "whole", adapter=str(adapter), **size)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("changed", [WEIGHTS, CONFIG, None])
def test_only_the_same_adapter_resumes(changed, made, tmp_path, monkeypatch):
    base, adapter = made[0], shutil.copytree(made[1], tmp_path / "adapter")
    convert(str(base), tmp_path / "whole", adapter=str(adapter))
    original, count = Writer.write, iter(range(9))

    def write(self, source, quantizer):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(self, source, quantizer)

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        convert(str(base), tmp_path / "out", adapter=str(adapter), workers=1)
    monkeypatch.setattr(Writer, "write", original)
    if changed is None:
        assert convert(str(base), tmp_path / "out", adapter=str(adapter)).resumed == 9
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")
        return
    if changed == CONFIG:
        settings(adapter, lora_alpha=9)
    else:
        tensors(adapter, lambda state: {key: value * 2 for key, value in state.items()})
    with pytest.raises(OutputError, match="another adapter"):
        convert(str(base), tmp_path / "out", adapter=str(adapter))


def test_work_without_an_adapter_is_not_resumed_with_one(made, tmp_path):
    base, adapter = made
    convert(str(base), tmp_path / "out", part="1/2", max_shard_size="10KB")
    with pytest.raises(OutputError, match="unfinished conversion with no adapter"):
        convert(str(base), tmp_path / "out", adapter=str(adapter), part="1/2", max_shard_size="10KB")


def test_an_adapter_that_changes_while_it_is_read(made, tmp_path, monkeypatch):
    base, adapter = made[0], shutil.copytree(made[1], tmp_path / "adapter")
    original = Writer.write

    def write(self, source, quantizer):
        settings(adapter, lora_alpha=3)
        return original(self, source, quantizer)

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(OutputError, match="the source changed while it was read"):
        convert(str(base), tmp_path / "out", adapter=str(adapter), workers=1)


def test_the_options_carry_the_adapter(made, tmp_path, monkeypatch):
    _, adapter = made
    monkeypatch.chdir(adapter.parent)
    options = ConvertOptions("base", adapter=Path("adapter"))
    assert options.adapter == "adapter" and options.absolute().adapter == str(adapter)
    assert f"--adapter {adapter}" in options.command("out")
    assert "adapter" not in options.decisions()
    assert ConvertOptions("base").adapter is None


def test_an_artifact_of_the_base_alone_fails_the_check(made, tmp_path):
    base, adapter = made
    convert(str(base), tmp_path / "plain")
    with pytest.raises(ArtifactError, match="differs from the source"):
        check(open_checkpoint(str(base), adapter=str(adapter)), open_checkpoint(str(tmp_path / "plain")))


def test_calibration_sees_the_merged_model(made, tmp_path):
    base, adapter = made
    text = tmp_path / "text"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8)
    merged = merge(base, adapter, tmp_path / "merged")
    word_tokenizer(merged)
    options = {"calibrate": str(text), "outlier_columns": "2", "smooth": 0.5}
    ours = convert(str(base), tmp_path / "ours", adapter=str(adapter), check=True, **options)
    theirs = convert(str(merged), tmp_path / "theirs", **options)
    found = [{name: one.columns.tolist() for name, one in result.plan.calibrated.items()} for result in (ours, theirs)]
    assert found[0] == found[1] and ours.plan.smoothed


# What is refused


def _without(part):
    def edit(adapter):
        tensors(adapter, lambda state: {key: value for key, value in state.items() if part not in key})

    return edit


def _with(name, value):
    def edit(adapter):
        def add(state):
            state[name] = value

        tensors(adapter, add)

    return edit


def _set(**changes):
    return lambda adapter: settings(adapter, **changes)


def _number(number):
    def edit(adapter):
        def put(state):
            state[f"{Q}.lora_B.weight"][3, 1] = number

        tensors(adapter, put)

    return edit


def _named(old, new):
    def edit(adapter):
        tensors(adapter, lambda state: {key.replace(old, new): value for key, value in state.items()})

    return edit


def _write(name, data):
    return lambda adapter: (adapter / name).write_bytes(data)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = [
    (lambda adapter: shutil.rmtree(adapter), r"adapter: no folder with adapter_config\.json; name the folder"),
    (lambda adapter: (adapter / CONFIG).unlink(), r"no folder with adapter_config\.json"),
    (lambda adapter: (adapter / WEIGHTS).unlink(), r"has no adapter_model\.safetensors; fetch the adapter again"),
    (_write(CONFIG, b"{"), r"adapter_config\.json: not readable as JSON"),
    (_write(CONFIG, b"[]"), r"contains no JSON object"),
    (_write(WEIGHTS, b"x" * 30), r"adapter_model\.safetensors: not a whole safetensors file"),
    (_set(peft_type="IA3"), r"is an adapter of type IA3, and only LORA is merged"),
    (_set(peft_type=None), r"is an adapter of type None"),
    (_set(peft_type=["LORA"]), r"is an adapter of type \['LORA'\]"),
    (_set(target_parameters="experts"), r"target_parameters is not a list of names"),
    (_set(layer_replication=[[0, 1]]), r"has layer_replication"),
    (_set(alora_invocation_tokens=[1]), r"has alora_invocation_tokens"),
    (_set(init_lora_weights="pissa_niter_4"), r"init_lora_weights 'pissa_niter_4', which changes the base"),
    (_set(init_lora_weights={}), r"init_lora_weights \{\}"),
    (_set(r=0), r"r is 0 and lora_alpha 8"),
    (_set(r="8"), r"r is '8'"),
    (_set(r=True), r"r is True"),
    (_set(lora_alpha="x"), r"lora_alpha 'x'"),
    (_set(lora_alpha=10**400), r"lora_alpha 1000"),
    (_set(rank_pattern={"q_proj": -1}), r"rank_pattern is not an object of positive numbers"),
    (_set(rank_pattern=[1]), r"rank_pattern is not an object"),
    (_set(alpha_pattern={"(a+)+b": 1}), r"alpha_pattern has the pattern '\(a\+\)\+b', which is not read"),
    (_set(alpha_pattern={".*.*.*.*x": 1}), r"has the pattern '\.\*\.\*\.\*\.\*x'"),
    (_set(alpha_pattern={"[": 1}), r"has the pattern '\['"),
    (_set(use_dora=True), r"lora_\w\.weight has no magnitude vector beside it"),
    (_set(r=4), r"lora_A\.weight has rank 8, .*lora_B\.weight rank 8, and adapter_config\.json says 4"),
    (_set(rank_pattern={"v_proj": 2}), r"v_proj\.lora_A\.weight has rank 8, .* says 2"),
    (_without("q_proj.lora_B"), r"q_proj\.lora_A\.weight has no B beside it"),
    (_without("q_proj.lora_A"), r"q_proj\.lora_B\.weight has no A beside it"),
    (_without(""), r"holds no tensors"),
    (_number(float("nan")), r"0\.self_attn\.q_proj\.lora_B\.weight holds NaN or infinity"),
    (_number(float("inf")), r"lora_B\.weight holds NaN or infinity"),
    (
        lambda adapter: (_number(3e38)(adapter), settings(adapter, lora_alpha=2**20)),
        r"makes model\.layers\.0\.self_attn\.q_proj\.weight of the base NaN or infinite",
    ),
    (_with(f"{Q}.lora_A.weight", torch.zeros(8, 33)), r"lora_A\.weight \[8, 33\] and .* do not fit .*\[32, 32\]"),
    (_with(f"{Q}.lora_B.weight", torch.zeros(32, 7)), r"rank 8, .*lora_B\.weight rank 7"),
    (_with(f"{Q}.lora_A.weight", torch.zeros(8, 32, 1, 1)), r"are not matrices"),
    (_with(f"{Q}.lora_B.bias", torch.zeros(32)), r"lora_B\.bias has no bias in the base"),
    (_with(f"{Q}.lora_A.weight", torch.zeros(8, 32, dtype=torch.float64)), r"is F64, not F16, BF16, F32"),
    (_with(f"{Q}.lora_A.other.weight", torch.zeros(2)), r"lora_A\.other\.weight is not a part of a LoRA adapter"),
    (_with(f"{Q}.lora_embedding_A", torch.zeros(8, 32)), r"stand for the same"),
    (_with("model.norm.weight", torch.zeros(32)), r"model\.norm\.weight does not begin with base_model\.model\."),
    (_with("base_model.model.score.weight", torch.zeros(2, 32)), r"score\.weight has no counterpart in base"),
    (_with("base_model.model.model.norm.weight", torch.zeros(31)), r"norm\.weight has the shape \[31\], .* \[32\]"),
    (_with("base_model.model.model.norm.weight", torch.full((32,), torch.nan)), r"norm\.weight holds NaN"),
    (
        _with("base_model.model.model.embed_tokens.weight", torch.zeros(70, 32)),
        r"has 70 rows, .* 64: tokens were added",
    ),
    (_with("base_model.model.lm_head.weight", torch.zeros(64, 32, dtype=torch.int8)), r"is I8, not F16"),
    (_named("layers.1.", "layers.7."), r"layers\.7\.self_attn\.q_proj\.lora_A\.weight has no counterpart in base"),
    (_named("q_proj.lora_A.weight", "q_proj.lora_embedding_A"), r"are of different kinds of layers"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("plain")
    base = llama(root / "base")
    return base, train(base, root / "adapter", target_modules=ATTENTION)


@pytest.mark.parametrize(("damage", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line(damage, message, plain, tmp_path):
    base, adapter = plain[0], shutil.copytree(plain[1], tmp_path / "adapter")
    damage(adapter)
    with pytest.raises(SourceError, match=message) as caught:
        convert(str(base), tmp_path / "out", adapter=str(adapter))
    assert "\n" not in str(caught.value) and "adapter" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_not_followed(plain, tmp_path):
    adapter = shutil.copytree(plain[1], tmp_path / "adapter")
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="points outside its model folder"):
        open_checkpoint(str(plain[0]), adapter=str(adapter))


def test_a_base_that_is_damaged_is_named_and_not_the_adapter(plain, tmp_path):
    def edit(state):
        state[f"{LAYER}.self_attn.q_proj.weight"][5, 5] = torch.nan

    base = llama(tmp_path / "base", edit=edit)
    with pytest.raises(WeightError, match=r"model\.safetensors: .*q_proj\.weight row 5 holds NaN"):
        convert(str(base), tmp_path / "out", adapter=str(plain[1]))


# Weights that the model ties


TIED = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": [*ATTENTION, "embed_tokens"]},
    {"target_modules": [*ATTENTION, "lm_head"]},
    {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True},
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # PEFT does not know wte
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("asked", TIED, ids=str)
def test_a_tied_weight_becomes_two_that_compute_what_the_adapter_computed(asked, family, tmp_path):
    """PEFT's own merge changes both uses of the weight, also if only one was trained."""
    if family == "llama":
        base = llama(tmp_path / "base", tied=True, dtype=torch.float32)
    else:
        base = saved(tmp_path / "base", transformers.GPT2LMHeadModel, **GPT2)
        asked = json.loads(json.dumps(asked).replace("embed_tokens", "wte").replace("q_proj", "c_attn"))
        asked["target_modules"] = [name for name in asked.get("target_modules", ["c_attn"]) if name != "v_proj"]
    adapter = train(base, tmp_path / "adapter", **{"target_modules": ATTENTION, **asked})
    ids = torch.arange(2, 40)[None]
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    result = convert(str(base), tmp_path / "out", format="float32", adapter=str(adapter), check=True)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not made.config.tie_word_embeddings and "become a weight each" in shown(result)
    with torch.inference_mode():
        expected, logits = model(ids).logits, made(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    names = (name for name in open_checkpoint(str(base)).tensors if "attn" not in name)
    assert {*names, "lm_head.weight"} <= set(result.manifest.tensors)


def test_a_tied_weight_that_is_not_adapted_stays_tied(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION)
    result = convert(str(base), tmp_path / "out", adapter=str(adapter))
    assert "lm_head.weight" not in result.manifest.tensors and "become a weight each" not in shown(result)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_weight_that_is_stored_twice(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    adapter = train(base, tmp_path / "adapter", target_modules=ATTENTION, modules_to_save=["embed_tokens"])
    state = load_file(base / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.zeros(64, 32)}, base / "model.safetensors")
    with pytest.raises(SourceError, match=r"the same weight as lm_head\.weight \(tie_word_embeddings\); save the base"):
        open_checkpoint(str(base), adapter=str(adapter))


def shown(result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(reports.conversion(result))
    return console.export_text()
