"""Bins of consecutive steps. Torch-free."""

from __future__ import annotations

import itertools

from ditmoe_cli.errors import UsageError

MOST_BINS = 10  # where no number of bins is given


def choose_bins(bins: int | None, steps: int) -> int:
    """Return the number of step bins: `bins`, by default 10, or as many as there are steps where these are fewer.

    Raises `UsageError` for a given number outside 1 to `steps`.
    """
    if bins is None:
        return min(MOST_BINS, steps)
    if not 1 <= bins <= steps:
        raise UsageError(f"⟨bins⟩ {bins}: must be between 1 and the {steps} steps")
    return bins


def step_bin(step: int, steps: int, bins: int) -> int:
    """Return the bin ⌊step · bins / steps⌋ of a step; step 0 starts from pure noise."""
    return step * bins // steps


def steps_of_bins(steps: int, bins: int) -> list[range]:
    """Return the steps of each bin: the inverse of `step_bin`."""
    first = [-(-b * steps // bins) for b in range(bins + 1)]
    return [range(*ends) for ends in itertools.pairwise(first)]
