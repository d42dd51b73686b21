"""Layout of quantised weights on disk: names, sizes, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.checkpoint.formats import (
    DeltaFormat,
    Format,
    Weight,
    base_name,
    difference_members,
    is_quantizable,
    logical_weights,
    quant_state_json,
    quantized_members,
)
from ditmoe_cli.checkpoint.header import TensorInfo
from ditmoe_cli.errors import BadInputError

EVEN = st.tuples(st.integers(1, 200), st.integers(1, 100).map(lambda n: 2 * n))
WEIGHTS = st.builds(TensorInfo, st.just("a.b.weight"), st.sampled_from(["F32", "F16", "BF16"]), EVEN)
STATE = "x.weight.quant_state.bitsandbytes__nf4"
INFO = TensorInfo("x.weight", "F32", (4, 32))


def stored(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def no_bytes(name: str) -> bytes:
    raise AssertionError(f"{name} should not be read")


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


@given(info=WEIGHTS, fmt=st.sampled_from(["nf4", "int8"]))
def test_members_are_grouped_into_the_weight_again(info: TensorInfo, fmt: Format) -> None:
    plain = TensorInfo("a.b.bias", "F32", (info.shape[0],))
    members = quantized_members(info, fmt)
    found = logical_weights(stored(plain, *reversed(members)), lambda _: quant_state_json(info))
    dtype = "F16" if fmt == "int8" else info.dtype  # int8 keeps no dtype; bitsandbytes casts to fp16 first
    weight = Weight(TensorInfo(info.name, dtype, info.shape), fmt, tuple(m.name for m in members))
    assert found == {"a.b.bias": Weight(plain, None, ("a.b.bias",)), "a.b.weight": weight}


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


def test_double_quantisation_and_fp4_are_refused_by_name() -> None:
    nested = json.dumps({**GOOD, "nested_blocksize": 256}).encode()
    with pytest.raises(BadInputError, match="no double quantisation"):
        logical_weights(stored(*quantized_members(INFO, "nf4")), lambda _: nested)
    members = [TensorInfo(m.name.replace("__nf4", "__fp4"), m.dtype, m.shape) for m in quantized_members(INFO, "nf4")]
    with pytest.raises(BadInputError, match="is fp4"):
        logical_weights(stored(*members), lambda _: quant_state_json(INFO))


@pytest.mark.parametrize("shape", [(), (4,), (4, 3, 2)])
def test_scales_beside_what_is_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    members = [TensorInfo("x.weight", "I8", shape), TensorInfo("x.SCB", "F32", shape[:1])]
    with pytest.raises(BadInputError, match=r"x\."):
        logical_weights(stored(*members, TensorInfo("x.weight_format", "U8", ())), no_bytes)


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
    ("dtype", "shape", "expected"),
    [
        ("F32", (4, 32), True),
        ("BF16", (3, 2), True),
        ("F32", (3, 3), False),
        ("F32", (4,), False),
        ("F32", (2, 2, 2), False),
        ("F64", (4, 4), False),
        ("I32", (4, 4), False),
    ],
)
def test_what_can_be_quantised(dtype: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_quantizable(TensorInfo("x.weight", dtype, shape)) == expected
