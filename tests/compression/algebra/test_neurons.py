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

from ditmoe_cli.compression.algebra.neurons import best_neurons, energies, narrowed, pooled_widths
from ditmoe_cli.errors import InfeasibleError

HIDDEN, WIDTH, TOKENS = 6, 10, 40

# few different values, so that ties are common
pools = st.lists(
    st.lists(st.integers(0, 6), min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    min_size=1,
    max_size=4,
)
seldom_equal = st.integers(0, 2**31).map(lambda seed: torch.rand(3, 8, generator=seeded(seed)).square())


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


@given(pools, st.integers(0, 90), st.integers(1, 6), st.data())
def test_pooled_widths_respect_budget_multiple_and_least(
    pool: list[Tensor], total: int, multiple: int, data: st.DataObject
) -> None:
    least = [data.draw(st.integers(0, 8)) for _ in pool]
    needed = sum(min(-(-each // multiple) * multiple, len(own)) for own, each in zip(pool, least, strict=True))
    if total < needed:
        with pytest.raises(InfeasibleError, match=f"{total} neurons .* need {needed} "):
            pooled_widths(pool, total, multiple, least)
        return
    widths = pooled_widths(pool, total, multiple, least)
    assert sum(widths) <= total
    for each, width, floor in zip(pool, widths, least, strict=True):
        assert width % multiple == 0 or width == len(each)
        assert width >= min(floor, len(each))
    # nothing that would fit is left out
    room = total - sum(widths)
    for each, width in zip(pool, widths, strict=True):
        assert width == len(each) or min(multiple, len(each) - width) > room


def held(pool: list[Tensor], widths: tuple[int, ...]) -> float:
    """The energy of each expert's best neurons, by plain sorting."""
    return sum(sum(sorted(each.tolist(), reverse=True)[:width]) for each, width in zip(pool, widths, strict=True))


@given(seldom_equal, st.integers(0, 24), st.sampled_from([1, 2, 4]), st.booleans())
def test_no_other_widths_hold_more_energy(rows: Tensor, total: int, multiple: int, may_go: bool) -> None:
    pool, floor = list(rows), 0 if may_go else multiple
    total = max(total, len(pool) * floor)
    best = max(
        held(pool, widths)
        for widths in itertools.product(range(floor, 9, multiple), repeat=len(pool))
        if sum(widths) <= total
    )
    assert held(pool, pooled_widths(pool, total, multiple, [floor] * len(pool))) == pytest.approx(best, rel=1e-6)


@given(pools)
def test_a_multiple_of_one_pools_neurons_as_the_paper_does(pool: list[Tensor]) -> None:
    total = sum(map(len, pool)) // 2
    widths = pooled_widths(pool, total, 1, [0] * len(pool))
    assert held(pool, widths) == float(torch.cat(pool).sort(descending=True).values[:total].sum())


def test_energy_decides_between_experts_and_ties_fall_to_the_lower_number() -> None:
    loud, quiet = torch.tensor([9.0, 9.0, 8.0, 8.0, 1.0, 1.0]), torch.tensor([2.0, 7.0, 2.0, 2.0])
    assert pooled_widths([loud, quiet], 6, 2, [2, 2]) == (4, 2)
    assert pooled_widths([loud, quiet], 4, 2, [0, 0]) == (4, 0)
    assert pooled_widths([torch.ones(4), torch.ones(4)], 6, 2, [2, 2]) == (4, 2)


def test_a_last_small_group_waits_for_the_one_before_it() -> None:
    # 5 neurons in groups of 2, 2, 1: with room for 3 the single last one must not make a width of 3
    assert pooled_widths([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 3, 2, [2]) == (2,)
    assert pooled_widths([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])], 5, 2, [2]) == (5,)


@given(pools, st.integers(1, 30))
def test_the_best_neurons_are_ascending_and_ties_fall_to_the_lower_number(pool: list[Tensor], width: int) -> None:
    for each in pool:
        by_hand = sorted(sorted(range(len(each)), key=lambda i: (-float(each[i]), i))[:width])
        assert best_neurons(each, width).tolist() == by_hand
