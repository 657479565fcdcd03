"""Checkpoints as people have them: files that other tools saved, left behind, forgot or named differently.

Each case was reported for some converter. An artifact either opens and computes what its source does, or is not made.
"""

import json
import shutil

import pytest
import torch
import transformers
from helpers.making import GPT2, MAMBA2, SIZES, llama, mixtral, saved, word_tokenizer
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, WeightError, convert, load, plan, run, verify
from quantize8.sources import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
TOKENS = torch.arange(2, 34)[None]


def edit(folder, **settings):
    """Change entries of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def drop(folder, *endings):
    """Remove and return the tensors whose names end with one of these."""
    path = folder / "model.safetensors"
    state = load_file(path)
    taken = {name: state.pop(name) for name in list(state) if name.endswith(endings)}
    assert taken
    save_file(state, path, metadata={"format": "pt"})
    return taken


def outputs(model, inputs):
    with torch.inference_mode():
        found = model.eval()(**inputs)
    return (found.logits if "logits" in found else found.last_hidden_state).double()


def error(artifact, source, kind, inputs=None):
    """Relative error of the artifact's outputs in transformers, against the source's."""
    inputs = inputs or {"input_ids": TOKENS}
    expected = outputs(kind.from_pretrained(source, dtype=torch.float32), inputs)
    found = outputs(load(artifact, "cpu", dtype="float32")[0], inputs)
    assert found.shape == expected.shape and found.isfinite().all()
    return float((found - expected).norm() / expected.norm())


FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MPT = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
MOE = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
NEMOTRON_H = SIZES | {
    "layers_block_type": ["mamba", "attention", "mlp"],
    "num_hidden_layers": 3,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
}


@pytest.mark.parametrize(
    ("kind", "settings", "named", "format"),
    [
        (transformers.GPT2LMHeadModel, GPT2, "GPT2LMHeadModel", "bitsandbytes"),
        *(
            (kind, settings, named, format)
            for format in ("bitsandbytes", "compressed-tensors")
            for kind, settings, named in (
                (transformers.MptForCausalLM, MPT, "MPTForCausalLM"),
                (transformers.PhimoeForCausalLM, MOE, "PhiMoEForCausalLM"),
                (transformers.NemotronHForCausalLM, NEMOTRON_H, "NemotronHForCausalLM"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_that_config_json_names_is_not_asked_where_transformers_has_the_model(
    kind, settings, named, format, tmp_path
):
    plain = saved(tmp_path / "plain", kind, **settings)
    public = shutil.copytree(plain, tmp_path / "public")
    code = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": f"modeling_x.{named}"}
    edit(public, auto_map=code, architectures=[named])
    made = [convert(str(each), tmp_path / f"{each.name}-int8", format=format) for each in (plain, public)]
    assert made[1].plan.modules == made[0].plan.modules and made[1].plan.skip_list == made[0].plan.skip_list
    assert made[1].plan.kept == made[0].plan.kept and not made[1].plan.guessed
    records = [result.manifest.tensors for result in made]
    assert records[0] == records[1]
    verify(tmp_path / "public-int8")
    assert error(tmp_path / "public-int8", plain, kind) < 0.1


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_layers_of_a_class_of_their_own_stay_in_float(format, tmp_path):
    """Falcon's layers multiply by the weight themselves, and no loader replaces them: w8a8 of it produced noise."""
    source = saved(tmp_path / "source", transformers.FalconForCausalLM, **FALCON)
    edit(source, auto_map={"AutoModelForCausalLM": "modeling_falcon.RWForCausalLM"}, architectures=["RWForCausalLM"])
    with pytest.raises(SourceError, match=r"\.weight does not \(a FalconLinear, which 8-bit loaders do not replace\)"):
        convert(str(source), tmp_path / "int8", format=format)


