"""Neurons: energies by their definition, and experts of fewer of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import neurons_of, outputs_of, random_expert, seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.algebra.neurons import best_neurons, energies, narrowed

HIDDEN, WIDTH, TOKENS = 6, 10, 40

# few different values, so that ties are common
pools = st.lists(
    st.lists(st.integers(0, 6), min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_energy_follows_its_definition(alpha: float) -> None:
    expert = random_expert(HIDDEN, WIDTH, 0)
    gates = torch.rand(TOKENS, 1, generator=seeded(1))
    gamma = torch.randn(5, HIDDEN, generator=seeded(2))
    a = gates * neurons_of(expert, torch.randn(TOKENS, HIDDEN, generator=seeded(3)))
    found = energies(expert.down, a.square().sum(0), a.square().amax(0), gamma.square().mean(0), alpha)
    for i in range(WIDTH):
        column = sum(float(gamma[:, h].square().mean() * expert.down[h, i] ** 2) for h in range(HIDDEN))
        activity = (1 - alpha) * float((a[:, i] ** 2).sum()) + alpha * float((a[:, i] ** 2).max())
        assert float(found[i]) == pytest.approx(column * activity, rel=1e-5)


def test_energy_is_the_error_of_removing_a_neuron() -> None:
    # with α = 0 and independent γ, I_i = E_γ Σ_t ‖γ ⊙ g (f - f without i)‖²
    expert, inputs = random_expert(HIDDEN, WIDTH, 0), torch.randn(TOKENS, HIDDEN, generator=seeded(1))
    gates, gamma = torch.rand(TOKENS, 1, generator=seeded(2)), torch.randn(HIDDEN, generator=seeded(3))
    a = gates * neurons_of(expert, inputs)
    found = energies(expert.down, a.square().sum(0), a.square().amax(0), gamma.square(), 0.0)
    for i in range(WIDTH):
        rest = narrowed(expert, [j for j in range(WIDTH) if j != i])
        lost = gamma * gates * (outputs_of(expert, inputs) - outputs_of(rest, inputs))
        assert float(found[i]) == pytest.approx(float(lost.square().sum()), rel=1e-4)


@given(st.sets(st.integers(0, WIDTH - 1), min_size=1).map(sorted))
def test_a_narrowed_expert_is_the_sum_of_its_neurons(neurons: list[int]) -> None:
    expert, inputs = random_expert(HIDDEN, WIDTH, 0), torch.randn(TOKENS, HIDDEN, generator=seeded(1))
    found = narrowed(expert, neurons)
    assert found.gate.shape == found.up.shape == (len(neurons), HIDDEN) == tuple(reversed(found.down.shape))
    mask = torch.zeros(WIDTH)
    mask[neurons] = 1
    assert_close(outputs_of(found, inputs), (neurons_of(expert, inputs) * mask) @ expert.down.T, rtol=1e-4, atol=1e-4)


@given(pools, st.integers(1, 30))
def test_the_best_neurons_are_ascending_and_ties_fall_to_the_lower_number(pool: list[Tensor], width: int) -> None:
    for each in pool:
        by_hand = sorted(sorted(range(len(each)), key=lambda i: (-float(each[i]), i))[:width])
        assert best_neurons(each, width).tolist() == by_hand
