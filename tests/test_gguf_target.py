"""Writing GGUF: transformers, gguf's reader and our own reader find in the file what the checkpoint holds."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers import gguf_files
from helpers.gguf_files import FAMILIES, MERGED, assemble, config_of, dequantized, folder_of, write_tokenizer
from transformers import AutoModelForCausalLM

from quantize8 import SourceError
from quantize8.formats.gguf import architectures as gguf
from quantize8.formats.gguf.settings import llama3_scaling
from quantize8.formats.gguf.tokenizer import tokenizer_fields
from quantize8.formats.gguf.writer import carried
from quantize8.kernels import q8_0
from quantize8.kernels.reference import quantize_rowwise, scale_of
from quantize8.sources import open_checkpoint

IDS = torch.arange(3, 63)[None]
EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def shapes_of(folder):
    return {name: info.shape for name, info in open_checkpoint(str(folder)).tensors.items()}


def value_of(reader, key):
    return reader.fields[key].contents()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama-biased"])
def test_transformers_computes_what_the_dequantized_model_does(family, tmp_path):
    config = config_of(family)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dequantized(config)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_reader_finds_every_tensor_under_its_name(family, tmp_path):
    config = config_of(family)
    header = assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").stat().st_size == header.nbytes
    checkpoint, expected = open_checkpoint(str(tmp_path / "tiny.gguf")), dequantized(config).state_dict()
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value.numpy().astype(np.float16), name)


def test_kinds_places_and_settings_as_gguf_reads_them(tmp_path):
    header = assemble(folder_of(tmp_path / "model", config_of("qwen3")), tmp_path / "tiny.gguf")
    reader = GGUFReader(tmp_path / "tiny.gguf")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("Q8_0" if len(tensor.shape) == 2 else "F32"), tensor.name
        assert tensor.data_offset == header.offsets[tensor.name] and tensor.data_offset % 32 == 0
    assert value_of(reader, "general.architecture") == "qwen3" and value_of(reader, "general.name") == "tiny"
    assert value_of(reader, "general.file_type") == 7 and value_of(reader, "general.quantization_version") == 2
    sizes = {"block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 128, "vocab_size": 320}
    assert {key: value_of(reader, f"qwen3.{key}") for key in sizes} == sizes
    assert value_of(reader, "qwen3.rope.freq_base") == 10000
    assert value_of(reader, "qwen3.attention.layer_norm_rms_epsilon") == np.float32(1e-6)


def test_the_same_bytes_twice(tmp_path):
    folder = folder_of(tmp_path / "model", config_of("llama"))
    assert assemble(folder, tmp_path / "a.gguf") == assemble(folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_metadata_of_a_gguf_source_is_carried_unchanged(smollm2_gguf, tmp_path):
    assemble(smollm2_gguf, tmp_path / "out.gguf", carried(open_checkpoint(str(smollm2_gguf)).header))
    before, after = GGUFReader(smollm2_gguf), GGUFReader(tmp_path / "out.gguf")
    kept = [name for name in before.fields if not name.startswith("GGUF.") and name != "general.file_type"]
    assert set(kept) <= set(after.fields) and len(kept) == 32
    for name in kept:
        assert value_of(before, name) == value_of(after, name), name
        assert before.fields[name].types == after.fields[name].types
    assert value_of(after, "general.file_type") == 7
    assert {tensor.name for tensor in before.tensors} == {tensor.name for tensor in after.tensors}


def test_a_folder_gives_the_metadata_of_the_gguf_that_it_was_made_from(smollm2, smollm2_gguf):
    config = open_checkpoint(str(smollm2)).config
    ours = {field.key: field for field in [*gguf.settings(config, "x", smollm2), *tokenizer_fields(smollm2, config)]}
    theirs = {field.key: field for field in carried(open_checkpoint(str(smollm2_gguf)).header)}
    about = {"general.name", "general.organization", "general.finetune", "general.basename", "general.size_label"}
    about |= {"general.license", "general.languages", "tokenizer.ggml.add_space_prefix"}  # of no meaning to gpt2
    assert set(theirs) - set(ours) == about - {"general.name"}
    for key in set(theirs) - about:
        assert ours[key] == theirs[key], key
    assert set(ours) - set(theirs) == {
        "llama.attention.key_length",
        "llama.attention.value_length",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.chat_templates",
    }


def test_rope_scaling_in_the_metadata(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
    fields = gguf.settings(config_of("qwen2", rope_scaling=yarn), "x", "here")
    values = {field.key: field.value for field in fields}
    assert values["qwen2.rope.scaling.type"] == "yarn" and values["qwen2.rope.scaling.factor"] == 4.0
    assert values["qwen2.rope.scaling.original_context_length"] == 64 and values["qwen2.rope.freq_base"] == 5e5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_is_read_again(kind, family, tmp_path):
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 5e5}
    scaling |= {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    config = config_of(family, rope_scaling=scaling)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    again = gguf.complete(open_checkpoint(str(tmp_path / "tiny.gguf")).config, "here")
    assert again["rope_parameters"] == scaling == gguf.complete(config, "here")["rope_parameters"]


def test_llama3_frequencies_are_those_of_transformers(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_of("llama", head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 64})
    model = folder_of(tmp_path / "model", {**config, "rope_theta": 5e5})
    first, *_ = gguf.tensors_of({**config, "rope_theta": 5e5}, shapes_of(model), model)
    assert (first.name, first.source, first.shape, first.dtype) == ("rope_freqs.weight", None, (32,), "F32")
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    plain = 1 / 5e5 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / first.values, rotary.inv_freq.numpy(), rtol=1e-6)
    assert len(np.unique(first.values)) > 3 and first.values.max() == 8


@pytest.mark.parametrize(
    ("factor", "context", "head", "theta"), [(8, 8192, 128, 5e5), (32, 8192, 64, 5e5), (4, 64, 32, 1e4)]
)
def test_llama3_scaling_is_found_by_its_factors(factor, context, head, theta):
    """As llama.cpp's converter computes them, in float32 one by one: Llama 3.1, Llama 3.2, and a small one."""
    factors = []
    for place in np.arange(0, head, 2, dtype=np.float32):
        wavelength = np.float32(2 * np.pi) * np.float32(theta) ** (place / np.float32(head))
        if wavelength < context / 4:
            factors.append(1)
        elif wavelength > context:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    config = {"rope_theta": theta, "head_dim": head}
    found = llama3_scaling(config, np.array(factors, np.float32))["rope_scaling"]
    expected = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1, "high_freq_factor": 4}
    assert found == expected | {"original_max_position_embeddings": context}
    assert llama3_scaling(config, np.array(factors, np.float32) * 1.01) is None
    assert llama3_scaling(config | {"rope_scaling": {}}, np.array(factors, np.float32)) is None


