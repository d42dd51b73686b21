"""Ridge regression from streamed sums: sums are those of the rows, and what is held out chooses the strength."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra import ridge
from ditmoe_cli.compression.algebra.ridge import STRENGTHS, Choice, Factors, Normal, Rows, choose

CPU = torch.device("cpu")
OUTPUTS = 3


def empty(features: int, outputs: int = OUTPUTS) -> Normal:
    return Normal.empty(features, outputs, CPU)


def dense(features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Normal:
    """Sums of rows whose features are one part."""
    sums = empty(features.shape[1], targets.shape[1])
    add(sums, [features], targets, torch.ones(len(features)) if weights is None else weights)
    return sums


def add(sums: Normal, parts: Sequence[Tensor], targets: Tensor, weights: Tensor) -> None:
    """Add rows of these weights, of each part only those that are not all 0; of one that has no such rows, all."""
    root = weights.sqrt()[:, None]
    used = [part.any(dim=1) for part in parts]
    rows = [
        Rows(part * root) if bool(mine.all()) else Rows((part * root)[mine], mine.nonzero().flatten())
        for part, mine in zip(parts, used, strict=True)
    ]
    sums.add(rows, targets * root)


def solved(sums: Normal, strength: float) -> Tensor:
    solution = sums.solve(strength)
    assert solution is not None
    return solution


def random_rows(sizes: Sequence[int], rows: int, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Parts of features, each 0 in about half the rows as an expert's are, targets and weights; in float64."""
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = [normal(rows, size) * (normal(rows, 1) > 0) for size in sizes]
    return parts, normal(rows, OUTPUTS), normal(rows).square()


