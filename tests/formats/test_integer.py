"""Integer formats: sizes, an independent reader of the layout, and searches that lose nothing to plain rounding."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from packed import GROUPED, all_columns, dequantized, described, info_of, random, rough, stored, through, weight_of
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.integer import BITS, Integer
from ditmoe_cli.formats.integer_arithmetic import IntegerGrid
from ditmoe_cli.formats.packed_sizes import packed_words
from ditmoe_cli.formats.registry import Format, grid_of, pack, parse_format, quantized_members
from ditmoe_cli.formats.ternary import Ternary
from ditmoe_cli.formats.weights import logical_weights

grouped = st.sampled_from(GROUPED)
SHAPES = st.tuples(st.integers(1, 8), st.integers(32, 200))
seeds = st.integers(0, 99)


@given(rows=st.integers(1, 50), columns=st.integers(32, 500), bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS))
def test_sizes_by_hand(rows: int, columns: int, bits: int, group: int) -> None:
    info = TensorInfo("a.b.weight", "BF16", (rows, columns))
    groups = -(-columns // group)
    packed, scale, zero, shape = quantized_members(info, f"int{bits}-g{group}")
    assert (packed.dtype, packed.nbytes) == ("I32", 4 * rows * -(-columns * bits // 32))
    assert (scale.dtype, scale.nbytes) == ("F16", 2 * rows * groups)
    assert (zero.dtype, zero.nbytes) == ("I32", 4 * -(-rows * bits // 32) * groups)
    assert (shape.dtype, shape.nbytes) == ("I32", 8)
    assert quantized_members(info, f"int{bits}-g{group}-sym") == [packed, scale, shape]
    names = ["packed", "scale", "zero_point", "shape"]
    assert [m.name for m in (packed, scale, zero, shape)] == [f"a.b.weight_{name}" for name in names]


def read_independently(members: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Read an integer or ternary weight from the documented layout: names, dtypes and shapes, bit after bit."""
    parts = {name.rpartition("weight_")[2]: value for name, value in members.items()}
    rows, columns = struct.unpack("<2i", parts["shape"].tobytes())
    packed, scale = parts["packed"], parts["scale"].astype(np.float32)
    group = next(g for g in (32, 64, 128) if -(-columns // g) == scale.shape[1])
    if packed.dtype == np.uint8:
        digits = [int(byte) // 3**i % 3 - 1 for byte in packed for i in range(5)]
        steps = np.array(digits[: rows * columns], np.float32).reshape(rows, columns)
    else:
        bits = next(b for b in (2, 3, 4, 5, 6, 8) if -(-columns * b // 32) == packed.shape[1])

        def rows_of(words: NDArray[Any], n: int) -> NDArray[np.float32]:
            numbers = [int.from_bytes(row.tobytes(), "little") for row in words]
            return np.array([[x >> bits * j & 2**bits - 1 for j in range(n)] for x in numbers], np.float32)

        middle = np.full(scale.shape, 2 ** (bits - 1), np.float32)
        zero = rows_of(parts["zero_point"].T.copy(), rows).T if "zero_point" in parts else middle
        steps = rows_of(packed, columns) - zero.repeat(group, axis=1)[:, :columns]
    values: NDArray[np.float32] = steps * scale.repeat(group, axis=1)[:, :columns]
    return values


@given(shape=st.tuples(st.integers(1, 40), st.integers(32, 140)), fmt=grouped, seed=seeds)
def test_an_independent_reader_reads_the_same(shape: tuple[int, int], fmt: Format, seed: int) -> None:
    weight = random(shape, seed)
    members = pack(weight, info_of(weight), fmt)
    theirs = read_independently({name: value.numpy() for name, value in members.items()})
    assert np.array_equal(theirs, dequantized(weight_of(weight, fmt), members).numpy())


@given(rows=st.integers(1, 70), columns=st.integers(32, 400), bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS))
def test_zero_points_along_rows_are_refused_or_the_same(rows: int, columns: int, bits: int, group: int) -> None:
    """Files of development versions hold them so; a single zero point has the same bits either way."""
    info = TensorInfo("x.weight", "F16", (rows, columns))
    fmt = Integer(group, bits)
    members = fmt.members(info)
    new = members["zero_point"]
    old = TensorInfo(new.name, "I32", (rows, packed_words(-(-columns // group), bits)))
    tensors = stored(*(members | {"zero_point": old}).values())
    if (rows, new.shape[1]) == (1, 1):
        assert old == new and logical_weights(tensors, described((info, fmt.name)))[info.name].quantized
        return
    with pytest.raises(BadInputError, match=r"'x\.weight_zero_point' holds zero points packed along rows"):
        logical_weights(tensors, described((info, fmt.name)))


# ------------------------------------------------------------------ scales and zero points


@given(fmt=grouped, shape=SHAPES, seed=seeds)
def test_scales_are_those_of_fp16(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    grid: Any = grid_of(rough(shape, seed), fmt)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    if isinstance(grid, IntegerGrid) and grid.zero is not None:
        assert torch.equal(grid.zero, grid.zero.round().clamp(0, 2**grid.bits - 1))


@given(fmt=grouped, value=st.floats(-65504, 65504, width=32))
@example("int2-g32", 6e-8)
@example("int4-g64-sym", -5.7e-7)
@example("ternary-g64", -65504.0)
def test_constant_groups_are_exact_to_fp16(fmt: Format, value: float) -> None:
    weight = torch.full((2, 160), value)
    weight[1] = torch.linspace(-1, 1, 160)
    rounded = grid_of(weight, fmt).round(weight, all_columns(weight))
    assert ((rounded - weight).abs() <= (weight.half().float() - weight).abs())[0].all()


@given(fmt=grouped, seed=seeds)
def test_rows_of_subnormal_scales_beside_others_round_to_what_fp16_holds(fmt: Format, seed: int) -> None:
    """A few small rows are stored as well as fp16 scales go: they hardly count in the weight."""
    weight = rough((4, 96), seed) / rough((4, 96), seed).abs().max()
    weight[1] *= 3e-7
    rounded = through(weight, fmt)
    assert torch.equal(rounded, grid_of(weight, fmt).round(weight, all_columns(weight)))
    assert (rounded - weight)[1].norm() <= weight[1].norm(), "at worst zeros"


@pytest.mark.parametrize("fmt", ["int2-g64", "int4-g64", "int8-g64", "int4-g64-sym", "ternary-g64", "int8"])
@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-20])
def test_what_scales_would_lose_is_refused_by_name(fmt: Format, size: float) -> None:
    weight = random((8, 96), 0) * size
    if fmt in ("int2-g64", "ternary-g64", "int8") and size == 1e-6:
        weight = weight * 1e-2
    with pytest.raises(BadInputError, match=r"^tensor 'x' holds values so small that .* by the rounding of its scales"):
        grid_of(weight, fmt, name="x")
    assert (through(weight, "nf4") - weight).norm() < 0.2 * weight.norm(), "whose scales are fp32"


@given(fmt=grouped, seed=seeds, exponent=st.floats(-9, 0))
def test_what_is_stored_is_no_worse_for_being_small(fmt: Format, seed: int, exponent: float) -> None:
    """Either a weight is refused, or its scales lose no more than 2^-8 of it: it is rounded as at any size."""
    weight = random((4, 96), seed)
    usual = (through(weight, fmt) - weight).norm() / weight.norm()
    small = weight * 10.0**exponent
    try:
        error = (through(small, fmt) - small).norm() / small.norm()
    except BadInputError:
        return
    assert error <= usual + 2**-7


def test_zeros_are_stored_as_zeros() -> None:
    for fmt in (*GROUPED, "int8", "nf4", "nf4-dq"):
        assert not through(torch.zeros(4, 64), fmt).any()


@given(fmt=grouped, seed=seeds, rows=st.integers(1, 9), columns=st.integers(8, 31))
def test_rows_shorter_than_a_group_are_packed_as_one(fmt: Format, seed: int, rows: int, columns: int) -> None:
    """As a row of 32 columns is whose others are zeros, but in fewer bytes, and less than plain fp16 takes."""
    weight = random((rows, columns), seed)
    rounded = through(weight, fmt)
    assert torch.equal(rounded, grid_of(weight, fmt).round(weight, all_columns(weight)))
    padded = torch.nn.functional.pad(weight, (0, 32 - columns))
    assert torch.equal(through(padded, fmt)[:, :columns], rounded)
    taken = sum(member.nbytes for member in quantized_members(info_of(weight), fmt))
    if rows > 4:
        assert taken < 2 * weight.numel() + 12


@given(fmt=grouped, seed=seeds)
def test_the_largest_fp16_value_stays_finite(fmt: Format, seed: int) -> None:
    weight = random((4, 64), seed).clamp(-1, 1) * 65504
    weight[:, 3], weight[:, 9] = 65504, -65504
    assert weight_of(weight, fmt).unpack(pack(weight, info_of(weight), fmt)).isfinite().all()


def grouped_errors(weight: Tensor, rounded: Tensor, importance: Tensor, group: int) -> Tensor:
    errors = importance.double() * (weight.double() - rounded.double()).square()
    return torch.stack([part.sum(dim=1) for part in torch.split(errors, group, dim=1)], dim=1)


def min_max(weight: Tensor, fmt: Integer | Ternary) -> Tensor:
    """Plain rounding: the range from the least to the largest value, 0 included, in equal steps of an fp16 scale."""
    parts = []
    for part in torch.split(weight, fmt.group, dim=1):
        low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
        if isinstance(fmt, Ternary) or fmt.symmetric:
            most = 1 if isinstance(fmt, Ternary) else 2 ** (fmt.bits - 1) - 1
            least = -1 if isinstance(fmt, Ternary) else -most - 1
            scale = (torch.maximum(high, -low) / most).half().float()
            steps = (part / scale).nan_to_num(0, 0, 0).round().clamp(least, most)
        else:
            most = 2**fmt.bits - 1
            scale = ((high - low) / most).half().float()
            zero = (-low / scale).nan_to_num(0, 0, 0).round().clamp(0, most)
            steps = ((part / scale).nan_to_num(0, 0, 0).round() + zero).clamp(0, most) - zero
        parts.append(steps * scale)
    return torch.cat(parts, dim=1)


@given(fmt=grouped, shape=SHAPES, seed=seeds, weighted=st.booleans())
def test_no_group_is_worse_than_by_min_max(fmt: Format, shape: tuple[int, int], seed: int, weighted: bool) -> None:
    weight, parsed = rough(shape, seed), parse_format(fmt)
    assert isinstance(parsed, Integer | Ternary)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(shape[1], generator=generator) ** 4 if weighted else torch.ones(shape[1])
    rounded = grid_of(weight, fmt, importance if weighted else None).round(weight, all_columns(weight))
    ours = grouped_errors(weight, rounded, importance, parsed.group)
    plain = grouped_errors(weight, min_max(weight, parsed), importance, parsed.group)
    assert (ours <= plain * (1 + 1e-4) + 1e-12 * weight.square().max()).all()


@pytest.mark.parametrize("bits", [b for b in BITS if b <= 4])
def test_searches_come_close_to_an_exhaustive_one(bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    rounded = grid_of(weight, f"int{bits}-g64").round(weight, all_columns(weight))
    ours = (weight - rounded).square().sum(dim=1)
    best = torch.full((8,), torch.inf)
    scales = torch.linspace(0.02, 3, 600)[:, None, None]
    for zero in range(2**bits):
        others = ((weight / scales).round().clamp(-zero, 2**bits - 1 - zero)) * scales
        best = torch.minimum(best, (weight - others).square().sum(dim=2).amin(dim=0))
    assert (ours <= best * 1.12).all()
    assert ours.sum() <= best.sum() * 1.06


@pytest.mark.parametrize("fmt", ["int2-g64", "int3-g64-sym", "ternary-g64"])
def test_importance_moves_error_to_columns_that_matter_less(fmt: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::4] = 50.0
    plain = weight - through(weight, fmt)
    weighted = weight - through(weight, fmt, importance)
    assert (importance * weighted.square()).sum() < 0.95 * (importance * plain.square()).sum()
    assert weighted.square().sum() > plain.square().sum()
    assert torch.equal(through(weight, fmt, torch.full((128,), 4.0)), through(weight, fmt)), "only proportions matter"


def test_columns_without_importance_do_not_matter() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(64)
    importance[10] = 0
    weight[:, 10] = 40 * weight.abs().max()
    rounded = grid_of(weight, "int4-g64", importance).round(weight, all_columns(weight))
    plain = grid_of(weight, "int4-g64").round(weight, all_columns(weight))
    kept = importance > 0
    assert (rounded - weight)[:, kept].norm() < 0.7 * (plain - weight)[:, kept].norm()
    nothing = grid_of(weight, "int4-g64", torch.zeros(64)).round(weight, all_columns(weight))
    assert torch.isfinite(nothing).all()
