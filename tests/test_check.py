"""convert --check: valid artifacts of every kind pass, and each planted fault is found, named, and marked."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.gguf_files import config_of, folder_of
from helpers.making import GPT2, MAMBA2, SIZES, llama, mixtral, saved, word_tokenizer
from safetensors.torch import load_file, save_file

from quantize8 import ArtifactError, OutputError, convert, push, verify
from quantize8.artifact.manifest import CHECK_FAILED
from quantize8.commands import convert as operation
from quantize8.conversion import driver
from quantize8.runtime.check import TOKENS, check
from quantize8.sources import open_checkpoint

UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


def t5(folder):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return saved(folder, transformers.T5ForConditionalGeneration, **sizes, decoder_start_token_id=0)


def whisper(folder):
    layers = {f"{part}_{kind}": 2 for part in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    lengths = {"max_source_positions": 30, "max_target_positions": 64}
    return saved(folder, transformers.WhisperForConditionalGeneration, **layers, **sizes, **ids, **lengths)


SOUND = {
    "llama": llama,
    "llama with a tokenizer": lambda folder: word_tokenizer(llama(folder, tied=True)),
    "bfloat16": lambda folder: llama(folder, dtype=torch.bfloat16),
    "gpt2": lambda folder: saved(folder, transformers.GPT2LMHeadModel, **GPT2),
    "bert": lambda folder: saved(folder, transformers.BertModel, **SIZES),
    "mixtral": mixtral,
    "mamba2": lambda folder: saved(folder, transformers.Mamba2ForCausalLM, **MAMBA2),
    "t5": t5,
}


OPTIONS = {
    "bitsandbytes": {},
    "mse": {"scale": "mse"},
    "w8a8": {"format": "compressed-tensors"},
    "w8a16": {"format": "compressed-tensors", "scheme": "w8a16"},
}
WITHOUT = {("gpt2", "w8a8"), ("gpt2", "w8a16"), ("t5", "w8a16")}  # which the format cannot hold: test_formats.py


@pytest.mark.parametrize(("name", "options"), sorted({(name, kind) for name in SOUND for kind in OPTIONS} - WITHOUT))
def test_sound_artifacts_pass(name, options, tmp_path):
    source = SOUND[name](tmp_path / "source")
    found = convert(str(source), tmp_path / "int8", check=True, **OPTIONS[options]).check
    assert found.parameters > 10 and found.tokens == TOKENS and found.skipped is None and found.overflow is None
    assert 0 < found.error < 0.1
    if name == "bert":
        assert found.kl is None and found.top1 is None
    else:
        assert 0 <= found.kl < 0.01 and found.top1 > 0.7
    assert not (tmp_path / "int8" / CHECK_FAILED).exists()
    verify(tmp_path / "int8")


@pytest.mark.parametrize("format", ["gguf", "float16", "float32"])
def test_other_formats_pass(format, tmp_path):
    source = folder_of(tmp_path / "source", config_of("llama"))
    shutil.copytree(source / "tokenizer", source, dirs_exist_ok=True)
    shutil.rmtree(source / "tokenizer")
    found = convert(str(source), tmp_path / "out", format=format, check=True).check
    assert found.parameters > 15 and found.tokens == TOKENS
    assert found.error < 0.1 if format == "gguf" else found.error < 0.005


def test_a_model_of_sound_is_compared_by_its_parameters(tmp_path):
    found = convert(str(whisper(tmp_path / "source")), tmp_path / "int8", check=True).check
    assert found.parameters > 50 and found.tokens == 0 and "needs input_features" in found.skipped


def other(state, name):
    return {name: torch.randn(state[name].shape, generator=torch.Generator().manual_seed(9)).to(state[name].dtype)}


def codes(state, name, change):
    return {f"{name}.weight": change(state[f"{name}.weight"].clone())}


def _swap(value, first=2, second=3):
    value = value.clone()
    value[[first, second]] = value[[second, first]]
    return value


def _spoil(value, row, change):
    value = value.clone()
    value[row] = change(value[row])
    return value


# name -> what it makes of the artifact's tensors; None removes one
FAULTS = {
    "codes of another layer": lambda s: {f"{UP}.weight": s["model.layers.0.mlp.up_proj.weight"]},
    "a layer of another model": lambda s: codes(s, UP, lambda w: torch.randint_like(w, -127, 128)),
    "scales of another layer": lambda s: {f"{UP}.SCB": s["model.layers.0.mlp.up_proj.SCB"]},
    "two scales swapped": lambda s: {f"{UP}.SCB": _swap(s[f"{UP}.SCB"])},
    "two rows swapped": lambda s: codes(s, UP, _swap),
    "one scale doubled": lambda s: {f"{UP}.SCB": _spoil(s[f"{UP}.SCB"], 5, lambda a: a * 2)},
    "one scale 5% off": lambda s: {f"{UP}.SCB": _spoil(s[f"{UP}.SCB"], 5, lambda a: a * 1.05)},
    "a scale of zero": lambda s: {f"{UP}.SCB": _spoil(s[f"{UP}.SCB"], 5, lambda a: a * 0)},
    "a scale of NaN": lambda s: {f"{UP}.SCB": _spoil(s[f"{UP}.SCB"], 5, lambda a: a * torch.nan)},
    "scales by 127 too small": lambda s: {f"{UP}.SCB": s[f"{UP}.SCB"] / 127},
    "codes negated": lambda s: codes(s, UP, lambda w: -w),
    "a row of zeros": lambda s: codes(s, UP, lambda w: _spoil(w, 7, torch.zeros_like)),
    "codes by one off": lambda s: codes(s, UP, lambda w: (w.short() + 3).clamp(-127, 127).to(torch.int8)),
    "query and key exchanged": lambda s: {
        f"model.layers.0.self_attn.{to}_proj.{part}": s[f"model.layers.0.self_attn.{of}_proj.{part}"]
        for part in ("weight", "SCB")
        for to, of in (("q", "o"), ("o", "q"))
    },
    "a head of noise": lambda s: other(s, "lm_head.weight"),
    "an embedding of noise": lambda s: other(s, "model.embed_tokens.weight"),
    "a norm of ones": lambda s: {NORM: torch.ones_like(s[NORM])},
    "one number of a norm": lambda s: {NORM: _spoil(s[NORM], 3, lambda g: g * 1.02)},
    "no norm": lambda s: {NORM: None},
    "no head": lambda s: {"lm_head.weight": None},
    "no codes": lambda s: {f"{UP}.weight": None, f"{UP}.SCB": None, f"{UP}.weight_format": None},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source and its artifact."""
    folder = tmp_path_factory.mktemp("check")
    source = llama(folder / "source", edit=lambda state: state[NORM].copy_(torch.linspace(0.5, 2, len(state[NORM]))))
    convert(str(source), folder / "int8")
    return source, folder / "int8"


