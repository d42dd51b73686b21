"""What tests of single experts share: random ones, and what they compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.model.expert_weights import ExpertWeights


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_expert(hidden: int, width: int, seed: int) -> ExpertWeights:
    generator = seeded(seed)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return ExpertWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def neurons_of(expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """φ (T, H) of tokens (T, D)."""
    return F.silu(inputs @ expert.gate.T) * (inputs @ expert.up.T)


def outputs_of(expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """f(u) (T, D) of tokens (T, D)."""
    return neurons_of(expert, inputs) @ expert.down.T
