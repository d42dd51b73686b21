"""The base of delta compression: the mean of a block's experts, and an expert's difference from it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditmoe_cli.compression.algebra.means import mean_expert
from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.model.expert_weights import ExpertWeights

Order = Sequence[int] | Tensor
"""The neurons of an expert in the order that the base has them in, (H,)."""


def base_of(experts: Sequence[ExpertWeights], alphas: Sequence[float], orders: Sequence[Order]) -> ExpertWeights:
    """Return the mean Σ_k α_k W_k / Σ_k α_k of each matrix, neurons put in order first.

    `alphas` are how often each expert is selected; if all are 0, experts weigh the same. Raises `BadInputError`
    for experts of different widths.
    """
    return mean_expert([narrowed(expert, order) for expert, order in zip(experts, orders, strict=True)], alphas)


def difference(expert: ExpertWeights, base: ExpertWeights, order: Order) -> ExpertWeights:
    """Return ΔW = W - base of each matrix, neurons put in order first: base + ΔW computes what the expert does."""
    ordered = narrowed(expert, order)
    return ExpertWeights(ordered.gate - base.gate, ordered.up - base.up, ordered.down - base.down)
