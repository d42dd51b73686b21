"""Healing block after block, with the weights of one in memory, before and after.

Each block is trained on the states that come from the healed blocks before it. With B the student's block, B_T the
original's, x the student's stream and x_T the original's, the target is

    y = (1 - λ) B_T(x) + λ B_T(x_T),

what the original's block makes of the same inputs and what its own stream becomes; the loss of a state is
‖s d_c - (s - 1) d_u‖² with d = B(x) - y in each branch, relative to what the block adds to the stream.

Takes the weights of two blocks, 16 bytes for each trained weight of one, and the tokens of all states in both models:
8 N P D bytes for N states of all branches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.replay.guided import GuidedStates, image_slices
from ditmoe_cli.compression.training.low_rank_updates import Updates
from ditmoe_cli.compression.training.prediction_error import JudgedErrors, bins_of, by_bin
from ditmoe_cli.compression.training.training_loop import BARE, CourseOf, Means, Objective, train
from ditmoe_cli.files.workfolder import KeptLoop
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import phase

STREAM = 0.5  # λ
_TINY = 1e-30
_JUDGED = 128  # states that are judged at once


Updating = Callable[[nn.Module, str], Updates]
"""Prepares the trained weights of a block, whose names begin with a prefix, and returns them."""


@dataclass(frozen=True)
class BlocksHealed:
    """Errors of the prediction on held-out states, before and after."""

    before: JudgedErrors
    after: JudgedErrors


@dataclass
class _Streams:
    """Tokens of all states, in all branches, behind the blocks so far: of the original, of the student that is healed,
    and of the student as it was, on held-out states alone. `c` are their conditions."""

    original: Tensor
    student: Tensor
    before: Tensor
    c_original: Tensor
    c_student: Tensor


def heal_blocks(
    student: OffloadedDiTMoE,
    original: OffloadedDiTMoE,
    states: GuidedStates,
    held: Tensor,
    updating: Updating,
    course: CourseOf,
    kept: KeptLoop,
    means: Means = BARE,
) -> BlocksHealed:
    """Train the tensors of each block and keep them, going on behind those that an unfinished run has left.

    Args:
        student, original: both models, of as many blocks.
        states: what to train and to judge on, all branches.
        held: (N,) which states are held out.
        updating: prepares the weights of a block to be trained.
        course: returns how a block is trained, given its weights and what they are trained towards.
        kept: the loop that keeps each block's weights.
        means: whom it tells, and the processes that train together.
    """
    branches = torch.arange(states.branches).unsqueeze(1) * len(held)
    rows_held = (branches + held.nonzero().flatten()).flatten()
    streams = _embedded(student, original, states, rows_held)
    if kept.state is not None:
        for name in ("original", "student", "before"):
            setattr(streams, name, kept.state.tensor(name).to(student.device))
    with phase("healing the blocks", kept.total, "blocks", start=kept.start) as progress:
        for index in range(kept.start, kept.total):
            with ExitStack() as stack:
                own, other = stack.enter_context(student.resident(index)), stack.enter_context(original.resident(index))
                healing = _BlockHealing(own, other, index, states, held, streams, rows_held, means)
                document, weights = healing.healed(updating, course)
                kept.keep(index, weights, document, healing.advanced())
            progress(1)
    seen = states.at(rows_held)
    expected = seen.predicted(original, streams.original[rows_held], streams.c_original[rows_held])
    conditions = streams.c_student[rows_held]
    before, after = (
        _errors(seen.predicted(student, x, conditions), expected, seen)
        for x in (streams.before, streams.student[rows_held])
    )
    means.exchange.share.wait()  # the first process has kept all blocks
    before, after = means.exchange.agreed((before, after))
    return BlocksHealed(before, after)


def _errors(prediction: Tensor, expected: Tensor, states: GuidedStates) -> JudgedErrors:
    errors, references = (part.square().flatten(1).sum(dim=1) for part in (prediction - expected, expected))
    return by_bin(errors, references, bins_of(states.t[: len(expected)], states.sampler))


def _embedded(student: OffloadedDiTMoE, original: OffloadedDiTMoE, states: GuidedStates, held: Tensor) -> _Streams:
    found = []
    with torch.no_grad():
        for model in (original, student):
            parts = [model.embed(states.z[r], states.t[r], states.labels[r]) for r in image_slices(len(states.z))]
            found.append([torch.cat(column) for column in zip(*parts, strict=True)])
    (x_original, c_original), (x_student, c_student) = found
    return _Streams(x_original, x_student, x_student[held], c_original, c_student)


@dataclass(frozen=True)
class _BlockHealing:
    """A block at work: the student's and the original's, and the streams before it."""

    student: Block
    original: Block
    index: int
    states: GuidedStates
    held: Tensor
    streams: _Streams
    rows_held: Tensor
    means: Means

    def healed(self, updating: Updating, course: CourseOf) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Train the block; return held-out errors before and after, and the values of its tensors."""
        streams, index, exchange = self.streams, self.index, self.means.exchange
        with torch.no_grad():
            streams.before = _through(self.student, streams.before, streams.c_student[self.rows_held], index)
            own = _through(self.original, streams.original, streams.c_original, index)
            target = _through(self.original, streams.student, streams.c_original, index).lerp_(own, STREAM)
            added = self._energies(target - streams.student)
        streams.original = own
        trained, judged = (~self.held).nonzero().flatten(), self.held.nonzero().flatten()
        scale, reference = (added[rows].mean().clamp_min(_TINY) for rows in (trained, judged))

        def errors(rows: Tensor) -> Tensor:
            places = torch.cat([rows + branch * len(self.held) for branch in range(self.states.branches)])
            out = self.student(streams.student[places], streams.c_student[places], index, None)
            return self._energies(out - target[places])

        def judge() -> float:
            updates.round()
            with torch.no_grad():
                own = [errors(rows) for rows in exchange.parts(judged, _JUDGED)]
            return float(exchange.gathered(own, len(judged)).mean() / float(reference))

        def losses(rows: Tensor) -> Tensor:
            return errors(trained[rows]) / scale

        updates = updating(self.student, f"blocks.{index}.")
        weights = updates.trained()
        if not weights:
            return {"before": 0.0, "after": 0.0}, {}
        objective = Objective(len(trained), losses, judge)
        chosen = course(weights, objective)
        chosen = replace(chosen, seed=chosen.seed + index)
        result = train(weights, objective, chosen, "training", self.means, updates.stepping())
        self.student.requires_grad_(False)
        written = {name: weight.clone() for name, weight in updates.written().items()}
        return {"before": result.before, "after": result.after}, written

    def advanced(self) -> dict[str, Tensor]:
        """Move the student's stream behind the healed block; return all streams."""
        streams = self.streams
        with torch.no_grad():
            streams.student = _through(self.student, streams.student, streams.c_student, self.index)
        return {name: getattr(streams, name) for name in ("original", "student", "before")}

    def _energies(self, difference: Tensor) -> Tensor:
        """Return ‖s d_c - (s - 1) d_u‖² of each state (n,) for differences d of all branches (rows, P, D)."""
        parts = zip(self.states.coefficients, difference.chunk(self.states.branches), strict=True)
        guided = torch.stack([scale * part for scale, part in parts]).sum(dim=0)
        return guided.square().flatten(1).sum(dim=1)


def _through(block: Block, x: Tensor, c: Tensor, index: int) -> Tensor:
    """Return tokens x (rows, P, D) behind a block, some images at a time."""
    return torch.cat([block(x[rows], c[rows], index, None) for rows in image_slices(len(x))])
