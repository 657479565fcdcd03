"""The pass that chooses the codes of a model: against a plain reference, for every kind of layer, on any processor."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.experts import SETTINGS, fused
from helpers.making import GPT2, llama, mixtral, qwen3_moe, saved, word_tokenizer
from test_encoders import t5
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from quantize8 import SourceError
from quantize8.calibration import rounding as module
from quantize8.calibration.activations import linear_layers
from quantize8.calibration.rounding import LEAST_TOKENS, choose_codes, rounded_inputs
from quantize8.kernels import cpu, reference
from quantize8.kernels.reference import INT8_MAX
from quantize8.kernels.rounding import defined_codes, defined_factor, defined_gram, nearest_codes
from quantize8.runtime.double import as_written, in_double
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import structure_of, with_separate_experts

# gemma4's code reads the weight of the embedding outside of that module, where a streamed model does not have it
FUSED = [model_type for model_type in SETTINGS if model_type != "gemma4"]
TEXT = " ".join(f"w{i * i * 7 % 61}" for i in range(400))


class Rows:
    """A scale for each row; checks that each weight is what the checkpoint stores under its name."""

    def __init__(self, checkpoint, size: int = 0, wants=lambda name: True) -> None:
        self.checkpoint = with_separate_experts(checkpoint, structure_of(checkpoint))[0]
        self.size, self.wants, self.kept, self.earlier, self.importance = size, wants, {}, {}, {}

    def rotation(self, name):
        return self.size

    def scales(self, name, weight, importance):
        values = np.concatenate([block.astype(np.float32) for block in self.checkpoint.blocks(name)])
        values = values if values.shape == weight.shape and "c_" not in name else values.T
        np.testing.assert_array_equal(weight, cpu.rotate(values, self.size) if self.size else values)
        assert importance.shape == weight.shape[1:] and importance.dtype == np.float32
        self.importance[name] = importance
        return weight, row_scales(weight)

    def stored(self, name):
        return self.earlier.get(name)

    def keep(self, name, codes, scales, is_nearest):
        assert codes.dtype == np.int8 and name not in self.kept
        self.kept[name] = codes, scales


def row_scales(weight):
    return (np.abs(weight).max(axis=1, keepdims=True) / np.float32(INT8_MAX)).astype(np.float32)


def rounded(source, text: str = TEXT, **options):
    checkpoint = open_checkpoint(str(source))
    rounding = Rows(checkpoint, **options)
    return rounding, choose_codes(checkpoint, text, rounding, tokens=384)


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, (codes, scales) in theirs.items():
        np.testing.assert_array_equal(ours[name][0], codes, name)
        np.testing.assert_array_equal(ours[name][1], scales, name)


def plainly(source: Path, size: int, context: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The codes of all layers but the head, by running the whole model once for each layer, in order."""
    with in_double(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
        ids = torch.tensor([int(word[1:]) + 1 for word in TEXT.split()])[:384].view(-1, context)
        layers = {name: layer for name, layer in linear_layers(model) if layer is not model.get_output_embeddings()}
        seen: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        model(ids)
        for name in list(seen):  # in the order in which they compute
            model(ids)
            layer, x = layers[name], seen[name].reshape(-1, seen[name].shape[-1])
            turned = isinstance(layer, Conv1D)
            with as_written():
                weight = (layer.weight.t() if turned else layer.weight).float().contiguous().numpy()
                if size:
                    h = torch.from_numpy(reference.rotate(np.eye(size, dtype=np.float32), size)).double()
                    x = (x.reshape(-1, size) @ h).reshape(x.shape)
                    weight = reference.rotate(weight, size)
                x = rounded_inputs(x)
                scales = row_scales(weight)
                codes = defined_codes(weight, scales, *defined_factor(defined_gram(x)))
                values = codes * scales
                values = torch.from_numpy(reference.rotate(values, size) if size else values).double()
                layer.weight.copy_(values.t() if turned else values)
            found[f"{name}.weight"] = codes, scales
    return found


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pass_gives_what_a_run_of_the_whole_model_for_each_layer_gives(kind, size, tmp_path):
    if kind == "llama":
        source = word_tokenizer(llama(tmp_path / "source"))
    else:
        source = word_tokenizer(saved(tmp_path / "source", GPT2LMHeadModel, **GPT2))
    rounding, report = rounded(source, size=size, wants=lambda name: "head" not in name)
    expected = plainly(source, size, 128 if kind == "llama" else 64)
    same(rounding.kept, expected)
    assert report.tokens == 384 and report.chosen == len(expected) and report.nearest == []
    nearest = sum(
        int((nearest_codes(*_weight(rounding, name)) != codes).sum()) for name, (codes, _) in expected.items()
    )
    assert nearest > 100


def test_inputs_are_rounded_to_bfloat16_numbers_and_no_closer_than_a_sixteenth_of_the_mean():
    x = torch.randn(700, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10 ** torch.arange(
        -45, 45
    )
    x[3] *= 1000
    x[:, 7] = 0
    values = torch.from_numpy(rounded_inputs(x))
    assert torch.equal(values, values.bfloat16().float())
    mean = x.abs().mean(0)
    inside = (mean > 1e-35) & (mean < 1e35)
    error = (values.double() - x).abs()[:, inside]
    assert (error <= torch.maximum(mean[inside] / 32, x.abs()[:, inside] * 2**-8)).all()
    steps = 2 ** torch.floor(torch.log2(mean[inside]) - 4)
    near = x.abs()[:, inside] < 200 * steps
    assert ((values[:, inside] / steps) % 1 == 0)[near].all()
    assert not np.isfinite(rounded_inputs(torch.tensor([[1.0, torch.nan, torch.inf]] * 2))).all(0)[1:].any()


def _weight(rounding, name):
    values = np.concatenate([block.astype(np.float32) for block in rounding.checkpoint.blocks(name)])
    values = values if "c_" not in name else np.ascontiguousarray(values.T)
    weight = cpu.rotate(values, rounding.size) if rounding.size else values
    return weight, row_scales(weight)


def test_layers_that_read_the_same_input_share_its_gram_matrix(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(module, "factor", lambda *given: counted.append(1) or _factor(*given))
    rounded(word_tokenizer(llama(tmp_path / "source")), wants=lambda name: "head" not in name)
    assert len(counted) == 2 * 4


_factor = module.factor


def test_only_what_is_wanted_is_rounded_and_the_head_can_be(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(str(source))
    rounding = Rows(checkpoint, wants=lambda name: "lm_head" in name or "layers.1.mlp.up" in name)
    choose_codes(checkpoint, TEXT, rounding, 384, lambda *counts: seen.append(counts))
    assert set(rounding.kept) == {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    up, head = 2 * 48 * 32, 2 * 64 * 32  # bytes in float16
    assert seen == [(up, up + head), (up + head, up + head)]


def test_a_run_that_was_interrupted_continues_with_the_same_codes(tmp_path):
    source = word_tokenizer(mixtral(tmp_path / "source"))
    whole, report = rounded(source)
    checkpoint = open_checkpoint(str(source))
    rest = Rows(checkpoint)
    rest.earlier = dict(list(whole.kept.items())[:20])
    again = choose_codes(checkpoint, TEXT, rest, 384)
    same(rest.earlier | rest.kept, whole.kept)
    assert not rest.earlier.keys() & rest.kept.keys() and again == report


@pytest.mark.parametrize("make", [*FUSED, mixtral, qwen3_moe], ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_expert_has_codes_under_its_own_name(make, tmp_path):
    source = word_tokenizer(make(tmp_path / "source") if callable(make) else fused(tmp_path / "source", make))
    checkpoint = open_checkpoint(str(source))
    structure = structure_of(checkpoint)
    separate = with_separate_experts(checkpoint, structure)[1]
    rounding, report = rounded(source)
    assert {f"{name}.weight" for name in (*separate.linears, *separate.experts)} <= rounding.kept.keys()
    assert report.chosen + len(report.nearest) == len(rounding.kept)
    towers = {name for name in report.nearest if name.removesuffix(".weight") in structure.towers}
    experts = set(report.nearest) - towers
    assert all("experts" in name for name in experts) and len(experts) < len(rounding.kept) / 2
    for name in report.nearest:
        np.testing.assert_array_equal(rounding.kept[name][0], nearest_codes(*_weight(rounding, name)))
    if structure.towers and make == "llama4":
        assert towers


def test_the_second_projection_of_an_expert_is_rounded_for_what_the_first_ones_give(tmp_path):
    source = word_tokenizer(mixtral(tmp_path / "source"))
    seen: list[tuple[torch.Tensor, ...]] = []
    rounding, _ = rounded(source, wants=lambda name: "layers.0" in name and "experts" in name)
    with in_double(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
        ids = torch.tensor([int(word[1:]) + 1 for word in TEXT.split()])[:384].view(1, -1)
        model.set_experts_implementation("eager")  # the default has no float64
        experts = model.model.layers[0].mlp.experts
        experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        model(ids)
    hidden, chosen, _ = seen[0]
    for expert in range(4):
        (token,) = torch.where((chosen == expert).any(-1))
        if len(token) < LEAST_TOKENS:
            continue
        x, dense = hidden[token], {}
        for part in ("w1", "w3", "w2"):
            if part == "w2":
                x = torch.nn.functional.silu(x @ dense["w1"].T) * (x @ dense["w3"].T)
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            weight, scales = _weight(rounding, name)
            with as_written():
                gram = defined_gram(rounded_inputs(x))
            codes = defined_codes(weight, scales, *defined_factor(gram))
            np.testing.assert_array_equal(rounding.kept[name][0], codes)
            dense[part] = torch.from_numpy(codes * scales).double()


def test_a_short_text_gives_the_nearest_codes_and_says_so(tmp_path):
    rounding, report = rounded(word_tokenizer(llama(tmp_path / "source")), text="w1 w2 w3")
    assert sorted(report.nearest) == sorted(rounding.kept) and report.chosen == 0 and report.tokens == 3


def test_errors(tmp_path):
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.self_attn.o_proj.weight"][0] = 65504
        state["model.layers.1.self_attn.v_proj.weight"][:] = 65504

    def infinite(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][0] = torch.inf

    with pytest.raises(SourceError, match="has no tokenizer"):
        rounded(llama(tmp_path / "plain"))
    with pytest.raises(SourceError, match="encoder-decoder"):
        rounded(word_tokenizer(t5(tmp_path / "t5")[0]))
    with pytest.raises(SourceError, match="down_proj NaN or infinite"):
        source = word_tokenizer(llama(tmp_path / "infinite", edit=infinite))
        rounded(source, wants=lambda name: "down_proj" in name)
    rounded(word_tokenizer(llama(tmp_path / "large", edit=spoil)))  # large, but finite


SCRIPT = """
import hashlib, sys
from test_rounding_pass import TEXT, rounded
rounding, _ = rounded(sys.argv[1], size=16)
print(hashlib.sha256(b"".join(codes.tobytes() for codes, _ in rounding.kept.values())).hexdigest())
"""


def test_codes_do_not_depend_on_the_processor_or_the_threads(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", hidden=64))
    settings = [
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "QUANTIZE8_UNIT": "generic"},
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"},
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = set()
    for each in settings:
        given = os.environ | each | {"PYTHONPATH": paths}
        command = [sys.executable, "-c", SCRIPT, str(source)]
        found.add(subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1
