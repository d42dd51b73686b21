"""Patterns over bins of steps: when something is computed, and the error of a bin, by hand."""

from __future__ import annotations

import pytest

from ditmoe_cli.model.block_choices import FULL, parse_choice
from ditmoe_cli.scheduling.patterns import (
    ALWAYS_FULL,
    LONG_PERIODS,
    PERIODS,
    REUSED_AGES,
    Pattern,
    Probe,
    error_over,
    joint_patterns,
    periodic_patterns,
    probes_of,
)

REUSE, FORECAST, SLOTS = (parse_choice(text) for text in ("reuse", "forecast", "reuse-slots"))


def test_a_period_computes_in_every_nth_evaluation_of_the_way() -> None:
    pattern = Pattern(FULL, REUSE, 3)
    assert [pattern.age(k) for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [pattern.at(k) == FULL for k in range(5)] == [True, False, False, True, False]
    assert pattern.text == "reuse/3"


def test_a_choice_for_all_evaluations_has_no_age() -> None:
    top1 = Pattern(parse_choice("top1"))
    assert {top1.at(k) for k in range(9)} == {parse_choice("top1")} and {top1.age(k) for k in range(9)} == {0}
    assert (top1.text, ALWAYS_FULL.text) == ("top1", "full")


def test_patterns_have_names_of_their_own() -> None:
    names = [pattern.text for pattern in periodic_patterns()]
    assert len(names) == len(set(names))
    assert {p.text for p in joint_patterns()} <= set(names)
    assert {p.period for p in periodic_patterns()} == {*PERIODS, *LONG_PERIODS}
    assert {p.text for p in periodic_patterns() if p.period in LONG_PERIODS} == {"reuse/8", "reuse/16"}


def test_probes_are_what_a_pattern_meets() -> None:
    assert probes_of(ALWAYS_FULL) == [Probe(FULL)]
    assert probes_of(Pattern(FULL, FORECAST, 3)) == [Probe(FORECAST, 1, 3), Probe(FORECAST, 2, 3)]
    assert probes_of(Pattern(FULL, SLOTS, 3)) == [Probe(SLOTS, 1), Probe(SLOTS, 2)]
    for period in (*PERIODS, *LONG_PERIODS):
        ages = [probe.age for probe in probes_of(Pattern(FULL, REUSE, period))]
        assert ages == [age for age in REUSED_AGES if age < period]


def test_errors_of_a_bin_add_up() -> None:
    """Evaluations 4 to 8 of forecast/3 are 1, 2, 0, 1 and 2 old."""
    errors = {Probe(FORECAST, 1, 3): 2.0, Probe(FORECAST, 2, 3): 7.0, Probe(FORECAST, 1, 2): 100.0}
    assert error_over(Pattern(FULL, FORECAST, 3), range(4, 9), errors) == 2 + 7 + 2 + 7
    top1 = Pattern(parse_choice("top1"))
    assert error_over(top1, range(4, 9), {Probe(parse_choice("top1")): 0.5}) == 5**2 * 0.5  # it errs one way in all
    assert error_over(Pattern(FULL, FORECAST, 3), range(6, 7), errors) == 0  # computed there


@pytest.mark.parametrize(
    ("measured", "age", "expected"),
    [
        ({1: 1.0, 2: 3.0, 4: 9.0}, 3, 6.0),  # on the line from 2 to 4
        ({1: 1.0, 2: 3.0}, 3, 3.0 * (3 / 2) ** 2),  # behind the last, with the square of its age
        ({1: 1.0, 2: 3.0, 4: 9.0}, 2, 3.0),
    ],
)
def test_reuse_between_measured_ages(measured: dict[int, float], age: int, expected: float) -> None:
    errors = {Probe(REUSE, at): error for at, error in measured.items()}
    errors[Probe(parse_choice("reuse-mixture"), 3)] = 1000.0
    assert error_over(Pattern(FULL, REUSE, 5), range(5 + age, 6 + age), errors) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", [*periodic_patterns(), Pattern(parse_choice("skip"))], ids=lambda p: p.text)
def test_a_pattern_needs_no_error_beside_its_probes(pattern: Pattern) -> None:
    errors = dict.fromkeys(probes_of(pattern), 1.0)
    found = error_over(pattern, range(20), errors)
    assert found >= sum(pattern.period == 1 or pattern.age(k) > 0 for k in range(20))
