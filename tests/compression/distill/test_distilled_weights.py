"""Weights of a student's steps: a power of their errors before training."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.compression.distill.distilled_weights import step_weights
from ditmoe_cli.compression.distill.teacher_paths import Paths


def held(scale: float = 1.0) -> Paths:
    """Two paths of two steps, ‖z'‖² = 4 scale² of each state."""
    return Paths(scale * torch.ones(2, 3, 1, 2, 2), torch.zeros(2, dtype=torch.long))


def test_steps_weigh_by_the_root_of_their_errors() -> None:
    weights = step_weights(torch.tensor([4.0, 1.0]).double(), held())
    assert weights.dtype == torch.float32
    assert float(weights[1] / weights[0]) == pytest.approx(2.0), "e^-1/2"
    assert float(weights.mean()) == pytest.approx(1 / 4), "of mean 1 over the mean ‖z'‖²"
    assert float(step_weights(torch.ones(2).double(), held(3.0)).mean()) == pytest.approx(1 / 36)


def test_a_step_without_an_error_does_not_outweigh_all_others() -> None:
    weights = step_weights(torch.tensor([1.0, 0.0]).double(), held())
    assert torch.isfinite(weights).all() and float(weights[1] / weights[0]) == pytest.approx(2000**0.5, rel=1e-3)
    assert torch.isfinite(step_weights(torch.zeros(2).double(), held(0.0))).all(), "where there is no error at all"
