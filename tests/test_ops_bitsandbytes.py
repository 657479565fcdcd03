"""The arithmetic of bitsandbytes: equal to its own functions on hostile activations, packed or not."""

import bitsandbytes as bnb
import pytest
import torch
from test_packed import UNITS

from quantize8.kernels import bitsandbytes as ours
from quantize8.kernels import reference
from quantize8.kernels.packed import PackedWeight

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def hostile(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Outliers at, above and just below the threshold, a zero token, one of ties, and one too small for float16."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator)
    if tokens > 4:
        x[1] = 0
        x[2] = torch.randint(-254, 255, (columns,), generator=generator) / 254
        x[2, 0] = 1
        x[3] *= 1e-6
        x[4, columns // 2] = 6.0
        x[0, columns // 3] = 5.998  # 6.0 in bfloat16
        x[4, -1] = -70.0
    return x.to(dtype)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 70])
@pytest.mark.parametrize("threshold", [6.0, 0.0, 0.9])
def test_every_bit_is_bitsandbytes(unit, dtype, tokens, threshold):
    for rows, columns in ((45, 131), (64, 128), (33, 64)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * columns**-0.5
        weight[3] = 0
        codes, absmax = (torch.from_numpy(part) for part in reference.quantize_rowwise(weight.numpy()))
        bias = torch.linspace(-2, 2, rows).to(dtype)
        x = hostile(tokens, columns, dtype)
        layer = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(weight.half(), has_fp16_weights=False, requires_grad=False)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        layer = layer.to("cpu").eval()
        with torch.inference_mode():
            expected = layer(x)
        given = PackedWeight(codes, absmax, unit)
        assert torch.equal(ours.linear(x, given, absmax, bias, threshold), expected)


@pytest.mark.parametrize("unit", UNITS)
def test_columns_and_products_of_a_packed_weight(unit):
    codes = torch.randint(-127, 128, (45, 131), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = PackedWeight(codes, torch.linspace(0.1, 3, 45), unit)
    columns = torch.tensor([0, 3, 63, 64, 130])
    assert torch.equal(packed.columns(columns), codes[:, columns])
    assert packed.columns(columns[:0]).shape == (45, 0)
    for tokens in (0, 1, 33):
        x = torch.randint(-127, 128, (tokens, 131), generator=torch.Generator().manual_seed(1)).to(torch.int8)
        assert torch.equal(packed.multiply(x), x.int() @ codes.int().t())


@pytest.mark.parametrize("unit", UNITS)
def test_autocast_changes_nothing(unit):
    codes = torch.randint(-127, 128, (45, 131), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    absmax = torch.linspace(0.1, 3, 45)
    given = PackedWeight(codes, absmax, unit)
    x = hostile(20, 131, torch.float32)
    expected = ours.linear(x, given, absmax, None, 6.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.linear(x, given, absmax, None, 6.0), expected)


def test_no_tokens():
    codes, absmax = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    assert ours.linear(torch.empty(0, 8), PackedWeight(codes, absmax), absmax, None, 6.0).shape == (0, 4)
