"""Tiny models of the families that GGUF is written for, and whole GGUF files, by our writer or by llama.cpp's.

`TinyGguf` is a model as llama.cpp's own package writes it. Tests may change it before it is written, and split it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config

from quantize8.formats.gguf import architectures as gguf
from quantize8.formats.gguf.tokenizer import tokenizer_fields
from quantize8.formats.gguf.writer import Header
from quantize8.formats.gguf.writer import header as make_header
from quantize8.kernels import q8_0
from quantize8.kernels.scales import ScaleSearch
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import structure_of, with_separate_experts

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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES = {
    "qwen2moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **EXPERTS,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True}
OTHERS = {
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **GEMMA},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 6,
        **GEMMA,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
    "phi3-partial": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "hidden_size": 128,
    },
}
FUSED = {
    "gpt-oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
WRITTEN = {**FAMILIES, **MIXTURES, **OTHERS, **FUSED}
ROUTERS = ("mlp.gate.weight", "shared_expert_gate.weight", "router.weight")  # these stay in float32
MERGED = ["th", "he", "▁t", "▁th", "▁the", "an", "and", "▁and"]  # by falling score


def config_of(family: str, **changes) -> dict:
    """The config.json of a tiny model."""
    return {**SIZES, **WRITTEN[family], **changes}


def model_of(config: dict):
    """A model with random weights, biases and norms, in float32."""
    torch.manual_seed(0)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest)).eval()
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        usual = 0 if "gemma" in config["model_type"] else 1  # Gemma itself adds 1 to the weights of its norms
        value.data = usual + 0.2 * noise if "norm" in name else noise * (0.2 if value.ndim > 1 else 0.5)
    return model


def folder_of(folder: Path, config: dict, tokenizer: bool = True) -> Path:
    """The model and a SentencePiece tokenizer in a folder, with the config.json exactly as given."""
    model_of(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:  # apart, as transformers puts one of its own in the place of any that a Qwen's folder holds
        write_tokenizer(folder / "tokenizer")
    return folder


def multimodal(folder: Path, language: str, prefix: str) -> Path:
    """Gemma 3 with an image encoder, under the names of a release: what is before the language model's, and others."""
    text = config_of("gemma3")
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config["vision_config"] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28}
    config["vision_config"] |= {"num_attention_heads": 2, "patch_size": 14, "model_type": "siglip_vision_model"}
    config |= {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
    source = folder_of(folder, text)
    stored = model_of(text).state_dict()
    state = {name.replace("model.", language): value for name, value in stored.items() if name != "lm_head.weight"}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Gemma3Config(**config))
    for name, value in model.state_dict().items():
        if "language_model" not in name and name != "lm_head.weight":
            state[name.replace("model.", prefix, 1)] = torch.ones(value.shape)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    return source


def write_tokenizer(folder: Path) -> None:
    """Byte fallback and a few merges, in the shape that transformers gives Llama's SentencePiece."""
    folder.mkdir(exist_ok=True)
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


