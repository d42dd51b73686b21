"""The groups of weights that can be trained. Torch-free."""

from __future__ import annotations

from ditmoe_cli.files.names import EXPERT_OF, ROUTER, SHARED, split_name

GROUPS = ("router", "norms", "shared", "down", "experts", "attention", "embedders")
"""What can be trained: ``norms`` are adaLN modulations and the norms of queries and keys, ``down`` the down projections
of routed experts and what takes the place of dropped ones, ``experts`` all their matrices."""
_FIXED = ("pos_embed",)


def trained_groups(name: str) -> frozenset[str]:
    """Return the groups that a weight belongs to; none for what is never trained."""
    parts = split_name(name)
    if name in _FIXED or parts.rest == EXPERT_OF:
        return frozenset()
    if parts.block is None:
        return frozenset({"norms"} if "adaLN" in name else {"embedders"})
    if parts.expert is not None:
        return frozenset({"experts", "down"} if parts.rest.startswith("down_proj") else {"experts"})
    if parts.rest == ROUTER:
        return frozenset({"router"})
    if parts.rest.startswith(f"{SHARED}."):
        return frozenset({"shared"})
    if parts.rest.startswith("moe."):
        return frozenset({"experts", "down"})
    return frozenset({"norms"} if "adaLN" in name or "_norm" in parts.rest else {"attention"})
