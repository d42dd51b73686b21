"""Experts weights averaging: group experts of equal load (Huang et al. 2023, https://arxiv.org/abs/2308.06093).

The paper averages each mixture into one dense layer, as one group does; more groups are the baseline to beat.
"""

from __future__ import annotations

from ditmoe_cli.compression.merge.grouping import most_selected, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups that are selected about equally often.

    Experts, the most selected first, join the group that is selected least so far; ties fall to the smaller group, then
    to the earlier one. Raises `InfeasibleError` for a count outside 1..E.
    """
    experts = len(inputs.selected)

    def labels() -> list[int]:
        result, totals, sizes = [0] * experts, [0.0] * count, [0] * count
        for expert in most_selected(inputs.selected, experts):
            least = min(range(count), key=lambda label: (totals[label], sizes[label]))
            result[expert] = least
            totals[least] += float(inputs.selected[expert])
            sizes[least] += 1
        return result

    return partition(experts, count, labels)