def spoiled(artifact, folder, changes):
    """A copy of an artifact with some tensors replaced, otherwise complete."""
    folder.mkdir()
    for path in artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(artifact / "model.safetensors")
    changed = state | changes(state)
    assert any(value is None or name not in state or not state[name].equal(value) for name, value in changed.items())
    kept = {name: value.clone().contiguous() for name, value in changed.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, whole, tmp_path):
    source, artifact = whole
    folder = spoiled(artifact, tmp_path / "int8", FAULTS[fault])
    changed = {name.rpartition(".")[0] for name in FAULTS[fault](load_file(artifact / "model.safetensors"))}
    with pytest.raises(ArtifactError) as caught:
        check(open_checkpoint(str(source)), open_checkpoint(str(folder)))
    assert any(name in str(caught.value) for name in changed) and "\n" not in str(caught.value)


def test_chosen_codes_may_be_farther_off(whole, tmp_path):
    source = str(whole[0])

    def by_one(codes):
        steps = 2 * torch.randint(2, codes.shape, generator=torch.Generator().manual_seed(0)) - 1
        return (codes + steps).clamp(-127, 127).to(torch.int8)

    near = spoiled(whole[1], tmp_path / "near", lambda s: codes(s, UP, by_one))
    assert check(open_checkpoint(source), open_checkpoint(str(near)), "gptq").error < 0.1
    with pytest.raises(ArtifactError, match=UP):
        check(open_checkpoint(source), open_checkpoint(str(near)))
    swapped = spoiled(whole[1], tmp_path / "swapped", FAULTS["two rows swapped"])
    with pytest.raises(ArtifactError, match=UP):
        check(open_checkpoint(source), open_checkpoint(str(swapped)), "gptq")


