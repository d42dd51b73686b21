"""What all number formats promise: members as laid out, rounding to the nearest, and packing of what was rounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import (
    FOUR_BIT,
    GROUPED,
    KINDS,
    NAME,
    all_columns,
    dequantized,
    found,
    info_of,
    infos_of,
    random,
    rough,
    same_bytes,
    through,
    weight_of,
)

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats import packing
from ditmoe_cli.formats.base import Grid
from ditmoe_cli.formats.bitsandbytes_arithmetic import FP4_CODES, NF4_CODES, FourBitGrid, Int8Grid
from ditmoe_cli.formats.integer_arithmetic import IntegerGrid
from ditmoe_cli.formats.registry import FORMATS, Format, grid_of, is_quantizable, pack, quantized_members
from ditmoe_cli.formats.ternary_arithmetic import TernaryGrid

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = st.tuples(st.integers(1, 8), st.integers(32, 200)).filter(lambda shape: shape[0] * shape[1] % 2 == 0)
formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 99)


def values_of(grid: Grid, row: int, column: int) -> list[float]:
    """The values that the grid can hold at a place, by its definition."""
    if isinstance(grid, FourBitGrid):
        absmax = grid.scale[(row * grid.shape[1] + column) // 64].item()
        return [code * absmax for code in (NF4_CODES if grid.kind == "nf4" else FP4_CODES)]
    if isinstance(grid, Int8Grid):
        return [code * grid.scale[row].item() / 127 for code in range(-127, 128)]
    assert isinstance(grid, IntegerGrid | TernaryGrid)
    scale = grid.scale[row, column // grid.group].item()
    if isinstance(grid, TernaryGrid):
        return [-scale, 0.0, scale]
    zero = 2.0 ** (grid.bits - 1) if grid.zero is None else grid.zero[row, column // grid.group].item()
    return [(code - zero) * scale for code in range(2**grid.bits)]


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 300)),
    fmt=formats,
    dtype=st.sampled_from(DTYPES),
)
def test_members_are_as_the_layout_says(shape: tuple[int, int], fmt: Format, dtype: torch.dtype) -> None:
    weight = random(shape, dtype=dtype)
    if not is_quantizable(info_of(weight), fmt):
        return
    members = pack(weight, info_of(weight), fmt)
    assert list(infos_of(members).values()) == quantized_members(info_of(weight), fmt)
    assert all(value.is_contiguous() for value in members.values())
    again = found(members)
    ours = dequantized(weight_of(weight, fmt), members)
    assert torch.equal(dequantized(again, members), ours), (
        "the format that a reader finds, if of another name, is equal"
    )
    assert again.unpack(members).dtype == (dtype if fmt in FOUR_BIT else torch.float16)


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_what_is_packed_is_what_is_rounded(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    weight = rough(shape, seed)
    grid = grid_of(weight, fmt)
    other = rough(shape, seed + 1000)  # also of values that the grid was not made for
    for values in (weight, other):
        members = grid.pack(values, info_of(weight))
        assert list(infos_of(members).values()) == quantized_members(info_of(weight), fmt)
        assert torch.equal(dequantized(weight_of(weight, fmt), members), grid.round(values, all_columns(values)))


@given(fmt=formats, shape=SHAPES, seed=seeds, data=st.data())
def test_rounding_is_to_the_nearest_value(fmt: Format, shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    grid = grid_of(rough(shape, seed), fmt)
    # int8 rounds to fp16 first, as bitsandbytes does
    values = (rough(shape, seed + 1000) * 1.5).clamp(-60000, 60000).half().float()
    rounded = grid.round(values, all_columns(values))
    places = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
    for row, column in data.draw(st.lists(places, min_size=5, max_size=10)):
        value, choices = values[row, column].item(), values_of(grid, row, column)
        nearest = min(abs(value - choice) for choice in choices)
        got = rounded[row, column].item()
        slack = 1e-5 * max(map(abs, choices))
        assert min(abs(got - choice) for choice in choices) <= slack
        assert abs(got - value) <= nearest + slack


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_columns_are_rounded_apart_as_together_and_once(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    weight = rough(shape, seed)
    grid = grid_of(weight, fmt)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    whole = grid.round(weight, all_columns(weight))
    assert torch.equal(grid.round(weight[:, order], order), whole[:, order])
    assert torch.equal(grid.round(weight[:, 5:6], order.new_tensor([5])), whole[:, 5:6])
    assert torch.equal(grid.round(whole, all_columns(weight)), whole), "rounding again changes nothing"


@pytest.mark.parametrize("fmt", KINDS)
def test_zeros_stay_zero_and_dtypes_do_not_matter(fmt: Format) -> None:
    weight = torch.zeros(4, 128)
    weight[1] = torch.linspace(-1, 1, 128)
    rounded = through(weight, fmt)
    assert torch.equal(rounded[[0, 2, 3]], torch.zeros(3, 128))
    assert rounded[1].abs().max() > 0.5
    half = weight.bfloat16()
    assert torch.equal(through(half, fmt), through(half.float(), fmt))
    empty = torch.zeros(2, 64)
    assert torch.equal(grid_of(empty, fmt).round(empty, all_columns(empty)), empty)


@pytest.mark.parametrize("fmt", [*(fmt for fmt in KINDS if fmt in GROUPED), "int8"])
@pytest.mark.parametrize("value", [7e4, -1e38, math.inf, math.nan])
def test_values_above_fp16_are_refused_by_name(fmt: Format, value: float) -> None:
    weight = rough((4, 64))
    weight[2, 3] = value
    with pytest.raises(BadInputError, match=r"tensor 'a\.b' holds values above fp16's range"):
        grid_of(weight, fmt, name="a.b")
    with pytest.raises(BadInputError, match=rf"tensor '{NAME}' holds values above fp16's range"):
        pack(weight, info_of(weight), fmt)


@pytest.mark.parametrize("fmt", FOUR_BIT)
def test_four_bit_scales_hold_more_than_fp16(fmt: Format) -> None:
    weight = random((4, 64))
    weight[1, 2] = 1e5
    assert through(weight, fmt).max() == pytest.approx(1e5, rel=1e-2)


def test_a_grid_of_another_shape_does_not_pack() -> None:
    for fmt in ("int4-g32", "nf4", "rows:int4-g32*2+int2-g32*2"):
        grid = grid_of(rough((4, 64)), fmt)
        with pytest.raises(ValueError, match=r"a grid of .*\(4, 64\) does not take \(4, 96\)"):
            grid.pack(rough((4, 96)), info_of(rough((4, 96))))


@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.parametrize("shape", [(7, 130), (20, 33), (6, 192)])
def test_working_in_pieces_changes_nothing(
    fmt: Format, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = random(shape), torch.rand(shape[1])
    whole = pack(weight, info_of(weight), fmt, importance)
    values = dequantized(weight_of(weight, fmt), whole)
    monkeypatch.setattr(packing, "CHUNK_VALUES", 300)
    assert packing.row_chunk(*shape, weight.device) < shape[0]
    pieces = pack(weight, info_of(weight), fmt, importance)
    assert all(same_bytes(pieces[name], value) for name, value in whole.items())
    assert torch.equal(dequantized(weight_of(weight, fmt), pieces), values)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("int2-g64", 0.355),
        ("int3-g64", 0.176),
        ("int4-g64", 0.087),
        ("int5-g64", 0.043),
        ("int6-g64", 0.021),
        ("int8-g64", 0.0053),
        ("int2-g64-sym", 0.355),
        ("int3-g64-sym", 0.177),
        ("nf4", 0.0920),
        ("nf4-dq", 0.0920),
        ("fp4", 0.1219),
        ("fp4-dq", 0.1219),
        ("int8", 0.0073),
    ],
)
def test_errors_are_those_of_a_gaussian(fmt: Format, expected: float) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    error = float((grid_of(weight, fmt).round(weight, all_columns(weight)) - weight).norm() / weight.norm())
    assert error == pytest.approx(expected, rel=0.03)
