"""Differences from a base: members, values by definition, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import found, no_bytes, stored

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.differences import DeltaFormat, SvdDifference, TernaryDifference, base_name, difference_format
from ditmoe_cli.formats.weights import logical_weights


def of_difference(info: TensorInfo, kind: DeltaFormat, rank: int) -> list[TensorInfo]:
    return list(difference_format(kind, rank).difference_members(info).values())


MATRIX = TensorInfo("blocks.1.moe.experts.10.up_proj.weight", "BF16", (6, 4))
BASE = TensorInfo("blocks.1.moe.base.up_proj.weight", "BF16", (6, 4))
deltas = st.sampled_from(["svd", "ternary"])


def test_differences_by_hand() -> None:
    assert base_name(MATRIX.name) == BASE.name
    left, right = of_difference(MATRIX, "svd", 3)
    assert left == TensorInfo(f"{MATRIX.name}.delta_left", "BF16", (6, 3))
    assert right == TensorInfo(f"{MATRIX.name}.delta_right", "BF16", (3, 4))
    codes, scale = of_difference(MATRIX, "ternary", 0)
    assert codes == TensorInfo(f"{MATRIX.name}.delta_ternary", "U8", (5,))
    assert scale == TensorInfo(f"{MATRIX.name}.delta_scale", "F32", ())


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 20), deltas, st.sampled_from(["F32", "F16", "BF16"]))
def test_base_and_differences_are_grouped_into_each_experts_weight(
    rows: int, columns: int, rank: int, fmt: DeltaFormat, dtype: str
) -> None:
    base = TensorInfo(BASE.name, dtype, (rows, columns))
    weights = [TensorInfo(f"blocks.1.moe.experts.{e}.up_proj.weight", dtype, (rows, columns)) for e in range(3)]
    members = {info.name: of_difference(info, fmt, rank + e) for e, info in enumerate(weights)}
    infos = stored(*(member for each in members.values() for member in each), base)
    assert logical_weights(infos, no_bytes) == {
        info.name: Weight(
            info,
            difference_format(fmt, rank + e if fmt == "svd" else 0),
            (base.name, *(member.name for member in members[info.name])),
        )
        for e, info in enumerate(weights)
    }


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("fmt", ["svd", "ternary"])
@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "rank"])
def test_a_damaged_difference_is_named(position: int, fmt: DeltaFormat, change: str) -> None:
    members = [*of_difference(MATRIX, fmt, 3), BASE]
    old = members[position]
    if change == "missing":
        del members[position]
    else:
        shapes = {"dtype": old.shape, "shape": (7, 7), "rank": (7, 7, 7)}
        members[position] = TensorInfo(old.name, "I16" if change == "dtype" else old.dtype, shapes[change])
    with pytest.raises(BadInputError, match=rf"'{MATRIX.name}") as error:
        logical_weights(stored(*members), no_bytes)
    named = {BASE.name, *(member.name for member in of_difference(MATRIX, fmt, 3))}
    assert any(repr(name) in str(error.value) for name in named)


def test_a_weight_that_is_stored_twice_is_refused() -> None:
    svd, ternary = of_difference(MATRIX, "svd", 2), of_difference(MATRIX, "ternary", 0)
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


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_values_are_base_plus_difference(dtype: str) -> None:
    """Computed in fp32 at least, then rounded to the dtype."""
    generator, kind = torch.Generator().manual_seed(0), torch_dtype(dtype)
    base = torch.randn(6, 4, generator=generator).to(kind)
    left, right = (torch.randn(shape, generator=generator).to(kind) for shape in ((6, 3), (3, 4)))
    codes = torch.randint(-1, 2, (6, 4), generator=generator).to(torch.int8)
    for parts, exact in (
        (SvdDifference.pack(MATRIX.name, left, right), left.double() @ right.double()),
        (TernaryDifference.pack(MATRIX.name, codes, 0.3), codes * 0.3),
    ):
        members = {BASE.name: base, **parts}
        values = found(members).unpack(members)
        assert (values.dtype, values.shape) == (kind, (6, 4))
        torch.testing.assert_close(values, (base.double() + exact).to(kind))


def test_bytes_that_stand_for_no_codes_are_refused_by_name() -> None:
    members = {BASE.name: torch.zeros(6, 4), **TernaryDifference.pack(MATRIX.name, torch.ones(6, 4), 1.0)}
    members[f"{MATRIX.name}.delta_ternary"][2] = 243
    with pytest.raises(BadInputError, match=rf"tensor '{MATRIX.name}.delta_ternary': .* byte 243"):
        found(members).unpack(members)
