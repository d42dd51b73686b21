"""Saliency: how much each expert matters, by every published criterion that a profile's tables hold the sums for.

Planners keep the experts of highest saliency, and reports show the same numbers. Torch-free: plain Python on small
tables, each returning one score per [block][expert]. In the formulas

- t runs over the tokens routed to expert j, n_j is their number, g_j(t) the routing weight (DiT-MoE does not
  renormalise it), f_j(t) the expert's output and γ the block's residual gate, so that ‖γ ⊙ f_j(t)‖ is what reaches the
  residual stream;
- b runs over the guidance branches, conditional and unconditional, whose weights under guidance scale s are
  w = (s, |s - 1|), as their predictions are weighted.
"""

from __future__ import annotations

from random import Random

from ditmoe_cli.routing.profile import RoutingTables, Table

Scores = list[list[float]]


def reap(tables: RoutingTables) -> Scores:
    """Return Σ_b w_b Σ_t g_j ‖γ ⊙ f_j‖ / Σ_b w_b n_j, 0 for an expert that no token chose.

    Source: REAP, router-weighted expert activation pruning (Lasby et al. 2025, https://arxiv.org/abs/2510.13999).
    """
    return routed_mean(tables, tables.gate_norm)


def man(tables: RoutingTables) -> Scores:
    """Return Σ_b w_b Σ_t ‖γ ⊙ f_j‖ / Σ_b w_b n_j, 0 for an expert that no token chose: REAP without routing weights.

    Source: mean activation norm (Liu et al. 2026, https://arxiv.org/abs/2606.15716). Raises `BadInputError` where the
    profile has no norms.
    """
    return routed_mean(tables, tables.table("norm"))


def msan(tables: RoutingTables) -> Scores:
    """Return Σ_b w_b Σ_t ‖γ ⊙ f_j‖² / Σ_b w_b n_j, 0 for an expert that no token chose.

    Source: mean squared activation norm (Liu et al. 2026, https://arxiv.org/abs/2606.15716). Raises `BadInputError`
    where the profile has no norms.
    """
    return routed_mean(tables, tables.table("norm_square"))


def easy_ep(tables: RoutingTables) -> Scores:
    """Return Σ_b w_b Σ_t g_j ‖γ ⊙ f_j‖ s(t), with s(t) = max(1 - cos(x, x + γ ⊙ r), 0).

    s(t) is how far the routed output r turns the token's residual x. Source: EASY-EP (Dong et al. 2025,
    https://arxiv.org/abs/2504.06792). Raises `BadInputError` for a ``fast`` profile, which has no such sums.
    """
    return guided_sum(tables, tables.table("easy_ep"))


def gate_mass(tables: RoutingTables) -> Scores:
    """Return Σ_b w_b Σ_t g_j, the sum of routing weights.

    Source: the soft counts of SEER-MoE (Muzio et al. 2024, https://arxiv.org/abs/2404.05089).
    """
    return guided_sum(tables, tables.gate_mass)


def frequency(tables: RoutingTables) -> Scores:
    """Return n_j / Σ_i n_i, the share of the block's selections that went to the expert; 0 in a block without any.

    Selections of all steps and branches count alike, whatever the guidance scale. DiT-MoE is trained with a balance
    loss, which makes usage nearly uniform: expect little of it. Source: the hard counts of SEER-MoE (Muzio et al. 2024,
    https://arxiv.org/abs/2404.05089).
    """
    return tables.shares


def random(tables: RoutingTables, seed: int) -> Scores:
    """Return independent uniform scores, the same for the same seed: the baseline that every criterion has to beat.

    Of the tables only the numbers of experts are used, so tables without counts do.
    """
    generator = Random(seed)
    return [[generator.random() for _ in range(n)] for n in tables.experts]


def guided_sum(tables: RoutingTables, table: Table) -> Scores:
    """Return Σ_b w_b Σ_steps of a table, per block and expert."""
    weights = (tables.cfg, abs(tables.cfg - 1.0))

    def one(block: int, expert: int) -> float:
        branches = zip(weights, table[block], strict=True)
        return sum(weight * sum(step[expert] for step in steps) for weight, steps in branches)

    return [[one(block, expert) for expert in range(n)] for block, n in enumerate(tables.experts)]


def routed_mean(tables: RoutingTables, table: Table) -> Scores:
    """Return Σ_b w_b Σ_steps of a table over Σ_b w_b n_j, per block and expert; 0 where no token was routed."""
    sums, counts = guided_sum(tables, table), guided_sum(tables, tables.selected)
    return [[s / n if n else 0.0 for s, n in zip(*block, strict=True)] for block in zip(sums, counts, strict=True)]