def test_llama3_scaling_is_read_again(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    scaling |= {"original_max_position_embeddings": 64}
    config = config_of("llama", head_dim=64, rope_scaling=scaling)
    assemble(folder_of(tmp_path / "model", config), tmp_path / "tiny.gguf")
    again = gguf.complete(open_checkpoint(str(tmp_path / "tiny.gguf")).config, "here")
    assert again["rope_parameters"] == scaling == gguf.complete(config, "here")["rope_parameters"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not written as gguf"),
        ("llama", {"architectures": None}, "architecture None"),
        ("mistral", {"sliding_window": 100}, "looks back 100 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100}, "looks back 100 tokens"),
        ("qwen2", {"head_dim": 32}, "heads of 32 do not add up to hidden_size"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp's llama computes with 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 3}}, "rope has mystery = 3"),
        (
            "qwen2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}},
            "rope has attention_factor",
        ),
        (
            "qwen3",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope type 'llama3'",
        ),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2}}, "rope has beta_slow = 2"),
        ("llama", {"num_attention_heads": "many"}, "cannot read its config.json"),
        ("mixtral", {"sliding_window": 100}, "looks back 100 tokens"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is True, but llama.cpp's qwen2moe computes with False"),
        ("qwen2moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ("qwen2moe", {"qkv_bias": False}, "qkv_bias is False"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3moe", {"attention_bias": True}, "attention_bias is True"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 16},
            "query_pre_attn_scalar is 16, .* computes with 32",
        ),
        ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar is 32, but llama.cpp's gemma2 computes with 16"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "one layer in 2 attends to all tokens"),
        ("gemma2", {"sliding_window": None}, "one layer in 2 attends to all tokens"),
        ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"sliding_window_pattern": 3}, "one layer in 6 attends to all tokens"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type 'linear'",
        ),
        ("phi3", {"sliding_window": 100}, "looks back 100 tokens"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "phi3",
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
                "original_max_position_embeddings": 1,
            },
            "original_max_position_embeddings below 2",
        ),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ("gpt-oss", {"attention_bias": False}, "attention_bias is False"),
        ("gpt-oss", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2.0}}, "rope has beta_slow"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, message):
    with pytest.raises(SourceError, match=message) as caught:
        gguf.architecture(config_of(family, **changes), "here")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda shapes: shapes.pop("model.norm.weight"), "lacks model.norm.weight"),
        (
            lambda shapes: shapes.update({"model.layers.0.mystery.weight": (4,)}),
            "mystery.weight does not exist in llama",
        ),
        (lambda shapes: shapes.update({"lm_head.weight": (320, 48)}), "48 columns, not a multiple of Q8_0's 32"),
        (lambda shapes: shapes.update({"model.layers.0.self_attn.q_proj.weight": (60, 64)}), r"shape \[60, 64\]"),
        (lambda shapes: shapes.update({"lm_head.weight": (1, 2, 32)}), r"shape \[1, 2, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit, message, tmp_path):
    shapes = shapes_of(folder_of(tmp_path / "model", config_of("llama"), tokenizer=False))
    edit(shapes)
    with pytest.raises(SourceError, match=message):
        gguf.tensors_of(config_of("llama"), shapes, "here")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda shapes: shapes.pop(f"{EXPERT}.w3.weight"), r"lacks model\.layers\.1\.mlp\.experts\.2\.w3"),
        (lambda shapes: shapes.update({f"{EXPERT}.w3.weight": (32, 64)}), "another shape than .*experts.0.w3.weight"),
        (lambda shapes: shapes.update({f"{EXPERT}.w3.weight": (96, 2, 32)}), r"has the shape \[96, 2, 32\]"),
        (lambda shapes: shapes.update({f"{EXPERT}.w3.weight": (96,)}), r"has the shape \[96\]"),
        (lambda shapes: shapes.update({f"{EXPERT}.w3.weight": ()}), r"has the shape \[\]"),
        (
            lambda shapes: shapes.update({f"{EXPERT}.w4.weight": (96, 64)}),
            "w4.weight does not exist",
        ),
        (
            lambda shapes: shapes.update({f"{EXPERT.replace('2', '9')}.w3.weight": (96, 64)}),
            "w3.weight does not exist",
        ),
        (
            lambda shapes: shapes.update({"model.layers.0.mlp.gate.weight": (4, 64)}),
            "holds both model.layers.0.block_sparse_moe.gate.weight and model.layers.0.mlp.gate.weight",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(edit, message, tmp_path):
    shapes = shapes_of(folder_of(tmp_path / "model", config_of("mixtral"), tokenizer=False))
    edit(shapes)
    with pytest.raises(SourceError, match=message):
        gguf.tensors_of(config_of("mixtral"), shapes, "here")


def test_experts_of_a_tensor_come_one_after_the_other_in_any_order_of_the_source(tmp_path):
    shapes = shapes_of(folder_of(tmp_path / "model", config_of("qwen2moe"), tokenizer=False))
    backwards = dict(reversed(shapes.items()))
    for given in (shapes, backwards):
        tensors = gguf.tensors_of(config_of("qwen2moe"), given, "here")
        names = [tensor.name for tensor in tensors if tensor.stack == "blk.1.ffn_up_exps.weight"]
        assert names == [f"blk.1.ffn_up_exps.weight[{number}]" for number in range(4)]
        places = [place for place, tensor in enumerate(tensors) if tensor.name in names]
        assert places == list(range(places[0], places[0] + 4))
        assert len(tensors) == len(given)
        (gate,) = (tensor for tensor in tensors if tensor.name == "blk.0.ffn_gate_inp_shexp.weight")
        assert (gate.dtype, gate.shape) == ("F32", (64,))


def test_settings_of_each_family():
    def of(family, **changes):
        fields = gguf.settings(config_of(family, **changes), "x", "here")
        return {field.key.partition(".")[2]: field.value for field in fields}

    values = of("qwen2moe")
    assert (values["expert_count"], values["expert_used_count"]) == (4, 2)
    assert (values["expert_feed_forward_length"], values["expert_shared_feed_forward_length"]) == (32, 64)
    assert "expert_feed_forward_length" not in of("mixtral") and of("mixtral")["feed_forward_length"] == 96
    values = of("gemma2")
    assert (values["attn_logit_softcapping"], values["final_logit_softcapping"]) == (50, 30)
    assert values["attention.sliding_window"] == 64 and "rope.freq_base_swa" not in values
    values = of("gemma3")
    assert (values["rope.freq_base"], values["rope.freq_base_swa"], values["rope.scaling.factor"]) == (1e5, 1e3, 8)
    assert "final_logit_softcapping" not in values
    assert of("phi3-partial")["rope.dimension_count"] == 24 and of("phi3")["attention.sliding_window"] == 0
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    values = of("phi3", rope_scaling=scaling, original_max_position_embeddings=64)
    assert values["rope.scaling.original_context_length"] == 64
    assert values["rope.scaling.attn_factor"] == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)
    scaling["attention_factor"] = 1.5
    assert of("phi3", rope_scaling=scaling, original_max_position_embeddings=64)["rope.scaling.attn_factor"] == 1.5
    assert of("gpt-oss")["expert_feed_forward_length"] == 96


