"""Training models: llm_int8_has_fp16_weight, Trainer, LoRA over int8 layers, and merging adapters into them."""

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from helpers.making import llama, mixtral, word_tokenizer
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from quantize8 import Int8Config, Int8Linear, SourceError, WeightError, convert
from quantize8 import load as load_artifact
from quantize8.runtime import linear
from quantize8.runtime.training import TrainableInt8Linear, dithered_codes, merge_and_unload

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing` is deprecated"
    ),  # PEFT's name, and that of Trainer
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),  # Trainer's, without a GPU
]
IDS = torch.arange(2, 42)[None]
LAYER = "model.layers.1.mlp.up_proj"
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def source_of(name, request, tmp_path):
    makers = {"llama": llama, "mixtral": mixtral}
    return makers[name](tmp_path / "source") if name in makers else request.getfixturevalue(name)


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config(**options), dtype=dtype)


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(ids).logits


def with_adapters(model, seed=0, **options):
    """LoRA over all layers, with second factors that are not 0, as after training."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, **ALL, **options}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def train(model, folder, steps=3, **options) -> list[float]:
    """Losses of Trainer's steps on a data set of 8 sequences."""
    data = [{"input_ids": (IDS[0] + 2 * i) % 60, "labels": (IDS[0] + 2 * i) % 60} for i in range(8)]
    given = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": []}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    resume = options.pop("resume_from_checkpoint", None)
    settings = TrainingArguments(str(folder), max_steps=steps, **{**given, **quiet, **options})
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", "bitsandbytes"),
        ("llama", "dynamic"),
        ("mgm", "bitsandbytes"),
        ("mgm", "dynamic"),
        ("smollm2", "dynamic"),
    ],
)
def test_logits_are_those_of_the_int8_model_and_what_is_saved_is_the_source(name, mode, request, tmp_path, monkeypatch):
    source = source_of(name, request, tmp_path)
    trained = load(source, mode=mode, llm_int8_has_fp16_weight=True)
    assert torch.equal(logits(trained), logits(load(source, mode=mode)))
    kinds = [module for module in trained.modules() if isinstance(module, TrainableInt8Linear)]
    assert len(kinds) == {"llama": 14, "mgm": 32, "smollm2": 210}[name]
    assert all(parameter.requires_grad for parameter in trained.parameters())
    trained.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(again.config, "quantization_config")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    states = plain.state_dict(), again.state_dict(), trained.state_dict()
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
    assert torch.equal(logits(trained.dequantize()), logits(plain))


@pytest.mark.parametrize("name", ["llama", "mgm"])
def test_trainer_trains_all_weights_with_checkpointing_and_without(name, request, tmp_path):
    source = source_of(name, request, tmp_path)
    losses = []
    for checkpointing in (False, True):
        model = load(source, llm_int8_has_fp16_weight=True)
        before = {key: value.clone() for key, value in model.named_parameters()}
        losses.append(train(model, tmp_path / "out", gradient_checkpointing=checkpointing, learning_rate=1e-3))
        assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_trainer_resumes_where_it_stopped(mgm, tmp_path):
    """With Conv1D weights, of which square ones could be loaded transposed without an error."""
    options = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole = train(load(mgm, llm_int8_has_fp16_weight=True), tmp_path / "out", 3, **options)
    options["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-2")
    assert train(load(mgm, llm_int8_has_fp16_weight=True), tmp_path / "out", 3, **options) == whole


@pytest.mark.parametrize(
    ("name", "mode"),
    [("llama", "bitsandbytes"), ("mgm", "bitsandbytes"), ("mgm", "dynamic"), ("mixtral", "dynamic")],
)
def test_adapters_train_over_int8_layers(name, mode, request, tmp_path):
    source = source_of(name, request, tmp_path)
    attention = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    losses = []
    for checkpointing in (False, True):
        base = load(source, mode=mode)
        logits(base)  # packs where there is an int8 unit
        frozen = {key: value.clone() for key, value in base.state_dict().items()}
        model = with_adapters(base, **attention)
        losses.append(train(model, tmp_path / "out", gradient_checkpointing=checkpointing))
        left = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items() if "lora" not in key}
        assert left.keys() == frozen.keys() and all(torch.equal(value, left[key]) for key, value in frozen.items())
    # PEFT lets the first layer's input require a gradient for checkpointing, and then its weight is not packed
    assert losses[1] == pytest.approx(losses[0], rel=0 if mode == "bitsandbytes" else 0.005)
    assert losses[0][-1] < losses[0][0]
    model.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(load(source, mode=mode), tmp_path / "adapters")
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(source, mode=mode)))
    assert not torch.equal(logits(model), logits(load(source, mode=mode)))


def test_biases_train_beside_adapters(mgm, tmp_path):
    model = with_adapters(load(mgm, mode="dynamic"), bias="all")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "c_fc" in name]
    before = {name: value.clone() for name, value in model.named_parameters() if name in names}
    train(model, tmp_path / "out", 1)
    biases = [name for name in names if name.endswith("bias")]
    assert len(biases) == 8 and all(not torch.equal(model.get_parameter(name), before[name]) for name in names)


def test_bfloat16_autocast_trains(tmp_path):
    model = with_adapters(load(llama(tmp_path / "source")))
    losses = train(model, tmp_path / "out", bf16=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["llama", "mgm"])
def test_merging_quantizes_the_sum_and_saves_what_bitsandbytes_opens(name, request, tmp_path):
    source = source_of(name, request, tmp_path)
    model = with_adapters(load(source))
    adapted = logits(model)
    expected = {}
    for key, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), Int8Linear):
            base = module.base_layer
            plain = int8_vectorwise_dequant(base.codes(), base.SCB.data)  # by which PEFT comes from codes to numbers
            torch.testing.assert_close(plain, base.dequantize())
            total = plain + module.get_delta_weight("default").detach()
            expected[key.removeprefix("base_model.model.")] = (total, linear.quantize(total)[1])
    merged = merge_and_unload(model)
    assert type(merged) is type(load(source)) and not [key for key in merged.state_dict() if "lora" in key]
    found = {key: module for key, module in merged.named_modules() if isinstance(module, Int8Linear)}
    assert found.keys() == expected.keys() and not any(each.training for each in found.values())
    for key, (total, absmax) in expected.items():
        assert torch.equal(found[key].SCB.data, absmax)
        assert torch.equal(found[key].codes(), dithered_codes(total, absmax))
    assert (logits(merged) - adapted).norm() / adapted.norm() < 0.2  # large adapters on a tiny model
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu", dtype=torch.float32)
    assert not isinstance(again.get_submodule(next(iter(found))), Int8Linear)
    assert torch.equal(logits(again), logits(merged))
    assert train(with_adapters(merged), tmp_path / "out", 1)  # adapters again


def test_adapters_train_over_a_calibrated_model_and_merge_into_its_columns(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(60)))
    convert(str(source), tmp_path / "out", calibrate=tmp_path / "text", outlier_columns=3)
    model = with_adapters(load_artifact(tmp_path / "out", "cpu")[0])
    adapted, dynamic = logits(model), with_adapters(load_artifact(tmp_path / "out", "cpu", mode="dynamic")[0])
    losses = train(model, tmp_path / "trained")
    assert losses[-1] < losses[0]
    model, plain = with_adapters(load_artifact(tmp_path / "out", "cpu")[0]), merge_and_unload(dynamic)
    expected = {}
    for key, module in model.named_modules():
        if isinstance(base := getattr(module, "base_layer", None), Int8Linear):
            columns = base.outlier_columns.long()
            delta = module.get_delta_weight("default").detach()[:, columns]
            expected[key.removeprefix("base_model.model.")] = columns, base.outlier_weight.float() + delta
    merged = merge_and_unload(model)
    for key, (columns, total) in expected.items():
        layer = merged.get_submodule(key)
        assert layer.mode == "hybrid" and layer.outlier_columns.tolist() == columns.tolist()
        torch.testing.assert_close(layer.outlier_weight, total.half(), rtol=2e-3, atol=1e-4)
        step = layer.SCB[:, None] / 127
        # the nearest code, of the value rounded to float16
        assert ((layer.dequantize()[:, columns] - total).abs() <= (0.5 + 127 * 2**-11) * step + 1e-6).all()
    apart = (logits(merged) - adapted).norm() / adapted.norm()
    assert apart < 0.2 and plain.get_submodule(LAYER).mode == "dynamic"


def test_merging_sees_the_adapters_of_a_model_that_keeps_its_weights(tmp_path):
    """PEFT's own merging writes to `.data` of the float weights."""
    model = with_adapters(load(llama(tmp_path / "source"), llm_int8_has_fp16_weight=True))
    adapted = logits(model)
    with model.disable_adapter():
        before = logits(model)
    apart = (before - adapted).norm()
    model.merge_adapter()
    assert (logits(model) - adapted).norm() < 0.5 * apart
    model.unmerge_adapter()
    with model.disable_adapter():
        assert (logits(model) - before).norm() < 0.01 * apart
    assert (logits(model.merge_and_unload()) - adapted).norm() < 0.5 * apart


def test_merging_only_what_is_there(tmp_path):
    model = load(llama(tmp_path / "source"))
    with pytest.raises(SourceError, match="LlamaForCausalLM: has no adapters to merge; pass the PEFT model"):
        merge_and_unload(model)
    adapted = get_peft_model(model, AdaLoraConfig(**{**ALL, "target_modules": ["q_proj"]}, total_step=1))
    with pytest.raises(
        SourceError, match=r"q_proj: PEFT cannot merge SVDLinear8bitLt; use the adapter without merging it"
    ):
        merge_and_unload(adapted)


def test_adapters_that_are_not_finite_are_named(tmp_path):
    model = with_adapters(load(llama(tmp_path / "source")))
    layer = model.get_submodule(f"base_model.model.{LAYER}")
    layer.lora_B["default"].weight.data[3] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj: weight row 3 holds NaN"):
        merge_and_unload(model)
    assert isinstance(layer.base_layer, Int8Linear)


def test_an_output_head_that_is_trained_whole_stays_in_float(tmp_path):
    model = with_adapters(load(llama(tmp_path / "source")), modules_to_save=["lm_head"])
    merged = merge_and_unload(model)
    assert type(merged.lm_head) is nn.Linear
    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved["lm_head.weight"].dtype == torch.float32 and saved[f"{LAYER}.weight"].dtype == torch.int8


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_trains_its_input_and_its_bias(bias):
    layer = Int8Linear.from_float(nn.Linear(33, 24, bias))
    layer.pack()
    if bias:
        layer.bias.requires_grad_()
        layer(torch.randn(20, 33)).sum().backward()  # the input has no gradient, as in a model's first layer
        assert torch.equal(layer.bias.grad, torch.full((24,), 20.0))
        layer.pack()
    x = torch.randn(20, 33, requires_grad=True)
    layer(x).sum().backward()
    assert layer._packed is None
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand_as(x))
