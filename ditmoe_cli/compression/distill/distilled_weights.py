"""Distilling carried out: paths of the original, training on them, and the weights that come of it.

The student is asked at N times of the original's paths, and learns the slopes to their next states. With states of its
own, half of the states that it learns from are those that its own steps have led it to, from which it learns to get
back: its errors then add up less. The loss of step i is weighted by e_i^-1/2, e_i being the mean ‖z' - z_{i+1}‖² of
that step before training, so that no step is sacrificed to another.

Held-out paths judge. Which weights are kept is decided by the same loss on them: images in which the student's own
steps end say less of so few paths, since some flip to others by little. Images decide whether there is a gain at all.
Paths are sampled once, and kept in the work folder; so are the number of iterations, and the state of training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.distill.distilled_output import DistillingRecord
from ditmoe_cli.compression.distill.distilling import Distilling, tensors_to_distill
from ditmoe_cli.compression.distill.distilling_memory import distilling_bytes, held_paths
from ditmoe_cli.compression.distill.kept_paths import KeptPaths
from ditmoe_cli.compression.distill.student_errors import (
    PathErrors,
    mean_step_errors,
    own_states,
    path_errors,
    step_errors,
)
from ditmoe_cli.compression.distill.teacher_paths import Paths, student_steps
from ditmoe_cli.compression.training.low_rank_updates import Updates
from ditmoe_cli.compression.training.trained_weights import TrainedTensors
from ditmoe_cli.compression.training.training_loop import Objective, train
from ditmoe_cli.compression.training.training_session import MEMORY_SHARE, PIECE, Session, TrainingWork
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.formats.unpacked_weights import free_on
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.progress import readable_bytes

BALANCE = 0.5  # strength of the weights of steps
_TINY = 1e-30


def distill(work: TrainingWork, asked: Distilling, weak: Checkpoint | None = None) -> DistillingRecord:
    """Distil, and keep the trained weights, as they are written, as the piece `PIECE` of the work folder.

    `weak` is the checkpoint that guides the original, if one does.

    Raises `BadInputError` for predictions that are not finite and no weights to train; `InfeasibleError` where memory
    does not suffice.
    """
    document = work.document(PIECE)
    return _Distilling(work, asked, weak).distilled() if document is None else DistillingRecord(**document)


@dataclass
class _Distilling:
    """A student being distilled: what its parts share."""

    work: TrainingWork
    asked: Distilling
    weak: Checkpoint | None

    def __post_init__(self) -> None:
        self.family = self.work.original.config.sampler
        self.tensors = TrainedTensors(self.work.student, tensors_to_distill(self.work.student, self.asked))
        self.session = Session(self.work, self.asked, self.tensors, self._needed, self.asked.clocked(self.family))

    def distilled(self) -> DistillingRecord:
        """Distil through all stages, and keep the result."""
        self.work.exchange.share.from_first(self._check_memory)
        work = self.work
        paths = KeptPaths(work, self.asked, self.session, self.weak).paths()
        judged = held_paths(len(paths))
        held, others = paths.at(slice(0, judged)), paths.at(slice(judged, None))
        student = build_model(work.student, self.session.device)
        student.compute_in(work.dtype)
        updates = self.session.updates(student)
        before, iterations = self._errors(student, held, self.asked.steps), 0
        stages = self.asked.stages(self.family)
        for number, steps in enumerate(stages):
            iterations += self._trained(student, updates, held, others, steps, len(stages) - number)
        after = self._errors(student, held, self.asked.steps)
        trained = updates.written()
        if not after.image < before.image:
            work.note("no trained weights were better on held-out paths: the output has those of the input")
            after, trained = before, {}
        clock = self.session.clocked(len(paths), self.asked.trainings(self.family))
        record = DistillingRecord(len(paths), iterations, before.by_step, after.by_step, clock)
        self.session.keep(trained, asdict(record))
        return record

    def _needed(self, states: int) -> float:
        world = self.work.exchange.share.world
        return distilling_bytes(self.work.student.config, self.tensors.size, states, world)

    def _check_memory(self) -> None:
        """Raise `InfeasibleError` where one state at once is too much."""
        free, needed = free_on(self.session.device), self._needed(1)
        if free and needed > MEMORY_SHARE * free:
            raise InfeasibleError(
                f"distilling {self.work.student.name} takes {readable_bytes(needed)}, and {readable_bytes(free)} are "
                "free; give ⟨train⟩ fewer weights, or lora:8"
            )

    def _errors(self, student: DiTMoE, held: Paths, steps: int) -> PathErrors:
        few = student_steps(self.family, steps, student.device)
        return path_errors(student, few, held.in_steps(steps), self.session.judging(), self.work.exchange)

    def _trained(self, student: DiTMoE, updates: Updates, held: Paths, others: Paths, steps: int, left: int) -> int:
        """Train a student of some steps, in one of the `left` parts of what is left; return the iterations."""
        few = student_steps(self.family, steps, student.device)
        paths, judging = others.in_steps(steps), held.in_steps(steps)

        def judged() -> Tensor:
            return mean_step_errors(student, few, judging, self.session.judging(), self.work.exchange)

        errors = judged()
        if not bool(errors.isfinite().all()):
            raise BadInputError(
                f"{self.work.student.path}: its predictions before training are not finite; is it damaged?"
            )
        weights_of = step_weights(errors, judging).to(student.device)

        def losses(rows: Tensor) -> Tensor:
            step, path = rows // len(paths), rows % len(paths)
            part = paths.at(path)
            z, after = (part.z[torch.arange(len(rows)), step + more].to(student.device) for more in (0, 1))
            labels, here = part.labels.to(student.device), step.to(student.device)
            if self.asked.states == "own":
                own = ((path + step) % 2 == 0).nonzero().flatten()
                noise, there = part.z[own, 0].to(student.device), own.to(student.device)
                z[there] = own_states(student, few, noise, labels[there], step[own])
            return step_errors(student, few, z, after, labels, here) * weights_of[here]

        def judge() -> float:
            updates.round()
            return float((judged() * weights_of.cpu()).mean())

        objective, weights = Objective(len(paths) * steps, losses, judge), updates.trained()
        names = self.asked.trainings(self.family)
        name, stages = names[-left], len(names)
        each = self.asked.iterations
        if each is not None:  # the last stage takes what does not divide
            each = each // stages + (each % stages if left == 1 else 0)
        course = self.session.course(
            name, 1 / left, len(judging) * steps, weights, objective, each, self.session.at_once()
        )
        means = self.session.means(self.work.folder, f"training-{steps}")
        train(weights, objective, course, f"distilling to {steps} steps", means, updates.stepping())
        return course.steps


def step_weights(errors: Tensor, held: Paths) -> Tensor:
    """Return the weight of squared errors of each step (N,), of mean 1 after division by the mean ‖z'‖² of paths.

    `errors` (N,) are the means of each step before training.
    """
    weights = errors.clamp_min(float(errors.mean()) * 1e-3 + _TINY).pow(-BALANCE)
    scale = held.z[:, 1:].double().square().flatten(2).sum(dim=2).mean().clamp_min(_TINY)
    return (weights / weights.mean() / scale).float()
