"""Application of plans: the one function that writes compressed checkpoints.

Weights that depend on calibration data are computed first, a block at a time, into the work folder beside the output,
from which an interrupted run goes on. Then the output, whose layout is known from headers (`planned_output`), is
written by several threads, each with one weight in memory (`one_pass`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ditmoe_cli.compression.computed import Computing, kept_weight
from ditmoe_cli.compression.one_pass import write_planned
from ditmoe_cli.compression.output import PlannedOutput, planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Differences, Experts, Formats, PlanStage, Retraining
from ditmoe_cli.compression.recorded import Measured
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.workfolder import WorkFolder, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class Applied:
    """The number of bytes written, the measured errors, and the output as it is."""

    bytes: int
    measured: Measured
    planned: PlannedOutput


def apply(
    checkpoint: Checkpoint,
    plan: CompressionPlan | None,
    output: Output,
    profile: RoutingProfile | None = None,
    device: str = "cpu",
) -> Applied:
    """Write the result of applying `plan` to `checkpoint`; without a plan, a copy in safetensors.

    Raises what `planned_output` and `carry_out` raise.
    """
    return carry_out(checkpoint, planned_output(checkpoint, plan), output, profile, device)


def carry_out(
    checkpoint: Checkpoint,
    planned: PlannedOutput,
    output: Output,
    profile: RoutingProfile | None = None,
    device: str = "cpu",
    work: WorkFolder | None = None,
    settled: Callable[[], PlannedOutput] | None = None,
) -> Applied:
    """Write an output of `checkpoint` as it is laid out.

    One weight is in memory at a time; where weights are computed, the weights of one block and the calibration tokens,
    on `device`. A plan that computes weights needs the `profile` that it was made with, and keeps each block in `work`,
    by default the work folder of this plan and profile. Where the checkpoint's fingerprint is yet to be found out by
    reading its weights, `settled` returns the output with it, or raises where it is not the claimed one. Raises
    `BadInputError` for an undecided plan, NaN or infinite weights and a missing or different profile, and
    `OutputExistsError`.
    """
    plan = planned.plan
    if plan is not None and not plan.decided:
        raise BadInputError("the plan leaves open which experts stay; plan again with a profile")
    if plan is None or not plan.computes:
        size = write_planned(checkpoint, planned, output, settled=settled)
        return Applied(size, Measured(), planned if settled is None else settled())
    check_values(checkpoint, plan)
    check_target(output.path, output.force, [checkpoint.path])
    profile = _profile_of(plan, profile)
    if work is None:
        with open_work(output.path, applying_key(plan, profile, device), lambda _: None) as own:
            return carry_out(checkpoint, planned, output, profile, device, own)
    if plan.retraining is not None:
        from ditmoe_cli.compression.joint.trained_stages import Means, carry_out_trained

        done = carry_out_trained(checkpoint, plan, Means(profile, device, work, carry_out))
        planned = planned.measured(done.measured, device)
        return Applied(write_planned(checkpoint, planned, output, done.bytes_of), done.measured, planned)
    loop, kept = work.loop(loop_name(plan), checkpoint.config.depth), None
    if loop.start < loop.total and any(isinstance(stage, Experts) and stage.selection for stage in plan.stages):
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        kept = kept_measures(checkpoint, profile, device, work.notify)
    computing = Computing(checkpoint, profile, device, work, loop, kept=kept)
    measured = _computed(computing, plan)
    planned = planned.measured(measured, device)
    computed = partial(kept_weight, computing.blocks)
    return Applied(write_planned(checkpoint, planned, output, computed), measured, planned)


def check_values(checkpoint: Checkpoint, plan: CompressionPlan) -> None:
    """Raise `BadInputError` for weights whose values their format does not hold, before anything is computed."""
    for stage in plan.stages:
        if isinstance(stage, Formats) and stage.formats:
            with phase(f"checking the values of {checkpoint.name}", len(stage.formats), "matrices") as progress:
                for name, fmt in stage.formats.items():
                    weight = checkpoint.finite_tensor(name)
                    try:
                        parse_format(fmt).check_values(weight, name)
                    except BadInputError as error:
                        raise BadInputError(f"{checkpoint.path}: {error}") from None
                    progress(1)


def applying_key(plan: CompressionPlan, profile: RoutingProfile, device: str) -> str:
    """Return the key of carrying a plan out: GPUs round otherwise than CPUs do."""
    return work_key({"plan": plan.digest, "profile": profile.digest, "device": device.partition(":")[0]})


def _profile_of(plan: CompressionPlan, profile: RoutingProfile | None) -> RoutingProfile:
    if profile is None:
        raise BadInputError(
            "the plan computes weights from a routing profile; give the one that it was made with (⟨profile⟩)"
        )
    if plan.profile is not None and profile.digest != plan.profile:
        raise BadInputError(
            f"{profile.path}: is not the profile that the plan was made with ({profile.digest[:12]}, not "
            f"{plan.profile[:12]})"
        )
    return profile


def loop_name(plan: CompressionPlan) -> str:
    """Return the name of the loop that keeps a plan's blocks: one of its own where several plans may be tried."""
    return "block" if plan.together is None else f"block-{plan.work_digest[:12]}"


def _computed(computing: Computing, plan: CompressionPlan) -> Measured:
    """Compute the weights of a plan, and keep those of each block."""
    if plan.together is not None:
        from ditmoe_cli.compression.joint.carrying import carry_out_together

        carried = carry_out_together(computing, *plan.together)
        return Measured(carried.refit_error, carried.error, carried.agreement)
    (stage,) = (stage for stage in plan.stages if stage.computes)  # `planned_output` refuses several
    return _compute(computing, stage)


def _compute(computing: Computing, stage: PlanStage) -> Measured:
    """Compute the weights of a stage, and keep those of each block."""
    match stage:
        case Experts():
            from ditmoe_cli.compression.rebuild import rebuild

            return Measured(refit_error=rebuild(computing, stage))
        case Differences():
            from ditmoe_cli.compression.delta import differencing

            differencing.encode(computing, stage)
            return Measured()
        case Formats() if stage.rounding is not None:
            from ditmoe_cli.compression.rounding.gptq_blocks import round_blocks

            rounded = round_blocks(computing, stage)
            return Measured(prediction_error=rounded.error, top_k_agreement=rounded.agreement)
        case Formats():
            from ditmoe_cli.compression.replay.neuron_order import encode_ordered

            encode_ordered(computing, stage)
            return Measured()
        case Retraining():
            raise AssertionError("is carried out with the stages around it")
