"""``ditmoe schedule``: what each block computes in each step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import schedule_runs as asked
from ditmoe_cli.api.argument_checks import at_least
from ditmoe_cli.api.foretelling import estimate_row
from ditmoe_cli.api.schedule_runs import ForeseenSchedule, MadeSchedule, scheduled_result
from ditmoe_cli.cli.guiding_options import WeakGuiding, marked
from ditmoe_cli.cli.options import DeviceOpt, FileDestination, Models, Source
from ditmoe_cli.cli.sampling_options import GuidedSampling
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit
from ditmoe_cli.diffusion.few_steps import told_sampling
from ditmoe_cli.progress import human_bytes
from ditmoe_cli.scheduling.schedule_request import LEAST_IMAGES
from ditmoe_cli.scheduling.whole_methods import PLANNED

MACHINE = Models
EXAMPLES = (
    "ditmoe schedule ckpt.pt --solver euler --steps 50 --flops 0.6",
    "ditmoe schedule ckpt.pt --upstream-exact --max-damage 0.001 --anyway | ditmoe fid",
    "ditmoe schedule ckpt.pt --method fora:2 -o fora.safetensors",
)


@dataclass(frozen=True)
class WaySampling(asked.WaySampling, GuidedSampling):
    """The way of sampling that the schedule is for, and the images that it is chosen on."""

    images: Annotated[
        int,
        typer.Option(
            "--images",
            metavar="N",
            callback=at_least(LEAST_IMAGES),
            help="Images to choose on: errors are measured on a quarter of them, plans tried on the others.",
        ),
    ] = 32


@dataclass(frozen=True)
class Scheduling(asked.Scheduling):
    """How the schedule is chosen, and within what."""

    panel: ClassVar[str] = "Scheduling"

    flops: Annotated[
        float | None, typer.Option("--flops", metavar="SHARE", help="The most operations, as a share of all: 0.6.")
    ] = None
    max_damage: Annotated[
        float | None,
        typer.Option(
            "--max-damage",
            metavar="X",
            help="The largest squared error of the final images, relative to theirs, in place of --flops: 0.001.",
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How it is chosen: planned by a program; or for the whole model by fora:N, taylor:N, moeca:N, "
            "follow:N, top1, regressed, top-p:T, saliency, odp, residual:T, full; a-sdm reuses blocks alone, within "
            "--flops.",
        ),
    ] = PLANNED
    bins: Annotated[
        int | None,
        typer.Option(
            "--bins",
            metavar="N",
            help="Bins of steps, with choices of their own. [default: a tenth of the steps, 10 to 25]",
        ),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="A profile of the checkpoint, whose norms of experts' outputs choose thresholds of saliency. "
            "[default: those of the images that errors are measured on]",
        ),
    ] = None
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Write the schedule also where fewer steps are better at the same cost.")
    ] = False
    device: DeviceOpt = "auto"


@dataclass(frozen=True)
class ScheduleDestination(FileDestination):
    """Where the schedule goes."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what choosing takes, and choose and write nothing.")
    ] = False


def run(
    scheduling: Scheduling,
    sampling: WaySampling,
    weaker: WeakGuiding,
    source: Source,
    to: ScheduleDestination,
    printing: Printing,
) -> None:
    """Choose what each block computes in each step of one way of sampling.

    For each block, bin of steps and branch of guidance: all; fewer slots; attention, mixture or both as they were
    before, or extrapolated; nothing. An integer program chooses by errors that are replayed on the model's own states;
    its plans are tried on other images. Where fewer steps of a solver are better at the same cost, that is said, and
    nothing is written. sample, fid, compare and bench follow the schedule with --schedule, or through a pipe.
    """
    stage = source.stage()
    opened = open_stage(stage)
    guiding = weaker.opened(source.given)
    result = scheduled_result(opened, sampling, guiding, scheduling, to, dry_run=to.dry_run)
    options = {**result.sampling.to_json(), "method": result.method}
    if isinstance(result, ForeseenSchedule):
        document = stage.done("schedule", options).to_json(result.to_json())
        rows = [("schedule", result.path), ("for", result.sampling.told), estimate_row([result.estimate], result.rate)]
        emit(printing, document, rows, None)
        return
    done = marked(guiding, stage).done("schedule", options, schedule=result.path)
    emit(printing, done.to_json(result.to_json()), made_rows(result), str(result.path))


def made_rows(result: MadeSchedule) -> list[Row]:
    """Return a schedule as a table."""
    measured = result.measured
    choices = ", ".join(f"{kind} {share:.0%}" for kind, share in result.shares.items())
    rows: list[Row] = [
        ("schedule", f"{result.path} ({human_bytes(result.bytes)})"),
        ("method", result.method),
        ("for", result.sampling.told),
        ("operations", f"{measured['flops']:.3f} of all"),
        ("damage", f"{measured['damage']:.3g} of the final images, at most {measured['damage_bound']:.3g} (95 %)"),
        ("blocks", choices),
        ("kept", f"{human_bytes(measured['kept_bytes'])} an image at the most"),
    ]
    rival = measured["fewer_steps"]
    if rival is not None:
        told = f"{told_sampling(rival['solver'], rival['steps'])} err {rival['error']:.3g} of the fine solution"
        rows.append(("fewer steps", f"{told}, the schedule {rival['schedule_error']:.3g}"))
    return [
        *rows,
        *(("tried", f"{each['name']}: {each['flops']:.3f}, {each['damage']:.3g}") for each in measured["tried"]),
    ]
