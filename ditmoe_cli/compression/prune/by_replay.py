"""Pruning plans that rest on replayed errors: subset search, budgets shared between blocks, and the best router mode.

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
from ditmoe_cli.compression.prune.allocation import allocate
from ditmoe_cli.compression.prune.subset_search import best_subset
from ditmoe_cli.compression.replay.subsets import SubsetReplay, block_tokens
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What one block keeps, and what becomes of the other router rows."""

    keep: Subset
    router: RouterMode


def choose_replayed(
    checkpoint: Checkpoint,
    profile: RoutingProfile,
    method: str,
    counts: Sequence[int],
    router: RouterMode | None,
    shared_budget: bool,
    seed: int,
    device: str,
    bar: ProgressBar,
) -> list[Choice]:
    """Choose the experts of every block.

    `counts` is how many each keeps; with `shared_budget` their sum is spread so that the sum of errors is least.
    `router` None takes each block's mode of least replayed error. Raises `BadInputError` for a profile without
    a reservoir.
    """
    model = OffloadedDiTMoE(checkpoint, torch.device(device))
    top_k, choices = checkpoint.config.top_k, []
    with torch.inference_mode(), resident_blocks(model, bar, f"replaying {checkpoint.path.name}") as blocks:
        errors = []
        for index, block in blocks:
            replay = SubsetReplay(block_tokens(profile, index), block.moe)
            subset_of = _chooser(profile, method, seed, index, block.moe, replay, router or "ghost")
            sizes = range(top_k, len(block.moe.experts) + 1) if shared_budget else (counts[index],)
            subsets = tuple(subset_of(size) for size in sizes)
            if shared_budget:
                errors.append(_errors(replay, subsets, router or "ghost"))
            choices.append([Choice(subset, router or _best_mode(replay, subset)) for subset in subsets])
    if not shared_budget:
        return [options[0] for options in choices]
    padded = [(math.inf,) * (top_k - 1) + each for each in errors]
    kept = allocate(padded, sum(counts), top_k)
    return [options[n - top_k] for options, n in zip(choices, kept, strict=True)]


def _chooser(
    profile: RoutingProfile, method: str, seed: int, index: int, moe: SparseMoE, replay: SubsetReplay, mode: RouterMode
) -> Callable[[int], Subset]:
    """Return what chooses a block's subset of a given size."""
    if method == "naee":  # its search is what `replay` is for
        return lambda size: best_subset(len(moe.experts), size, lambda s: replay.errors(s, mode).tolist())
    if method in SEARCHES:
        tokens = block_tokens(profile, index)
        return lambda size: SEARCHES[method].choose(tokens, moe, size, mode)
    scores = SALIENCIES[method].score(profile.tables, seed)[index]
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    return lambda size: tuple(sorted(order[:size]))


def _errors(replay: SubsetReplay, subsets: Sequence[Subset], mode: RouterMode) -> tuple[float, ...]:
    """Return each subset's error in the guided output, not relative to anything, so that blocks can be compared."""
    return tuple(replay.reference * float(replay.errors([subset], mode)[0]) for subset in subsets)


def _best_mode(replay: SubsetReplay, subset: Subset) -> RouterMode:
    modes: tuple[RouterMode, ...] = get_args(RouterMode)
    return min(modes, key=lambda mode: float(replay.errors([subset], mode)[0]))
