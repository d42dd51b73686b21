"""Guidance by a weaker model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ditmoe_cli.api.calling import AnyCheckpoint
from ditmoe_cli.api.opening import opened
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval
from ditmoe_cli.diffusion.weak_guidance import Guide, check_guide, check_guide_settings
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig, Given
from ditmoe_cli.model.effort import Estimate, WeakModel, sampling_estimate


@dataclass(frozen=True)
class Guiding:
    """The guide that was asked for, and the checkpoint that it names; None without any."""

    guide: Guide | None = None
    weak: Checkpoint | None = None

    @property
    def used(self) -> Guide | None:
        """The guide, None at a scale of 0, which guides nowhere and gives the images that are not guided."""
        return self.guide if self.guide is not None and self.guide.scale != 0.0 else None

    def of(self, schedule: ComputeSchedule | None) -> Guiding:
        """Return the guide that a schedule is for, where none was given and its model is at hand."""
        guide = schedule.sampling.guide if schedule is not None else None
        if self.guide is not None or guide is None:
            return self
        at_hand = guide.rank is not None or (self.weak is not None and self.weak.fingerprint == guide.model)
        return replace(self, guide=guide) if at_hand else self

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise where a checkpoint cannot be guided so, as `check_guide` does."""
        check_guide(self.guide, checkpoint, self.weak)

    def is_in_weights(self, checkpoint: Checkpoint) -> bool:
        """Return whether a distilled checkpoint has this guidance in its weights."""
        guide, has = self.guide, checkpoint.distilled
        if guide is None or has is None:
            return False
        return (guide.model, guide.scale, guide.interval) == (has.guide, has.guide_scale, has.guide_interval)

    def over(
        self, spec_of: Callable[[Checkpoint], SampleSpec], beside_copies: bool = False
    ) -> Callable[[Checkpoint], SampleSpec]:
        """Return what gives the spec for a checkpoint, with the guide, once that is checked.

        With `beside_copies`, where originals are scored beside distilled copies, a copy that has the guide in its
        weights is sampled as it is.
        """

        def guided(checkpoint: Checkpoint) -> SampleSpec:
            if beside_copies and self.is_in_weights(checkpoint):
                return spec_of(checkpoint)
            self.check(checkpoint)
            spec = spec_of(checkpoint)
            return replace(spec, guide=self.used) if self.used is not None else spec

        return guided

    def model_for(self, config: DiTMoEConfig, evaluations: int) -> WeakModel | None:
        """Return what the weaker model takes beside one of `config`; None where it is not evaluated."""
        if not evaluations:
            return None
        if self.weak is None or (self.guide is not None and self.guide.rank is not None):
            return WeakModel(replace(config, top_k=1), evaluations, shared=True)
        return WeakModel(self.weak.config, evaluations)


def sampling_work(checkpoint: Checkpoint, spec: SampleSpec, batch: int, guiding: Guiding) -> Estimate:
    """Return what sampling a checkpoint takes, the weaker model included."""
    weak = guiding.model_for(checkpoint.config, spec.weak_nfe)
    return sampling_estimate(checkpoint.config, spec.images, spec.nfe - spec.weak_nfe, batch, weak)


@dataclass(frozen=True)
class StepGuiding:
    """Guidance by a weaker model, at every step."""

    guide_with: AnyCheckpoint | None = None
    guide_by: str | None = None
    guide_scale: float | None = None
    guide_interval: Interval = ALWAYS

    def opened(self, given: Given) -> Guiding:
        """Return the guide, its checkpoint opened with the overrides `given`, as those beside the command's own are.

        Raises `UsageError` for settings that lack others, contradict each other or are out of range.
        """
        if self.guide_with is not None and self.guide_by is not None:
            raise UsageError(f"⟨guide_by⟩ {self.guide_by}: ⟨guide_with⟩ names another weaker model; give one of both")
        weaker = self.guide_with.path if isinstance(self.guide_with, Checkpoint) else self.guide_with
        named = "⟨guide_by⟩" if self.guide_by is not None else "⟨guide_with⟩" if weaker is not None else None
        if named is None:
            idle = "⟨guide_scale⟩" if self.guide_scale is not None else None
            idle = idle or ("⟨guide_interval⟩" if self.guide_interval != ALWAYS else None)
            if idle is not None:
                raise UsageError(f"{idle}: nothing guides; give a weaker copy with ⟨guide_with⟩, or ⟨guide_by⟩ top1")
            return Guiding()
        if self.guide_scale is None:
            raise UsageError(f"{named} {self.guide_by or weaker}: give its scale, as ⟨guide_scale⟩ 0.5")
        guide = Guide(self.guide_by or "", self.guide_scale, self.guide_interval)
        check_guide_settings(guide)
        if self.guide_with is None:
            return Guiding(guide)
        weak = opened(self.guide_with, given)
        return Guiding(replace(guide, model=weak.fingerprint), weak)
