"""Reading float8 checkpoints: the same values as the ecosystem's own dequantizers, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from helpers.packing import opened, rows_equal_the_whole
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quantize8 import SourceError
from quantize8.formats import fp8

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def codes(rows, columns, kind="e4m3", finite=True):
    """Random float8 numbers of all magnitudes, NaN and infinities among them where asked for."""
    octets = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    numbers = octets.view(KINDS[kind])
    return torch.where(numbers.float().isfinite(), octets, 0).view(KINDS[kind]) if finite else numbers


def scales(shape, dtype=torch.float32):
    """From the smallest to the largest that a product stays finite with, some of them negative."""
    generator = torch.Generator().manual_seed(1)
    exponent = torch.randint(-100, 100, shape, generator=generator)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return (exponent + 127).to(torch.uint8).view(dtype)
    values = torch.ldexp(torch.randn(shape, generator=generator), exponent.clamp(-20, 10))
    return values.to(dtype)


def same(ours, oracle):
    """Bit for bit, after rounding to the oracle's dtype; NaN where it has NaN."""
    ours = torch.from_numpy(ours).to(oracle.dtype)
    return torch.equal(ours.isnan(), oracle.isnan()) and torch.equal(ours.nan_to_num(7.0), oracle.nan_to_num(7.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(24, 32, (8, 16)), (21, 35, (8, 16)), (5, 3, (8, 8)), (1, 9, (2, 1))]
)
def test_blocks_equal_compressed_tensors(tmp_path, kind, dtype, rows, columns, block):
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    state = {"m.weight": codes(rows, columns, kind, finite=False), "m.weight_scale_inv": scales(grid, dtype)}
    (encoding,) = fp8.find(opened(tmp_path, state), {"weight_block_size": list(block)}).values()
    ours = rows_equal_the_whole(encoding)
    for output in (torch.float32, torch.bfloat16):
        oracle = FP8BlockDequantizer(weight_block_size=block, dtype=output).process(dict(state))["m.weight"]
        assert same(ours, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_blocks_equal_transformers(tmp_path, dtype):
    state = {"m.weight": codes(256, 384), "m.weight_scale_inv": scales((2, 3), dtype)}
    (encoding,) = fp8.find(opened(tmp_path, state), {}).values()  # blocks of 128 where config.json does not say
    ours = rows_equal_the_whole(encoding)
    for output in (torch.float32, torch.bfloat16, torch.float16):
        oracle = Fp8Dequantize(None)._dequantize_one(*state.values(), output_dtype=output)
        assert same(ours, oracle)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_tensor_equals_transformers(tmp_path, name, shape):
    state = {"m.weight": codes(200, 136), f"m.{name}": scales(shape), "m.activation_scale": torch.ones(())}
    (encoding,) = fp8.find(opened(tmp_path, state), {"weight_block_size": None}).values()
    oracle = Fp8Dequantize(None)._dequantize_one(state["m.weight"], state[f"m.{name}"].reshape(1, 1), torch.float32)
    assert same(rows_equal_the_whole(encoding), oracle)
    assert set(encoding.tensors) == set(state)  # the scale of activations belongs to it, and is not read


@pytest.mark.parametrize("shape", [(150,), (150, 1)])
def test_a_scale_for_each_row_equals_transformers(tmp_path, shape):
    state = {"m.weight": codes(150, 7), "m.weight_scale": scales(shape)}
    (encoding,) = fp8.find(opened(tmp_path, state), {}).values()
    oracle = Fp8Dequantize(None)._dequantize_one(
        state["m.weight"], state["m.weight_scale"].reshape(150, 1), torch.float32
    )
    assert same(rows_equal_the_whole(encoding), oracle)


def test_by_hand(tmp_path):
    """E4M3: 0x38 is 1, 0x40 is 2, 0x3C is 1.5, 0xB8 is -1, 0x01 is 2^-9. Bytes 128, 126, 0 are 2, a half, 2^-127."""
    weight = torch.tensor([[0x38, 0x40, 0x3C], [0xB8, 0x01, 0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[128, 126]], dtype=torch.uint8)
    state = {"m.weight": weight, "m.weight_scale_inv": scale, "tiny.weight": weight, "tiny.weight_scale_inv": scale * 0}
    found = fp8.find(opened(tmp_path, state), {"weight_block_size": [2, 2]})
    assert found["m"].rows(0, 2).tolist() == [[2, 4, 0.75], [-2, 2**-8, 0.5]]
    assert found["tiny"].rows(0, 1).tolist() == [[2**-127, 2**-126, 1.5 * 2**-127]]


def test_a_block_may_be_larger_than_the_tensor(tmp_path):
    state = {"m.weight": codes(3, 5), "m.weight_scale_inv": torch.tensor([[0.5]])}
    (encoding,) = fp8.find(opened(tmp_path, state), {"weight_block_size": [10**30, 10**30]}).values()
    assert torch.equal(torch.from_numpy(rows_equal_the_whole(encoding)), state["m.weight"].float() / 2)


def test_what_overflows_or_is_no_number_comes_out_so(tmp_path):
    weight = torch.tensor([[0x7E, 0x7F, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    state = {"m.weight": weight, "m.weight_scale_inv": torch.tensor([[3e38]])}
    state |= {"n.weight": weight, "n.weight_scale_inv": torch.tensor([[255]], dtype=torch.uint8)}
    state |= {"o.weight": weight, "o.weight_scale_inv": torch.tensor([[torch.inf]])}
    found = fp8.find(opened(tmp_path, state), {})
    assert np.array_equal(found["m"].rows(0, 1), [[np.inf, np.nan, 0]], equal_nan=True)
    assert np.isnan(found["n"].rows(0, 1)).all()  # a ue8m0 byte of 255 is NaN
    assert np.array_equal(found["o"].rows(0, 1), [[np.inf, np.nan, np.nan]], equal_nan=True)


def test_every_number_of_the_type_is_that_of_ml_dtypes(tmp_path):
    for kind, dtype in (("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)):
        octets = np.arange(256, dtype=np.uint8).reshape(2, 128)
        state = {"m.weight": torch.from_numpy(octets).view(KINDS[kind]), "m.weight_scale": torch.ones(())}
        (encoding,) = fp8.find(opened(tmp_path, state), {"fmt": kind}).values()
        assert np.array_equal(encoding.rows(0, 2), octets.view(dtype).astype(np.float32), equal_nan=True)


def test_plain_tensors_are_left_alone(tmp_path):
    state = {"m.weight": codes(8, 8), "m.weight_scale_inv": torch.ones(1, 1), "lm_head.weight": torch.ones(8, 8)}
    state |= {"m.bias": torch.ones(8), "norm.weight": torch.ones(8)}
    entry = {"quant_method": "fp8", "modules_to_not_convert": ["m"]}  # what is stored decides, not what is said
    assert list(fp8.find(opened(tmp_path, state), entry)) == ["m"]


F32 = torch.ones(1, 1)
WEIGHT = codes(200, 136)
REFUSED = {
    "no scale": ({"m.weight": WEIGHT}, {}, "m is F8_E4M3 with no scale"),
    "two scales": ({"m.weight": WEIGHT, "m.weight_scale": F32, "m.weight_scale_inv": F32}, {}, "and weight_scale"),
    "grid": ({"m.weight": WEIGHT, "m.weight_scale_inv": torch.ones(2, 1)}, {}, "200x136 with scales"),
    "transposed": (
        {"m.weight": WEIGHT, "m.weight_scale_inv": torch.ones(2, 3)},
        {"weight_block_size": [64, 128]},
        "200x136",
    ),
    "empty grid": ({"m.weight": WEIGHT, "m.weight_scale_inv": torch.ones(0, 2)}, {}, "200x136"),
    "3-D grid": ({"m.weight": WEIGHT, "m.weight_scale_inv": torch.ones(2, 2, 1)}, {}, "200x136"),
    "rows": ({"m.weight": WEIGHT, "m.weight_scale": torch.ones(200, 1)}, {"weight_block_size": [128, 128]}, "200x136"),
    "scale type": ({"m.weight": WEIGHT, "m.weight_scale_inv": torch.ones(2, 2).int()}, {}, "has I32 scales"),
    "experts": ({"m.weight": torch.zeros(2, 4, 4).to(torch.float8_e5m2), "m.weight_scale_inv": F32}, {}, "2, 4, 4"),
    "no rows": ({"m.weight": torch.zeros(0, 4).to(torch.float8_e5m2), "m.weight_scale_inv": F32}, {}, "0, 4"),
    "no float8": ({"m.weight": torch.ones(4, 4), "m.weight_scale_inv": F32}, {}, "no float8 weight"),
    "float4": ({"m.weight": torch.ones(4, 4, dtype=torch.int8), "m.weight_scale_inv": F32}, {}, "no float8 weight"),
    "no weight": ({"m.weight_scale_inv": F32}, {}, "no float8 weight"),
    "other tensor": ({"m.gate_up_proj": WEIGHT}, {}, "m.gate_up_proj is F8_E4M3 but not a weight"),
    "block": ({"m.weight": WEIGHT}, {"weight_block_size": [0, 128]}, "weight_block_size"),
    "block of one": ({"m.weight": WEIGHT}, {"weight_block_size": [128]}, "weight_block_size"),
    "block of bools": ({"m.weight": WEIGHT}, {"weight_block_size": [True, True]}, "weight_block_size"),
    "format": ({"m.weight": WEIGHT}, {"fmt": "e3m4"}, "fmt = 'e3m4'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, case):
    state, entry, message = REFUSED[case]
    with pytest.raises(SourceError, match=message.replace("[", r"\[")) as error:
        fp8.find(opened(tmp_path, state), entry)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)
