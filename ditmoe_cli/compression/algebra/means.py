"""Means of experts' weights, neuron by neuron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights


def normalised(shares: Sequence[float]) -> list[float]:
    """Return α_j / Σ α; equal weights where all α are 0, as of experts that are never selected."""
    total = sum(shares)
    return [share / total if total else 1.0 / len(shares) for share in shares]


def require_equal_widths(experts: Sequence[ExpertWeights]) -> None:
    """Raise `BadInputError` where experts differ in width, their number of neurons."""
    widths = sorted({len(expert.gate) for expert in experts})
    if len(widths) > 1:
        listed = " and ".join(map(str, widths))
        raise BadInputError(f"experts of widths {listed} cannot be merged into one; merge before narrowing experts")


def mean_expert(experts: Sequence[ExpertWeights], shares: Sequence[float]) -> ExpertWeights:
    """Return W = Σ_j α_j W_j / Σ α for gate, up and down; the plain mean where all α are 0.

    Raises `BadInputError` where the experts differ in width.
    """
    require_equal_widths(experts)
    weights = normalised(shares)

    def mean(matrices: Sequence[Tensor]) -> Tensor:
        first, *others = matrices
        result = first.clone()
        for matrix, weight in zip(others, weights[1:], strict=True):
            result.add_(matrix - first, alpha=weight)  # by differences: equal experts stay the same to the bit
        return result

    return ExpertWeights(
        mean([expert.gate for expert in experts]),
        mean([expert.up for expert in experts]),
        mean([expert.down for expert in experts]),
    )
