"""The base of delta compression: experts' mean, and what each differs from it by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.model.expert_weights import ExpertWeights

Permutations = Sequence[Sequence[int] | Tensor]


def aligned(experts: Sequence[ExpertWeights], permutations: Permutations | None) -> tuple[ExpertWeights, ...]:
    """Return the experts with neurons reordered: neuron i is the one that `permutations[expert][i]` names.

    Reordering leaves an expert's function as it is, so that it never has to be undone. None keeps the order.
    """
    if permutations is None:
        return tuple(experts)
    return tuple(narrowed(expert, order) for expert, order in zip(experts, permutations, strict=True))


def base_of(
    experts: Sequence[ExpertWeights], alphas: Sequence[float], permutations: Permutations | None = None
) -> ExpertWeights:
    """Return the mean Σ_k α_k W_k / Σ_k α_k of each matrix, neurons aligned first.

    `alphas` are how often each expert is selected; if all are 0, experts weigh the same. Raises `BadInputError`
    for experts of different widths.
    """
    return weighted_mean(aligned(experts, permutations), alphas)


def differences(
    experts: Sequence[ExpertWeights], base: ExpertWeights, permutations: Permutations | None = None
) -> tuple[ExpertWeights, ...]:
    """Return ΔW_k = W_k - base of each matrix, neurons aligned first: base + ΔW_k computes what expert k does."""
    return tuple(
        ExpertWeights(expert.gate - base.gate, expert.up - base.up, expert.down - base.down)
        for expert in aligned(experts, permutations)
    )
