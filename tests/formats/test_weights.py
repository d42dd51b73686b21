"""Stored tensors grouped into weights: members of each format are recognised, and misfits refused by name."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import FOUR_BIT, GROUPED, KINDS, described, no_bytes, stored

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.grouped import GROUPS, GroupedFormat
from ditmoe_cli.formats.registry import FORMATS, Format, is_quantizable, parse_format, quantized_members
from ditmoe_cli.formats.weights import logical_weights

EVEN = st.tuples(st.integers(1, 200), st.integers(1, 100).map(lambda n: 2 * n))
WEIGHTS = st.builds(TensorInfo, st.just("a.b.weight"), st.sampled_from(["F32", "F16", "BF16"]), EVEN)
WIDE = TensorInfo("x.weight", "F32", (4, 200))


@given(info=WEIGHTS, fmt=st.sampled_from(FORMATS), turned=st.booleans())
def test_members_are_grouped_into_the_weight_again(info: TensorInfo, fmt: Format, turned: bool) -> None:
    if not is_quantizable(info, fmt):
        return
    plain = TensorInfo("a.b.bias", "F32", (info.shape[0],))
    members, expected = quantized_members(info, fmt), parse_format(fmt)
    if isinstance(expected, GroupedFormat) and info.shape[1] <= expected.group:  # one group a row, whatever its name
        smallest = next(group for group in GROUPS if group >= min(expected.group, info.shape[1]))
        expected = parse_format(fmt.replace(f"g{expected.group}", f"g{smallest}"))
    # Only the JSON of 4 bit weights keeps a dtype. Others have scales that fp16 holds.
    dtype = info.dtype if fmt in FOUR_BIT else "F16"
    weight = Weight(TensorInfo(info.name, dtype, info.shape), expected, tuple(m.name for m in members))
    order = list(reversed(members)) if turned else members
    found = logical_weights(stored(plain, *order), described((info, fmt)))
    assert found == {"a.b.bias": Weight(plain, None, ("a.b.bias",)), "a.b.weight": weight}
    assert weight.quantized and weight.format == expected.name


@given(st.integers(1, 5), st.integers(32, 3000))
def test_words_and_scales_tell_bits_and_groups(rows: int, columns: int) -> None:
    info = TensorInfo("x.weight", "F16", (rows, columns))
    layouts: dict[tuple[TensorInfo, ...], Format] = {}
    for fmt in GROUPED:
        members = quantized_members(info, fmt)
        first = layouts.setdefault(tuple(members), fmt)
        assert logical_weights(stored(*members), described((info, fmt)))[info.name].format == first


def test_plain_tensors_are_their_own_member_and_are_not_read() -> None:
    infos = stored(
        WIDE, TensorInfo("SCB", "F32", (3,)), TensorInfo("y", "U8", ()), TensorInfo("weight_packed", "U8", ())
    )
    weights = logical_weights(infos, no_bytes)
    assert weights == {n: Weight(i, None, (n,)) for n, i in infos.items()}
    assert not any(weight.quantized or weight.format for weight in weights.values())


@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "rank"])
@pytest.mark.parametrize("fmt", KINDS)
def test_a_damaged_member_is_named(fmt: Format, change: str) -> None:
    whole = quantized_members(WIDE, fmt)
    for position, old in enumerate(whole):
        if change == "missing" and old.name.endswith((".SCB", "quant_state.bitsandbytes__nf4", "__fp4")):
            continue  # without it nothing says that the others are members
        shape = {"dtype": old.shape, "shape": (7, 7), "rank": (7, 7, 7)}.get(change, ())
        new = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shape)
        members = [*whole[:position], *([] if change == "missing" else [new]), *whole[position + 1 :]]
        if change == "missing" and old.name.endswith("zero_point"):
            weights = logical_weights(stored(*members), described((WIDE, fmt)))
            assert weights[WIDE.name].format == f"{fmt}-sym", "which has none"
            continue
        with pytest.raises(BadInputError, match=rf"'{old.name}'"):
            logical_weights(stored(*members), described((WIDE, fmt)))


@pytest.mark.parametrize("shape", [(4, 31), (0, 200), (-4, 200), (5, 200), (4, 96), (4, 1000), (200, 4)])
@pytest.mark.parametrize("fmt", ["int3-g32", "int4-g64-sym", "ternary-g64"])
def test_a_shape_that_does_not_fit_is_refused_by_name(fmt: Format, shape: tuple[int, int]) -> None:
    with pytest.raises(BadInputError, match=r"'x\.weight_"):
        logical_weights(stored(*quantized_members(WIDE, fmt)), lambda _: struct.pack("<2i", *shape))


@pytest.mark.parametrize("fmt", KINDS)
def test_a_weight_beside_its_packed_form_or_in_two_formats_is_refused(fmt: Format) -> None:
    members, raw = quantized_members(WIDE, fmt), described((WIDE, fmt))
    if fmt in GROUPED:
        with pytest.raises(BadInputError, match=r"'x\.weight' stands beside 'x\.weight_packed'"):
            logical_weights(stored(WIDE, *members), raw)
    other = "int8" if fmt in GROUPED else "int5-g32"
    with pytest.raises(BadInputError, match=r"'x\.weight' is stored twice"):
        logical_weights(stored(*members, *quantized_members(WIDE, other)), raw)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3, 2)])
def test_scales_beside_what_is_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    members = [TensorInfo("x.weight", "I8", shape), TensorInfo("x.SCB", "F32", shape[:1])]
    with pytest.raises(BadInputError, match=r"x\."):
        logical_weights(stored(*members, TensorInfo("x.weight_format", "U8", ())), no_bytes)
