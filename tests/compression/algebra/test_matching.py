"""Neurons are matched as well as any permutation can, and to the dominant expert."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swiglu import outputs_of, random_expert, seeded

from ditmoe_cli.compression.algebra.matching import aligned, matching
from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights


def agreement(a: ExpertWeights, b: ExpertWeights) -> float:
    return float((a.gate * b.gate).sum() + (a.up * b.up).sum() + (a.down * b.down).sum())


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 5))
def test_no_permutation_agrees_more(seed: int, width: int) -> None:
    reference, expert = random_expert(3, width, seed), random_expert(3, width, seed + 1)
    best = max(agreement(reference, narrowed(expert, order)) for order in itertools.permutations(range(width)))
    assert agreement(reference, narrowed(expert, matching(reference, expert))) == pytest.approx(best, abs=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40))
def test_a_permutation_is_undone_to_the_bit(seed: int, width: int) -> None:
    reference = random_expert(5, width, seed)
    order = torch.randperm(width, generator=seeded(seed)).tolist()
    back = aligned([reference, narrowed(reference, order)], [0.9, 0.1])[1]
    assert all(torch.equal(getattr(back, name), getattr(reference, name)) for name in ("gate", "up", "down"))


def test_alignment_leaves_functions_and_the_dominant_expert_alone() -> None:
    experts = [random_expert(4, 6, seed) for seed in range(3)]
    inputs = torch.randn(9, 4, generator=seeded(0))
    found = aligned(experts, [0.2, 0.5, 0.3])
    assert all(torch.equal(getattr(found[1], name), getattr(experts[1], name)) for name in ("gate", "up", "down"))
    for before, after in zip(experts, found, strict=True):
        torch.testing.assert_close(outputs_of(after, inputs), outputs_of(before, inputs))


def test_each_of_the_three_matrices_tells_neurons_apart() -> None:
    width = 4
    for matrix in ("gate", "up", "down"):
        flat = {"gate": torch.ones(width, width), "up": torch.ones(width, width), "down": torch.ones(width, width)}
        reference = ExpertWeights(**{**flat, matrix: torch.eye(width)})
        assert matching(reference, narrowed(reference, [2, 0, 3, 1])) == [1, 3, 0, 2]


def test_large_weights_do_not_overflow() -> None:
    reference = random_expert(4, 6, 0)
    large = ExpertWeights(reference.gate * 1e6, reference.up * 1e6, reference.down * 1e6)
    assert matching(large, narrowed(large, [5, 4, 3, 2, 1, 0])) == [5, 4, 3, 2, 1, 0]


def test_widths_have_to_be_equal() -> None:
    with pytest.raises(BadInputError, match="experts of widths 4 and 6 cannot be merged"):
        matching(random_expert(3, 6, 0), random_expert(3, 4, 0))
