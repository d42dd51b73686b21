"""The saliency criteria of ``ditmoe prune --method``: a literal table, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ditmoe_cli.compression.prune import frequency, random, reap
from ditmoe_cli.routing.profile import RoutingTables

Scores = list[list[float]]


@dataclass(frozen=True)
class Method:
    """A criterion: its score per (block, expert), higher meaning kept, and where it comes from."""

    score: Callable[[RoutingTables, int], Scores]
    summary: str
    source: str
    needs_profile: bool = True


METHODS: Mapping[str, Method] = {
    "reap": Method(reap.scores, "mean gated output norm over routed tokens, after γ", "arXiv 2510.13999"),
    "frequency": Method(frequency.scores, "how often an expert is selected", "arXiv 2404.05089"),
    "random": Method(random.scores, "a seeded draw, the baseline to beat", "-", needs_profile=False),
}
DEFAULT_METHOD = "reap"
