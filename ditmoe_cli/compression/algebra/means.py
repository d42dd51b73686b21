"""Means of experts' weights, neuron by neuron."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def mean_expert(experts: Iterable[ExpertWeights], shares: Sequence[float]) -> ExpertWeights:
    """Return W = Σ_j α_j W_j / Σ α for gate, up and down; the plain mean where all α are 0.

    Takes one expert after the other, of which the first stays in memory. Raises `BadInputError` where the experts
    differ in width.
    """
    weights, members = normalised(shares), iter(experts)
    first = next(members)
    result = ExpertWeights(first.gate.clone(), first.up.clone(), first.down.clone())
    for expert, weight in zip(members, weights[1:], strict=True):
        require_equal_widths((first, expert))
        for mean, matrix, origin in zip(result.matrices, expert.matrices, first.matrices, strict=True):
            mean.add_(matrix - origin, alpha=weight)  # by differences: equal experts stay the same to the bit
    return result
