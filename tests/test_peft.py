"""Every PEFT method over int8 layers: correct, compared with the float model of the same codes, or refused."""

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoModelForCausalLM

from quantize8 import Int8Config, Int8Linear, WeightError, merge_and_unload
from quantize8.runtime import quantizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) .* module to 8-bit linear"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # BOFT's, and how it goes on without it
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # SHiRA's
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT's name
]

IDS = torch.arange(2, 14)[None]  # short enough for exact activations: outputs are those of the dequantized weights
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CODES = "holds int8 codes, but .* treats them as floating point"

# methods that PEFT merges into 8-bit layers
MERGED = {
    "BOFT": {"boft_block_size": 4},
    "DORA": {"r": 4, "use_dora": True},
    "HIRA": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "MISS bat": {"r": 4, "init_weights": "bat"},
    "OFT": {"oft_block_size": 4},
    "PVERA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2, "random_seed": 0},
    "VERA": {"r": 4},
}
# methods that train over them, and what is said when they are to be merged
TRAINED = {
    "ADALORA": ({"total_step": 1, "init_r": 4}, NotImplementedError, None),
    "C3A": ({"block_size": 4}, WeightError, CODES),
    "FOURIERFT": ({"n_frequency": 50, "scaling": 20.0}, WeightError, CODES),
    "GRALORA": ({"r": 8, "gralora_k": 2}, WeightError, CODES),
    "IA3": ({"feedforward_modules": ["down_proj"]}, NotImplementedError, None),
    "LILY": ({"r": 4}, NotImplementedError, "not supported for Lily"),
    "LOHA": ({"r": 4}, WeightError, CODES),
    "LOKR": ({"r": 4}, WeightError, CODES),
    # PEFT multiplies its factors in the wrong order: an error where they do not fit, and else silently, but for ours
    "RANDLORA": ({"r": 4, "target_modules": ["down_proj"]}, RuntimeError, "shapes cannot be multiplied"),
    "RANDLORA square": ({"r": 4, "target_modules": ["q_proj"]}, WeightError, "differs from what the adapter computes"),
    "VBLORA": ({"num_vectors": 8, "vector_length": 4}, WeightError, CODES),
    "WAVEFT": ({"n_frequency": 16}, WeightError, CODES),
}
# methods that take the weight for floating point: they are refused before they compute
REFUSED = {
    "DEFT": ({"r": 4}, WeightError, CODES),
    "DELORA": ({"r": 2}, WeightError, CODES),
    "FROD": ({"sparse_rate": 0.1, "progressbar": False}, WeightError, CODES),
    "GLORA": ({"r": 2}, ValueError, "is not a plain torch.nn.Linear"),
    "HRA": ({"r": 4}, WeightError, CODES),
    "OSF": ({}, WeightError, CODES),
    "PEANUT": ({"r": 4}, WeightError, CODES),
    "PSOFT": ({"r": 4}, TypeError, "requires float32/float16/bfloat16"),
    "SUPERTUNING": ({"sparsity": 0.9}, WeightError, CODES),
    "TINYLORA": ({}, RuntimeError, "Only Tensors of floating point"),
    "UNILORA": ({"theta_d_length": 257}, WeightError, "unilora_scales_A.default became int8"),
}
PROMPTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
}
# methods that leave Linear layers alone, that are made of others here, or that need what is not installed
APART = {"ADAMSS", "BONE", "BEFT", "LN_TUNING", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}


def source(folder):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return source(tmp_path_factory.mktemp("peft") / "source")


