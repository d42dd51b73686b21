"""What there is to choose in a bin: operations are those that runs count, evaluations and patterns by hand."""

from __future__ import annotations

import pytest
from cases import with_slow
from ways import by_probe, way_of

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.model.block_choices import FULL, parse_choice
from ditmoe_cli.model.compute_cost import block_cost, fixed_cost
from ditmoe_cli.scheduling.bin_options import (
    bins_of,
    choice_cost,
    measured,
    measured_evaluations,
    patterns_of,
    predicted_numbers,
    slot_rules,
)
from ditmoe_cli.scheduling.patterns import ALWAYS_FULL, FOLLOWED_PERIODS, PERIODS, Probe, probes_of
from ditmoe_cli.scheduling.replays import replayed
from ditmoe_cli.scheduling.schedule_program import least_flops
from ditmoe_cli.scheduling.way_states import visited
from ditmoe_cli.scheduling.way_statistics import way_statistics

EVALUATION = 4
CHOICES = [
    *(Probe(parse_choice(text)) for text in ("full", "skip", "skip-attention", "skip-mixture", "skip-shared")),
    *(Probe(parse_choice(text)) for text in ("top1", "regressed", "top-p:0.6", "odp:0.7", "saliency:0.02")),
    *(Probe(parse_choice(f"{part}{of}"), 1) for part in ("reuse", "forecast") for of in ("", "-attention", "-mixture")),
    Probe(parse_choice("reuse-slots"), 1),
    Probe(parse_choice("reuse-slots"), 3),
    Probe(parse_choice("reuse-attention+top1"), 1),
]


@pytest.mark.parametrize(
    ("branch", "changes"),
    with_slow([(0, {"shared_width": 16}), (1, {"attention": "flash", "top_k": 3}), (1, {})], quick=2),
)
def test_operations_of_a_choice_are_those_that_a_run_counts(branch: int, changes: dict[str, object]) -> None:
    way = way_of(ScheduledSampling("euler", 6, 2.0), **changes)
    config, seen = way.model.config, visited(way, range(2))
    known = way_statistics(way, seen, range(2), [EVALUATION])
    found = replayed(way, seen, range(2), EVALUATION, 0, {(branch, 1): CHOICES}, (), known).cells[branch, 1]
    whole = 2 * (fixed_cost(config) + sum(block_cost(config, block) for block in config.blocks))
    for probe in CHOICES:
        counted = by_probe(way, seen, 2, EVALUATION, probe, known, branch, (1,))[1]
        saved = block_cost(config, config.blocks[1]) - choice_cost(probe.choice, config, 1, found[probe].slots)
        assert counted == pytest.approx(whole - saved), probe
        assert saved == 0 if probe.choice == FULL else saved > 0 or probe.choice.text in ("odp:0.7", "saliency:0.02")


def test_bins_and_the_evaluations_that_stand_for_them() -> None:
    way = ScheduledSampling("euler", 10)
    bins = bins_of(way, 3)
    assert bins == {0: range(4), 1: range(4, 7), 2: range(7, 10)}
    assert measured_evaluations(way, bins) == [3, 5, 8]
    each = bins_of(way, 10)
    assert measured_evaluations(way, each) == list(range(10))


def test_a_bin_that_is_guided_in_part_is_measured_where_it_is() -> None:
    way = ScheduledSampling("euler", 10, 2.0, (0.35, 0.65))  # evaluations 4, 5 and 6
    assert [k for k, choice in enumerate(way.null) if choice == "compute"] == [4, 5, 6]
    bins = bins_of(way, 2)
    assert measured_evaluations(way, bins) == [4, 6]
    assert [predicted_numbers(way.null, evaluations) for evaluations in bins.values()] == [range(1), range(1, 3)]
    assert predicted_numbers((), range(3)) == range(0)


