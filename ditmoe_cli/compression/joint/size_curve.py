"""Sizes against damage: plans for sizes from the smallest possible file to the checkpoint's own. Torch-free.

Errors of widths and formats are measured once. The program is solved at κ = `FIRST_KAPPA` for sizes on a logarithmic
grid, and the plan of the middle one is carried out on the calibration images, in a folder that goes in the end. With P
the error that the program predicts of a plan, and p and t the predicted and the tried error of that one plan, what any
other is expected to have is

    E = P t / p.

P rests on amplifications at the middle size, and t / p on one plan: both fit less well the farther a size is from it.

Where the memory of a GPU begins to suffice between two sizes, the largest plan that it holds is found by interpolation
between theirs, and gets a point of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditmoe_cli.compression.block_layout import require_plain
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.joint.compressing import (
    Compressing,
    Goal,
    holding,
    neurons_kept,
    once,
    tried_in,
    unmeasured,
)
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, plan_of
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import Work
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.gpu_memory import GIGABYTE, guided_memory
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile

SIZES = 13  # of the grid: one of them is in the middle
GPUS = (8, 12, 16, 24)
"""Memory of common GPUs in GB of 10⁹ bytes."""
_ROUNDS = 4  # in which a plan for a GPU is made smaller by what it exceeds


@dataclass(frozen=True)
class CurvePoint:
    """One size of a curve.

    Attributes:
        size: the bytes that were allowed.
        bytes: the bytes of the plan's file.
        predicted_error: relative squared error of the guided prediction by the program.
        expected_error: that times the ratio of tried to predicted error at the size that was tried.
        neurons: the share of routed experts' neurons that stay.
        memory: bytes that a GPU needs to sample one guided image (`model.gpu_memory`).
        plan: the plan.
        gpus: the GPUs, in GB, that hold this plan and no larger one; those that hold all plans or none are at no point.
        is_goal: whether its size was asked for.
        is_tried: whether its plan was carried out.
    """

    size: int
    bytes: int
    predicted_error: float
    expected_error: float
    neurons: float
    memory: int
    plan: CompressionPlan
    gpus: tuple[int, ...] = ()
    is_goal: bool = False
    is_tried: bool = False


@dataclass(frozen=True)
class SizeCurve:
    """Sizes against damage.

    Attributes:
        points: by rising size; errors do not rise.
        tried_error: error of the plan that was carried out, on held-out calibration images.
        bytes_before: the checkpoint's file.
    """

    points: tuple[CurvePoint, ...]
    tried_error: float
    bytes_before: int

    @property
    def tried(self) -> CurvePoint:
        """The point whose plan was carried out."""
        return next(point for point in self.points if point.is_tried)

    @property
    def factor(self) -> float:
        """What predicted errors are multiplied by: the ratio of tried to predicted error there, 1 where that is 0."""
        predicted = self.tried.predicted_error
        return self.tried_error / predicted if predicted else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the curve as JSON, with the plan of each point as ``ditmoe apply`` takes it."""
        return {
            "bytes_before": self.bytes_before,
            "tried_error": self.tried_error,
            "points": [
                {
                    "size": point.size,
                    "bytes": point.bytes,
                    "ratio": point.bytes / self.bytes_before,
                    "predicted_error": point.predicted_error,
                    "expected_error": point.expected_error,
                    "neurons": point.neurons,
                    "memory": point.memory,
                    "gpus": list(point.gpus),
                    "goal": point.is_goal,
                    "tried": point.is_tried,
                    "plan": point.plan.document(),
                }
                for point in self.points
            ],
        }


def grid(least: int, most: int, count: int = SIZES) -> list[int]:
    """Return `count` sizes from `least` to `most`, each the same factor above the one before; equal ones once."""
    inner = (round(least * (most / least) ** (place / (count - 1))) for place in range(1, count - 1))
    return sorted({least, *inner, most})


