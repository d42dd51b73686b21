"""Batches that do not fit are halved, once for all that follow."""

from __future__ import annotations

import pytest

from ditmoe_cli.evaluation.batch_halving import computed_batches, split


def test_a_batch_in_parts() -> None:
    assert split(range(3, 10), 3) == [range(3, 6), range(6, 9), range(9, 10)]
    assert split(range(3, 5), 8) == [range(3, 5)]


def test_the_limit_holds_for_all_batches_that_follow_and_nothing_is_lost() -> None:
    tried: list[int] = []
    halvings: list[tuple[int, int]] = []

    def compute(indices: range) -> list[int]:
        tried.append(len(indices))
        if len(indices) > 2:
            raise MemoryError
        return list(indices)

    results = list(computed_batches(compute, [range(5), range(9, 13)], lambda *sizes: halvings.append(sizes)))
    assert [indices for indices, _ in results] == [range(2), range(2, 4), range(4, 5), range(9, 11), range(11, 13)]
    assert all(values == list(indices) for indices, values in results)
    assert halvings == [(5, 2)] and tried == [5, 2, 2, 1, 2, 2]


@pytest.mark.parametrize(("error", "sizes"), [(MemoryError(), [4, 2, 1]), (RuntimeError("shapes differ"), [4])])
def test_a_single_image_and_other_errors_are_not_tried_again(error: Exception, sizes: list[int]) -> None:
    tried: list[int] = []

    def fail(indices: range) -> None:
        tried.append(len(indices))
        raise error

    with pytest.raises(type(error)):
        list(computed_batches(fail, [range(4)], lambda *_: None))
    assert tried == sizes
