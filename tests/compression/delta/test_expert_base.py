"""Experts as a mean and differences: the mean by its formula, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import outputs_of, random_expert, seeded
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.compression.delta.expert_base import base_of, difference
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights

HIDDEN, WIDTH, COUNT = 6, 9, 3
EXPERTS = tuple(random_expert(HIDDEN, WIDTH, seed) for seed in range(COUNT))
INPUTS = torch.randn(20, HIDDEN, generator=seeded(9))

frequencies = st.lists(st.floats(0, 1000), min_size=COUNT, max_size=COUNT)
orders = st.lists(st.permutations(range(WIDTH)), min_size=COUNT, max_size=COUNT)


def matrices(expert: ExpertWeights) -> tuple[torch.Tensor, ...]:
    return expert.gate, expert.up, expert.down


@given(frequencies, orders)
def test_base_plus_difference_computes_what_the_expert_does(alphas: list[float], order: list[list[int]]) -> None:
    base = base_of(EXPERTS, alphas, order)
    for expert, neurons in zip(EXPERTS, order, strict=True):
        delta = difference(expert, base, neurons)
        restored = ExpertWeights(base.gate + delta.gate, base.up + delta.up, base.down + delta.down)
        assert_close(outputs_of(restored, INPUTS), outputs_of(expert, INPUTS), rtol=1e-3, atol=1e-3)


@given(frequencies)
def test_the_base_is_the_frequency_mean_expert(alphas: list[float]) -> None:
    total = sum(alphas)
    shares = [alpha / total if total else 1 / COUNT for alpha in alphas]
    for i, found in enumerate(matrices(base_of(EXPERTS, alphas, [range(WIDTH)] * COUNT))):
        expected = sum(share * matrices(expert)[i] for share, expert in zip(shares, EXPERTS, strict=True))
        assert found.dtype == torch.float32
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_alignment_undoes_a_reordering_of_neurons() -> None:
    order = torch.randperm(WIDTH, generator=seeded(0)).tolist()
    shuffled = narrowed(EXPERTS[0], order)
    back = torch.tensor(order).argsort()
    base = base_of([EXPERTS[0], shuffled], [1.0, 1.0], [range(WIDTH), back])
    for found, expected in zip(matrices(base), matrices(EXPERTS[0]), strict=True):
        assert_close(found, expected)


def test_experts_of_different_widths_have_no_mean() -> None:
    with pytest.raises(BadInputError, match="experts of widths 4 and 9"):
        base_of([EXPERTS[0], random_expert(HIDDEN, 4, 0)], [1.0, 1.0], [range(WIDTH), range(4)])