def problem(rows: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of some rows, and a linear map of them, in float64."""
    generator = seeded(seed)
    return (
        torch.randn(rows, features, generator=generator, dtype=torch.float64),
        torch.randn(features, OUTPUTS, generator=generator, dtype=torch.float64),
    )


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 999)


@given(sizes, st.lists(st.integers(0, 12), min_size=1, max_size=4), seeds)
def test_sums_added_in_parts_are_those_of_all_rows(sizes: list[int], batches: list[int], seed: int) -> None:
    sums, rows = empty(sum(sizes)), [random_rows(sizes, n, seed + i) for i, n in enumerate(batches)]
    for parts, targets, weights in rows:
        add(sums, parts, targets, weights)
    p = torch.cat([torch.cat(parts, dim=1) for parts, _, _ in rows])
    r, w = (torch.cat([row[i] for row in rows]) for i in (1, 2))
    assert_close(sums.whole, (p * w[:, None]).T @ p)
    assert_close(sums.cross, (p * w[:, None]).T @ r)
    assert sums.energy == pytest.approx(float((w[:, None] * r.square()).sum()))


@given(sizes, seeds)
def test_sums_of_two_sets_of_rows_add_up(sizes: list[int], seed: int) -> None:
    first, second, both = empty(sum(sizes)), empty(sum(sizes)), empty(sum(sizes))
    for sums, rows in ((first, random_rows(sizes, 7, seed)), (second, random_rows(sizes, 9, seed + 1))):
        add(sums, *rows)
        add(both, *rows)
    together = first + second
    assert_close(together.whole, both.whole)
    assert_close(together.cross, both.cross)
    assert together.energy == pytest.approx(both.energy)


@given(sizes, seeds)
def test_the_error_of_a_map_is_the_sum_over_rows(sizes: list[int], seed: int) -> None:
    parts, targets, weights = random_rows(sizes, 20, seed)
    sums = empty(sum(sizes))
    add(sums, parts, targets, weights)
    solution = torch.randn(sum(sizes), OUTPUTS, generator=seeded(seed), dtype=torch.float64)
    left = targets - torch.cat(parts, dim=1) @ solution
    assert sums.error(solution) == pytest.approx(float((weights[:, None] * left.square()).sum()))
    assert sums.error(torch.zeros_like(solution)) == sums.energy


@given(sizes, st.integers(0, 30), st.sampled_from(STRENGTHS), seeds)
def test_a_solution_is_a_ridge_regression(sizes: list[int], rows: int, strength: float, seed: int) -> None:
    """The gradient of Σ w ‖r - Vᵀp‖² + λ ‖V‖² is 0; of fewer rows than features too."""
    sums = empty(sum(sizes))
    add(sums, *random_rows(sizes, rows, seed))
    solution = solved(sums, strength)
    penalty = strength * float(sums.whole.diagonal().mean())
    assert_close(sums.whole @ solution + penalty * solution, sums.cross, rtol=1e-6, atol=1e-6)
    assert bool(solution.isfinite().all())


@given(st.integers(1, 6), seeds)
def test_a_planted_map_is_recovered(features: int, seed: int) -> None:
    p, planted = problem(120, features, seed)
    for dtype, least in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        u, r = p.to(dtype), (p @ planted).to(dtype)
        found = choose(dense(u[:90], r[:90]), dense(u[90:], r[90:]))
        assert found is not None
        assert_close(found.solution, planted, rtol=1e-3, atol=1e-4)
        assert found.error < least


def test_noise_calls_for_strength_and_signal_for_weakness() -> None:
    generator = seeded(1)
    planted = torch.randn(30, OUTPUTS, generator=generator)
    p = torch.randn(60, 30, generator=generator)
    strengths = []
    for noise in (0.0, 20.0):
        targets = p @ planted + noise * torch.randn(60, OUTPUTS, generator=generator)
        found = choose(dense(p[:40], targets[:40]), dense(p[40:], targets[40:]))
        assert found is not None and found.strength in STRENGTHS
        strengths.append(found.strength)
    assert strengths[0] == min(STRENGTHS)
    assert strengths[1] > 0.1


@given(seeds, st.floats(0, 30))
def test_the_strength_is_the_best_on_held_out_rows(seed: int, noise: float) -> None:
    generator = seeded(seed)
    p = torch.randn(60, 8, generator=generator)
    targets = p @ torch.randn(8, OUTPUTS, generator=generator) + noise * torch.randn(60, OUTPUTS, generator=generator)
    train, held = dense(p[:40], targets[:40]), dense(p[40:], targets[40:])
    found = choose(train, held)
    if found is None:
        assert all(held.error(solved(train, strength)) >= held.energy for strength in STRENGTHS)
        return
    errors = {strength: held.error(solved(train, strength)) for strength in STRENGTHS}
    assert found.error == pytest.approx(errors[found.strength] / held.energy, abs=1e-6) and found.error < 1
    neighbours = [errors[s] for s in STRENGTHS if s in (found.strength * 10, found.strength / 10)]
    assert errors[found.strength] <= min(neighbours) + 1e-6 * held.energy
    assert_close(found.solution, solved(train, found.strength))


def test_nothing_is_returned_where_nothing_betters_zero() -> None:
    p, planted = problem(80, 5, seed=0)
    assert choose(dense(p[:60], p[:60] @ planted), dense(p[60:], -p[60:] @ planted)) is None, "the other way round"
    assert choose(dense(p[:60], 0 * p[:60] @ planted), dense(p[60:], 0 * p[60:] @ planted)) is None
    assert choose(dense(p[:60], p[:60] @ planted), empty(5)) is None, "nothing is held out"
    assert choose(empty(5), dense(p[60:], p[60:] @ planted)) is None, "everything is"


def test_features_that_are_all_zero_solve_to_zero() -> None:
    targets = torch.randn(20, OUTPUTS, generator=seeded(0))
    zero = dense(torch.zeros(20, 4), targets)
    assert all(torch.equal(solved(zero, strength), torch.zeros(4, OUTPUTS).double()) for strength in STRENGTHS)
    assert choose(zero, zero) is None


def test_a_feature_that_is_always_zero_gets_no_weight() -> None:
    p, planted = problem(80, 5, seed=0)
    p[:, 2] = 0
    found = choose(dense(p[:60], p[:60] @ planted), dense(p[60:], p[60:] @ planted))
    assert found is not None
    assert not found.solution[2].any()
    assert found.error < 1e-9


@pytest.mark.parametrize("copies", [2, 5])
def test_features_that_repeat_share_the_weight(copies: int) -> None:
    p, planted = problem(80, 3, seed=0)
    repeated = p.repeat(1, copies)
    found = choose(dense(repeated[:60], p[:60] @ planted), dense(repeated[60:], p[60:] @ planted))
    assert found is not None
    for share in found.solution.split(3):
        assert_close(share, planted / copies, rtol=1e-3, atol=1e-4)


def test_a_strength_at_which_the_system_has_no_solution_is_passed_over() -> None:
    """An indefinite matrix, as rounding makes them: only the stronger strengths make it positive definite."""
    train = Normal(torch.tensor([[1.0, 3.0], [3.0, 1.0]]).double(), torch.ones(2, 1).double(), 2.0)
    held = Normal(torch.eye(2).double(), torch.ones(2, 1).double(), 2.0)
    assert train.solve(min(STRENGTHS)) is None and train.factor(min(STRENGTHS)) is None
    found = choose(train, held)
    assert found is not None
    assert found.strength == 10.0
    assert math.isfinite(found.error) and bool(found.solution.isfinite().all())
    assert choose(Normal(-torch.eye(2).double(), torch.ones(2, 1).double(), 2.0), held) is None


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems of more than 4 features are in float32, and Grams are summed 3 columns at a time."""
    monkeypatch.setattr(ridge, "DOUBLE_FEATURES", 4)
    monkeypatch.setattr(ridge, "_COLUMNS", 3)
    monkeypatch.setattr(ridge, "_LEADING", 5)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-5])
