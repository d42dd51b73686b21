"""The rules that turn intervals into verdicts, and the sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.routing.report.claims import UNIFORM, Claim, Estimate, Evidence, Trend, _steps, judge


def about(value: float, spread: float = 0.1) -> Estimate:
    return Estimate(value, value * (1 - spread), value * (1 + spread))


def preferences(position: Estimate, step: Estimate, of_class: Estimate | None) -> Claim:
    information = {"position": position, "step": step}
    if of_class is not None:
        information["class"] = of_class
    return judge(Evidence(information, None, None))[0]


MUCH, LITTLE, NONE, WIDE = about(0.3), about(0.02), Estimate(0.0, 0.0, 0.004), Estimate(0.1, 0.0, 0.4)


@pytest.mark.parametrize(
    ("position", "step", "of_class", "verdict"),
    [
        (MUCH, MUCH, NONE, "holds"),
        (MUCH, MUCH, LITTLE, "holds"),  # below a tenth of both
        (MUCH, about(0.1), LITTLE, "partly"),
        (MUCH, MUCH, MUCH, "partly"),
        (MUCH, NONE, NONE, "partly"),
        (NONE, MUCH, NONE, "partly"),
        (NONE, MUCH, WIDE, "partly"),
        (NONE, NONE, NONE, "does not hold"),
        (NONE, NONE, MUCH, "does not hold"),
        (MUCH, MUCH, WIDE, "cannot be told"),
        (MUCH, WIDE, NONE, "cannot be told"),
        (WIDE, WIDE, MUCH, "cannot be told"),
        (MUCH, MUCH, None, "cannot be told"),
    ],
)
def test_preferences(position: Estimate, step: Estimate, of_class: Estimate | None, verdict: str) -> None:
    assert preferences(position, step, of_class).verdict == verdict


def test_the_sentence_on_preferences_gives_the_numbers() -> None:
    sentence = preferences(MUCH, NONE, None).sentence
    assert "depend on position (explains 30.0 % [27.0, 33.0])" in sentence
    assert "do not depend on step (explains 0.0 % [0.0, 0.4])" in sentence
    assert "may or may not depend on class (the profile cannot tell)" in sentence


def trend(early: Estimate, ratio: Estimate) -> Trend:
    return Trend(early, about(early.value * ratio.value), ratio)


@pytest.mark.parametrize(
    ("early", "ratio", "verdict"),
    [
        (MUCH, Estimate(0.1, 0.05, 0.2), "holds"),
        (MUCH, Estimate(0.4, 0.3, 0.6), "partly"),
        (MUCH, Estimate(0.8, 0.7, 0.95), "cannot be told"),
        (MUCH, Estimate(0.95, 0.91, 1.2), "does not hold"),
        (MUCH, Estimate(1.5, 1.2, 1.8), "does not hold"),
        (NONE, Estimate(0.1, 0.0, 90.0), "does not hold"),
        (WIDE, Estimate(0.1, 0.0, 0.4), "cannot be told"),
    ],
)
def test_fading_with_depth(early: Estimate, ratio: Estimate, verdict: str) -> None:
    assert judge(Evidence({}, trend(early, ratio), None))[1].verdict == verdict


def test_later_steps_must_be_uniform_too() -> None:
    low = Estimate(0.2, 0.1, 0.3)
    assert judge(Evidence({}, None, trend(about(0.1), low)))[2].verdict == "holds"
    assert judge(Evidence({}, None, trend(about(0.6), low)))[2].verdict == "partly"


def test_a_rise_towards_the_image_is_told() -> None:
    bins = (about(0.3), about(0.1), about(0.01), about(0.2))
    sentence = judge(Evidence({}, None, trend(about(0.2), about(0.5)), bins))[2].sentence
    assert "highest in bin 0" in sentence
    assert "lowest in bin 2" in sentence
    assert "in the last bin it is back at 0.200" in sentence
    falling = judge(Evidence({}, None, trend(about(0.2), about(0.5)), bins[:3]))[2].sentence
    assert "back at" not in falling


def test_without_evidence_nothing_is_told() -> None:
    assert [claim.verdict for claim in judge(Evidence({}, None, None))] == ["cannot be told"] * 3


numbers = st.floats(0, 1)
intervals = st.tuples(numbers, numbers, numbers).map(sorted).map(lambda n: Estimate(n[1], n[0], n[2]))


@given(intervals, intervals, intervals, intervals)
def test_every_evidence_has_a_verdict(a: Estimate, b: Estimate, c: Estimate, d: Estimate) -> None:
    claims = judge(Evidence({"position": a, "step": b, "class": c}, Trend(a, b, d), Trend(c, d, a), (a, b, c, d)))
    assert all(claim.verdict in ("holds", "partly", "does not hold", "cannot be told") for claim in claims)
    assert all(claim.sentence.endswith(".") for claim in claims)


def test_a_second_half_that_is_surely_not_uniform_refutes_the_third_claim() -> None:
    early, ratio = Estimate(0.2, 0.19, 0.21), Estimate(0.89, 0.85, 0.93)
    assert _steps(Trend(early, Estimate(0.18, UNIFORM + 0.01, 0.2), ratio), ()).verdict == "does not hold"
    assert _steps(Trend(early, Estimate(0.18, UNIFORM - 0.01, 0.2), ratio), ()).verdict == "cannot be told"
