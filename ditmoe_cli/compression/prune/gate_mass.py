"""Gate mass: the soft counts of SEER-MoE (Muzio et al. 2024, https://arxiv.org/abs/2404.05089)."""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables
from ditmoe_cli.routing.saliency import guided_sum


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return S_j = Σ_b w_b Σ_t g_j(t) per block and expert.

    The sum runs over the tokens t routed to expert j; g is the routing weight, which DiT-MoE does not renormalise.
    Branches b weigh w = (s, |s - 1|) under guidance scale s. `seed` is unused.
    """
    del seed
    return guided_sum(tables, tables.gate_mass)
