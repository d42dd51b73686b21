"""Scales fitted to a whole mixture, and against their normal equations."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_pico
from swiglu import seeded
from torch import Tensor, nn
from torch.testing import assert_close

from ditmoe_cli.compression.repair.rescale import normal_equations, rescale, survivor_scales
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.moe import SparseMoE


@pytest.fixture
def mixture() -> SparseMoE:
    moe = make_pico(sampler="rf", in_channels=1).model().blocks[0].moe
    assert isinstance(moe, SparseMoE)
    return moe


@pytest.fixture
def tokens(mixture: SparseMoE) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, mixture.gate.weight.shape[1], generator=generator)
    return Tokens(inputs, torch.rand(400, generator=generator), torch.arange(400) % 8 == 7)


def test_factors_are_found_again(mixture: SparseMoE, tokens: Tokens) -> None:
    changed = copy.deepcopy(mixture)
    factors = [0.5, 1.0, 3.0, 0.1]
    for expert, factor in zip(changed.experts, factors, strict=False):
        expert.down_proj.weight = nn.Parameter(expert.down_proj.weight * factor, requires_grad=False)
    with torch.inference_mode():
        assert rescale(mixture, changed, tokens) < 1e-6
    for expert, wanted in zip(changed.experts, mixture.experts, strict=True):
        torch.testing.assert_close(expert.down_proj.weight, wanted.down_proj.weight, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_bettered_is_left_alone(mixture: SparseMoE, tokens: Tokens) -> None:
    changed = copy.deepcopy(mixture)
    with torch.inference_mode():
        assert rescale(mixture, changed, tokens) == 1.0
    for expert, wanted in zip(changed.experts, mixture.experts, strict=True):
        torch.testing.assert_close(expert.down_proj.weight, wanted.down_proj.weight, rtol=1e-6, atol=0)


def test_an_expert_that_no_token_reaches_keeps_its_size(mixture: SparseMoE, tokens: Tokens) -> None:
    chosen = mixture.gate(tokens.inputs).experts
    quiet = Tokens(*(part[~(chosen == 0).any(dim=1)] for part in (tokens.inputs, tokens.weights, tokens.held)))
    changed = copy.deepcopy(mixture)
    before = changed.experts[0].down_proj.weight.clone()
    changed.experts[1].down_proj.weight.mul_(0.5)
    with torch.inference_mode():
        rescale(mixture, changed, quiet)
    torch.testing.assert_close(changed.experts[0].down_proj.weight, before, rtol=1e-4, atol=0)


# their normal equations

TOKENS, WIDTH, SURVIVORS = 30, 7, 4


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


WANTED, WEIGHTS = draws(TOKENS, WIDTH, seed=0), torch.rand(TOKENS, generator=seeded(1))
PARTS = draws(SURVIVORS, TOKENS, WIDTH, seed=2)


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
