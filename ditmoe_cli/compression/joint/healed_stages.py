"""A plan that trains weights, carried out: experts changed and refitted, healed, rounded, and healed once more.

Each stage's result is a checkpoint in the work folder, from which an unfinished run goes on:

1. experts are dropped, merged or narrowed, and refitted;
2. all weights are trained to predict as the original does, block after block and, where memory suffices, end to end;
3. weights are rounded by GPTQ, on states of the original's path;
4. what is not codes is trained once more: scales, router, norms and biases make up for the rounding.

Without formats, 2 takes all the time. What is written is laid out by the whole plan, as one step of the history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ditmoe_cli.compression.block_layout import block_layouts, new_names
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.heal.healed_output import healed_output
from ditmoe_cli.compression.heal.healed_weights import PIECE, HealingWork, heal
from ditmoe_cli.compression.heal.healing import Healing, tensors_to_heal
from ditmoe_cli.compression.one_pass import write_planned
from ditmoe_cli.compression.plan import CompressionPlan, Experts, Formats, Retraining
from ditmoe_cli.compression.recorded import Measured
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import split_name
from ditmoe_cli.files.workfolder import WorkFolder, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

BEFORE_ROUNDING = 0.6  # of the time


Apply = Callable[[Checkpoint, CompressionPlan, Output, RoutingProfile, str], object]
"""Writes the result of a plan (`apply.apply`)."""


@dataclass(frozen=True)
class Means:
    """How a plan is carried out: the original's profile, the device, the work folder, what applies plans."""

    profile: RoutingProfile
    device: str
    work: WorkFolder
    apply: Apply


@dataclass(frozen=True)
class HealedStages:
    """The checkpoint whose tensors the output takes, and what was measured."""

    healed: Checkpoint
    measured: Measured


def carry_out_healed(checkpoint: Checkpoint, plan: CompressionPlan, means: Means) -> HealedStages:
    """Carry out all stages of a plan that trains weights, one after the other.

    Raises `BadInputError` as `apply.carry_out` does.
    """
    stage = plan.retraining
    assert stage is not None
    run = _Run(checkpoint, plan, means)
    experts = next((each for each in plan.stages if isinstance(each, Experts) and each.blocks), None)
    formats = next((each for each in plan.stages if isinstance(each, Formats) and each.formats), None)
    start = checkpoint
    if experts is not None:
        start = run.applied("structure", checkpoint, replace(plan, stages=(experts,)), means.profile)
    healed, errors = run.healed("healed", start, stage, 1.0 if formats is None else BEFORE_ROUNDING)
    if formats is not None:
        renamed = replace(formats, formats=_new_formats(checkpoint, experts, formats))
        rounding = replace(plan, source=healed.fingerprint, profile=None, stages=(renamed,))
        own = replace(means.profile, checkpoint=healed.fingerprint)  # states of the original's path suit it too
        rounded = run.applied("rounded", healed, rounding, own)
        healed, last = run.healed("final", rounded, stage, 1 - BEFORE_ROUNDING)
        errors = (errors[0], last[1])
    return HealedStages(healed, Measured(held_error=errors))


@dataclass(frozen=True)
class _Run:
    """A plan at work: each stage's result is made where it is not there."""

    checkpoint: Checkpoint
    plan: CompressionPlan
    means: Means

    def applied(self, name: str, checkpoint: Checkpoint, plan: CompressionPlan, profile: RoutingProfile) -> Checkpoint:
        """Return the result of some stages."""
        path = self._path(name)
        if not path.exists():
            self.means.apply(checkpoint, plan, Output(path), profile, self.means.device)
        return open_checkpoint(path)

    def healed(
        self, name: str, student: Checkpoint, stage: Retraining, share: float
    ) -> tuple[Checkpoint, tuple[float, float]]:
        """Return a student healed for a share of the time, and its held-out errors before and after."""
        path, folder = self._path(name), self.means.work
        if not path.exists():
            self._heal(name, student, stage, share)
        kept = folder.read(f"{name}-errors")
        if kept is None:
            raise BadInputError(f"{folder.folder}: what healing has measured is gone; run it again")
        before, after = kept.document["held_error"]
        return open_checkpoint(path), (float(before), float(after))

    def _heal(self, name: str, student: Checkpoint, stage: Retraining, share: float) -> None:
        """Heal a student for a share of the time; keep its held-out errors, then its file."""
        means, note, path = self.means, self.means.work.notify, self._path(name)
        dtype = Calibrated(self.checkpoint, means.profile, means.device).dtype
        minutes = None if stage.minutes is None else share * stage.minutes
        steps = None if stage.steps is None else max(1, round(share * stage.steps))
        asked = Healing(self.checkpoint.fingerprint, minutes, steps, seed=stage.seed)
        key = work_key({"plan": self.plan.digest, "student": student.fingerprint, "device": means.device})
        with open_work(path, key, note) as folder:
            work = HealingWork(student, self.checkpoint, means.profile, means.device, dtype, folder, note)
            done = heal(work, asked)
            piece = folder.read(PIECE)
            assert piece is not None
            means.work.write(f"{name}-errors", {}, {"held_error": list(done.held_error)})
            tensors = tensors_to_heal(student, asked)
            planned = healed_output(student, tensors, "", asked.options(), means.profile.calibration, done)
            write_planned(student, planned, Output(path), piece.raw)

    def _path(self, name: str) -> Path:
        folder = self.means.work.folder / "stages"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.safetensors"


def _new_formats(checkpoint: Checkpoint, experts: Experts | None, formats: Formats) -> Mapping[str, str]:
    """Return formats by the names that weights have behind a change of experts; those of dropped ones are left out."""
    if experts is None:
        return formats.formats
    layouts = block_layouts(checkpoint, experts)
    renamed = {old: new for index, layout in enumerate(layouts) for old, new in new_names(index, layout).items()}
    return {
        renamed.get(name, name): fmt
        for name, fmt in formats.formats.items()
        if split_name(name).expert is None or name in renamed
    }