def test_float32_solves_what_float64_does(strength: float) -> None:
    p = torch.randn(200, 40, generator=seeded(0)) * torch.logspace(0, -2, 40)
    targets = torch.randn(200, OUTPUTS, generator=seeded(1))
    sums = dense(p, targets)
    assert sums.gram.dtype == torch.float32
    exact = Normal((p.T @ p).double(), (p.T @ targets).double())
    found, wanted = solved(sums, strength), solved(exact, strength)
    assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.usefixtures("small_limits")
@given(sizes, seeds)
def test_sums_in_float32_are_those_of_all_rows(sizes: list[int], seed: int) -> None:
    parts, targets, weights = random_rows(sizes, 30, seed)
    sums = empty(sum(sizes))
    add(sums, [part.float() for part in parts], targets.float(), weights.float())
    p = torch.cat(parts, dim=1)
    for found, wanted in ((sums.whole, (p * weights[:, None]).T @ p), (sums.cross, (p * weights[:, None]).T @ targets)):
        assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 30.0])
def test_the_search_of_a_large_system_finds_a_best_strength(noise: float) -> None:
    generator = seeded(3)
    p = torch.randn(90, 30, generator=generator)
    targets = p @ torch.randn(30, OUTPUTS, generator=generator) + noise * torch.randn(90, OUTPUTS, generator=generator)
    train, held = dense(p[:60], targets[:60]), dense(p[60:], targets[60:])
    found = choose(train, held)
    errors = [held.error(solved(train, strength)) for strength in STRENGTHS]
    if found is None:
        assert min(errors) >= held.energy
        return
    at = STRENGTHS.index(found.strength)
    assert found.error == pytest.approx(errors[at] / held.energy, rel=1e-3, abs=1e-6)
    assert errors[at] <= min(errors[max(at - 1, 0) : at + 2]) + 1e-6 * held.energy


@given(st.integers(1, 9), seeds)
def test_two_factors_share_one_matrix(features: int, seed: int) -> None:
    a, b = (dense(problem(20, features, s)[0], torch.zeros(20, OUTPUTS).double()) for s in (seed, seed + 1))
    right = problem(features, OUTPUTS, seed)[0]
    first, second = a.factor(0.1), b.factor(0.1)
    assert first is not None and second is not None
    both = Factors.of(first.clone(), second.clone())
    assert both.packed.shape == first.shape
    assert_close(both.solve_first(right), torch.cholesky_solve(right, first))
    assert_close(both.solve_second(right), torch.cholesky_solve(right, second))


def test_a_choice_tells_the_error_over_that_of_zero() -> None:
    p, planted = problem(80, 5, seed=0)
    train, held = dense(p[:60], p[:60] @ planted), dense(p[60:], p[60:] @ planted)
    found = choose(train, held)
    assert isinstance(found, Choice)
    assert found.error == pytest.approx(held.error(found.solution) / held.energy, abs=1e-12)
