"""The spread of a budget over blocks, against all spreads."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.prune.expert_budget import allocate
from ditmoe_cli.errors import InfeasibleError

tables = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=5), min_size=1, max_size=4)


def spreads(errors: list[list[int]], budget: int, least: int) -> list[tuple[int, ...]]:
    counts = itertools.product(*(range(least, len(block) + 1) for block in errors))
    return [kept for kept in counts if sum(kept) == budget]


def cost(errors: list[list[int]], kept: tuple[int, ...]) -> int:
    return sum(block[n - 1] for block, n in zip(errors, kept, strict=True))


@given(tables, st.integers(1, 22), st.integers(1, 3))
def test_no_spread_is_better_or_as_good_and_more_even(errors: list[list[int]], budget: int, least: int) -> None:
    possible = spreads(errors, budget, least)
    if not possible:
        with pytest.raises(InfeasibleError, match=f"^{budget} experts cannot be spread"):
            allocate(errors, budget, least)
        return
    best = min(possible, key=lambda kept: (cost(errors, kept), sum(n * n for n in kept), kept))
    assert allocate(errors, budget, least) == best


def test_equal_blocks_keep_equal_numbers() -> None:
    assert allocate([[0.0] * 8] * 5, 20, 2) == (4,) * 5
    assert sorted(allocate([[0.0] * 8] * 5, 22, 2)) == [4, 4, 4, 5, 5]


def test_a_block_that_needs_its_experts_keeps_them() -> None:
    steep, flat = [4.0, 3.0, 2.0, 0.0], [0.3, 0.2, 0.1, 0.0]
    assert allocate([steep, flat], 6, 2) == (4, 2)
    assert allocate([flat, steep], 6, 2) == (2, 4)


def test_an_error_need_not_fall_with_the_number() -> None:
    assert allocate([[9.0, 0.0, 5.0, 0.0]] * 2, 4, 1) == (2, 2)


def test_a_model_of_forty_blocks_takes_no_time() -> None:
    errors = [[1.0 / (n + 1) + (b % 7) / (n + 3) for n in range(16)] for b in range(40)]
    kept = allocate(errors, 320, 2)
    assert sum(kept) == 320
    assert min(kept) >= 2
