"""The schedule of a budget: chosen by the program, and tried on other images.

Errors of the program add up over blocks and steps, which they do only near enough. So the program is solved for several
ways in which they may, each choice is tried on images that its errors were not replayed on, and the best of all is
taken, methods that choose for the whole model among it. What an error in a bin makes of the final images is measured by
a bin in which every second evaluation is extrapolated, all others being computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import SLOPES, needed_statistics
from ditmoe_cli.diffusion.followed_predictions import fitted_slopes
from ditmoe_cli.diffusion.scheduled_guidance import statistics_of
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.block_choices import ComputeTable, full_table, table_of
from ditmoe_cli.model.scheduled import Statistics, no_statistics
from ditmoe_cli.progress import phase
from ditmoe_cli.scheduling.bin_options import Measured, bins_of, measured, measured_evaluations
from ditmoe_cli.scheduling.fewer_steps import FewerSteps, against_fewer_steps, cost_of, weak_share
from ditmoe_cli.scheduling.patterns import ALWAYS_FULL, Pattern
from ditmoe_cli.scheduling.schedule_program import (
    BinOptions,
    BranchOptions,
    ChosenBin,
    ChosenBins,
    cells_of,
    chosen_bins,
    least_flops,
)
from ditmoe_cli.scheduling.schedule_request import Asked, check_least
from ditmoe_cli.scheduling.way_states import Outcome, Visited, Way, by_table, visited
from ditmoe_cli.scheduling.way_statistics import way_statistics
from ditmoe_cli.scheduling.whole_methods import INHERITED, PLANNED, needs_statistics, whole_table


@dataclass(frozen=True)
class Adding:
    """How errors of bins are taken to add up.

    Attributes:
        amplified: the power of what is known of their amplification.
        exponent: that of errors.
        alike: whether all blocks of a bin do alike, so that no errors of blocks are added up.
        follows: whether predictions may follow the state; such errors add up otherwise than those of blocks.
    """

    amplified: float
    exponent: float
    alike: bool = False
    follows: bool = False


ADDINGS = tuple(
    Adding(amplified, exponent, alike, follows)
    for follows in (True, False)
    for amplified, exponent, alike in (
        (0.5, 0.75, True),
        (1.0, 1.0, True),
        (0.0, 1.0, True),
        (0.5, 0.75, False),
        (1.0, 1.0, False),
    )
)
"""How the program is solved, to be tried: as if each bin counted the same, as was measured, and between the two; with
predictions that may follow the state, and without."""
_CORRECTIONS = 3
"""How often the program is solved for fewer operations, where its thresholds let more slots pass than it counted."""
_RIVALS = ("fora", "taylor", "follow")
_BOUND = 1.645
"""Standard errors that an upper bound of 95 % lies above a mean."""
_TYPICAL = "forecast/2"
_LEAST_FACTOR = 1e-12
_TAKEN_BEFORE = 2
"""Evaluations before a bin that its first ones may take from, where those compute everything."""
_HALVINGS = 6
_LONGEST_PERIOD = 5
_TOLERANCE = 1e-6
"""By what share operations on other images may exceed those that are asked for."""


@dataclass(frozen=True)
class Tried:
    """A table with what it made of the images that tables are tried on.

    Attributes:
        name: how it was chosen.
        table: what is computed.
        damage: Σ‖z - z'‖² / Σ‖z‖² of the final images z as they are seen, against those with everything computed.
        bound: its upper bound of 95 %, from the spread over images.
        typical: (E ‖z - z'‖)² / E‖z‖², to which single images that become others add little.
        flops: the share of all operations.
        kept: the most bytes that an image keeps for later evaluations.
        predicted: the damage that the program predicted; None where it did not choose.
        gap: how far from the optimum the program's choice may be, relative.
        final: (N, C, H, W) the images.
        slopes: (K, C, 2) by which predictions follow; None where none do.
    """

    name: str
    table: ComputeTable
    damage: float
    bound: float
    typical: float
    flops: float
    kept: float
    final: Tensor = field(repr=False)
    predicted: float | None = None
    gap: float | None = None
    slopes: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Chosen:
    """The schedule that was chosen.

    Attributes:
        best: it.
        others: what was tried beside it.
        arrays: the statistics that its rules need.
        tried_on: the images that it was tried on.
        full: (N, C, H, W) where these end with everything computed.
    """

    best: Tried
    others: tuple[Tried, ...]
    arrays: dict[str, Tensor]
    tried_on: range
    full: Tensor = field(repr=False)


class Trials:
    """The images that tables are tried on: where they end with everything computed, and by any table.

    Slopes by which predictions follow are fitted to other images, those that were `measured`.
    """

    def __init__(self, way: Way, indices: Sequence[int], measured: Visited) -> None:
        self._way, self._indices, self._measured = way, indices, measured
        self.seen: Visited = visited(way, indices)
        self._whole = way.shown(self.seen.final)

    @cached_property
    def norm(self) -> float:
        """Σ‖z‖² of the final images with everything computed."""
        return float(self._whole.double().square().sum())

    def run(
        self, table: ComputeTable, statistics: Statistics, before: int = 0, slopes: Tensor | None = None
    ) -> Outcome:
        """Return where the images end by a table whose first `before` evaluations compute everything."""
        return by_table(self._way, self._indices, table, statistics, list(self.seen.predictions[:before]), slopes)

    def tried(self, name: str, table: ComputeTable, statistics: Statistics) -> Tried:
        """Return a table with what it makes of the images."""
        slopes = None
        if table.followed:
            slopes = fitted_slopes(self._measured.states, self._measured.predictions, table)
        outcome = self.run(table, statistics, slopes=slopes)
        off = self._off(outcome)
        count, mean = len(off), float(off.mean())
        spread = float(off.std()) / math.sqrt(count) if count > 1 else 0.0
        scale = count / self.norm
        return Tried(
            name,
            table,
            mean * scale,
            (mean + _BOUND * spread) * scale,
            float(off.sqrt().mean()) ** 2 * scale,
            outcome.flops / self.seen.flops,
            outcome.count.most_kept / count,
            outcome.final,
            slopes=slopes,
        )

    def everything(self) -> Tried:
        """Return the table in which everything is computed, which does no damage."""
        table = full_table(len(self._way.sampling.times), self._way.model.config.depth, self._way.sampling.null)
        return Tried("full", table, 0.0, 0.0, 0.0, 1.0, 0.0, self.seen.final)

    def error(self, table: ComputeTable, statistics: Statistics, before: int) -> float:
        """Return the mean squared error of an image."""
        return float(self._off(self.run(table, statistics, before)).mean())

    def _off(self, outcome: Outcome) -> Tensor:
        off = self._way.shown(outcome.final) - self._whole
        return off.double().square().flatten(1).sum(dim=1)


class Planner:
    """The program over one model's way: measured once, solved for any budget."""

    def __init__(self, way: Way, asked: Asked, trials: Trials, found: Measured, amplification: Sequence[float]) -> None:
        self._way, self._asked, self._trials, self._found = way, asked, trials, found
        sampling = way.sampling
        self.statistics = statistics_of(dict(found.known.arrays), len(sampling.times), asked.bins)
        self._all = sampling.operations(way.model.config)
        self._options = [_inherited(each) if asked.method == INHERITED else each for each in found.options]
        self.least = least_flops(self._options) / self._all
        self.amplification = amplification

    def solved(self, share: float, adding: Adding) -> ChosenBins:
        """Return the program's choice for a share of all operations. Raises `InfeasibleError` below the least."""
        check_least(share, self.least)
        factors = [factor**adding.amplified for factor in self.amplification]
        return chosen_bins(self._offered(adding), factors, share * self._all, adding.exponent)

    def allows(self, share: float, adding: Adding) -> bool:
        """Return whether there is a choice for a share of all operations where errors are taken to add up so."""
        return share * self._all >= least_flops(self._offered(adding))

    def _offered(self, adding: Adding) -> Sequence[BinOptions]:
        offered = [_alike(each) for each in self._options] if adding.alike else self._options
        return offered if adding.follows else [replace(each, followed=()) for each in offered]

    def table(self, chosen: Sequence[ChosenBin]) -> ComputeTable:
        """Return the table of a choice."""
        return table_of(*cells_of(chosen, self._found.bins, self._way.sampling.null))

    def tried(self, chosen: ChosenBins) -> Tried:
        """Return a choice as it was tried."""
        found = self._trials.tried(self._asked.method, self.table(chosen.bins), self.statistics)
        errors = zip(self.amplification, chosen.errors, strict=True)
        predicted = sum(factor * error for factor, error in errors) * len(found.final) / self._trials.norm
        return replace(found, predicted=predicted, gap=chosen.gap)


def amplifications(
    way: Way, trials: Trials, found: Measured, bins: int, progress: Callable[[int], object] = lambda _: None
) -> list[float]:
    """Return what errors of each bin make of the final images, where every second evaluation of it is extrapolated.

    It is ‖Δz‖² over the sum of ‖Δv‖² of the bin's evaluations. Bins without such an option have that of the others.
    """
    statistics = statistics_of(dict(found.known.arrays), len(way.sampling.times), bins)
    full = _full_bins(way, found.options)
    factors: list[float | None] = []
    for b, options in enumerate(found.options):
        probes = [each for each in options.conditional.alike if each.pattern.text == _TYPICAL and each.error > 0]
        if probes:
            probe = replace(full[b], conditional=(probes[0].pattern,) * way.model.config.depth)
            alone = [probe if other == b else full[other] for other in range(len(full))]
            table = table_of(*cells_of(alone, found.bins, way.sampling.null))
            first = max(0, found.bins[b].start - _TAKEN_BEFORE)
            factors.append(max(trials.error(table, statistics, first) / probes[0].error, _LEAST_FACTOR))
        else:
            factors.append(None)
        progress(1)
    known = sorted(factor for factor in factors if factor is not None)
    typical = known[len(known) // 2] if known else 1.0
    return [typical if factor is None else factor for factor in factors]


def _full_bins(way: Way, options: Sequence[BinOptions]) -> list[ChosenBin]:
    """Return the choice that computes everything."""
    blocks = (ALWAYS_FULL,) * way.model.config.depth
    return [ChosenBin(blocks, blocks if each.null is not None else ()) for each in options]


def _restricted(options: BinOptions, keeps: Callable[[BranchOptions], BranchOptions]) -> BinOptions:
    """Return the options of a bin of which each branch keeps some."""
    null = options.null
    kept = None if null is None else replace(null, branch=keeps(null.branch))
    return replace(options, conditional=keeps(options.conditional), null=kept)


def _inherited(options: BinOptions) -> BinOptions:
    """Return the options of feature inheritance: whole blocks reused, or computed; the model is always asked."""

    def kept(branch: BranchOptions) -> BranchOptions:
        blocks = [[p for p in patterns if _inherits(p.pattern)] for patterns in branch.blocks]
        return BranchOptions(blocks, [p for p in branch.alike if _inherits(p.pattern)])

    found = replace(_restricted(options, kept), followed=())
    return found if found.null is None else replace(found, null=replace(found.null, patterns=()))


def _alike(options: BinOptions) -> BinOptions:
    """Return the options in which all blocks of a branch do alike."""
    return _restricted(
        options,
        lambda branch: replace(
            branch, blocks=[[p for p in each if p.pattern == ALWAYS_FULL] for each in branch.blocks]
        ),
    )


def _inherits(pattern: Pattern) -> bool:
    return pattern == ALWAYS_FULL or (pattern.between.text == "reuse" and pattern.period > 1)


def chosen_schedule(way: Way, asked: Asked, energies: Tensor | None = None) -> Chosen:
    """Return the schedule that is asked for, with `energies` as in `way_statistics`.

    Raises `InfeasibleError` as `Planning.chosen` does.
    """
    return Planning(way, asked.images, asked.bins, energies).chosen(asked)


class Planning:
    """Schedules of one way of sampling, which share what is measured of it."""

    def __init__(self, way: Way, images: int, bins: int, energies: Tensor | None = None) -> None:
        self._way, self._bins, self._energies = way, bins, energies
        self._measured_on, self._tried_on = image_shares(images)
        with phase("following the model's way", 2, "parts") as progress:
            self._seen = visited(way, self._measured_on)
            progress(1)
            self._trials = Trials(way, self._tried_on, self._seen)
            progress(1)

    def chosen(self, asked: Asked) -> Chosen:
        """Return the schedule that is asked for, on the images and bins of this planning.

        Raises `InfeasibleError` where the operations, or the damage, cannot be that few.
        """
        return self._planned(asked) if asked.plans else self._whole(asked.method)

    @cached_property
    def _found(self) -> Measured:
        return measured(self._way, self._seen, self._measured_on, self._bins, self._energies)

    @cached_property
    def _amplification(self) -> list[float]:
        with phase("what errors make of images", len(self._found.options), "bins") as progress:
            return amplifications(self._way, self._trials, self._found, self._bins, progress)

    def _planned(self, asked: Asked) -> Chosen:
        planner = Planner(self._way, asked, self._trials, self._found, self._amplification)
        everything = self._trials.everything()
        with phase("trying plans"):
            if asked.flops is not None:
                tries = _by_flops(planner, asked.flops)
                tries += [everything] if asked.flops >= 1.0 else []
            else:
                assert asked.max_damage is not None
                tries = _by_damage(planner, everything, asked.max_damage)
            if asked.method == PLANNED:
                tries += _rivals(self._way, self._trials, asked)
        best = _best(tries, asked)
        return self._result(best, tuple(each for each in tries if each is not best), dict(self._found.known.arrays))

    def _whole(self, method: str) -> Chosen:
        """Return the schedule of a method that chooses for the whole model."""
        config, sampling = self._way.model.config, self._way.sampling
        if not needs_statistics(method):
            return self._result(
                self._trials.tried(method, whole_table(method, config, sampling), no_statistics), (), {}
            )
        evaluations = measured_evaluations(sampling, bins_of(sampling, self._bins))
        known = way_statistics(self._way, self._seen, self._measured_on, evaluations, self._energies)
        arrays = dict(known.arrays)
        statistics = statistics_of(arrays, len(sampling.times), self._bins)
        table = whole_table(method, config, sampling, known.median)
        return self._result(self._trials.tried(method, table, statistics), (), arrays)

    def _result(self, best: Tried, others: tuple[Tried, ...], arrays: Mapping[str, Tensor]) -> Chosen:
        return Chosen(best, others, _needed(best, arrays), self._tried_on, self._trials.seen.final)


def image_shares(images: int) -> tuple[range, range]:
    """Return the images that errors are measured on, a quarter of all, and those that tables are tried on."""
    return range(images // 4), range(images // 4, images)


def _by_flops(planner: Planner, share: float) -> list[Tried]:
    """Return what was tried for a share of all operations, which tables take on the images that they are tried on."""
    tries: list[Tried] = []
    seen = set[tuple[ChosenBin, ...]]()
    check_least(share, planner.least)
    for adding in ADDINGS:
        budget = share
        for _ in range(_CORRECTIONS):
            if not planner.allows(budget, adding):
                break
            chosen = planner.solved(budget, adding)
            if chosen.bins in seen:
                break
            seen.add(chosen.bins)
            tries.append(planner.tried(chosen))
            if tries[-1].flops <= share * (1 + _TOLERANCE):
                break
            budget *= share / tries[-1].flops
    return tries


def _by_damage(planner: Planner, everything: Tried, most: float) -> list[Tried]:
    """Return what was tried to find the fewest operations of a damage, by halving; everything computed among it."""
    tries = [everything]
    low, high = planner.least, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        choices = (planner.solved(share, adding) for adding in ADDINGS if planner.allows(share, adding))
        found = [planner.tried(chosen) for chosen in {each.bins: each for each in choices}.values()]
        tries += found
        low, high = (low, share) if min(each.bound for each in found) <= most else (share, high)
    return tries


def _rivals(way: Way, trials: Trials, asked: Asked) -> list[Tried]:
    """Return methods that choose for the whole model, in as many operations as are asked for."""
    found = []
    for name in _RIVALS:
        for period in range(2, _LONGEST_PERIOD + 1):
            method = f"{name}:{period}"
            rival = trials.tried(method, whole_table(method, way.model.config, way.sampling), no_statistics)
            found.append(rival)
            if asked.flops is not None and rival.flops <= asked.flops:
                break
    return found


def _best(tries: Sequence[Tried], asked: Asked) -> Tried:
    """Return the least damage of what is within the operations, or the fewest operations of what is within the damage.

    Plans are compared by typical errors: the few images that become others, by chance, make most of a mean over few,
    and are fewer where errors are smaller. A damage that is kept to is an upper bound. Raises `InfeasibleError` where
    thresholds let more slots pass than is asked for, again and again.
    """
    if asked.flops is not None:
        within = [each for each in tries if each.flops <= asked.flops * (1 + _TOLERANCE)]
        if not within:
            least = math.ceil(1000 * min(each.flops for each in tries)) / 1000
            raise InfeasibleError(f"⟨flops⟩ {asked.flops:g}: the fewest that came out are {least:g}; give that or more")
        return min(within, key=lambda each: each.typical)
    assert asked.max_damage is not None
    return min((each for each in tries if each.bound <= asked.max_damage), key=lambda each: each.flops)


def _needed(best: Tried, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics that a table needs."""
    known = arrays if best.slopes is None else {**arrays, SLOPES: best.slopes}
    return {name: known[name] for name in needed_statistics(best.table)}


def fewer_steps_than(chosen: Chosen, way: Way) -> FewerSteps | None:
    """Return fewer steps against a schedule, on the images that it was tried on; None where there are none."""
    best = chosen.best
    if best.flops >= 1.0:
        return None
    with phase("fewer steps"):
        cost = cost_of(way.sampling, best.table, best.flops, weak_share(way))
        return against_fewer_steps(way, chosen.tried_on, cost, best.final, chosen.full)