def load(folder):
    config = Int8Config(mode="dynamic")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def adapted(model, name, options):
    """The model with adapters that are not 0, the same for the same name."""
    method = {"DORA": "LORA"}.get(name, name.partition(" ")[0])
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**{"target_modules": LINEARS, **options})
    torch.manual_seed(1)
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(made.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def logits(model):
    model.eval()
    return model(input_ids=IDS).logits


def apart(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def compared(folder, name, options):
    """Adapters over int8 layers and over the float layers that these stand for, whose outputs and gradients agree."""
    base = load(folder).dequantize()
    before = logits(base).detach()
    plain, ours = adapted(base, name, options), adapted(load(folder), name, options)
    assert [each for each in ours.modules() if isinstance(getattr(each, "base_layer", None), Int8Linear)]
    expected, found = logits(plain), logits(ours)
    assert apart(expected, before) > 0.02 and apart(found, expected) < 1e-5
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {key: value.grad for key, value in plain.named_parameters() if value.grad is not None}
    assert gradients.keys() == {key for key, value in ours.named_parameters() if value.grad is not None}
    for key, value in gradients.items():
        assert apart(ours.get_parameter(key).grad, value) < 1e-3 or not value.any(), key
    return before, expected.detach(), ours


def test_every_method_of_peft_is_here():
    known = {*MERGED, *TRAINED, *REFUSED, *APART} - {"DORA", "MISS bat", "RANDLORA square"}
    assert known >= {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value not in PROMPTS}


@pytest.mark.parametrize("name", MERGED)
def test_adapters_are_right_and_merge(name, folder):
    before, expected, ours = compared(folder, name, MERGED[name])
    ours.merge_adapter()
    assert apart(logits(ours), expected) < 0.04
    ours.unmerge_adapter()
    with ours.disable_adapter():
        assert apart(logits(ours), before) < 0.06  # quantized twice more than before
    ours.merge_adapter()
    merged = ours.unload()
    kept = [layer for layer in merged.modules() if isinstance(layer, Int8Linear)]
    assert len(kept) == 14 and all(layer.codes().dtype == torch.int8 for layer in kept)


@pytest.mark.parametrize("name", ["LORA", "MISS bat", "BOFT", "VERA"])
def test_our_own_merging_takes_them_too(name, folder):
    _, expected, ours = compared(folder, name, MERGED[name])
    assert apart(logits(merge_and_unload(ours)), expected) < 0.04


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_are_right_and_merging_is_refused(name, folder):
    options, kind, message = TRAINED[name]
    _, expected, ours = compared(folder, name, options)
    with pytest.raises(kind, match=message):
        ours.merge_adapter()
    with pytest.raises((kind, ValueError)):
        ours.merge_and_unload()
    fresh = adapted(load(folder), name, options)
    assert apart(logits(fresh), expected) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_compute_with_the_weight_are_refused(name, folder):
    options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        logits(adapted(load(folder), name, options))


def test_a_model_loaded_before_peft_is_there_trains_and_is_merged_by_us_alone(folder, monkeypatch):
    monkeypatch.setattr(quantizer, "_layer_class", lambda: Int8Linear)
    _, expected, ours = compared(folder, "LORA", MERGED["LORA"])
    assert type(ours.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is Int8Linear
    with pytest.raises(WeightError, match=CODES):
        ours.merge_adapter()
    assert apart(logits(ours), expected) < 1e-5
    assert apart(logits(merge_and_unload(ours)), expected) < 0.04
    with pytest.raises(WeightError, match=CODES):
        adapted(load(folder), "DORA", MERGED["DORA"])


def test_a_dequantized_model_is_no_longer_one_of_8_bits(folder):
    plain = adapted(load(folder).dequantize(), "IA3", TRAINED["IA3"][0])
    expected = logits(plain)
    assert apart(logits(plain.merge_and_unload()), expected) < 1e-5  # which PEFT refuses for 8 bits


def test_two_adapters_merge(folder):
    before, _, ours = compared(folder, "LORA", {"r": 4})
    config = ours.peft_config["default"]
    ours.add_adapter("second", config)
    for key, parameter in ours.named_parameters():
        if "second" in key:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
    ours.base_model.set_adapter(["default", "second"])
    expected = logits(ours).detach()
    ours.merge_adapter()
    assert apart(expected, before) > 0.1 and apart(logits(ours), expected) < 0.06
