"""Reading AutoAWQ checkpoints: the same values as compressed-tensors' converter, bit for bit."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from helpers.packing import in_words, opened, rows_equal_the_whole

from quantize8 import SourceError
from quantize8.formats import awq

SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=torch.Generator().manual_seed(0)).int()


def module(rows, columns, groups, dtype=torch.float16):
    """Random words; scales tiny, subnormal, large, negative and zero."""
    scales = torch.randn(groups, rows, generator=torch.Generator().manual_seed(1))
    scales.view(-1)[:6] = torch.tensor([6e-8, 6e-5, 4000.0, -0.5, 0.0, 1.0])
    parts = {"qweight": words(columns, rows // 8), "qzeros": words(groups, rows // 8), "scales": scales.to(dtype)}
    return {f"layer.m.{name}": value for name, value in parts.items()}


def oracle(state, size, zero_point, folder, dtype):
    """compressed-tensors: converted to its packed format, and dequantized from that."""
    config = {"bits": 4, "group_size": size, "zero_point": zero_point, "version": "gemm"}
    converter = AutoAWQConverter.from_autoawq_config(config)
    packed = converter.process(dict(state))
    entry = converter.update_config(None).model_dump(mode="json", exclude_none=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return CompressedTensorsDequantizer(folder, dtype=dtype).process(packed)["layer.m.weight"]


@pytest.mark.parametrize("dtype", SCALE_TYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(40, 256, 128), (24, 192, 64), (16, 12, 4), (16, 35, 7), (64, 3, 1)]
)
@pytest.mark.parametrize("zero_point", [True, False])
def test_values_equal_compressed_tensors(tmp_path, rows, columns, size, zero_point, dtype):
    state = module(rows, columns, columns // size, dtype)
    if not zero_point:
        del state["layer.m.qzeros"]
    entry = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": zero_point, "version": "gemm"}
    found = awq.find(opened(tmp_path, state), entry)
    assert list(found) == ["layer.m"] and set(found["layer.m"].tensors) == set(state)
    ours = torch.from_numpy(rows_equal_the_whole(found["layer.m"]))
    assert torch.equal(ours.to(dtype), oracle(state, size, zero_point, tmp_path, dtype))


def test_one_group_of_all_columns(tmp_path):
    state = module(16, 48, 1)
    (ours,) = awq.find(opened(tmp_path, state), {"group_size": -1}).values()
    expected = oracle(state, 48, True, tmp_path, torch.float16)
    assert torch.equal(torch.from_numpy(ours.rows(0, 16)).half(), expected)


def test_by_hand(tmp_path):
    """One word of 0x76543210: from the lowest bits on 0 to 7, which belong to out features 0, 2, 4, 6, 1, 3, 5, 7."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    zeros = torch.tensor([[0x11111111]], dtype=torch.int32)
    state = {"m.qweight": word, "m.qzeros": zeros, "m.scales": torch.full((1, 8), 0.5, dtype=torch.float16)}
    (encoding,) = awq.find(opened(tmp_path, state), {"w_bit": 4, "q_group_size": 1, "version": "GEMM"}).values()
    assert encoding.rows(0, 8).ravel().tolist() == [-0.5, 1.5, 0, 2, 0.5, 2.5, 1, 3]


def test_stored_zero_points_of_eight_are_none(tmp_path):
    state = module(16, 8, 2) | {"layer.m.qzeros": torch.full((2, 2), -0x77777778, dtype=torch.int32)}
    found = awq.find(opened(tmp_path, state), {"group_size": 4, "zero_point": False})
    del state["layer.m.qzeros"]
    (tmp_path / "without").mkdir()
    expected = oracle(state, 4, False, tmp_path / "without", torch.float16)
    assert torch.equal(torch.from_numpy(found["layer.m"].rows(0, 16)).half(), expected)


def test_what_is_not_finite_comes_out_so(tmp_path):
    state = {
        "m.qweight": in_words(np.array([[8] * 8]), 4),
        "m.scales": torch.tensor([[torch.inf, torch.nan, *[3e38] * 6]]),
    }
    (encoding,) = awq.find(opened(tmp_path, state), {"group_size": -1, "zero_point": False}).values()
    assert np.isnan(encoding.rows(0, 2)).all() and not encoding.rows(2, 8).any()


def test_plain_tensors_are_left_alone(tmp_path):
    state = module(8, 8, 2) | {"layer.m.bias": torch.ones(8), "lm_head.weight": torch.ones(8, 8)}
    assert list(awq.find(opened(tmp_path, state), {"group_size": 4, "modules_to_not_convert": None})) == ["layer.m"]


def without(name):
    return {key: value for key, value in module(16, 8, 2).items() if not key.endswith(name)}


def other(**parts):
    return module(16, 8, 2) | {f"layer.m.{name}": value for name, value in parts.items()}


F16 = torch.float16
REFUSED = {
    "gemv": ({"version": "gemv"}, other(), "version 'gemv'"),
    "marlin": ({"version": "marlin"}, other(), "version 'marlin'"),
    "llm-awq": ({"checkpoint_format": "llm-awq"}, other(), "llm-awq"),
    "8 bits": ({"bits": 8}, other(), "bits = 8"),
    "3 bits": ({"w_bit": 3}, other(), "w_bit = 3"),
    "zero_point": ({"zero_point": "no"}, other(), "zero_point"),
    "group": ({"group_size": 0}, other(), "group_size 0"),
    "group text": ({"group_size": "4"}, other(), "group_size '4'"),
    "group lies": ({"group_size": 8}, other(), "has scales F16 [2, 16] instead of F16 or BF16 or F32 [1, 16]"),
    "group ragged": ({"group_size": 3}, other(), "has 8 in features, which group_size 3 does not divide"),
    "no scales": ({}, without("scales"), "layer.m has no scales"),
    "no zero points": ({}, without("qzeros"), "layer.m has no qzeros"),
    "no weight": ({}, without("qweight"), "has qzeros but no qweight"),
    "activations": ({}, {"mlp.act.scales": torch.ones(8)}, "mlp.act has scales but no qweight"),
    "zero groups": ({}, other(scales=torch.ones(0, 16, dtype=F16)), "has scales F16"),
    "zero groups too": (
        {"group_size": -1},
        other(qzeros=words(0, 2), scales=torch.ones(1, 16, dtype=F16)),
        "has qzeros I32",
    ),
    "scales type": ({}, other(scales=torch.ones(2, 16, dtype=torch.float64)), "has scales F64"),
    "zeros type": ({}, other(qzeros=words(2, 2).float()), "has qzeros F32"),
    "words type": ({}, other(qweight=words(8, 2).long()), "has qweight I64"),
    "experts": ({}, other(qweight=words(2, 8, 2)), r"has qweight I32 [2, 8, 2]"),
    "empty": ({}, other(qweight=words(0, 2)), "has qweight I32 [0, 2]"),
    "GPTQ's shape": ({}, other(qweight=words(1, 16)), "in features"),
    "order": ({}, other(g_idx=words(8)), "has g_idx"),
    "symmetric": ({"zero_point": False}, other(), "zero points other than 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    entry, state, message = REFUSED[case]
    with pytest.raises(SourceError) as error:
        awq.find(opened(tmp_path, state), {"group_size": 4, **entry})
    text = str(error.value)
    assert message in text and str(tmp_path) in text and "\n" not in text and "; " in text
