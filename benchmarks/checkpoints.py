"""A checkpoint made on the spot, converted on the CPU and on the GPU: the two folders must hold the same bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantize8.operations.convert import convert


def converts_alike() -> str | None:
    """What differs between the artifacts of the CPU and of the GPU; None where nothing does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder / "source")
        for device in ("cpu", "cuda"):
            convert(str(folder / "source"), folder / device, device=device)
        files = sorted(path.name for path in (folder / "cpu").iterdir())
        different = [
            file for file in files if (folder / "cpu" / file).read_bytes() != (folder / "cuda" / file).read_bytes()
        ]
        return f"these files differ: {', '.join(different)}" if different else None


def _make(folder: Path, hidden: int = 2048, inner: int = 5504, layers: int = 4) -> None:
    """A Llama of some 200 million weights in bfloat16, with outliers."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=random) * 0.02
        weight[:, 5] *= 20
        return weight.bfloat16()

    state = {"model.embed_tokens.weight": matrix(512, hidden), "lm_head.weight": matrix(512, hidden)}
    state["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for i in range(layers):
        prefix = f"model.layers.{i}"
        state |= {f"{prefix}.self_attn.{each}_proj.weight": matrix(hidden, hidden) for each in "qkvo"}
        state |= {f"{prefix}.mlp.{each}_proj.weight": matrix(inner, hidden) for each in ("gate", "up")}
        state[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 512,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
