"""llama.cpp itself, if the package xllamacpp is installed, on our files: the same tokens, the same logits.

llama.cpp rounds activations to int8 and stores keys and values in float16, so logits differ by a few percent. Rows in
the wrong order, lost biases or wrong rotary frequencies make them differ as much as those of unrelated models.
"""

import json
from dataclasses import replace

import pytest
import torch
from gguf import Keys
from helpers.gguf_files import WRITTEN, assemble, config_of, dequantized, folder_of, multimodal
from safetensors.torch import load_file, save_file
from test_mxfp4 import packed
from transformers import AutoModelForCausalLM

from benchmarks.llama_cpp import served
from quantize8 import convert
from quantize8.formats.gguf import architectures as gguf
from quantize8.formats.gguf.tokenizer import tokenizer_fields
from quantize8.kernels.scales import ScaleSearch
from quantize8.sources import open_checkpoint

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
TEXT = "The State of the Union: 12345 isn't 3.14, naïve café — 東京 🦙!\n\n  def f(x):\n\treturn x  # <|im_end|>\n"


def difference(path, model, ids):
    """How far logits are apart, root mean square, in the spread of the model's own; both up to a constant."""
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].float()
    with served(path) as server:
        got = server.logprobs(ids, len(expected))
    return float(((got - got.mean()) - (expected - expected.mean())).std() / expected.std())


IDS = [1, *(3 + number * 37 % 290 for number in range(120))]


@pytest.mark.parametrize("family", WRITTEN)
def test_logits_of_each_family(family, tmp_path):
    config = config_of(family)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) < 0.1


def test_logits_with_searched_scales(tmp_path):
    config = config_of("llama")
    source = folder_of(tmp_path / "model", config)
    for path in (source / "tokenizer").iterdir():
        path.rename(source / path.name)
    convert(str(source), tmp_path / "out", format="gguf", scale="mse")
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert difference(path, dequantized(config, ScaleSearch()), IDS) < 0.1
    assert difference(path, dequantized(config), IDS) > 0.1  # or nothing would be tested


def test_rows_in_transformers_order_would_show(tmp_path, monkeypatch):
    config = config_of("llama")
    monkeypatch.setattr(gguf.GgufTensor, "arrange", lambda _, rows: rows)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) > 0.5


GATE, UP, DOWN = (names[0] for names in gguf.Experts().parts.values())
MISTAKES = {
    "rows of heads in another order": ("qwen2moe", {"interleaved": True}),
    "rows of heads in transformers' order": ("mixtral", {"interleaved": False}),
    "norms without the 1 that Gemma 2 adds": ("gemma2", {"norm_offset": 0.0}),
    "norms without the 1 that Gemma 3 adds": ("gemma3", {"norm_offset": 0.0}),
    "another sliding window in Gemma 2": ("gemma2", {"counts": {Keys.Attention.SLIDING_WINDOW: 128}}),
    "another sliding window in Gemma 3": ("gemma3", {"counts": {Keys.Attention.SLIDING_WINDOW: 128}}),
    "another sliding window in gpt-oss": ("gpt-oss", {"counts": {Keys.Attention.SLIDING_WINDOW: 128}}),
    "logits not capped at the same magnitude": (
        "gemma2",
        {"reals": {Keys.LLM.FINAL_LOGIT_SOFTCAPPING: "initializer_range"}},
    ),
    "gate and up projection exchanged": (
        "mixtral",
        {
            "experts": replace(
                gguf.FAMILIES["MixtralForCausalLM"].experts, parts={"w1": (UP,), "w3": (GATE,), "w2": (DOWN,)}
            )
        },
    ),
    "alternating rows exchanged": (
        "gpt-oss",
        {
            "experts": replace(
                gguf.FAMILIES["GptOssForCausalLM"].experts,
                parts={"gate_up_proj": (UP, GATE), "down_proj": (DOWN,)},
            )
        },
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_table_would_show(mistake, tmp_path, monkeypatch):
    family, changes = MISTAKES[mistake]
    config = config_of(family)
    (name,) = config["architectures"]
    monkeypatch.setitem(gguf.FAMILIES, name, replace(gguf.FAMILIES[name], **changes))
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) > 0.2


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_in_another_order_would_show(family, tmp_path, monkeypatch):
    number = gguf.expert_of
    monkeypatch.setattr(gguf, "expert_of", lambda name: -number(name))
    config = config_of(family)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) > 0.2


