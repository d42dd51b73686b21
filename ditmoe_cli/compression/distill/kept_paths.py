"""Paths of the original that the work folder keeps: sampled once, some at a time, so that an unfinished run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.distill.distilling_memory import SAMPLED, held_paths, most_paths, paths_for
from ditmoe_cli.compression.distill.teacher_paths import Paths, sampled_paths
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.training_session import Session, TrainingWork, is_packed, naming
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.calibration_settings import spread_classes

PATHS_SHARE = 0.4  # of the time goes to the original's paths, at most
_FEWEST = 2  # of which one judges


@dataclass
class KeptPaths:
    """Paths that are sampled where they are not kept yet; the original is in memory for that alone.

    Attributes:
        work: what is worked on.
        asked: the request.
        session: knows how much time is left.
        weak: the checkpoint that guides the original, if one does.
    """

    work: TrainingWork
    asked: Distilling
    session: Session
    weak: Checkpoint | None = None
    _batch: FittingBatches = field(init=False)

    def __post_init__(self) -> None:
        packed = self.weak is not None and is_packed(self.weak)
        self._batch = FittingBatches(SAMPLED, self.work.note, 1 if packed else self.session.workers)
        self.config = self.work.original.config
        self.kept = self.asked.stages(self.config.sampler)[0]

    def paths(self) -> Paths:
        """Return as many as the iterations are worth, or the time allows."""
        count = int(self.work.made("paths", lambda: ({}, {"paths": self._count()})).document["paths"])
        pieces = {f"paths-{start}": range(start, min(start + SAMPLED, count)) for start in range(0, count, SAMPLED)}
        before = {name for name in pieces if self.work.folder.has(name)}
        side, done = self.config.input_size, sum(len(pieces[name]) for name in before)
        z = torch.empty(count, self.kept + 1, self.config.in_channels, side, side)
        with phase("sampling the original's paths", count, "paths", start=done) as progress:
            for name, rows in pieces.items():
                z[rows.start : rows.stop] = self.work.made(name, partial(self._sampled, count, rows)).tensor("z")
                progress(0 if name in before else len(rows))
        return Paths(z, torch.tensor(self._spec(count).labels(range(count))))

    def _sampled(self, count: int, rows: range) -> tuple[Mapping[str, Tensor], Mapping[str, int]]:
        teacher, weak = self._models
        with naming(self.work.original):
            return {"z": sampled_paths(teacher, self._spec(count), self.kept, self._batch, weak, rows).z}, {}

    def _spec(self, count: int) -> SampleSpec:
        """Return how so many paths are sampled: of classes spread evenly, where those that judge are not of all."""
        spec, classes = self.asked.teacher_spec(self.config, count), self.config.num_classes
        return spec if held_paths(count) >= classes else replace(spec, classes=spread_classes(classes))

    @cached_property
    def _models(self) -> tuple[DiTMoE, Denoiser | None]:
        """The original, and the weaker model that guides it, if one does."""
        teacher = build_model(self.work.original, self.session.device, self.work.dtype)
        return teacher, weak_model(teacher, self.asked.guide, self._loaded_weak)

    def _loaded_weak(self) -> DiTMoE:
        assert self.weak is not None
        return build_model(self.weak, self.session.device, self.work.dtype)

    def _count(self) -> int:
        if self.asked.minutes is None:
            return paths_for(self.config, self.asked)
        if self.session.clock is not None:
            return self._clocked(self.session.clock.count)
        spec, (teacher, _) = self.asked.teacher_spec(self.config, 1), self._models
        part = (spec.nfe - spec.weak_nfe) / spec.nfe  # a weaker model takes the rest
        affordable = self.session.images_within(teacher, spec, PATHS_SHARE * self.session.left * part, self._batch)
        return min(max(affordable, _FEWEST), most_paths(self.config, self.kept))

    def _clocked(self, count: int) -> int:
        """Return how many paths an earlier run sampled. Raises `UsageError` for a number that none would."""
        if not _FEWEST <= count <= most_paths(self.config, self.kept):
            raise UsageError(f"⟨clock⟩ {count}: no number of paths that distill would take")
        return count
