"""Healing carried out: images of the original, states, one or both scopes, and the weights that come of it.

What a run has done is kept in the work folder: the images that were sampled, the numbers of steps that the time allows,
each healed block, and the state of training now and then. With the same request it goes on from there, to the same
bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.computed import as_stored
from ditmoe_cli.compression.heal.block_scope import BlocksHealed, heal_blocks
from ditmoe_cli.compression.heal.healed_output import HealingRecord
from ditmoe_cli.compression.heal.healing import Healing, tensors_to_heal
from ditmoe_cli.compression.heal.healing_memory import (
    HELD_STATES,
    block_states,
    checks_of,
    images_for,
    model_scope_bytes,
)
from ditmoe_cli.compression.heal.model_scope import heal_model
from ditmoe_cli.compression.replay.guided import in_branches
from ditmoe_cli.compression.replay.states import States, image_count
from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.compression.training.low_rank_updates import Updates, low_rank_updates
from ditmoe_cli.compression.training.prediction_error import JudgedErrors, judged_errors
from ditmoe_cli.compression.training.teacher_states import (
    PURPOSE,
    NoisedImages,
    Noising,
    guided_prediction,
    kept_states,
    sampled_images,
)
from ditmoe_cli.compression.training.trained_weights import TrainedTensors
from ditmoe_cli.compression.training.training_loop import Course, Means, Objective, accumulate
from ditmoe_cli.compression.working_sizes import HELD_OUT
from ditmoe_cli.diffusion.schedule import evaluation_times
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.workfolder import Piece, WorkFolder
from ditmoe_cli.formats.unpacked_weights import free_on
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import BYTES, phase, readable_bytes
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile

IMAGES_SHARE = 0.1  # of the time goes to images that the original samples, at most
BLOCKS_SHARE = 0.3  # of the rest goes to healing block after block, where the whole model follows
HELD_IMAGES = 128
MEMORY_SHARE = 0.8  # of what is free may be taken
_JUDGING_SHARE = 0.1  # of the time
_BACKWARD = 3.0  # times the effort of a prediction
_TIMED = 2  # steps that are timed, of which the last counts
_SAMPLED, _FEWEST_SAMPLED = 256, 8  # images that are sampled at once, and that predictions are timed on at first
PIECE = "healed"


@dataclass(frozen=True)
class HealingWork:
    """What healing works on, and by which means.

    Attributes:
        student, original: both checkpoints.
        profile: a routing profile of the original: its images are noised, and its settings are sampled by.
        device: of both models.
        dtype: what attention and experts compute in.
        folder: keeps what is done; in the first of several processes, whose others follow it.
        note: takes lines for people.
        exchange: the processes that heal together.
    """

    student: Checkpoint
    original: Checkpoint
    profile: RoutingProfile
    device: str
    dtype: torch.dtype
    folder: WorkFolder
    note: Callable[[str], None]
    exchange: Exchange = ALONE


def heal(work: HealingWork, asked: Healing) -> HealingRecord:
    """Heal a student, and keep the trained weights, as they are written, as the piece `PIECE` of the work folder.

    Raises `BadInputError` for a profile without states, predictions that are not finite, and no weights to train;
    `InfeasibleError` where the memory does not suffice for the scope that is asked for.
    """
    document = work.exchange.share.from_first(lambda: _document(work.folder, PIECE))
    return _Session(work, asked).healed() if document is None else HealingRecord(**document)


def _document(folder: WorkFolder, name: str) -> Mapping[str, Any] | None:
    """Return the document of a piece of a work folder; None where it is not kept."""
    piece = folder.read(name)
    return None if piece is None else piece.document


def require_finite(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` that names the first tensor of a checkpoint with NaN or infinite values."""
    size = sum(info.nbytes for info in checkpoint.header.tensors.values())
    with phase(f"reading {checkpoint.name}", size, BYTES) as progress:
        for name, info in checkpoint.header.tensors.items():
            checkpoint.shared_tensor(name)
            progress(info.nbytes)


