"""HC-SMoE: merge experts whose mean outputs are close (Chen et al. 2024, https://arxiv.org/abs/2410.08589)."""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.cluster import AgglomerativeClustering

from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.merge.grouping import mean_outputs, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups by agglomeration, average linkage, of the Euclidean distances of mean outputs.

    The means of all cells stand side by side, as their mean over timesteps would lose most of what tells experts
    apart. Raises `InfeasibleError` for a count outside 1..E, and `BadInputError` where the profile has no means.
    """

    def labels() -> list[int]:
        vectors = mean_outputs(inputs).reshape(len(inputs.selected), -1)
        found: list[int] = AgglomerativeClustering(count, linkage="average").fit_predict(vectors).tolist()
        return found

    return partition(len(inputs.selected), count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return W = Σ_j α_j W_j / Σ α, neurons in the order they have.

    `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return weighted_mean(experts, shares)
