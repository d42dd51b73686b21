"""Plans, and checkpoints that are made by them, from Python: what prune, merge, quantize, compress and apply do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from ditmoe_cli.api.argument_checks import at_least, ending, known, one_of, refuse_idle, tuple_of
from ditmoe_cli.api.calling import AnyCheckpoint, AnyPath, Count, Device, NamedDtype, Seed, alone, public
from ditmoe_cli.api.compressing_requests import Goals, Loading, Retrained, Tying, compressing_of, curving_of
from ditmoe_cli.api.curve_runs import CurveFiles, MeasuredCurve, measured_curve
from ditmoe_cli.api.merging_requests import DeltaOptions, Grouping, delta_ratio_in_range, differencing_of, merging_of
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.opening import opened
from ditmoe_cli.api.output_names import Destination, checkpoint_path, destination, size_of
from ditmoe_cli.api.plan_application import Application, applied_result, output_label
from ditmoe_cli.api.planner_runs import PlannerRun, chosen_alone, foreseen_alone, foreseen_result, planned_result
from ditmoe_cli.api.planning_requests import (
    AnyProfile,
    AutomaticProfile,
    Measuring,
    Refitting,
    automatic_profile,
    fitted_tokens,
    profile_path,
)
from ditmoe_cli.api.pruning_requests import Dropping, Narrowing, Replacing, pruning_of
from ditmoe_cli.api.quantizing_requests import (
    Grids,
    Mixing,
    Precision,
    RoundingOptions,
    floor_texts,
    quantizing_of,
    width_texts,
)
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MERGES, METHODS, MIXES
from ditmoe_cli.compression.plan import CompressionPlan, read_plan
from ditmoe_cli.compression.planner import Planner
from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED, DEFAULT_GROUP_SIZE
from ditmoe_cli.compression.training.training_request import DEFAULT_MINUTES
from ditmoe_cli.exporting.targets import TARGETS
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint

AnySize = int | str
Width = int | float | str


@public
def plan_prune(
    checkpoint: AnyCheckpoint,
    *,
    keep: float | int | str | None = None,
    method: Annotated[str, known(*METHODS["prune"])] = "reap",
    seed: Seed = 0,
    router: Literal["auto", "slice", "ghost", "mass"] = "ghost",
    allocate: Literal["uniform", "global"] = "uniform",
    neurons: float = 1.0,
    multiple: int = 64,
    narrow_shared: bool = False,
    refit: bool = True,
    refit_tokens: Annotated[int, fitted_tokens] = 0,
    scale: bool = False,
    constants: bool = False,
    residual_rank: Annotated[int, at_least(0)] = 0,
    profile: AnyProfile | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    calibration_cfg: float | None = None,
    calibration_steps: int | None = None,
    calibration_images: int | None = None,
    calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None,
    dry_run: bool = False,
) -> CompressionPlan | ForeseenCheckpoint:
    """Choose which experts and neurons of each block stay, as ``ditmoe prune``; `apply` carries the plan out.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        keep: experts to keep in each block: a ratio as ``0.5`` or ``1.0``, a count as ``4``, or ``"auto"``.
        neurons: share of the kept experts' neurons to keep.
        profile: the routing profile of the checkpoint. Without it, that under a usual name, else a new one, sampled as
            the arguments ``calibration_…`` say.
        device, dtype: where and in what to measure.
        dry_run: whether to return in place of the plan what carrying it out would write and take, a
            `ForeseenCheckpoint`. No profile is made for it: without one at hand its plan stays open, its size is exact.

    All others are the options of the same names in docs/prune.md.

    Raises:
        UsageError: an argument is out of range, or has no effect beside the others.
        BadInputError: the checkpoint or the profile cannot be used.
        InfeasibleError: the checkpoint cannot be pruned so.
    """
    alone()
    pruning = pruning_of(
        Dropping(None if keep is None else str(keep), method, seed, router, allocate),
        Narrowing(neurons, multiple, narrow_shared),
        Replacing(refit, refit_tokens, scale, constants, residual_rank),
    )
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    return _plan(pruning, opened(checkpoint), Measuring(profile_path(profile), device, dtype), automatic, dry_run)


@public
def plan_merge(
    checkpoint: AnyCheckpoint,
    *,
    groups: float | int | str | None = None,
    method: Annotated[str, known(*MERGES)] = DEFAULT_METHODS["merge"],
    router: Literal["map", "slice"] = "map",
    delta: Literal["svd", "ternary"] | None = None,
    delta_ratio: Annotated[float, delta_ratio_in_range] | None = None,
    refit: bool = True,
    refit_tokens: Annotated[int, fitted_tokens] = 0,
    profile: AnyProfile | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    calibration_cfg: float | None = None,
    calibration_steps: int | None = None,
    calibration_images: int | None = None,
    calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None,
    dry_run: bool = False,
) -> CompressionPlan | ForeseenCheckpoint:
    """Choose which experts of each block are merged, as ``ditmoe merge``; `apply` carries the plan out.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        groups: experts to merge each block into: a ratio as ``0.5``, or a count as ``4``.
        delta: ``"svd"`` or ``"ternary"`` stores all experts as their mean and compressed differences from it instead.
        profile, device, dtype, calibration_…, dry_run: as for `plan_prune`.

    All others are the options of the same names in docs/merge.md. Raises what `plan_prune` does.
    """
    alone()
    grouping = Grouping(None if groups is None else str(groups), method, router)
    refitting = Refitting(refit, refit_tokens)
    planner = differencing_of(DeltaOptions(delta, delta_ratio), grouping, refitting) or merging_of(grouping, refitting)
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    return _plan(planner, opened(checkpoint), Measuring(profile_path(profile), device, dtype), automatic, dry_run)


@public
def plan_quantize(
    checkpoint: AnyCheckpoint,
    *,
    bits: float | None = None,
    size: AnySize | None = None,
    method: Annotated[str, known(*MIXES)] = DEFAULT_METHODS["quantize"],
    uniform: bool = False,
    format: str | None = None,
    double_quant: bool = False,
    group_size: int = DEFAULT_GROUP_SIZE,
    symmetric: bool = False,
    allow: Sequence[Width] = DEFAULT_ALLOWED,
    floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[str] = (),
    rounding: Literal["gptq", "nearest"] | None = None,
    tokens: int = 0,
    smooth: float = 0.0,
    profile: AnyProfile | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    calibration_cfg: float | None = None,
    calibration_steps: int | None = None,
    calibration_images: int | None = None,
    calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None,
    dry_run: bool = False,
) -> CompressionPlan | ForeseenCheckpoint:
    """Choose in which format each weight is stored, as ``ditmoe quantize``; `apply` carries the plan out.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        bits: bits per weight, as ``4`` or ``3.25``: the file is as large as with so many bits everywhere.
        size: size of the whole file in place of `bits`: bytes, or a text such as ``"2.5GiB"``.
        uniform: whether all weights get one format, `format` or that of `bits`, instead of a mix.
        allow: widths that a mix may choose from, in bits, as ``(2, 3, 4, 16)``; 16 leaves a weight as it is.
        floor: fewest bits of groups of weights, as ``{"attn": 4}``.
        protect, tie: groups of weights that stay, matrices of an expert that take one format.
        profile, device, dtype, calibration_…, dry_run: as for `plan_prune`.

    All others are the options of the same names in docs/quantize.md. Raises what `plan_prune` does.
    """
    alone()
    planner = quantizing_of(
        Precision(bits, size_of("size", size), method, uniform, format),
        Grids(double_quant, group_size, symmetric),
        Mixing(width_texts(allow), floor_texts(floor), tuple(protect), tuple(tie)),
        RoundingOptions(rounding, tokens, smooth),
    )
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    return _plan(planner, opened(checkpoint), Measuring(profile_path(profile), device, dtype), automatic, dry_run)


@public
def compress(
    checkpoint: AnyCheckpoint,
    *,
    size: AnySize | None = None,
    ratio: float | None = None,
    max_damage: float | None = None,
    allow: Sequence[Width] = DEFAULT_ALLOWED,
    floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[str] = (),
    heal: bool = False,
    steps: Count | None = None,
    minutes: float = DEFAULT_MINUTES,
    clock: Sequence[int] | None = None,
    target: Annotated[str, one_of(*TARGETS)] | None = None,
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
    max_shard_size: AnySize = "10GB",
    dry_run: bool = False,
) -> WrittenCheckpoint | ForeseenCheckpoint:
    """Compress to a size, as ``ditmoe compress``: fewer neurons and fewer bits, planned together.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        size: size of the whole file: bytes, or a text such as ``"1.2GiB"``.
        ratio: size as a share of the checkpoint's file, as ``0.25``.
        max_damage: the smallest file whose relative squared error of the guided prediction is at most this.
        allow, floor, protect, tie: as for `plan_quantize`; ``tie=["stack"]`` gives all experts of a block one width.
        heal, steps, minutes: whether to train the result, to how many sampling steps, and how long.
        clock: as for `heal`.
        target: choose only what this target of ``ditmoe export`` can write, such as ``"upstream"`` or ``"sdnq"``.
        profile, device, dtype, calibration_…: as for `plan_prune`.
        output: file ``….safetensors`` or folder; by default named after the input, in the working folder.
        force: whether to replace what stands there. What the same request made before is up to date without it.
        max_shard_size: size of the largest file of a folder.
        dry_run: whether to write nothing, and to return what would be written and take, a `ForeseenCheckpoint`; where
            the result is up to date, that.

    Raises what `plan_prune` does, and `OutputExistsError` where something else stands at the output.
    """
    alone()
    found = opened(checkpoint)
    planner = compressing_of(
        Goals(size_of("size", size), ratio, max_damage),
        Tying(width_texts(allow), floor_texts(floor), tuple(protect), tuple(tie)),
        Retrained(heal, steps, minutes, tuple_of(clock)),
        Loading(target),
    )
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    measuring = Measuring(profile_path(profile), device, dtype)
    to = destination(output, force, max_shard_size).at(found.path, planner.label)
    run = _run_of(planner, found, to, measuring, automatic, dry_run)
    return foreseen_result(run) if dry_run else planned_result(run)


@public
def size_curve(
    checkpoint: AnyCheckpoint,
    *,
    size: AnySize | None = None,
    ratio: float | None = None,
    allow: Sequence[Width] = DEFAULT_ALLOWED,
    floor: Mapping[str, float] | None = None,
    protect: Sequence[str] = (),
    tie: Sequence[str] = (),
    target: Annotated[str, one_of(*TARGETS)] | None = None,
    profile: AnyProfile | None = None,
    device: Device = "auto",
    dtype: NamedDtype = "auto",
    calibration_cfg: float | None = None,
    calibration_steps: int | None = None,
    calibration_images: int | None = None,
    calibration_data: AnyPath | None = None,
    calibration_classes: Sequence[int] | None = None,
    calibration_seed: Seed | None = None,
    png: Annotated[AnyPath, ending(".png")] | None = None,
    force: bool = False,
) -> MeasuredCurve:
    """Measure what sizes of a checkpoint cost, as ``ditmoe compress`` does; `apply` takes the plan of each.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        size, ratio: a size to mark, as for `compress`.
        allow, floor, protect, tie, target: as for `compress`.
        profile, device, dtype, calibration_…: as for `plan_prune`.
        png: file ``….png`` to draw the curve to; takes the report extra.
        force: whether to replace what stands there.

    Raises what `plan_prune` does, and `OutputExistsError` where something stands at `png`.
    """
    alone()
    found = opened(checkpoint)
    curving = curving_of(
        Goals(size_of("size", size), ratio),
        Tying(width_texts(allow), floor_texts(floor), tuple(protect), tuple(tie)),
        Loading(target),
    )
    automatic = automatic_profile(
        calibration_cfg,
        calibration_steps,
        calibration_images,
        calibration_data,
        calibration_classes,
        calibration_seed,
    )
    files = CurveFiles(None if png is None else Path(png), force)
    if files.png is None:
        refuse_idle(files, "without ⟨png⟩", "force")
    beside = Destination().at(found.path, "curve").path
    wanted = automatic.wanted(found, Measuring(profile_path(profile), device, dtype), beside.parent)
    return measured_curve(curving, found, wanted, device, beside, files)


@public
def apply(
    checkpoint: AnyCheckpoint,
    plan: CompressionPlan | AnyPath,
    *,
    profile: AnyProfile | None = None,
    clock: Sequence[int] | None = None,
    device: Device = "auto",
    output: Annotated[AnyPath, checkpoint_path] | None = None,
    force: bool = False,
    max_shard_size: AnySize = "10GB",
    dry_run: bool = False,
) -> WrittenCheckpoint | ForeseenCheckpoint:
    """Carry out a plan, as ``ditmoe apply``.

    Args:
        checkpoint: the checkpoint that the plan was made for.
        plan: what a function ``plan_…`` returned, or a file with a plan.
        profile: the profile that the plan was made with, where it computes weights. Without it, that under a usual
            name, or the one that the planner made.
        clock: of a plan that trains, as for `heal`.
        device: where weights are computed.
        output, force, max_shard_size, dry_run: as for `compress`.

    Raises:
        BadInputError: the plan is for another checkpoint, or its profile is not there.
        OutputExistsError: something else stands at the output.
    """
    alone()
    files = []
    if not isinstance(plan, CompressionPlan):
        files = [Path(plan)]
        plan = read_plan(files[0])
    if plan.edited:
        note("the plan was edited since it was planned; the history of the output will say so")
    found = opened(checkpoint)
    to = destination(output, force, max_shard_size).at(found.path, output_label(plan))
    application = Application(plan, found, to, profile_path(profile), device, files, tuple_of(clock))
    return applied_result(application, dry_run=dry_run)


def _plan(
    planner: Planner, checkpoint: Checkpoint, measuring: Measuring, automatic: AutomaticProfile, dry_run: bool
) -> CompressionPlan | ForeseenCheckpoint:
    """Return the plan of a request, signed, so that it is known later whether it was edited; what a dry run foresees.

    What stands at the place of the result does not matter.
    """
    to = Destination(force=True).at(checkpoint.path, planner.label)
    run = _run_of(planner, checkpoint, to, measuring, automatic, dry_run)
    if dry_run:
        return foreseen_alone(run)
    with chosen_alone(run) as choice:
        plan = choice.of(checkpoint)
        return replace(plan, written=plan.digest)


def _run_of(
    planner: Planner,
    checkpoint: Checkpoint,
    to: Output,
    measuring: Measuring,
    automatic: AutomaticProfile,
    dry_run: bool = False,
) -> PlannerRun:
    wanted = automatic.wanted(checkpoint, measuring, to.path.parent, measures=not dry_run)
    return PlannerRun(planner, checkpoint, to, wanted, measuring.device)
