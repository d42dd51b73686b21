"""MSAN: mean squared activation norm (Liu et al. 2026, https://arxiv.org/abs/2606.15716)."""

from __future__ import annotations

from ditmoe_cli.routing.profile import RoutingTables
from ditmoe_cli.routing.saliency import routed_mean


def scores(tables: RoutingTables, seed: int) -> list[list[float]]:
    """Return S_j = Σ_b w_b Σ_t ‖γ ⊙ f_j(t)‖² / Σ_b w_b n_j per block and expert.

    The sum runs over the tokens t routed to expert j; γ is the block's residual gate. Branches b weigh w = (s, |s - 1|)
    under guidance scale s. An expert that no token chose scores 0. `seed` is unused. Raises `BadInputError` where the
    profile has no norms.
    """
    del seed
    return routed_mean(tables, tables.table("norm_square"))
