"""``ditmoe distill``: a checkpoint trained to be sampled in few steps, with guidance in its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import distilling_requests as asked
from ditmoe_cli.api.argument_checks import at_least, one_of
from ditmoe_cli.api.step_texts import held_text
from ditmoe_cli.api.training_runs import trained_result
from ditmoe_cli.cli.guiding_options import WeakGuiding, marked
from ditmoe_cli.cli.options import Computing, Destination, Models, Source
from ditmoe_cli.cli.planning import Job
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row
from ditmoe_cli.cli.training import TrainingOptions, show_trained
from ditmoe_cli.compression.distill.distilled_output import DistillingRecord
from ditmoe_cli.compression.distill.distilling import (
    DEFAULT_STUDENT_STEPS,
    STATES,
    check_own_teacher,
)

MACHINE = Models
EXAMPLES = (
    "ditmoe distill half.safetensors --original ckpt.pt --steps 4 --cfg 1.5",
    "ditmoe prune ckpt.pt --neurons 0.5 | ditmoe distill --steps 2 | ditmoe quantize --bits 4",
    "ditmoe distill half.safetensors --original ckpt.pt --guide-with weak.safetensors --guide-scale 0.5",
)


@dataclass(frozen=True)
class Teaching(asked.Teaching, TrainingOptions):
    """Which steps are learned of what, for how long."""

    panel: ClassVar[str] = "Distilling"

    steps: Annotated[
        int,
        typer.Option(
            "--steps", metavar="N", callback=at_least(1), help="Steps of the student, one evaluation each: 1, 2, 4, 8."
        ),
    ] = DEFAULT_STUDENT_STEPS
    cfg: Annotated[
        float,
        typer.Option(
            "--cfg", metavar="S", help="Scale of classifier-free guidance that goes into the weights; 1 is none."
        ),
    ] = 1.0
    iterations: Annotated[
        int | None, typer.Option("--iterations", metavar="N", help="Iterations of training in place of a time.")
    ] = None
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            "--teacher-steps",
            metavar="N",
            callback=at_least(1),
            help="Steps of the original, a multiple of the student's. [default: 24 of ab3 for rf, 20 of dpmpp-2m for "
            "ddpm, or the next multiple]",
        ),
    ] = None
    states: Annotated[
        str,
        typer.Option(
            "--states",
            metavar="teacher|own",
            callback=one_of(*STATES),
            help="Where the student is asked: on the original's paths; or half of the time where its own steps led it.",
        ),
    ] = "teacher"
    progressive: Annotated[
        bool, typer.Option("--progressive", help="Learn 8, 4 and 2 steps first, in equal parts of the time.")
    ] = False


def run(
    teaching: Teaching,
    weaker: WeakGuiding,
    computing: Computing,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Train a checkpoint for some minutes to be sampled in few steps, without data.

    It learns the original's own paths from noise to images, in N steps of one evaluation each; guidance goes into the
    weights, so that no null branch is left. The student is any compression of the original, or the original itself.
    Held-out paths judge: the weights whose steps are nearest to the original's are kept, and never ones of worse images
    than the input's. The output has the same tensors and bytes, and says by which steps it is sampled. torchrun's
    processes share the training.
    """
    stage = teaching.named(source.stage(shared=True), may_be_same=True)
    student = open_stage(stage)
    original = student if stage.original == stage.checkpoint else open_stage(stage, stage.original)
    if teaching.original is None and stage.original == stage.checkpoint:
        check_own_teacher(student)
    guiding = weaker.opened(source.given)
    distilling = teaching.request(original, guiding.used)
    output = to.at(student.path, distilling.label)
    job = Job(distilling.command, marked(guiding, stage), student, output, printing)
    training = asked.distilling_training(distilling, student, original, output, guiding.weak)
    training = replace(training, device=computing.device, dtype=computing.dtype)
    show_trained(job, training, trained_result(training, dry_run=to.dry_run), record_rows, dry_run=to.dry_run)


def record_rows(record: DistillingRecord) -> list[Row]:
    """Return what distilling has done, for reading."""
    behind = ", ".join(held_text(pair) for pair in zip(record.before, record.after, strict=True))
    return [
        ("distilled", f"to {len(record.after)} steps, in {record.iterations:,} iterations on {record.paths:,} paths"),
        ("error", f"{held_text(record.held_error)} of images, on held-out noise"),
        ("behind steps", behind),
    ]
