"""Fewer steps of a solver as the rival of a schedule: which of the two is nearer to the fine solution, at equal cost.

The fine solution is that of many steps of a good solver for the same differential equation. Ancestral sampling has
none, since its noise is drawn anew at each step. Torch-free but for `against_fewer_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.sampling import most_steps
from ditmoe_cli.diffusion.schedule import SOLVERS, Solver
from ditmoe_cli.model.block_choices import ComputeTable
from ditmoe_cli.model.compute_cost import evaluation_cost

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.scheduling.way_states import Way

_FINE: dict[str, tuple[Solver, int]] = {"rf": ("ab3", 96), "ddpm": ("ddpm-dpmpp-2m", 150)}
_RIVALS: dict[str, tuple[Solver, ...]] = {"rf": ("ab2", "ab3", "dpmpp-2m"), "ddpm": ("ddpm-dpmpp-2m", "ddim-trailing")}
STOCHASTIC: tuple[Solver, ...] = ("ddpm",)


@dataclass(frozen=True)
class FewerSteps:
    """A schedule against fewer steps.

    Attributes:
        sampling: solver, steps and guidance of the rival.
        evaluations: of all branches and a weaker model, an image.
        error: Σ‖z - z*‖² / Σ‖z*‖² of its images z, z* being the fine solution.
        schedule: the same of the schedule's images.
        full: the same of the schedule's sampling with everything computed.
    """

    sampling: ScheduledSampling
    evaluations: int
    error: float
    schedule: float
    full: float

    @property
    def wins(self) -> bool:
        """Whether fewer steps are nearer to the fine solution than the schedule."""
        return self.error <= self.schedule


def evaluations_of(sampling: ScheduledSampling, weak: float = 1.0) -> float:
    """Return the evaluations of an image, of both branches; one of a weaker model that guides counts as so many."""
    guidance = sampling.guidance
    return sum(1 + guidance.takes_null_class(t) + weak * guidance.takes_weak(t) for t in sampling.times)


def cost_of(sampling: ScheduledSampling, table: ComputeTable, share: float, weak: float) -> float:
    """Return what a schedule costs, in evaluations: a share of the model's own, and those of a weaker model."""
    asked = set(range(len(sampling.times))) - set(table.followed)
    guided = sum(sampling.guidance.takes_weak(sampling.times[k]) for k in asked)
    return share * evaluations_of(sampling, 0.0) + weak * guided


def rival_steps(sampling: ScheduledSampling, cost: float, weak: float = 1.0) -> list[ScheduledSampling]:
    """Return the most steps of each good solver whose evaluations cost at most so many."""
    found = []
    for solver in _RIVALS[SOLVERS[sampling.solver].family]:
        most = min(math.floor(cost), most_steps(solver))
        fewer = (replace(sampling, solver=solver, steps=steps) for steps in range(most, 0, -1))
        within = next((each for each in fewer if evaluations_of(each, weak) <= cost), None)
        found += [within] if within is not None else []
    return found


def weak_share(way: Way) -> float:
    """Return the operations of a weaker model that guides, relative to those of the model; 0 where none does."""
    return 0.0 if way.weak is None else evaluation_cost(way.weak.config) / evaluation_cost(way.model.config)


def against_fewer_steps(
    way: Way, indices: Sequence[int], cost: float, scheduled: Tensor, full: Tensor
) -> FewerSteps | None:
    """Return the best of fewer steps against a schedule that costs so many evaluations (`cost_of`).

    `scheduled` and `full` (N, C, H, W) are the images of the schedule, and those with everything computed. None for
    ancestral sampling, and where no steps are that few.
    """
    from ditmoe_cli.scheduling.way_states import by_solver

    sampling = way.sampling
    if sampling.solver in STOCHASTIC:
        return None
    solver, steps = _FINE[SOLVERS[sampling.solver].family]
    many = replace(sampling, solver=solver, steps=min(max(steps, 2 * sampling.steps), most_steps(solver)))
    fine = way.shown(by_solver(way, indices, many))

    def error(images: Tensor) -> float:
        return float((way.shown(images) - fine).double().square().sum() / fine.double().square().sum())

    rivals = [(error(by_solver(way, indices, each)), each) for each in rival_steps(sampling, cost, weak_share(way))]
    if not rivals:
        return None
    least, best = min(rivals, key=lambda rival: rival[0])
    return FewerSteps(best, round(evaluations_of(best)), least, error(scheduled), error(full))
