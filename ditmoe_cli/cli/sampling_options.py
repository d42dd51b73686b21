"""Options of sampling, and the sample spec that they ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import sampling_requests as asked
from ditmoe_cli.api.argument_checks import seed_of_64_bits
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.options import DtypeOpt
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import Row
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.schedule import (
    ALWAYS,
    SOLVERS,
    Interval,
)
from ditmoe_cli.diffusion.weak_guidance import parse_guide
from ditmoe_cli.evaluation.computed_share import parse_computed
from ditmoe_cli.model.dtypes import AUTO, recorded_dtype

_CLASSES = re.compile(r"(?P<first>[0-9]+)(?:-(?P<last>[0-9]+))?")
_MOST_CLASSES = 1_000_000


def parse_interval(text: str) -> Interval:
    """Return the two noise levels of an interval such as ``0.2,0.8``. Raises `ValueError`."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError("give two noise levels between 0 and 1, as 0.2,0.8") from None
    return low, high


def parse_classes(text: str) -> tuple[int, ...]:
    """Return the labels of a list of numbers and ranges such as ``0-3,7``. Raises `ValueError`."""
    parts = [_CLASSES.fullmatch(part.strip()) for part in text.split(",")]
    ranges = [(int(part["first"]), int(part["last"] or part["first"])) for part in parts if part]
    if len(ranges) < len(parts) or any(first > last for first, last in ranges):
        raise ValueError("give class numbers and ranges of them separated by commas, as 0,3,7 or 0-3,7")
    if any(last >= _MOST_CLASSES for _, last in ranges) or len(ranges) > _MOST_CLASSES:
        raise ValueError(f"no model has {_MOST_CLASSES:,} classes")
    return tuple(label for first, last in ranges for label in range(first, last + 1))


complete_solver = completing(*dict.fromkeys(solver.name for solver in SOLVERS.values()))

ImagesOpt = Annotated[int, typer.Option("--images", metavar="N", help="Images to sample of each checkpoint.")]


@dataclass(frozen=True)
class SamplingOptions(asked.SamplingOptions):
    """Options of every command that follows a sampler step by step."""

    panel: ClassVar[str] = "Sampling"

    images: ImagesOpt = 64
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            help="Sampling steps. [default: 16 for rf, 20 for ddpm; a distilled checkpoint's own]",
        ),
    ] = None
    cfg: Annotated[
        float, typer.Option("--cfg", metavar="S", help="Scale of classifier-free guidance; 1 is no guidance.")
    ] = 1.0
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            metavar="NAME",
            autocompletion=complete_solver,
            help="Solver: euler, ab2, ab4 or dpmpp-2m for rf; ddim, ddim-trailing, ddpm or "
            "dpmpp-2m for ddpm. [default: ab2 for rf, dpmpp-2m for ddpm; a distilled checkpoint's own]",
        ),
    ] = None
    classes: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            "--classes",
            metavar="LIST",
            parser=parse_classes,
            help="Labels to cycle through, as 0,3,7 or 0-3,7. [default: all]",
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of the noise.")] = 0
    dtype: DtypeOpt = AUTO


@dataclass(frozen=True)
class UpstreamSampling(SamplingOptions):
    """Sampling that may be upstream's."""

    upstream: Annotated[
        bool,
        typer.Option(
            "--upstream-exact",
            help="Sample as upstream does: 50 Euler steps for rf, 250 ancestral steps for ddpm; fp32 where --dtype is "
            "auto.",
        ),
    ] = False


@dataclass(frozen=True)
class GuidedSampling(UpstreamSampling):
    """Sampling with every solver, guided where wished."""

    interval: Annotated[
        Interval,
        typer.Option(
            "--cfg-interval",
            metavar="LOW,HIGH",
            parser=parse_interval,
            help="Noise levels, 0 to 1, between which to guide. [default: all]",
        ),
    ] = ALWAYS
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            metavar="NAME",
            autocompletion=complete_solver,
            help="Solver: euler, heun, ab2, ab3, ab4 or dpmpp-2m for rf; ddim, ddim-trailing, ddpm or "
            "dpmpp-2m for ddpm. [default: ab2 for rf, dpmpp-2m for ddpm; a distilled checkpoint's own]",
        ),
    ] = None


@dataclass(frozen=True)
class ImageSampling(asked.ImageSampling, GuidedSampling):
    """Sampling for the images alone: with every solver, guided where wished, and decoded."""

    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", metavar="PATH", help="AutoencoderKL that decodes latents: a diffusers folder or a hub name."
        ),
    ] = None


@dataclass(frozen=True)
class Scheduling(asked.Scheduling):
    """The schedule that says what blocks compute."""

    panel: ClassVar[str] = "Sampling"

    schedule: Annotated[
        Path | None,
        typer.Option(
            "--schedule",
            metavar="FILE",
            help="What each block computes in each step, as ditmoe schedule writes it; solver, steps and guidance are "
            "those that it is for. [default: the one that the pipe names]",
        ),
    ] = None

    def of(self, stage: Stage) -> ComputeSchedule | None:
        """Return the schedule that is given, else the envelope's; None without any."""
        named = Path(stage.schedule) if stage.schedule is not None else None
        return asked.Scheduling(named if self.schedule is None else self.schedule).opened()


def scheduled(stage: Stage, schedule: ComputeSchedule | None) -> Stage:
    """Return a stage that names the schedule for the commands after this one."""
    return stage if schedule is None else replace(stage, schedule=str(schedule.path.absolute()))


def schedule_rows(sampling: Mapping[str, Any]) -> list[Row]:
    """Return what a schedule computed as rows of a table; none without a schedule."""
    computed = parse_computed(sampling.get("computed"))
    return [] if computed is None else [("schedule", computed.told)]


def solver_row(sampling: Mapping[str, Any]) -> Row:
    """Return how images are sampled, and at what cost, as a row of a table; `sampling` is conditions with their NFE."""
    dtype, guide = recorded_dtype(sampling), parse_guide(sampling.get("guide"))
    guided = "" if guide is None else f"guided by {guide.told}, "
    row = "{solver}, {steps} steps, cfg {cfg:g}, {guided}{nfe} NFE an image".format(**sampling, guided=guided)
    return ("solver", row if dtype == "fp32" else f"{row}, {dtype}")
