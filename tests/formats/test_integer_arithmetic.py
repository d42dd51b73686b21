"""The search in blocks and few steps finds, bit by bit, what the plain one finds."""

from __future__ import annotations

from typing import Any

import plain_formats
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import info_of, odd, random, same_bytes
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats import packing
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.integer import BITS, Integer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def importance_of(kind: str, n: int) -> Tensor | None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(n))
    alternating = (torch.arange(n) % 2).float()
    of_kind = {"any": values**4, "tiny": 1e-30 * values, "half zero": alternating, "zero": 0 * values}
    return of_kind.get(kind)


@settings(max_examples=80)
@given(
    fmt=st.builds(Integer, st.sampled_from(GROUPS), st.sampled_from(BITS), st.booleans()),
    shape=st.tuples(st.integers(1, 14), st.integers(8, 300)),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["none", "any", "tiny", "half zero", "zero"]),
)
def test_grids_and_words_are_those_of_the_plain_search(
    fmt: Integer, shape: tuple[int, int], seed: int, dtype: torch.dtype, kind: str
) -> None:
    weight, importance = odd(shape, seed).to(dtype), importance_of(kind, shape[1])
    try:
        grid: Any = fmt.grid(weight, importance)
    except BadInputError:
        return
    scale, zero = plain_formats.integer_grid(weight, importance, fmt.bits, fmt.group, fmt.symmetric)
    assert same_bytes(grid.scale, scale)
    assert torch.equal(torch.full_like(zero, 2.0 ** (fmt.bits - 1)) if grid.zero is None else grid.zero, zero)
    packed = grid.parts(weight, info_of(weight))["packed"]
    assert same_bytes(packed, plain_formats.integer_words(weight, scale, zero, fmt.bits, fmt.group))


@pytest.mark.parametrize("fmt", [Integer(64, 4), Integer(64, 3, True), Integer(128, 2), Integer(32, 8)])
def test_whole_chunks_are_searched_as_the_plain_search_does(fmt: Integer) -> None:
    weight = torch.cat([odd((140, 1152), 1), random((400, 1152), 2)])
    weight[~(weight.abs() > 1e-4)] = 0  # rows of tiny values are refused
    assert weight.numel() > 2 * packing.CHUNK_VALUES
    grid: Any = fmt.grid(weight)
    scale, zero = plain_formats.integer_grid(weight, None, fmt.bits, fmt.group, fmt.symmetric)
    assert same_bytes(grid.scale, scale)
    assert fmt.symmetric or torch.equal(grid.zero, zero)


def test_groups_whose_errors_overflow_are_of_zeros() -> None:
    weight = torch.full((2, 64), 6e4)
    importance = torch.full((64,), 3e38)
    weight[1] = random((1, 64))
    grid: Any = Integer(64, 4).grid(weight, importance)
    scale, zero = plain_formats.integer_grid(weight, importance, 4, 64, symmetric=False)
    assert same_bytes(grid.scale, scale)
    assert torch.equal(grid.zero, zero)
