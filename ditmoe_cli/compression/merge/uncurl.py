"""UNCURL: spectral clusters of router logits (Sarkar et al. 2024, https://arxiv.org/abs/2409.01483)."""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.cluster import SpectralClustering

from ditmoe_cli.compression.algebra.matching import aligned
from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.merge.grouping import partition, router_similarity
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups by spectral clustering of (cos + 1) / 2, cos of router logits averaged over cells.

    Clusters are read off the eigenvectors by pivoted QR, which draws no random numbers. Raises `InfeasibleError` for
    a count outside 1..E.
    """

    def labels() -> list[int]:
        clustering = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
        found: list[int] = clustering.fit_predict(router_similarity(inputs.logit_grams)).tolist()
        return found

    return partition(len(inputs.selected), count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return W = Σ_j α_j W_j Π_j / Σ α, Π_j aligning member j's neurons to those of the dominant, of largest α.

    `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return weighted_mean(aligned(experts, shares), shares)
