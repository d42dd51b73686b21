"""Options of guidance by a weaker model, and the guide that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api.argument_checks import one_of
from ditmoe_cli.cli.options import complete_checkpoint
from ditmoe_cli.cli.sampling_options import parse_interval
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval
from ditmoe_cli.diffusion.weak_guidance import RANKS, Guide, check_guide, check_guide_settings
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

    def beside(self, stage: Stage) -> Guiding:
        """Return the same with the weaker checkpoint that a pipe names, where none was given."""
        if self.weak is not None or stage.weak is None:
            return self
        return replace(self, weak=open_stage(stage, stage.weak))

    def marked(self, stage: Stage) -> Stage:
        """Return a stage that names the weaker checkpoint for the commands after this one."""
        return replace(stage, weak=str(self.weak.path.absolute())) if self.weak is not None else stage


def sampling_work(checkpoint: Checkpoint, spec: SampleSpec, batch: int, guiding: Guiding) -> Estimate:
    """Return what sampling a checkpoint takes, the weaker model included."""
    weak = guiding.model_for(checkpoint.config, spec.weak_nfe)
    return sampling_estimate(checkpoint.config, spec.images, spec.nfe - spec.weak_nfe, batch, weak)


@dataclass(frozen=True)
class StepGuiding:
    """Guidance by a weaker model, at every step."""

    panel: ClassVar[str] = "Guidance by a weaker model"

    guide_with: Annotated[
        str | None,
        typer.Option(
            "--guide-with",
            metavar="CHECKPOINT",
            autocompletion=complete_checkpoint,
            help="A weaker copy of the model, to guide away from: v + W (v_c - v_weak).",
        ),
    ] = None
    guide_by: Annotated[
        str | None,
        typer.Option(
            "--guide-by",
            metavar="top1|rank2",
            callback=one_of(*RANKS),
            help="Guide away from the model itself with one expert of each token alone, the first or the second by "
            "routing weight.",
        ),
    ] = None
    guide_scale: Annotated[
        float | None,
        typer.Option("--guide-scale", metavar="W", help="Scale of that guidance; 0 is none, 0.25 to 0.5 served best."),
    ] = None
    guide_interval: Interval = ALWAYS

    def opened(self, given: Given) -> Guiding:
        """Return the guide, its checkpoint opened with the overrides `given`, as those beside the command's own are.

        Raises `UsageError` for settings that lack others, contradict each other or are out of range.
        """
        if self.guide_with is not None and self.guide_by is not None:
            raise UsageError(f"--guide-by {self.guide_by}: --guide-with names another weaker model; give one of both")
        named = "--guide-by" if self.guide_by is not None else "--guide-with" if self.guide_with is not None else None
        if named is None:
            idle = "--guide-scale" if self.guide_scale is not None else None
            idle = idle or ("--guide-interval" if self.guide_interval != ALWAYS else None)
            if idle is not None:
                raise UsageError(f"{idle}: nothing guides; give a weaker copy with --guide-with, or --guide-by top1")
            return Guiding()
        if self.guide_scale is None:
            raise UsageError(f"{named} {self.guide_by or self.guide_with}: give its scale, as --guide-scale 0.5")
        guide = Guide(self.guide_by or "", self.guide_scale, self.guide_interval)
        check_guide_settings(guide)
        if self.guide_with is None:
            return Guiding(guide)
        weak = open_stage(incoming(self.guide_with, given, shared=True))
        return Guiding(replace(guide, model=weak.fingerprint), weak)


@dataclass(frozen=True)
class WeakGuiding(StepGuiding):
    """Guidance by a weaker model, at noise levels of an interval."""

    guide_interval: Annotated[
        Interval,
        typer.Option(
            "--guide-interval",
            metavar="LOW,HIGH",
            parser=parse_interval,
            help="Noise levels, 0 to 1, between which the weaker model guides. [default: all]",
        ),
    ] = ALWAYS
