"""Int8Config in from_pretrained: bitsandbytes' logits bit for bit, saved folders reload, offloading, dequantizing."""

import pytest
import torch
from cuda_on_cpu.emulation import EmulatedGpu
from helpers.making import llama, mixtral, qwen3_moe, saved
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import quantize8
from quantize8 import Int8Config, Int8Linear, WeightError
from quantize8.errors import DeviceWarning
from quantize8.kernels import gpu, reference
from quantize8.kernels.reference import Int8Weight

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

IDS = torch.arange(2, 42)[None]
LINEAR = "model.layers.0.mlp.up_proj"


def logits(model, tokens=40):
    with torch.inference_mode():
        output = model(IDS[:, :tokens])
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def on_the_fly(folder, auto=AutoModelForCausalLM, **options):
    where = {name: options.pop(name) for name in ("device_map", "offload_folder") if name in options}
    config = Int8Config(**options)
    return auto.from_pretrained(folder, quantization_config=config, dtype="auto", **({"device_map": "auto"} | where))


def theirs(folder, auto=AutoModelForCausalLM, **options):
    config = BitsAndBytesConfig(load_in_8bit=True, **options)
    return auto.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype="auto").eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threshold", [6.0, 0.5, 0.0])
def test_logits_are_bitsandbytes_bit_for_bit(dtype, threshold, tmp_path):
    source = llama(tmp_path / "source", dtype=dtype)
    ours, expected = (make(source, llm_int8_threshold=threshold) for make in (on_the_fly, theirs))
    for tokens in (1, 2, 16, 17, 40):
        assert torch.equal(logits(ours, tokens), logits(expected, tokens))


@pytest.mark.parametrize("name", ["smollm2", "minilm", "mgm"])
def test_logits_of_real_models_are_bitsandbytes_bit_for_bit(name, request):
    folder = request.getfixturevalue(name)
    auto = AutoModel if name == "minilm" else AutoModelForCausalLM
    assert torch.equal(logits(on_the_fly(folder, auto)), logits(theirs(folder, auto)))


def test_the_other_modes_are_nearer_to_the_original(smollm2):
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    expected = logits(plain, 16)
    errors = {}
    for mode in ("bitsandbytes", "dynamic"):
        model = AutoModelForCausalLM.from_pretrained(
            smollm2, quantization_config=Int8Config(mode=mode), dtype=torch.float32
        )
        errors[mode] = float((logits(model, 16) - expected).norm() / expected.norm())
    assert errors["dynamic"] < 0.7 * errors["bitsandbytes"]


@pytest.mark.parametrize("name", ["llama", "mgm"])
def test_a_saved_model_opens_in_bitsandbytes_and_here(name, request, tmp_path):
    source = llama(tmp_path / "source") if name == "llama" else request.getfixturevalue(name)
    ours = on_the_fly(source)
    logits(ours)
    ours.save_pretrained(tmp_path / "saved")
    quantize8.convert(str(source), tmp_path / "converted")
    saved, converted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "converted"))
    assert {name for name in saved if name.endswith("SCB")} == {name for name in converted if name.endswith("SCB")}
    assert all(torch.equal(value, saved[name]) for name, value in converted.items() if name in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(again), logits(ours))
    loaded, _ = quantize8.load(tmp_path / "saved", mode="bitsandbytes", dtype=ours.dtype)
    assert torch.equal(logits(loaded), logits(ours))
    loaded.save_pretrained(tmp_path / "again")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == second.keys() and all(torch.equal(saved[key], second[key]) for key in saved)


def test_a_packed_model_is_saved_with_its_codes(smollm2, smollm2_int8, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=Int8Config(mode="dynamic"))
    logits(model)  # packs where there is an int8 unit
    model.save_pretrained(tmp_path / "saved")
    saved, converted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", smollm2_int8))
    name = f"{LINEAR}.weight"
    assert torch.equal(saved[name], converted[name])


