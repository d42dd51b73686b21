"""Formats by name: what names mean, which are refused, and which weights formats take."""

from __future__ import annotations

import pytest
from packed import GROUPED

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.bitsandbytes import FourBit
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.integer import BITS, Integer
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import (
    FORMATS,
    Format,
    format_label,
    is_quantizable,
    parse_format,
    parse_pieces,
    quantized_members,
)

PIECED = "blocks.0.moe.experts.1.{}_proj.weight"


def test_names_of_formats() -> None:
    assert len(FORMATS) == len(set(FORMATS)) == 5 + len(GROUPS) * (2 * len(BITS) + 1)
    assert parse_format("int3-g128-sym") == Integer(128, 3, symmetric=True)
    assert parse_format("int3-g128") == Integer(128, 3)
    assert parse_format("fp4-dq") == FourBit("fp4", double=True)
    for name in FORMATS:
        assert parse_format(name).name == name and format_label(name) == name
    assert {name: parse_format(name).bits for name in ("nf4", "int8", "int5-g32", "ternary-g64")} == {
        "nf4": 4,
        "int8": 8,
        "int5-g32": 5,
        "ternary-g64": 2,
    }


def test_members_have_names_of_their_own() -> None:
    info = TensorInfo("x.weight", "F32", (4, 64))
    for fmt in FORMATS:
        members = quantized_members(info, fmt)
        assert len({member.name for member in members}) == len(members)


@pytest.mark.parametrize(
    "name",
    ["", "nf5", "NF4", "int4", "int7-g64", "int4-g16", "int4-g64-asym", "ternary", "svd", "int8-dq", None, 4, []],
)
def test_an_unknown_format_is_refused(name: object) -> None:
    with pytest.raises(BadInputError, match=r"^here is .*; expected one of nf4, int8"):
        parse_format(name, "here")


def test_pieces_by_hand() -> None:
    name = "rows:int4-g64*64+int2-g32*192"
    cut = parse_pieces(name)
    assert cut == parse_format(name) == Pieces(0, (Integer(64, 4), Integer(32, 2)), (64, 192)) and cut.name == name
    assert cut.slices == (slice(0, 64), slice(64, 256))
    assert cut.bits == (4 * 64 + 2 * 192) / 256
    first, second = cut.infos(TensorInfo("a.gate_proj.weight", "BF16", (256, 96)))
    assert first == TensorInfo("a.gate_proj.pieces.0.weight", "BF16", (64, 96))
    assert second == TensorInfo("a.gate_proj.pieces.1.weight", "BF16", (192, 96))
    down = parse_pieces(name.replace("rows", "columns"))
    assert down is not None
    assert [i.shape for i in down.infos(TensorInfo("a.down_proj.weight", "F32", (96, 256)))] == [(96, 64), (96, 192)]
    assert format_label(name) == "rows:int4-g64+int2-g32"


@pytest.mark.parametrize(
    "name",
    [
        "rows:int4-g64*64",
        "rows:int4-g64*64+",
        "rows:int4-g64*64+int2-g64*0",
        "rows:int4-g64*64+int2-g64*064",
        "rows:int4-g64*64+int2-g64",
        "rows:int4-g64*64+nf4*64",
        "rows:int4-g64*64+int8*64",
        "rows:int4-g64*64+int7-g64*64",
        "sides:int4-g64*64+int2-g64*64",
        ":int4-g64*64+int2-g64*64",
        "rows: int4-g64*64+int2-g64*64",
    ],
)
def test_what_are_no_pieces_is_refused(name: str) -> None:
    assert parse_pieces(name) is None
    with pytest.raises(BadInputError, match=r"^here is .*two or more pieces"):
        parse_format(name, "here")


def test_names_without_an_axis_are_no_pieces() -> None:
    name = "int4-g64*64+int2-g64*64"
    assert parse_pieces(name) is None
    with pytest.raises(BadInputError, match="expected one of nf4"):
        parse_format(name)


@pytest.mark.parametrize(
    ("dtype", "shape", "of_bitsandbytes", "grouped"),
    [
        ("F32", (4, 32), True, True),
        ("BF16", (3, 2), True, False),
        ("F32", (3, 3), False, False),
        ("F16", (3, 33), False, True),
        ("F32", (2, 7), True, False),
        ("F32", (2, 8), True, True),
        ("F32", (4,), False, False),
        ("F32", (2, 2, 32), False, False),
        ("F64", (4, 64), True, True),
        ("I32", (4, 64), False, False),
    ],
)
def test_what_can_be_quantised(dtype: str, shape: tuple[int, ...], of_bitsandbytes: bool, grouped: bool) -> None:
    info = TensorInfo("x.weight", dtype, shape)
    assert is_quantizable(info) == of_bitsandbytes
    for fmt in FORMATS:
        assert is_quantizable(info, fmt) == (grouped if fmt in GROUPED else of_bitsandbytes)


@pytest.mark.parametrize(
    ("name", "shape", "fmt", "fits"),
    [
        ("up", (96, 32), "rows:int4-g64*32+int2-g64*64", True),
        ("up", (96, 32), "rows:int4-g64*1+int2-g64*95", True),
        ("down", (32, 96), "columns:int4-g64*32+int2-g64*64", True),
        ("down", (32, 96), "columns:int4-g64*7+int2-g64*89", False),
        ("down", (32, 96), "rows:int4-g64*16+int2-g64*16", False),
        ("up", (96, 96), "columns:int4-g64*32+int2-g64*64", False),
        ("up", (96, 7), "rows:int4-g64*32+int2-g64*64", False),
        ("up", (97, 32), "rows:int4-g64*32+int2-g64*64", False),
        ("up", (96,), "rows:int4-g64*32+int2-g64*64", False),
    ],
)
def test_pieces_fit_a_matrix_or_not(name: str, shape: tuple[int, ...], fmt: Format, fits: bool) -> None:
    assert is_quantizable(TensorInfo(PIECED.format(name), "F32", shape), fmt) == fits
    assert not is_quantizable(TensorInfo(PIECED.format(name), "I32", shape), fmt)
