"""REAP: router-weighted expert activation pruning (Lasby et al. 2025, https://arxiv.org/abs/2510.13999)."""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables
from ditmoe_cli.routing.saliency import routed_mean


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return S_j = Σ_b w_b Σ_t g_j(t) ‖γ ⊙ f_j(t)‖ / Σ_b w_b n_j per block and expert.

    The sum runs over the tokens t routed to expert j; g is the routing weight, which DiT-MoE does not
    renormalise; γ the block's residual gate, so that the norm is what reaches the residual stream. Branches b
    (conditional, unconditional) weigh w = (s, |s - 1|) under guidance scale s. An expert that no token chose
    scores 0. `seed` is unused.
    """
    del seed
    return routed_mean(tables, tables.gate_norm)
