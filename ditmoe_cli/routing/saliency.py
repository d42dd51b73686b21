"""Sums of a profile's tables over step bins and guidance branches: what most saliency scores are. Torch-free."""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables, Table


def guided_sum(tables: RoutingTables, table: Table) -> list[list[float]]:
    """Return Σ_b w_b Σ_steps of a table, per block and expert.

    Branches b (conditional, unconditional) weigh w = (s, |s - 1|) under guidance scale s.
    """
    weights = (tables.cfg, abs(tables.cfg - 1.0))

    def one(block: int, expert: int) -> float:
        branches = zip(weights, table[block], strict=True)
        return sum(weight * sum(step[expert] for step in steps) for weight, steps in branches)

    return [[one(block, expert) for expert in range(n)] for block, n in enumerate(tables.experts)]


def routed_mean(tables: RoutingTables, table: Table) -> list[list[float]]:
    """Return Σ_b w_b Σ_t of a table over Σ_b w_b n, n the tokens routed to each expert; 0 where there are none.

    Branches weigh as in `guided_sum`.
    """
    sums, counts = guided_sum(tables, table), guided_sum(tables, tables.selected)
    return [[s / n if n else 0.0 for s, n in zip(*block, strict=True)] for block in zip(sums, counts, strict=True)]