def middle_of(sizes: Sequence[int]) -> int:
    """Return the size that is tried."""
    return sizes[len(sizes) // 2]


@dataclass(frozen=True)
class Curving:
    """A request for a curve.

    Attributes:
        at: returns the planner of a compression to a number of bytes.
        goal: a size to mark; None for none.
    """

    at: Callable[[int], Compressing]
    goal: Goal | None = None

    def planner(self, work: Work) -> Compressing:
        """Return the planner of the middle size.

        Raises the errors of quantised checkpoints, of files that cannot be made smaller, and of the goal's size.
        """
        checkpoint = work.checkpoint
        require_plain(checkpoint)
        before = checkpoint.header.file_bytes
        request = self.at(before).request(work)
        least = JointProgram(request, unmeasured(request)).least
        if least >= before:
            raise InfeasibleError(
                f"{checkpoint.path}: has {before:,} bytes, and its smallest file takes {least:,}: there is no curve"
            )
        if self.goal is not None:
            self.at(self.goal.limit(checkpoint)).least_bytes(work)
        return self.at(middle_of(grid(least, before)))

    def curve(self, work: Work, profile: RoutingProfile) -> SizeCurve:
        """Return the curve: measure, solve for every size, and carry one plan out."""
        from ditmoe_cli.compression.joint.choosing import FIRST_KAPPA, Trials, settled_program
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        planner = self.planner(work)
        kept = kept_measures(work.checkpoint, profile, work.device(), once(work.note))
        calibrated = Calibrated(work.checkpoint, profile, work.device(), kept=kept)
        request = replace(holding(replace(planner.request(work), unrestricted={})), calibration=profile.calibration)
        before = work.checkpoint.header.file_bytes
        program, curves = settled_program(request, calibrated, lambda program: middle_of(grid(program.least, before)))
        goal = self.goal.limit(work.checkpoint) if self.goal is not None else None
        with tried_in(work) as folder:
            trials = Trials(request, calibrated, curves, folder)
            return size_curve(
                program, FIRST_KAPPA, lambda draft: trials.carried_out(draft).held.error, profile.digest, goal
            )


def size_curve(
    program: JointProgram, kappa: float, tried: Callable[[Draft], float], profile: str, goal: int | None = None
) -> SizeCurve:
    """Return the curve of a program at κ; `tried` carries a draft out and returns its error.

    A size whose plan is no better than that of a smaller one has no point: its plan is that one. Raises
    `InfeasibleError` for a `goal` below the smallest file.
    """
    checkpoint = program.request.checkpoint
    sizes = grid(program.least, checkpoint.header.file_bytes)
    solving = _Solving(program, kappa, profile)
    wanted = sorted({*sizes, *([goal] if goal is not None else [])})
    with phase("choosing plans", len(wanted) + len(GPUS), "plans") as advance:
        points = []
        for size in wanted:
            points.append(solving.at(size))
            advance(1)
        for gpu in GPUS:
            points += solving.held_by(gpu, points)
            advance(1)
    points = _improving(points)
    trial = min(points, key=lambda point: abs(math.log(point.size / middle_of(sizes))))
    error = tried(trial.draft)
    factor = error / trial.error if trial.error else 1.0
    holding_gpus = {gpu: _largest_held(gpu, points) for gpu in GPUS}
    asked = next((point for point in reversed(points) if goal is not None and point.size <= goal), None)
    found = tuple(
        CurvePoint(
            size=point.size,
            bytes=point.bytes,
            predicted_error=point.error,
            expected_error=point.error * factor,
            neurons=neurons_kept(checkpoint, point.plan),
            memory=point.memory,
            plan=point.plan,
            gpus=tuple(gpu for gpu, held in holding_gpus.items() if held is point),
            is_goal=point is asked,
            is_tried=point is trial,
        )
        for point in points
    )
    return SizeCurve(found, error, checkpoint.header.file_bytes)


@dataclass(frozen=True)
class _Solved:
    """A draft for a size: its plan, the bytes of its file, its predicted error, its memory on a GPU."""

    size: int
    draft: Draft
    plan: CompressionPlan
    bytes: int
    error: float
    memory: int


@dataclass(frozen=True)
class _Solving:
    """The program at κ, whose plans rest on a profile of that digest."""

    program: JointProgram
    kappa: float
    profile: str

    def at(self, size: int) -> _Solved:
        """Return the plan of least predicted error whose file takes at most `size` bytes."""
        draft = self.program.solved(size, self.kappa)
        request = self.program.request
        asked = replace(request, options={**request.options, "size": size})
        plan = plan_of(asked, draft, {}, self.profile)
        if not draft.formats and all(width == max(request.ladders[stem]) for stem, width in draft.widths.items()):
            plan = replace(plan, stages=())  # nothing to refit
        planned = planned_output(request.checkpoint, plan)
        error = draft.solution.error if draft.solution is not None else math.inf
        memory = guided_memory(planned.infos, planned.config)
        return _Solved(size, draft, plan, planned.predicted_bytes(request.output), error, memory)

    def held_by(self, gpu: int, points: Sequence[_Solved]) -> list[_Solved]:
        """Return the plan that fills the memory of a GPU of so many GB, if that lies between those of two points."""
        ordered = sorted(points, key=lambda point: point.size)
        room, below = gpu * GIGABYTE, _largest_held(gpu, ordered)
        if below is None:
            return []
        above = ordered[ordered.index(below) + 1]
        share = (room - below.memory) / (above.memory - below.memory)
        size = below.size + int(share * (above.size - below.size))
        for _ in range(_ROUNDS):
            if size <= below.size:
                break
            found = self.at(size)
            if found.memory <= room:
                return [found]
            size -= found.memory - room
        return []


def _largest_held(gpu: int, points: Sequence[_Solved]) -> _Solved | None:
    """Return the largest of points, by rising size, in the memory of a GPU of so many GB; None where it holds all."""
    held = [point for point in points if point.memory <= gpu * GIGABYTE]
    return held[-1] if held and held[-1] is not points[-1] else None


def _improving(points: Sequence[_Solved]) -> list[_Solved]:
    """Return points by rising size without those that are no better than a smaller one."""
    kept: list[_Solved] = []
    for point in sorted(points, key=lambda point: point.size):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept
