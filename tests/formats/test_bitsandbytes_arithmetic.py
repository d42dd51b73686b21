"""Codes by tables and in blocks are, bit by bit, those of plain comparisons with every midpoint."""

from __future__ import annotations

from typing import Any

import plain_formats
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import FOUR_BIT, all_columns, info_of, odd, random, same_bytes
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.bitsandbytes import FourBit, Int8
from ditmoe_cli.formats.bitsandbytes_arithmetic import (
    FP4_CODES,
    NF4_CODES,
    FourBitGrid,
    dynamic_map,
    four_bit_ranks,
    nearest_dynamic,
)
from ditmoe_cli.formats.registry import parse_format

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE = torch.ones(())


def around(values: Tensor, steps: int = 40) -> Tensor:
    """Values and their nearest neighbours in fp32."""
    found, up, down = [values], values, values
    for _ in range(steps):
        up, down = torch.nextafter(up, torch.tensor(torch.inf)), torch.nextafter(down, torch.tensor(-torch.inf))
        found += [up, down]
    return torch.cat(found)


def midpoints(codes: tuple[float, ...]) -> Tensor:
    ascending = torch.tensor(codes).sort().values
    return (ascending[1:] + ascending[:-1]) / 2


def hard_values(between: Tensor) -> Tensor:
    """Midpoints, edges of cells of any width and their neighbours, values of all sizes and signs, and random ones."""
    edges = torch.arange(-1040, 1041) / 1024
    sizes = (torch.arange(65536) << 16).to(torch.int32).view(torch.float32)  # all bf16 values
    generator = torch.Generator().manual_seed(0)
    several = [scale * torch.randn(100_000, generator=generator) for scale in (1.0, 0.3, 1e-3, 1e-6)]
    return torch.cat([around(between), around(edges, 3), sizes[~sizes.isnan()], *several])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ranks_are_exact_for_every_hard_value(kind: str) -> None:
    values = hard_values(midpoints(NF4_CODES if kind == "nf4" else FP4_CODES))
    expected = plain_formats.four_bit_ranks(values, ONE, kind)
    assert torch.equal(four_bit_ranks(values.clone(), kind).int(), expected)
    few = torch.arange(0, len(values), 997)
    for width in (1, 3, 37):  # operations on vectors and on what is left of them
        for part in torch.split(few, width):
            assert torch.equal(four_bit_ranks(values[part], kind).int(), expected[part])


def test_codes_of_absmax_are_exact_for_every_hard_value() -> None:
    table = dynamic_map(torch.device("cpu"))
    between = (table[1:] + table[:-1]) / 2
    values = hard_values(between)
    assert torch.equal(nearest_dynamic(values).long(), torch.bucketize(values, between))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)).filter(lambda shape: shape[0] * shape[1] % 2 == 0),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(FOUR_BIT),
)
def test_bytes_and_roundings_are_those_of_plain_comparisons(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, name: str
) -> None:
    weight, fmt = odd(shape, seed).to(dtype), parse_format(name)
    assert isinstance(fmt, FourBit)
    grid = fmt.grid(weight)
    assert isinstance(grid, FourBitGrid)
    flat = torch.nn.functional.pad(weight.float().reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
    if not fmt.double:
        assert same_bytes(grid.scale, flat.abs().amax(dim=1))
    other = random(shape, seed, dtype)  # also values that the grid was not made for
    for values in (weight, other):
        packed = grid.parts(values, info_of(values))["packed"]
        assert same_bytes(packed, plain_formats.four_bit_bytes(values, grid.scale, fmt.kind))
        own = grid.scale.repeat_interleave(64)[: weight.numel()].reshape(shape)
        ranks = plain_formats.four_bit_ranks(values, own, fmt.kind)
        codes = torch.tensor(NF4_CODES if fmt.kind == "nf4" else FP4_CODES).sort().values
        assert torch.equal(grid.round(values, all_columns(values)), codes[ranks] * own)


@pytest.mark.parametrize("exponent", range(-46, -34))
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_tiny_values_take_the_least_divisor(kind: str, exponent: int) -> None:
    weight = random((8, 64))
    weight[3] *= 10.0**exponent
    grid: Any = parse_format(kind).grid(weight)
    assert same_bytes(
        grid.parts(weight, info_of(weight))["packed"], plain_formats.four_bit_bytes(weight, grid.scale, kind)
    )


def test_weights_of_tiny_blocks_alone_are_refused() -> None:
    for name in FOUR_BIT:
        with pytest.raises(BadInputError, match="values so small"):
            parse_format(name).grid(random((8, 64)).clamp(-1, 1) * 1e-39)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)).filter(lambda shape: shape[0] * shape[1] % 2 == 0),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
)
def test_int8_codes_are_those_of_plain_rounding(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    weight = odd(shape, seed).to(dtype)
    weight[0, 0] = 1.0  # no weight is refused
    grid: Any = Int8().grid(weight)
    parts = grid.parts(weight, info_of(weight))
    codes, scale = plain_formats.int8_codes(weight)
    assert same_bytes(parts["packed"], codes)
    assert same_bytes(parts["scale"], scale)


@given(exponent=st.floats(-9, 1), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_int8_is_refused_where_fp16_loses_more_than_is_allowed(exponent: float, seed: int, dtype: torch.dtype) -> None:
    weight = (random((6, 50), seed) * 10.0**exponent).to(dtype)
    exact = weight.double()
    lost = float((exact - weight.half().double()).norm() / exact.norm()) if exact.any() else 0.0
    if lost > 2.0**-8:
        with pytest.raises(BadInputError, match="values so small that int8"):
            Int8().check_values(weight, "x")
    else:
        Int8().check_values(weight, "x")
