"""Unpacking gives the values of plain arithmetic, to the bit, into whatever tensor is given."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import NAME, info_of, random, rough
from plain_formats import four_bit_values, int8_values, integer_values, nested_absmax, ternary_values
from torch import Tensor

from ditmoe_cli.formats import packing
from ditmoe_cli.formats.base import NumberFormat
from ditmoe_cli.formats.bitsandbytes import FourBit
from ditmoe_cli.formats.integer import Integer
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import FORMATS, is_quantizable, pack, parse_format
from ditmoe_cli.formats.scratch import scratch
from ditmoe_cli.formats.ternary import Ternary
from ditmoe_cli.formats.unpacking import fill_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_values(fmt: NumberFormat, members: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The weight `name` in fp32, by plain arithmetic."""
    if isinstance(fmt, Pieces):
        whole = torch.empty(shape)
        for piece, info, place in zip(fmt.formats, fmt.infos(info_of(whole, name)), fmt.places, strict=True):
            whole[place] = plain_values(piece, members, info.name, (info.shape[0], info.shape[1]))
        return whole
    if isinstance(fmt, FourBit):
        absmax = members[f"{name}.absmax"]
        state = json.loads(bytes(members[f"{name}.quant_state.bitsandbytes__{fmt.kind}"].tolist()))
        if fmt.double:
            table = (members[f"{name}.nested_absmax"], members[f"{name}.nested_quant_map"])
            absmax = nested_absmax(absmax, *table, state["nested_offset"], state["nested_blocksize"])
        return four_bit_values(members[name], absmax, members[f"{name}.quant_map"], shape, state["blocksize"])
    if isinstance(fmt, Integer):
        parts = (members[f"{name}_packed"], members[f"{name}_scale"], members.get(f"{name}_zero_point"))
        return integer_values(*parts, shape, fmt.bits, fmt.group)
    if isinstance(fmt, Ternary):
        return ternary_values(members[f"{name}_packed"], members[f"{name}_scale"], shape, fmt.group)
    return int8_values(members[name], members[f"{name.removesuffix('.weight')}.SCB"])


def layouts(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors to write to: fresh, part of a larger one, with gaps between rows, at odd addresses."""
    rows, columns = shape
    return {
        "fresh": torch.full(shape, torch.nan, dtype=dtype),
        "one of several": torch.full((3, rows, columns), torch.nan, dtype=dtype)[1],
        "with gaps": torch.full((rows, columns + 3), torch.nan, dtype=dtype)[:, 1 : columns + 1],
        "odd": torch.full((rows * columns + 1,), torch.nan, dtype=dtype)[1:].view(shape),
    }


@given(
    fmt=st.sampled_from([*FORMATS, "columns:int3-g32*40+int6-g32-sym*33+ternary-g32*9"]),
    rows=st.integers(1, 40),
    columns=st.integers(8, 200),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["fresh", "one of several", "with gaps", "odd"]),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_plain_arithmetic(
    fmt: str, rows: int, columns: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    parsed = parse_format(fmt)
    name = "blocks.0.moe.experts.0.down_proj.weight" if isinstance(parsed, Pieces) else NAME
    shape = (rows, sum(parsed.counts) if isinstance(parsed, Pieces) else columns)
    weight = rough(shape, seed)
    info = info_of(weight, name)
    if not is_quantizable(info, fmt):
        return
    members = pack(weight, info, fmt)
    expected = plain_values(parsed, members, name, shape)
    loaded = parsed.load(info, members)
    assert torch.equal(loaded.matrix(), expected)
    before = {part: tensor.clone() for part, tensor in loaded.tensors.items()}
    out = layouts(shape, dtype)[layout]
    loaded.unpack(loaded.tensors, out)
    assert torch.equal(out, expected.to(dtype))
    assert all(torch.equal(tensor, before[part]) for part, tensor in loaded.tensors.items()), "packed as before"


@pytest.mark.parametrize("fmt", ["nf4", "int3-g64", "int4-g64-sym", "int8-g32", "ternary-g32", "int8"])
def test_in_chunks_as_at_once(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random((37, 130))
    loaded = parse_format(fmt).load(info_of(weight), pack(weight, info_of(weight), fmt))
    whole = loaded.matrix()
    monkeypatch.setattr(packing, "CHUNK_VALUES", 200)
    assert torch.equal(loaded.matrix(), whole)


def test_chunks_begin_at_multiples_and_cover_all_rows() -> None:
    seen: list[tuple[int, int]] = []

    def compute(values: Tensor, part: slice) -> None:
        seen.append((part.start, part.stop))
        values.fill_(1)

    out = torch.zeros(10_007, 101)
    fill_rows(out, compute, 5)
    assert len(seen) > 1 and all(start % 5 == 0 for start, _ in seen)
    assert bool((out == 1).all()) and seen[-1][1] == 10_007


def test_what_inference_mode_worked_in_serves_outside_of_it() -> None:
    with torch.inference_mode():
        scratch("of this test", (3,), torch.device("cpu")).fill_(1)
    scratch("of this test", (2,), torch.device("cpu")).fill_(2)
