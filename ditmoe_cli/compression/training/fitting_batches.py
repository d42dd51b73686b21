"""Batches of what is computed without gradients, halved where memory runs out, for all that follows too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ditmoe_cli.compression.training.side_by_side import side_by_side
from ditmoe_cli.diffusion.sampling import batches
from ditmoe_cli.evaluation.batch_halving import computed_batches, split

Result = TypeVar("Result")


@dataclass
class FittingBatches:
    """Batches of rows that are computed at once.

    Attributes:
        size: rows of a batch.
        note: takes lines for people.
        workers: threads that a batch is divided over (`side_by_side`).
    """

    size: int
    note: Callable[[str], None] = lambda _: None
    workers: int = 1

    def computed(self, compute: Callable[[range], Result], rows: int) -> Iterator[tuple[range, Result]]:
        """Yield each batch of some `rows`, or each thread's part of it, with its result.

        Raises the error of a single row that does not fit.
        """

        def halved(size: int, half: int) -> None:
            self.size = half
            self.note(f"out of memory with {size} at once: going on with {half}")

        def divided(batch: range) -> list[tuple[range, Result]]:
            parts = split(batch, -(-len(batch) // self.workers))
            return list(zip(parts, side_by_side(compute, parts), strict=True))

        for _, found in computed_batches(divided, batches(rows, self.size), halved):
            yield from found
