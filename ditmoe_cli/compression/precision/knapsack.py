"""The multiple-choice knapsack solved exactly, for programs that a solver gave no proof of. Torch-free.

Group after group, all sums (bytes, error) that choices of the groups so far may have are listed. Of these

  - one that takes no fewer bytes and has no less error than another goes (Nemhauser & Ullmann 1969,
    https://doi.org/10.1287/mnsc.15.9.494),
  - one that leaves too little for the fewest bytes of the groups to come goes,
  - and so does one whose reduced costs (`lagrange.reduced_costs`) add up to more than the gap: no choice that goes on
    from it is better than the one that is known.

How many remain depends on the numbers; the list is given up where it grows too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ditmoe_cli.compression.precision.lagrange import Group, reduced_costs

MOST_SUMS = 100_000  # at a time: a second of work or so


class _Sum(NamedTuple):
    """What a choice of the groups so far takes and costs; what of the group before it follows, and its option."""

    bytes: int
    error: float
    reduced: float
    before: int
    option: int


def exact(
    groups: Sequence[Group],
    options: Sequence[Sequence[int]],
    budget: int,
    multiplier: float,
    gap: float,
    most: int = MOST_SUMS,
) -> tuple[int, ...] | None:
    """Return the choice of least error that fits `budget`, or None where more than `most` sums would be listed.

    Args:
        groups: of which each takes one option.
        options: those of each group that may be taken, at least one.
        budget: bytes.
        multiplier: λ, in error per byte, by which costs are reduced.
        gap: known error less the bound at λ; None is returned too where nothing lies within it.
        most: sums at a time.
    """
    least = [min(group.options[o].bytes for o in mine) for group, mine in zip(groups, options, strict=True)]
    room = budget - sum(least)
    sums = [_Sum(0, 0.0, 0.0, -1, -1)]
    lists: list[list[_Sum]] = []
    for group, mine, fewest in zip(groups, options, least, strict=True):
        costs = reduced_costs(group, multiplier)
        # a hair more than the gap, as where options are ruled out
        longer = sorted(
            _Sum(each.bytes + group.options[o].bytes - fewest, each.error + group.options[o].error, reduced, i, o)
            for i, each in enumerate(sums)
            for o in mine
            if each.bytes + group.options[o].bytes - fewest <= room
            and (reduced := each.reduced + costs[o]) <= gap * (1 + 1e-9)
        )
        sums = _undominated(longer)
        if not sums or len(sums) > most:
            return None
        lists.append(sums)
    choice: list[int] = []
    index = len(sums) - 1  # the most bytes, and the least error
    for listed in reversed(lists):
        choice.append(listed[index].option)
        index = listed[index].before
    return tuple(reversed(choice))


def _undominated(ordered: Sequence[_Sum]) -> list[_Sum]:
    """Return sums by rising bytes and strictly falling error."""
    kept: list[_Sum] = []
    for each in ordered:
        if not kept or each.error < kept[-1].error:
            kept.append(each)
    return kept
