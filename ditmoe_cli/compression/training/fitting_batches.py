"""Batches of what is computed without gradients, halved where memory runs out, for all that follows too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ditmoe_cli.diffusion.sampling import batches
from ditmoe_cli.evaluation.batch_halving import computed_batches

Result = TypeVar("Result")


@dataclass
class FittingBatches:
    """Batches of rows that are computed at once.

    Attributes:
        size: rows of a batch.
        note: takes lines for people.
    """

    size: int
    note: Callable[[str], None] = lambda _: None

    def computed(self, compute: Callable[[range], Result], rows: int) -> Iterator[tuple[range, Result]]:
        """Yield each batch of some `rows` with its result. Raises the error of a single row that does not fit."""

        def halved(size: int, half: int) -> None:
            self.size = half
            self.note(f"out of memory with {size} at once: going on with {half}")

        return computed_batches(compute, batches(rows, self.size), halved)
