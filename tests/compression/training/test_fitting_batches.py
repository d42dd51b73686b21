"""Batches that are halved where memory runs out, and stay so."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.compression.training.fitting_batches import FittingBatches


def test_batches_are_as_large_as_asked() -> None:
    found = FittingBatches(4).computed(lambda rows: sum(rows), 10)
    assert list(found) == [(range(4), 6), (range(4, 8), 22), (range(8, 10), 17)]
    assert list(FittingBatches(4).computed(len, 0)) == [], "a process may have no rows"


def test_what_does_not_fit_is_halved_for_all_that_follows() -> None:
    told, tried = list[str](), list[int]()

    def compute(rows: range) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    batch = FittingBatches(16, told.append)
    assert [row for _, rows in batch.computed(compute, 9) for row in rows] == list(range(9))
    assert batch.size == 2 and tried == [9, 4, 2, 2, 2, 2, 1]
    assert told == [
        "out of memory with 9 at once: going on with 4",
        "out of memory with 4 at once: going on with 2",
    ]
    tried.clear()
    assert len(list(batch.computed(compute, 9))) == 5 and tried == [2, 2, 2, 2, 1] and len(told) == 2


@pytest.mark.parametrize("error", [MemoryError("all is full"), ValueError("something else")])
def test_a_row_that_does_not_fit_and_other_errors_are_raised(error: Exception) -> None:
    def compute(_: range) -> None:
        raise error

    with pytest.raises(type(error)):
        list(FittingBatches(4).computed(compute, 4))
