"""Ranks of compressed differences by the ratio of weights that they may take."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.delta.delta_sizes import rank_of_ratio
from ditmoe_cli.errors import UsageError


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 1000))
def test_a_rank_holds_at_most_the_ratio_of_weights(rows: int, columns: int, thousandths: int) -> None:
    rank = rank_of_ratio(rows, columns, thousandths / 1000)
    allowed = Fraction(thousandths, 1000) * rows * columns
    assert rank * (rows + columns) <= allowed < (rank + 1) * (rows + columns)


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_what_is_no_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratio of a difference's weights"):
        rank_of_ratio(8, 8, ratio)
