"""Codes of merged weights: additions of an adapter are preserved on average, and all else is unchanged."""

import pytest
import torch

from quantize8.runtime.training import dithered_codes


@pytest.fixture
def grid():
    """Codes, their scales, and the weight that they stand for; one row is zero, and every other has a code 127."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-126, 127, (40, 501), generator=generator).to(torch.int8)
    codes[:, 0], codes[7] = 127, 0
    absmax = torch.rand(40, generator=generator) + 0.1
    absmax[7] = 0
    return codes, absmax, codes.float() * (absmax / 127)[:, None]


def test_a_weight_that_lies_on_codes_keeps_them(grid):
    codes, absmax, weight = grid
    assert torch.equal(dithered_codes(weight, absmax), codes)
    assert torch.equal(dithered_codes(torch.nextafter(weight, weight + 1), absmax), codes)


@pytest.mark.parametrize("share", [0.05, 0.3, -0.3, 0.5, 0.95])
def test_less_than_a_step_is_kept_on_average_where_rounding_to_nearest_loses_it(share, grid):
    codes, absmax, weight = grid
    rows = torch.arange(40) != 7
    inner = codes.abs().lt(126) & rows[:, None]
    merged = dithered_codes(weight + share * (absmax / 127)[:, None] * inner, absmax)
    added = (merged.int() - codes.int())[inner]
    assert set(added.unique().tolist()) <= ({0, 1} if share > 0 else {0, -1})
    deviation = (abs(share) * (1 - abs(share)) / added.numel()) ** 0.5
    assert abs(added.float().mean() - share) < 5 * deviation
    assert torch.equal(merged, dithered_codes(weight + share * (absmax / 127)[:, None] * inner, absmax))


def test_codes_stay_between_their_limits(grid):
    _, absmax, weight = grid
    merged = dithered_codes(weight * 1.004, absmax)  # as float16 may round absmax down
    assert merged.min() >= -127 and merged.max() <= 127 and not merged[7].any()