@dataclass
class _Session:
    """A session of healing: what its parts share."""

    work: HealingWork
    asked: Healing

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.device = torch.device(self.work.device)
        self.spec = profiled_spec(self.work.profile.calibration, self.work.original)
        self.tensors = TrainedTensors(self.work.student, tensors_to_heal(self.work.student, self.asked))
        self.course = Course(1, self.asked.batch, self.asked.rate or Course.rate, self.asked.seed)

    def healed(self) -> HealingRecord:
        """Heal by all scopes, and keep the result."""
        work = self.work
        scopes = work.exchange.share.from_first(self._scopes)
        teacher = build_model(work.original, self.device, work.dtype) if "model" in scopes else None
        data = self._images(teacher)
        values, blocks, block_steps = dict[str, Tensor](), None, 0
        if "block" in scopes:
            blocks, values, block_steps = self._heal_blocks(data, last=teacher is None)
        if teacher is not None:
            return self._heal_model(teacher, data, values, block_steps)
        assert blocks is not None
        if not blocks.after.error < blocks.before.error:
            work.note("no block-healed weights were better on held-out states: the output has those of the input")
            blocks, values = replace(blocks, after=blocks.before), {}
        return self._kept(values, _record(len(data.images), block_steps, 0, blocks.before, blocks.after))

    def _scopes(self) -> tuple[str, ...]:
        """Return the scopes to heal by, of which there is memory for each. Raises `InfeasibleError`."""
        asked, free = self.asked.scope, free_on(self.device)
        needed = self._needed(1)
        fits = not free or needed <= MEMORY_SHARE * free
        if asked == "model" and not fits:
            raise InfeasibleError(
                f"healing {self.work.student.name} end to end takes {readable_bytes(needed)}, and "
                f"{readable_bytes(free)} are free; give ⟨scope⟩ block, or ⟨train⟩ fewer weights"
            )
        if asked == "auto" and not fits:
            self.work.note(
                f"healing block after block alone: end to end takes {readable_bytes(needed)}, and "
                f"{readable_bytes(free)} are free"
            )
        found = {"auto": ("block", "model") if fits else ("block",), "block": ("block",), "model": ("model",)}
        return found[asked]

    def _needed(self, states: int) -> float:
        """Return the memory of a process that heals end to end, some states at once."""
        configs, world = (self.work.student.config, self.work.original.config), self.work.exchange.share.world
        return model_scope_bytes(*configs, self.tensors.size, states, self.spec.cfg, world)

    def _at_once(self) -> int:
        """Return how many states of a process's share of a batch there is memory for at once; 0 for all."""
        free, batch = MEMORY_SHARE * free_on(self.device), -(-self.asked.batch // self.work.exchange.share.world)
        least, one = self._needed(0), self._needed(1)
        fitting = int((free - least) // max(one - least, 1)) if free else batch
        return 0 if fitting >= batch else max(1, fitting)

    def _images(self, teacher: DiTMoE | None) -> _Images:
        """Return the profile's images, and more that the original samples, where it is in memory whole."""
        profile, spec = self.work.profile, self.spec
        count = image_count(profile)
        images, labels = profile.tensor("image.final").float(), torch.tensor(spec.labels(range(count)))
        if teacher is not None and profile.calibration.get("data") is None:
            sampled = self._made("images", lambda: ({"images": self._sampled(teacher)}, {})).tensor("images")
            images = torch.cat((images, sampled))
            labels = torch.cat((labels, torch.tensor(spec.labels(range(len(sampled))), dtype=labels.dtype)))
        return _Images(images, labels)

    def _sampled(self, teacher: DiTMoE) -> Tensor:
        """Return as many images of the original as the steps are worth, or the time allows; maybe none."""
        batch = max(1, min(_SAMPLED, self._at_once() or _SAMPLED))
        minutes = self.asked.minutes
        count = images_for(self.asked.steps, self.asked.batch)
        if minutes is not None:
            seconds = IMAGES_SHARE * 60 * minutes - self._elapsed()
            count = min(count, self._images_within(teacher, seconds, batch))
        config = teacher.config
        sampled = torch.zeros(0, config.in_channels, config.input_size, config.input_size)
        if count:
            sampled = sampled_images(teacher, replace(self.spec, images=count), batch, "healing images")
        return sampled

    def _made(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Piece:
        """Return a piece of the work folder, which the first process makes where it is not kept yet."""
        return self.work.exchange.share.after_first(lambda: self.work.folder.made(name, make))

    def _images_within(self, teacher: DiTMoE, seconds: float, batch: int) -> int:
        """Return how many images can be sampled within some seconds, at most `batch` at once, by timing predictions.

        They are timed on twice as many images each time, until they take a hundredth of the seconds.
        """
        config, size = teacher.config, min(_FEWEST_SAMPLED, batch)
        while True:
            z = torch.zeros(size, config.in_channels, config.input_size, config.input_size, device=self.device)
            t, labels = torch.ones(size, device=self.device), torch.zeros(size, dtype=torch.long, device=self.device)
            start = time.monotonic()
            with torch.inference_mode():
                float(guided_prediction(teacher, z, t, labels, self.spec.cfg).sum())  # waits for the device
            taken = time.monotonic() - start
            if 2 * taken > 0.01 * seconds or size == batch:
                break
            size = min(2 * size, batch)
        return max(0, int(seconds * size / taken) // len(evaluation_times(self.spec.solver, self.spec.steps)))

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _noising(self, data: _Images, purpose: str = PURPOSE) -> Noising:
        config = self.work.original.config
        null = config.num_classes if config.null_class and self.spec.cfg == 1.0 else None
        return Noising(data.images, data.labels, config.sampler, self.asked.seed, null, purpose)

    def _course(
        self, name: str, share: float, judged: int, weights: Mapping[str, Tensor], objective: Objective
    ) -> Course:
        """Return the course of a scope: as many steps as asked for, or as a share of the time that is left allows.

        `judged` states are judged at each check. What the first process chooses is kept, for a run that goes on.
        """
        folder, piece = self.work.folder, f"{name}-course"
        chosen = self.course
        if self.work.exchange.share.from_first(lambda: _document(folder, piece)) is None:
            course = replace(self.course, part=self._at_once() if name == "model" else 0)
            if self.asked.steps is not None:
                chosen = replace(course, steps=self.asked.steps, checks=checks_of(self.asked.steps))
            else:
                chosen = self._affordable(course, share, judged, weights, objective)
        fields = ("steps", "checks", "part")
        document = self._made(piece, lambda: ({}, {field: getattr(chosen, field) for field in fields})).document
        return replace(self.course, **{field: int(document[field]) for field in fields})

    def _affordable(
        self, course: Course, share: float, judged: int, weights: Mapping[str, Tensor], objective: Objective
    ) -> Course:
        """Return the course of as many steps as a share of the time that is left allows, by timing some steps."""
        assert self.asked.minutes is not None
        part, exchange = course.part, self.work.exchange
        rows = course.rows(0, objective.states)[: part * exchange.share.world or None]
        for _ in range(_TIMED):
            exchange.share.wait()
            start = time.monotonic()
            loss, part = accumulate(weights, objective.losses, rows, part, self._means())
            float(loss)  # waits for the device
            seconds = (time.monotonic() - start) * course.batch / len(rows)
        left = share * max(60 * self.asked.minutes - self._elapsed(), 0.0)
        check = judged / course.batch / _BACKWARD  # in steps
        steps = left / seconds
        checks = min(max(int(_JUDGING_SHARE * steps / check), 2), checks_of(int(steps)))
        return replace(course, steps=max(1, int(steps - check * (checks + 1))), checks=checks, part=part)

    def _heal_blocks(self, data: _Images, last: bool) -> tuple[BlocksHealed, dict[str, Tensor], int]:
        """Heal block after block; return errors, all healed weights, and the steps of a block."""
        work, config = self.work, self.work.original.config
        rows = torch.arange(block_states(config))
        z, t, labels = self._noising(data, "healing blocks").at(rows)
        held = data.is_held[rows % len(data.images)]
        models = (
            OffloadedDiTMoE(checkpoint, self.device, dtype=work.dtype) for checkpoint in (work.student, work.original)
        )
        student, original = models
        states = in_branches(States(z, t, labels, rows % len(data.images), held, self.spec.cfg), original)
        kept = work.exchange.share.after_first(lambda: work.folder.loop("healed-block", config.depth))
        share = (1.0 if last else BLOCKS_SHARE) / config.depth

        def course(weights: Mapping[str, Tensor], objective: Objective) -> Course:
            return self._course("block", share, int(held.sum()), weights, objective)

        blocks = heal_blocks(student, original, states, held, self._updates, course, kept, self._means())
        values = {
            name: kept.result(index).tensor(name) for index in range(kept.total) for name in kept.result(index).names
        }
        chosen = work.exchange.share.from_first(lambda: _document(work.folder, "block-course"))
        return blocks, values, int(chosen["steps"]) if chosen is not None else 0

    def _heal_model(
        self, teacher: DiTMoE, data: _Images, values: Mapping[str, Tensor], block_steps: int
    ) -> HealingRecord:
        """Heal end to end, from block-healed `values` where there are any that are better; keep the result."""
        work = self.work
        student = build_model(work.student, self.device)
        student.compute_in(work.dtype)
        batch = self._at_once() or self.asked.batch
        held = kept_states(
            NoisedImages(teacher, self._noising(data.held, "judging"), self.spec.cfg), HELD_STATES, batch
        )
        source = NoisedImages(teacher, self._noising(data.training), self.spec.cfg)
        weights = self.tensors.in_model(student)
        before = start = judged_errors(student, held, batch, work.exchange)
        if values:
            own = {name: weights[name].detach().clone() for name in values}
            _put(weights, values)
            of_blocks = judged_errors(student, held, batch, work.exchange)
            if of_blocks.error < before.error:
                start = of_blocks
            else:
                work.note("block-healed weights are not better on held-out states: training goes on with the input's")
                _put(weights, own)

        def course(weights: Mapping[str, Tensor], objective: Objective) -> Course:
            return self._course("model", 1.0, len(held), weights, objective)

        updates = self._updating(student, "", weights)
        result = heal_model(student, updates, source, held, start, course, batch, self._means(work.folder))
        after, trained = result.after, updates.written()
        if not after.error < before.error:
            work.note("no trained weights were better on held-out states: the output has those of the input")
            after, trained = before, {}
        return self._kept(trained, _record(len(data.images), block_steps, result.steps, before, after))

    def _updates(self, model: nn.Module, prefix: str) -> Updates:
        return self._updating(model, prefix, self.tensors.in_model(model, prefix))

    def _updating(self, model: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> Updates:
        """Return weights that are trained, or the updates that train them."""
        return low_rank_updates(model, prefix, weights, self.tensors.ranks, self.tensors.rounded, self.asked.seed)

    def _means(self, folder: WorkFolder | None = None) -> Means:
        return Means(folder, self.work.note, self.work.exchange, str(self.work.student.path))

    def _kept(self, values: Mapping[str, Tensor], record: HealingRecord) -> HealingRecord:
        """Keep all tensors that could be trained, as they are written; those not in `values` are the input's."""
        student = self.work.student
        written = {}
        for name in self.tensors.tensors:
            stored = self.tensors.stored(name, values[name]) if name in values else student.finite_tensor(name)
            written[name] = as_stored(student, name, stored, stored.dtype)
        self.work.folder.write(PIECE, written, asdict(record))
        return record


def _record(
    images: int, block_steps: int, model_steps: int, before: JudgedErrors, after: JudgedErrors
) -> HealingRecord:
    errors = (before.error, after.error)
    return HealingRecord(images, block_steps, model_steps, errors, before.by_bin, after.by_bin)


@dataclass(frozen=True)
class _Images:
    """Images to noise (I, C, S, S) and their labels (I,); every eighth is held out."""

    images: Tensor
    labels: Tensor

    @property
    def is_held(self) -> Tensor:
        """(I,) whether an image is held out."""
        numbers = torch.arange(len(self.images))
        return numbers % HELD_OUT == min(HELD_OUT, len(self.images)) - 1

    @property
    def held(self) -> _Images:
        """The images that are held out, as many as judge."""
        chosen = self.is_held.nonzero().flatten()[:HELD_IMAGES]
        return _Images(self.images[chosen], self.labels[chosen])

    @property
    def training(self) -> _Images:
        """The others."""
        return _Images(self.images[~self.is_held], self.labels[~self.is_held])


def _put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)
