"""Steps of matrices: orthogonal factors, matrices stacked in one weight, and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditmoe_cli.compression.training import matrix_steps
from ditmoe_cli.compression.training.matrix_steps import MatrixSteps, SteppedMatrix, orthogonal


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (2, 64, 16)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_singular_vectors_stay_and_values_are_near_one(shape: tuple[int, ...], scale: float) -> None:
    matrices = random(*shape)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonal(scale * matrices) @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert float(values[s > 0.05 * s.amax()].min()) > 0.6 and float(values.max()) < 1.25
    assert float((found - torch.diag_embed(values)).abs().max()) < 1e-4


def test_a_matrix_without_a_gradient_does_not_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 16, 20)), torch.zeros(1, 16, 20))


def stepped(weights: dict[str, Tensor], counts: dict[str, int], workers: int = 1) -> dict[str, Tensor]:
    found = {name: weight.clone() for name, weight in weights.items()}
    steps = MatrixSteps({n: SteppedMatrix(w, torch.zeros_like(w), counts[n], 1.0) for n, w in found.items()}, workers)
    for seed in range(3):
        for number, weight in enumerate(found.values()):
            weight.grad = random(*weight.shape, seed=10 * seed + number)
        steps.step(0.1)
    return found


def test_stacked_matrices_step_as_they_do_alone() -> None:
    stacked = {"w": random(48, 20)}
    expected, alone = stepped(stacked, {"w": 3})["w"], []
    for part in range(3):
        weight = stacked["w"][16 * part : 16 * (part + 1)].clone()
        steps = MatrixSteps({"w": SteppedMatrix(weight, torch.zeros_like(weight), 1, 1.0)})
        for seed in range(3):
            weight.grad = random(48, 20, seed=10 * seed)[16 * part : 16 * (part + 1)]
            steps.step(0.1)
        alone.append(weight)
    torch.testing.assert_close(torch.cat(alone), expected)


def test_threads_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {str(n): random(16 + 8 * (n % 2), 24, seed=n) for n in range(6)}
    counts = dict.fromkeys(weights, 1)
    expected = stepped(weights, counts)
    assert all(torch.equal(found, expected[name]) for name, found in stepped(weights, counts, workers=2).items())
    monkeypatch.setattr(matrix_steps, "_AT_ONCE", 1)
    for name, found in stepped(weights, counts).items():
        torch.testing.assert_close(found, expected[name])