def test_what_transformers_leaves_out_is_left_out(tmp_path):
    shapes = shapes_of(folder_of(tmp_path / "model", config_of("llama"), tokenizer=False))
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    names = {tensor.name for tensor in gguf.tensors_of(config_of("llama", tie_word_embeddings=True), shapes, "here")}
    assert "output.weight" not in names and len(names) == len(shapes) - 2


def test_codes_are_carried_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    codes, absmax = rng.integers(-127, 128, (4, 64)).astype(np.int8), np.float32([0, 0.3, 7, 100])
    tensor = gguf.GgufTensor("blk.0.attn_q.weight", "x", (4, 64), "Q8_0", head=4)
    packed = q8_0.with_scales(tensor.arrange(codes), scale_of(tensor.arrange(absmax))[:, None])
    np.testing.assert_array_equal(packed.reshape(4, 2, 34)[:, :, 2:].view(np.int8).reshape(4, 64), codes[[0, 2, 1, 3]])
    expected = (absmax / np.float32(127)).astype(np.float16).astype(np.float32)[:, None] * codes
    np.testing.assert_array_equal(q8_0.dequantize_rows(packed), expected[[0, 2, 1, 3]])


def test_a_whole_file_of_carried_codes(tmp_path, monkeypatch):
    def carry(tensor, checkpoint, first, last):
        rows = checkpoint.rows(tensor.source, first, last)
        if tensor.dtype == gguf.F32:
            return tensor.arrange(rows.astype(np.float32))
        codes, absmax = quantize_rowwise(rows)
        return q8_0.with_scales(tensor.arrange(codes), scale_of(tensor.arrange(absmax))[:, None])

    monkeypatch.setattr(gguf_files, "encoded", carry)
    source = folder_of(tmp_path / "model", config_of("llama"))
    assemble(source, tmp_path / "tiny.gguf")
    before, after = open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "tiny.gguf"))
    for name, info in before.tensors.items():
        expected = before.rows(name, 0, info.shape[0])
        if len(info.shape) == 2:
            codes, absmax = quantize_rowwise(expected)
            expected = codes * (absmax / np.float32(127)).astype(np.float16).astype(np.float32)[:, None]
        np.testing.assert_array_equal(after.rows(name, 0, info.shape[0]), expected.astype(np.float16), name)