def assemble(source: Path, path: Path, fields: list[gguf.Field] | None = None) -> Header:
    """A GGUF file from a checkpoint, with each tensor written in two blocks, the last one first."""
    checkpoint = separate(open_checkpoint(str(source)))
    config, shapes = checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()}
    if fields is None:
        fields = [*gguf.settings(config, "tiny", source), *tokenizer_fields(source / "tokenizer", config)]
    tensors = gguf.tensors_of(config, shapes, source)
    header = make_header(gguf.architecture(config, source), fields, tensors)
    with path.open("wb") as file:
        file.truncate(header.nbytes)
        file.write(header.content)
        for tensor in reversed(tensors):
            middle = tensor.head or tensor.shape[0] // 2
            for first, last in ((middle, tensor.shape[0]), (0, middle)):
                data = encoded(tensor, checkpoint, first, last)
                file.seek(header.offsets[tensor.name] + first * tensor.nbytes // tensor.shape[0])
                file.write(data.tobytes())
    return header


def separate(checkpoint):
    """A checkpoint with its experts one by one."""
    return with_separate_experts(checkpoint, structure_of(checkpoint))[0]


def encoded(tensor: gguf.GgufTensor, checkpoint, first: int, last: int) -> np.ndarray:
    """Rows first..last of a tensor as stored."""
    if tensor.source is None:
        return tensor.values[first:last]
    if len(checkpoint.tensors[tensor.source].shape) > len(tensor.shape):  # [1, K], which llama.cpp has as [K]
        return checkpoint.rows(tensor.source, 0, 1)[0, first:last].astype(np.float32)
    step = tensor.rows[1]
    rows = tensor.arrange(tensor.choose(checkpoint.rows(tensor.source, first * step, last * step).astype(np.float32)))
    return rows + np.float32(tensor.offset) if tensor.dtype == gguf.F32 else q8_0.quantize_rows(rows)


def dequantized(config: dict, search: ScaleSearch | None = None):
    """The same model in plain transformers with the weights after Q8_0 rounding, float32."""
    model = model_of(config)
    for name, value in model.named_parameters():
        if value.ndim > 1 and not name.endswith((*ROUTERS, "_bias")):
            turned = value.ndim == 3 and config["model_type"] == "gpt_oss"  # [E, K, N]
            stored = value.data.mT if turned else value.data
            rows = np.ascontiguousarray(stored.numpy()).reshape(-1, stored.shape[-1])
            rounded = torch.from_numpy(q8_0.dequantize_rows(q8_0.quantize_rows(rows, search))).reshape(stored.shape)
            value.data = rounded.mT if turned else rounded
    return model


HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 64, 4, 2, 96, 32
HEAD = HIDDEN // HEADS
MODULES = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (HEAD * KV_HEADS, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (HEAD * KV_HEADS, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}
HEAD_NORMS = {"attn_q_norm": ("self_attn.q_norm", (HEAD,)), "attn_k_norm": ("self_attn.k_norm", (HEAD,))}
COUNTS = {"block_count": 2, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INNER}
COUNTS |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter stores query and key rows of Llama."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@dataclass
class TinyGguf:
    """A model of two layers.

    fields: key of the metadata -> value and type. tensors: llama.cpp's name -> packed values and their type.
    expected: transformers' name -> float32 values after their quantization. biased: modules that have a bias.
    """

    architecture: str = "llama"
    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    biased: tuple[str, ...] | None = None
    fields: dict[str, tuple] = field(default_factory=dict)
    tensors: dict[str, tuple] = field(default_factory=dict)
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.biased is None:
            self.biased = ("attn_q", "attn_k", "attn_v") if self.architecture == "qwen2" else ()
        for key, count in COUNTS.items():
            self.fields[f"{self.architecture}.{key}"] = count, GGUFValueType.UINT32
        self.fields[f"{self.architecture}.attention.layer_norm_rms_epsilon"] = 1e-5, GGUFValueType.FLOAT32
        self.fields[f"{self.architecture}.rope.freq_base"] = 5e5, GGUFValueType.FLOAT32
        self._rng = np.random.default_rng(0)
        self.add("token_embd.weight", "model.embed_tokens.weight", (VOCABULARY, HIDDEN))
        modules = MODULES | (HEAD_NORMS if self.architecture == "qwen3" else {})
        for layer in range(COUNTS["block_count"]):
            for stored, (name, shape) in modules.items():
                stored, name = f"blk.{layer}.{stored}", f"model.layers.{layer}.{name}"
                self.add(f"{stored}.weight", f"{name}.weight", shape)
                if stored.endswith(tuple(f".{module}" for module in self.biased)):
                    self.add(f"{stored}.bias", f"{name}.bias", shape[:1])
        self.add("output_norm.weight", "model.norm.weight", (HIDDEN,))

    def add(self, stored: str, name: str, shape: tuple[int, ...]) -> None:
        """Add a tensor with random values."""
        values = self._rng.normal(size=shape).astype(np.float32)
        kind = self.kind if len(shape) == 2 else GGMLQuantizationType.F32
        packed = quants.quantize(values, kind)
        self.expected[name] = quants.dequantize(packed, kind)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(stored.split(".")[-2], 0)
        self.tensors[stored] = permute(packed, heads) if heads and self.architecture == "llama" else packed, kind

    def write(self, path: Path, split: int = 0, small_first: bool = False) -> list[Path]:
        """Write it to a file, or in parts of `split` tensors, named as llama.cpp's package does. Returns the files.

        With `small_first` the first part holds only the metadata.
        """
        writer = GGUFWriter(path, self.architecture, split_max_tensors=split, small_first_shard=small_first)
        for key, (value, kind) in self.fields.items():
            writer.add_key_value(key, value, kind)
        for name, (packed, kind) in self.tensors.items():
            writer.add_tensor(name, packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return sorted(path.parent.glob(f"{path.stem}*.gguf"))
