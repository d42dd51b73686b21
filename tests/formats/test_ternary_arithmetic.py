"""Scales found in blocks are, bit by bit, those of the plain search."""

from __future__ import annotations

from typing import Any

import plain_formats
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import info_of, odd, random, same_bytes

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.packing import unpack_base3
from ditmoe_cli.formats.ternary import Ternary


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(8, 300)),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    weighted=st.booleans(),
)
def test_scales_and_codes_are_those_of_the_plain_search(
    shape: tuple[int, int], group: int, seed: int, dtype: torch.dtype, weighted: bool
) -> None:
    weight = odd(shape, seed).to(dtype)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) ** 3 if weighted else None
    try:
        grid: Any = Ternary(group).grid(weight, importance)
    except BadInputError:
        return
    scale = plain_formats.ternary_scales(weight, importance, group)
    assert same_bytes(grid.scale, scale)
    signs = plain_formats.groups_of(weight, group) * plain_formats.inverse(scale)[..., None]
    codes = signs.round().clamp(-1, 1).flatten(1)[:, : shape[1]].to(torch.int8)
    packed = grid.parts(weight, info_of(weight))["packed"]
    assert torch.equal(unpack_base3(packed, shape), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_chunks_have_the_scales_of_the_plain_search(dtype: torch.dtype) -> None:
    weight = random((512, 1152)).to(dtype)
    grid: Any = Ternary(64).grid(weight)
    assert same_bytes(grid.scale, plain_formats.ternary_scales(weight, None, 64))
