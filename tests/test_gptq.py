"""Reading GPTQ checkpoints: the same values as GPTQModel, and as compressed-tensors after repacking, bit for bit.

gptqmodel.safetensors was written by GPTQModel 7.7.0 (torch 2.13): modules with random weights, packed by its
`pack_block` and `pack_original`, including zero points of 0, saved in its `checkpoint_format`, read back, dequantized
by its `TorchLinear.dequantize_weight`, and transposed. The metadata has each module's quantization_config.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers.packing import in_words, opened, rows_equal_the_whole
from safetensors import safe_open
from safetensors.torch import load_file

from quantize8 import SourceError
from quantize8.formats import gptq
from quantize8.sources.quantized import decode

BITS = (2, 3, 4, 8)
FIXTURE = Path(__file__).parent / "gptqmodel.safetensors"
with safe_open(FIXTURE, framework="pt") as _file:
    SETTINGS = json.loads(_file.metadata()["settings"])


@pytest.mark.parametrize("case", SETTINGS)
def test_values_equal_gptqmodel(tmp_path, case):
    state = {name: value for name, value in load_file(FIXTURE).items() if name.startswith(f"{case}.")}
    expected = state.pop(f"{case}.weight")
    (encoding,) = gptq.find(opened(tmp_path, state), SETTINGS[case]).values()
    assert set(encoding.tensors) == set(state)
    assert torch.equal(torch.from_numpy(rows_equal_the_whole(encoding)).half(), expected)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_settings_lie_in_config_json_or_as_autogptq_first_wrote_them(place, tmp_path):
    case = next(iter(SETTINGS))
    state = {name: value for name, value in load_file(FIXTURE).items() if name.startswith(f"{case}.")}
    expected = state.pop(f"{case}.weight")
    stored = opened(tmp_path, state)
    settings = {key: value for key, value in SETTINGS[case].items() if key != "quant_method"}
    config = {"quantization_config": settings | {"quant_method": "gptq"}} if place == "config.json" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if place != "config.json":
        (tmp_path / place).write_text(json.dumps(settings))
    found = decode(stored)
    assert torch.equal(torch.from_numpy(found.rows(f"{case}.weight", 0, len(expected))).half(), expected)


def numbers(shape, bits):
    return np.random.default_rng(sum(shape)).integers(0, 2**bits, shape)


def module(rows, columns, size, bits, *, order=None, zeros=None, minus_one=True, dtype=torch.float16):
    """What is stored for random integers [N, K], and those integers, zero points [N, G] and scales [N, G]."""
    groups = -(-columns // size)
    integers = numbers((rows, columns), bits)
    zeros = numbers((rows, groups), bits) if zeros is None else zeros
    scales = torch.randn(rows, groups, generator=torch.Generator().manual_seed(1))
    scales.view(-1)[:4] = torch.tensor([6e-8, 250.0, -0.5, 0.0])
    words = in_words(zeros.T, bits)
    if minus_one and bits == 3:
        words = in_words((zeros.T - 1) & 7, bits)
    elif minus_one:  # one from each number, by one subtraction for a word
        words = torch.from_numpy(
            (words.numpy().view(np.uint32) - np.uint32((2**32 - 1) // (2**bits - 1))).view(np.int32)
        )
    stored = {"qweight": in_words(integers, bits).T, "qzeros": words, "scales": scales.to(dtype).T}
    if order is not None:
        stored["g_idx"] = torch.from_numpy(order).int()
    return {f"layer.m.{name}": value for name, value in stored.items()}, integers, zeros, scales.to(dtype)


def oracle(integers, zeros, scales, size, bits):
    """compressed-tensors' pack-quantized format, dequantized; columns in order of their groups."""
    middle = 2 ** (bits - 1)
    zero = torch.from_numpy(zeros - middle).to(torch.int8)
    packed = {
        "weight_packed": pack_to_int32(torch.from_numpy(integers - middle).to(torch.int8), bits),
        "weight_scale": scales,
        "weight_zero_point": pack_to_int32(zero, bits, packed_dim=0).contiguous(),
        "weight_shape": torch.tensor(integers.shape),
    }
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(packed, scheme)["weight"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "size"), [(32, 64, 16), (96, 96, 3), (64, 32, 32), (32, 32, 1)])
def test_values_equal_compressed_tensors(tmp_path, bits, form, dtype, rows, columns, size):
    state, *parts = module(rows, columns, size, bits, minus_one=form != "gptq_v2", dtype=dtype)
    entry = {"bits": bits, "group_size": size, "desc_act": False, "sym": False, "checkpoint_format": form}
    (encoding,) = gptq.find(opened(tmp_path, state), entry).values()
    assert torch.equal(torch.from_numpy(rows_equal_the_whole(encoding)).to(dtype), oracle(*parts, size, bits))


