"""Layers whose weight a model's code reads itself."""

import pytest
import torch
import transformers
from helpers.making import SIZES
from torch import nn
from torch.nn import functional

from quantize8.sources.reading import read_by_code, read_on_loading


class Layer(nn.Module):
    """Its methods read weights in all ways that count, and in some that do not."""

    tensor_parallel = 1

    def __init__(self):
        super().__init__()
        names = [
            "multiplied",
            "cast",
            "aliased",
            "trained",
            "split",
            "described",
            "guarded",
            "helped",
            "unused",
            "called",
        ]
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.several = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.indexed = nn.ModuleList([nn.Linear(4, 4)])
        self.own = nn.Parameter(self.called.weight)

    def forward(self, x):
        x = self.cast(x.to(self.cast.weight.dtype)) + functional.linear(x, self.multiplied.weight)
        layer = self.aliased
        x = x @ layer.weight
        layer = x
        for each in self.several:
            x = x @ each.weight.t()
        x = self.called(x) @ self.indexed[0].weight
        if self.training and x is not None:
            x = x @ self.trained.weight
        if self.tensor_parallel > 1:
            x = x @ self.split.weight
        if self.guarded.weight.dtype != torch.int8:
            x = x.to(self.guarded.weight.dtype)
        return self.help(x).view(self.described.weight.shape)

    def help(self, x):
        return x @ self.helped.weight

    def dtype_that_nobody_asks_for(self):
        return self.unused.weight.dtype


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_methods_read_is_found_and_nothing_else():
    names = ("multiplied", "cast", "aliased", "helped", "several.0", "several.1", "indexed.0", "trained")
    expected = {f"layers.{number}.{name}" for number in (0, 1) for name in names}
    assert read_by_code(Model()) == expected


def test_a_setting_decides_which_branch_is_searched():
    model = Model()
    model.layers[1].tensor_parallel = 2
    assert {name for name in read_by_code(model) if "split" in name} == {"layers.1.split"}


def build(kind, **settings):
    with torch.device("meta"):
        return kind._from_config(kind.config_class(**settings))


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WAVLM = VISION | {"conv_dim": [32], "conv_kernel": [10], "conv_stride": [5], "num_conv_pos_embedding_groups": 4}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (transformers.WavLMModel, WAVLM, [f"encoder.layers.0.attention.{x}_proj" for x in ("k", "out", "q", "v")]),
        (transformers.Siglip2VisionModel, VISION, ["embeddings.patch_embedding"]),
        (transformers.Swinv2Model, SWIN, ["encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0"]),
        (transformers.BloomForCausalLM, {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, []),
        (transformers.LlamaForCausalLM, SIZES, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models(kind, settings, expected):
    assert sorted(read_by_code(build(kind, **settings))) == expected


def test_the_initialization_of_a_model_within_the_model_counts():
    """Siglip's reads the weight of every Linear; CLIP's looks whether there is one."""
    siglip, clip = transformers.SiglipVisionConfig(**VISION), transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**SIZES)
    for vision, every in ((siglip, True), (clip, False)):
        with torch.device("meta"):
            config = transformers.LlavaConfig(vision_config=vision, text_config=text)
            model = transformers.LlavaForConditionalGeneration(config)
        read = read_on_loading(model)
        assert all(name.startswith("model.vision_tower.") for name in read)
        inside = {name for name, module in model.model.vision_tower.named_modules() if type(module) is nn.Linear}
        assert len(read) == (len(inside) if every else 0) and len(inside) >= 6
        assert all(layer.weight.is_meta for layer in model.modules() if type(layer) is nn.Linear)  # as before


def test_layers_that_an_attention_initializes_count():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    read = read_on_loading(build(transformers.T5EncoderModel, **sizes))
    assert {name.rpartition(".")[2] for name in read} == {"q", "k", "v", "o", "wi", "wo"}


def test_out_proj_of_mamba_2_is_read_by_its_fused_kernel(tmp_path):
    """In Nemotron-H, Bamba, Zamba 2 and others, when adapters are trained."""
    from helpers.experts import fused

    from quantize8 import convert

    plan = convert(str(fused(tmp_path / "source", "nemotron_h")), tmp_path / "out", dry_run=True).plan
    assert plan.kept["backbone.layers.0.mixer.out_proj"].startswith("the model's code reads its weight")
    assert "backbone.layers.0.mixer.in_proj" in plan.modules
