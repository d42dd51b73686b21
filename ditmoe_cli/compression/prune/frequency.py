"""Frequency: keep the experts that are selected most (as in https://arxiv.org/abs/2404.05089).

DiT-MoE is trained with a balance loss, which makes usage nearly uniform: expect little of it here.
"""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return the share of a block's selections that went to each expert, over all steps and branches.

    `seed` is unused.
    """
    del seed
    totals = [
        [sum(step[expert] for branch in tables.selected[block] for step in branch) for expert in range(n)]
        for block, n in enumerate(tables.experts)
    ]
    return [[count / max(sum(block), 1) for count in block] for block in totals]
