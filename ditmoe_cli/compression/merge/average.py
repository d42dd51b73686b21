"""Experts weights averaging: plain means (Huang et al. 2023, https://arxiv.org/abs/2308.06093).

The paper turns each mixture into one dense layer, which one group does; more groups are the baseline to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.merge.grouping import most_selected, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups that are selected about equally often.

    Experts, the most selected first, join the group selected least so far; ties fall to the smaller, then to the
    earlier one. Raises `InfeasibleError` for a count outside 1..E.
    """
    experts = len(inputs.selected)

    def labels() -> list[int]:
        found, totals, sizes = [0] * experts, [0.0] * count, [0] * count
        for expert in most_selected(inputs.selected, experts):
            least = min(range(count), key=lambda label: (totals[label], sizes[label]))
            found[expert] = least
            totals[least] += float(inputs.selected[expert])
            sizes[least] += 1
        return found

    return partition(experts, count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return W = Σ_j W_j / n, neurons in the order they have.

    `shares` and `tokens` are unused. Raises `BadInputError` where the experts differ in width.
    """
    del tokens
    return weighted_mean(experts, [1.0] * len(shares))
