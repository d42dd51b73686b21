"""M-SMoE: merge experts that the router treats alike (Li et al. 2023, https://arxiv.org/abs/2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.compression.algebra.matching import aligned
from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.merge.grouping import most_selected, nearest, partition, router_similarity
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups: the experts selected most dominate, the others join the most similar of these.

    Similarity is the cosine of router logits, averaged over cells. The paper picks dominant experts of all blocks
    at once; here each block has its `count`. Raises `InfeasibleError` for a count outside 1..E.
    """

    def labels() -> list[int]:
        dominant = most_selected(inputs.selected, count)
        return nearest(dominant, router_similarity(inputs.logit_grams)[:, dominant])

    return partition(len(inputs.selected), count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return W = Σ_j α_j W_j Π_j / Σ α, Π_j aligning member j's neurons to those of the dominant, of largest α.

    `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return weighted_mean(aligned(experts, shares), shares)
