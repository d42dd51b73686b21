"""UNCURL: spectral clusters of router logits (Sarkar et al. 2024, https://arxiv.org/abs/2409.01483)."""

from __future__ import annotations

from sklearn.cluster import SpectralClustering

from ditmoe_cli.compression.merge.grouping import partition, router_similarity
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups by spectral clustering of (cos + 1) / 2, cos of router logits averaged over cells.

    Clusters are read off the eigenvectors by pivoted QR, which draws no random numbers. Raises `InfeasibleError` for
    a count outside 1..E.
    """

    def labels() -> list[int]:
        clustering = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
        clusters: list[int] = clustering.fit_predict(router_similarity(inputs.logit_grams)).tolist()
        return clusters

    return partition(len(inputs.selected), count, labels)
