"""NAEE: the subset of experts that reconstructs the block's output best (Lu et al. 2024, https://arxiv.org/abs/2402.14800).

Tokens are routed anew among the experts that stay. The paper compares outputs of the layer; here guided outputs after γ
are compared.
"""

from __future__ import annotations

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.prune.subset_search import Subset, best_subset
from ditmoe_cli.compression.replay.subsets import SubsetReplay
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.moe import SparseMoE


def choose(tokens: BlockTokens, moe: SparseMoE, count: int, mode: RouterMode) -> Subset:
    """Return the `count` experts of least replayed error Σ ‖Δ‖², ascending.

    Δ is the change of the guided output of a pair of tokens, gates as `mode` says. All subsets are tried where they are
    few, else experts are dropped greedily and then swapped. Raises `InfeasibleError` where `count` does not leave
    enough experts for top-k.
    """
    return least_error_subset(SubsetReplay(tokens, moe), len(moe.experts), count, mode)


def least_error_subset(replay: SubsetReplay, experts: int, count: int, mode: RouterMode) -> Subset:
    """Return the `count` of `experts` of least replayed error, ascending."""
    return best_subset(experts, count, lambda subsets: replay.errors(subsets, mode).tolist())
