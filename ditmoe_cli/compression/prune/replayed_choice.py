"""The choice of experts by replayed errors: subset search, budgets shared between blocks, the best router mode.

One block's weights are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from ditmoe_cli.compression.methods import SALIENCIES, SEARCHES
from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.prune.expert_budget import allocate
from ditmoe_cli.compression.prune.naee import least_error_subset
from ditmoe_cli.compression.replay.subsets import SubsetReplay
from ditmoe_cli.compression.replay.tokens import reservoir_tokens
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.routing.profile import RoutingProfile

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The experts that one block keeps, and what becomes of the other router rows."""

    keep: Subset
    router: RouterMode


@dataclass(frozen=True)
class Criterion:
    """The criterion that chooses experts.

    Attributes:
        method: name of the method.
        router: router mode for the rows of dropped experts; None for each block's mode of least replayed error.
        shared_budget: whether blocks share the sum of their counts, so that the sum of their errors is least.
        seed: seed of random choices.
    """

    method: str
    router: RouterMode | None
    shared_budget: bool
    seed: int

    @property
    def replayed_mode(self) -> RouterMode:
        """The router mode that subsets are compared in."""
        return self.router or "ghost"


def choose_replayed(
    checkpoint: Checkpoint,
    profile: RoutingProfile,
    criterion: Criterion,
    counts: Sequence[int],
    device: str,
) -> list[Choice]:
    """Return the choice of every block; `counts` is how many experts each keeps, before they share a budget.

    Raises `BadInputError` for a profile without a reservoir.
    """
    model = OffloadedDiTMoE(checkpoint, torch.device(device))
    top_k, choices = checkpoint.config.top_k, []
    with resident_blocks(model, f"replaying {checkpoint.path.name}") as blocks:
        errors = []
        for index, block in blocks:
            replay = SubsetReplay(reservoir_tokens(profile, index), block.moe)
            subset_of = _chooser(profile, criterion, index, block.moe, replay)
            sizes = range(top_k, len(block.moe.experts) + 1) if criterion.shared_budget else (counts[index],)
            subsets = tuple(subset_of(size) for size in sizes)
            if criterion.shared_budget:
                errors.append(_errors(replay, subsets, criterion.replayed_mode))
            choices.append([Choice(subset, criterion.router or _best_mode(replay, subset)) for subset in subsets])
    if not criterion.shared_budget:
        return [options[0] for options in choices]
    padded = [(math.inf,) * (top_k - 1) + each for each in errors]
    kept = allocate(padded, sum(counts), top_k)
    return [options[n - top_k] for options, n in zip(choices, kept, strict=True)]


def _chooser(
    profile: RoutingProfile, criterion: Criterion, index: int, moe: SparseMoE, replay: SubsetReplay
) -> Callable[[int], Subset]:
    """Return the function from a size to a block's subset of that size."""
    mode = criterion.replayed_mode
    if criterion.method == "naee":  # shares the replay that errors are taken from
        return lambda size: least_error_subset(replay, len(moe.experts), size, mode)
    if criterion.method in SEARCHES:
        tokens = reservoir_tokens(profile, index)
        return lambda size: SEARCHES[criterion.method].choose(tokens, moe, size, mode)
    scores = SALIENCIES[criterion.method].score(profile.tables, criterion.seed)[index]
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    return lambda size: tuple(sorted(order[:size]))


def _errors(replay: SubsetReplay, subsets: Sequence[Subset], mode: RouterMode) -> tuple[float, ...]:
    """Return each subset's absolute error in the guided output, so that blocks compare."""
    return tuple(replay.reference * float(replay.errors([subset], mode)[0]) for subset in subsets)


def _best_mode(replay: SubsetReplay, subset: Subset) -> RouterMode:
    modes: tuple[RouterMode, ...] = get_args(RouterMode)
    return min(modes, key=lambda mode: float(replay.errors([subset], mode)[0]))
