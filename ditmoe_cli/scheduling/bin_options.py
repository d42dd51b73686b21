"""What may be chosen in each step bin of a model's way, with errors and operations as they were replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.step_bins import steps_of_bins
from ditmoe_cli.model.block_choices import BlockChoice, NullChoice, SlotRule, parse_choice
from ditmoe_cli.model.compute_cost import (
    attended_to_cost,
    attention_cost,
    block_cost,
    evaluation_cost,
    expert_cost,
    fixed_cost,
    shared_cost,
    unrouted_cost,
)
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.progress import phase
from ditmoe_cli.scheduling.followed_options import followed_options
from ditmoe_cli.scheduling.patterns import (
    ALWAYS_FULL,
    PERIODS,
    Pattern,
    Probe,
    error_over,
    joint_patterns,
    periodic_patterns,
    probes_of,
)
from ditmoe_cli.scheduling.replays import Replayed, Replays, replayed
from ditmoe_cli.scheduling.schedule_program import (
    BinOptions,
    BranchOptions,
    NullOptions,
    NullPattern,
    Priced,
    PricedNull,
)
from ditmoe_cli.scheduling.way_states import Visited, Way
from ditmoe_cli.scheduling.way_statistics import WayStatistics, way_statistics

_SALIENCY_SHARES = (0.25, 0.5, 0.75)
_TOP_P_SHARES = (0.5,)


@dataclass(frozen=True)
class Measured:
    """What was measured on a model's way.

    Attributes:
        bins: the evaluations of each bin.
        known: statistics that rules rest on.
        options: what there is to choose, by bin.
    """

    bins: Mapping[int, range]
    known: WayStatistics
    options: Sequence[BinOptions]


def bins_of(sampling: ScheduledSampling, bins: int) -> dict[int, range]:
    """Return the evaluations of each bin."""
    return dict(enumerate(steps_of_bins(len(sampling.times), bins)))


def measured_evaluations(sampling: ScheduledSampling, bins: Mapping[int, range]) -> list[int]:
    """Return the evaluation of each bin that stands for it: its middle, the end of the first one, which has a past.

    Where the null class guides in a part of the bin, it is one of that part.
    """
    found = []
    for b, evaluations in sorted(bins.items()):
        guided = [k for k in evaluations if sampling.null and sampling.null[k] == "compute"]
        among = guided or list(evaluations)
        found.append(among[-1] if b == 0 else among[len(among) // 2])
    return found


def measured(way: Way, seen: Visited, indices: Sequence[int], bins: int, energies: Tensor | None = None) -> Measured:
    """Return what may be chosen in each bin, measured on the images `indices`; `energies` as in `way_statistics`."""
    ranges = bins_of(way.sampling, bins)
    evaluations = measured_evaluations(way.sampling, ranges)
    known = way_statistics(way, seen, indices, evaluations, energies)
    options = []
    with phase("errors of choices", len(evaluations), "bins") as progress:
        for b, evaluation in enumerate(evaluations):
            options.append(_options(way, seen, indices, evaluation, b, ranges[b], known))
            progress(1)
    return Measured(ranges, known, options)


def _options(
    way: Way,
    seen: Visited,
    indices: Sequence[int],
    evaluation: int,
    b: int,
    evaluations: range,
    known: WayStatistics,
) -> BinOptions:
    config, sampling = way.model.config, way.sampling
    counted = [evaluations, predicted_numbers(sampling.null, evaluations)]
    guided = len(counted[1])
    cells = [(branch, block) for branch in range(2 if guided else 1) for block in range(config.depth)]
    patterns = {cell: patterns_of((b, *cell), known, evaluation) for cell in cells}
    asked = {cell: list(dict.fromkeys(probe for p in patterns[cell] for probe in probes_of(p))) for cell in cells}
    alike = [p for p in joint_patterns() if p.period <= evaluation + 1]
    joint = list(dict.fromkeys(probe for p in alike for probe in probes_of(p)))
    replays = replayed(way, seen, indices, evaluation, b, asked, joint, known)

    def priced(branch: int) -> list[list[Priced]]:
        return [
            [_priced(p, counted[branch], replays, (branch, block), config) for p in patterns[branch, block]]
            for block in range(config.depth)
        ]

    def together(branch: int) -> list[Priced]:
        return [_alike(p, counted[branch], replays.joint[branch], config) for p in alike]

    fixed = fixed_cost(config)
    ends, followed = len(evaluations) * fixed, followed_options(seen, sampling, config, evaluations)
    conditional = BranchOptions(priced(0), together(0))
    if not guided:
        return BinOptions(conditional, None, ends, followed)
    full = evaluation_cost(config)
    null = NullOptions(BranchOptions(priced(1), together(1)), _null_patterns(replays, counted[1]), full, fixed, guided)
    return BinOptions(conditional, null, ends, followed)


def predicted_numbers(null: Sequence[NullChoice], evaluations: range) -> range:
    """Return the numbers of the predictions of the null class in a bin, counted from the beginning of the way."""
    before = sum(choice == "compute" for choice in null[: evaluations.start])
    return range(before, before + sum(choice == "compute" for choice in null[evaluations.start : evaluations.stop]))


def patterns_of(place: tuple[int, int, int], known: WayStatistics, evaluation: int) -> list[Pattern]:
    """Return the patterns that a block may have in a bin which is measured in the given evaluation."""
    found = [ALWAYS_FULL, Pattern(parse_choice("skip")), Pattern(parse_choice("skip-attention"))]
    if place in known.selections:
        found += [Pattern(BlockChoice(slots=rule)) for rule in slot_rules(place, known)]
    return [*found, *(p for p in periodic_patterns() if p.period <= evaluation + 1)]


def slot_rules(place: tuple[int, int, int], known: WayStatistics) -> list[SlotRule]:
    """Return the rules that leave out slots, with thresholds at shares of the tokens of a bin, branch and block."""
    saliencies, first = known.saliencies(place), known.selections[place].weights[:, 0]
    found = [SlotRule("saliency", float(torch.quantile(saliencies, share))) for share in _SALIENCY_SHARES]
    found += [SlotRule("top-p", float(torch.quantile(first, 1 - share))) for share in _TOP_P_SHARES]
    return [*found, SlotRule("odp", known.median("odp", place[2])), SlotRule("top1"), SlotRule("regressed")]


def _priced(
    pattern: Pattern, evaluations: range, replays: Replays, cell: tuple[int, int], config: DiTMoEConfig
) -> Priced:
    """Return a pattern with the sum of its errors over a bin, and its operations an image."""
    block = cell[1]
    found = replays.cells[cell]
    errors = {probe: each.error for probe, each in found.items()}
    if pattern == ALWAYS_FULL:
        return Priced(pattern, 0.0, len(evaluations) * block_cost(config, config.blocks[block]))
    flops = sum(choice_cost(pattern.at(k), config, block, _slots(pattern, k, found, config)) for k in evaluations)
    return Priced(pattern, error_over(pattern, evaluations, errors), flops)


def _alike(pattern: Pattern, evaluations: range, found: Mapping[Probe, Replayed], config: DiTMoEConfig) -> Priced:
    """Return a pattern that all blocks have, with the sum of its errors over a bin, and the operations of all."""
    errors = {probe: each.error for probe, each in found.items()}
    flops = sum(
        choice_cost(pattern.at(k), config, block, float(config.top_k))
        for k in evaluations
        for block in range(config.depth)
    )
    return Priced(pattern, error_over(pattern, evaluations, errors), flops)


def _slots(pattern: Pattern, evaluation: int, found: Mapping[Probe, Replayed], config: DiTMoEConfig) -> float:
    """Return the slots that a token computes in an evaluation: measured where a choice computes slots in part."""
    choice = pattern.at(evaluation)
    partly = choice.slots is not None or choice.mixture == "reuse-slots"
    return found[Probe(choice, pattern.age(evaluation))].slots if partly else float(config.top_k)


def choice_cost(choice: BlockChoice, config: DiTMoEConfig, block: int, slots: float) -> float:
    """Return the operations of an image in a block by a choice, in which each token computes so many slots."""
    shapes = config.blocks[block]
    cost = attention_cost(config) if choice.attention == "compute" else 0.0
    if choice.mixture not in ("compute", "reuse-slots"):
        return cost
    token = unrouted_cost(config, shapes) + slots * expert_cost(config, shapes)
    if choice.mixture == "compute" and choice.shared:
        token += shared_cost(config, shapes)
    if choice.slots is not None and choice.slots.rule == "odp":
        cost += attended_to_cost(config)
    return cost + config.num_patches * token


def _null_patterns(replays: Replays, guided: range) -> list[PricedNull]:
    """Return what may become of the null class in a bin: off, or predicted in every n-th evaluation and reused."""
    found = [PricedNull(NullPattern(0, "off"), len(guided) * replays.null_off, 0)]
    for period in PERIODS:
        ages = [k % period for k in guided]
        if max(ages, default=0) in (0, *replays.null_reused):
            error = sum(replays.null_reused[age] for age in ages if age)
            found.append(PricedNull(NullPattern(period), error, ages.count(0)))
    return found
