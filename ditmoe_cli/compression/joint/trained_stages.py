"""A plan that trains weights, carried out: first all other stages, then what they made is healed, or distilled.

Training comes last, on the codes that weights were rounded to, which stay: scales, routers, norms and all else then
make up for what went and for rounding at once. Training before rounding and after left more in as many steps, and so
did learned codes (docs/results.md).

What the other stages make is a checkpoint in the work folder, from which an unfinished run goes on. What is written is
laid out by the whole plan, as one step of the history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.distill.distilled_output import DistillingRecord
from ditmoe_cli.compression.distill.distilled_weights import distill
from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.heal.healed_output import HealingRecord
from ditmoe_cli.compression.heal.healed_weights import heal
from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.output import PlannedOutput, planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Retraining
from ditmoe_cli.compression.planned_training import planned_training
from ditmoe_cli.compression.recorded import GIVEN_CLOCK, Measured
from ditmoe_cli.compression.training.training_session import PIECE, TrainingWork
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.workfolder import WorkFolder, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

CarryOut = Callable[[Checkpoint, PlannedOutput, Output, RoutingProfile, str, WorkFolder], object]
"""Writes an output as it is laid out (`apply.carry_out`)."""


@dataclass(frozen=True)
class Means:
    """How a plan is carried out: the original's profile, the device, the work folder, what carries plans out."""

    profile: RoutingProfile
    device: str
    work: WorkFolder
    carry_out: CarryOut


@dataclass(frozen=True)
class TrainedStages:
    """What the other stages made, the bytes of each tensor after training, and what was measured."""

    bytes_of: Callable[[str], memoryview]
    measured: Measured


def carry_out_trained(checkpoint: Checkpoint, plan: CompressionPlan, means: Means) -> TrainedStages:
    """Carry out all other stages of a plan that trains weights, and then train.

    Raises `BadInputError` as `apply.carry_out` does.
    """
    student, work = _before_training(checkpoint, plan, means), means.work
    given = work.read(GIVEN_CLOCK)
    clock = tuple(map(int, given.document["clock"])) if given is not None else None
    given_key = {} if clock is None else {"clock": clock}
    device = {"device": means.device.partition(":")[0]}
    key = work_key({"plan": plan.digest, "student": student.fingerprint, **device, **given_key})
    dtype = Calibrated(checkpoint, means.profile, means.device).dtype
    if work.read(PIECE) is None:
        with open_work(work.folder / "stages" / "training", key, work.notify) as folder:
            training = TrainingWork(student, checkpoint, means.device, dtype, folder, work.notify)
            done = _trained(training, replace(planned_training(plan), clock=clock), means.profile)
            made = folder.read(PIECE)
            assert made is not None
            tensors = {name: made.tensor(name) for name in made.names}
            work.write(PIECE, tensors, {"held_error": list(done.held_error), "clock": list(done.clock)})
    piece = work.read(PIECE)
    if piece is None:
        raise BadInputError(f"{work.folder}: the healed weights are gone; run it again")
    before, after = piece.document["held_error"]
    trained = set(piece.names)

    def bytes_of(name: str) -> memoryview:
        return piece.raw(name) if name in trained else student.reader.raw(name)

    chosen = tuple(map(int, piece.document["clock"]))
    return TrainedStages(bytes_of, Measured(held_error=(float(before), float(after)), clock=chosen))


def _trained(
    work: TrainingWork, asked: Healing | Distilling, profile: RoutingProfile
) -> HealingRecord | DistillingRecord:
    """Heal or distil what the other stages made, and keep the result in the work folder."""
    return distill(work, asked) if isinstance(asked, Distilling) else heal(work, profile, asked)


def _before_training(checkpoint: Checkpoint, plan: CompressionPlan, means: Means) -> Checkpoint:
    """Return what all stages but training make of the checkpoint, made where it is not there; itself without any."""
    others = tuple(stage for stage in plan.stages if not isinstance(stage, Retraining))
    if not others:
        return checkpoint
    folder = means.work.folder / "stages"
    folder.mkdir(exist_ok=True)
    path = folder / "compressed.safetensors"
    if not path.exists():
        planned = planned_output(checkpoint, replace(plan, stages=others))
        means.carry_out(checkpoint, planned, Output(path), means.profile, means.device, means.work)
    return open_checkpoint(path)
