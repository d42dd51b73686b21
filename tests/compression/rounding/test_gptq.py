"""GPTQ: closed forms, bounds, an independent reference, and what few tokens do to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from by_rule import KEEP, STEP, TO_STEP, ByRule, error_of, min_max, solved
from cases import with_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.rounding import gptq as module
from ditmoe_cli.compression.rounding.gptq import Moment, Readers, Rounded, best_rounding, factor, plain
from ditmoe_cli.compression.rounding.second_moments import effective_tokens, rooted, second_moment, shrunk_weights
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.registry import grid_of

seeds = st.integers(0, 9999)
orders = st.booleans()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def moment(seed: int, width: int) -> Tensor:
    """A positive definite matrix with distinct diagonal elements and strong correlations."""
    root = normal(seed, width, width) + 2 * normal(seed + 1, width, 1)
    return root @ root.T / width


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def textbook(weight: Tensor, hessian: Tensor, grid: Any, damping: float, order: Tensor) -> Tensor:
    """The recursion as the paper writes it, with an inverse, and one column at a time."""
    inverse = torch.linalg.inv(damped(hessian, damping)[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, result = weight[:, order].clone(), torch.empty_like(weight)
    for i, column in enumerate(order.tolist()):
        q = grid.round(w[:, i : i + 1], torch.tensor([column]))
        w -= (w[:, i : i + 1] - q) / upper[i, i] * upper[i]
        result[:, [column]] = q
    return result


def order_of(hessian: Tensor, act_order: bool) -> Tensor:
    return hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))


@given(seeds, orders, st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from([1, 3, 16, 128]))
def test_it_is_the_recursion_of_the_paper_whatever_the_block(
    seed: int, act_order: bool, damping: float, block: int
) -> None:
    weight, hessian = normal(seed, 5, 24), moment(seed + 7, 24)
    wanted = textbook(weight, hessian, TO_STEP, damping, order_of(hessian, act_order))
    assert_close(solved(weight, hessian, TO_STEP, damping, act_order, block), wanted)


@given(seeds, orders)
def test_each_column_takes_the_value_that_leaves_the_least_to_the_columns_after_it(seed: int, act_order: bool) -> None:
    """Each column in turn: of all grid values, the one with the least error after the best real values for the rest."""
    width = 5
    weight, hessian = normal(seed, 1, width), moment(seed + 3, width)
    order = order_of(hessian, act_order).tolist()
    chosen = solved(weight, hessian, TO_STEP, 0.0, act_order)[0]
    for position, column in enumerate(order):
        done, rest = order[:position], order[position + 1 :]

        def error(value: float, done: list[int] = done, rest: list[int] = rest, column: int = column) -> float:
            d = chosen - weight[0]
            d[column] = value - weight[0, column]
            fixed = [*done, column]
            if rest:
                d[rest] = -torch.linalg.solve(hessian[rest][:, rest], hessian[rest][:, fixed] @ d[fixed])
            return float(d @ hessian @ d)

        least = error(float(chosen[column]))
        for other in (-STEP, STEP):
            assert least <= error(float(chosen[column]) + other) + 1e-9


@given(seeds, orders, st.sampled_from([0.01, 0.1]), st.integers(2, 3))
def test_tiny_problems_lie_between_the_optimum_and_the_bound(
    seed: int, act_order: bool, damping: float, width: int
) -> None:
    weight, hessian = normal(seed, 1, width), moment(seed + 5, width)
    system = damped(hessian, damping)
    found = solved(weight, hessian, TO_STEP, damping, act_order)
    error = error_of(found - weight, system)
    centre = (weight / STEP).round()
    shifts = torch.tensor(list(itertools.product(range(-6, 7), repeat=width)), dtype=torch.float64)
    errors = [error_of((centre + shift) * STEP - weight, system) for shift in shifts]
    assert error >= min(errors) - 1e-12
    if width == 2:  # the first column is rounded plainly, and the second is the best there is beside it
        assert error <= error_of(plain(weight, TO_STEP) - weight, system) + 1e-12


@given(seeds, orders, st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 30))
def test_the_error_is_at_most_a_quarter_step_squared_per_pivot(
    seed: int, act_order: bool, damping: float, width: int
) -> None:
    weight, hessian = normal(seed, 4, width), moment(seed + 5, width)
    order = order_of(hessian, act_order)
    system = damped(hessian, damping)
    # 1 / U_ii² is what is left of H_ii once all columns after i may follow it.
    pivots = torch.linalg.cholesky(torch.linalg.inv(system[order][:, order]), upper=True).diagonal() ** -2
    errors = solved(weight, hessian, TO_STEP, damping, act_order) - weight
    assert all(error_of(row, system) <= STEP**2 / 4 * pivots.sum() * (1 + 1e-9) for row in errors.unsqueeze(1))


@given(seeds, orders, st.sampled_from([32, 64]))
def test_correlated_inputs_lose_less_than_with_plain_rounding(seed: int, act_order: bool, outputs: int) -> None:
    weight, hessian = normal(seed, outputs, 48), moment(seed + 9, 48)
    for grid in (TO_STEP, min_max(weight, group=16)):
        found = solved(weight, hessian, grid, 0.01, act_order)
        assert error_of(found - weight, hessian) < error_of(plain(weight, grid) - weight, hessian)


@given(seeds, orders, st.integers(1, 40))
def test_a_diagonal_hessian_leaves_plain_rounding(seed: int, act_order: bool, width: int) -> None:
    weight, scales = normal(seed, 6, width), normal(seed + 1, width).square()
    assert torch.equal(solved(weight, scales.diag(), TO_STEP, 0.01, act_order), plain(weight, TO_STEP))


@given(seeds, orders, st.integers(1, 40))
def test_weights_on_the_grid_stay(seed: int, act_order: bool, width: int) -> None:
    weight, hessian = normal(seed, 6, width), moment(seed + 1, width)
    assert torch.equal(solved(weight, hessian, KEEP, 0.01, act_order, 8), weight)
    there = plain(weight, TO_STEP)
    assert torch.equal(solved(there, hessian, TO_STEP, 0.01, act_order, 8), there)


@given(seeds, orders)
def test_every_entry_is_on_the_grid_of_its_column_also_in_fp32(seed: int, act_order: bool) -> None:
    weight = normal(seed, 7, 32).float()
    grid = min_max(weight, bits=2, group=8)
    found = solved(weight, moment(seed + 1, 32).float(), grid, 0.01, act_order, 8)
    assert found.dtype == torch.float32
    assert_close(grid.round(found, torch.arange(32)), found)


@given(seeds)
def test_permuting_columns_permutes_the_result_with_act_order(seed: int) -> None:
    weight, hessian = normal(seed, 6, 30), moment(seed + 1, 30)
    permuted = torch.randperm(30, generator=seeded(seed))
    grid = min_max(weight, group=5)
    turned: Any = ByRule(grid.rule, tuple(table[:, permuted] for table in grid.tables))
    found = solved(weight[:, permuted], hessian[permuted][:, permuted], turned, 0.01)
    assert_close(found, solved(weight, hessian, grid, 0.01)[:, permuted])


@given(seeds, st.floats(1e-6, 1e6), orders)
def test_the_scale_of_the_hessian_does_not_matter(seed: int, scale: float, act_order: bool) -> None:
    weight, hessian = normal(seed, 6, 20), moment(seed + 1, 20)
    wanted = solved(weight, hessian, TO_STEP, 0.01, act_order)
    assert_close(solved(weight, scale * hessian, TO_STEP, 0.01, act_order), wanted)


@given(seeds, orders, st.sets(st.integers(0, 19)))
def test_columns_of_zero_inputs_are_rounded_plainly_and_alter_no_other(
    seed: int, act_order: bool, zero: set[int]
) -> None:
    weight, inner = normal(seed, 6, 20), moment(seed + 1, 20)
    unused, used = sorted(zero), sorted(set(range(20)) - zero)
    hessian = inner.clone()
    hessian[unused] = 0
    hessian[:, unused] = 0
    found = solved(weight, hessian, TO_STEP, 0.01, act_order, 8)
    assert torch.equal(found[:, unused], plain(weight[:, unused], TO_STEP))
    if used:
        assert_close(found[:, used], solved(weight[:, used], inner[used][:, used], TO_STEP, 0.01, act_order, 8))


@given(seeds, orders, st.integers(1, 10), st.sampled_from([0.0, 0.01]))
def test_singular_hessians_are_damped_until_they_factor(
    seed: int, act_order: bool, tokens: int, damping: float
) -> None:
    weight, inputs = normal(seed, 6, 40).float(), normal(seed + 1, tokens, 40).float()
    hessian = inputs.T @ inputs / tokens
    found = solved(weight, hessian, TO_STEP, damping, act_order)
    assert_close(plain(found, TO_STEP), found)
    assert error_of(found - weight, hessian) < error_of(plain(weight, TO_STEP) - weight, hessian)


@given(seeds, st.integers(1, 30), st.sampled_from([0.0, 0.01, 0.1]))
def test_the_factor_is_lower_triangular_and_of_the_damped_hessian(seed: int, width: int, damping: float) -> None:
    """With units on its diagonal, it leaves a diagonal matrix of the damped Hessian."""
    hessian = moment(seed, width)
    lower, used = factor(hessian, damping)
    assert used == damping
    assert torch.equal(lower, lower.tril()) and torch.equal(lower.diagonal(), torch.ones(width, dtype=lower.dtype))
    half = torch.linalg.solve_triangular(lower, damped(hessian, damping), upper=False)
    left = torch.linalg.solve_triangular(lower, half.T, upper=False)
    assert_close(left, left.diagonal().diag(), atol=1e-8 * float(hessian.trace()), rtol=0)


def test_damping_is_raised_tenfold_where_it_does_not_suffice() -> None:
    hessian = torch.tensor([[1.0, 1.0001], [1.0001, 1.0]], dtype=torch.float64)  # least eigenvalue -1e-4
    for damping, raised in ((0.0, 1e-3), (3e-6, 3e-4), (2e-4, 2e-4)):
        assert factor(hessian, damping)[1] == pytest.approx(raised)
        ((best,),) = best_rounding([readers(normal(0, 50, 2), hessian, held=normal(1, 1, 1).expand(1, 2))], [damping])
        assert best.damping == pytest.approx(raised)
        assert best.error < 1


def test_what_no_damping_mends_is_rounded_plainly_and_said_so() -> None:
    hessian = torch.tensor([[1.0, 200.0], [200.0, 1.0]])
    weight = normal(0, 3, 2).float()
    assert factor(hessian, 0.01)[1] is None
    assert torch.equal(solved(weight, hessian, TO_STEP, 0.01), plain(weight, TO_STEP))
    ((kept,),) = best_rounding([readers(weight, hessian, held=torch.eye(2))])
    assert (kept.damping, kept.error) == (None, 1.0)
    assert torch.equal(kept.weight, plain(weight, TO_STEP))


@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_errors_are_the_same_by_inputs_and_by_their_moment(seed: int, tokens: int, width: int) -> None:
    inputs, lost = normal(seed, tokens, width), normal(seed + 1, width, 5)
    wanted = [error_of(row.unsqueeze(0), inputs.T @ inputs) for row in lost.T]
    found = Moment.of(inputs)
    assert found.is_root == (tokens < width)
    assert_close(found.errors(lost).tolist(), wanted)
    order = torch.randperm(width, generator=seeded(seed))
    assert_close(found.ordered(order, torch.float64).errors(lost[order]).tolist(), wanted)


# the best of several


def readers(*weights: Tensor, held: Tensor, grid: Any = TO_STEP, tokens: float = 0.0) -> Readers:
    """Matrices, the last of which stands for their Hessian, read by held-out inputs (T, in)."""
    *matrices, hessian = weights
    return Readers(tuple(matrices), (grid,) * len(matrices), hessian, held, tokens)


def best_by_hand(weight: Tensor, hessian: Tensor, held: Tensor, dampings: list[float], step: int = 1) -> Rounded:
    """One damping after the other, while errors fall on each `step`-th row and on all; or plain rounding."""

    def error(rounded: Tensor, rows: int = 1) -> float:
        return float(((rounded - weight)[::rows] @ held.T).square().sum())

    best, least, chosen = plain(weight, TO_STEP), math.inf, None
    base = error(best)
    for damping in dampings:
        candidate = solved(weight, hessian, TO_STEP, damping)
        if chosen is not None and not (error(candidate, step) < error(best, step) and error(candidate) < least):
            break
        best, least, chosen = candidate, error(candidate), damping
    return Rounded(best, chosen, least / base) if least < base else Rounded(plain(weight, TO_STEP), None, 1.0)


@given(
    seeds,
    st.integers(1, 60),
    st.integers(1, 60),
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), max_size=3),
    st.sampled_from([1, 2, 3]),
)
def test_the_best_is_the_least_on_held_out_tokens(
    seed: int, tokens: int, other: int, dampings: list[float], step: int
) -> None:
    """Of two matrices that read the same inputs, each for itself, and never worse than plain rounding."""
    first, second, mix = normal(seed, 8, 16), normal(seed + 4, 6, 16), normal(seed + 1, 16, 16)
    inputs, held = normal(seed + 2, tokens, 16) @ mix, normal(seed + 3, other, 16) @ mix
    train = inputs.T @ inputs / tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TRIED_ROWS", 6 // step)
        (found,) = best_rounding([readers(first, second, train, held=held)], dampings)
        (again,) = best_rounding([readers(first, second, train, held=held * 4)], dampings)  # the scale does not matter
    for weight, best, scaled in zip((first, second), found, again, strict=True):
        wanted = best_by_hand(weight, train, held, dampings, step)
        assert torch.equal(best.weight, scaled.weight) and best.damping == scaled.damping
        assert best.error == pytest.approx(scaled.error)
        assert best.error <= 1
        if step == 1 or weight is first:  # rows of the second are every third of both
            assert (best.damping, best.error) == (wanted.damping, pytest.approx(wanted.error))
            assert_close(best.weight, wanted.weight)


@settings(max_examples=8)
@given(seeds, st.sampled_from([(), (0.01,), (0.01, 0.1, 1.0)]))
def test_matrices_of_several_experts_are_rounded_as_each_alone(seed: int, dampings: tuple[float, ...]) -> None:
    """Each with formats, Hessian, order and damping of its own; those of two formats for one expert too."""
    cases = []
    for e, fmts in enumerate((("int2-g32", "int4-g64-sym"), ("ternary-g32", "int3-g128"), ("int8-g32", "int2-g64"))):
        weights = [normal(seed + 10 * e + m, rows, 96) for m, rows in enumerate((16, 8))]
        mix = normal(seed + 10 * e + 2, 96, 96)
        inputs, held = (normal(seed + 10 * e + 3 + i, n, 96) @ mix for i, n in enumerate((20 + 100 * e, 50)))
        grids = tuple(grid_of(weight, fmt) for weight, fmt in zip(weights, fmts, strict=True))
        cases.append(Readers(tuple(weights), grids, inputs.T @ inputs / len(inputs), held, len(inputs)))
    assert len({case.alike for case in cases}) == 1
    together = best_rounding(cases, dampings)
    for case, found in zip(cases, together, strict=True):
        (alone,) = best_rounding([case], dampings)
        for one, other, grid in zip(found, alone, case.grids, strict=True):
            assert_close(one.weight, other.weight)
            assert one.damping == other.damping and one.error == pytest.approx(other.error)
            assert_close(plain(one.weight, grid).to(one.weight.dtype), one.weight)


def test_what_differs_in_shape_or_rule_or_lacks_held_out_tokens_is_not_alike() -> None:
    weight, held = normal(0, 8, 64).float(), torch.eye(64)

    def alike(fmt: str, rows: int = 8, held: Tensor = held) -> tuple[object, ...]:
        return Readers((weight[:rows],), (grid_of(weight[:rows], fmt),), torch.eye(64), held, 0.0).alike

    assert alike("int4-g64") == alike("ternary-g32")
    others = [alike("int4-g64"), alike("nf4"), alike("int8"), alike("int4-g64", 7), alike("int4-g64", 8, held[:0])]
    assert len(set(others)) == len(others)


def test_without_held_out_tokens_gptq_needs_as_many_as_inputs() -> None:
    weight, inputs = normal(0, 8, 16), normal(1, 40, 16) @ normal(2, 16, 16)
    train, none = inputs.T @ inputs / 40, inputs[:0]
    for tokens in (0.0, 15.9):
        ((kept,),) = best_rounding([readers(weight, train, held=none, tokens=tokens)])
        assert (kept.damping, kept.error) == (None, 1.0)
        assert torch.equal(kept.weight, plain(weight, TO_STEP))
    ((taken,),) = best_rounding([readers(weight, train, held=none, tokens=40.0)], (0.1, 0.01))
    assert taken.damping == 0.1
    assert_close(taken.weight, solved(weight, train, TO_STEP, 0.1))
    assert taken.error < 1


def test_held_out_tokens_of_no_weight_keep_plain_rounding() -> None:
    weight = normal(0, 8, 16)
    ((kept,),) = best_rounding([readers(weight, moment(1, 16), held=torch.zeros(3, 16, dtype=torch.float64))])
    assert (kept.damping, kept.error) == (None, 1.0)
    assert torch.equal(kept.weight, plain(weight, TO_STEP))


def test_weights_on_the_grid_are_kept_as_they_are() -> None:
    weight = plain(normal(0, 4, 8).float(), TO_STEP)
    ((kept,),) = best_rounding([readers(weight, torch.eye(8), held=torch.eye(8))])
    assert torch.equal(kept.weight, weight)
    assert (kept.damping, kept.error) == (None, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_where_they_stand(bad: float) -> None:
    spoilt = torch.eye(3)
    spoilt[1, 2] = bad
    with pytest.raises(BadInputError, match="row 1 of the Hessian"):
        best_rounding([readers(torch.ones(2, 3), spoilt, held=torch.eye(3))])
    with pytest.raises(BadInputError, match="row 1 of the weight"):
        best_rounding([readers(spoilt, torch.eye(3), held=torch.eye(3))])


class Planted:
    """Correlated Gaussian inputs of one covariance for all experts, and a weight on a 3-bit grid of groups of 64."""

    width = 192

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rotation = torch.linalg.qr(normal(seed, self.width, self.width)).Q
        spectrum = torch.arange(1, self.width + 1, dtype=torch.float64) ** -0.5
        scales = (0.5 * normal(seed + 1, self.width)).exp()
        self.mix = (spectrum.unsqueeze(1) * rotation * scales).float()
        self.weight = normal(seed + 2, 96, self.width).float()
        self.grid = min_max(self.weight)
        self.held = self.moment(self.inputs(8192, 100))
        self.base = self.error(plain(self.weight, self.grid))

    def inputs(self, tokens: int, offset: int) -> Tensor:
        return normal(self.seed + offset, tokens, self.width).float() @ self.mix

    def moment(self, inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = torch.full((len(inputs),), 1 / len(inputs)) if weights is None else weights
        return second_moment([(inputs, weights)], self.width, inputs.device)

    def error(self, rounded: Tensor) -> float:
        return error_of(rounded - self.weight, self.held)

    def ratio(self, hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> float:
        """Held-out error of GPTQ over that of plain rounding."""
        return self.error(solved(self.weight, hessian, self.grid, damping, act_order)) / self.base


@pytest.mark.parametrize("seed", with_slow([0, 1000, 2000]))
def test_few_tokens_mislead_shrinking_recovers_and_many_halve_the_error(seed: int) -> None:
    case = Planted(seed)
    few_inputs, pooled_inputs = case.inputs(64, 264), case.inputs(4096, 300)
    few, enough, many = (case.moment(case.inputs(n, 200 + n)) for n in (64, 192, 8192))
    # An expert starved of tokens: its own Hessian is worse than none at the usual damping, more damping helps, and
    # shrinking to the pooled Hessian does best.
    own, more = (case.ratio(few, damping, act_order=False) for damping in (0.01, 0.1))
    is_own = torch.cat([torch.ones(64), torch.zeros(4096)])
    weights = shrunk_weights(is_own, 1 - is_own, case.width)
    mixed = case.moment(torch.cat([few_inputs, pooled_inputs]), weights)
    assert own > 1
    assert own > more > case.ratio(mixed, act_order=False)
    assert case.ratio(few) > case.ratio(mixed)
    # Tokens help with either order, and with enough of them act-order helps too.
    for act_order in (False, True):
        errors = [case.ratio(hessian, act_order=act_order) for hessian in (few, enough, many)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.6
        # With shrinking, 64 tokens of its own are nearly as good as 8192.
        assert case.ratio(mixed, act_order=act_order) < 1.15 * errors[-1]
    assert case.ratio(many) < case.ratio(many, act_order=False)
    assert case.ratio(mixed) < case.ratio(mixed, act_order=False)
    # A few held-out tokens tell which is which.
    held = rooted(case.inputs(64, 400), torch.ones(64))
    for hessian in (few, mixed):
        tokens = effective_tokens(is_own)
        ((best,),) = best_rounding([readers(case.weight, hessian, held=held, grid=case.grid, tokens=tokens)])
        assert best.error <= 1
    assert best.damping is not None
    assert case.error(best.weight) < 0.7 * case.base