@pytest.mark.parametrize("bits", BITS)
def test_columns_in_another_order_equal_compressed_tensors(tmp_path, bits):
    order = np.random.default_rng(0).permutation(np.arange(96) // 16)
    state, integers, zeros, scales = module(64, 96, 16, bits, order=order)
    entry = {"bits": bits, "group_size": 16, "desc_act": True}
    (encoding,) = gptq.find(opened(tmp_path, state), entry).values()
    ours = torch.from_numpy(rows_equal_the_whole(encoding)).half()
    sort = np.argsort(order, kind="stable")
    assert torch.equal(ours[:, sort], oracle(integers[:, sort], zeros, scales, 16, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sides_that_do_not_fill_words_or_groups(tmp_path, bits):
    """GPTQModel fills words up with zeros; g_idx says how many in features there are."""
    columns = np.arange(61)
    state, integers, zeros, scales = module(27, 61, 16, bits, order=columns // 16)
    (encoding,) = gptq.find(opened(tmp_path, state), {"bits": bits, "group_size": 16}).values()
    expected = (integers - zeros[:, columns // 16]) * scales.numpy().astype(np.float32)[:, columns // 16]
    assert np.array_equal(rows_equal_the_whole(encoding), expected.astype(np.float32))


def test_by_hand(tmp_path):
    """The integers of 0x76543210 are 0 to 7 down K. A stored zero point of 2 means 3, or 2 in gptq_v2."""
    qweight = torch.full((1, 8), 0x76543210, dtype=torch.int32)
    qzeros = torch.tensor([[0x22222222]], dtype=torch.int32)
    state = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": torch.full((1, 8), 0.25, dtype=torch.float16)}
    (encoding,) = gptq.find(opened(tmp_path, state), {"bits": 4, "group_size": -1}).values()
    assert gptq.find(encoding.stored, {"bits": 4.0, "group_size": -1})["m"].rows(0, 1).any()
    assert encoding.rows(4, 5).tolist() == [[-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]]
    entry = {"bits": 4, "group_size": 10**30, "checkpoint_format": "gptq_v2"}  # a group may be larger than K
    (encoding,) = gptq.find(encoding.stored, entry).values()
    assert encoding.rows(0, 1).tolist() == [[-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]]


def test_a_zero_point_of_zero_borrows_from_its_neighbour(tmp_path):
    """Zero points 0, 3, 3, ... less 0x11111111 is 0x2222221F: 15 in the place of the first, 1 in that of the second."""
    state = {"m.qweight": torch.zeros(1, 8, dtype=torch.int32), "m.qzeros": torch.tensor([[0x2222221F]]).int()}
    state["m.scales"] = torch.ones(1, 8, dtype=torch.float16)
    (encoding,) = gptq.find(opened(tmp_path, state), {"bits": 4, "group_size": 8}).values()
    assert encoding.rows(0, 8)[:, 0].tolist() == [0, -3, -3, -3, -3, -3, -3, -3]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("form", "minus_one"), [("gptq", True), ("gptq", False), ("gptq_v2", False)])
def test_symmetric_zero_points_are_the_middle_in_either_form(tmp_path, bits, form, minus_one):
    zeros = np.full((32, 2), 2 ** (bits - 1))
    state, *parts = module(32, 64, 32, bits, zeros=zeros, minus_one=minus_one)
    entry = {"bits": bits, "group_size": 32, "sym": True, "checkpoint_format": form}
    (encoding,) = gptq.find(opened(tmp_path, state), entry).values()
    assert torch.equal(torch.from_numpy(encoding.rows(0, 32)).half(), oracle(*parts, 32, bits))


def test_settings_of_single_modules_are_found_by_their_shapes(tmp_path):
    common, *_ = module(32, 64, 16, 4)
    special, *parts = module(32, 64, 32, 8, order=np.random.default_rng(0).permutation(np.arange(64) // 32))
    state = common | {name.replace("layer.m", "special"): value for name, value in special.items()}
    dynamic = {"-:skipped": {}, "special": {"bits": 8, "group_size": 32, "desc_act": True}}
    found = gptq.find(opened(tmp_path, state), {"bits": 4, "group_size": 16, "dynamic": dynamic})
    order = special["layer.m.g_idx"].numpy()
    expected = (parts[0] - parts[1][:, order]) * parts[2].numpy().astype(np.float32)[:, order]
    assert np.array_equal(found["special"].rows(0, 32), expected.astype(np.float32)) and len(found) == 2
    with pytest.raises(SourceError, match=r"special has g_idx \[64\]"):
        gptq.find(found["special"].stored, {"bits": 4, "group_size": 16})


def test_what_is_not_finite_comes_out_so(tmp_path):
    state, *_ = module(32, 32, 32, 8, dtype=torch.float32)
    state["layer.m.scales"][:] = torch.tensor([torch.inf, torch.nan, *[3e38] * 30])
    (encoding,) = gptq.find(opened(tmp_path, state), {"bits": 8, "group_size": 32}).values()
    assert not np.isfinite(encoding.rows(0, 2)).any() and np.isinf(encoding.rows(2, 32)).any()


ORDER = np.arange(64) // 16
STATE = module(32, 64, 16, 4, order=ORDER)[0]


def other(**parts):
    return STATE | {f"layer.m.{name}": value for name, value in parts.items()}


def without(*names):
    return {key: value for key, value in STATE.items() if not key.endswith(names)}


SHUFFLED = torch.from_numpy(ORDER[::-1].copy()).int()
REFUSED = {
    "marlin": ({"checkpoint_format": "marlin"}, STATE, "checkpoint_format = 'marlin'"),
    "planar": ({"checkpoint_format": "gptq_p"}, STATE, "checkpoint_format = 'gptq_p'"),
    "old marlin": ({"is_marlin_format": True}, STATE, "is_marlin_format = True"),
    "two formats": ({"checkpoint_format": "gptq", "format": "gptq_v2"}, STATE, "two formats"),
    "rotated": ({"rotation": "hadamard"}, STATE, "rotation = 'hadamard'"),
    "words of 64 bits": ({"pack_dtype": "int64"}, STATE, "pack_dtype = 'int64'"),
    "5 bits": ({"bits": 5}, STATE, "bits = 5"),
    "bits of a module": ({"dynamic": {"m": {"bits": 6}}}, STATE, "bits = 6"),
    "dynamic": ({"dynamic": [1]}, STATE, "dynamic settings"),
    "group": ({"group_size": 0}, STATE, "group_size 0"),
    "group text": ({"group_size": None}, STATE, "group_size None"),
    "group lies": ({"group_size": 32}, STATE, "has scales F16 [4, 32] instead of F16 or BF16 or F32 [2, 32]"),
    "bits lie": ({"bits": 8}, STATE, "has g_idx [64], which does not fit 8 words of 8-bit integers"),
    "bits lie without order": (
        {"bits": 8, "group_size": 8},
        without("g_idx"),
        "has qzeros I32 [4, 4] instead of I32 [4, 8]",
    ),
    "no scales": ({}, without("scales"), "has no scales"),
    "no zero points": ({}, without("qzeros"), "has no qzeros"),
    "no weight": ({}, without("qweight"), "but no qweight"),
    "no order": ({"desc_act": True}, without("g_idx"), "has no g_idx, but config.json says desc_act"),
    "order unsaid": ({}, other(g_idx=SHUFFLED), "out of order, but config.json does not say desc_act"),
    "order too high": ({"desc_act": True}, other(g_idx=SHUFFLED + 1), "each of its 4 groups"),
    "order too low": ({"desc_act": True}, other(g_idx=SHUFFLED - 1), "each of its 4 groups"),
    "order unused": ({"desc_act": True}, other(g_idx=SHUFFLED * 0), "each of its 4 groups"),
    "order far": ({"desc_act": True}, other(g_idx=SHUFFLED.long() + 2**62), "each of its 4 groups"),
    "order short": ({}, other(g_idx=SHUFFLED[:48]), "has g_idx [48], which does not fit"),
    "order 2-D": ({}, other(g_idx=SHUFFLED[None]), "has g_idx [1, 64], which does not fit"),
    "order empty": ({}, other(g_idx=SHUFFLED[:0]), "has g_idx [0], which does not fit"),
    "order type": ({}, other(g_idx=SHUFFLED.float()), "has g_idx F32"),
    "zero groups": ({}, other(scales=torch.ones(0, 32).half()), "has scales F16 [0, 32]"),
    "scales type": ({}, other(scales=torch.ones(4, 32).double()), "has scales F64"),
    "zeros shape": ({}, other(qzeros=torch.zeros(4, 5).int()), "has qzeros I32 [4, 5]"),
    "words type": ({}, other(qweight=torch.zeros(8, 32).long()), "has qweight I64"),
    "experts": ({}, other(qweight=torch.zeros(2, 8, 32).int()), "has qweight I32 [2, 8, 32]"),
    "3 bits ragged": ({"bits": 3, "group_size": 6}, module(30, 60, 6, 3)[0], "not multiples of 32"),
    "symmetric": ({"sym": True}, STATE, "zero points other than 8, but config.json says sym"),
    "embedding": ({}, {key.replace(".m.", ".embed_tokens."): value for key, value in STATE.items()}, "embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    entry, state, message = REFUSED[case]
    with pytest.raises(SourceError) as error:
        gptq.find(opened(tmp_path, state), {"bits": 4, "group_size": 16, **entry})
    text = str(error.value)
    assert message in text and str(tmp_path) in text and "\n" not in text and "; " in text
