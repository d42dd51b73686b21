"""Orders in which neurons go: against least squares, brute force over single steps, and Grams that are degenerate."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.compression.algebra import elimination
from ditmoe_cli.compression.algebra.elimination import RIDGE, Elimination, eliminate

TINY = torch.finfo(torch.float32).tiny


def random_case(neurons: int, seed: int, tokens: int = 0, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """A Gram of correlated activations, and rows of values."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(tokens or 4 * neurons + 3, neurons, generator=generator)
    phi = phi @ (torch.eye(neurons) + 0.4 * torch.randn(neurons, neurons, generator=generator))
    return phi.T @ phi, torch.randn(neurons, outputs, generator=generator)


def regular(gram: Tensor) -> Tensor:
    """The Gram whose quadratic form errors are of, in float64."""
    gram = gram.double()
    return gram + RIDGE * gram.diagonal().mean().clamp_min(TINY) * torch.eye(len(gram)).double()


def ridge_price(gram: Tensor, values: Tensor) -> float:
    """What all rows together cost by the ridge alone: what costs nothing without it costs less."""
    return float(RIDGE * gram.diagonal().mean() * values.square().sum())


def refitted(gram: Tensor, values: Tensor, kept: Tensor) -> tuple[float, Tensor]:
    """The least error tr (V - W)ᵀ G (V - W) of rows V that are 0 but for the `kept` ones, and these rows."""
    whole, values = regular(gram), values.double()
    best = torch.zeros_like(values)
    if len(kept):
        best[kept] = torch.linalg.solve(whole[kept][:, kept], whole[kept] @ values)
    left = values - best
    return float((left * (whole @ left)).sum()), best


def assert_consistent(found: Elimination, neurons: int) -> None:
    assert torch.equal(found.order.sort().values, torch.arange(neurons))
    assert len(found.errors) == len(found.energies) == neurons + 1
    assert found.errors.isfinite().all() and found.energies.isfinite().all()
    assert found.errors[-1] == 0 and (found.errors.diff() <= 0).all(), "more neurons, never more error"


