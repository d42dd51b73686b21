"""One option for each group under a budget of bytes, by Lagrangian relaxation. Torch- and numpy-free.

The multiple-choice knapsack: group g takes exactly one option o, of b_go bytes and error e_go >= 0. With B the budget,

    minimise Σ_g e_g,o(g)   subject to   Σ_g b_g,o(g) <= B.

A price λ >= 0 per byte instead of the budget separates the groups, and gives a lower bound for every λ:

    L(λ) = Σ_g min_o (e_go + λ b_go) - λ B  <=  optimum.

max_λ L(λ) is the optimum of the linear relaxation (Sinha & Zoltners 1979, https://doi.org/10.1287/opre.27.3.503).
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ditmoe_cli.errors import BadInputError, InfeasibleError

# Exchanges tried after the greedy fill. Each takes a pass over all options, and later ones gain little.
_EXCHANGES = 32
# Least gain of an exchange, relative to the errors it moves: a smaller one could be rounding, and repeat for ever.
_NOISE = 1e-12
# Larger errors, times bytes, could overflow.
_LARGEST = 1e200


@dataclass(frozen=True)
class Option:
    """A number format for a group, its bytes, and the error that it causes, in any one unit."""

    format: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Group:
    """One weight matrix, or several tied ones, and the options of which it takes exactly one."""

    name: str
    options: tuple[Option, ...]


def check(groups: Sequence[Group], budget: int) -> None:
    """Check groups and budget.

    Raises `BadInputError` for groups without options and for errors or bytes out of range, `InfeasibleError` where the
    least bytes exceed `budget`.
    """
    for group in groups:
        if not group.options:
            raise BadInputError(f"group {group.name}: it has no options; give it one format or more")
        for option in group.options:
            if not (math.isfinite(option.error) and option.error >= 0):
                raise BadInputError(
                    f"group {group.name}, format {option.format}: its error is {option.error}; give a finite one >= 0"
                )
            if option.bytes < 0:
                raise BadInputError(f"group {group.name}, format {option.format}: it takes {option.bytes} bytes")
    if sum(max(option.error for option in group.options) for group in groups) > _LARGEST:
        raise BadInputError(f"the groups' errors add up to more than {_LARGEST:g}; give them in a larger unit")
    least = sum(min(option.bytes for option in group.options) for group in groups)
    if least > budget:
        raise InfeasibleError(
            f"a budget of {budget} bytes cannot be met: {len(groups)} groups take {least} bytes at the least; "
            "raise it to that, or offer smaller formats"
        )


def undominated(group: Group) -> tuple[int, ...]:
    """Return the indices of the options worth taking, by rising bytes and strictly falling error.

    An option is left out where another takes no more bytes and has no more error. Of options equal in both the first
    remains.
    """
    kept: list[int] = []
    order = sorted(range(len(group.options)), key=lambda o: (group.options[o].bytes, group.options[o].error, o))
    for o in order:
        if not kept or group.options[o].error < group.options[kept[-1]].error:
            kept.append(o)
    return tuple(kept)


def error_of(groups: Sequence[Group], choice: Sequence[int]) -> float:
    """Return Σ_g e_g,o(g), correctly rounded, so that it does not depend on the groups' order."""
    return math.fsum(group.options[o].error for group, o in zip(groups, choice, strict=True))


def bytes_of(groups: Sequence[Group], choice: Sequence[int]) -> int:
    """Return Σ_g b_g,o(g)."""
    return sum(group.options[o].bytes for group, o in zip(groups, choice, strict=True))


def smallest_options(groups: Sequence[Group]) -> list[int]:
    """Return the index of each group's option of fewest bytes."""
    return [min(range(len(group.options)), key=lambda o: group.options[o].bytes) for group in groups]


def usable(groups: Sequence[Group], budget: int) -> int:
    """Return the part of `budget` that can be spent: the least bytes, plus a multiple of all options' common step.

    No choice of `undominated` options takes more, so a bound at this budget holds for the whole one. Where groups are
    equally large the bound is much tighter.
    """
    worthwhile = [[group.options[o].bytes for o in undominated(group)] for group in groups]
    least = sum(sizes[0] for sizes in worthwhile)
    step = math.gcd(*(size - sizes[0] for sizes in worthwhile for size in sizes))
    return least + (budget - least) // step * step if step else least


def reduced_costs(group: Group, multiplier: float) -> tuple[float, ...]:
    """Return r_o = e_o + λ b_o - min_o' (e_o' + λ b_o') >= 0, the least that option o adds to the bound.

    Bytes are taken above the group's least, which changes the rounding only.
    """
    least = min(option.bytes for option in group.options)
    costs = [option.error + multiplier * (option.bytes - least) for option in group.options]
    lowest = min(costs)
    return tuple(cost - lowest for cost in costs)


def dual(groups: Sequence[Group], budget: int, multiplier: float) -> float:
    """Return L(λ) as defined above, lowered by the largest rounding error, and 0 where that is negative."""
    room = budget
    costs: list[float] = []
    for group in groups:
        least = min(option.bytes for option in group.options)
        costs.append(min(option.error + multiplier * (option.bytes - least) for option in group.options))
        room -= least
    if multiplier == 0.0:
        return math.fsum(costs)
    paid = multiplier * room
    rounding = 4 * sys.float_info.epsilon * (math.fsum(costs) + paid)
    return max(0.0, math.fsum((*costs, -paid, -rounding)))


