"""Counts of experts to keep: ratios rounded up exactly, counts as they are, and what is neither."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.counts import Keep, parse_keep
from ditmoe_cli.errors import UsageError


@given(st.integers(1, 10**6), st.integers(1, 256))
def test_a_ratio_is_rounded_up_exactly(millionths: int, experts: int) -> None:
    text = f"{millionths / 10**6:.6f}"
    exact = Fraction(text) * experts
    assert parse_keep(text).of(experts) == math.ceil(exact)
    assert parse_keep(text).count is None


def test_no_ratio_of_two_digits_suffers_from_binary_fractions() -> None:
    # 0.28 * 25 is 7.000000000000001 in floating point
    for hundredths, experts in itertools.product(range(1, 101), range(1, 65)):
        text = f"{hundredths / 100:.2f}"
        assert parse_keep(text).of(experts) == math.ceil(Fraction(text) * experts), (text, experts)


@given(st.integers(1, 64).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))))
def test_a_ratio_that_means_a_whole_number_gives_it(case: tuple[int, int]) -> None:
    experts, kept = case
    assert parse_keep(repr(kept / experts) if kept < experts else "1.0").of(experts) == kept


@given(st.integers(1, 10**4), st.integers(1, 256))
def test_a_count_is_a_count_whatever_the_block_has(count: int, experts: int) -> None:
    assert parse_keep(str(count)) == Keep(count=count)
    assert parse_keep(str(count)).of(experts) == count


def test_a_decimal_point_tells_one_from_all() -> None:
    assert parse_keep("1").of(8) == 1
    assert parse_keep("1.0").of(8) == 8
    assert [str(parse_keep(text)) for text in ("4", "0.5", "1.0")] == ["4", "0.5", "1.0"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "half", "0", "-1", "+0", "0.0", "-0.5", "1.5", "8.0", "nan", "inf", "-inf", "--4", "1/2", "50%", "²"],
)
def test_what_is_neither_ratio_nor_count_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^keep "):
        parse_keep(text)


def test_only_the_experts_to_keep_can_be_left_open() -> None:
    assert parse_keep("auto").auto and parse_keep("auto").of(8) == 8
    with pytest.raises(UsageError, match=r"^groups auto: give a ratio"):
        parse_keep("auto", "groups")
