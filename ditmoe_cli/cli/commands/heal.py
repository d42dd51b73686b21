"""``ditmoe heal``: a compressed checkpoint trained to predict as its original does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import healing_requests as asked
from ditmoe_cli.api.argument_checks import one_of
from ditmoe_cli.api.step_texts import held_text
from ditmoe_cli.api.training_runs import trained_result
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.options import Destination, Measuring, Models, Source
from ditmoe_cli.cli.planning import Job
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing, Row
from ditmoe_cli.cli.training import TrainingOptions, show_trained
from ditmoe_cli.compression.heal.healed_output import HealingRecord
from ditmoe_cli.compression.heal.healing import SCOPES
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import read_profile
from ditmoe_cli.routing.profile_search import ProfileRequest

MACHINE = Models
EXAMPLES = (
    "ditmoe heal half.safetensors --original ckpt.pt",
    "ditmoe prune ckpt.pt --neurons 0.35 --allocate global | ditmoe heal --minutes 5 | ditmoe fid",
    "torchrun --nproc-per-node 8 -m ditmoe_cli heal half.safetensors --original ckpt.pt --device cuda",
)


@dataclass(frozen=True)
class Teaching(asked.Teaching, TrainingOptions):
    """What is trained towards what, for how long, and in which scope."""

    panel: ClassVar[str] = "Healing"

    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Steps to train in place of a time, in block scope for each block."),
    ] = None
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="auto|block|model",
            callback=one_of(*SCOPES),
            help="block: one block after the other, in the memory of one; model: end to end on the prediction; auto: "
            "blocks first, then the model where memory suffices.",
        ),
    ] = "auto"


def run(
    teaching: Teaching,
    measuring: Measuring,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Train a compressed checkpoint for some minutes to predict as its original does, without data.

    It is trained on images that the original samples, noised anew, towards what the original predicts there. Every
    eighth image is held out: the weights that do best on those are kept, and never worse ones than the input's. The
    output has the same tensors and bytes. torchrun's processes share the work.
    """
    stage = teaching.named(source.stage(shared=True))
    student, original = open_stage(stage), open_stage(stage, stage.original)
    healing = teaching.request(original)
    job = Job("heal", stage, student, to.at(student.path, healing.label), printing)
    wanted = profile_request(stage, original, measuring, automatic, job.output.path.parent, to)
    training = asked.healing_training(healing, student, original, job.output, wanted, measuring)
    show_trained(job, training, trained_result(training, dry_run=to.dry_run), record_rows, dry_run=to.dry_run)


def profile_request(
    stage: Stage,
    original: Checkpoint,
    measuring: Measuring,
    automatic: AutomaticProfile,
    beside: Path,
    to: Destination,
) -> ProfileRequest:
    """Return what is asked of the original's profile; that of the pipe counts where it is the original's."""
    found = automatic.request(stage, original, measuring, beside, measures=not to.dry_run)
    if measuring.profile is None and found.given is not None:
        piped = read_profile(found.given)
        if piped.checkpoint not in (original.fingerprint, *original.ancestors):
            found = replace(found, given=None)
    return found


def record_rows(record: HealingRecord) -> list[Row]:
    """Return what healing has done, for reading."""
    course = (("each block", record.block_steps), ("the model", record.model_steps))
    steps = " and ".join(f"{count:,} steps of {scope}" for scope, count in course if count)
    before, after = record.held_error_before, record.held_error_after
    return [
        ("healed", f"{steps}, on {record.images:,} images noised anew"),
        ("error", f"{held_text(record.held_error)} of the guided prediction, on held-out states"),
        ("worst bin", f"{held_text((max(before), max(after)))}, of {len(before)} step bins"),
    ]
