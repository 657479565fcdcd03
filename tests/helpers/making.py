"""Tiny checkpoints on disk, with values that quantizers tend to get wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

# Settings of small models of several families
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "pad_token_id": 0}
MAMBA2 = SIZES | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}
VOCABULARY, INNER, HEADS, KV_HEADS = 64, 48, 4, 2


def llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    dtype: torch.dtype = torch.float16,
    shards: int = 1,
    tied: bool = False,
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Path:
    """A Llama checkpoint in `shards` files; `edit` can change its tensors before they are written."""
    folder.mkdir(parents=True)
    state = llama_state(layers, hidden, dtype, tied)
    if edit is not None:
        edit(state)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    write_shards(folder, state, shards)
    return folder


def llama_state(layers: int, hidden: int, dtype: torch.dtype, tied: bool) -> dict[str, torch.Tensor]:
    """Seeded weights under transformers' names: outliers, a zero row and exact ties in each matrix."""
    generator = torch.Generator().manual_seed(0)
    kv = hidden // HEADS * KV_HEADS
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    linears = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    linears |= {f"mlp.{name}_proj": (INNER, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, INNER)}

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        weight[0] = 0
        weight[1] = torch.randint(-254, 255, (columns,), generator=generator) / 2 / 127  # halves of a step,
        weight[1, 0] = 1  # whose row has absmax 1
        weight[2, columns // 2] = 3
        return weight.to(dtype)

    state = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        state |= {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
    state["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        state["lm_head.weight"] = matrix(VOCABULARY, hidden)
    return state


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """Safetensors in one file, or in several with an index."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: value for j, (name, value) in enumerate(state.items()) if j * shards // len(state) == i}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mixtral(folder: Path, inner: int = INNER) -> Path:
    """A Mixtral with 4 experts per layer, as transformers writes it: separate matrices for each expert."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_local_experts": 4}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0)).save_pretrained(folder)
    return folder


def qwen3_moe(folder: Path) -> Path:
    """A Qwen3-MoE with 4 experts per layer, as transformers writes it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 8, "num_experts": 4}
    experts = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, pad_token_id=0)).save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path, words: int = VOCABULARY) -> Path:
    """Give a checkpoint a tokenizer of the words w0 to w62, and <unk> for all others; fewer `words` give more <unk>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(words - 1)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def saved(folder: Path, kind: type[transformers.PreTrainedModel], **settings: object) -> Path:
    """A model with random weights as transformers saves it."""
    torch.manual_seed(0)
    kind(kind.config_class(**settings)).save_pretrained(folder)
    return folder
