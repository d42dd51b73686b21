"""The groups of weights that can be trained, whole or by updates of low rank. Torch-free."""

from __future__ import annotations

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import EXPERT_OF, ROUTER, SHARED, split_name

GROUPS = ("router", "norms", "shared", "down", "experts", "attention", "embedders")
"""What can be trained: ``norms`` are adaLN modulations and the norms of queries and keys, ``down`` the down projections
of routed experts and what takes the place of dropped ones, ``experts`` all their matrices."""
_FIXED = ("pos_embed",)
_TABLE = "y_embedder.embedding_table.weight"


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


def has_low_rank_update(info: TensorInfo, rank: int) -> bool:
    """Return whether a plain weight is trained by an update B A of a rank: the matrix of a linear layer is.

    Routers, the table of labels, and matrices of fewer values than B and A are trained themselves, as all vectors are.
    """
    if len(info.shape) != 2 or not info.name.endswith(".weight") or info.name == _TABLE:
        return False
    return split_name(info.name).rest != ROUTER and update_values(info, rank) < info.numel


def update_values(info: TensorInfo, rank: int) -> int:
    """Return how many values B (out, R) and A (R, in) have."""
    return rank * sum(info.shape)


def trained_values(info: TensorInfo, rank: int | None) -> int:
    """Return how many values are trained of a plain weight, by an update of a rank where it has one; None for none."""
    return update_values(info, rank) if rank is not None and has_low_rank_update(info, rank) else info.numel
