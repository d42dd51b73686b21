"""Constants in place of dropped experts: optimal, per bin only where that pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.repair.constants import bin_means, replacement_constants, weighted_mean

WIDTH, BINS = 5, 4


def gated_error(outputs: Tensor, weights: Tensor, predicted: Tensor) -> float:
    return float(weights @ (outputs - predicted).square().sum(dim=1))


def drawn(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, weights, bins and held-out tokens without any relation between them."""
    generator = seeded(seed)
    return (
        torch.randn(tokens, WIDTH, generator=generator),
        torch.rand(tokens, generator=generator).square(),
        torch.randint(BINS, (tokens,), generator=generator),
        torch.arange(tokens) % 4 == 0,
    )


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_no_other_constant_has_a_lower_gated_error(tokens: int, seed: int) -> None:
    outputs, weights, _, _ = drawn(tokens, seed)
    best = weighted_mean(outputs, weights)
    least = gated_error(outputs, weights, best)
    for axis in range(WIDTH):
        for step in (-0.1, 0.1):
            moved = best + step * torch.eye(WIDTH)[axis]
            assert gated_error(outputs, weights, moved) > least


@given(st.integers(0, 40), st.integers(0, 2**31))
def test_means_of_bins_by_plain_loops(tokens: int, seed: int) -> None:
    outputs, weights, bins, _ = drawn(tokens, seed)
    found = bin_means(outputs, weights, bins, BINS)
    for b in range(BINS):
        mine = bins == b
        rows = mine if bool(mine.any()) else torch.ones_like(mine)
        expected = (weights[rows, None] * outputs[rows]).sum(0) / weights[rows].sum() if tokens else torch.zeros(WIDTH)
        assert_close(found[b], expected, rtol=1e-4, atol=1e-5)


def test_bins_with_means_of_their_own_get_constants_of_their_own() -> None:
    outputs, weights, bins, held_out = drawn(400, 0)
    outputs = outputs + 3.0 * bins.unsqueeze(-1)
    found = replacement_constants(outputs, weights, bins, BINS, held_out)
    assert_close(found, bin_means(outputs, weights, bins, BINS), rtol=1e-4, atol=1e-4)
    assert_close(found.mean(dim=1), 3.0 * torch.arange(BINS).float(), atol=0.5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_bins_that_only_differ_by_chance_share_one_constant(seed: int) -> None:
    outputs, weights, bins, held_out = drawn(60, seed)
    found = replacement_constants(outputs, weights, bins, BINS, held_out)
    assert_close(found, weighted_mean(outputs, weights).expand(BINS, -1), rtol=1e-4, atol=1e-5)


def test_a_bin_without_tokens_gets_the_overall_constant() -> None:
    outputs, weights, bins, held_out = drawn(400, 0)
    bins = bins.clamp_max(BINS - 2)
    outputs = outputs + 3.0 * bins.unsqueeze(-1)
    found = replacement_constants(outputs, weights, bins, BINS, held_out)
    assert not torch.equal(found[0], found[1])
    assert_close(found[-1], weighted_mean(outputs, weights), rtol=1e-4, atol=1e-5)


def test_an_expert_that_was_never_used_becomes_zero() -> None:
    outputs, weights, bins, held_out = drawn(0, 0)
    nothing = replacement_constants(outputs, weights, bins, BINS, held_out)
    assert torch.equal(nothing, torch.zeros(BINS, WIDTH))
    outputs, weights, bins, held_out = drawn(20, 0)
    unweighted = replacement_constants(outputs, torch.zeros_like(weights), bins, BINS, held_out)
    assert torch.equal(unweighted, torch.zeros(BINS, WIDTH))


@pytest.mark.parametrize("all_held_out", [True, False])
def test_without_evidence_there_is_one_constant(all_held_out: bool) -> None:
    outputs, weights, bins, held_out = drawn(50, 0)
    found = replacement_constants(
        outputs + bins.unsqueeze(-1), weights, bins, BINS, torch.full_like(held_out, all_held_out)
    )
    assert torch.equal(found, found[:1].expand(BINS, -1))
