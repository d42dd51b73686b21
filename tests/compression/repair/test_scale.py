"""Least-squares scales against their normal equations, and where tokens determine nothing."""

from __future__ import annotations

import pytest
import torch
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.repair.scale import normal_equations, survivor_scales

TOKENS, WIDTH, SURVIVORS = 30, 7, 4


def tokens(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


WANTED, WEIGHTS = tokens(TOKENS, WIDTH, seed=0), torch.rand(TOKENS, generator=seeded(1))
PARTS = tokens(SURVIVORS, TOKENS, WIDTH, seed=2)


def error(scales: Tensor, wanted: Tensor = WANTED, parts: Tensor = PARTS) -> float:
    left = wanted.double() - torch.einsum("k,ktd->td", scales.double(), parts.double())
    return float(WEIGHTS.double() @ left.square().sum(dim=1))


def test_scales_of_survivors_are_recovered() -> None:
    true = torch.tensor([0.5, 1.0, 2.0, -0.3])
    wanted = torch.einsum("k,ktd->td", true, PARTS)
    found = survivor_scales(normal_equations(wanted, PARTS, WEIGHTS))
    assert_close(found.float(), true, rtol=1e-4, atol=1e-4)


def test_scales_of_survivors_are_least_squares() -> None:
    root = WEIGHTS.sqrt()[:, None]
    system = (PARTS * root).flatten(1).T.double()
    expected = torch.linalg.lstsq(system, (WANTED * root).flatten()[:, None].double()).solution.squeeze(1)
    found = survivor_scales(normal_equations(WANTED, PARTS, WEIGHTS), ridge=0.0)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert error(found) <= min(error(torch.ones(SURVIVORS)), error(torch.zeros(SURVIVORS)))


def test_sums_of_batches_add_up() -> None:
    halves = [slice(0, 11), slice(11, None)]
    first, second = (normal_equations(WANTED[rows], PARTS[:, rows], WEIGHTS[rows]) for rows in halves)
    whole = normal_equations(WANTED, PARTS, WEIGHTS)
    assert_close((first + second).gram, whole.gram)
    assert_close((first + second).moments, whole.moments)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_what_tokens_do_not_determine_stays_at_one(ridge: float) -> None:
    twins = torch.stack([PARTS[0], PARTS[0], torch.zeros_like(PARTS[0])])
    found = survivor_scales(normal_equations(3 * PARTS[0], twins, WEIGHTS), ridge)
    # the twins share the factor of 3 evenly, the unused survivor keeps its 1
    assert_close(found.float(), torch.tensor([1.5, 1.5, 1.0]), rtol=1e-4, atol=1e-4)
    nothing = survivor_scales(normal_equations(WANTED, torch.zeros_like(PARTS), WEIGHTS), ridge)
    assert torch.equal(nothing, torch.ones(SURVIVORS, dtype=torch.float64))
