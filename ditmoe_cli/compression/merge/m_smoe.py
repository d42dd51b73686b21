"""M-SMoE: merge experts that the router treats alike (Li et al. 2023, https://arxiv.org/abs/2310.01334)."""

from __future__ import annotations

from ditmoe_cli.compression.merge.grouping import most_selected, nearest_centres, partition, router_similarity
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups: the experts selected most dominate, the others join the most similar of these.

    Similarity is the cosine of router logits, averaged over cells. The paper picks dominant experts of all blocks
    at once; here each block has its `count`. Raises `InfeasibleError` for a count outside 1..E.
    """

    def labels() -> list[int]:
        dominant = most_selected(inputs.selected, count)
        return nearest_centres(dominant, router_similarity(inputs.logit_grams)[:, dominant])

    return partition(len(inputs.selected), count, labels)
