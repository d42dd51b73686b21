"""Casting: exact, refused where a value is lost, and the same however long a tensor is."""

from __future__ import annotations

import math

import pytest
import torch

from ditmoe_cli.files.casting import _PART, checked_cast

SIZES = (0, 1, _PART - 1, _PART, 2 * _PART + 3)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_values_are_those_of_torch(size: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(stored)
    cast = checked_cast(values.reshape(1, size), dtype)
    assert cast.shape == (1, size) and cast.dtype == dtype
    assert torch.equal(cast.reshape(-1), values.to(dtype))


def test_a_view_is_cast_in_its_own_order() -> None:
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(checked_cast(values, torch.float16), values.half())


@pytest.mark.parametrize("place", [0, _PART, 2 * _PART + 2])
def test_the_first_value_out_of_range_is_named_wherever_it_stands(place: int) -> None:
    values = torch.ones(2 * _PART + 3)
    values[place] = -7e4
    values[-1] = 8e4 if place < 2 * _PART else -7e4
    with pytest.raises(ValueError, match="holds -70000, beyond the 65504 that fp16 can hold"):
        checked_cast(values, torch.float16)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_values_and_nan_stay(value: float) -> None:
    values = torch.full((_PART + 5,), 1e-9)
    values[-1] = value
    cast = checked_cast(values, torch.float16)
    assert torch.equal(cast.nan_to_num(1, 2, 3), values.half().nan_to_num(1, 2, 3))


def test_the_lost_share_is_that_of_the_whole_tensor() -> None:
    """One part loses all of its norm, which is most of the whole's or next to none of it."""
    small = torch.full((_PART,), 1e-8)
    with pytest.raises(ValueError, match="would lose 71% of its norm in fp16"):
        checked_cast(torch.cat([small, torch.tensor([1e-8 * math.sqrt(_PART)])]), torch.float16)
    assert not checked_cast(torch.cat([small, torch.ones(1)]), torch.float16)[:-1].any()
    assert not checked_cast(small, torch.float16, keeps_small=False).any()
