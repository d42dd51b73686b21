"""Merging by averages: the mean of a group's weights, plain, weighted or of aligned neurons."""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.compression.algebra.matching import aligned_mean
from ditmoe_cli.compression.algebra.means import mean_expert
from ditmoe_cli.compression.merge.inputs import MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights


def plain_average(
    experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None
) -> ExpertWeights:
    """Return W = Σ_j W_j / n, neurons in the order they have.

    `shares` and `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return mean_expert(experts, [1.0] * len(shares))


def weighted_average(
    experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None
) -> ExpertWeights:
    """Return W = Σ_j α_j W_j / Σ α, neurons in the order they have.

    `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return mean_expert(experts, shares)


def aligned_average(
    experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None
) -> ExpertWeights:
    """Return W = Σ_j α_j W_j Π_j / Σ α, Π_j aligning member j's neurons to those of the dominant, of largest α.

    `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return aligned_mean(experts, shares)
