"""Formats of pieces: each piece is packed for itself, joined when read, and refused by name where it does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import GROUPED, dequantized, described, found, in_pieces, infos_of, pieces_of, stored, through
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.pieces import Pieces, neuron_axis
from ditmoe_cli.formats.registry import (
    Format,
    is_quantizable,
    pack,
    parse_format,
    parse_pieces,
    quantized_members,
)
from ditmoe_cli.formats.weights import logical_weights

PIECED = "blocks.0.moe.experts.1.{}_proj.weight"


@st.composite
def pieces(draw: st.DrawFn) -> tuple[TensorInfo, Pieces]:
    """A matrix of an expert, and pieces that it may be cut into."""
    axis = draw(st.integers(0, 1))
    formats = draw(st.lists(st.sampled_from(GROUPED), min_size=2, max_size=5))
    counts = tuple(draw(st.integers(32 if axis else 1, 150)) for _ in formats)
    other = draw(st.integers(1 if axis else 32, 70))
    name = PIECED.format("down" if axis else draw(st.sampled_from(["gate", "up"])))
    shape = (other, sum(counts)) if axis else (sum(counts), other)
    return TensorInfo(name, "F16", shape), pieces_of(axis, tuple(formats), counts)


def own_weights(info: TensorInfo, cut: Pieces) -> list[tuple[TensorInfo, Format]]:
    return [(piece, fmt.name) for piece, fmt in zip(cut.infos(info), cut.formats, strict=True)]


@given(drawn=pieces(), turned=st.booleans())
def test_pieces_are_joined_again(drawn: tuple[TensorInfo, Pieces], turned: bool) -> None:
    info, cut = drawn
    assert parse_pieces(cut.name) == cut == parse_format(cut.name)
    assert is_quantizable(info, cut.name) and neuron_axis(info.name) == cut.axis
    members, own = quantized_members(info, cut.name), own_weights(info, cut)
    assert members == [member for piece, fmt in own for member in quantized_members(piece, fmt)]
    assert len({member.name for member in members}) == len(members)
    weights = logical_weights(stored(*(reversed(members) if turned else members)), described(*own))
    assert list(weights) == [info.name]
    weight = weights[info.name]
    assert weight.info == info and weight.quantized and weight.members == tuple(member.name for member in members)
    again = weight.stored_as
    assert isinstance(again, Pieces) and (again.axis, again.counts) == (cut.axis, cut.counts)
    # a row of fewer columns is one group, whatever the size of groups
    assert quantized_members(info, again.name) == members
    assert [a.bits for a in again.formats] == [b.bits for b in cut.formats]


@settings(max_examples=10)
@given(drawn=in_pieces())
def test_each_piece_is_packed_and_rounded_for_itself(drawn: tuple[Tensor, TensorInfo, Pieces]) -> None:
    weight, info, cut = drawn
    importance = torch.linspace(0.1, 3, info.shape[1])
    members = pack(weight, info, cut.name, importance)
    assert list(infos_of(members).values()) == quantized_members(info, cut.name)
    again = found(members)
    values = dequantized(again, members)
    rounded = cut.grid(weight, importance).round(weight, torch.arange(info.shape[1]))
    assert torch.equal(values, rounded)
    for fmt, place in zip(cut.formats, cut.places, strict=True):
        own = weight[place].contiguous()
        assert torch.equal(values[place], through(own, fmt.name, importance[place[1]]))
    assert again.unpack(members).dtype == torch.float16


@given(drawn=in_pieces(), seed=st.integers(0, 99))
def test_columns_are_rounded_apart_as_together(drawn: tuple[Tensor, TensorInfo, Pieces], seed: int) -> None:
    weight, info, cut = drawn
    grid = cut.grid(weight)
    order = torch.randperm(info.shape[1], generator=torch.Generator().manual_seed(seed))
    whole = grid.round(weight, torch.arange(info.shape[1]))
    assert torch.equal(grid.round(weight[:, order], order), whole[:, order])
    assert torch.equal(grid.round(weight[:, 5:6], order.new_tensor([5])), whole[:, 5:6])


# ------------------------------------------------------------------ refused


CUT = pieces_of(1, ("int4-g64", "int3-g64", "int2-g64"), (64, 32, 96))
DOWN = TensorInfo(PIECED.format("down"), "F16", (5, 192))
PARTS = CUT.infos(DOWN)
RAW = described((DOWN, "int4-g64"), *((part, "int4-g64") for part in PARTS))


@pytest.mark.parametrize("lost", range(3))
def test_a_missing_piece_is_named(lost: int) -> None:
    """All but the last, which nothing counts: the rest is a narrower matrix, which gate and up do not fit."""
    gone = {member.name for member in quantized_members(PARTS[lost], CUT.formats[lost].name)}
    rest = stored(*(member for member in quantized_members(DOWN, CUT.name) if member.name not in gone))
    if lost == 2:
        assert logical_weights(rest, RAW)[DOWN.name].info.shape == (5, 96)
        return
    with pytest.raises(BadInputError, match=rf"'{PARTS[lost].name}' is missing"):
        logical_weights(rest, RAW)


def test_a_single_piece_is_refused() -> None:
    with pytest.raises(BadInputError, match=rf"'{PARTS[1].name}' is missing"):
        logical_weights(stored(*quantized_members(PARTS[0], "int4-g64")), RAW)


@pytest.mark.parametrize("change", ["missing", "dtype", "shape"])
def test_a_damaged_member_of_a_piece_is_named(change: str) -> None:
    """Of the second piece; others are found in the same way."""
    whole = quantized_members(DOWN, CUT.name)
    for old in quantized_members(PARTS[1], "int3-g64"):
        shape = (7, 7) if change == "shape" else old.shape
        new = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shape)
        position = whole.index(old)
        members = [*whole[:position], *([] if change == "missing" else [new]), *whole[position + 1 :]]
        if change == "missing" and old.name.endswith("zero_point"):  # which symmetric formats have none of
            assert "-sym" in str(logical_weights(stored(*members), RAW)[DOWN.name].format)
            continue
        with pytest.raises(BadInputError, match=rf"'{old.name}'"):
            logical_weights(stored(*members), RAW)


def test_pieces_that_do_not_fit_together_are_refused_by_name() -> None:
    taller = TensorInfo(PARTS[1].name, "F16", (6, 32))
    members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(taller, "int3-g64")]
    with pytest.raises(BadInputError, match=rf"'{taller.name}' is \[6, 32\].*as many rows"):
        logical_weights(stored(*members), described((PARTS[0], "int4-g64"), (taller, "int3-g64")))
    for fmt in ("nf4", "int8"):
        members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(PARTS[1], fmt)]
        with pytest.raises(BadInputError, match=rf"'{PARTS[1].name}' is {fmt}; pieces of a weight are of int formats"):
            logical_weights(stored(*members), described((PARTS[0], "int4-g64"), (PARTS[1], fmt)))
    members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(PARTS[1], "int3-g64"), PARTS[2]]
    with pytest.raises(BadInputError, match=rf"'{PARTS[2].name}' is named as a piece"):
        logical_weights(stored(*members), RAW)


@pytest.mark.parametrize("fmt", [None, "int8", "int4-g64"])
def test_a_weight_beside_its_pieces_is_refused(fmt: Format | None) -> None:
    beside = [DOWN] if fmt is None else quantized_members(DOWN, fmt)
    with pytest.raises(BadInputError, match=rf"'{DOWN.name}' (stands beside|is stored twice)"):
        logical_weights(stored(*beside, *quantized_members(DOWN, CUT.name)), RAW)