@pytest.mark.parametrize(("original", "rest"), [(64, "short_factor"), (256, "long_factor")])
def test_long_and_short_factors_of_phi3(original, rest, tmp_path):
    """llama.cpp takes the long ones if its context, at least 256, is longer than the original one.

    The embedding is scaled up for the longer context, which sharpens attention, and so adds to the error.
    """
    scaling = {"type": "longrope", "short_factor": [1.0 + i / 16 for i in range(16)]}
    scaling["long_factor"] = [1.0 + i / 4 for i in range(16)]
    context = {"original_max_position_embeddings": original, "max_position_embeddings": 512, "hidden_size": 128}
    config = config_of("phi3", **context, rope_scaling=scaling)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) < 0.15
    other = config_of(
        "phi3", **context, rope_scaling={**scaling, "short_factor": [2.0] * 16, "long_factor": [2.0] * 16}
    )
    assert difference(tmp_path / "tiny.gguf", dequantized(other), IDS) > 0.3
    same = config_of("phi3", **context, rope_scaling={**scaling, rest: [2.0] * 16})
    assert difference(tmp_path / "tiny.gguf", dequantized(same), IDS) < 0.15


def test_gpt_oss_with_its_rotary_embeddings(tmp_path):
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0}
    sizes = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 131072}
    config = config_of("gpt-oss", **sizes, rope_parameters={**rope, "truncate": False})
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) < 0.1
    assert difference(tmp_path / "tiny.gguf", dequantized(config_of("gpt-oss", **sizes)), IDS) > 0.5


def test_gpt_oss_as_it_is_published(tmp_path):
    """In MXFP4, whose blocks of 32 become blocks of Q8_0 without any loss."""
    source = folder_of(tmp_path / "source", config_of("gpt-oss", dtype="bfloat16"))
    for path in (source / "tokenizer").iterdir():
        path.rename(source / path.name)
    state = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"], state[f"{name}_scales"] = packed(experts, rows, columns, 120, 125)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    config = config_of("gpt-oss", dtype="bfloat16", quantization_config={"quant_method": "mxfp4"})
    (source / "config.json").write_text(json.dumps(config))
    result = convert(str(source), tmp_path / "out", format="gguf", check=True)
    experts = {name: each.quantized for name, each in result.manifest.tensors.items() if "exps.weight[" in name}
    assert len(experts) == 24 and {each.relative_error for each in experts.values()} == {0.0}
    assert {each.source_dtype for each in experts.values()} == {"MXFP4"}
    convert(str(source), tmp_path / "float32", format="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.float32).eval()
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert difference(path, model, IDS) < 0.1


@pytest.mark.parametrize("prefixes", [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_the_language_model_of_gemma3_with_images(prefixes, tmp_path):
    assemble(multimodal(tmp_path / "model", *prefixes), tmp_path / "tiny.gguf")
    assert difference(tmp_path / "tiny.gguf", dequantized(config_of("gemma3")), IDS) < 0.1


@pytest.mark.parametrize(
    ("rope", "family"),
    [(rope, family) for rope in ROPES for family in ("llama", "qwen2") if (rope, family) != ("llama3", "qwen2")],
)
def test_logits_with_scaled_rotary_frequencies(rope, family, tmp_path):
    config = config_of(family, hidden_size=256, rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    plain = config_of(family, hidden_size=256)
    assert difference(tmp_path / "tiny.gguf", dequantized(config), IDS) < 0.1
    assert difference(tmp_path / "tiny.gguf", dequantized(plain), IDS) > 0.5  # or nothing would be tested


def test_smollm2_reads_and_continues_as_in_transformers(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = open_checkpoint(str(smollm2)).config
    fields = [*gguf.settings(config, "SmolLM2", smollm2), *tokenizer_fields(smollm2, config)]
    assemble(smollm2, tmp_path / "smollm2.gguf", fields)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is")["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    with served(tmp_path / "smollm2.gguf") as server:
        assert server.tokens(TEXT, add_special=True) == tokenizer(TEXT)["input_ids"]
        assert server.ask("/apply-template", messages=[{"role": "user", "content": "Hi"}])["prompt"].startswith(chat)
        answer = server.ask("/completion", prompt=prompt, n_predict=12, temperature=0, return_tokens=True)
        assert answer["tokens"] == expected
    assert difference(tmp_path / "smollm2.gguf", model, tokenizer(TEXT)["input_ids"]) < 0.1


def test_sentencepiece_cuts_as_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    assemble(folder_of(tmp_path / "model", config_of("llama")), tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    with served(tmp_path / "tiny.gguf") as server:
        for text in ("the hand and then another", "  two  spaces", "Ünïcode 東京\n", "use <tool> now", "x"):
            assert server.tokens(text, add_special=True) == tokenizer(text)["input_ids"], text
