"""Alignment of experts' neurons: weight matching of Ainsworth et al. 2022 (https://arxiv.org/abs/2209.04836).

The order of an expert's neurons is arbitrary, so that experts have to agree on one before their weights are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.compression.algebra.means import mean_expert, require_equal_widths
from ditmoe_cli.compression.algebra.neurons import narrowed
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.progress import each
from ditmoe_cli.routing.measures import best_matching


def matching(reference: ExpertWeights, expert: ExpertWeights) -> list[int]:
    """Return π, the neuron of `expert` for each one of `reference`, that maximises Σ_h ⟨a_h, b_π(h)⟩.

    a_h and b_h are the rows h of gate and up with the column h of down. As permutations leave norms alone, π
    minimises the distance of the weights too. Solved exactly; memory is H² numbers, time grows with H³. Raises
    `BadInputError` where the experts differ in width.
    """
    require_equal_widths((reference, expert))
    similarity = reference.gate @ expert.gate.T
    similarity.addmm_(reference.up, expert.up.T).addmm_(reference.down.T, expert.down)
    _, columns = best_matching(similarity.cpu().numpy())
    order: list[int] = columns.tolist()
    return order


def matchings(experts: Sequence[ExpertWeights], shares: Sequence[float], part: float = 0.2) -> list[list[int]]:
    """Return for each expert its neurons in the order of the dominant one's, which has the largest share.

    Of equal shares the first one's dominates. `part` is the share of this in what is under way. Raises `BadInputError`
    where the experts differ in width.
    """
    dominant = max(range(len(experts)), key=lambda j: shares[j])
    reference = experts[dominant]
    return [
        list(range(len(reference.gate))) if j == dominant else matching(reference, expert)
        for j, expert in enumerate(each(experts, "matching neurons", "experts", share=part))
    ]


def aligned(experts: Sequence[ExpertWeights], shares: Sequence[float]) -> list[ExpertWeights]:
    """Return the experts with their neurons in the order of the dominant one's; see `matchings`."""
    return [narrowed(expert, order) for expert, order in zip(experts, matchings(experts, shares), strict=True)]


def aligned_mean(experts: Sequence[ExpertWeights], shares: Sequence[float]) -> ExpertWeights:
    """Return W = Σ_j α_j W_j Π_j / Σ α, Π_j aligning expert j's neurons to those of the dominant one.

    Takes each expert twice, and two at a time. Raises `BadInputError` where the experts differ in width.
    """
    return mean_expert(map(narrowed, experts, matchings(experts, shares)), shares)
