"""The precision planner: a format for every weight, so that the predicted error is least within a budget of bytes.

The budget is that of a file. Where it is given in bits it is what the same checkpoint takes with all routed, shared and
attention matrices at that width, everything else left as it is; between two widths it is interpolated. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Formats, Ordering, Rounding
from ditmoe_cli.compression.precision.candidates import Candidates, ties
from ditmoe_cli.compression.precision.program import Group, Option, Solution, solve
from ditmoe_cli.compression.precision.uniform import INTEGER_BITS, uniform_formats
from ditmoe_cli.errors import InfeasibleError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import quantized_members
from ditmoe_cli.model.opened import Checkpoint

UNTOUCHED = "16"  # the name of the option that leaves a weight as it is
_SECONDS = 30.0  # of a solver: a few weights of awkward sizes may take it longer than thousands do
_ROUNDS = 8  # in which the budget of the weights is adjusted to that of the file

T = TypeVar("T")
Errors = Mapping[str, Mapping[str, float]]
Offered = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class Budget:
    """How large the file may be: as with all matrices at `bits`, or `size` bytes."""

    bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise UsageError("give either --bits, as 3.25, or --size, as 2.5GiB")
        if self.bits is not None and not INTEGER_BITS[0] <= self.bits <= INTEGER_BITS[-1]:
            raise UsageError(f"--bits {self.bits:g}: choose from {INTEGER_BITS[0]} to {INTEGER_BITS[-1]}")

    def options(self) -> dict[str, float]:
        """Return what was given, for the reader of a plan."""
        return {name: value for name, value in (("bits", self.bits), ("size", self.size)) if value is not None}


def budget_bytes(checkpoint: Checkpoint, budget: Budget, candidates: Candidates, output: Output) -> int:
    """Return the largest file that a budget allows, in bytes."""
    if budget.size is not None:
        return budget.size
    assert budget.bits is not None
    below = max(bits for bits in INTEGER_BITS if bits <= budget.bits)
    above = min(bits for bits in INTEGER_BITS if bits >= budget.bits)
    sizes = [_uniform_bytes(checkpoint, bits, candidates, output) for bits in (below, above)]
    share = (budget.bits - below) / (above - below) if above > below else 0.0
    return math.floor(sizes[0] + share * (sizes[1] - sizes[0]))


def _uniform_bytes(checkpoint: Checkpoint, bits: int, candidates: Candidates, output: Output) -> int:
    fmt = candidates.format_of(str(bits))
    assert fmt is not None
    return file_bytes(checkpoint, uniform_formats(checkpoint, fmt), output)


def file_bytes(checkpoint: Checkpoint, formats: Mapping[str, str], output: Output) -> int:
    """Return the bytes of the file in which weights have `formats`, and the rest is left as it is."""
    plan = CompressionPlan("quantize", checkpoint.fingerprint, stages=(Formats(formats),))
    return planned_output(checkpoint, plan).predicted_bytes(output)


@dataclass(frozen=True)
class Choice:
    """What a method chose: formats by weight, without those left as they are, and their error where it was tried.

    `ordering` is how neurons are put in order first (`Formats.ordering` of the plan).
    """

    formats: Mapping[str, str]
    tried: float | None = field(default=None, kw_only=True)
    ordering: Ordering | None = field(default=None, kw_only=True)

    @property
    def found(self) -> dict[str, Any]:
        """What a plan is to say of them."""
        return {}


@dataclass(frozen=True)
class Mix(Choice):
    """A solved program: formats by weight, and what the solver says of them."""

    solution: Solution
    size: int

    @property
    def found(self) -> dict[str, Any]:
        """The error predicted, and how far from the least it may be."""
        mine = self.solution
        return {"predicted_error": mine.error, "bound": mine.bound, "gap": mine.gap, "solver": mine.solver}


def solve_mix(
    checkpoint: Checkpoint, errors: Errors, formats: Offered, candidates: Candidates, limit: int, output: Output
) -> Mix:
    """Choose a format for every weight in `formats` so that the file takes at most `limit` bytes.

    Raises `InfeasibleError` where even the narrowest formats take more, with the least that is possible.
    """
    groups = decisions(checkpoint, errors, formats, candidates)
    narrowest = _narrowest(groups)
    least = check_budget(checkpoint, formats, candidates, limit, output)
    budget = limit - least + sum(g.options[i].bytes for g, i in zip(groups, narrowest, strict=True))

    def mix_of(budget: int) -> Mix:
        solution = solve(groups, budget, time_limit=_SECONDS)
        chosen = _chosen(groups, solution.choice, formats, candidates)
        return Mix(chosen, solution, file_bytes(checkpoint, chosen, output))

    return fitted(budget, limit, mix_of, lambda mix: mix.size)


def fitted(budget: int, limit: int, choose: Callable[[int], T], size: Callable[[T], int]) -> T:
    """Return what `choose` makes of a budget of the weights' bytes, lowered until the file takes at most `limit` bytes.

    Only headers of other lengths make a difference, so a few rounds do. Raises `InfeasibleError` where they do not.
    """
    for _ in range(_ROUNDS):
        found = choose(budget)
        above = size(found) - limit
        if above <= 0:
            return found
        budget -= above
    raise InfeasibleError(f"no mix of formats was found that fits {limit:,} bytes; give more")


def check_budget(checkpoint: Checkpoint, formats: Offered, candidates: Candidates, limit: int, output: Output) -> int:
    """Return the bytes of the file with the narrowest formats. Raises `InfeasibleError` where that is above `limit`."""
    nothing = {name: dict.fromkeys(filter(None, fmts), 0.0) for name, fmts in formats.items()}
    groups = decisions(checkpoint, nothing, formats, candidates)
    least = file_bytes(checkpoint, _chosen(groups, _narrowest(groups), formats, candidates), output)
    if least > limit:
        raise InfeasibleError(f"the budget is {limit:,} bytes, and the narrowest formats take {least:,}; give more")
    return least


def _narrowest(groups: Sequence[Group]) -> list[int]:
    sizes = ([option.bytes for option in group.options] for group in groups)
    return [each.index(min(each)) for each in sizes]


def decisions(checkpoint: Checkpoint, errors: Errors, formats: Offered, candidates: Candidates) -> list[Group]:
    """Return the decisions of the program: a weight each, or those that are tied together."""
    decided = ties(list(formats), candidates.tied)
    members: dict[str, list[str]] = {}
    for name, decision in decided.items():
        members.setdefault(decision, []).append(name)
    groups = []
    for decision, names in members.items():
        shared = [fmt for fmt in formats[names[0]] if all(fmt in formats[name] for name in names)]
        if not shared:
            raise UsageError(f"--tie {','.join(candidates.tied)}: no format suits all of {', '.join(names)}")
        options = tuple(
            Option(
                fmt or UNTOUCHED,
                sum(weight_bytes(checkpoint, name, fmt) for name in names),
                sum(errors[name][fmt] if fmt else 0.0 for name in names),
            )
            for fmt in shared
        )
        groups.append(Group(decision, options))
    return groups


def weight_bytes(checkpoint: Checkpoint, name: str, fmt: str | None) -> int:
    """Return the bytes of a weight's tensors in a format."""
    info = checkpoint.weights[name].info
    return info.nbytes if fmt is None else sum(member.nbytes for member in quantized_members(info, fmt))


def _chosen(groups: Sequence[Group], choice: Sequence[int], formats: Offered, candidates: Candidates) -> dict[str, str]:
    """Return the format of each weight that gets one."""
    of_decision = {g.name: g.options[i].format for g, i in zip(groups, choice, strict=True)}
    decided = ties(list(formats), candidates.tied)
    return {name: of_decision[decided[name]] for name in formats if of_decision[decided[name]] != UNTOUCHED}


def plan_mixed(
    checkpoint: Checkpoint, profile: str, choice: Choice, options: Mapping[str, Any], rounding: Rounding | None
) -> CompressionPlan:
    """Return the plan of a choice that rests on the profile of digest `profile`."""
    return CompressionPlan(
        "quantize",
        checkpoint.fingerprint,
        profile,
        {**options, **choice.found},
        stages=(Formats(choice.formats, rounding, choice.ordering),),
    )