def test_tokens_types_and_scores(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    fields = {
        field.key.removeprefix("tokenizer.ggml."): field.value
        for field in tokenizer_fields(tmp_path / "tokenizer", config_of("llama"))
    }
    tokens, types, scores = fields["tokens"], fields["token_type"], fields["scores"]
    assert len(tokens) == len(types) == len(scores) == 320
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:4] == [2, 3, 3, 6]
    number = tokens.index("<tool>")
    assert types[number] == 4 and types[number - 1] == 1
    assert tokens[number + 1] == f"[PAD{number + 1}]" and types[number + 1] == 5
    order = [scores[tokens.index(text)] for text in MERGED]
    assert order == sorted(order, reverse=True)
    assert fields["model"] == "llama" and fields["add_bos_token"] is True and fields["add_eos_token"] is False
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["unknown_token_id"]) == (1, 2, 0)
    assert fields["add_space_prefix"] is True and fields["tokenizer.chat_template"].startswith("{{")


def test_merges_that_scores_cannot_order_are_refused(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    whole = state["model"]["merges"]
    apart = [merge for merge in whole if merge != ["▁", "th"]]
    for merges, fit in (
        (whole, True),
        (whole[:-1], False),  # llama.cpp would still merge what these two make
        ([*apart, ["▁", "th"]], False),  # one score for two merges
        ([*whole[1:3], whole[0], *whole[3:]], True),
    ):
        path.write_text(json.dumps({**state, "model": {**state["model"], "merges": merges}}))
        with contextlib.nullcontext() if fit else pytest.raises(SourceError, match="do not match SentencePiece's"):
            tokenizer_fields(tmp_path / "tokenizer", config_of("llama"))


def test_merges_into_an_added_token_may_have_any_order(tmp_path):
    """As those into Gemma's runs of spaces and of line breaks, which are found before anything is merged."""
    write_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    number = state["model"]["vocab"]["▁th"]
    entry = {**state["added_tokens"][-1], "id": number, "content": "▁th"}
    apart = [merge for merge in state["model"]["merges"] if merge != ["▁", "th"]]
    for merges in ([*apart, ["▁", "th"]], apart):
        model = {**state["model"], "merges": merges}
        path.write_text(json.dumps({**state, "model": model, "added_tokens": [*state["added_tokens"], entry]}))
        fields = {field.key: field.value for field in tokenizer_fields(tmp_path / "tokenizer", config_of("llama"))}
        assert fields["tokenizer.ggml.tokens"][number] == " th"
        assert fields["tokenizer.ggml.token_type"][number] == 4


def test_a_tokenizer_in_python_is_refused(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: SimpleNamespace(is_fast=False))
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        tokenizer_fields(tmp_path, config_of("llama"))


def test_tokenizers_that_cannot_be_named_are_refused(smollm2, tmp_path):
    config = config_of("llama", vocab_size=49152)
    with pytest.raises(SourceError, match="finds no tokenizer here"):
        tokenizer_fields(tmp_path, config)
    state = json.loads((smollm2 / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text((smollm2 / "tokenizer_config.json").read_text())

    def refused(message, **changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**state, **changes}))
        with pytest.raises(SourceError, match=message) as caught:
            tokenizer_fields(tmp_path, config)
        assert "\n" not in str(caught.value)

    refused(
        "unknown tokenizer",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True},
            ],
        },
    )
    refused("a WordLevel tokenizer with decoder", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    refused("the normalizer NFKC", normalizer={"type": "NFKC"}, model={**state["model"], "byte_fallback": True})
    refused("do not match SentencePiece's", model={**state["model"], "byte_fallback": True})
    spaced = {"vocab": {**state["model"]["vocab"], "a b": 49152, "a bc": 49153}, "merges": [["a b", "c"]]}
    config["vocab_size"] = 49154
    refused("merges in tokenizer.json contain spaces", model={**state["model"], **spaced})
    config["vocab_size"] = 1000
    refused("token 49151 is beyond config.json's vocab_size 1000")