def test_enable_runs_bitsandbytes_models_on_our_layers(tmp_path, monkeypatch):
    source = llama(tmp_path / "source")
    quantize8.convert(str(source), tmp_path / "int8")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map="cpu").eval())
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_8bit", AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"])
    quantize8.enable()
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map="cpu")
    for model in (folder, theirs(source)):
        assert isinstance(model.get_submodule(LINEAR), Int8Linear)
        assert torch.equal(logits(model), expected)
    folder.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_modules_to_skip_stay_in_float_and_are_written_down(tmp_path):
    source = llama(tmp_path / "source")
    model = on_the_fly(source, llm_int8_skip_modules=["model.layers.1", "lm_head"])
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert isinstance(model.get_submodule(LINEAR), Int8Linear)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"llm_int8_skip_modules": ["x_proj"]}])
def test_mambas_dt_proj_stays_in_float(options, tmp_path):
    """Its forward reads the weight, so int8 codes would be multiplied without their scale."""
    settings = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 8}
    source = saved(tmp_path / "source", MambaForCausalLM, **settings, pad_token_id=0)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    model = on_the_fly(source, **options)
    mixer = model.get_submodule("backbone.layers.1.mixer")
    assert type(mixer.dt_proj) is nn.Linear and isinstance(mixer.in_proj, Int8Linear)
    assert (logits(model) - logits(plain)).norm() < 0.02 * logits(plain).norm()
    model.save_pretrained(tmp_path / "saved")
    assert "backbone.layers.1.mixer.dt_proj" in model.config.quantization_config.llm_int8_skip_modules
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.fixture
def enabled(monkeypatch):
    """As after `enable`, for one test."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_8bit", AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"])
    quantize8.enable()


@pytest.mark.parametrize("make", [on_the_fly, theirs])
def test_a_tied_head_stays_tied_whatever_is_skipped(make, enabled, tmp_path):
    source = llama(tmp_path / "source", tied=True)
    model = make(source, llm_int8_skip_modules=["model.layers.0"])
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.get_submodule(LINEAR)) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, Int8Linear)
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    assert (logits(model).float() - logits(plain).float()).norm() / logits(plain).float().norm() < 0.02
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head" in model.config.quantization_config.llm_int8_skip_modules
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_saved_model_with_a_tied_head_opens_in_bitsandbytes(tmp_path):
    model = on_the_fly(llama(tmp_path / "source", tied=True), llm_int8_skip_modules=["model.layers.0"])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert not isinstance(again.model.layers[1].mlp.up_proj, Int8Linear)
    assert torch.equal(logits(again), logits(model))


def test_float_weights_where_the_folder_promises_int8_are_refused(tmp_path):
    quantize8.convert(str(llama(tmp_path / "source")), tmp_path / "int8")
    state = load_file(tmp_path / "int8" / "model.safetensors")
    state[f"{LINEAR}.weight"] = state[f"{LINEAR}.weight"].half()
    save_file(state, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"layers.0.mlp.up_proj: its weight is torch.float16, not int8; add it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8", quantization_config=Int8Config())


@pytest.mark.parametrize("options", [{}, {"llm_int8_threshold": 0.5, "llm_int8_skip_modules": ["lm_head", "q_proj"]}])
def test_one_config_opens_the_source_and_what_is_saved_of_it(options, tmp_path):
    source, config = llama(tmp_path / "source"), Int8Config(**options)
    given = {"quantization_config": config, "dtype": "auto"}
    fresh = AutoModelForCausalLM.from_pretrained(source, **given)
    fresh.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **given)
    assert isinstance(saved.model.layers[1].mlp.up_proj, Int8Linear)
    assert torch.equal(logits(saved), logits(fresh))
    assert vars(config) == vars(Int8Config(**options))  # and another model can be loaded with it
    saved.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()


def test_what_an_int8_folder_leaves_open_is_as_the_given_config_says(tmp_path):
    quantize8.convert(str(llama(tmp_path / "source")), tmp_path / "int8")
    config = Int8Config(llm_int8_threshold=0.5, llm_int8_skip_modules=["up_proj"], mode="dynamic")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", quantization_config=config, dtype="auto")
    layer = model.get_submodule(LINEAR)
    assert (layer.threshold, layer.mode) == (0.5, "dynamic")  # and int8, as it is stored
    expected, _ = quantize8.load(tmp_path / "int8", mode="dynamic", threshold=0.5, dtype=model.dtype)
    assert torch.equal(logits(model), logits(expected))
    trained = Int8Config(llm_int8_has_fp16_weight=True)
    with pytest.raises(ValueError, match="this model is stored in int8; load its source, or dequantize it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8", quantization_config=trained)


@pytest.mark.parametrize("mode", ["static", "elementwise", "junk"])
def test_a_config_names_the_modes_there_are(mode):
    message = f"^Int8Config: mode {mode} is unknown; name one of hybrid, dynamic, bitsandbytes$"
    with pytest.raises(ValueError, match=message):
        Int8Config(mode=mode)


def test_without_a_mode_a_cpu_takes_bitsandbytes_and_a_gpu_dynamic_without_a_warning(tmp_path, monkeypatch):
    """The GPU is emulated: a fake tensor stands for the device, and the kernel gets tensors in main memory."""
    source = llama(tmp_path / "source")
    monkeypatch.setattr(gpu, "gpu_of", lambda index: EmulatedGpu())
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # would need random numbers from a GPU
    gpu._say.cache_clear()
    x, weight = torch.ones(17, 64), Int8Weight(torch.ones(96, 64, dtype=torch.int8), torch.ones(96))
    for asked, on_cpu, on_gpu in ((None, "bitsandbytes", "dynamic"), ("bitsandbytes", "bitsandbytes", "bitsandbytes")):
        for options in ({}, {"llm_int8_has_fp16_weight": True}):
            layer = on_the_fly(source, mode=asked, **options).get_submodule(LINEAR)
            assert (layer.mode, layer.chosen_mode) == (on_cpu, asked)
            with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
                moved = type(layer)(64, 96, False, mode=layer.chosen_mode)
            assert moved.mode == on_gpu
            if asked is None:
                gpu.linear(x, weight, None, moved.threshold, moved.mode)
        if asked is not None:
            with pytest.warns(DeviceWarning, match="no kernel for mode bitsandbytes"):
                gpu.linear(x, weight, None, moved.threshold, moved.mode)
    gpu._say.cache_clear()


def test_an_int8_config_is_still_refused_for_other_formats(tmp_path):
    quantize8.convert(str(llama(tmp_path / "source")), tmp_path / "ct", format="compressed-tensors")
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig but you are passing a Int8Config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ct", quantization_config=Int8Config())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_one_bitsandbytes_config_opens_both_after_enable(enabled, tmp_path):
    fresh = theirs(llama(tmp_path / "source"))
    fresh.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(theirs(tmp_path / "saved")), logits(fresh))
    assert isinstance(theirs(tmp_path / "saved").get_submodule(LINEAR), Int8Linear)


def test_disk_offload_computes_the_same_and_holds_no_packed_weight(tmp_path):
    source = llama(tmp_path / "source", layers=3)
    quantize8.convert(str(source), tmp_path / "int8")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    whole, _ = quantize8.load(tmp_path / "int8", dtype=torch.float16, mode="bitsandbytes")
    for mode in ("bitsandbytes", "dynamic"):
        model, _ = quantize8.load(tmp_path / "int8", places, dtype=torch.float16, mode=mode)
        layer = model.get_submodule("model.layers.2.mlp.up_proj")
        assert layer.weight.is_meta
        for _ in range(2):
            assert mode == "dynamic" or torch.equal(logits(model), logits(whole))
            assert (logits(model) - logits(whole)).norm() / logits(whole).norm() < 0.02
        assert layer.weight.is_meta and layer._packed is None
    with pytest.raises(ValueError, match="is offloaded to disk before it is quantized to int8; convert the model"):
        on_the_fly(source, device_map=places, offload_folder=tmp_path / "offload")


def test_fp32_cpu_offload_leaves_in_float_what_is_not_on_a_gpu(tmp_path):
    source = llama(tmp_path / "source")
    model = on_the_fly(source, device_map={"": "cpu"}, llm_int8_enable_fp32_cpu_offload=True)
    model = on_the_fly(
        source,
        device_map={"model": "cpu", "model.layers.1": "cpu", "lm_head": "cpu"},
        llm_int8_enable_fp32_cpu_offload=True,
    )
    assert not [module for module in model.modules() if isinstance(module, Int8Linear)]


@pytest.mark.parametrize("name", ["llama", "mgm"])
def test_dequantize_gives_the_plain_model_of_the_codes(name, request, tmp_path):
    source = llama(tmp_path / "source") if name == "llama" else request.getfixturevalue(name)
    quantize8.convert(str(source), tmp_path / "int8")
    dtype = str(on_the_fly(source).dtype).removeprefix("torch.")
    quantize8.convert(str(tmp_path / "int8"), tmp_path / "float", format=dtype)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto").eval()
    model = on_the_fly(source).dequantize()
    kinds = {type(module) for module in model.modules()}
    assert Int8Linear not in kinds and (Conv1D if name == "mgm" else nn.Linear) in kinds
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_on_the_fly(make, tmp_path):
    source = make(tmp_path / "source")
    model = on_the_fly(source, mode="dynamic")
    experts = model.model.layers[1].mlp.experts
    assert len([layer for layer in experts.modules() if isinstance(layer, Int8Linear)]) == 8
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    weight = plain.model.layers[1].mlp.experts.down_proj[3].detach()
    codes, absmax = reference.quantize_rowwise(weight.numpy())
    assert experts.down_proj[3].codes().numpy().tolist() == codes.tolist()
    assert torch.equal(experts.down_proj[3].SCB.detach(), torch.from_numpy(absmax))
    for tokens in (3, 40):
        error = (logits(model, tokens) - logits(plain, tokens)).norm() / logits(plain, tokens).norm()
        assert error < 0.01
    model.save_pretrained(tmp_path / "saved")  # experts in floating point, as bitsandbytes leaves them
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert (logits(saved) - logits(plain)).norm() / logits(plain).norm() < 0.02
    assert torch.equal(saved.model.layers[1].mlp.experts.down_proj[3], experts.down_proj[3].dequantize())
    back = model.dequantize()
    assert type(back.model.layers[1].mlp.experts) is type(plain.model.layers[1].mlp.experts)
    assert (logits(back) - logits(plain)).norm() / logits(plain).norm() < 0.01


def test_experts_can_be_left_in_float_as_bitsandbytes_does(tmp_path):
    source = mixtral(tmp_path / "source")
    assert torch.equal(logits(on_the_fly(source, quantize_experts=False)), logits(theirs(source)))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
@pytest.mark.parametrize("options", [{}, {"scheme": "w8a16"}, {"moe": "transformers"}])
def test_compressed_tensors_with_experts_run_here(make, options, tmp_path):
    source = make(tmp_path / "source")
    quantize8.convert(str(source), tmp_path / "ct", format="compressed-tensors", **options)
    loaded, _ = quantize8.load(tmp_path / "ct")
    kinds = [module for module in loaded.modules() if isinstance(module, Int8Linear)]
    assert len(kinds) == 2 * (4 + 8)
    assert torch.equal(logits(loaded), logits(on_the_fly(source, mode="dynamic")))


@pytest.mark.parametrize("converted", [False, True], ids=["source", "artifact"])
def test_a_weight_that_the_checkpoint_lacks_is_named(converted, tmp_path):
    """transformers only warns: the layer would hold noise, which used to be mistaken for NaN."""
    folder = llama(tmp_path / "source")
    if converted:
        quantize8.convert(str(folder), tmp_path / "int8")
        folder = tmp_path / "int8"
    name = "model.layers.1.mlp.up_proj"
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=f"{name}.weight is not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())


def test_a_weight_that_is_no_int8_is_named(tmp_path):
    def edit(state):
        state[f"{LINEAR}.weight"][3, 2] = float("inf")

    with pytest.raises(Exception, match=r"up_proj row 3 holds NaN, infinity"):
        on_the_fly(llama(tmp_path / "source", edit=edit))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": False}, "load_in_8bit=False is not an option for int8"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type is not an option for int8"),
        ({"llm_int8_threshold": -1.0}, "llm_int8_threshold -1.0 must be 0"),
        ({"llm_int8_threshold": float("nan")}, "llm_int8_threshold nan must be 0"),
    ],
)
def test_options_that_are_not_for_int8(options, message):
    with pytest.raises(ValueError, match=message):
        Int8Config(**options)
