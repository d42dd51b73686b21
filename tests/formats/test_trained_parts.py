"""Stored weights as training sees them: what is written of values is what was multiplied by, in every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import KINDS, NAME, dequantized, found, in_pieces, info_of, random, through, weight_of
from stored_parts import changed, matrix_of, parts_of, stored_as, values_of, written
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.differences import SvdDifference, TernaryDifference, difference_format
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import FORMATS, Format, pack
from ditmoe_cli.formats.trained_parts import Factors, group_products, rounded_through

SHAPES = st.sampled_from([(6, 96), (5, 130), (33, 40), (1, 8), (7, 64)])
EXPERT = "blocks.0.moe.experts.1.up_proj.weight"
EXACT = {"rtol": 1e-6, "atol": 0.0}


def packed(shape: tuple[int, int], fmt: Format, seed: int = 0) -> tuple[Weight, dict[str, Tensor]]:
    weight = random(shape, seed)
    return weight_of(weight, fmt), pack(weight, info_of(weight), fmt)


def difference(kind: Any, dtype: str = "F16", rank: int = 3) -> tuple[Weight, dict[str, Tensor]]:
    info, fmt = TensorInfo(EXPERT, dtype, (6, 20)), difference_format(kind, rank)
    base, left, right = (random(shape, i).to(torch_dtype(dtype)) for i, shape in enumerate([(6, 20), (6, 3), (3, 20)]))
    own = (
        SvdDifference.pack(EXPERT, left, right)
        if kind == "svd"
        else TernaryDifference.pack(EXPERT, (random((6, 20), 7).sign()).to(torch.int8), 0.037)
    )
    members = {fmt.members(info)["base"].name: base, **own}
    return Weight(info, fmt, tuple(member.name for member in fmt.members(info).values())), members


@given(fmt=st.sampled_from(FORMATS), shape=SHAPES.filter(lambda shape: shape[0] * shape[1] % 2 == 0))
def test_the_matrix_of_values_before_training_is_the_stored_one(fmt: Format, shape: tuple[int, int]) -> None:
    weight, members = packed(shape, fmt)
    assert torch.equal(matrix_of(weight, members, values_of(weight, members)), dequantized(weight, members))
    assert torch.equal(
        matrix_of(weight, members, values_of(weight, members, codes=False)), dequantized(weight, members)
    )


@given(
    fmt=st.sampled_from(FORMATS),
    shape=SHAPES.filter(lambda shape: shape[0] * shape[1] % 2 == 0),
    seed=st.integers(0, 9),
)
def test_what_is_written_unpacks_to_what_rounded_values_multiply_by(
    fmt: Format, shape: tuple[int, int], seed: int
) -> None:
    weight, members = packed(shape, fmt, seed)
    values, parts = changed(values_of(weight, members), seed), parts_of(weight, members)
    rounded = {part: parts[part].rounded(value) for part, value in values.items()}
    after = written(weight, members, values)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in members.items()
    }
    expected = dequantized(weight, after)
    torch.testing.assert_close(
        matrix_of(weight, members, rounded), expected, rtol=1e-6, atol=float(expected.abs().max()) * 1e-7
    )
    again = written(weight, members, rounded)
    assert all(torch.equal(after[name], again[name]) for name in after), "rounded values are written as they are"


@given(drawn=in_pieces(), seed=st.integers(0, 9))
def test_pieces_are_trained_each_in_its_own_format(drawn: tuple[Tensor, TensorInfo, Pieces], seed: int) -> None:
    values, info, cut = drawn
    members = pack(values, info, cut.name)
    weight = found(members)
    start = values_of(weight, members)
    assert torch.equal(matrix_of(weight, members, start), dequantized(weight, members))
    moved = changed(start, seed)
    rounded = {part: each.rounded(moved[part]) for part, each in parts_of(weight, members).items()}
    torch.testing.assert_close(
        matrix_of(weight, members, rounded), dequantized(weight, written(weight, members, moved)), **EXACT
    )


@pytest.mark.parametrize("kind", ["svd", "ternary"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_differences_are_trained_with_their_base(kind: str, dtype: str) -> None:
    weight, members = difference(kind, dtype)
    start = values_of(weight, members)
    assert set(start) == ({"base", "left", "right"} if kind == "svd" else {"base", "scale"})
    assert torch.equal(matrix_of(weight, members, start), weight.unpack(members).float())
    moved = changed(start)
    rounded = {part: each.rounded(moved[part]) for part, each in parts_of(weight, members).items()}
    after = written(weight, members, moved)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in members.items()}
    torch.testing.assert_close(matrix_of(weight, members, rounded), weight.unpack(after).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fmt", [kind for kind in KINDS if not kind.endswith("-dq")])
@given(factor=st.floats(-3, 3, width=32))
def test_matrices_are_linear_in_their_scales(fmt: Format, factor: float) -> None:
    weight, members = packed((6, 96), fmt)
    start, parts = values_of(weight, members, codes=False), parts_of(weight, members)
    scales = {part: value * factor if isinstance(parts[part], Factors) else value for part, value in start.items()}
    whole = matrix_of(weight, members, start)
    torch.testing.assert_close(matrix_of(weight, members, scales), factor * whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", KINDS)
def test_each_scale_reaches_the_weights_that_it_scales(fmt: Format) -> None:
    """A scale that is doubled changes what is unpacked of the file just where the trained matrix changes."""
    weight, members = packed((6, 160), fmt)
    before = dequantized(weight, members)
    for part, value in values_of(weight, members, codes=False).items():
        moved = value.clone().view(-1)
        moved[len(moved) // 2] *= 2
        values = values_of(weight, members, codes=False) | {part: moved.view(value.shape)}
        theirs = dequantized(weight, written(weight, members, {part: moved.view(value.shape)})) != before
        ours = matrix_of(weight, members, values) != before
        assert torch.equal(ours, theirs)
        assert 0 < int(ours.sum()) <= before.numel()


@pytest.mark.parametrize("fmt", KINDS)
def test_gradients_of_scales_are_difference_quotients(fmt: Format) -> None:
    weight, members = packed((6, 96), fmt)
    values = {part: value.requires_grad_(True) for part, value in values_of(weight, members, codes=False).items()}
    towards = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    (matrix_of(weight, members, values) * towards).sum().backward()  # type: ignore[no-untyped-call]
    for part, value in values.items():
        if not isinstance(parts_of(weight, members)[part], Factors):
            continue
        assert value.grad is not None
        step = torch.zeros_like(value)
        step.view(-1)[0] = 0.125
        up, down = (
            (matrix_of(weight, members, values | {part: value + sign * step}).detach().double() * towards).sum()
            for sign in (1, -1)
        )
        assert value.grad.view(-1)[0].item() == pytest.approx(float(up - down) / 0.25, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("fmt", ["int2-g32", "int4-g64-sym", "int8-g128"])
def test_codes_pass_gradients_through_their_rounding_and_stay_in_their_range(fmt: Format) -> None:
    weight, members = packed((4, 96), fmt)
    values = values_of(weight, members)
    codes = values["packed"] = (values["packed"] + 0.2).requires_grad_(True)
    matrix = matrix_of(weight, members, values)
    towards = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    (matrix * towards).sum().backward()  # type: ignore[no-untyped-call]
    group = int(fmt.split("-")[1].removeprefix("g"))
    scales = members[f"{NAME}_scale"].float().repeat_interleave(group, dim=1)[:, :96]
    inside = codes.detach() <= 2 ** (int(fmt[3]) - 1) - 1
    assert torch.equal(matrix.detach(), dequantized(weight, members)), "a fifth of a step rounds to nothing"
    assert codes.grad is not None
    torch.testing.assert_close(codes.grad, torch.where(inside, towards * scales, 0.0))
    far = values | {"packed": values["packed"].detach() + 1000}
    unpacked = dequantized(weight, written(weight, members, far))
    torch.testing.assert_close(unpacked, matrix_of(weight, members, far))


def test_scales_of_nothing_stay_so() -> None:
    weight = torch.zeros(4, 64)
    members = pack(weight, info_of(weight), "int4-g32")
    packed_weight = weight_of(weight, "int4-g32")
    moved = changed(values_of(packed_weight, members, codes=False))
    assert bool(torch.isfinite(parts_of(packed_weight, members)["scale"].rounded(moved["scale"])).all())
    scale = written(packed_weight, members, moved)[f"{NAME}_scale"]
    assert torch.equal(scale, members[f"{NAME}_scale"])


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "nf4-dq", "fp4-dq"])
def test_bitsandbytes_reads_trained_scales_of_four_bits(fmt: Format) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, members = packed((64, 320), fmt)
    values = changed(values_of(weight, members), by=0.1)
    after = written(weight, members, values)
    stats = {name.removeprefix(f"{NAME}."): value for name, value in after.items() if name != NAME}
    theirs = bnb.nn.Params4bit.from_prequantized(after[NAME], stats, device="cpu")
    read = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    ours = matrix_of(weight, members, values)
    torch.testing.assert_close(read.float(), ours, rtol=1e-5, atol=float(ours.abs().max()) * 1e-6)
    assert not torch.allclose(ours, through(random((64, 320)), fmt), rtol=1e-2)


def test_bitsandbytes_reads_trained_scales_of_int8() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, members = packed((8, 96), "int8")
    values = changed(values_of(weight, members))
    after = written(weight, members, values)
    layer = bnb.nn.Linear8bitLt(96, 8, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.zeros(8, 96), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in after.items()})
    read = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    torch.testing.assert_close(read, matrix_of(weight, members, values), rtol=1e-6, atol=0)


@given(fmt=st.sampled_from(FORMATS), shape=SHAPES.filter(lambda shape: shape[0] * shape[1] % 2 == 0))
def test_counts_are_those_of_the_values(fmt: Format, shape: tuple[int, int]) -> None:
    weight, members = packed(shape, fmt)
    counts = stored_as(weight).trained_parts(weight.info, codes=True)
    assert counts == {part: value.numel() for part, value in values_of(weight, members).items()}
    assert ("packed" in counts) == stored_as(weight).has_whole_codes
    assert "packed" not in stored_as(weight).trained_parts(weight.info)


@given(rows=st.integers(1, 4), columns=st.integers(1, 40), group=st.integers(1, 16), seed=st.integers(0, 9))
def test_groups_are_multiplied_column_by_column(rows: int, columns: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator)
    scale, zero = torch.randn(2, rows, -(-columns // group), generator=generator)
    places = torch.arange(columns) // group
    torch.testing.assert_close(group_products(numbers, scale, group), numbers * scale[:, places])
    torch.testing.assert_close(
        group_products(numbers, scale, group, zero), (numbers - zero[:, places]) * scale[:, places]
    )


def test_rounding_to_a_dtype_passes_gradients() -> None:
    values = torch.randn(5, requires_grad=True)
    out = rounded_through(values, torch.bfloat16)
    assert torch.equal(out.detach(), values.detach().bfloat16().float())
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(values.grad, torch.ones(5))
