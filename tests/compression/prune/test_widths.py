"""Widths of narrowed experts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.prune.widths import widths_of_ratio
from ditmoe_cli.errors import UsageError


@given(st.integers(1, 6000), st.integers(1, 10**4), st.sampled_from([1, 8, 64, 128]))
def test_a_width_is_the_ratio_rounded_up_to_the_multiple(width: int, parts: int, multiple: int) -> None:
    exact = math.ceil(Fraction(parts, 10**4) * width)
    found = widths_of_ratio(width, parts / 10**4, multiple)
    assert exact <= found <= width
    assert found == width or (found % multiple == 0 and found - exact < multiple)


def test_binary_fractions_do_not_add_a_neuron() -> None:
    assert 0.28 * 25 > 7
    assert widths_of_ratio(25, 0.28, 1) == 7


@pytest.mark.parametrize(("ratio", "multiple"), [(0.0, 8), (1.01, 8), (-1.0, 8), (float("nan"), 8), (0.5, 0)])
def test_what_is_no_ratio_or_multiple_is_refused(ratio: float, multiple: int) -> None:
    with pytest.raises(UsageError):
        widths_of_ratio(64, ratio, multiple)
