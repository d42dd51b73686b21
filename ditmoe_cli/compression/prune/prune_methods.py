"""The methods of ``ditmoe prune --method`` in literal tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditmoe_cli.routing import saliency
from ditmoe_cli.routing.profile import RoutingTables
from ditmoe_cli.routing.saliency import Scores

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import RouterMode
    from ditmoe_cli.compression.replay.subsets import BlockTokens
    from ditmoe_cli.model.moe import SparseMoE


@dataclass(frozen=True)
class Method:
    """A criterion: its score per (block, expert), higher meaning kept, and where it comes from."""

    score: Callable[[RoutingTables, int], Scores]
    summary: str
    source: str
    needs_profile: bool = True


@dataclass(frozen=True)
class Replayed:
    """A method that replays tokens of one block: from (tokens, mixture, count, router mode) to the kept experts."""

    choose: Callable[[BlockTokens, SparseMoE, int, RouterMode], tuple[int, ...]]
    summary: str
    source: str


def _seedless(criterion: Callable[[RoutingTables], Scores]) -> Callable[[RoutingTables, int], Scores]:
    """Return a criterion that draws nothing as one that takes a seed too."""
    return lambda tables, _: criterion(tables)


def _naee(tokens: BlockTokens, moe: SparseMoE, count: int, mode: RouterMode) -> tuple[int, ...]:
    from ditmoe_cli.compression.prune import naee

    return naee.choose(tokens, moe, count, mode)


def _diet(tokens: BlockTokens, moe: SparseMoE, count: int, mode: RouterMode) -> tuple[int, ...]:
    from ditmoe_cli.compression.prune import diet

    return diet.choose(tokens, moe, count, mode)


METHODS: Mapping[str, Method] = {
    "reap": Method(_seedless(saliency.reap), "mean gated output norm over routed tokens, after γ", "arXiv 2510.13999"),
    "man": Method(_seedless(saliency.man), "mean output norm over routed tokens, after γ", "arXiv 2606.15716"),
    "msan": Method(
        _seedless(saliency.msan), "mean squared output norm over routed tokens, after γ", "arXiv 2606.15716"
    ),
    "easy-ep": Method(
        _seedless(saliency.easy_ep), "gated output norms, weighed by how far tokens turn", "arXiv 2504.06792"
    ),
    "gate-mass": Method(_seedless(saliency.gate_mass), "sum of routing weights", "arXiv 2404.05089"),
    "frequency": Method(_seedless(saliency.frequency), "how often an expert is selected", "arXiv 2404.05089"),
    "random": Method(saliency.random, "a seeded draw, the baseline to beat", "-", needs_profile=False),
}
REPLAYED: Mapping[str, Replayed] = {  # these import torch when they choose
    "naee": Replayed(_naee, "the subset of least replayed output error", "arXiv 2402.14800"),
    "diet": Replayed(_diet, "the subset whose deletions are most like those of the dropped experts", "DIET"),
}
DEFAULT_METHOD = "reap"
