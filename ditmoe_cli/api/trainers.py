"""Training from Python: what heal and distill do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from ditmoe_cli.api import distilling_requests, healing_requests
from ditmoe_cli.api.argument_checks import tuple_of
from ditmoe_cli.api.calling import AnyCheckpoint, AnyPath, Count, Device, NamedDtype, Seed, alone, public
from ditmoe_cli.api.distilling_requests import distilling_training
from ditmoe_cli.api.guiding_requests import StepGuiding
from ditmoe_cli.api.healing_requests import healing_training
from ditmoe_cli.api.opening import NOTHING_GIVEN, opened
from ditmoe_cli.api.output_names import checkpoint_path, destination
from ditmoe_cli.api.planning_requests import AnyProfile, Measuring, automatic_profile, profile_path
from ditmoe_cli.api.sampling_requests import interval_of
from ditmoe_cli.api.training_requests import parse_groups
from ditmoe_cli.api.training_runs import ForeseenTraining, TrainedCheckpoint, Training, trained_result
from ditmoe_cli.compression.distill.distilling import DEFAULT_STUDENT_STEPS
from ditmoe_cli.compression.training.training_request import DEFAULT_BATCH


@public
def heal(
    checkpoint: AnyCheckpoint,
    *,
    original: AnyCheckpoint,
    minutes: float | None = None,
    steps: int | None = None,
    clock: Sequence[int] | None = None,
    train: str | Sequence[str] = "all",
    codes: Literal["fixed", "learn"] = "fixed",
    scope: Literal["auto", "block", "model"] = "auto",
    batch: Count = DEFAULT_BATCH,
    rate: float | None = None,
    seed: Seed = 0,
    profile: AnyProfile | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    calibration_cfg: float | None = None,
    calibration_steps: int | None = None,
    calibration_images: int | None = None,
    calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None,
    output: Annotated[AnyPath, checkpoint_path] | None = None,
    force: bool = False,
    max_shard_size: int | str = "10GB",
    dry_run: bool = False,
) -> TrainedCheckpoint | ForeseenTraining:
    """Train a compressed checkpoint to predict as its original does, as ``ditmoe heal``.

    Args:
        checkpoint: the checkpoint to train.
        original: the checkpoint that it was made from.
        minutes, steps: how long to train, by time or in steps.
        clock: what the clock chose in an earlier run of as many minutes, as its recipe has it.
        train: what to train: ``"all"``, groups of weights as ``["experts", "attn"]``, or ``"lora:8"``.
        profile: the routing profile of the original.
        output, force, max_shard_size, dry_run: as for `compress`.

    All others are the options of the same names in docs/heal.md, or as for `plan_prune`.

    Raises:
        UsageError: an argument is out of range, or has no effect beside the others.
        BadInputError: the checkpoints are no pair, or the profile keeps no states.
        OutputExistsError: something else stands at the output.
    """
    alone()
    student, teacher = opened(checkpoint), opened(original)
    teaching = healing_requests.Teaching(
        teacher, minutes, _groups(train), codes, batch, rate, seed, steps, scope, clock=tuple_of(clock)
    )
    asked = teaching.request(teacher)
    to = destination(output, force, max_shard_size).at(student.path, asked.label)
    measuring = Measuring(profile_path(profile), device, dtype)
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    wanted = automatic.wanted(teacher, measuring, to.path.parent, measures=not dry_run)
    return _trained(healing_training(asked, student, teacher, to, wanted, measuring), dry_run)


@public
def distill(
    checkpoint: AnyCheckpoint,
    *,
    original: AnyCheckpoint,
    steps: Count = DEFAULT_STUDENT_STEPS,
    cfg: float = 1.0,
    minutes: float | None = None,
    iterations: int | None = None,
    clock: Sequence[int] | None = None,
    teacher_steps: Count | None = None,
    states: Literal["teacher", "own"] = "teacher",
    progressive: bool = False,
    train: str | Sequence[str] = "all",
    codes: Literal["fixed", "learn"] = "fixed",
    batch: Count = DEFAULT_BATCH,
    rate: float | None = None,
    seed: Seed = 0,
    guide_with: AnyCheckpoint | None = None,
    guide_by: Literal["top1", "rank2"] | None = None,
    guide_scale: float | None = None,
    guide_interval: Sequence[float] | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    output: Annotated[AnyPath, checkpoint_path] | None = None,
    force: bool = False,
    max_shard_size: int | str = "10GB",
    dry_run: bool = False,
) -> TrainedCheckpoint | ForeseenTraining:
    """Train a checkpoint to be sampled in few steps, with guidance in its weights, as ``ditmoe distill``.

    Args:
        checkpoint: the checkpoint to train: a compression of the original, or the original itself.
        original: the checkpoint whose paths from noise to images are learned.
        steps: steps of the result, one evaluation each.
        cfg: scale of classifier-free guidance that goes into the weights.
        minutes, iterations: how long to train, by time or in iterations.
        train, clock: as for `heal`.
        guide_with, guide_by, guide_scale, guide_interval: guidance by a weaker model that goes into the weights.
        output, force, max_shard_size, dry_run: as for `compress`.

    All others are the options of the same names in docs/distill.md. Raises what `heal` does.
    """
    alone()
    student = opened(checkpoint)
    teacher = student if original is checkpoint else opened(original)
    guiding = StepGuiding(guide_with, guide_by, guide_scale, interval_of(guide_interval)).opened(NOTHING_GIVEN)
    teaching = distilling_requests.Teaching(
        teacher,
        minutes,
        _groups(train),
        codes,
        batch,
        rate,
        seed,
        steps=steps,
        cfg=cfg,
        iterations=iterations,
        teacher_steps=teacher_steps,
        states=states,
        progressive=progressive,
        clock=tuple_of(clock),
    )
    asked = teaching.request(teacher, guiding.used)
    to = destination(output, force, max_shard_size).at(student.path, asked.label)
    training = distilling_training(asked, student, teacher, to, guiding.weak)
    return _trained(replace(training, device=device, dtype=dtype), dry_run)


def _trained(training: Training, dry_run: bool) -> TrainedCheckpoint | ForeseenTraining:
    """Return what a training gives in the one process that there is."""
    found = trained_result(training, dry_run=dry_run)
    assert found is not None
    return found


def _groups(train: str | Sequence[str]) -> tuple[str, ...]:
    """Return the groups of weights to train."""
    return parse_groups(train if isinstance(train, str) else ",".join(train))
