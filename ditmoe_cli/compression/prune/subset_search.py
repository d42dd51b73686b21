"""The best subset of experts by any error of subsets: exact where there are few, else greedy with swaps. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ditmoe_cli.errors import InfeasibleError

EXACT = 20_000  # subsets that are all tried: those of 8 out of 16 experts are 12,870
_PROGRESS = 1e-6  # relative; an improvement below it may be rounding, and swaps would go on for ever

Subset = tuple[int, ...]
Errors = Callable[[Sequence[Subset]], Sequence[float]]


def best_subset(experts: int, count: int, errors: Errors) -> Subset:
    """Return the `count` of `experts` with the least error, ascending; ties fall to the lexicographically first.

    `errors` gives the error (at least 0) of each subset of kept experts. Beyond `EXACT` subsets experts are dropped one
    by one, each time the one that leaves the least error; then single kept and dropped experts are swapped as long as
    that helps. Raises `InfeasibleError` where `count` is not in 1..`experts`.
    """
    if not 1 <= count <= experts:
        raise InfeasibleError(f"cannot keep {count} of {experts} experts")
    if math.comb(experts, count) <= EXACT:
        return _least(list(itertools.combinations(range(experts), count)), errors)[1]
    kept = tuple(range(experts))
    error = math.inf
    while len(kept) > count:
        error, kept = _least(list(itertools.combinations(kept, len(kept) - 1)), errors)
    while True:
        better, swapped = _least(_swaps(kept, experts), errors)
        if not better < error * (1 - _PROGRESS):
            return kept
        error, kept = better, swapped


def _least(subsets: Sequence[Subset], errors: Errors) -> tuple[float, Subset]:
    return min(zip(errors(subsets), subsets, strict=True))


def _swaps(kept: Subset, experts: int) -> list[Subset]:
    """Return all subsets with one kept expert replaced by a dropped one."""
    dropped = [e for e in range(experts) if e not in kept]
    return [tuple(sorted({*kept, new} - {old})) for old in kept for new in dropped]
