"""Steps of weights: rates relative to sizes, groups, matrices beside others, moments that a run goes on with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditmoe_cli.compression.training import weight_steps
from ditmoe_cli.compression.training.weight_steps import LEAST_SIZE, MATRIX_RATE, Stepping, WeightSteps


def leaves(**weights: Tensor) -> dict[str, Tensor]:
    return {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def give_gradients(weights: dict[str, Tensor], seed: int) -> None:
    for number, weight in enumerate(weights.values()):
        weight.grad = random(*weight.shape, seed=seed * 100 + number)


@pytest.mark.parametrize(
    ("value", "given", "size"), [(0.0, None, LEAST_SIZE), (0.0043, None, 2.0**-8), (1.0, None, 1.0), (0.0, 0.98, 1.0)]
)
def test_rates_are_relative_to_the_sizes_of_weights(value: float, given: float | None, size: float) -> None:
    """AdamW's first step is the sign of the gradient times the rate, whatever the gradient."""
    weights = leaves(w=torch.full((4,), value))
    give_gradients(weights, 1)
    WeightSteps(weights, Stepping({} if given is None else {"w": given})).step(0.01)
    torch.testing.assert_close((weights["w"].detach() - value).abs(), torch.full((4,), 0.01 * size), rtol=1e-3, atol=0)


def test_no_group_is_so_large_that_its_temporaries_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_steps, "_AT_ONCE", 10)
    weights = {str(n): torch.ones(n) for n in (4, 6, 1, 12, 3)}
    groups = weight_steps._groups(weights, dict.fromkeys(weights, 1.0))
    assert [[len(weight) for weight in group["params"]] for group in groups] == [[4, 6], [1], [12], [3]]


def test_groups_of_one_size_step_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = (leaves(a=random(3), b=random(2, 2), c=random(5)) for _ in range(2))
    together = WeightSteps(whole)
    monkeypatch.setattr(weight_steps, "_AT_ONCE", 1)
    apart = WeightSteps(parted)
    for seed in range(3):
        for weights, steps in ((whole, together), (parted, apart)):
            give_gradients(weights, seed)
            steps.step(0.01)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_matrices_step_otherwise_than_all_others() -> None:
    weights = leaves(matrix=random(32, 16), other=random(32, 16))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    give_gradients(weights, 1)
    WeightSteps(weights, Stepping(matrices={"matrix": 1})).step(0.01)
    changes = {name: before[name] - weight.detach() for name, weight in weights.items()}
    values = torch.linalg.svdvals(changes["matrix"]) / (MATRIX_RATE * 0.01 * 0.2 * 32**0.5)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    torch.testing.assert_close(changes["other"].abs(), torch.full((32, 16), 0.01), rtol=1e-3, atol=0)


def test_moments_go_on_to_the_same_bits() -> None:
    stepping = Stepping(matrices={"matrix": 2})
    whole, halved = (leaves(matrix=random(32, 16), vector=random(7)) for _ in range(2))
    straight, first = WeightSteps(whole, stepping), WeightSteps(halved, stepping)
    for seed in range(4):
        if seed == 2:
            moments = {of: {n: each.clone() for n, each in some.items()} for of, some in first.moments().items()}
            assert set(moments["first"]) == {"matrix", "vector"} and set(moments["second"]) == {"vector"}
            first = WeightSteps(halved, stepping)
            first.go_on(2, moments)
        for weights, steps in ((whole, straight), (halved, first)):
            give_gradients(weights, seed)
            steps.step(0.01)
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
