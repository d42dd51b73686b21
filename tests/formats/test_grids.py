"""Grids: rounding is to the nearest, what is packed is what was rounded, and searches lose nothing to min-max."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import dtype_code
from ditmoe_cli.formats.grids import FP4_CODES, NF4_CODES, Grid, dynamic_map, grid_of, pack_on
from ditmoe_cli.formats.quantized import dequantized
from ditmoe_cli.formats.weights import (
    BITS,
    FORMATS,
    GROUPS,
    Format,
    Weight,
    is_quantizable,
    parse_format,
    quantized_members,
)

NAME = "layer.weight"
GROUPED = [name for name in FORMATS if parse_format(name).grouped]
formats = st.sampled_from(FORMATS)
grouped = st.sampled_from(GROUPED)
SHAPES = st.tuples(st.integers(1, 8), st.integers(32, 200)).filter(lambda shape: shape[0] * shape[1] % 2 == 0)
seeds = st.integers(0, 99)


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Weights whose rows differ much in scale, with outliers, zeros and rows of one sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) ** 3 * (2 * torch.randn(shape[0], 1, generator=generator)).exp()
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values[::3] = values[::3].abs()
    return values.clamp(-60000, 60000)


def info_of(shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(NAME, "F32", shape)


def all_columns(weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[1])


def read_back(members: dict[str, Tensor], shape: tuple[int, ...], fmt: Format) -> Tensor:
    return dequantized(Weight(info_of(shape), fmt, tuple(members)), members)


def values_of(grid: Grid, row: int, column: int) -> list[float]:
    """What the grid can hold at a place, by its definition."""
    scheme = grid.scheme
    if scheme.kind in ("nf4", "fp4"):
        absmax = grid.scale[(row * grid.shape[1] + column) // 64].item()
        return [code * absmax for code in (NF4_CODES if scheme.kind == "nf4" else FP4_CODES)]
    if scheme.kind == "int8":
        return [code * grid.scale[row].item() / 127 for code in range(-127, 128)]
    scale = grid.scale[row, column // scheme.group].item()
    if scheme.kind == "ternary":
        return [-scale, 0.0, scale]
    zero = 2.0 ** (scheme.bits - 1) if grid.zero is None else grid.zero[row, column // scheme.group].item()
    return [(code - zero) * scale for code in range(2**scheme.bits)]


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    return float((rounded - weight).norm() / weight.norm())


# ------------------------------------------------------------------ what a grid is


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_what_is_packed_is_what_is_rounded(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    weight = random(shape, seed)
    grid = grid_of(weight, fmt)
    other = random(shape, seed + 1000)  # also of values that the grid was not made for
    for values in (weight, other):
        members = pack_on(grid, values, info_of(shape), fmt)
        found = [TensorInfo(n, dtype_code(t.dtype, n), tuple(t.shape)) for n, t in members.items()]
        assert found == quantized_members(info_of(shape), fmt)
        assert torch.equal(read_back(members, shape, fmt), grid.round(values, all_columns(values)))


@given(fmt=formats, shape=SHAPES, seed=seeds, data=st.data())
def test_rounding_is_to_the_nearest_value(fmt: Format, shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    weight = random(shape, seed)
    grid = grid_of(weight, fmt)
    # int8 rounds to fp16 first, as bitsandbytes does
    values = (random(shape, seed + 1000) * 1.5).clamp(-60000, 60000).half().float()
    rounded = grid.round(values, all_columns(values))
    for _ in range(20):
        row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
        value, choices = values[row, column].item(), values_of(grid, row, column)
        nearest = min(abs(value - choice) for choice in choices)
        got = rounded[row, column].item()
        slack = 1e-5 * max(map(abs, choices))
        assert min(abs(got - choice) for choice in choices) <= slack
        assert abs(got - value) <= nearest + slack


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_columns_are_rounded_apart_as_together(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    weight = random(shape, seed)
    grid = grid_of(weight, fmt)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    whole = grid.round(weight, all_columns(weight))
    assert torch.equal(grid.round(weight[:, order], order), whole[:, order])
    assert torch.equal(grid.round(weight[:, 5:6], order.new_tensor([5])), whole[:, 5:6])


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_rounding_again_changes_nothing(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    weight = random(shape, seed)
    grid = grid_of(weight, fmt)
    once = grid.round(weight, all_columns(weight))
    assert torch.equal(grid.round(once, all_columns(weight)), once)


@given(fmt=grouped, shape=SHAPES, seed=seeds)
def test_scales_are_those_of_fp16(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    grid = grid_of(random(shape, seed), fmt)
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert grid.zero is None or torch.equal(grid.zero, grid.zero.round().clamp(0, 2**grid.scheme.bits - 1))


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zero_and_dtypes_do_not_matter(fmt: Format) -> None:
    weight = torch.zeros(4, 128)
    weight[1] = torch.linspace(-1, 1, 128)
    grid = grid_of(weight, fmt)
    rounded = read_back(pack_on(grid, weight, info_of((4, 128)), fmt), (4, 128), fmt)
    assert torch.equal(rounded[[0, 2, 3]], torch.zeros(3, 128))
    assert rounded[1].abs().max() > 0.5
    half = weight.bfloat16()
    assert torch.equal(grid_of(half, fmt).scale, grid_of(half.float(), fmt).scale)
    empty = torch.zeros(2, 64)
    assert torch.equal(grid_of(empty, fmt).round(empty, all_columns(empty)), empty)


@pytest.mark.parametrize("fmt", GROUPED)
@pytest.mark.parametrize("value", [1.0, -0.3, 65504.0, -65504.0, 1e-4, 6e-8, -5.7e-7, 1.9e-5])
def test_constant_groups_are_exact_to_fp16(fmt: Format, value: float) -> None:
    weight = torch.full((2, 160), value)
    weight[1] = torch.linspace(-1, 1, 160)
    rounded = grid_of(weight, fmt).round(weight, all_columns(weight))
    assert ((rounded - weight).abs() <= (weight.half().float() - weight).abs())[0].all()


@pytest.mark.parametrize("fmt", GROUPED)
def test_subnormal_scales_round_to_what_fp16_holds(fmt: Format) -> None:
    weight = random((4, 96)) / random((4, 96)).abs().max() * 3e-7
    grid = grid_of(weight, fmt)
    rounded = read_back(pack_on(grid, weight, info_of((4, 96)), fmt), (4, 96), fmt)
    assert torch.equal(rounded, grid.round(weight, all_columns(weight)))
    assert (rounded - weight).norm() < weight.norm()


@pytest.mark.parametrize("fmt", [*GROUPED, "int8"])
@pytest.mark.parametrize("value", [7e4, -1e38, math.inf, math.nan])
def test_values_above_fp16_are_refused_by_name(fmt: Format, value: float) -> None:
    weight = random((4, 64))
    weight[2, 3] = value
    with pytest.raises(BadInputError, match=r"tensor 'a\.b' holds values above fp16's range"):
        grid_of(weight, fmt, name="a.b")


def test_a_grid_of_another_format_or_shape_does_not_pack() -> None:
    grid = grid_of(random((4, 64)), "int4-g32")
    with pytest.raises(ValueError, match="int4-g64"):
        pack_on(grid, random((4, 64)), info_of((4, 64)), "int4-g64")
    with pytest.raises(ValueError, match=r"\(4, 96\)"):
        pack_on(grid, random((4, 96)), info_of((4, 96)), "int4-g32")


# ------------------------------------------------------------------ how it is chosen


def grouped_errors(weight: Tensor, rounded: Tensor, importance: Tensor, group: int) -> Tensor:
    errors = importance.double() * (weight.double() - rounded.double()).square()
    return torch.stack([part.sum(dim=1) for part in torch.split(errors, group, dim=1)], dim=1)


def min_max(weight: Tensor, fmt: Format) -> Tensor:
    """Plain rounding: the range from the least to the largest value, 0 included, in equal steps of an fp16 scale."""
    scheme = parse_format(fmt)
    parts = []
    for part in torch.split(weight, scheme.group, dim=1):
        low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
        if scheme.symmetric:
            most = 1 if scheme.kind == "ternary" else 2 ** (scheme.bits - 1) - 1
            least = -1 if scheme.kind == "ternary" else -most - 1
            scale = (torch.maximum(high, -low) / most).half().float()
            steps = (part / scale).nan_to_num(0, 0, 0).round().clamp(least, most)
        else:
            most = 2**scheme.bits - 1
            scale = ((high - low) / most).half().float()
            zero = (-low / scale).nan_to_num(0, 0, 0).round().clamp(0, most)
            steps = ((part / scale).nan_to_num(0, 0, 0).round() + zero).clamp(0, most) - zero
        parts.append(steps * scale)
    return torch.cat(parts, dim=1)


@given(fmt=grouped, shape=SHAPES, seed=seeds, weighted=st.booleans())
def test_no_group_is_worse_than_by_min_max(fmt: Format, shape: tuple[int, int], seed: int, weighted: bool) -> None:
    weight, group = random(shape, seed), parse_format(fmt).group
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(shape[1], generator=generator) ** 4 if weighted else torch.ones(shape[1])
    rounded = grid_of(weight, fmt, importance if weighted else None).round(weight, all_columns(weight))
    ours = grouped_errors(weight, rounded, importance, group)
    plain = grouped_errors(weight, min_max(weight, fmt), importance, group)
    assert (ours <= plain * (1 + 1e-4) + 1e-12 * weight.square().max()).all()


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
        ("int8", 0.0080),
    ],
)
def test_errors_are_those_of_a_gaussian(fmt: Format, expected: float) -> None:
    weight = torch.randn(512, 1152, generator=torch.Generator().manual_seed(0))
    error = relative_error(weight, grid_of(weight, fmt).round(weight, all_columns(weight)))
    assert error == pytest.approx(expected, rel=0.02)


def test_ternary_errors_approach_those_of_the_best_ternary_quantiser() -> None:
    """Of a Gaussian, w > t becomes s = E[w | w > t]; the best t leaves 1 - 2 φ(t)² / (1 - Φ(t)) of the variance."""
    best = min(1 - 2 * (math.exp(-t * t) / (2 * math.pi)) / (0.5 * math.erfc(t / 2**0.5)) for t in (0.55, 0.61, 0.67))
    weight = torch.randn(512, 1152, generator=torch.Generator().manual_seed(0))
    errors = [
        relative_error(weight, grid_of(weight, f"ternary-g{g}").round(weight, all_columns(weight))) for g in GROUPS
    ]
    assert errors == sorted(errors), "small groups fit better"
    assert errors[-1] < best**0.5
    assert errors[-1] == pytest.approx(best**0.5, rel=0.02)


@given(seed=seeds, weighted=st.booleans())
def test_ternary_scales_are_the_best_there_are(seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 32, generator=generator)
    importance = torch.rand(32, generator=generator) if weighted else torch.ones(32)
    ours = grid_of(weight, "ternary-g32", importance).round(weight, all_columns(weight))
    error = float((importance * (weight - ours).square()).sum())
    for scale in torch.linspace(0.01, 4, 400):
        other = (weight / scale).round().clamp(-1, 1) * scale
        assert error <= float((importance * (weight - other).square()).sum()) * (1 + 1e-5)


@pytest.mark.parametrize("bits", [b for b in BITS if b <= 4])
def test_searches_come_close_to_an_exhaustive_one(bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    rounded = grid_of(weight, f"int{bits}-g64").round(weight, all_columns(weight))
    ours = (weight - rounded).square().sum(dim=1)
    best = torch.full((8,), torch.inf)
    for zero in range(2**bits):
        for scale in torch.linspace(0.02, 3, 600):
            other = ((weight / scale).round().clamp(-zero, 2**bits - 1 - zero)) * scale
            best = torch.minimum(best, (weight - other).square().sum(dim=1))
    assert (ours <= best * 1.12).all()
    assert ours.sum() <= best.sum() * 1.06


@pytest.mark.parametrize("fmt", ["int2-g64", "int3-g64-sym", "ternary-g64"])
def test_importance_moves_error_to_columns_that_matter_less(fmt: Format) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::4] = 50.0
    plain = weight - grid_of(weight, fmt).round(weight, all_columns(weight))
    weighted = weight - grid_of(weight, fmt, importance).round(weight, all_columns(weight))
    assert (importance * weighted.square()).sum() < 0.95 * (importance * plain.square()).sum()
    assert weighted.square().sum() > plain.square().sum()
    equal = grid_of(weight, fmt, torch.full((128,), 4.0))
    assert torch.equal(equal.scale, grid_of(weight, fmt).scale), "only proportions matter"


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


def test_dynamic_map_is_ascending_and_nearly_symmetric() -> None:
    values = dynamic_map(torch.device("cpu"))
    assert len(values) == 256
    assert (values.diff() > 0).all()
    assert values[127] == 0
    assert values[-1] == 1
    assert torch.equal(values[:127].flip(0), -values[128:255])


def test_what_may_be_stored_can_be() -> None:
    for fmt in FORMATS:
        for shape in ((1, 32), (3, 33), (2, 65)):
            if is_quantizable(info_of(shape), fmt):
                weight = random(shape)
                members = pack_on(grid_of(weight, fmt), weight, info_of(shape), fmt)
                assert read_back(members, shape, fmt).shape == shape
