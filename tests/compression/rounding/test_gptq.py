"""GPTQ: closed forms, bounds, an independent reference, and what few tokens do to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.rounding.gptq import (
    CHUNK,
    Hessian,
    Rounding,
    best_rounding,
    factor,
    gptq,
    hessian_of,
    output_error,
    plain,
    shrunk,
)
from ditmoe_cli.errors import BadInputError

seeds = st.integers(0, 9999)
orders = st.booleans()
STEP = 0.5


def solved(*arguments: Any, **settings: Any) -> Tensor:
    """The rounded weight, without its damping."""
    return gptq(*arguments, **settings)[0]


def to_step(values: Tensor, columns: Tensor) -> Tensor:
    """The unbounded uniform grid."""
    assert values.shape[1:] == columns.shape
    return (values / STEP).round() * STEP


def keep(values: Tensor, columns: Tensor) -> Tensor:
    assert values.shape[1:] == columns.shape
    return values


def min_max(weight: Tensor, bits: int = 3, group: int = 64) -> Rounding:
    """The asymmetric uniform grid from each group's least to its largest weight."""
    grouped = weight.view(len(weight), -1, group)
    low = grouped.amin(-1)
    levels = (1 << bits) - 1
    step = (grouped.amax(-1) - low) / levels

    def round(values: Tensor, columns: Tensor) -> Tensor:
        least, width = low[:, columns // group], step[:, columns // group]
        codes = ((values - least) / width).round().clamp(0, levels)
        return codes * width + least

    return round


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def moment(seed: int, width: int) -> Tensor:
    """A positive definite matrix with distinct diagonal elements and strong correlations."""
    root = normal(seed, width, width) + 2 * normal(seed + 1, width, 1)
    return root @ root.T / width


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def textbook(weight: Tensor, hessian: Tensor, round: Rounding, damping: float, order: Tensor) -> Tensor:
    """The recursion as the paper writes it, with an inverse, and one column at a time."""
    inverse = torch.linalg.inv(damped(hessian, damping)[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, result = weight[:, order].clone(), torch.empty_like(weight)
    for i, column in enumerate(order.tolist()):
        q = round(w[:, i : i + 1], torch.tensor([column]))
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
    wanted = textbook(weight, hessian, to_step, damping, order_of(hessian, act_order))
    assert_close(solved(weight, hessian, to_step, damping, act_order, block), wanted)


@given(seeds, orders)
def test_each_column_takes_the_value_that_leaves_the_least_to_the_columns_after_it(seed: int, act_order: bool) -> None:
    """Each column in turn: of all grid values, the one with the least error after the best real values for the rest."""
    width = 5
    weight, hessian = normal(seed, 1, width), moment(seed + 3, width)
    order = order_of(hessian, act_order).tolist()
    chosen = solved(weight, hessian, to_step, 0.0, act_order)[0]
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
    found = solved(weight, hessian, to_step, damping, act_order)
    error = output_error(found - weight, system)
    centre = (weight / STEP).round()
    shifts = torch.tensor(list(itertools.product(range(-6, 7), repeat=width)), dtype=torch.float64)
    errors = [output_error((centre + shift) * STEP - weight, system) for shift in shifts]
    assert error >= min(errors) - 1e-12
    if width == 2:  # the first column is rounded plainly, and the second is the best there is beside it
        assert error <= output_error(plain(weight, to_step) - weight, system) + 1e-12


@given(seeds, orders, st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 30))
def test_the_error_is_at_most_a_quarter_step_squared_per_pivot(
    seed: int, act_order: bool, damping: float, width: int
) -> None:
    weight, hessian = normal(seed, 4, width), moment(seed + 5, width)
    order = order_of(hessian, act_order)
    system = damped(hessian, damping)
    # 1 / U_ii² is what is left of H_ii once all columns after i may follow it.
    pivots = torch.linalg.cholesky(torch.linalg.inv(system[order][:, order]), upper=True).diagonal() ** -2
    errors = solved(weight, hessian, to_step, damping, act_order) - weight
    assert all(output_error(row, system) <= STEP**2 / 4 * pivots.sum() * (1 + 1e-9) for row in errors.unsqueeze(1))


@given(seeds, orders, st.sampled_from([32, 64]))
def test_correlated_inputs_lose_less_than_with_plain_rounding(seed: int, act_order: bool, outputs: int) -> None:
    weight, hessian = normal(seed, outputs, 48), moment(seed + 9, 48)
    for round in (to_step, min_max(weight, group=16)):
        found = solved(weight, hessian, round, 0.01, act_order)
        assert output_error(found - weight, hessian) < output_error(plain(weight, round) - weight, hessian)


@given(seeds, orders, st.integers(1, 40))
def test_a_diagonal_hessian_leaves_plain_rounding(seed: int, act_order: bool, width: int) -> None:
    weight, scales = normal(seed, 6, width), normal(seed + 1, width).square()
    assert torch.equal(solved(weight, scales.diag(), to_step, 0.01, act_order), plain(weight, to_step))


@given(seeds, orders, st.integers(1, 40))
def test_weights_on_the_grid_stay(seed: int, act_order: bool, width: int) -> None:
    weight, hessian = normal(seed, 6, width), moment(seed + 1, width)
    assert torch.equal(solved(weight, hessian, keep, 0.01, act_order, 8), weight)
    there = plain(weight, to_step)
    assert torch.equal(solved(there, hessian, to_step, 0.01, act_order, 8), there)


@given(seeds, orders)
def test_every_entry_is_on_the_grid_of_its_column_also_in_fp32(seed: int, act_order: bool) -> None:
    weight = normal(seed, 7, 32).float()
    round = min_max(weight, bits=2, group=8)
    found = solved(weight, moment(seed + 1, 32).float(), round, 0.01, act_order, 8)
    assert found.dtype == torch.float32
    assert_close(round(found, torch.arange(32)), found)


@given(seeds)
def test_permuting_columns_permutes_the_result_with_act_order(seed: int) -> None:
    weight, hessian = normal(seed, 6, 30), moment(seed + 1, 30)
    permuted = torch.randperm(30, generator=seeded(seed))
    shift = normal(seed + 2, 30)  # a grid of its own for each column

    def round(values: Tensor, columns: Tensor) -> Tensor:
        return to_step(values - shift[columns], columns) + shift[columns]

    def round_permuted(values: Tensor, columns: Tensor) -> Tensor:
        return round(values, permuted[columns])

    found = solved(weight[:, permuted], hessian[permuted][:, permuted], round_permuted, 0.01)
    assert_close(found, solved(weight, hessian, round, 0.01)[:, permuted])


@given(seeds, st.floats(1e-6, 1e6), orders)
def test_the_scale_of_the_hessian_does_not_matter(seed: int, scale: float, act_order: bool) -> None:
    weight, hessian = normal(seed, 6, 20), moment(seed + 1, 20)
    wanted = solved(weight, hessian, to_step, 0.01, act_order)
    assert_close(solved(weight, scale * hessian, to_step, 0.01, act_order), wanted)


@given(seeds, orders, st.sets(st.integers(0, 19)))
def test_columns_of_zero_inputs_are_rounded_plainly_and_alter_no_other(
    seed: int, act_order: bool, zero: set[int]
) -> None:
    weight, inner = normal(seed, 6, 20), moment(seed + 1, 20)
    unused, used = sorted(zero), sorted(set(range(20)) - zero)
    hessian = inner.clone()
    hessian[unused] = 0
    hessian[:, unused] = 0
    found = solved(weight, hessian, to_step, 0.01, act_order, 8)
    assert torch.equal(found[:, unused], plain(weight[:, unused], to_step))
    if used:
        assert_close(found[:, used], solved(weight[:, used], inner[used][:, used], to_step, 0.01, act_order, 8))


@given(seeds, orders, st.integers(1, 10), st.sampled_from([0.0, 0.01]))
def test_singular_hessians_are_damped_until_they_factor(
    seed: int, act_order: bool, tokens: int, damping: float
) -> None:
    weight, inputs = normal(seed, 6, 40).float(), normal(seed + 1, tokens, 40).float()
    hessian = hessian_of(inputs, torch.ones(tokens)).normalised()
    found = solved(weight, hessian, to_step, damping, act_order)
    assert_close(plain(found, to_step), found)
    assert output_error(found - weight, hessian) < output_error(plain(weight, to_step) - weight, hessian)


@given(seeds, st.integers(1, 30), st.sampled_from([0.0, 0.01, 0.1]))
def test_the_factor_is_upper_triangular_and_of_the_damped_hessian(seed: int, width: int, damping: float) -> None:
    hessian = moment(seed, width)
    found = factor(hessian, damping)
    assert found is not None
    upper, used = found
    assert used == damping
    assert torch.equal(upper, upper.triu())
    assert_close(upper @ upper.T, damped(hessian, damping))


def test_damping_is_raised_tenfold_where_it_does_not_suffice() -> None:
    hessian = torch.tensor([[1.0, 1.0001], [1.0001, 1.0]], dtype=torch.float64)  # least eigenvalue -1e-4
    for damping, raised in ((0.0, 1e-3), (3e-6, 3e-4), (2e-4, 2e-4)):
        found = factor(hessian, damping)
        assert found is not None
        assert found[1] == pytest.approx(raised)
        best = best_rounding(normal(0, 50, 2), hessian, to_step, hessian.clamp(max=1.0), [damping])
        assert best.damping == pytest.approx(raised)
        assert best.error < 1


def test_what_no_damping_mends_is_rounded_plainly_and_said_so() -> None:
    hessian = torch.tensor([[1.0, 200.0], [200.0, 1.0]])
    weight = normal(0, 3, 2).float()
    assert factor(hessian, 0.01) is None
    assert torch.equal(solved(weight, hessian, to_step, 0.01), plain(weight, to_step))
    kept = best_rounding(weight, hessian, to_step, torch.eye(2))
    assert (kept.damping, kept.error) == (None, 1.0)
    assert torch.equal(kept.weight, plain(weight, to_step))


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 6))
def test_hessians_are_sums_over_tokens_and_add(seed: int, batches: list[int], width: int) -> None:
    tokens = sum(batches)
    inputs, weights = normal(seed, tokens, width).float(), normal(seed + 1, tokens).square()
    whole = hessian_of(inputs, weights)
    wanted = torch.einsum("t,ti,tj->ij", weights, inputs.double(), inputs.double())
    assert_close(whole.matrix, wanted.float())
    parts = [hessian_of(x, w) for x, w in zip(torch.split(inputs, batches), torch.split(weights, batches), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert_close(total.matrix, whole.matrix)
    assert (total.weight, total.tokens) == pytest.approx((whole.weight, whole.tokens))
    if tokens:
        assert_close(total.normalised(), (wanted / weights.sum()).float())
        assert 1 - 1e-9 <= whole.tokens <= tokens + 1e-9
    else:
        assert not total.normalised().any()


@given(st.integers(1, 50), st.floats(0.01, 100), st.integers(0, 50))
def test_tokens_of_one_weight_count_each_and_those_of_none_not(tokens: int, weight: float, idle: int) -> None:
    weights = torch.cat([torch.full((tokens,), weight), torch.zeros(idle)])
    found = hessian_of(torch.ones(tokens + idle, 2), weights)
    assert found.tokens == pytest.approx(tokens)
    assert_close(found.normalised(), torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_beyond_a_chunk_are_counted_whatever_their_dtype(dtype: torch.dtype) -> None:
    inputs = normal(0, 2 * CHUNK + 3, 3).to(dtype)
    found = hessian_of(inputs, torch.ones(len(inputs)))
    assert found.matrix.dtype == torch.float32
    wanted = (inputs.double().T @ inputs.double()).float()
    assert_close(found.matrix, wanted, rtol=1e-5, atol=1e-2)  # one token more or less would shift it by about 1
    assert found.tokens == len(inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_where_they_stand(bad: float) -> None:
    inputs, weights = torch.ones(CHUNK + 5, 2), torch.ones(CHUNK + 5)
    inputs[CHUNK + 2, 1] = bad
    with pytest.raises(BadInputError, match=f"input of token {CHUNK + 2} "):
        hessian_of(inputs, weights)
    weights[7] = bad
    with pytest.raises(BadInputError, match="weight of token 7 "):
        hessian_of(torch.ones(CHUNK + 5, 2), weights)
    spoilt = torch.eye(3)
    spoilt[1, 2] = bad
    with pytest.raises(BadInputError, match="row 1 of the Hessian"):
        solved(torch.ones(2, 3), spoilt, to_step, 0.01)
    with pytest.raises(BadInputError, match="row 1 of the weight"):
        solved(spoilt, torch.eye(3), to_step, 0.01)
    with pytest.raises(BadInputError, match="row 1 of the held-out"):
        best_rounding(torch.ones(2, 3), torch.eye(3), to_step, spoilt)


def test_sums_that_overflow_negative_weights_and_other_shapes_are_refused() -> None:
    with pytest.raises(BadInputError, match="exceeds fp32 in row 1"):
        hessian_of(torch.tensor([[1.0, 1e30]]), torch.ones(1))
    with pytest.raises(BadInputError, match="weight of token 1 "):
        hessian_of(torch.ones(3, 2), torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(BadInputError, match=r"\(3, 2\) and weights \(1,\)"):
        hessian_of(torch.ones(3, 2), torch.ones(1))


@given(seeds, st.integers(0, 40), st.integers(1, 30))
def test_shrinking_weighs_an_expert_by_its_tokens(seed: int, tokens: int, width: int) -> None:
    own = hessian_of(normal(seed, tokens, 4), torch.full((tokens,), 3.0))
    pooled = hessian_of(normal(seed + 1, 100, 4), torch.ones(100))
    share = tokens / (tokens + width)
    wanted = share * own.normalised() + (1 - share) * pooled.normalised()
    assert_close(shrunk(own, pooled, width), wanted)
    if tokens == 0:
        assert torch.equal(shrunk(own, pooled, width), pooled.normalised())


@given(seeds, st.integers(1, 60), st.integers(1, 60), st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), max_size=3))
def test_the_best_is_the_least_on_held_out_tokens(seed: int, tokens: int, other: int, dampings: list[float]) -> None:
    weight, mix = normal(seed, 8, 16).float(), normal(seed + 1, 16, 16).float()
    train = hessian_of(normal(seed + 2, tokens, 16).float() @ mix, torch.ones(tokens)).normalised()
    held = hessian_of(normal(seed + 3, other, 16).float() @ mix, torch.ones(other))
    best = best_rounding(weight, train, to_step, held, dampings)
    base = output_error(plain(weight, to_step) - weight, held.matrix)
    tried = [output_error(solved(weight, train, to_step, d) - weight, held.matrix) for d in dampings]
    assert output_error(best.weight - weight, held.matrix) == min([base, *tried])
    assert best.error == min([base, *tried]) / base
    assert (best.damping is None) == (best.error == 1.0) == torch.equal(best.weight, plain(weight, to_step))
    again = best_rounding(weight, train, to_step, held.matrix * 4, dampings)  # the scale does not matter
    assert torch.equal(again.weight, best.weight)
    assert again.damping == best.damping
    assert again.error == pytest.approx(best.error)


def test_without_held_out_tokens_gptq_needs_as_many_as_inputs() -> None:
    weight, inputs = normal(0, 8, 16).float(), normal(1, 40, 16).float() @ normal(2, 16, 16).float()
    train = hessian_of(inputs, torch.ones(40))
    for held in (torch.zeros(16, 16), hessian_of(inputs[:0], torch.ones(0))):
        for tokens in (0.0, 15.9):
            kept = best_rounding(weight, train.normalised(), to_step, held, tokens=tokens)
            assert (kept.damping, kept.error) == (None, 1.0)
            assert torch.equal(kept.weight, plain(weight, to_step))
        taken = best_rounding(weight, train.normalised(), to_step, held, (0.1, 0.01), tokens=train.tokens)
        assert taken.damping == 0.1
        assert torch.equal(taken.weight, solved(weight, train.normalised(), to_step, 0.1))
        assert taken.error < 1


def test_weights_on_the_grid_are_kept_as_they_are() -> None:
    weight = plain(normal(0, 4, 8).float(), to_step)
    kept = best_rounding(weight, torch.eye(8), to_step, torch.eye(8))
    assert torch.equal(kept.weight, weight)
    assert (kept.damping, kept.error) == (None, 1.0)


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
        self.round = min_max(self.weight)
        self.held = self.moment(8192, 100).normalised()
        self.base = self.error(plain(self.weight, self.round))

    def moment(self, tokens: int, offset: int) -> Hessian:
        inputs = normal(self.seed + offset, tokens, self.width).float() @ self.mix
        return hessian_of(inputs, torch.ones(tokens))

    def error(self, rounded: Tensor) -> float:
        return output_error(rounded - self.weight, self.held)

    def ratio(self, hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> float:
        """Held-out error of GPTQ over that of plain rounding."""
        return self.error(solved(self.weight, hessian, self.round, damping, act_order)) / self.base


@pytest.mark.parametrize("seed", [0, 1000, 2000])
def test_few_tokens_mislead_shrinking_recovers_and_many_halve_the_error(seed: int) -> None:
    case = Planted(seed)
    few, enough, many = (case.moment(n, 200 + n) for n in (64, 192, 8192))
    pooled = case.moment(4096, 300)
    # An expert starved of tokens: its own Hessian is worse than none at the usual damping, more damping helps, and
    # shrinking to the pooled Hessian does best.
    own, more = (case.ratio(few.normalised(), damping, act_order=False) for damping in (0.01, 0.1))
    mixed = shrunk(few, pooled, case.width)
    assert own > 1
    assert own > more > case.ratio(mixed, act_order=False)
    assert case.ratio(few.normalised()) > case.ratio(mixed)
    # Tokens help with either order, and with enough of them act-order helps too.
    for act_order in (False, True):
        errors = [case.ratio(h.normalised(), act_order=act_order) for h in (few, enough, many)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.6
        # With shrinking, 64 tokens of its own are nearly as good as 8192.
        assert case.ratio(mixed, act_order=act_order) < 1.15 * errors[-1]
    assert case.ratio(many.normalised()) < case.ratio(many.normalised(), act_order=False)
    assert case.ratio(mixed) < case.ratio(mixed, act_order=False)
    # A few held-out tokens tell which is which.
    few_held = case.moment(64, 400)
    for hessian in (few.normalised(), mixed):
        best = best_rounding(case.weight, hessian, case.round, few_held)
        assert best.error <= 1
    assert best.damping is not None
    assert case.error(best.weight) < 0.7 * case.base