def test_a_model_that_transformers_does_not_know_is_guessed_and_said_so(tmp_path):
    source = edit(llama(tmp_path / "source"), model_type="newmodel", architectures=["NewModelForCausalLM"])
    result = convert(str(source), tmp_path / "int8")
    assert len(result.plan.modules) == 14
    assert "newmodel" in result.plan.guessed and result.as_json()["guessed"] == result.plan.guessed
    assert not convert(str(llama(tmp_path / "known")), tmp_path / "known-int8").plan.guessed


def test_code_of_another_model_under_a_known_name_is_guessed(tmp_path):
    """The code in the folder uses a known model_type for another model: transformers' class is not what was trained."""
    source = llama(tmp_path / "source")
    state = {
        name.replace("self_attn", "mixer"): value for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(state, source / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.0\.self_attn\.\w_proj\.weight and 7 more"):
        plan(str(source))
    edit(source, auto_map={"AutoModelForCausalLM": "modeling_x.Other"})
    assert "LlamaForCausalLM has no model.layers.0.mixer" in plan(str(source)).plan.guessed


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors", "gguf", "bfloat16"])
@pytest.mark.parametrize(
    ("endings", "message"),
    [
        (("lm_head.weight",), "needs lm_head.weight, which the checkpoint does not have"),
        (("layers.1.self_attn.q_proj.weight",), r"needs model\.layers\.1\.self_attn\.q_proj\.weight"),
        (("layers.1.input_layernorm.weight",), r"needs model\.layers\.1\.input_layernorm\.weight"),
        (("embed_tokens.weight",), r"needs model\.embed_tokens\.weight"),
    ],
    ids=["head", "projection", "norm", "embedding"],
)
def test_what_the_model_needs_and_the_checkpoint_lacks_is_named(format, endings, message, tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    drop(source, *endings)
    with pytest.raises(SourceError, match=message):
        convert(str(source), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SourceError, match=f"{endings[0]} is not in the checkpoint, and would be random"):
        load(source, "cpu")
    with pytest.raises(SourceError, match="would be random"):
        run(str(source), "w1 w2", max_new_tokens=1, device="cpu")


def test_fewer_layers_than_config_json_says(tmp_path):
    source = edit(llama(tmp_path / "source"), num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"needs model\.layers\.2\.self_attn\.q_proj\.weight and 8 more"):
        convert(str(source), tmp_path / "out")


def test_an_artifact_that_lost_a_layer_is_not_run(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "int8")
    drop(tmp_path / "int8", "layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.SCB")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight is not in the checkpoint"):
        load(tmp_path / "int8", "cpu")


def test_a_missing_expert_is_named(tmp_path):
    source = mixtral(tmp_path / "source")
    taken = drop(source, "layers.0.block_sparse_moe.experts.1.w3.weight")
    assert len(taken) == 1
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.experts\.gate_up_proj \(\d of \d of its .*w3"):
        convert(str(source), tmp_path / "out")


def test_a_config_json_of_another_size_is_refused(tmp_path):
    source = edit(llama(tmp_path / "source"), vocab_size=80)
    with pytest.raises(SourceError, match=r"\w+\.weight has the shape \[64, 32\], but config\.json says \[80"):
        convert(str(source), tmp_path / "out")


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    """transformers ties the two if they are equal, and uses both if they differ."""
    source = llama(tmp_path / "source", tied=True)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "int8")
    assert error(tmp_path / "int8", source, transformers.LlamaForCausalLM) < 0.1


def test_a_pooling_layer_that_is_not_stored_is_not_made_up(tmp_path):
    source = saved(tmp_path / "source", transformers.BertModel, **SIZES)
    drop(source, "pooler.dense.weight", "pooler.dense.bias")
    convert(str(source), tmp_path / "int8")
    model, _ = load(tmp_path / "int8", "cpu")
    assert type(model) is transformers.BertModel and model.pooler is None
    assert error(tmp_path / "int8", source, transformers.BertModel) < 0.1


SENTENCES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def sentence_transformer(folder, kind, **settings):
    """A folder of sentence-transformers, whose further modules have weights of their own."""
    saved(folder, kind, **settings)
    (folder / "modules.json").write_text(json.dumps(SENTENCES))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    save_file({"linear.weight": torch.randn(8, 32)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_an_encoder_is_opened_as_sentence_transformers_opens_it(tmp_path):
    source = sentence_transformer(tmp_path / "source", transformers.MPNetForMaskedLM, **SIZES)
    drop(source, "lm_head.dense.weight", "lm_head.decoder.bias")  # which sentence-transformers does not read
    convert(str(source), tmp_path / "int8")
    model, _ = load(tmp_path / "int8", "cpu")
    assert type(model) is transformers.MPNetModel
    assert error(tmp_path / "int8", source, transformers.MPNetModel) < 0.1
    assert (tmp_path / "int8" / "2_Dense" / "model.safetensors").read_bytes() == (
        source / "2_Dense" / "model.safetensors"
    ).read_bytes()
    verify(tmp_path / "int8")


@pytest.mark.parametrize("marked", [True, False], ids=["sentence-transformers", "plain"])
def test_an_embedding_model_without_prefix_and_head(marked, tmp_path):
    """Qwen3-Embedding: config.json names Qwen3ForCausalLM, and the file holds the model without a head."""
    source = saved(tmp_path / "source", transformers.Qwen3Model, **SIZES, head_dim=8, tie_word_embeddings=True)
    edit(source, architectures=["Qwen3ForCausalLM"])
    if marked:
        (source / "modules.json").write_text(json.dumps(SENTENCES))
    result = convert(str(source), tmp_path / "int8")
    assert len(result.plan.modules) == 14 and not result.plan.guessed
    kind = transformers.Qwen3Model if marked else transformers.Qwen3ForCausalLM
    assert error(tmp_path / "int8", source, kind) < 0.1


def test_no_class_in_config_json(tmp_path):
    source = edit(llama(tmp_path / "source", tied=True), architectures=None)
    convert(str(source), tmp_path / "int8")
    assert error(tmp_path / "int8", source, transformers.LlamaForCausalLM) < 0.1


COPIED = (
    "source.spm",
    "target.spm",
    "bpe.codes",
    "vocab.bpe",
    "dict.vocab",
    "tokenizer.model.v3",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "LICENSE.md",
    "modeling_x.py",
    "__init__.py",
    "mel_filters.npz",
)
LEFT_OUT = {
    "optimizer.pt": "weights that are not read",
    "pytorch_model.bin": "weights that are not read",
    "adapter_config.json": "an adapter's",
    "adapter_model.safetensors": "weights that are not read",
    "trainer_state.json": "left by training",
    "onnx/model.onnx": "weights that are not read",
    "onnx/config.json": "beside weights of another format or model",
    "tokenizer.pkl": "a pickle, which runs code when it is opened",
}
QUIETLY_LEFT_OUT = (".gitattributes", "README.md", "figure.png", "pytorch_model.bin.index.json")


def test_every_file_is_copied_that_is_not_known_to_be_something_else(tmp_path):
    source = llama(tmp_path / "source")
    for name in (*COPIED, *LEFT_OUT, *QUIETLY_LEFT_OUT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    result = convert(str(source), tmp_path / "int8")
    out = tmp_path / "int8"
    assert all((out / name).read_text() == name for name in COPIED)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    own = {"config.json", "quantize8.json", "model.safetensors", "generation_config.json"}
    assert found == {*COPIED, *own}
    assert result.as_json()["left_out"] == LEFT_OUT
    verify(out)
    for name in ("source.spm", "bpe.codes"):  # which are no tokenizer
        (out / name).unlink()
    assert error(out, llama(tmp_path / "clean"), transformers.LlamaForCausalLM) < 0.1


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_dtype_of_auto(key, tmp_path):
    source = edit(llama(tmp_path / "source", dtype=torch.float32), dtype=None)
    edit(source, **{key: "auto"}, model_type="llama")
    convert(str(source), tmp_path / "int8")
    model, _ = load(tmp_path / "int8", "cpu")
    assert model.dtype == torch.float32
    reference = edit(shutil.copytree(source, tmp_path / "reference"), **{key: "float32"})
    assert error(tmp_path / "int8", reference, transformers.LlamaForCausalLM) < 0.1


def test_numbers_that_json_lacks_as_transformers_saves_them(tmp_path):
    """time_step_limit is (0, infinity)."""
    source = saved(tmp_path / "source", transformers.Mamba2ForCausalLM, **MAMBA2)
    assert "__float__" in (source / "config.json").read_text()
    convert(str(source), tmp_path / "int8")
    assert error(tmp_path / "int8", source, transformers.Mamba2ForCausalLM) < 0.1


def test_a_layer_counted_from_the_end(tmp_path):
    """LLaVA reads the vision tower's last layer but one: vision_feature_layer -2."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES),
        vision_feature_layer=-2,
        image_token_index=63,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "int8")
    kind = transformers.LlavaForConditionalGeneration
    assert error(tmp_path / "int8", tmp_path / "source", kind) < 0.1


def test_float8_that_was_only_cast(tmp_path):
    """As from ComfyUI: no scale, and the values are the numbers themselves."""
    source = llama(tmp_path / "source", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    cast = {name: value.to(torch.float8_e4m3fn) for name, value in state.items() if name.endswith("_proj.weight")}
    save_file(state | cast, source / "model.safetensors", metadata={"format": "pt"})
    result = convert(str(source), tmp_path / "plain", format="bfloat16")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(stored[name].dtype == torch.bfloat16 and stored[name].equal(cast[name].bfloat16()) for name in cast)
    assert result.as_json()["bits_per_weight"] == pytest.approx(16, abs=1)
    made = convert(str(source), tmp_path / "int8")
    assert len(made.plan.modules) == 14
    assert open_checkpoint(str(tmp_path / "int8")).tensors["model.layers.0.mlp.up_proj.weight"].is_int8


def test_float8_with_scales_that_nothing_explains(tmp_path):
    source = llama(tmp_path / "source", dtype=torch.float32)
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state |= {name: state[name].to(torch.float8_e4m3fn), "model.layers.0.mlp.up_proj.scale_weight": torch.ones(())}
    save_file(state, source / "model.safetensors")
    with pytest.raises(SourceError, match=r"float8 with scales \(model\.layers\.0\.mlp\.up_proj\.scale_weight\)"):
        convert(str(source), tmp_path / "out")


def test_mambas_dt_proj_stays_in_float(tmp_path):
    """Its forward reads the weight directly, and would multiply by int8 codes; in training, those of others too."""
    settings = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 8}
    source = saved(tmp_path / "source", transformers.MambaForCausalLM, **settings, pad_token_id=0)
    result = convert(str(source), tmp_path / "int8")
    assert {name for name in result.plan.kept if name.endswith("dt_proj")} == {
        f"backbone.layers.{layer}.mixer.dt_proj" for layer in (0, 1)
    }
    assert {name.rpartition(".")[2] for name in result.plan.modules} == {"in_proj"}
    assert error(tmp_path / "int8", source, transformers.MambaForCausalLM) < 0.1


GRANITE_MOE = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
AFMOE = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1}
AFMOE |= {"num_shared_experts": 1, "head_dim": 8, "global_attn_every_n_layers": 2}
NOMIC = SIZES | {"num_key_value_heads": 4, "head_dim": 8}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_experts_that_stay_in_float_are_not_taken_for_int8(scheme, tmp_path):
    """They are stored as one tensor, so that there are no experts by name, of which all would be int8."""
    source = saved(tmp_path / "source", transformers.GraniteMoeForCausalLM, **GRANITE_MOE)
    convert(str(source), tmp_path / "int8", format="compressed-tensors", scheme=scheme, moe="transformers")
    assert error(tmp_path / "int8", source, transformers.GraniteMoeForCausalLM) < 0.1


@pytest.mark.parametrize("moe", ["transformers", "vllm"])
def test_int8_experts_that_have_no_gate_are_loaded_in_float(moe, tmp_path):
    """Nemotron-H: Int8Experts computes gated experts only."""
    settings = NEMOTRON_H | {"layers_block_type": ["mamba", "moe", "attention"], "n_routed_experts": 4}
    settings |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    source = saved(tmp_path / "source", transformers.NemotronHForCausalLM, **settings)
    result = convert(str(source), tmp_path / "int8", format="compressed-tensors", moe=moe)
    assert len([name for name in result.plan.modules if ".experts." in name]) == 8
    assert error(tmp_path / "int8", source, transformers.NemotronHForCausalLM) < 0.1


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_a_linear_weight_that_transformers_splits_stays_in_float(format, tmp_path):
    """Nomic's checkpoints store Wqkv; the model has q_proj, k_proj and v_proj."""
    source = saved(tmp_path / "source", transformers.NomicBertForMaskedLM, **NOMIC)
    result = convert(str(source), tmp_path / "int8", format=format)
    split = {name for name, why in result.plan.kept.items() if "splits it" in why}
    assert split == {f"nomic_bert.encoder.layers.{layer}.attn.Wqkv" for layer in (0, 1)}
    assert len(result.plan.modules) >= 8
    kind = transformers.NomicBertForMaskedLM
    assert error(tmp_path / "int8", source, kind) < 0.1
    expected, theirs = (
        outputs(kind.from_pretrained(each, dtype=torch.float32), {"input_ids": TOKENS})
        for each in (source, tmp_path / "int8")
    )
    assert (theirs - expected).norm() < 0.1 * expected.norm()


def test_a_linear_layer_that_is_named_like_a_router_stays_in_float(tmp_path):
    """AFMoE's router contains a Linear named gate, which is ignored by that name."""
    source = saved(tmp_path / "source", transformers.AfmoeForCausalLM, **AFMOE)
    result = convert(str(source), tmp_path / "int8", format="compressed-tensors", moe="transformers")
    assert "like a router" in result.plan.kept["model.layers.1.mlp.router.gate"]
    kind = transformers.AfmoeForCausalLM
    expected, theirs = (
        outputs(kind.from_pretrained(each, dtype=torch.float32), {"input_ids": TOKENS})
        for each in (source, tmp_path / "int8")
    )
    assert (theirs - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "settings", "kept"),
    [
        (transformers.GPTBigCodeForCausalLM, GPT2, "c_proj"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_packed_codes_do_not_meet_what_transformers_reads_on_loading(kind, settings, kept, tmp_path):
    """While initializing a block, transformers reads the weights of its layers, which packed layers do not have."""
    source = saved(tmp_path / "source", kind, **settings)
    result = convert(str(source), tmp_path / "w8a16", format="compressed-tensors", scheme="w8a16")
    reasons = {why for name, why in result.plan.kept.items() if name.endswith(kept)}
    assert reasons == {"read by transformers while it loads the model, which fails for packed codes (w8a8 has none)"}
    assert result.plan.modules and not any(name.endswith(kept) for name in result.plan.modules)
    theirs = outputs(kind.from_pretrained(tmp_path / "w8a16", dtype=torch.float32), {"input_ids": TOKENS})
    expected = outputs(kind.from_pretrained(source, dtype=torch.float32), {"input_ids": TOKENS})
    assert (theirs - expected).norm() < 0.1 * expected.norm()


# What the message names, for folders that are no model as they are


def adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    return folder


def adapter_with_config(folder):
    shutil.copy(llama(folder.parent / "base") / "config.json", adapter(folder))
    return folder


def lone_file(folder):
    llama(folder)
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


def torchscript(folder):
    llama(folder)
    (folder / "model.safetensors").unlink()
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "pytorch_model.bin")
    return folder


def part_of_a_bin(folder):
    state = load_file(llama(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model-00001-of-00002.bin")
    return folder


def part_of_safetensors(folder):
    llama(folder, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


def mlx(folder):
    return edit(llama(folder), quantization={"group_size": 64, "bits": 8})


def wrapped(folder):
    state = load_file(llama(folder) / "model.safetensors")
    save_file({f"_orig_mod.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    return folder


def float64(folder):
    state = load_file(llama(folder) / "model.safetensors")
    save_file({name: value.double() for name, value in state.items()}, folder / "model.safetensors")
    return folder


def embedding_alone(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "static"}')
    save_file({"embedding.weight": torch.zeros(100, 8)}, folder / "model.safetensors")
    return folder


def packed(folder):
    state = load_file(llama(folder) / "model.safetensors")
    state["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 48, dtype=torch.int32)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            adapter,
            r"holds an adapter, not a model; name its base model as the source: quantize8 convert BASE --adapter ",
        ),
        (adapter_with_config, r"holds an adapter, not a model"),
        (lone_file, r"model\.safetensors: has no config\.json beside it"),
        (torchscript, r"pytorch_model\.bin: is a TorchScript archive"),
        (part_of_a_bin, r"pytorch_model-00002-of-00002\.bin: missing"),
        (part_of_safetensors, r"model-00002-of-00003\.safetensors: missing"),
        (mlx, r"is quantized by MLX, which is not read"),
        (wrapped, r"names begin with '_orig_mod\.'; save the model inside of the wrapper"),
        (float64, r"mlp\.\w+_proj\.weight does not \(dtype F64\)|lm_head\.weight does not"),
        (embedding_alone, r"embedding\.weight|the largest tensor is embedding\.weight \[100, 8\], F32"),
        (packed, r"mlp\.up_proj\.qweight is packed as GPTQ and AWQ do"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_message_names_the_cause(make, message, tmp_path):
    source = make(tmp_path / "source")
    with pytest.raises(SourceError, match=message) as caught:
        convert(str(source), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_parts_of_a_bin_without_an_index(tmp_path):
    source = llama(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(state)
    for number, part in enumerate((names[:10], names[10:]), start=1):
        torch.save({name: state[name] for name in part}, source / f"pytorch_model-{number:05}-of-00002.bin")
    result = convert(str(source), tmp_path / "int8")
    reference = convert(str(llama(tmp_path / "reference")), tmp_path / "reference-int8")
    assert result.manifest.tensors.keys() == reference.manifest.tensors.keys()
    expected = reference.manifest.tensors
    assert all(entry.blake3 == expected[name].blake3 for name, entry in result.manifest.tensors.items())


def test_an_adapter_beside_the_merged_weights_is_no_part_of_the_model(tmp_path):
    source = llama(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").unlink()
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 4)}, source / "adapter_model.safetensors")
    result = convert(str(source), tmp_path / "int8")
    assert not [name for name in result.manifest.tensors if "lora" in name]


def test_masks_of_minus_infinity(tmp_path):
    source = saved(tmp_path / "source", transformers.GPT2LMHeadModel, **GPT2)
    state = load_file(source / "model.safetensors")
    mask = torch.full((8, 8), -torch.inf).triu(1)
    save_file(state | {"transformer.h.0.attn.mask": mask}, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "int8")
    assert load_file(tmp_path / "int8" / "model.safetensors")["transformer.h.0.attn.mask"].equal(mask)
    state["transformer.h.0.attn.c_attn.bias"][3] = torch.inf
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"c_attn\.bias row 3 holds NaN or infinity"):
        convert(str(source), tmp_path / "out")


def test_a_file_that_is_too_large_to_be_copied(tmp_path):
    source = llama(tmp_path / "source")
    with (source / "corpus.txt").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(SourceError, match=r"corpus\.txt: over 1,073,741,824 bytes, too large to be copied"):
        convert(str(source), tmp_path / "out")
