"""The smallest file within a damage: sizes are tried until one is within it and the next smaller one is not.

1. The size at which the program expects the damage (`damage.search`) is where amplifications are measured, and where
   the way of least error is searched: a weight κ of structure against bits, or two stages (`choosing.best_way`).
2. That way is kept, and each further size is one plan that is carried out, on all tokens.

Of these the smallest within the damage is taken, whose weights are then computed already. Takes as many carry-outs as a
compression to a size, and at most `damage.MOST_SIZES` less one beside; more only while none is within the damage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.joint.choosing import Trials, Tried, Way, best_way, settled_program
from ditmoe_cli.compression.joint.damage import FIRST_RATIO, first_place, search, sizes_between, upper_bound
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, JointRequest
from ditmoe_cli.compression.replay.eliminations import Curves
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.workfolder import WorkFolder

HOPELESS = 2.0
"""Damage of the largest plan over the one allowed, beyond which no other way is tried: ways differ by less."""


@dataclass(frozen=True)
class Found:
    """The plan of the smallest file within a damage, the program and curves that it rests on, and its figures."""

    program: JointProgram
    curves: Curves
    tried: Tried
    figures: dict[str, Any]


def smallest_within(
    request: JointRequest, calibrated: Calibrated, folder: WorkFolder, limit: int, allowed: float
) -> Found:
    """Return the smallest plan found of at most `limit` bytes whose damage is at most `allowed`.

    Raises `InfeasibleError` where the largest one has more, with the least damage that was found, and `BadInputError`
    where the profile holds out fewer than two images.
    """

    def expected_size(unsettled: JointProgram) -> int:
        sizes = sizes_between(unsettled.least, limit)
        drafts = _Drafts(unsettled, calibrated, sizes)
        return sizes[first_place(lambda at: drafts.predicted(at) * FIRST_RATIO <= allowed, 0, len(sizes) - 1)]

    program, curves = settled_program(request, calibrated, expected_size)
    trials = Trials(request, calibrated, curves, folder)
    sizes = sizes_between(program.least, limit)
    drafts = _Drafts(program, calibrated, sizes)
    tried: list[Tried] = []

    def damage(place: int) -> float:
        if not tried:
            if place == len(sizes) - 1 and damage_of(trials.carried_out(drafts.at(place))) > HOPELESS * allowed:
                raise _refusal(request, damage_of(trials.carried_out(drafts.at(place))), allowed)
            drafts.way = best_way(program, trials, sizes[place])
        tried.append(trials.carried_out(drafts.at(place)))
        best, *others = sorted(tried, key=lambda each: _rank(each, allowed))
        for other in others:
            if other.plan.work_digest != best.plan.work_digest:  # of two sizes the plan may be the same
                trials.drop(other)
        return damage_of(tried[-1])

    searched = search(sizes, drafts.predicted, damage, allowed)
    best = min(tried, key=lambda each: _rank(each, allowed))
    if searched.met is None:
        raise _refusal(request, damage_of(best), allowed)
    figures: dict[str, Any] = {"tried_error": best.held.error, "damage": damage_of(best)}
    smaller = [each for each in tried if each.bytes < best.bytes]
    if smaller:
        next_smaller = max(smaller, key=lambda each: each.bytes)
        figures["next_smaller"] = {"bytes": next_smaller.bytes, "damage": damage_of(next_smaller)}
    return Found(program, curves, best, figures)


def damage_of(tried: Tried) -> float:
    """Return the damage of a plan that was carried out. Raises `BadInputError` for fewer than two held-out images."""
    return upper_bound(tried.held.errors, tried.held.references)


def _rank(tried: Tried, allowed: float) -> tuple[bool, float]:
    """Return what the best plan has least of: bytes, of those within the damage allowed; else damage."""
    damage = damage_of(tried)
    return damage > allowed, tried.bytes if damage <= allowed else damage


def _refusal(request: JointRequest, least: float, allowed: float) -> InfeasibleError:
    return InfeasibleError(
        f"{request.checkpoint.path}: no smaller file of it was found within ⟨max_damage⟩ {allowed:g}; the least damage "
        f"that was found is {least:.3g}: give that or more"
    )


@dataclass
class _Drafts:
    """The drafts that a way makes for each of some sizes, by place."""

    program: JointProgram
    calibrated: Calibrated
    sizes: tuple[int, ...]
    way: Way = field(default_factory=Way)
    made: dict[tuple[Way, int], Draft] = field(default_factory=dict)

    def at(self, place: int) -> Draft:
        """Return the draft for a size."""
        if (self.way, place) not in self.made:
            self.made[self.way, place] = self.way.draft(self.program, self.calibrated, self.sizes[place])
        return self.made[self.way, place]

    def predicted(self, place: int) -> float:
        """Return the predicted error of the draft for a size."""
        solution = self.at(place).solution
        assert solution is not None
        return solution.error
