"""Models with an encoder, converted and opened by the loader of the target and by `load`: the outputs agree."""

import pytest
import torch
import transformers

from quantize8 import Int8Linear, SourceError, convert, load, verify

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

TOKENS = torch.arange(2, 42)[None]
TARGETS = {
    "bitsandbytes": {},
    "w8a8": {"format": "compressed-tensors"},
    "w8a16": {"format": "compressed-tensors", "scheme": "w8a16"},
}
SHARED = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def t5(folder):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **SHARED))
    model.save_pretrained(folder)
    return folder, transformers.T5ForConditionalGeneration, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def gated_t5(folder):
    """T5 1.1 and Flan: a gated MLP, and an output head of its own."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, **SHARED, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder, transformers.T5ForConditionalGeneration, {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def whisper(folder):
    """Convolutions over sound in the encoder, keys without a bias, an output head tied to the decoder's embedding."""
    layers = {f"{part}_{kind}": 2 for part in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16, "bos_token_id": 1}
    lengths = {"max_source_positions": 30, "max_target_positions": 64}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**layers, **sizes, **lengths, **SHARED, suppress_tokens=None)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    sound = {"input_features": torch.randn(1, 16, 60), "decoder_input_ids": TOKENS}
    return folder, transformers.WhisperForConditionalGeneration, sound


@pytest.fixture(params=["minilm", "t5", "gated_t5", "whisper"])
def source(request, tmp_path):
    """(folder, class, inputs) of a model."""
    if request.param == "minilm":
        return request.getfixturevalue("minilm"), transformers.AutoModel, {"input_ids": 2000 + TOKENS}  # whole words
    return {"t5": t5, "gated_t5": gated_t5, "whisper": whisper}[request.param](tmp_path / "source")


def outputs(model, inputs):
    """The logits, or the last hidden state, and for a model of two parts what its encoder gives."""
    with torch.inference_mode():
        found = model.eval()(**inputs)
    first = found.logits if "logits" in found else found.last_hidden_state
    return [first] + ([found.encoder_last_hidden_state] if "encoder_last_hidden_state" in found else [])


def far(got, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_agree_with_the_dequantized_model(target, source, tmp_path):
    folder, kind, inputs = source
    if target == "w8a16" and kind is transformers.T5ForConditionalGeneration:
        with pytest.raises(SourceError, match="read by transformers while it loads the model"):
            convert(str(folder), tmp_path / "out", **TARGETS[target])
        return
    plan = convert(str(folder), tmp_path / "out", **TARGETS[target]).plan
    verify(tmp_path / "out")
    convert(str(tmp_path / "out"), tmp_path / "float", format="float32")
    original = outputs(kind.from_pretrained(folder, dtype=torch.float32), inputs)
    plain, notes = kind.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    expected = outputs(plain, inputs)
    assert 0 < far(expected, original) < 0.05
    theirs, notes = kind.from_pretrained(tmp_path / "out", output_loading_info=True, device_map="cpu")
    assert not any(notes[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    # w8a16 changes the weights alone; the others round inputs to int8, w8a8 without keeping outliers apart
    assert far(outputs(theirs, inputs), expected) < {"w8a16": 1e-5, "bitsandbytes": 0.05, "w8a8": 0.1}[target]
    ours, _ = load(tmp_path / "out", "cpu")
    names = {name for name, module in ours.named_modules() if isinstance(module, Int8Linear)}
    assert names and len(names) == len(plan.modules)
    assert far(outputs(ours, inputs), expected) < 0.05
    back, weights = ours.dequantize().state_dict(), plain.state_dict()
    assert far([back[name] for name in weights], weights.values()) < 1e-6


def test_text_of_two_parts_is_generated(tmp_path):
    folder, kind, inputs = t5(tmp_path / "source")
    convert(str(folder), tmp_path / "out")
    for model in (load(tmp_path / "out", "cpu")[0], kind.from_pretrained(tmp_path / "out", device_map="cpu")):
        assert model.generate(inputs["input_ids"], max_new_tokens=6, min_new_tokens=6).shape == (1, 7)


@pytest.mark.parametrize(("make", "scheme"), [(t5, "w8a8"), (gated_t5, "w8a8"), (whisper, "w8a8"), (whisper, "w8a16")])
def test_codes_pass_between_the_formats(make, scheme, tmp_path):
    folder, kind, inputs = make(tmp_path / "source")
    convert(str(folder), tmp_path / "int8")
    convert(str(tmp_path / "int8"), tmp_path / "ct", format="compressed-tensors", scheme=scheme)
    convert(str(tmp_path / "ct"), tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "int8" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    convert(str(tmp_path / "ct"), tmp_path / "float", format="float32")
    original, back = (outputs(kind.from_pretrained(each), inputs) for each in (folder, tmp_path / "float"))
    assert 0 < far(back, original) < 0.05