def relax(groups: Sequence[Group], budget: int) -> tuple[tuple[int, ...], float]:
    """Return (choice, λ): the linear relaxation without its one fractional group, and the λ that maximises L.

    All groups start at their fewest bytes and step along their lower convex hull, the steepest steps of all groups
    first (error saved per byte; of equal ones the first group's), until a step does not fit: its slope is λ. Where all
    fit, λ = 0.
    Takes O(n log n) for n options.
    """
    hulls = [_hull(group) for group in groups]
    choice = [hull[0] for hull in hulls]
    room = budget - bytes_of(groups, choice)
    steps = sorted(
        (-_slope(group.options[a], group.options[b]), g, b)
        for g, (group, hull) in enumerate(zip(groups, hulls, strict=True))
        for a, b in itertools.pairwise(hull)
    )
    for slope, g, o in steps:
        options = groups[g].options
        more = options[o].bytes - options[choice[g]].bytes
        if more > room:
            return tuple(choice), -slope
        room -= more
        choice[g] = o
    return tuple(choice), 0.0


def lagrange(groups: Sequence[Group], budget: int) -> tuple[tuple[int, ...], float]:
    """Return (choice, bound): an option index per group that fits `budget`, and max_λ L(λ) <= optimum <= its error.

    The choice is `relax`'s after `improve`, L(λ) is taken at the `usable` budget. Raises what `check` does.
    """
    check(groups, budget)
    budget = usable(groups, budget)
    choice, multiplier = relax(groups, budget)
    return improve(groups, budget, choice), dual(groups, budget, multiplier)


def improve(groups: Sequence[Group], budget: int, choice: Sequence[int]) -> tuple[int, ...]:
    """Return a choice of no more error than `choice`, which fits `budget`.

    Remaining bytes are spent on the option that saves most error per byte, as long as one fits. Then the best exchange
    is made, one group giving bytes to another, and so on in turns. Of equal ones the first group's is taken.
    """
    better = list(choice)
    worthwhile = [undominated(group) for group in groups]
    _fill(groups, budget, better, worthwhile)
    for _ in range(_EXCHANGES):
        if not _exchange(groups, budget, better, worthwhile):
            break
        _fill(groups, budget, better, worthwhile)
    return tuple(better)


def _slope(small: Option, large: Option) -> float:
    """Return the error that the larger option saves per additional byte."""
    return (small.error - large.error) / (large.bytes - small.bytes)


def _hull(group: Group) -> list[int]:
    """Return the options on the lower convex hull of (bytes, error), by rising bytes and falling slope."""
    options = group.options
    hull: list[int] = []
    for o in undominated(group):
        while len(hull) > 1 and _slope(options[hull[-2]], options[hull[-1]]) <= _slope(options[hull[-1]], options[o]):
            hull.pop()
        hull.append(o)
    return hull


def _fill(groups: Sequence[Group], budget: int, choice: list[int], worthwhile: Sequence[Sequence[int]]) -> None:
    """Spend the bytes that `choice` leaves of `budget` on the options that save most error per byte, in place."""
    room = budget - bytes_of(groups, choice)

    def upgrades(g: int) -> list[tuple[float, int, int, int]]:
        options, now = groups[g].options, choice[g]
        return [
            (-_slope(options[now], options[o]), g, o, now)
            for o in worthwhile[g]
            if options[now].bytes < options[o].bytes <= options[now].bytes + room
            and options[o].error < options[now].error
        ]

    heap = [upgrade for g in range(len(groups)) for upgrade in upgrades(g)]
    heapq.heapify(heap)
    while heap:
        _, g, o, before = heapq.heappop(heap)
        more = groups[g].options[o].bytes - groups[g].options[before].bytes
        # the room only shrinks: a step that does not fit now never will from the same option
        if choice[g] == before and more <= room:
            choice[g] = o
            room -= more
            for upgrade in upgrades(g):
                heapq.heappush(heap, upgrade)


# Δbytes, Δerror, group, option
_Move = tuple[int, float, int, int]


def _exchange(groups: Sequence[Group], budget: int, choice: list[int], worthwhile: Sequence[Sequence[int]]) -> bool:
    """Make the exchange between two groups that saves most error, in place; return whether any saves error."""
    room = budget - bytes_of(groups, choice)
    moves: list[_Move] = []
    for g, group in enumerate(groups):
        now = group.options[choice[g]]
        moves += [(group.options[o].bytes - now.bytes, group.options[o].error - now.error, g, o) for o in worthwhile[g]]
    takes = sorted(move for move in moves if move[0] > 0)
    sizes = [take[0] for take in takes]
    # of the first 1, 2, ... moves: the best, and the best of another group
    best: list[tuple[_Move, _Move | None]] = []
    for take in takes:
        first, second = best[-1] if best else (take, None)
        if take[1] < first[1]:
            first, second = take, first if first[2] != take[2] else second
        elif take[2] != first[2] and (second is None or take[1] < second[1]):
            second = take
        best.append((first, second))
    exchange: tuple[float, _Move, _Move] | None = None
    for give in moves:
        fitting = bisect_right(sizes, room - give[0]) if give[0] < 0 else 0
        for other in best[fitting - 1] if fitting else ():
            if other is None or other[2] == give[2]:
                continue
            saved = other[1] + give[1]
            if saved < -_NOISE * abs(give[1]) and (exchange is None or saved < exchange[0]):
                exchange = saved, give, other
    if exchange is None:
        return False
    for _, _, g, o in exchange[1:]:
        choice[g] = o
    return True
