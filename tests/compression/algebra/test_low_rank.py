"""Linear stand-ins: exact where the expert is linear, optimal among maps of their rank, ridge at full rank."""

from __future__ import annotations

import pytest
import torch
from swiglu import outputs_of, random_expert, seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.low_rank import LinearMap, low_rank_map, weighted_mean

WIDTH, TOKENS, RANK, RIDGE = 12, 200, 3, 0.05

INPUTS = torch.randn(TOKENS, WIDTH, generator=seeded(0)) @ torch.randn(WIDTH, WIDTH, generator=seeded(1)) + 0.5
WEIGHTS = torch.rand(TOKENS, generator=seeded(2)).square()
OUTPUTS = outputs_of(random_expert(WIDTH, 16, 3), INPUTS / INPUTS.std())


def penalty(ridge: float = RIDGE) -> float:
    return ridge * float((WEIGHTS.double() @ INPUTS.double().square()).mean())


def objective(matrix: Tensor, constant: Tensor) -> float:
    """Σ ω ‖f - v - M u‖² + λ ‖M‖², M (out, in)."""
    left = OUTPUTS.double() - INPUTS.double() @ matrix.double().T - constant.double()
    return float(WEIGHTS.double() @ left.square().sum(dim=1) + penalty() * matrix.double().square().sum())


def mapped(found: LinearMap) -> Tensor:
    """f(u) of all inputs (T, D)."""
    return INPUTS @ found.down.T @ found.up.T + found.constant


def of(found: LinearMap) -> float:
    return objective(found.up.double() @ found.down.double(), found.constant)


def test_a_linear_expert_of_low_rank_is_recovered() -> None:
    true = torch.randn(WIDTH, RANK, generator=seeded(4)) @ torch.randn(RANK, WIDTH, generator=seeded(5))
    shift = torch.randn(WIDTH, generator=seeded(6))
    found = low_rank_map(INPUTS, INPUTS @ true.T + shift, WEIGHTS, RANK, ridge=1e-12)
    assert (found.up.shape, found.down.shape, found.constant.shape) == ((WIDTH, RANK), (RANK, WIDTH), (WIDTH,))
    assert_close(found.up @ found.down, true, rtol=1e-4, atol=1e-4)
    assert_close(found.constant, shift, rtol=1e-3, atol=1e-3)
    assert_close(mapped(found), INPUTS @ true.T + shift, rtol=1e-3, atol=1e-3)


def test_full_rank_is_ridge_regression() -> None:
    u, f, w = INPUTS.double(), OUTPUTS.double(), WEIGHTS.double()
    u_mean, f_mean = weighted_mean(u, w), weighted_mean(f, w)
    root = w.sqrt()[:, None]
    rows = torch.cat([root * (u - u_mean), penalty() ** 0.5 * torch.eye(WIDTH)])
    matrix = torch.linalg.lstsq(rows, torch.cat([root * (f - f_mean), torch.zeros(WIDTH, WIDTH)])).solution.T
    found = low_rank_map(INPUTS, OUTPUTS, WEIGHTS, WIDTH, RIDGE)
    assert_close(found.up @ found.down, matrix.float(), rtol=1e-4, atol=1e-4)
    assert_close(found.constant, (f_mean - matrix @ u_mean).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_no_map_of_the_same_rank_is_better(rank: int) -> None:
    found = low_rank_map(INPUTS, OUTPUTS, WEIGHTS, rank, RIDGE)
    least = of(found)
    # the ridge solution truncated by plain SVD has the same rank and disregards the inputs' metric
    full = low_rank_map(INPUTS, OUTPUTS, WEIGHTS, WIDTH, RIDGE)
    left, values, right = torch.linalg.svd((full.up @ full.down).double())
    plain = (left[:, :rank] * values[:rank]) @ right[:rank]
    shift = weighted_mean(OUTPUTS.double(), WEIGHTS) - plain @ weighted_mean(INPUTS.double(), WEIGHTS)
    assert least < objective(plain, shift)
    for seed in range(20):
        up = found.up + 0.02 * torch.randn(found.up.shape, generator=seeded(seed))
        down = found.down + 0.02 * torch.randn(found.down.shape, generator=seeded(seed + 100))
        assert least < of(LinearMap(up, down, found.constant))


def test_more_rank_is_never_worse_and_none_is_the_constant() -> None:
    maps = [low_rank_map(INPUTS, OUTPUTS, WEIGHTS, rank, RIDGE) for rank in range(WIDTH + 1)]
    errors = [of(each) for each in maps]
    assert errors == sorted(errors, reverse=True)
    assert maps[0].up.shape == (WIDTH, 0)
    assert_close(maps[0].constant, weighted_mean(OUTPUTS, WEIGHTS), rtol=1e-4, atol=1e-5)


def test_tokens_without_weight_do_not_count() -> None:
    half = WEIGHTS * (torch.arange(TOKENS) < TOKENS // 2)
    with_them = low_rank_map(INPUTS, OUTPUTS, half, RANK)
    without = low_rank_map(*(each[: TOKENS // 2] for each in (INPUTS, OUTPUTS, half)), rank=RANK)
    assert_close(mapped(with_them), mapped(without), rtol=1e-4, atol=1e-4)


def test_fewer_tokens_than_inputs_stay_bounded() -> None:
    few = low_rank_map(INPUTS[:4], OUTPUTS[:4], WEIGHTS[:4], WIDTH)
    assert float(mapped(few).abs().max()) < 50 * float(OUTPUTS.abs().max())


def test_an_expert_without_tokens_becomes_zero_and_one_with_a_single_input_its_output() -> None:
    nothing = low_rank_map(INPUTS[:0], OUTPUTS[:0], WEIGHTS[:0], RANK)
    assert torch.equal(mapped(nothing), torch.zeros_like(OUTPUTS))
    same = low_rank_map(INPUTS[:1].expand(9, -1), OUTPUTS[:1].expand(9, -1), WEIGHTS[:9], RANK)
    assert_close(mapped(same), OUTPUTS[:1].expand(TOKENS, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
def test_no_other_constant_has_a_lower_weighted_error(tokens: int) -> None:
    outputs, weights = OUTPUTS[:tokens].double(), WEIGHTS[:tokens].double()
    best = weighted_mean(outputs, weights)

    def error(constant: Tensor) -> float:
        return float(weights @ (outputs - constant).square().sum(dim=1))

    for step in (-0.1, 0.1):
        assert all(error(best + step * axis) > error(best) for axis in torch.eye(WIDTH))


def test_a_mean_without_weight_is_zero() -> None:
    assert bool((weighted_mean(OUTPUTS, torch.zeros(TOKENS)) == 0).all())
    assert bool((weighted_mean(OUTPUTS[:0], WEIGHTS[:0]) == 0).all())
