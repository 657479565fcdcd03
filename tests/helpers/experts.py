"""Tiny mixture-of-experts models whose experts are stored in one tensor, each in the layout of a public model."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    # [E, K, N], gate and up projection in alternating columns, biases
    "gpt_oss": SIZES | {"layer_types": ["sliding_attention", "full_attention"]},
    # [E, K, N], computed for all tokens, beside a vision model
    "llama4": {
        "text_config": SIZES | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
        "vision_config": VISION
        | {"vision_output_dim": 64, "image_size": 28, "patch_size": 14}
        | {"projector_input_dim": 64, "projector_output_dim": 64},
    },
    # [E, N, K], beside a vision model
    "qwen3_vl_moe": {
        "text_config": SIZES,
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    },
    # [E, N, K], in block_sparse_moe.input_linear.weight
    "granitemoe": SIZES,
    # [E, N, K] without a gate, one by one in the checkpoint
    "nemotron_h": SIZES
    | {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 16}
    | {"ssm_state_size": 16, "n_groups": 1, "moe_shared_expert_intermediate_size": 96},
    # [E, N, K], beside dense layers and a vision model
    "gemma4": {
        "text_config": SIZES
        | {"enable_moe_block": True, "top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"]}
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "global_head_dim": 16},
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16},
        "audio_config": None,
    },
}


def model_class(model_type: str) -> Any:
    """The class that generates text with models of a type."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    kind = CONFIG_MAPPING[model_type]
    tables = (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    return next(table[kind] for table in tables if kind in table)


def fused(folder: Path, model_type: str) -> Path:
    """A tiny model of a type in SETTINGS, in bfloat16, as transformers saves it."""
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    model = model_class(model_type)(CONFIG_MAPPING[model_type](**SETTINGS[model_type]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        parameter.data = parameter.data.to(torch.bfloat16)  # not the buffers: some are complex
    model.save_pretrained(folder)
    return folder
