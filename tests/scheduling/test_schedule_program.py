"""The program against listing all choices, and its patterns as tables that can be carried out."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.block_choices import FULL, NullChoice, check_table, parse_choice, table_of
from ditmoe_cli.scheduling.patterns import ALWAYS_FULL, Pattern, joint_patterns, periodic_patterns
from ditmoe_cli.scheduling.schedule_program import (
    BinOptions,
    BranchOptions,
    ChosenBin,
    NullOptions,
    NullPattern,
    Priced,
    PricedNull,
    _offered,
    cells_of,
    chosen_bins,
    least_flops,
)

UNIT = 1e5
SAVING = [Pattern(parse_choice("skip")), Pattern(parse_choice("top1")), *periodic_patterns()]


def branch(made: random.Random, blocks: int) -> BranchOptions:
    """Random errors and operations; computing all takes 100 units and errs by nothing."""

    def priced(pattern: Pattern, times: int) -> Priced:
        return Priced(pattern, made.random() ** 4, times * 90 * UNIT * made.random())

    each = [
        [Priced(ALWAYS_FULL, 0.0, 100.0 * UNIT), *(priced(p, 1) for p in made.sample(SAVING, 3))] for _ in range(blocks)
    ]
    return BranchOptions(each, [priced(p, blocks) for p in joint_patterns()[:2]])


def instance(seed: int, bins: int = 3, blocks: int = 2) -> list[BinOptions]:
    """Random bins; in the last one nothing guides."""
    made = random.Random(seed)
    patterns = [PricedNull(NullPattern(0, "off"), 5.0, 0), PricedNull(NullPattern(2), made.random(), 1)]
    found = []
    for b in range(bins):
        null = NullOptions(branch(made, blocks), patterns, 210.0 * UNIT, 10.0 * UNIT, 2)
        found.append(BinOptions(branch(made, blocks), null if b < bins - 1 else None))
    return found


def every_choice(bins: list[BinOptions], factors: list[float], exponent: float) -> list[tuple[float, float]]:
    """Operations and errors of all choices that the program has."""
    groups = [
        [(c.flops, (factor * c.error) ** exponent) for c in offered]
        for options, factor in zip(bins, factors, strict=True)
        for offered in _offered(options)
    ]
    return [(sum(f for f, _ in taken), sum(e for _, e in taken)) for taken in itertools.product(*groups)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exponent", [1.0, 0.75])
def test_no_choice_within_the_budget_is_better(seed: int, exponent: float) -> None:
    bins, factors = instance(seed, bins=2), [1.0, 3.0]
    listed = every_choice(bins, factors, exponent)
    least, most = min(flops for flops, _ in listed), max(flops for flops, _ in listed)
    assert least_flops(bins) == pytest.approx(least)
    for share in (0.05, 0.3, 0.6, 0.95):
        budget = least + share * (most - least)
        found = chosen_bins(bins, factors, budget, exponent)
        best = min(error for flops, error in listed if flops <= budget)
        assert found.flops <= budget and found.gap <= 1e-3
        assert best * (1 - 1e-9) <= found.predicted <= best * (1 + 2e-3) + 1e-9
        assert sum((f * e) ** exponent for f, e in zip(factors, found.errors, strict=True)) <= found.predicted * 2


@pytest.mark.parametrize("seed", range(4, 7))
def test_more_operations_never_err_more(seed: int) -> None:
    bins, factors = instance(seed), [2.0, 1.0, 0.5]
    least = least_flops(bins)
    errors = [chosen_bins(bins, factors, least + step * 80 * UNIT, 1.0).predicted for step in range(16)]
    assert all(b <= a * (1 + 2e-4) for a, b in itertools.pairwise(errors))
    assert errors[0] > errors[-1]


def test_with_all_operations_nothing_errs() -> None:
    bins = instance(9)
    found = chosen_bins(bins, [1.0] * 3, 1e9)
    assert (found.predicted, found.errors, found.gap) == (0.0, (0.0, 0.0, 0.0), 0.0)
    assert found.bins[0] == ChosenBin((ALWAYS_FULL,) * 2, (ALWAYS_FULL,) * 2) and found.bins[2].null == ()


def test_the_least_is_possible_and_less_is_not() -> None:
    """Operations are no whole numbers, so that rounding must not put the least out of reach."""
    bins = instance(11)
    least = least_flops(bins)
    assert chosen_bins(bins, [1.0] * 3, least).flops == pytest.approx(least)
    with pytest.raises(InfeasibleError):
        chosen_bins(bins, [1.0] * 3, least * 0.9)


def test_the_same_twice() -> None:
    bins = instance(12)
    budget = least_flops(bins) + 300 * UNIT
    assert chosen_bins(bins, [1.0] * 3, budget) == chosen_bins(bins, [1.0] * 3, budget)


# tables

A, B, ONE = (
    Pattern(FULL, parse_choice("reuse"), 2),
    Pattern(FULL, parse_choice("forecast"), 3),
    Pattern(parse_choice("top1")),
)


def texts(cells: list[list[list[object]]], branch: int, block: int) -> list[str]:
    return [step[branch][block].text for step in cells]  # type: ignore[attr-defined]


def test_patterns_go_on_from_bin_to_bin() -> None:
    chosen = [ChosenBin((A, B)), ChosenBin((A, ONE))]
    cells, null = cells_of(chosen, {0: range(3), 1: range(3, 6)}, ())
    assert texts(cells, 0, 0) == ["full", "reuse", "full", "reuse", "full", "reuse"]
    assert texts(cells, 0, 1) == ["full", "forecast", "forecast", "top1", "top1", "top1"]
    assert null == []


def test_what_was_not_computed_before_is_computed() -> None:
    """A block that was left out in all evaluations before has nothing to reuse; top1 makes no slots."""
    slots = Pattern(FULL, parse_choice("reuse-slots"), 2)
    skip = Pattern(parse_choice("skip"))
    cells, _ = cells_of([ChosenBin((skip, ONE)), ChosenBin((A, slots))], {0: range(1), 1: range(1, 4)}, ())
    assert texts(cells, 0, 0) == ["skip", "full", "full", "reuse"]
    assert texts(cells, 0, 1) == ["top1", "full", "full", "reuse-slots"]


def test_the_null_class_counts_its_own_predictions() -> None:
    """Guided in evaluations 2 to 6 of 8: blocks reuse at odd predictions, counted from the first of them."""
    null: list[NullChoice] = ["off", "off", *["compute"] * 5, "off"]  # type: ignore[list-item]
    bins = {0: range(4), 1: range(4, 8)}
    chosen = [ChosenBin((A,), (A,)), ChosenBin((ALWAYS_FULL,), (A,))]
    cells, planned = cells_of(chosen, bins, null)
    assert planned == null
    assert texts(cells, 0, 0) == ["full", "reuse", "full", "reuse", *["full"] * 4]
    assert texts(cells, 1, 0)[2:7] == ["full", "reuse", "full", "reuse", "full"]
    every_second = [ChosenBin((A,), (ALWAYS_FULL,), NullPattern(2)), ChosenBin((A,), (ALWAYS_FULL,), NullPattern(3))]
    cells, planned = cells_of(every_second, bins, null)
    assert planned == ["off", "off", "compute", "reuse", "reuse", "compute", "reuse", "off"]
    check_table(table_of(cells, planned))


def test_a_null_class_that_was_never_predicted_is_not_reused() -> None:
    chosen = [ChosenBin((A,), (ALWAYS_FULL,), NullPattern(0, "off")), ChosenBin((A,), (ALWAYS_FULL,), NullPattern(2))]
    _, planned = cells_of(chosen, {0: range(3), 1: range(3, 6)}, ["compute"] * 6)
    assert planned == ["off", "off", "off", "compute", "compute", "reuse"]


PATTERNS = st.sampled_from([ALWAYS_FULL, *SAVING, *(Pattern(parse_choice(t)) for t in ("regressed", "skip-attention"))])
NULLS = st.sampled_from([NullPattern(), NullPattern(0, "off"), *(NullPattern(n) for n in (2, 3, 5))])


@given(st.data(), st.integers(1, 5), st.integers(1, 12))
def test_every_choice_of_patterns_is_a_table(data: st.DataObject, bins: int, evaluations: int) -> None:
    """Whatever is chosen in each bin, no block takes what was not made; what can be done as planned is."""
    bins = min(bins, evaluations)
    cuts = [b * evaluations // bins for b in range(bins + 1)]
    ranges = {b: range(cuts[b], cuts[b + 1]) for b in range(bins)}
    low, high = sorted((data.draw(st.integers(0, evaluations)), data.draw(st.integers(0, evaluations))))
    null: list[NullChoice] = ["compute" if low <= k < high else "off" for k in range(evaluations)]
    null = null if "compute" in null else []
    chosen = [
        ChosenBin(
            (data.draw(PATTERNS), data.draw(PATTERNS)),
            (data.draw(PATTERNS), data.draw(PATTERNS)) if null else (),
            data.draw(NULLS) if null else NullPattern(),
        )
        for _ in ranges
    ]
    cells, planned = cells_of(chosen, ranges, null)
    table = table_of(cells, planned)
    assert table.evaluations == evaluations and set(planned) <= set(get_args(NullChoice))
    assert all(mine == "off" for mine, full in zip(planned, null, strict=True) if full == "off")
    for b, evaluations_of_bin in ranges.items():
        for k in evaluations_of_bin:
            for block, pattern in enumerate(chosen[b].conditional):
                took = any(part in pattern.at(k).text for part in ("reuse", "forecast"))
                assert cells[k][0][block] == pattern.at(k) or took
