"""Batches that are halved where memory runs out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ditmoe_cli.errors import is_out_of_memory

Result = TypeVar("Result")


def computed_batches(
    compute: Callable[[range], Result], batches: Iterable[range], halved: Callable[[int, int], None]
) -> Iterator[tuple[range, Result]]:
    """Yield each batch with its result; where memory runs out, halve that batch and all that follow.

    `halved(size, half)` is called at each halving. Raises the error of a single image that does not fit, and any other
    error as it is.
    """
    queue, limit = deque(batches), None
    while queue:
        indices = queue.popleft()
        if limit is not None and len(indices) > limit:
            queue.extendleft(reversed(split(indices, limit)))
            continue
        try:
            result = compute(indices)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(indices) == 1:
                raise
        else:
            yield indices, result
            continue
        limit = len(indices) // 2
        queue.appendleft(indices)
        halved(len(indices), limit)  # here, where the error no longer keeps the batch's tensors alive


def split(indices: range, most: int) -> list[range]:
    """Return a batch in parts of at most `most` images."""
    return [range(start, min(start + most, indices.stop)) for start in range(indices.start, indices.stop, most)]
