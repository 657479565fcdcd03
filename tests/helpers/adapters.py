"""Adapters as PEFT saves them, with the model that PEFT merges them into."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def train(base: Path, folder: Path, kind: Any = AutoModelForCausalLM, **config: Any) -> Path:
    """Save an adapter of a base in `folder`: every number that would be trained is moved by a random one."""
    model = get_peft_model(kind.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def merge(base: Path, adapter: Path, folder: Path, kind: Any = AutoModelForCausalLM) -> Path:
    """Save the base with an adapter that PEFT merges in float32; all numbers of the folder are float32."""
    model = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return folder


def settings(adapter: Path, **changes: Any) -> None:
    """Change the settings of an adapter."""
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | changes))


def tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of an adapter; those that `edit` returns replace them, if it returns any."""
    state = load_file(adapter / WEIGHTS)
    edited = edit(state)
    save_file(state if edited is None else edited, adapter / WEIGHTS)
