"""Grids column by column: the same values to the bit as rounding at once, whatever the format, or several together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import KINDS, rough

from ditmoe_cli.formats.base import Grid
from ditmoe_cli.formats.columns import Columns, beside, stacked
from ditmoe_cli.formats.registry import FORMATS, Format, grid_of

SHAPES = st.tuples(st.integers(1, 8), st.integers(32, 200)).filter(lambda shape: shape[0] * shape[1] % 2 == 0)
CUT = ("rows:int4-g32*3+ternary-g64*2+int2-g32-sym*4", "columns:int5-g32*32+int2-g64*40+ternary-g32*56")
formats = st.sampled_from((*FORMATS, *CUT))
seeds = st.integers(0, 99)


def shape_of(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape that pieces add up to, or the one given."""
    return {CUT[0]: (9, shape[1]), CUT[1]: (shape[0], 128)}.get(fmt, shape)


def rounded(columns: Columns, values: torch.Tensor) -> torch.Tensor:
    """Values (..., n, out), rounded in place."""
    values = values.clone()
    columns.round_(values)
    return values


def drawn(fmt: Format, shape: tuple[int, int], seed: int) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """A grid, other values than those it was made for, and an order of their columns."""
    shape = shape_of(fmt, shape)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    return grid_of(rough(shape, seed), fmt), (rough(shape, seed + 1000) * 1.5).clamp(-60000, 60000), order


@given(fmt=formats, shape=SHAPES, seed=seeds)
def test_columns_round_as_the_grid_does(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    grid, values, order = drawn(fmt, shape, seed)
    wanted = grid.round(values[:, order], order).T
    columns = grid.columns(order)
    assert torch.equal(rounded(columns, values.T[order]), wanted)
    for place in (0, len(order) - 1):
        row = values.T[order[place]].clone()
        columns.rule(row, *columns.one_by_one()[place])
        assert torch.equal(row, wanted[place])


@given(fmt=formats, shape=SHAPES, seed=seeds, step=st.integers(1, 4))
def test_some_rows_round_as_among_all(fmt: Format, shape: tuple[int, int], seed: int, step: int) -> None:
    grid, values, order = drawn(fmt, shape, seed)
    columns = grid.columns(order)
    few = rounded(columns.every(step), values.T[order][:, ::step])
    assert torch.equal(few, rounded(columns, values.T[order])[:, ::step])


@pytest.mark.parametrize("uniform", [True, False])
def test_several_matrices_round_as_each_alone(uniform: bool) -> None:
    """Those of one rule, whatever their widths, group sizes and pieces."""
    chosen = ("int2-g32", "int5-g128-sym", "ternary-g64", CUT[1]) if uniform else ("nf4", "nf4-dq")
    cases = [drawn(fmt, (6, 128), seed) for seed, fmt in enumerate(chosen)]
    parts = [grid.columns(order) for grid, _, order in cases]
    values = [values.T[order] for _, values, order in cases]
    alone = [rounded(*pair) for pair in zip(parts, values, strict=True)]
    assert torch.equal(rounded(stacked(parts), torch.stack(values)), torch.stack(alone))
    assert torch.equal(rounded(beside(parts), torch.cat(values, dim=1)), torch.cat(alone, dim=1))


def test_grids_of_different_rules_are_not_mixed() -> None:
    weight, every = rough((4, 64), 0), torch.arange(64)
    parts = [grid_of(weight, fmt).columns(every) for fmt in ("int4-g32", "nf4")]
    for join in (beside, stacked):
        with pytest.raises(ValueError, match="different rules"):
            join(parts)


def test_there_is_one_rule_for_all_uniform_formats_and_one_for_each_other_kind() -> None:
    every = torch.arange(128)
    rules = {fmt: grid_of(rough((4, 128), 0), fmt).columns(every).rule for fmt in KINDS}
    uniform = {rule for fmt, rule in rules.items() if fmt.startswith(("int", "ternary")) and fmt != "int8"}
    assert len(uniform) == 1
    others = {fmt: rule for fmt, rule in rules.items() if rule not in uniform}
    assert len(set(others.values())) == len({fmt.removesuffix("-dq") for fmt in others})
