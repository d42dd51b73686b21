"""EASY-EP: output-aware importance, weighed by tokens (Dong et al. 2025, https://arxiv.org/abs/2504.06792)."""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables
from ditmoe_cli.routing.saliency import guided_sum


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return S_j = Σ_b w_b Σ_t g_j(t) ‖γ ⊙ f_j(t)‖ s(t) per block and expert.

    The sum runs over the tokens t routed to expert j; s(t) = max(1 - cos(x, x + γ ⊙ r), 0) is how much the routed
    output r turns the residual x; g is the routing weight, γ the block's residual gate. Branches b weigh
    w = (s, |s - 1|) under guidance scale s. `seed` is unused. Raises `BadInputError` for profiles made with ``--fast``.
    """
    del seed
    return guided_sum(tables, tables.table("easy_ep"))
