"""What is asked of a compression to a size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.output_names import Size
from ditmoe_cli.api.quantizing_requests import Mixing
from ditmoe_cli.compression.joint.compressing import Compressing, Goal
from ditmoe_cli.compression.joint.for_upstream import ForUpstream
from ditmoe_cli.compression.joint.size_curve import Curving
from ditmoe_cli.compression.plan import Retraining
from ditmoe_cli.compression.planner import Planner
from ditmoe_cli.compression.precision.candidates import DEFAULT_GROUP_SIZE, Candidates
from ditmoe_cli.compression.training.training_request import DEFAULT_MINUTES
from ditmoe_cli.errors import UsageError
from ditmoe_cli.exporting.choices import Choices
from ditmoe_cli.exporting.targets import TARGETS

STACK = "stack"


@dataclass(frozen=True)
class Goals:
    """The size or the damage to reach."""

    size: Size | None = None
    ratio: float | None = None
    max_damage: float | None = None

    @property
    def goal(self) -> Goal:
        """The same as planners take it. Raises `UsageError` for none or several, and for values out of range."""
        return Goal(self.size.bytes if self.size is not None else None, self.ratio, self.max_damage)


@dataclass(frozen=True)
class Tying(Mixing):
    """Formats that a compression may choose from, and what it chooses alike."""

    tie: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether all experts of a block take one width, and one format for each of their matrices."""
        return STACK in self.tie

    @property
    def formats(self) -> Candidates:
        """The formats to choose from. Raises `UsageError` for unknown names and what has no effect."""
        if self.stacked and "experts" in self.protect:
            raise UsageError("⟨tie⟩ stack has no effect with ⟨protect⟩ experts, which keeps them as they are")
        matrices = replace(self, tie=tuple(name for name in self.tie if name != STACK))
        return matrices.candidates(DEFAULT_GROUP_SIZE, symmetric=False)


@dataclass(frozen=True)
class Retrained:
    """Training of what was compressed."""

    heal: bool = False
    steps: int | None = None
    minutes: float = DEFAULT_MINUTES
    clock: tuple[int, ...] | None = None

    @property
    def stage(self) -> Retraining | None:
        """The stage that trains; None for no training. Raises `UsageError` for times out of range."""
        if not self.heal and self.steps is None:
            refuse_idle(self, "without ⟨heal⟩ or ⟨steps⟩", "minutes", "clock")
            return None
        if self.heal:
            refuse_idle(self, "with ⟨heal⟩; learning few steps heals too", "steps")
        if not 0 < self.minutes < math.inf:
            raise UsageError(f"⟨minutes⟩ {self.minutes:g}: give a time above 0")
        return Retraining(self.minutes, student_steps=self.steps)


@dataclass(frozen=True)
class Loading:
    """What the result is to be loaded by."""

    target: str | None = None

    @property
    def choices(self) -> Choices:
        """What may be chosen."""
        return Choices() if self.target is None else TARGETS[self.target].choices


def compressing_of(goals: Goals, mixing: Tying, retrained: Retrained, loading: Loading) -> Planner:
    """Return what to compress to. Raises `UsageError` for values out of range and what does not go together."""
    goal = goals.goal
    if loading.target is not None and not loading.choices.restrict:
        note(f"⟨target⟩ {loading.target} leaves nothing out: it holds whatever compress may choose")
    if loading.choices.alike:
        beside = f"with ⟨target⟩ {loading.target}"
        refuse_idle(mixing, f"{beside}, which takes no formats", "allow", "floor", "protect", "tie")
        refuse_idle(retrained, f"{beside}, whose result ditmoe heal takes", "heal", "steps", "minutes")
        refuse_idle(goals, f"{beside}; give ⟨size⟩ or ⟨ratio⟩", "max_damage")
        return ForUpstream(goal)
    if retrained.stage is not None:
        refuse_idle(goals, "with ⟨heal⟩ and ⟨steps⟩, which take a ⟨size⟩ or a ⟨ratio⟩", "max_damage")
    formats = replace(mixing.formats, target=loading.target)
    return Compressing(goal, formats, mixing.stacked, retrained.stage, retrained.clock)


def curving_of(goals: Goals, mixing: Tying, loading: Loading) -> Curving:
    """Return what curve to measure, on which a size may be marked. Raises `UsageError` as `compressing_of` does."""
    refuse_idle(goals, "on a curve of sizes, which tries one plan; give a size", "max_damage")
    if loading.choices.alike:
        refuse_idle(loading, "on a curve of sizes", "target")
    goal = None if goals.size is None and goals.ratio is None else goals.goal
    formats = replace(mixing.formats, target=loading.target)
    return Curving(lambda size: Compressing(Goal(size), formats, mixing.stacked), goal)