def test_a_transposed_conv1d_is_found(tmp_path):
    source = saved(tmp_path / "source", transformers.GPT2LMHeadModel, **GPT2)
    convert(str(source), tmp_path / "int8")
    name = "transformer.h.0.attn.c_proj"  # square: only the numbers tell
    folder = spoiled(tmp_path / "int8", tmp_path / "bad", lambda s: codes(s, name, lambda w: w.t()))
    with pytest.raises(ArtifactError, match="c_proj"):
        check(open_checkpoint(str(source)), open_checkpoint(str(folder)))


@pytest.mark.parametrize("ending", ["attn.c_proj.bias", "mlp.c_fc.bias"])
def test_a_missing_or_other_bias_is_found(ending, tmp_path):
    source = saved(tmp_path / "source", transformers.GPT2LMHeadModel, **GPT2)
    state = load_file(source / "model.safetensors")
    biases = {name: torch.randn(len(value)) * 0.01 for name, value in state.items() if name.endswith("bias")}
    save_file(state | biases, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "int8")
    (name,) = [each for each in biases if each.endswith(f"h.1.{ending}")]
    for number, value in enumerate([None, torch.zeros_like(biases[name])]):
        folder = spoiled(tmp_path / "int8", tmp_path / str(number), lambda s, value=value: {name: value})
        with pytest.raises(ArtifactError, match=ending):
            check(open_checkpoint(str(source)), open_checkpoint(str(folder)))


def test_settings_that_change_what_is_computed_are_found(whole, tmp_path):
    source, artifact = whole
    folder = spoiled(artifact, tmp_path / "int8", lambda s: {"extra": torch.zeros(1)})
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu", "rms_norm_eps": 10.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"its outputs differ from its source's by \d+%"):
        check(open_checkpoint(str(source)), open_checkpoint(str(folder)))


def test_a_broken_artifact_is_marked_and_refused(whole, tmp_path, monkeypatch):
    source, _ = whole
    write = driver.write

    def spoil(plan, destination, *rest):
        found, out = write(plan, destination, *rest), destination.out
        state = load_file(out / "model.safetensors")
        save_file(state | {f"{UP}.SCB": state[f"{UP}.SCB"] * 2}, out / "model.safetensors")
        return found

    monkeypatch.setattr(driver, "write", spoil)
    with pytest.raises(ArtifactError, match=f"{UP}.weight differs from the source"):
        convert(str(source), tmp_path / "int8", check=True)
    assert UP in (tmp_path / "int8" / CHECK_FAILED).read_text()
    for refused in (lambda: verify(tmp_path / "int8"), lambda: push(tmp_path / "int8", "me/model")):
        with pytest.raises(ArtifactError, match="failed the check when it was made"):
            refused()
    monkeypatch.undo()
    convert(str(source), tmp_path / "int8", overwrite=True, check=True)
    verify(tmp_path / "int8")


def test_float16_that_overflows_is_said(tmp_path):
    def grow(state):
        state["model.layers.0.mlp.down_proj.weight"] *= 3000
        state["model.layers.0.post_attention_layernorm.weight"] *= 30

    source = llama(tmp_path / "source", dtype=torch.float16, edit=grow)
    found = convert(str(source), tmp_path / "int8", check=True).check
    assert found.overflow == "model.layers.0.mlp.down_proj"
    (source / "config.json").write_text((source / "config.json").read_text().replace("float16", "bfloat16"))
    assert convert(str(source), tmp_path / "bfloat16", check=True).check.overflow is None


def test_it_runs_by_itself_where_it_costs_less_than_converting(whole, tmp_path, monkeypatch):
    source, _ = whole
    assert convert(str(source), tmp_path / "quick").check is None
    monkeypatch.setattr(operation, "_CHECK_SECONDS", 0.0)
    assert convert(str(source), tmp_path / "slow").check is not None
    assert convert(str(source), tmp_path / "never", check=False).check is None


def test_it_is_refused_where_there_is_nothing_to_compare(whole, tmp_path):
    source, _ = whole
    with pytest.raises(OutputError, match="part 1/2 is not an artifact"):
        convert(str(source), tmp_path / "out", part="1/2", check=True)
    with pytest.raises(OutputError, match="does not store"):
        convert("me/model", tmp_path / "out", stream=True, check=True)


def test_a_model_that_transformers_does_not_know_is_not_checked(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "new", "architectures": ["New"]}
    (source / "config.json").write_text(json.dumps(config))
    found = convert(str(source), tmp_path / "int8", check=True).check
    assert found == replace(found, parameters=0, tokens=0, skipped="transformers does not know the model")
