"""HC-SMoE: merge experts whose mean outputs are close (Chen et al. 2024, https://arxiv.org/abs/2410.08589)."""

from __future__ import annotations

from sklearn.cluster import AgglomerativeClustering

from ditmoe_cli.compression.merge.grouping import mean_outputs, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups by agglomeration, average linkage, of the Euclidean distances of mean outputs.

    An expert's vector holds its means of all cells: one mean over timesteps would lose most of the difference between
    experts. Raises `InfeasibleError` for a count outside 1..E, and `BadInputError` where the profile has no means.
    """

    def labels() -> list[int]:
        vectors = mean_outputs(inputs).reshape(len(inputs.selected), -1)
        clusters: list[int] = AgglomerativeClustering(count, linkage="average").fit_predict(vectors).tolist()
        return clusters

    return partition(len(inputs.selected), count, labels)
