"""The choice of experts by replayed errors: subset search, budgets shared between blocks, the best router mode.

One block's weights are in memory at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.methods import SALIENCIES, SEARCHES
from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.prune.expert_budget import allocate
from ditmoe_cli.compression.prune.naee import least_error_subset
from ditmoe_cli.compression.replay.subsets import SubsetReplay
from ditmoe_cli.compression.replay.tokens import reservoir_tokens
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


def choose_replayed(calibrated: Calibrated, criterion: Criterion, counts: Sequence[int]) -> list[Choice]:
    """Return the choice of every block; `counts` is how many experts each keeps, before they share a budget.

    What was chosen before is taken from the measurements that are kept beside the profile, block by block. Raises
    `BadInputError` for a profile without a reservoir.
    """
    top_k = calibrated.checkpoint.config.top_k
    replayed = _replayed(calibrated, criterion, counts)
    if not criterion.shared_budget:
        return [options[0] for options, _ in replayed]
    padded = [(math.inf,) * (top_k - 1) + errors for _, errors in replayed]
    kept = allocate(padded, sum(counts), top_k)
    return [options[n - top_k] for (options, _), n in zip(replayed, kept, strict=True)]


_Replayed = tuple[list[Choice], tuple[float, ...]]
"""The choices of a block for each number of experts, and, where blocks share a budget, their errors."""


def _replayed(calibrated: Calibrated, criterion: Criterion, counts: Sequence[int]) -> list[_Replayed]:
    """Return the choices of all blocks."""
    checkpoint, kept = calibrated.checkpoint, calibrated.kept
    names = [_name_of(criterion, index, count) for index, count in enumerate(counts)]
    known = kept.part("choices") if kept is not None else {}
    done = [_parsed(known[name]) for name in itertools.takewhile(known.__contains__, names)]
    if kept is not None and done:
        kept.note(f"using the choices of {len(done)} of {len(names)} blocks kept in {kept.path}")
    if len(done) == len(names):
        return done
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with resident_blocks(model, f"replaying {checkpoint.name}", len(done)) as blocks:
        for index, block in blocks:
            done.append(_of_block(calibrated.profile, criterion, index, block.moe, counts[index]))
            if kept is not None:
                kept.add("choices", {names[index]: _to_json(done[-1])})
    return done


def _of_block(profile: RoutingProfile, criterion: Criterion, index: int, moe: SparseMoE, count: int) -> _Replayed:
    """Return the choices of one block, of all numbers of experts where blocks share a budget."""
    replay = SubsetReplay(reservoir_tokens(profile, index), moe)
    subset_of = _chooser(profile, criterion, index, moe, replay)
    sizes = range(moe.gate.top_k, len(moe.experts) + 1) if criterion.shared_budget else (count,)
    subsets = tuple(subset_of(size) for size in sizes)
    errors = _errors(replay, subsets, criterion.replayed_mode) if criterion.shared_budget else ()
    return [Choice(subset, criterion.router or _best_mode(replay, subset)) for subset in subsets], errors


def _name_of(criterion: Criterion, index: int, count: int) -> str:
    """Return the name that a block's choices are kept under: all that they depend on."""
    size = "all" if criterion.shared_budget else count
    return f"{criterion.method} {criterion.router or 'auto'} seed {criterion.seed} block {index} keep {size}"


def _to_json(replayed: _Replayed) -> dict[str, Any]:
    choices, errors = replayed
    return {"choices": [[list(choice.keep), choice.router] for choice in choices], "errors": list(errors)}


def _parsed(document: Mapping[str, Any]) -> _Replayed:
    """Return choices as `_to_json` wrote them."""
    return [Choice(tuple(keep), router) for keep, router in document["choices"]], tuple(document["errors"])


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
