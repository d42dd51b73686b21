"""CAMERA-P: energies by their definition, and which neurons stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import neurons_of, outputs_of, random_expert, seeded
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression.prune.camera import energies, kept_neurons, narrowed, uniform_neurons
from ditmoe_cli.errors import InfeasibleError

HIDDEN, WIDTH, TOKENS = 6, 10, 40

# few different values, so that ties are common
pools = st.lists(
    st.lists(st.integers(0, 6), min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    min_size=1,
    max_size=4,
)
seldom_equal = st.integers(0, 2**31).map(lambda seed: torch.rand(3, 8, generator=seeded(seed)).square())


def held(pool: list[Tensor], kept: tuple[tuple[int, ...], ...]) -> float:
    return sum(float(each[list(neurons)].sum()) for each, neurons in zip(pool, kept, strict=True))


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


@given(pools, st.integers(0, 90), st.integers(1, 6), st.integers(1, 8))
def test_kept_neurons_respect_budget_multiple_and_least(
    pool: list[Tensor], total: int, multiple: int, least: int
) -> None:
    needed = sum(min(-(-least // multiple) * multiple, len(each)) for each in pool)
    if total < needed:
        with pytest.raises(InfeasibleError, match=f"{total} neurons .* need {needed} "):
            kept_neurons(pool, total, multiple, least)
        return
    kept = kept_neurons(pool, total, multiple, least)
    assert sum(map(len, kept)) <= total
    for each, neurons in zip(pool, kept, strict=True):
        assert neurons == tuple(sorted(set(neurons)))
        assert len(neurons) % multiple == 0 or len(neurons) == len(each)
        assert len(neurons) >= min(least, len(each))
    assert kept == uniform_of_each(pool, [len(neurons) for neurons in kept])
    # nothing that would fit is left out
    room = total - sum(map(len, kept))
    for each, neurons in zip(pool, kept, strict=True):
        assert len(neurons) == len(each) or min(multiple, len(each) - len(neurons)) > room


def uniform_of_each(pool: list[Tensor], widths: list[int]) -> tuple[tuple[int, ...], ...]:
    """The best neurons of each expert, ties to the lower number, by plain sorting."""
    return tuple(
        tuple(sorted(sorted(range(len(each)), key=lambda i: (-float(each[i]), i))[:width]))
        for each, width in zip(pool, widths, strict=True)
    )


@given(seldom_equal, st.integers(6, 24), st.sampled_from([1, 2, 4]))
def test_no_other_widths_hold_more_energy(rows: Tensor, total: int, multiple: int) -> None:
    pool = list(rows)
    if total < len(pool) * multiple:
        total = len(pool) * multiple
    best = max(
        held(pool, uniform_of_each(pool, list(widths)))
        for widths in itertools.product(range(multiple, 9, multiple), repeat=len(pool))
        if sum(widths) <= total
    )
    assert held(pool, kept_neurons(pool, total, multiple, multiple)) == pytest.approx(best, rel=1e-6)


@given(pools)
def test_a_multiple_of_one_pools_neurons_as_the_paper_does(pool: list[Tensor]) -> None:
    pool = [torch.cat([each, torch.tensor([100.0])]) for each in pool]  # so that the pool's best are in every expert
    total = (sum(map(len, pool)) + len(pool)) // 2
    kept = kept_neurons(pool, total, 1, 1)
    assert held(pool, kept) == float(torch.cat(pool).sort(descending=True).values[:total].sum())


def test_energy_decides_between_experts_and_ties_fall_to_the_lower_number() -> None:
    loud, quiet = torch.tensor([9.0, 9.0, 8.0, 8.0, 1.0, 1.0]), torch.tensor([2.0, 7.0, 2.0, 2.0])
    assert kept_neurons([loud, quiet], 6, 2, 2) == ((0, 1, 2, 3), (0, 1))
    assert kept_neurons([torch.ones(4), torch.ones(4)], 6, 2, 2) == ((0, 1, 2, 3), (0, 1))


def test_a_last_small_group_waits_for_the_one_before_it() -> None:
    # 5 neurons in groups of 2, 2, 1: with room for 3 the single last one must not make a width of 3
    assert kept_neurons([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 3, 2, 2) == ((0, 1),)
    assert kept_neurons([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 5, 2, 2) == ((0, 1, 2, 3, 4),)


@given(pools, st.integers(0, 20))
def test_uniform_neurons_are_the_best_of_each_expert(pool: list[Tensor], width: int) -> None:
    assert uniform_neurons(pool, width) == uniform_of_each(pool, [width] * len(pool))
