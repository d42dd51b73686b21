"""The exact choice under a budget, against all choices."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.precision.knapsack import exact
from ditmoe_cli.compression.precision.lagrange import (
    Group,
    Option,
    bytes_of,
    dual,
    error_of,
    improve,
    relax,
    undominated,
    usable,
)

errors = st.one_of(st.integers(0, 6).map(float), st.floats(1e-3, 1e3))
options = st.builds(Option, st.sampled_from("abcd"), st.integers(0, 30), errors)
several = st.lists(st.lists(options, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)


def all_of(groups: list[Group]) -> list[list[int]]:
    return [list(range(len(group.options))) for group in groups]


def best_of_all(groups: list[Group], budget: int) -> float:
    choices = itertools.product(*all_of(groups))
    return min((error_of(groups, c) for c in choices if bytes_of(groups, c) <= budget), default=math.inf)


@given(drawn=several, share=st.floats(-0.1, 1.1))
def test_it_is_the_best_of_all_choices(drawn: list[tuple[Option, ...]], share: float) -> None:
    groups = [Group(f"g{i}", each) for i, each in enumerate(drawn)]
    least, most = (sum(f(o.bytes for o in group.options) for group in groups) for f in (min, max))
    budget = math.floor(least + share * (most - least))
    best = best_of_all(groups, budget)
    found = exact(groups, all_of(groups), budget, 0.0, math.inf)
    if budget < least:
        assert found is None and best == math.inf
        return
    assert found is not None and bytes_of(groups, found) <= budget
    assert error_of(groups, found) == pytest.approx(best)
    # by what the relaxation leaves open
    room = usable(groups, budget)
    start, multiplier = relax(groups, room)
    known = improve(groups, room, start)
    gap = error_of(groups, known) - dual(groups, room, multiplier)
    narrowed = exact(groups, [list(undominated(group)) for group in groups], room, multiplier, gap)
    if narrowed is None:  # a gap of mere rounding
        assert error_of(groups, known) == pytest.approx(best)
    else:
        assert error_of(groups, narrowed) == pytest.approx(best)


@given(drawn=several)
def test_only_the_options_given_are_taken(drawn: list[tuple[Option, ...]]) -> None:
    groups = [Group(f"g{i}", each) for i, each in enumerate(drawn)]
    last = [[len(group.options) - 1] for group in groups]
    taken = tuple(o for (o,) in last)
    assert exact(groups, last, bytes_of(groups, taken), 0.0, math.inf) == taken
    assert exact(groups, last, bytes_of(groups, taken) - 1, 0.0, math.inf) is None


def test_no_groups_take_nothing() -> None:
    assert exact([], [], 0, 0.0, 1.0) == ()


def random_weights(count: int) -> list[Group]:
    """Weights of all sizes, so that hardly any two sums are of the same bytes."""
    rng = random.Random(1)
    made = []
    for g in range(count):
        size, heat = rng.randint(1000, 99_999), rng.lognormvariate(0, 2)
        made.append(
            Group(f"w{g}", tuple(Option(f"int{b}", size * b // 8, size * heat * 4.0**-b) for b in (2, 3, 4, 6, 8)))
        )
    return made


def test_long_lists_are_given_up() -> None:
    groups = random_weights(40)
    least, most = (sum(f(o.bytes for o in group.options) for group in groups) for f in (min, max))
    budget = (least + most) // 2
    start = time.monotonic()
    assert exact(groups, all_of(groups), budget, 0.0, math.inf, most=2000) is None
    assert time.monotonic() - start < 5
    assert exact(groups[:6], all_of(groups[:6]), budget, 0.0, math.inf, most=5**6) is not None


def test_what_the_bound_rules_out_keeps_lists_short() -> None:
    """Forty weights at once, where the relaxation is near."""
    groups = random_weights(40)
    least, most = (sum(f(o.bytes for o in group.options) for group in groups) for f in (min, max))
    budget = (least + most) // 3
    start, multiplier = relax(groups, budget)
    known = improve(groups, budget, start)
    bound = dual(groups, budget, multiplier)
    found = exact(groups, all_of(groups), budget, multiplier, error_of(groups, known) - bound)
    assert found is not None
    assert bound <= error_of(groups, found) <= error_of(groups, known) * (1 + 1e-12)
