"""What is asked of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.planning_requests import Refitting
from ditmoe_cli.compression.counts import parse_keep
from ditmoe_cli.compression.delta.delta_plan import DEFAULT_RATIOS, Differencing
from ditmoe_cli.compression.merge.merging import Merging
from ditmoe_cli.compression.plan import Differences
from ditmoe_cli.errors import UsageError
from ditmoe_cli.formats.differences import DeltaFormat


@dataclass(frozen=True)
class Grouping:
    """How experts are merged."""

    groups: str | None = None
    method: str = "m-smoe"
    router: str = "map"


def delta_ratio_in_range(ratio: float) -> float:
    """Return a ratio that is above 0 and at most 1. Raises `ValueError` for any other."""
    if not 0.0 < ratio <= 1.0:
        raise ValueError("give a number above 0 and at most 1.0")
    return ratio


@dataclass(frozen=True)
class DeltaOptions:
    """How experts are stored as differences."""

    delta: str | None = None
    delta_ratio: float | None = None


def merging_of(grouping: Grouping, refitting: Refitting) -> Merging:
    """Return what to merge. Raises `UsageError` for unknown names and values out of range."""
    groups, method, router = grouping.groups, grouping.method, grouping.router
    if groups is None:
        raise UsageError("⟨groups⟩ is missing: give a ratio such as 0.5 or a count such as 4, or ⟨delta⟩ in its place")
    keep = parse_keep(groups, "groups")
    return Merging(keep, method, "slice" if router == "slice" else "ghost", refitting.repair(router))


def differencing_of(options: DeltaOptions, grouping: Grouping, refitting: Refitting) -> Differencing | None:
    """Return how to store differences, None where that is not asked for. Raises `UsageError`."""
    if options.delta is None:
        if options.delta_ratio is not None:
            raise UsageError("⟨delta_ratio⟩ needs ⟨delta⟩ svd or ⟨delta⟩ ternary")
        return None
    if grouping.groups is not None:
        raise UsageError("⟨groups⟩ and ⟨delta⟩ exclude each other: differences leave every expert in its place")
    refuse_idle(grouping, "with ⟨delta⟩, which merges no experts", "method", "router")
    refuse_idle(refitting, "with ⟨delta⟩, which refits no experts", "refit", "refit_tokens")
    kind, ratio = cast(DeltaFormat, options.delta), options.delta_ratio
    return Differencing(Differences(kind, DEFAULT_RATIOS[kind] if ratio is None else ratio))
