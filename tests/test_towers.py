from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.experts import model_class
from safetensors.torch import load_file

import quantize8
from quantize8 import convert

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
SQUARE = {"pixel_values": (1, 3, 28, 28)}
GRID = {"pixel_values": (16, 3 * 2 * 14 * 14), "image_grid_thw": [[1, 4, 4]]}
# family -> settings, and the input of get_image_features
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}},
        SQUARE,
    ),
    "qwen2_vl": ({"text_config": TEXT | {"rope_parameters": ROPE}, "vision_config": QWEN | {"hidden_size": 64}}, GRID),
    "qwen2_5_vl": (
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN | {"out_hidden_size": 64, "fullatt_block_indexes": [1]},
        },
        GRID,
    ),
    "gemma3": (
        {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 5},
        SQUARE,
    ),
    "paligemma": (
        {"text_config": TEXT | {"model_type": "gemma"}, "vision_config": VISION, "projection_dim": 64},
        SQUARE,
    ),
    "internvl": (
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        },
        SQUARE,
    ),
    "mistral3": (
        {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
            "spatial_merge_size": 1,
        },
        SQUARE | {"image_sizes": [[28, 28]]},
    ),
}


def made(folder: Path, family: str) -> Path:
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    model = model_class(family)(CONFIG_MAPPING[family](**FAMILIES[family][0])).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def features(model: Any, family: str) -> torch.Tensor:
    """What the encoder and the projector make of an image."""
    torch.manual_seed(1)
    given = {
        name: torch.randn(value, dtype=torch.bfloat16) if isinstance(value, tuple) else torch.tensor(value)
        for name, value in FAMILIES[family][1].items()
    }
    with torch.no_grad():
        found = model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    return found[0] if isinstance(found, (list, tuple)) else found


@pytest.mark.parametrize("options", [{}, {"format": "compressed-tensors"}], ids=["bitsandbytes", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_encoded_bit_for_bit_as_in_the_source(family, options, tmp_path):
    source = made(tmp_path / "source", family)
    plan = convert(str(source), tmp_path / "out", **options).plan
    plain = model_class(family).from_pretrained(source, dtype=torch.bfloat16)
    ours, _ = quantize8.load(tmp_path / "out", "cpu", dtype=torch.bfloat16)
    expected = features(plain, family)
    assert expected.isfinite().all() and expected.abs().max() > 0
    assert torch.equal(features(ours, family), expected)
    assert len(plan.modules) == 2 * 7  # all of the language model
    assert any("outside of the language model" in why for why in plan.kept.values())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_recipe_includes_the_tower(family, tmp_path):
    source = made(tmp_path / "source", family)
    plan = convert(str(source), tmp_path / "out", recipe="towers").plan
    stored = load_file(tmp_path / "out" / "model.safetensors")
    inside = [name for name in plan.modules if "vi" in name.partition("language_model")[0]]
    assert len(inside) >= 8 and all(stored[f"{name}.weight"].dtype == torch.int8 for name in inside)
    assert not any("outside of the language model" in why for why in plan.kept.values())