@given(neurons=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_errors_are_those_of_least_squares_on_the_neurons_that_are_left(neurons: int, seed: int) -> None:
    gram, values = random_case(neurons, seed)
    found = eliminate(gram, values)
    assert_consistent(found, neurons)
    for width in range(neurons + 1):
        expected, rows = refitted(gram, values, found.order[:width])
        assert float(found.errors[width]) == pytest.approx(expected, rel=1e-6, abs=1e-6 * float(found.errors[0]))
        energy = float((rows.square().sum(dim=1) * gram.diagonal().double()).sum())
        assert float(found.energies[width]) == pytest.approx(energy, rel=1e-6, abs=1e-6 * float(found.energies[-1]))


@given(neurons=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_each_step_takes_the_neuron_whose_loss_costs_least(neurons: int, seed: int) -> None:
    """The cost of each neuron by fitting anew without it, and by ‖v‖² / (G⁻¹)_jj."""
    gram, values = random_case(neurons, seed)
    found = eliminate(gram, values)
    for width in range(neurons, 0, -1):
        kept = found.order[:width]
        before, rows = refitted(gram, values, kept)
        without = [refitted(gram, values, kept[kept != neuron])[0] - before for neuron in kept.tolist()]
        assert without[-1] <= min(without) * (1 + 1e-9), "the last of those that are kept goes next"
        inverse = torch.linalg.inv(regular(gram)[kept][:, kept])
        costs = rows[kept].square().sum(dim=1) / inverse.diagonal()
        assert costs.tolist() == pytest.approx(without, rel=1e-6)


def test_two_neurons_by_hand() -> None:
    """G = diag(4, 1), v = 1 and 3: the costs are 4 and 9, so neuron 0 goes first."""
    found = eliminate(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([[1.0], [3.0]]))
    assert found.order.tolist() == [1, 0]
    assert found.errors.tolist() == pytest.approx([13.0, 4.0, 0.0], rel=1e-3)
    assert found.energies.tolist() == pytest.approx([0.0, 9.0, 13.0], rel=1e-3)


def test_the_other_takes_over_what_it_shares() -> None:
    """φ_1 = φ_0 + an independent part of power 1/4: without neuron 1 its row adds to neuron 0's."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.25]])
    found = eliminate(gram, torch.tensor([[2.0], [1.0]]))
    assert found.order.tolist() == [0, 1]
    assert found.errors.tolist()[1:] == pytest.approx([0.25, 0.0], rel=5e-3)
    assert found.energies.tolist() == pytest.approx([0.0, 9.0, 4 + 1.25], rel=5e-3)


def test_a_duplicate_goes_first_at_no_cost() -> None:
    gram, values = random_case(6, 1)
    twice = [0, 1, 2, 3, 4, 5, 3]
    found = eliminate(gram[twice][:, twice], values[twice])
    assert int(found.order[-1]) in (3, 6)
    step = float(found.errors[-2])
    assert 0 <= step < ridge_price(gram, values)
    kept_values = values.clone()
    kept_values[3] *= 2
    alone = eliminate(gram, kept_values)
    assert found.errors[:-1].tolist() == pytest.approx(alone.errors.tolist(), rel=0.01, abs=2 * step)


def test_neurons_without_output_or_activation_go_first_at_no_cost() -> None:
    gram, values = random_case(8, 2)
    values[2], gram[5], gram[:, 5] = 0, 0, 0
    found = eliminate(gram, values)
    assert set(found.order[-2:].tolist()) == {2, 5}
    assert float(found.errors[-2]) == 0 and float(found.errors[-3]) < ridge_price(gram, values)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_scales_and_ranks_that_no_inverse_takes(scale: float, tokens: int) -> None:
    """A Gram of fewer tokens than neurons, of 0, and of huge numbers."""
    gram, values = random_case(12, 3, tokens)
    found = eliminate(gram * scale, values)
    assert_consistent(found, 12)
    power = regular(gram).diagonal() * values.double().square().sum(dim=1)
    assert float(found.errors[0]) <= 12 * scale * float(power.sum()) + 1e-30
    if scale and tokens < 12:  # as many neurons as tokens reproduce them all, but for the ridge
        assert float(found.errors[tokens]) < 0.05 * float(found.errors[0])


def test_errors_scale_with_the_gram_and_the_square_of_the_values() -> None:
    gram, values = random_case(10, 4)
    found, scaled = eliminate(gram, values), eliminate(4 * gram, -2 * values)
    assert torch.equal(scaled.order, found.order)
    assert torch.equal(scaled.errors, 16 * found.errors) and torch.equal(scaled.energies, 16 * found.energies)


def test_inputs_stay_as_they_are() -> None:
    gram, values = random_case(7, 5)
    copies = gram.clone(), values.clone()
    eliminate(gram, values)
    assert torch.equal(gram, copies[0]) and torch.equal(values, copies[1])


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_neurons_that_go_in_rounds_cost_what_they_cost_one_by_one(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are those of least squares at every width; energies at the ends of rounds, straight lines in between."""
    neurons = 40
    gram, values = random_case(neurons, 6)
    one_by_one = eliminate(gram, values)
    monkeypatch.setattr(elimination, "_ROUNDS", neurons // at_once)
    found = eliminate(gram, values)
    assert_consistent(found, neurons)
    energies = []
    for width in range(neurons + 1):
        expected, rows = refitted(gram, values, found.order[:width])
        assert float(found.errors[width]) == pytest.approx(expected, rel=1e-6, abs=1e-6 * float(found.errors[0]))
        energies.append(float((rows.square().sum(dim=1) * gram.diagonal().double()).sum()))
    ends = range(0, neurons + 1, at_once)
    assert [float(found.energies[end]) for end in ends] == pytest.approx([energies[end] for end in ends], rel=1e-6)
    for below, above in itertools.pairwise(ends):
        line = torch.linspace(float(found.energies[below]), float(found.energies[above]), at_once + 1)
        assert found.energies[below : above + 1].tolist() == pytest.approx(line.tolist(), rel=1e-5)
    middle = neurons // 2
    assert float(found.errors[middle]) <= 1.25 * float(one_by_one.errors[middle])
