"""Tiny models of the families that GGUF is written for, and whole GGUF files from the parts that the writer has."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

from quantize8.artifact import gguf
from quantize8.artifact.gguf_tokenizer import tokenizer_fields
from quantize8.checkpoint import open_checkpoint
from quantize8.ops import q8_0
from quantize8.ops.scales import ScaleSearch

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-biased": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-tied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "head_dim": 32,
        "rope_theta": 1e6,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-5},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
MERGED = ["th", "he", "▁t", "▁th", "▁the", "an", "and", "▁and"]  # by falling score


def config_of(family: str, **changes) -> dict:
    """The config.json of a tiny model."""
    return {**SIZES, **FAMILIES[family], **changes}


def model_of(config: dict):
    """A model with random weights, biases and norms, in float32."""
    torch.manual_seed(0)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest)).eval()
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        value.data = 1 + 0.2 * noise if "norm" in name else noise * (0.2 if value.ndim == 2 else 0.5)
    return model


def folder_of(folder: Path, config: dict, tokenizer: bool = True) -> Path:
    """The model and a SentencePiece tokenizer in a folder, with the config.json exactly as given."""
    model_of(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:  # apart, as transformers puts one of its own in the place of any that a Qwen's folder holds
        write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> None:
    """Byte fallback and a few merges, in the shape that transformers gives Llama's SentencePiece."""
    folder.mkdir()
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += ["▁", *"abcdefghijklmnopqrstuvwxyz.,", *MERGED]
    cuts = [(text[:cut], text[cut:]) for text in MERGED for cut in range(1, len(text))]
    merges = [pair for pair in cuts if set(pair) <= set(texts)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts[:3]])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    entry = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    entry |= {"unk_token": "<unk>", "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(entry))


def assemble(source: Path, path: Path, fields: list[gguf.Field] | None = None) -> gguf.Header:
    """A GGUF file from a checkpoint, each tensor put at its place in two blocks, the last one first."""
    checkpoint = open_checkpoint(str(source))
    config, shapes = checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()}
    if fields is None:
        fields = [*gguf.settings(config, "tiny", source), *tokenizer_fields(source / "tokenizer", config)]
    tensors = gguf.plan(config, shapes, source)
    header = gguf.header(gguf.architecture(config, source), fields, tensors)
    with path.open("wb") as file:
        file.truncate(header.nbytes)
        file.write(header.content)
        for tensor in reversed(tensors):
            middle = tensor.head or len(tensor.shape) - 1
            for first, last in ((middle, tensor.shape[0]), (0, middle)):
                data = encoded(tensor, checkpoint, first, last)
                file.seek(header.offsets[tensor.name] + first * tensor.nbytes // tensor.shape[0])
                file.write(data.tobytes())
    return header


def encoded(tensor: gguf.GgufTensor, checkpoint, first: int, last: int) -> np.ndarray:
    """Rows first..last of a tensor as they are stored."""
    if tensor.source is None:
        return tensor.values[first:last]
    rows = tensor.arrange(checkpoint.rows(tensor.source, first, last).astype(np.float32))
    return rows if tensor.kind == gguf.F32 else q8_0.quantize_rows(rows)


def dequantized(config: dict, search: ScaleSearch | None = None):
    """The same model in plain transformers with the weights that Q8_0 leaves, float32."""
    model = model_of(config)
    for value in model.parameters():
        if value.ndim == 2:
            value.data = torch.from_numpy(q8_0.dequantize_rows(q8_0.quantize_rows(value.detach().numpy(), search)))
    return model
