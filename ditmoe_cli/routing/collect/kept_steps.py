"""Steps of a calibration that are kept in a work folder, so that an interrupted one goes on behind its last kept step.

Each time, a new piece ``rows.N`` takes what only grows (the predictions of the batch's steps, states and tokens of the
reservoir), and one piece ``sums`` takes all that steps change, in place of the one before. Going on, a solver is given
the kept predictions, and so comes to the same state, whatever it remembers.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import Piece, WorkFolder
from ditmoe_cli.routing.collect.counters import Counters
from ditmoe_cli.routing.collect.reservoir import Reservoir

if TYPE_CHECKING:
    from collections.abc import Mapping

_BEFORE = "before."
_RESERVOIR = "reservoir."
_PREDICTIONS = "predictions"


class Collector(Protocol):
    """What is kept of a collector."""

    counters: Counters
    reservoir: Reservoir

    def live(self) -> dict[str, Tensor]:
        """Return what every step changes."""

    def go_on(self, step: int, before: dict[str, Tensor]) -> None:
        """Take the batch that has begun as far as behind `step` - 1."""


class KeptSteps:
    """The steps of one process's batches: those that an earlier run kept, and those that are being kept.

    Attributes:
        batch: the number of the batch under way, of this process's own.
    """

    def __init__(self, work: WorkFolder, collector: Collector, batches: int, steps: int) -> None:
        self.work, self.collector, self.batches, self.steps = work, collector, batches, steps
        self.batch = 0
        self._pace = Pace()
        self._pieces = 0  # of rows
        self._states = 0  # of the reservoir in those pieces
        self._new: list[Tensor] = []  # predictions that no piece holds yet
        self._kept: list[Tensor] = []  # predictions of the batch under way
        self._before: dict[str, Tensor] = {}
        self._take_up()
        work.tell(self._told)

    def _take_up(self) -> None:
        """Take up what an earlier run kept, if all of it is there."""
        sums = self.work.read("sums")
        if sums is None:
            return
        pieces = [self.work.read(f"rows.{number}") for number in range(int(sums.document["pieces"]))]
        whole = [piece for piece in pieces if piece is not None]
        if len(whole) < len(pieces):
            return
        self.batch, done = int(sums.document["batch"]), int(sums.document["steps"])
        for name, live in self.collector.live().items():
            live.copy_(sums.tensor(name))
        self._before = _part(sums, _BEFORE)
        for piece in whole:
            self.collector.reservoir.add_rows(_part(piece, _RESERVOIR))
            if piece.document["batch"] == self.batch:
                self._kept += piece.tensor(_PREDICTIONS).unbind()
        self._pieces, self._states = len(whole), len(self.collector.reservoir.z)
        at = self.batch * self.steps + done
        self.work.notify(f"going on with step {at + 1} of {self._total} (kept in {self.work.folder})")

    @property
    def _total(self) -> int:
        return self.batches * self.steps

    def begin_batch(self) -> int:
        """Begin the batch under way, behind the steps that are kept; return their number."""
        if self._kept:
            self.collector.go_on(len(self._kept), self._before)
        return len(self._kept)

    def through(self, predict: Predictor) -> Predictor:
        """Return a predictor that gives the batch's kept predictions first, and keeps those that follow."""
        numbers = itertools.count()
        kept = list(self._kept)

        def predicted(x: Tensor, t: float) -> Tensor:
            number = next(numbers)
            if number < len(kept):
                return kept[number].to(x.device)
            output = predict(x, t)
            self._new.append(output.cpu())
            self._keep(number + 1)
            return output

        return predicted

    def end_batch(self) -> None:
        """Go on to the next batch; its first kept step tells that this one is whole. The last batch is kept now."""
        self._kept, self._before = [], {}
        if self._new and self.batch == self.batches - 1:
            self._write(self.steps)
        self._new = []  # a whole batch needs none
        self.batch += 1

    def _keep(self, done: int) -> None:
        """Keep the batch's first `done` steps, if it is time to."""
        if self._pace.is_due:
            self._write(done)

    def _write(self, done: int) -> None:
        with self._pace.keeping():
            reservoir = self.collector.reservoir
            rows = {f"{_RESERVOIR}{name}": tensor for name, tensor in reservoir.rows(self._states).items()}
            self.work.write(
                f"rows.{self._pieces}", {**rows, _PREDICTIONS: torch.stack(self._new)}, {"batch": self.batch}
            )
            self._pieces, self._states, self._new = self._pieces + 1, len(reservoir.z), []
            before = {f"{_BEFORE}{name}": choices for name, choices in self.collector.counters.before().items()}
            document = {"pieces": self._pieces, "batch": self.batch, "steps": done}
            self.work.write("sums", _on_cpu({**self.collector.live(), **before}), document)

    def _told(self) -> str | None:
        """Return what is kept, as people read it."""
        sums = self.work.read("sums")
        if sums is None:
            return None
        done = int(sums.document["batch"]) * self.steps + int(sums.document["steps"])
        return f"kept {done} of {self._total} steps; the same command goes on"


def _part(piece: Piece, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a piece whose names begin so, without that."""
    return {name.removeprefix(prefix): piece.tensor(name) for name in piece.names if name.startswith(prefix)}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
