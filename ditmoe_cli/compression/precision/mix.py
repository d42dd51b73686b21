"""Mixes of formats: the choice of a method, or the solution of the program of least error. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ditmoe_cli.compression.plan import Ordering
from ditmoe_cli.compression.precision.lagrange import Group, Option, bytes_of, smallest_options
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.precision.program import Solution, solve, solver_named
from ditmoe_cli.errors import InfeasibleError, UsageError
from ditmoe_cli.progress import phase

UNTOUCHED = "16"  # the name of the option that leaves a weight as it is
_SECONDS = 30.0  # time limit of a solver: a few weights of awkward sizes may take longer than thousands do
_ROUNDS = 8  # rounds that lower the budget of the weights by the excess of the file

T = TypeVar("T")
Errors = Mapping[str, Mapping[str, float]]
"""The error of each weight in each format."""


@dataclass(frozen=True)
class Mix:
    """A mix of formats.

    Attributes:
        formats: the format of each weight that gets one.
        tried_error: error of the guided prediction with all weights rounded at once; None where it was not measured.
        ordering: the order that neurons are put in first (`Formats.ordering` of the plan).
        failures: solvers that gave no proof (`Solution.failures`).
    """

    formats: Mapping[str, str]
    tried_error: float | None = field(default=None, kw_only=True)
    ordering: Ordering | None = field(default=None, kw_only=True)
    failures: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def options(self) -> dict[str, Any]:
        """Figures of the choice itself, for the options of a plan."""
        return {"solver": solver_named("fallback", self.failures)} if self.failures else {}


@dataclass(frozen=True)
class SolvedMix(Mix):
    """A mix that solves the program of least error: the solution, and the bytes of the file."""

    solution: Solution
    size: int

    @property
    def options(self) -> dict[str, Any]:
        """The predicted error, its bound and gap, and the solver."""
        solution = self.solution
        return {
            "predicted_error": solution.error,
            "bound": solution.bound,
            "gap": solution.gap,
            "solver": solver_named(solution.solver, self.failures),
        }


def narrowest_bytes(request: MixRequest) -> int:
    """Return the bytes of the file with the narrowest formats, whatever the limit.

    Raises `UsageError` where no format suits all weights of a tie.
    """
    no_errors = {name: dict.fromkeys(filter(None, fmts), 0.0) for name, fmts in request.formats.items()}
    groups = decisions(request, no_errors)
    return request.size(_formats(request, groups, smallest_options(groups)))


def least_bytes(request: MixRequest) -> int:
    """Return the bytes of the file with the narrowest formats. Raises `InfeasibleError` where they exceed the limit."""
    least = narrowest_bytes(request)
    if least > request.limit:
        raise too_small(request.limit, least)
    return least


def too_small(limit: int, least: int) -> InfeasibleError:
    """Return the error of a budget below the `least` bytes that do."""
    return InfeasibleError(f"the budget is {limit:,} bytes, and the narrowest formats take {least:,}; give more")


def solve_mix(request: MixRequest, errors: Errors, least: int) -> SolvedMix:
    """Return the mix of least error whose file takes at most the limit; `least` is the result of `least_bytes`."""
    groups = decisions(request, errors)
    fewest = bytes_of(groups, smallest_options(groups))

    def mix_within(budget: int) -> SolvedMix:
        solution = solve(groups, budget, time_limit=_SECONDS)
        formats = _formats(request, groups, solution.choice)
        return SolvedMix(formats, solution, request.size(formats), failures=solution.failures)

    with phase(f"choosing formats for {request.checkpoint.name}"):
        return fitted(mix_within, lambda mix: mix.size, request.limit, fewest, request.limit - least)


def fitted(choose: Callable[[int], T], size: Callable[[T], int], limit: int, narrowest: int, room: int) -> T:
    """Return the choice for a budget of the weights' bytes, lowered until the file takes at most `limit` bytes.

    Args:
        choose: returns the choice for a budget.
        size: returns the bytes of a choice's file.
        limit: bytes of the largest file allowed.
        narrowest: bytes of the weights in their narrowest formats, which fit: the lowest budget.
        room: limit less the bytes of the file with the narrowest formats.

    Only lengths of headers keep both budgets apart, so a few rounds suffice. Where a choice does not use up its budget,
    the next budget may give the same choice: after `_ROUNDS` rounds budgets fall twice as fast each time. Raises
    `InfeasibleError` where not even the narrowest choice fits.
    """
    above = 0
    for round in itertools.count():
        chosen = choose(narrowest + room)
        above = size(chosen) - limit
        if above <= 0:
            return chosen
        if room == 0:
            break
        room = max(room - above * 2 ** max(round - _ROUNDS, 0), 0)
    raise InfeasibleError(f"no mix of formats was found that fits {limit:,} bytes; give {above:,} more")


def decisions(request: MixRequest, errors: Errors) -> list[Group]:
    """Return the groups of the program: one for each decision, with the formats that suit all its weights as options.

    Raises `UsageError` where no format does.
    """
    formats = request.formats
    groups = []
    for decision, names in request.decisions.items():
        shared = [fmt for fmt in formats[names[0]] if all(fmt in formats[name] for name in names)]
        if not shared:
            raise UsageError(f"⟨tie⟩ {','.join(request.candidates.tied)}: no format suits all of {', '.join(names)}")
        options = tuple(
            Option(
                fmt or UNTOUCHED,
                sum(request.sizes.of_weight(name, fmt) for name in names),
                sum(errors[name][fmt] if fmt else 0.0 for name in names),
            )
            for fmt in shared
        )
        groups.append(Group(decision, options))
    return groups


def _formats(request: MixRequest, groups: Sequence[Group], choice: Sequence[int]) -> dict[str, str]:
    """Return the format of each weight that gets one."""
    of_decision = {group.name: group.options[o].format for group, o in zip(groups, choice, strict=True)}
    of_weight = {name: of_decision[decision] for decision, names in request.decisions.items() for name in names}
    return {name: of_weight[name] for name in request.formats if of_weight[name] != UNTOUCHED}
