"""Work divided: buckets of a limited size in order, and shares that are about as large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.training.dividing import buckets, dealt

sizes = st.lists(st.integers(0, 20), max_size=30)


def test_buckets_by_hand() -> None:
    assert list(buckets([4, 6, 1, 30, 2], int, 10)) == [[4, 6], [1], [30], [2]]
    assert list(buckets([], int, 10)) == []


@given(sizes, st.integers(1, 25))
def test_buckets_hold_all_in_order_and_no_more_than_they_may(items: list[int], most: int) -> None:
    found = list(buckets(items, int, most))
    assert [item for bucket in found for item in bucket] == items
    assert all(bucket and (sum(bucket) <= most or len(bucket) == 1) for bucket in found)


@given(sizes, st.integers(1, 5))
def test_no_share_has_more_than_another_by_more_than_one_load(loads: list[int], shares: int) -> None:
    found = dealt(dict(enumerate(loads)), shares)
    held = [sum(loads[place] for place, share in found.items() if share == one) for one in range(shares)]
    assert sum(held) == sum(loads) and max(held) - min(held) <= max(loads, default=0)
