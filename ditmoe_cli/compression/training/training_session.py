"""A session of training: what it works on, by which means, and for how long; and what a run keeps, to go on from.

With the same request an unfinished run goes on from its work folder, to the same bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.computed import as_stored
from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.low_rank_updates import Updates, low_rank_updates
from ditmoe_cli.compression.training.side_by_side import workers_for
from ditmoe_cli.compression.training.teacher_states import guided_prediction
from ditmoe_cli.compression.training.trained_weights import TrainedTensors
from ditmoe_cli.compression.training.training_loop import Course, Means, Objective, accumulate
from ditmoe_cli.compression.training.training_memory import BACKWARD, checks_of, pays
from ditmoe_cli.compression.training.training_request import Clock, TrainingRequest
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import evaluation_times
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.workfolder import Piece, WorkFolder
from ditmoe_cli.formats.unpacked_weights import free_on
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.progress import BYTES, phase

MEMORY_SHARE = 0.8  # of what is free may be taken
PIECE = "trained"  # of the work folder: all trained tensors, as they are written
_JUDGING_SHARE = 0.1  # of the time
_TIMED = 2  # steps that are timed, of which the last counts
_CHOSEN = ("steps", "checks", "part")  # of a course, by the clock or the memory
_FEWEST_SAMPLED = 8  # images that predictions are timed on at first


@dataclass(frozen=True)
class TrainingWork:
    """What training works on, and by which means.

    Attributes:
        student, original: both checkpoints.
        device: of both models.
        dtype: what attention and experts compute in.
        folder: keeps what is done; in the first of several processes, whose others follow it.
        note: takes lines for people.
        exchange: the processes that train together.
    """

    student: Checkpoint
    original: Checkpoint
    device: str
    dtype: torch.dtype
    folder: WorkFolder
    note: Callable[[str], None]
    exchange: Exchange = ALONE

    def document(self, piece: str) -> Mapping[str, Any] | None:
        """Return the document of a piece that the first process's folder keeps; None where it keeps none."""

        def kept() -> Mapping[str, Any] | None:
            found = self.folder.read(piece)
            return None if found is None else found.document

        return self.exchange.share.from_first(kept)

    def made(self, piece: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Piece:
        """Return a piece of the work folder, which the first process makes where it is not kept yet."""
        return self.exchange.share.after_first(lambda: self.folder.made(piece, make))


def is_packed(checkpoint: Checkpoint) -> bool:
    """Return whether some weights of a checkpoint are quantised, which a model unpacks into one place."""
    return any(weight.quantized for weight in checkpoint.weights.values())


@contextmanager
def naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Name a checkpoint in each `BadInputError`, where two are at work and a message tells of neither."""
    try:
        yield
    except BadInputError as error:
        raise BadInputError(f"{checkpoint.path}: {error.message}") from None


def require_finite(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` that names the first tensor of a checkpoint with NaN or infinite values."""
    size = sum(info.nbytes for info in checkpoint.header.tensors.values())
    with phase(f"reading {checkpoint.name}", size, BYTES) as progress:
        for name, info in checkpoint.header.tensors.items():
            checkpoint.shared_tensor(name)
            progress(info.nbytes)


@dataclass
class Session:
    """A session, from its start.

    Attributes:
        needed: returns the memory of a process that trains end to end, some states at once.
        clock: what an earlier run chose by the clock, and this one takes over; None where there is nothing to take.
    """

    work: TrainingWork
    asked: TrainingRequest
    tensors: TrainedTensors
    needed: Callable[[int], float]
    clock: Clock | None = None
    started: float = field(default_factory=time.monotonic)
    _judging: FittingBatches | None = None

    @property
    def device(self) -> torch.device:
        """The device of all models."""
        return torch.device(self.work.device)

    @property
    def workers(self) -> int:
        """Over how many threads batches are divided; packed weights of an original are unpacked into one place."""
        return 1 if is_packed(self.work.original) else workers_for(self.device, self.tensors.size.values)

    @property
    def base(self) -> Course:
        """The course of a single step, as asked for."""
        return Course(1, self.asked.batch, self.asked.rate or self.asked.usual_rate, self.asked.seed)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds of the minutes that were asked for."""
        assert self.asked.minutes is not None
        return max(60 * self.asked.minutes - self.elapsed, 0.0)

    def at_once(self) -> int:
        """Return how many states of a process's share of a batch there is memory for at once; 0 for all."""
        free, batch = MEMORY_SHARE * free_on(self.device), -(-self.asked.batch // self.work.exchange.share.world)
        least, one = self.needed(0), self.needed(1)
        fitting = int((free - least) // max(one - least, 1)) if free else batch
        return 0 if fitting >= batch else max(1, fitting)

    def judging(self) -> FittingBatches:
        """Return the batches in which is judged, at first of as many states as are trained on at once."""
        if self._judging is None:
            self._judging = FittingBatches(self.at_once() or self.asked.batch, self.work.note, self.workers)
        return self._judging

    def means(self, folder: WorkFolder | None = None, piece: str = "training") -> Means:
        """Return by which means is trained; `folder` keeps what going on takes, as a `piece`."""
        return Means(folder, self.work.note, self.work.exchange, str(self.work.student.path), piece, self.workers)

    def updates(self, model: nn.Module, prefix: str = "") -> Updates:
        """Return the trained weights of a model, or of a part of it, or the updates that train them."""
        return self.updating(model, prefix, self.tensors.in_model(model, prefix))

    def updating(self, model: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> Updates:
        """Return the same of weights that are in a model already (`TrainedTensors.in_model`)."""
        ranks, rounded = self.tensors.ranks, self.tensors.rounded
        updates = low_rank_updates(model, prefix, weights, ranks, rounded, self.asked.seed)
        worth = pays(self.tensors.size, self.work.student.config, self.asked.batch)
        return replace(updates, matrices=self.tensors.matrices) if worth else updates

    def course(
        self,
        name: str,
        share: float,
        judged: int,
        weights: Mapping[str, Tensor],
        objective: Objective,
        steps: int | None,
        part: int,
    ) -> Course:
        """Return the course of a training: of some `steps`, or of as many as a share of the time that is left allows.

        A check takes `judged` predictions, and `part` states are computed at once. What the first process chooses is
        kept under `name`, for a run that goes on.
        """
        piece, chosen = f"{name}-course", self.base
        if self.work.document(piece) is None:
            course = replace(chosen, part=part)
            if self.clock is not None and name in self.clock.trainings:
                steps, checks, own = self.clock.trainings[name]
                chosen = replace(course, steps=steps, checks=checks, part=own or part)
            elif steps is not None:
                chosen = replace(course, steps=steps, checks=checks_of(steps))
            else:
                chosen = self._affordable(course, share, judged, weights, objective)
        document = self.work.made(piece, lambda: ({}, {each: getattr(chosen, each) for each in _CHOSEN})).document
        return replace(self.base, **{each: int(document[each]) for each in _CHOSEN})

    def clocked(self, count: int, names: Sequence[str]) -> tuple[int, ...]:
        """Return what the clock chose for trainings, as histories keep it; nothing where steps were asked for."""
        if self.asked.minutes is None:
            return ()
        trainings: dict[str, tuple[int, int, int]] = {}
        for name in names:
            steps, checks, part = (int((self.work.document(f"{name}-course") or {}).get(each, 0)) for each in _CHOSEN)
            trainings[name] = (steps, checks, part)
        return Clock(count, trainings).numbers

    def _affordable(
        self, course: Course, share: float, judged: int, weights: Mapping[str, Tensor], objective: Objective
    ) -> Course:
        """Return the course of as many steps as a share of the time that is left allows, by timing some steps."""
        part, exchange = course.part, self.work.exchange
        rows = course.rows(0, objective.states)[: part * exchange.share.world or None]
        for _ in range(_TIMED):
            exchange.share.wait()
            start = time.monotonic()
            loss, part = accumulate(weights, objective.losses, rows, part, self.means())
            float(loss)  # waits for the device
            seconds = (time.monotonic() - start) * course.batch / len(rows)
        check = judged / course.batch / BACKWARD  # in steps
        steps = share * self.left / seconds
        checks = min(max(int(_JUDGING_SHARE * steps / check), 2), checks_of(int(steps)))
        return replace(course, steps=max(1, int(steps - check * (checks + 1))), checks=checks, part=part)

    def images_within(self, teacher: DiTMoE, spec: SampleSpec, seconds: float, batch: FittingBatches) -> int:
        """Return how many images can be sampled within some seconds, in batches at most, by timing predictions.

        They are timed on twice as many images each time, until they take a hundredth of the seconds.
        """
        config, wanted = teacher.config, _FEWEST_SAMPLED

        def predicted(rows: range) -> None:
            size = len(rows)
            z = torch.zeros(size, config.in_channels, config.input_size, config.input_size, device=self.device)
            t, labels = torch.ones(size, device=self.device), torch.zeros(size, dtype=torch.long, device=self.device)
            with torch.inference_mode():
                float(guided_prediction(teacher, z, t, labels, spec.cfg).sum())  # waits for the device

        while True:
            count = min(wanted, batch.size)
            start = time.monotonic()
            deque(batch.computed(predicted, count), maxlen=0)
            taken = time.monotonic() - start
            if 2 * taken > 0.01 * seconds or count >= batch.size:
                break
            wanted *= 2
        return max(0, int(seconds * count / taken) // len(evaluation_times(spec.solver, spec.steps)))

    def keep(self, values: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Keep all tensors that could be trained, as they are written; those not in `values` are the input's."""
        student = self.work.student
        written = {}
        for name in self.tensors.tensors:
            stored = self.tensors.stored(name, values[name]) if name in values else student.finite_tensor(name)
            written[name] = as_stored(student, name, stored, stored.dtype)
        self.work.folder.write(PIECE, written, document)