def test_patterns_reach_no_farther_than_the_way_goes_back() -> None:
    way = way_of(ScheduledSampling("euler", 6))
    known = way_statistics(way, visited(way, range(2)), range(2), [0, 5])
    assert {p.period for p in patterns_of((0, 0, 0), known, 0)} == {1}
    assert {p.period for p in patterns_of((0, 0, 0), known, 2)} == {1, 2, 3}
    assert {p.period for p in patterns_of((1, 0, 0), known, 5)} == {1, *PERIODS}
    texts = [p.computed.text for p in patterns_of((0, 0, 1), known, 0)]
    assert texts[:3] == ["full", "skip", "skip-attention"] and texts[-2:] == ["top1", "regressed"]
    assert [rule.rule for rule in slot_rules((0, 0, 1), known)].count("saliency") == 3


def test_thresholds_are_at_shares_of_the_tokens() -> None:
    way = way_of(ScheduledSampling("euler", 6))
    known = way_statistics(way, visited(way, range(4)), range(4), [3])
    saliencies = known.saliencies((0, 0, 0))
    found = [rule for rule in slot_rules((0, 0, 0), known) if rule.rule == "saliency"]
    left_out = [float((saliencies < rule.threshold).float().mean()) for rule in found]
    assert left_out == pytest.approx([0.25, 0.5, 0.75], abs=1 / len(saliencies))


def test_models_of_one_expert_a_token_have_no_slots_to_leave_out() -> None:
    way = way_of(ScheduledSampling("euler", 6), top_k=1)
    found = measured(way, visited(way, range(2)), range(2), 2)
    patterns = {p.pattern for options in found.options for block in options.conditional.blocks for p in block}
    assert all(p.computed.slots is None for p in patterns) and any(p.between.text == "reuse-slots" for p in patterns)


def test_options_of_bins() -> None:
    """All patterns over a bin: errors and operations sum over its evaluations, the null class counts its own."""
    sampling = ScheduledSampling("euler", 8, 2.0, (0.3, 1.0))
    way = way_of(sampling)
    config = way.model.config
    found = measured(way, visited(way, range(2)), range(2), 4)
    assert [options.null is not None for options in found.options] == [True, True, True, False]
    for b, options in enumerate(found.options):
        branches = [(options.conditional, len(found.bins[b]))]
        if options.null is not None:
            null = options.null
            assert null.evaluations == len(predicted_numbers(sampling.null, found.bins[b]))
            assert null.full == pytest.approx(null.fixed + sum(block_cost(config, block) for block in config.blocks))
            branches.append((null.branch, null.evaluations))
            off = next(each for each in null.patterns if each.pattern.period == 0)
            assert off.predicted == 0 and off.error > 0
            assert all(each.predicted <= null.evaluations for each in null.patterns)
        for branch, evaluations in branches:
            for block, patterns in enumerate(branch.blocks):
                full = patterns[0]
                assert full.pattern == ALWAYS_FULL and full.error == 0.0
                assert full.flops == pytest.approx(evaluations * block_cost(config, config.blocks[block]))
                for each in patterns:
                    assert each.error >= 0 and each.flops >= 0
                    dearer = each.flops > full.flops * (1 + 1e-9)
                    assert not dearer or "odp" in each.pattern.text  # which has to tell what is attended to
                    assert probes_of(each.pattern)
            for each in branch.alike:
                assert each.flops <= sum(patterns[0].flops for patterns in branch.blocks) * (1 + 1e-9)
        once = (1 + (options.null is not None)) * (fixed_cost(config) + block_cost(config, config.blocks[0]) * 2)
        for each in options.followed:
            asked = [k for k in found.bins[b] if not each.pattern.age(k)]
            assert each.error >= 0 and len(asked) < len(found.bins[b])
            assert each.flops == pytest.approx(len(asked) * once)
        assert {each.pattern.period for each in options.followed} <= set(FOLLOWED_PERIODS)
    assert least_flops(found.options) == pytest.approx(len(found.bins[0]) * fixed_cost(config))  # skip, and then follow
