"""Checkpoints generated for benchmarks, and a check that the CPU and the GPU convert one to the same bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantize8.commands.convert import convert
from quantize8.demo import find_model

TOKENIZER_SIZE = 49152  # vocabulary size of SmolLM2


def converts_alike() -> str | None:
    """What differs between the artifacts made on the CPU and on the GPU; None if nothing does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llama(folder / "source")
        for device in ("cpu", "cuda"):
            convert(str(folder / "source"), folder / device, device=device)
        files = sorted(path.name for path in (folder / "cpu").iterdir())
        different = [
            file for file in files if (folder / "cpu" / file).read_bytes() != (folder / "cuda" / file).read_bytes()
        ]
        return f"these files differ: {', '.join(different)}" if different else None


def make_llama(
    folder: Path, hidden: int = 2048, inner: int = 5504, layers: int = 4, vocabulary: int = 512, shards: int = 1
) -> None:
    """Write a bfloat16 Llama with outliers in its weights, by default about 200 million, in `shards` files."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=random).mul_(0.02)
        weight[:, 5] *= 20
        return weight.bfloat16()

    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        state = {}
        for i in range(shard * layers // shards, (shard + 1) * layers // shards):
            prefix = f"model.layers.{i}"
            state |= {f"{prefix}.self_attn.{each}_proj.weight": matrix(hidden, hidden) for each in "qkvo"}
            state |= {f"{prefix}.mlp.{each}_proj.weight": matrix(inner, hidden) for each in ("gate", "up")}
            state[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                state[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        if shard == 0:
            state |= {name: matrix(vocabulary, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            state["model.norm.weight"] = torch.ones(hidden).bfloat16()
        save_file(state, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def add_tokenizer(folder: Path) -> None:
    """Add SmolLM2's tokenizer to a checkpoint of vocabulary TOKENIZER_SIZE: other tools do not convert without one."""
    from transformers import AutoTokenizer

    model = Path(find_model())
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
