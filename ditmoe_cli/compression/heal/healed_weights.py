"""Healing carried out: images of the original, states, one or both scopes, and the weights that come of it.

What a run has done is kept in the work folder: the images that were sampled, the numbers of steps that the time allows,
each healed block, and the state of training now and then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ditmoe_cli.compression.heal.block_scope import BlocksHealed, heal_blocks
from ditmoe_cli.compression.heal.healed_output import HealingRecord
from ditmoe_cli.compression.heal.healing import Healing, tensors_to_heal
from ditmoe_cli.compression.heal.healing_memory import HELD_STATES, block_states, images_for, model_scope_bytes
from ditmoe_cli.compression.heal.model_scope import heal_model
from ditmoe_cli.compression.replay.guided import in_branches
from ditmoe_cli.compression.replay.states import States, image_count
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.prediction_error import JudgedErrors, judged_errors
from ditmoe_cli.compression.training.teacher_states import (
    PURPOSE,
    NoisedImages,
    Noising,
    kept_states,
    sampled_images,
)
from ditmoe_cli.compression.training.trained_weights import TrainedTensors
from ditmoe_cli.compression.training.training_loop import Course, Objective
from ditmoe_cli.compression.training.training_session import MEMORY_SHARE, PIECE, Session, TrainingWork, naming
from ditmoe_cli.compression.working_sizes import HELD_OUT
from ditmoe_cli.diffusion.few_steps import own_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import evaluation_times
from ditmoe_cli.errors import InfeasibleError, UsageError
from ditmoe_cli.formats.unpacked_weights import free_on
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import readable_bytes
from ditmoe_cli.routing.calibration_settings import has_usual_classes, profiled_spec, spread_classes
from ditmoe_cli.routing.profile import RoutingProfile

IMAGES_SHARE = 0.1  # of the time goes to images that the original samples, at most
BLOCKS_SHARE = 0.3  # of the rest goes to healing block after block, where the whole model follows
HELD_IMAGES = 128
_SAMPLED = 256  # images that are sampled at once


def heal(work: TrainingWork, profile: RoutingProfile, asked: Healing) -> HealingRecord:
    """Heal a student, and keep the trained weights, as they are written, as the piece `PIECE` of the work folder.

    The images of `profile`, of the original, are noised, and more are sampled with its settings. Raises `BadInputError`
    for a profile without states, predictions that are not finite, and no weights to train; `InfeasibleError` where the
    memory does not suffice for the scope that is asked for.
    """
    document = work.document(PIECE)
    return _Healing(work, profile, asked).healed() if document is None else HealingRecord(**document)


@dataclass
class _Healing:
    """A student being healed: what its parts share."""

    work: TrainingWork
    profile: RoutingProfile
    asked: Healing

    def __post_init__(self) -> None:
        self.device = torch.device(self.work.device)
        self.spec = profiled_spec(self.profile.calibration, self.work.original)
        self.tensors = TrainedTensors(self.work.student, tensors_to_heal(self.work.student, self.asked))
        self.clock = self.asked.clocked
        self.session = Session(self.work, self.asked, self.tensors, self._needed, self.clock)

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
        if self.clock is not None:
            return tuple(scope for scope, (steps, _, _) in self.clock.trainings.items() if steps)
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

    def _images(self, teacher: DiTMoE | None) -> _Images:
        """Return the profile's images, and more that the original samples, where it is in memory whole."""
        profile, spec = self.profile, self.spec
        count = image_count(profile)
        images, labels = profile.tensor("image.final").float(), torch.tensor(spec.labels(range(count)))
        if teacher is not None and profile.calibration.get("data") is None:
            sampled = self.work.made("images", lambda: ({"images": self._sampled(teacher)}, {})).tensor("images")
            images = torch.cat((images, sampled))
            more = torch.tensor(self._sampling.labels(range(len(sampled))), dtype=labels.dtype)
            labels = torch.cat((labels, more))
        return _Images(images, labels)

    @property
    def _sampling(self) -> SampleSpec:
        """How images are sampled: as the profile's, but of all classes, where it had no room for all."""
        spec, original = self.spec, self.work.original
        chosen = len(spec.classes) == original.config.num_classes or not has_usual_classes(spec, original)
        return spec if chosen else replace(spec, classes=spread_classes(original.config.num_classes))

    def _sampled(self, teacher: DiTMoE) -> Tensor:
        """Return as many images of the original as the steps are worth, or the time allows; maybe none."""
        size = max(1, min(_SAMPLED, self.session.at_once() or _SAMPLED))
        batch = FittingBatches(size, self.work.note, self.session.workers)
        minutes = self.asked.minutes
        count = images_for(self.asked.iterations, self.asked.batch)
        if self.clock is not None:
            count = self._clocked(count)
        elif minutes is not None:
            seconds = IMAGES_SHARE * 60 * minutes - self.session.elapsed
            count = min(count, self.session.images_within(teacher, self.spec, seconds, batch))
        config = teacher.config
        sampled = torch.zeros(0, config.in_channels, config.input_size, config.input_size)
        if count:
            with naming(self.work.original):
                sampled = sampled_images(teacher, replace(self._sampling, images=count), batch, "healing images")
        return sampled

    def _clocked(self, most: int) -> int:
        """Return how many images an earlier run sampled. Raises `UsageError` for a number that none would."""
        assert self.clock is not None
        count = self.clock.count - image_count(self.profile)
        if not 0 <= count <= most:
            raise UsageError(f"⟨clock⟩ {self.clock.count}: no number of images that heal would take")
        return count

    def _noising(self, data: _Images, purpose: str = PURPOSE) -> Noising:
        config = self.work.original.config
        few = own_sampling(self.work.original)  # then it knows no other times, and no null class
        null = config.num_classes if config.null_class and self.spec.cfg == 1.0 and few is None else None
        times = () if few is None else tuple(evaluation_times(*few))
        return Noising(data.images, data.labels, config.sampler, self.asked.seed, null, purpose, times)

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
            return self.session.course("block", share, int(held.sum()), weights, objective, self.asked.iterations, 0)

        blocks = heal_blocks(student, original, states, held, self.session.updates, course, kept, self.session.means())
        values = {
            name: kept.result(index).tensor(name) for index in range(kept.total) for name in kept.result(index).names
        }
        chosen = work.document("block-course")
        return blocks, values, int(chosen["steps"]) if chosen is not None else 0

    def _heal_model(
        self, teacher: DiTMoE, data: _Images, values: Mapping[str, Tensor], block_steps: int
    ) -> HealingRecord:
        """Heal end to end, from block-healed `values` where there are any that are better; keep the result."""
        work = self.work
        student = build_model(work.student, self.device)
        student.compute_in(work.dtype)
        batch = self.session.judging()
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
            return self.session.course(
                "model", 1.0, len(held), weights, objective, self.asked.iterations, self.session.at_once()
            )

        updates = self.session.updating(student, "", weights)
        result = heal_model(student, updates, source, held, start, course, batch, self.session.means(work.folder))
        after, trained = result.after, updates.written()
        if not after.error < before.error:
            work.note("no trained weights were better on held-out states: the output has those of the input")
            after, trained = before, {}
        return self._kept(trained, _record(len(data.images), block_steps, result.steps, before, after))

    def _kept(self, values: Mapping[str, Tensor], record: HealingRecord) -> HealingRecord:
        """Keep all tensors that could be trained, as they are written; those not in `values` are the input's."""
        record = replace(record, clock=self.session.clocked(record.images, self.asked.trainings))
        self.session.keep(values, asdict(record))
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
