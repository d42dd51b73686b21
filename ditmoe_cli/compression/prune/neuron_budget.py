"""Widths of experts that share one budget of neurons over all blocks: CAMERA-P (https://arxiv.org/abs/2508.02322).

The paper drops the neurons of least energy, pooled over the experts of a block, by zeroing their weights. Here experts
become narrower instead, so widths have to suit the hardware, and the pool spans all blocks, whose energies compare.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.neurons import profiled_energies
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.names import in_expert
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.expert_weights import read_weight
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class NeuronBudget:
    """The number of neurons to keep.

    Attributes:
        ratio: share of all experts' neurons.
        multiple: number that widths are multiples of, and the fewest neurons of an expert that stays.
        experts_may_go: whether an expert may be left without neurons, other than a block's top-k strongest.
    """

    ratio: float
    multiple: int
    experts_may_go: bool


def shared_widths(
    checkpoint: Checkpoint,
    profile: RoutingProfile,
    keeps: Sequence[tuple[int, ...]],
    budget: NeuronBudget,
) -> list[dict[int, int]]:
    """Return, for each block, the width of each expert that stays.

    The experts in `keeps` share ⌊ratio · Σ their widths⌋ neurons, pooled over all blocks, and have at least `multiple`
    each. Where experts may go, those without neurons do, other than a block's top-k of most energy in their best
    `multiple` neurons. Raises `InfeasibleError` where the neurons do not suffice, and `BadInputError` for a ``fast``
    profile.
    """
    energies = ranked_energies(checkpoint, profile, keeps)
    return widths_within(energies, keeps, budget, checkpoint.config.top_k)


def ranked_energies(
    checkpoint: Checkpoint, profile: RoutingProfile, keeps: Sequence[tuple[int, ...]]
) -> list[list[Tensor]]:
    """Return, for each block, the energies (H,) of the experts in `keeps`.

    Reads their down projections. Raises `BadInputError` for a ``fast`` profile.
    """
    found = []
    with phase(f"ranking neurons of {checkpoint.name}", len(keeps), "ratios") as progress:
        for block, keep in enumerate(keeps):
            downs = [(e, read_weight(checkpoint, in_expert(block, e, "down_proj.weight")).float()) for e in keep]
            found.append(profiled_energies(profile, block, downs))
            progress(1)
    return found


def widths_within(
    energies: Sequence[Sequence[Tensor]], keeps: Sequence[tuple[int, ...]], budget: NeuronBudget, top_k: int
) -> list[dict[int, int]]:
    """Return the widths of `shared_widths`, given the energies of each block's experts (`ranked_energies`)."""
    least: list[int] = []
    for own in energies:
        needed = _strongest(own, budget.multiple, top_k if budget.experts_may_go else len(own))
        least += [budget.multiple if i in needed else 0 for i in range(len(own))]
    pool = [energy for own in energies for energy in own]
    total = int(budget.ratio * sum(map(len, pool)) + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point
    widths = iter(pooled_widths(pool, total, budget.multiple, least))
    return [{e: w for e, w in zip(keep, itertools.islice(widths, len(keep)), strict=True) if w} for keep in keeps]


def _strongest(energies: Sequence[Tensor], multiple: int, count: int) -> set[int]:
    """Return the `count` experts whose best `multiple` neurons hold most energy; ties fall to the lower number."""
    held = [float(each.sort(descending=True).values[:multiple].sum()) for each in energies]
    return set(torch.tensor(held, dtype=torch.float64).argsort(descending=True, stable=True)[:count].tolist())


def pooled_widths(energies: Sequence[Tensor], total: int, multiple: int, least: Sequence[int]) -> tuple[int, ...]:
    """Return how many neurons each expert of a pool keeps, those of highest energy in the pool.

    An expert's neurons, best first, are cut into groups of `multiple`; the rest of them is a last, smaller group. Every
    expert gets the groups that hold its `least` best neurons, or all of them if it has no more; then groups follow by
    energy per neuron, over all experts, while they fit into `total`. So each width is 0, a multiple of `multiple` or
    the expert's own, less than a group of the budget is left over, and no other such widths hold more energy, as long
    as the experts' own widths are multiples. Ties fall to the lower number.

    Args:
        energies: (H,) per expert; H may differ.
        total: most neurons to keep over all experts.
        multiple: number that widths are multiples of, at least 1.
        least: fewest neurons of each expert; 0 lets the expert go.

    Raises `InfeasibleError` where `total` is too small for the least widths.
    """
    ladders = [_widths(len(each), multiple, floor) for each, floor in zip(energies, least, strict=True)]
    widths = [ladder[0] for ladder in ladders]
    if sum(widths) > total:
        raise InfeasibleError(
            f"{total} neurons are too few for {len(widths)} experts, which need {sum(widths)} at the least; keep more, "
            "or give a smaller ⟨multiple⟩"
        )
    steps = (_steps(i, each, ladder) for i, (each, ladder) in enumerate(zip(energies, ladders, strict=True)))
    for _, expert, start, end in heapq.merge(*steps):
        # after a group that did not fit, the smaller one behind it must not jump ahead
        if start == widths[expert] and sum(widths) + end - start <= total:
            widths[expert] = end
    return tuple(widths)


def _widths(width: int, multiple: int, least: int) -> list[int]:
    """Return the widths that an expert of `width` may get, ascending."""
    return [w for w in (*range(0, width, multiple), width) if w >= min(least, width)]


def _steps(expert: int, energies: Tensor, ladder: list[int]) -> Iterator[tuple[float, int, int, int]]:
    """Yield the steps from each width to the next as (-energy per neuron, expert, width, next width)."""
    ranked = energies.double().sort(descending=True).values
    for start, end in itertools.pairwise(ladder):
        yield -float(ranked[start:end].mean()), expert, start, end
