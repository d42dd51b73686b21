"""Layout of quantised weights on disk: names, sizes, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.weights import (
    BITS,
    FORMATS,
    GROUPS,
    DeltaFormat,
    Format,
    Pieces,
    Weight,
    base_name,
    checked_format,
    difference_members,
    format_label,
    is_quantizable,
    logical_weights,
    neuron_axis,
    parse_format,
    parse_pieces,
    parse_quant_state,
    quant_state_json,
    quantized_members,
)

EVEN = st.tuples(st.integers(1, 200), st.integers(1, 100).map(lambda n: 2 * n))
WEIGHTS = st.builds(TensorInfo, st.just("a.b.weight"), st.sampled_from(["F32", "F16", "BF16"]), EVEN)
STATE = "x.weight.quant_state.bitsandbytes__nf4"
INFO = TensorInfo("x.weight", "F32", (4, 32))


def stored(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def no_bytes(name: str) -> bytes:
    raise AssertionError(f"{name} should not be read")


def described(info: TensorInfo, fmt: Format) -> Callable[[str], bytes]:
    """The bytes of the small tensors that describe a weight."""

    def raw(name: str) -> bytes:
        if name == f"{info.name}_shape":
            return struct.pack("<2i", *info.shape)
        assert ".quant_state." in name, f"{name} should not be read"
        return quant_state_json(info, fmt, 0.123456789)

    return raw


def state_bytes(name: str) -> bytes:
    assert name == STATE, "only the description is to be read"
    return quant_state_json(INFO)


@given(info=WEIGHTS)
def test_nf4_costs_four_bits_and_a_scale_per_64(info: TensorInfo) -> None:
    packed, absmax, table, state = quantized_members(info, "nf4")
    assert packed.nbytes == info.numel // 2
    assert absmax.nbytes == 4 * math.ceil(info.numel / 64)
    assert table.nbytes == 64
    assert state.nbytes == len(quant_state_json(info))
    assert json.loads(quant_state_json(info))["shape"] == list(info.shape)


@given(info=WEIGHTS)
def test_int8_costs_eight_bits_and_a_scale_per_row(info: TensorInfo) -> None:
    codes, scale, form = quantized_members(info, "int8")
    assert (codes.nbytes, scale.nbytes, form.nbytes) == (info.numel, 4 * info.shape[0], 1)
    assert [m.name for m in (codes, scale, form)] == ["a.b.weight", "a.b.SCB", "a.b.weight_format"]


@given(info=WEIGHTS)
def test_double_quantisation_costs_a_byte_per_64_and_a_scale_per_16384(info: TensorInfo) -> None:
    packed, absmax, table, scale, scale_table, state = quantized_members(info, "fp4-dq")
    blocks = math.ceil(info.numel / 64)
    assert packed.nbytes == info.numel // 2
    assert absmax.nbytes == blocks
    assert scale.nbytes == 4 * math.ceil(blocks / 256)
    assert (table.nbytes, scale_table.nbytes) == (64, 1024)
    assert state.name == "a.b.weight.quant_state.bitsandbytes__fp4"


fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(info=WEIGHTS, offset=fp32)
def test_the_size_of_a_description_does_not_depend_on_its_numbers(info: TensorInfo, offset: float) -> None:
    text = quant_state_json(info, "nf4-dq", offset)
    assert len(text) == quantized_members(info, "nf4-dq")[-1].nbytes
    assert json.loads(text)["nested_offset"] == offset
    parsed = parse_quant_state(text, "x")
    assert (parsed.dtype, parsed.shape, parsed.offset) == (info.dtype, info.shape, offset)
    assert (parsed.block, parsed.nested_block) == (64, 256)


@given(rows=st.integers(1, 50), columns=st.integers(32, 500), bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS))
def test_uniform_and_ternary_sizes_by_hand(rows: int, columns: int, bits: int, group: int) -> None:
    info = TensorInfo("a.b.weight", "BF16", (rows, columns))
    groups = -(-columns // group)
    packed, scale, zero, shape = quantized_members(info, f"int{bits}-g{group}")
    assert (packed.dtype, packed.nbytes) == ("I32", 4 * rows * -(-columns * bits // 32))
    assert (scale.dtype, scale.nbytes) == ("F16", 2 * rows * groups)
    assert (zero.dtype, zero.nbytes) == ("I32", 4 * rows * -(-groups * bits // 32))
    assert (shape.dtype, shape.nbytes) == ("I32", 8)
    assert quantized_members(info, f"int{bits}-g{group}-sym") == [packed, scale, shape]
    codes, *others = quantized_members(info, f"ternary-g{group}")
    assert (codes.dtype, codes.nbytes) == ("U8", -(-rows * columns // 5))
    assert others == [scale, shape]
    names = ["packed", "scale", "zero_point", "shape"]
    assert [m.name for m in (packed, scale, zero, shape)] == [f"a.b.weight_{name}" for name in names]


def test_names_of_formats() -> None:
    assert len(FORMATS) == len(set(FORMATS)) == 5 + len(GROUPS) * (2 * len(BITS) + 1)
    scheme = parse_format("int3-g128-sym")
    assert (scheme.kind, scheme.bits, scheme.group, scheme.symmetric) == ("uniform", 3, 128, True)
    assert not parse_format("int3-g128").symmetric
    assert parse_format("fp4-dq").double
    info = TensorInfo("x.weight", "F32", (4, 64))
    for name in FORMATS:
        assert parse_format(name).name == name
        assert len(parse_format(name).parts) == len(quantized_members(info, name))


@pytest.mark.parametrize(
    "name",
    ["", "nf5", "NF4", "int4", "int7-g64", "int4-g16", "int4-g64-asym", "ternary", "svd", "int8-dq", None, 4, []],
)
def test_an_unknown_format_is_refused(name: object) -> None:
    with pytest.raises(BadInputError, match=r"^here is .*; expected one of nf4, int8"):
        parse_format(name, "here")


@given(info=WEIGHTS, fmt=st.sampled_from(FORMATS))
def test_members_are_grouped_into_the_weight_again(info: TensorInfo, fmt: Format) -> None:
    if not is_quantizable(info, fmt):
        return
    plain = TensorInfo("a.b.bias", "F32", (info.shape[0],))
    members = quantized_members(info, fmt)
    scheme = parse_format(fmt)
    if scheme.grouped and info.shape[1] <= scheme.group:  # one group a row, whatever it is called
        smallest = next(group for group in GROUPS if group >= min(scheme.group, info.shape[1]))
        fmt = fmt.replace(f"g{scheme.group}", f"g{smallest}")
    for order in (members, list(reversed(members))):
        found = logical_weights(stored(plain, *order), described(info, fmt))
        # Only the JSON of 4 bit weights keeps a dtype. Others have scales that fp16 holds.
        dtype = info.dtype if scheme.kind in ("nf4", "fp4") else "F16"
        weight = Weight(TensorInfo(info.name, dtype, info.shape), fmt, tuple(m.name for m in members))
        assert found == {"a.b.bias": Weight(plain, None, ("a.b.bias",)), "a.b.weight": weight}
        assert weight.quantized


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_blocks_are_read(block: int) -> None:
    info = TensorInfo("x.weight", "BF16", (6, 70))
    packed, absmax, table, state = quantized_members(info, "nf4")
    text = json.dumps(json.loads(quant_state_json(info)) | {"blocksize": block}, indent=2).encode()
    absmax = TensorInfo(absmax.name, "F32", (math.ceil(420 / block),))
    state = TensorInfo(state.name, "U8", (len(text),))
    found = logical_weights(stored(packed, absmax, table, state), lambda _: text)
    assert found == {info.name: Weight(info, "nf4", (packed.name, absmax.name, table.name, state.name))}


def test_plain_tensors_are_their_own_member_and_are_not_read() -> None:
    infos = stored(INFO, TensorInfo("SCB", "F32", (3,)), TensorInfo("y", "U8", ()))
    assert logical_weights(infos, no_bytes) == {n: Weight(i, None, (n,)) for n, i in infos.items()}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_member_is_named(lost: int) -> None:
    members = quantized_members(INFO, "nf4")
    rest = [m for i, m in enumerate(members) if i != lost]
    with pytest.raises(BadInputError, match=rf"'{members[lost].name}'"):
        logical_weights(stored(*rest), state_bytes)


@pytest.mark.parametrize("lost", ["x.weight", "x.weight_format"])
def test_a_missing_int8_member_is_named(lost: str) -> None:
    rest = [m for m in quantized_members(INFO, "int8") if m.name != lost]
    with pytest.raises(BadInputError, match=rf"'{lost}'"):
        logical_weights(stored(*rest), no_bytes)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_a_member_of_another_dtype_or_shape_is_named(position: int, change: str) -> None:
    members = quantized_members(INFO, "nf4")
    old = members[position]
    members[position] = TensorInfo(
        old.name, "I16" if change == "dtype" else old.dtype, (7, 7) if change == "shape" else old.shape
    )
    with pytest.raises(BadInputError, match=rf"'{old.name}'"):
        logical_weights(stored(*members), state_bytes)


GOOD = json.loads(quant_state_json(INFO))


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff",
        b"[]",
        b"5",
        b"null",
        json.dumps({k: v for k, v in GOOD.items() if k != "shape"}).encode(),
        json.dumps({**GOOD, "dtype": "float8"}).encode(),
        json.dumps({**GOOD, "dtype": []}).encode(),
        json.dumps({**GOOD, "shape": None}).encode(),
        json.dumps({**GOOD, "shape": ["a"]}).encode(),
        json.dumps({**GOOD, "shape": [-4, -32]}).encode(),
        json.dumps({**GOOD, "shape": [4, 33]}).encode(),
        json.dumps({**GOOD, "blocksize": 128}).encode(),
        json.dumps({**GOOD, "blocksize": None}).encode(),
    ],
)
def test_a_malformed_description_is_refused_by_name(state: bytes) -> None:
    with pytest.raises(BadInputError, match=r"x\.weight"):
        logical_weights(stored(*quantized_members(INFO, "nf4")), lambda _: state)


NESTED = json.loads(quant_state_json(INFO, "nf4-dq", 0.5))


@pytest.mark.parametrize(
    "state",
    [
        {k: v for k, v in NESTED.items() if k != "nested_offset"},
        {**NESTED, "nested_offset": float("nan")},
        {**NESTED, "nested_offset": None},
        {**NESTED, "nested_blocksize": 0},
        {**NESTED, "nested_blocksize": -256},
        {**NESTED, "nested_dtype": "bfloat16"},
        {**NESTED, "blocksize": 63},
        {k: v for k, v in NESTED.items() if not k.startswith("nested")},
    ],
)
def test_a_malformed_double_description_is_refused_by_name(state: dict[str, object]) -> None:
    text = json.dumps(state).encode()
    members = quantized_members(INFO, "nf4-dq")[:-1]
    with pytest.raises(BadInputError, match=r"x\.weight"):
        logical_weights(stored(*members, TensorInfo(STATE, "U8", (len(text),))), lambda _: text)


def test_another_kind_of_four_bits_is_refused_by_name() -> None:
    members = [TensorInfo(m.name.replace("__nf4", "__af4"), m.dtype, m.shape) for m in quantized_members(INFO, "nf4")]
    with pytest.raises(BadInputError, match="af4 is no format"):
        logical_weights(stored(*members), lambda _: quant_state_json(INFO))


GROUPED = ["int3-g32", "int4-g64-sym", "int8-g128", "ternary-g64"]
WIDE = TensorInfo("x.weight", "F32", (4, 200))


@pytest.mark.parametrize("fmt", [*GROUPED, "nf4-dq"])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "rank"])
def test_a_damaged_member_is_named(fmt: Format, position: int, change: str) -> None:
    members = quantized_members(WIDE, fmt)
    if position >= len(members):
        return
    old = members[position]
    if change == "missing":
        del members[position]
        if old.name.endswith("zero_point"):
            assert logical_weights(stored(*members), described(WIDE, fmt))[WIDE.name].format == f"{fmt}-sym"
            return
    else:
        shape = {"dtype": old.shape, "shape": (7, 7), "rank": (7, 7, 7)}[change]
        members[position] = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shape)
    with pytest.raises(BadInputError, match=rf"'{old.name}'"):
        logical_weights(stored(*members), described(WIDE, fmt))


@pytest.mark.parametrize("shape", [(4, 31), (0, 200), (-4, 200), (5, 200), (4, 96), (4, 1000), (200, 4)])
@pytest.mark.parametrize("fmt", GROUPED)
def test_a_shape_that_does_not_fit_is_refused_by_name(fmt: Format, shape: tuple[int, int]) -> None:
    with pytest.raises(BadInputError, match=r"'x\.weight_"):
        logical_weights(stored(*quantized_members(WIDE, fmt)), lambda _: struct.pack("<2i", *shape))


@pytest.mark.parametrize("fmt", [*GROUPED, "nf4", "int8"])
def test_a_weight_beside_its_packed_form_or_in_two_formats_is_refused(fmt: Format) -> None:
    raw = described(WIDE, fmt)
    if fmt in GROUPED:
        with pytest.raises(BadInputError, match=r"'x\.weight' stands beside 'x\.weight_packed'"):
            logical_weights(stored(WIDE, *quantized_members(WIDE, fmt)), raw)
        with pytest.raises(BadInputError, match=r"'x\.weight' is stored twice"):
            logical_weights(stored(*quantized_members(WIDE, fmt), *quantized_members(WIDE, "int8")), raw)
    else:
        with pytest.raises(BadInputError, match=r"'x\.weight' is stored twice"):
            logical_weights(stored(*quantized_members(WIDE, fmt), *quantized_members(WIDE, "int5-g32")), raw)


@given(st.integers(1, 5), st.integers(32, 3000))
def test_words_and_scales_tell_bits_and_groups(rows: int, columns: int) -> None:
    info = TensorInfo("x.weight", "F16", (rows, columns))
    layouts: dict[tuple[TensorInfo, ...], Format] = {}
    for fmt in FORMATS:
        if parse_format(fmt).grouped:
            first = layouts.setdefault(tuple(quantized_members(info, fmt)), fmt)
            assert (
                logical_weights(stored(*quantized_members(info, fmt)), described(info, fmt))[info.name].format == first
            )


@pytest.mark.parametrize("shape", [(), (4,), (4, 3, 2)])
def test_scales_beside_what_is_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    members = [TensorInfo("x.weight", "I8", shape), TensorInfo("x.SCB", "F32", shape[:1])]
    with pytest.raises(BadInputError, match=r"x\."):
        logical_weights(stored(*members, TensorInfo("x.weight_format", "U8", ())), no_bytes)


PACKED = [fmt for fmt in FORMATS if parse_format(fmt).grouped]
PIECED = "blocks.0.moe.experts.1.{}_proj.weight"


@st.composite
def pieces(draw: st.DrawFn) -> tuple[TensorInfo, Pieces]:
    """A matrix of an expert, and pieces that it may be cut into."""
    axis = draw(st.integers(0, 1))
    formats = draw(st.lists(st.sampled_from(PACKED), min_size=2, max_size=5))
    counts = tuple(draw(st.integers(32 if axis else 1, 150)) for _ in formats)
    other = draw(st.integers(1 if axis else 32, 70))
    name = PIECED.format("down" if axis else draw(st.sampled_from(["gate", "up"])))
    shape = (other, sum(counts)) if axis else (sum(counts), other)
    return TensorInfo(name, "F16", shape), Pieces(axis, tuple(formats), counts)


def shapes_of(infos: list[TensorInfo]) -> Callable[[str], bytes]:
    """The bytes of the small tensors that tell the shapes of some weights."""
    shapes = {f"{info.name}_shape": struct.pack("<2i", *info.shape) for info in infos}
    return shapes.__getitem__


@given(drawn=pieces(), turned=st.booleans())
def test_pieces_are_joined_again(drawn: tuple[TensorInfo, Pieces], turned: bool) -> None:
    info, cut = drawn
    assert parse_pieces(cut.name) == cut and checked_format(cut.name) == cut.name
    assert is_quantizable(info, cut.name) and neuron_axis(info.name) == cut.axis
    members, parts = quantized_members(info, cut.name), cut.infos(info)
    own = [quantized_members(part, fmt) for part, fmt in zip(parts, cut.formats, strict=True)]
    assert members == [member for each in own for member in each]
    assert len({member.name for member in members}) == len(members)
    found = logical_weights(stored(*(reversed(members) if turned else members)), shapes_of(parts))
    assert list(found) == [info.name]
    weight = found[info.name]
    assert weight.info == info and weight.quantized and weight.members == tuple(member.name for member in members)
    assert weight.layers == tuple(part.name.removesuffix(".weight") for part in parts)
    again = parse_pieces(weight.format or "")
    assert again is not None and (again.axis, again.counts) == (cut.axis, cut.counts)
    # a row of fewer columns is one group, whatever the size of groups
    assert quantized_members(info, again.name) == members
    assert [parse_format(a).bits for a in again.formats] == [parse_format(b).bits for b in cut.formats]


def test_pieces_by_hand() -> None:
    name = "rows:int4-g64*64+int2-g32*192"
    cut = parse_pieces(name)
    assert cut == Pieces(0, ("int4-g64", "int2-g32"), (64, 192)) and cut.name == name
    assert cut.slices == (slice(0, 64), slice(64, 256))
    first, second = cut.infos(TensorInfo("a.gate_proj.weight", "BF16", (256, 96)))
    assert first == TensorInfo("a.gate_proj.pieces.0.weight", "BF16", (64, 96))
    assert second == TensorInfo("a.gate_proj.pieces.1.weight", "BF16", (192, 96))
    down = parse_pieces(name.replace("rows", "columns"))
    assert down is not None
    assert [i.shape for i in down.infos(TensorInfo("a.down_proj.weight", "F32", (96, 256)))] == [(96, 64), (96, 192)]
    assert format_label(name) == "rows:int4-g64+int2-g32" and format_label("nf4") == "nf4"


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
        checked_format(name, "here")


@pytest.mark.parametrize("name", ["int4-g63", "int4-g64*64+int2-g64*64", None, 3])
def test_what_is_no_format_at_all_is_refused_as_before(name: object) -> None:
    with pytest.raises(BadInputError, match=r"^here is .*; expected one of nf4, int8"):
        checked_format(name, "here")


@pytest.mark.parametrize(
    ("name", "shape", "fmt", "fits"),
    [
        ("up", (96, 32), "rows:int4-g64*32+int2-g64*64", True),
        ("up", (96, 32), "rows:int4-g64*1+int2-g64*95", True),
        ("down", (32, 96), "columns:int4-g64*32+int2-g64*64", True),
        ("down", (32, 96), "columns:int4-g64*31+int2-g64*65", False),
        ("down", (32, 96), "rows:int4-g64*16+int2-g64*16", False),
        ("up", (96, 96), "columns:int4-g64*32+int2-g64*64", False),
        ("up", (96, 31), "rows:int4-g64*32+int2-g64*64", False),
        ("up", (97, 32), "rows:int4-g64*32+int2-g64*64", False),
        ("up", (96,), "rows:int4-g64*32+int2-g64*64", False),
    ],
)
def test_pieces_fit_a_matrix_or_not(name: str, shape: tuple[int, ...], fmt: Format, fits: bool) -> None:
    assert is_quantizable(TensorInfo(PIECED.format(name), "F32", shape), fmt) == fits


CUT = Pieces(1, ("int4-g64", "int3-g64", "int2-g64"), (64, 32, 96))
DOWN = TensorInfo(PIECED.format("down"), "F16", (5, 192))
PARTS = CUT.infos(DOWN)


@pytest.mark.parametrize("lost", range(3))
def test_a_missing_piece_is_named(lost: int) -> None:
    """All but the last, which nothing counts: the rest is a narrower matrix, which gate and up do not fit."""
    gone = {member.name for member in quantized_members(PARTS[lost], CUT.formats[lost])}
    rest = stored(*(member for member in quantized_members(DOWN, CUT.name) if member.name not in gone))
    if lost == 2:
        assert logical_weights(rest, shapes_of(PARTS))[DOWN.name].info.shape == (5, 96)
        return
    with pytest.raises(BadInputError, match=rf"'{PARTS[lost].name}' is missing"):
        logical_weights(rest, shapes_of(PARTS))


def test_a_single_piece_is_refused() -> None:
    with pytest.raises(BadInputError, match=rf"'{PARTS[1].name}' is missing"):
        logical_weights(stored(*quantized_members(PARTS[0], "int4-g64")), shapes_of(PARTS))


@pytest.mark.parametrize("position", range(12))
@pytest.mark.parametrize("change", ["missing", "dtype", "shape"])
def test_a_damaged_member_of_a_piece_is_named(position: int, change: str) -> None:
    members = quantized_members(DOWN, CUT.name)
    old = members[position]
    if change == "missing":
        del members[position]
        if old.name.endswith("zero_point"):  # which symmetric formats have none of
            assert "-sym" in str(logical_weights(stored(*members), shapes_of(PARTS))[DOWN.name].format)
            return
    else:
        shape = (7, 7) if change == "shape" else old.shape
        members[position] = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shape)
    with pytest.raises(BadInputError, match=rf"'{old.name}'"):
        logical_weights(stored(*members), shapes_of(PARTS))


def test_pieces_that_do_not_fit_together_are_refused_by_name() -> None:
    taller = TensorInfo(PARTS[1].name, "F16", (6, 32))
    members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(taller, "int3-g64")]
    with pytest.raises(BadInputError, match=rf"'{taller.name}' is \[6, 32\].*as many rows"):
        logical_weights(stored(*members), shapes_of([PARTS[0], taller]))
    for fmt in ("nf4", "int8"):
        members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(PARTS[1], fmt)]
        raw = shapes_of([PARTS[0]])
        with pytest.raises(BadInputError, match=rf"'{PARTS[1].name}' is {fmt}"):
            logical_weights(
                stored(*members),
                lambda name, raw=raw: quant_state_json(PARTS[1]) if "quant_state" in name else raw(name),  # type: ignore[misc]
            )
    members = [*quantized_members(PARTS[0], "int4-g64"), *quantized_members(PARTS[1], "int3-g64"), PARTS[2]]
    with pytest.raises(BadInputError, match=rf"'{PARTS[2].name}' is named as a piece"):
        logical_weights(stored(*members), shapes_of(PARTS))


@pytest.mark.parametrize("fmt", [None, "int8", "int4-g64"])
def test_a_weight_beside_its_pieces_is_refused(fmt: Format | None) -> None:
    beside = [DOWN] if fmt is None else quantized_members(DOWN, fmt)
    with pytest.raises(BadInputError, match=rf"'{DOWN.name}' (stands beside|is stored twice)"):
        logical_weights(stored(*beside, *quantized_members(DOWN, CUT.name)), shapes_of([DOWN, *PARTS]))


MATRIX = TensorInfo("blocks.1.moe.experts.10.up_proj.weight", "BF16", (6, 4))
BASE = TensorInfo("blocks.1.moe.base.up_proj.weight", "BF16", (6, 4))
deltas = st.sampled_from(["svd", "ternary"])


def test_differences_by_hand() -> None:
    assert base_name(MATRIX.name) == BASE.name
    left, right = difference_members(MATRIX, "svd", 3)
    assert left == TensorInfo(f"{MATRIX.name}.delta_left", "BF16", (6, 3))
    assert right == TensorInfo(f"{MATRIX.name}.delta_right", "BF16", (3, 4))
    codes, scale = difference_members(MATRIX, "ternary", 0)
    assert codes == TensorInfo(f"{MATRIX.name}.delta_ternary", "U8", (5,))
    assert scale == TensorInfo(f"{MATRIX.name}.delta_scale", "F32", ())


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 20), deltas, st.sampled_from(["F32", "F16", "BF16"]))
def test_base_and_differences_are_grouped_into_each_experts_weight(
    rows: int, columns: int, rank: int, fmt: DeltaFormat, dtype: str
) -> None:
    base = TensorInfo(BASE.name, dtype, (rows, columns))
    weights = [TensorInfo(f"blocks.1.moe.experts.{e}.up_proj.weight", dtype, (rows, columns)) for e in range(3)]
    members = {info.name: difference_members(info, fmt, rank + e) for e, info in enumerate(weights)}
    infos = stored(*(member for each in members.values() for member in each), base)
    assert logical_weights(infos, no_bytes) == {
        info.name: Weight(info, fmt, (base.name, *(member.name for member in members[info.name]))) for info in weights
    }


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("fmt", ["svd", "ternary"])
@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "rank"])
def test_a_damaged_difference_is_named(position: int, fmt: DeltaFormat, change: str) -> None:
    members = [*difference_members(MATRIX, fmt, 3), BASE]
    old = members[position]
    if change == "missing":
        del members[position]
    else:
        shapes = {"dtype": old.shape, "shape": (7, 7), "rank": (7, 7, 7)}
        members[position] = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shapes[change])
    with pytest.raises(BadInputError, match=rf"'{MATRIX.name}") as error:
        logical_weights(stored(*members), no_bytes)
    named = {BASE.name, *(member.name for member in difference_members(MATRIX, fmt, 3))}
    assert any(repr(name) in str(error.value) for name in named)


def test_a_weight_that_is_stored_twice_is_refused() -> None:
    svd, ternary = difference_members(MATRIX, "svd", 2), difference_members(MATRIX, "ternary", 0)
    with pytest.raises(BadInputError, match=rf"'{MATRIX.name}' is stored twice"):
        logical_weights(stored(BASE, *svd, *ternary), no_bytes)
    with pytest.raises(BadInputError, match=rf"'{MATRIX.name}' stands beside its difference"):
        logical_weights(stored(BASE, MATRIX, *svd), no_bytes)


@pytest.mark.parametrize(
    "name",
    [
        "x.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.moe.shared_experts.up_proj.weight",
        "blocks.0.moe.gate.weight",
        "blocks.0.moe.experts.0.up_proj.bias",
        "blocks.0.moe.experts.0.other.weight",
    ],
)
@pytest.mark.parametrize("part", ["delta_left", "delta_right", "delta_ternary", "delta_scale"])
def test_differences_of_other_than_experts_are_refused(name: str, part: str) -> None:
    with pytest.raises(BadInputError, match=rf"'{name}' is stored as a difference, but only"):
        logical_weights(stored(TensorInfo(f"{name}.{part}", "F32", (4, 4))), no_bytes)


def test_a_base_of_no_difference_is_a_tensor_of_its_own() -> None:
    assert logical_weights(stored(BASE), no_bytes) == {BASE.name: Weight(BASE, None, (BASE.name,))}


@pytest.mark.parametrize(
    ("dtype", "shape", "four_bit", "grouped"),
    [
        ("F32", (4, 32), True, True),
        ("BF16", (3, 2), True, False),
        ("F32", (3, 3), False, False),
        ("F16", (3, 33), False, True),
        ("F32", (2, 31), True, False),
        ("F32", (4,), False, False),
        ("F32", (2, 2, 32), False, False),
        ("F64", (4, 64), False, True),
        ("I32", (4, 64), False, False),
    ],
)
def test_what_can_be_quantised(dtype: str, shape: tuple[int, ...], four_bit: bool, grouped: bool) -> None:
    info = TensorInfo("x.weight", dtype, shape)
    assert is_quantizable(info) == four_bit
    for fmt in FORMATS:
        assert is_quantizable(info, fmt) == (grouped if parse_format(fmt).grouped else four_bit)
