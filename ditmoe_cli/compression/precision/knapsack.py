"""The multiple-choice knapsack solved exactly, for programs that no solver proved. Torch-free.

Group after group, the sums (bytes, error) of all choices of the groups so far are listed. A sum is dropped

  - where another takes no more bytes and has no more error (Nemhauser & Ullmann 1969,
    https://doi.org/10.1287/mnsc.15.9.494),
  - where it leaves too little for the fewest bytes of the groups to come,
  - where its reduced costs (`lagrange.reduced_costs`) add up to more than the gap: no choice that continues it is
    better than the known one.

The number of sums depends on the sizes and errors; `exact` returns None where there are too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ditmoe_cli.compression.precision.lagrange import Group, reduced_costs

MOST_SUMS = 100_000  # at a time: about a second of work


class _Sum(NamedTuple):
    """The sums of a choice of the groups so far.

    Attributes:
        bytes: sum of bytes above each group's fewest.
        error: sum of errors.
        reduced: sum of reduced costs.
        before: index of the sum that it continues, in the list of the group before.
        option: the last group's option.
    """

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
        groups: the groups, each of which takes one option.
        options: indices of each group's options that may be taken, at least one.
        budget: bytes.
        multiplier: λ, in error per byte, by which costs are reduced.
        gap: known error less the bound at λ; None is returned too where no choice lies within it.
        most: largest number of sums in a list.
    """
    least = [min(group.options[o].bytes for o in allowed) for group, allowed in zip(groups, options, strict=True)]
    room = budget - sum(least)
    sums = [_Sum(0, 0.0, 0.0, -1, -1)]
    lists: list[list[_Sum]] = []
    for group, allowed, fewest in zip(groups, options, least, strict=True):
        costs = reduced_costs(group, multiplier)
        # slightly more than the gap, as where options are ruled out
        longer = sorted(
            _Sum(each.bytes + group.options[o].bytes - fewest, each.error + group.options[o].error, reduced, i, o)
            for i, each in enumerate(sums)
            for o in allowed
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
