"""Options of sampling, and the sample spec that they ask for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api.argument_checks import seed_of_64_bits
from ditmoe_cli.api.devices import dtype_on
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.options import DtypeOpt
from ditmoe_cli.cli.terminal import Row, note
from ditmoe_cli.compression.planner import label_of
from ditmoe_cli.diffusion.few_steps import check_unguided, other_steps, told_steps, usual_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import (
    ALWAYS,
    DEFAULT_SOLVER,
    SOLVERS,
    UPSTREAM,
    Interval,
    Solver,
    choose_solver,
)
from ditmoe_cli.diffusion.weak_guidance import parse_guide
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import AUTO, Dtype, recorded_dtype
from ditmoe_cli.processes import first_process

_LONGEST = 24  # characters of a list of classes in a name

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
class SamplingOptions:
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
    interval: Interval = ALWAYS
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
    upstream: bool = False
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

    def on(self, device: str, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER) -> Callable[[Checkpoint], SampleSpec]:
        """Return what gives the spec for a checkpoint on a device; dtype ``auto`` is chosen for the first of them.

        It is fp32 where upstream is followed, which samples so. Of each distilled checkpoint it is said once by which
        steps it is sampled.
        """
        dtype_of = dtype_on("fp32" if self.upstream and self.dtype == AUTO else self.dtype, device)
        told = set[Path]()

        def spec_of(checkpoint: Checkpoint) -> SampleSpec:
            spec = self.spec(checkpoint, solvers, dtype_of(checkpoint))
            if checkpoint.path not in told:
                told.add(checkpoint.path)
                note_steps(checkpoint, spec)
            return spec

        return spec_of

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for; `solvers` are those of each family where none is named.

        Those of a distilled checkpoint are its own. Raises `UsageError` for values out of range, and for guidance of a
        distilled checkpoint.
        """
        config, distilled = checkpoint.config, checkpoint.distilled
        if self.upstream and (self.solver is not None or self.steps is not None):
            raise UsageError("--upstream-exact names solver and steps; leave out --solver and --steps")
        if self.upstream and distilled is not None:
            raise UsageError(
                f"--upstream-exact: {checkpoint.name} was distilled to {told_steps(distilled)}, and its weights are "
                "right at these alone; leave it out"
            )
        check_unguided(checkpoint, self.cfg, None if self.interval == ALWAYS else self.interval)
        solver, steps = usual_sampling(checkpoint, solvers)
        if self.upstream:
            solver, steps = UPSTREAM[config.sampler]
        if self.solver is not None:
            solver = choose_solver(self.solver, config.sampler)
        spec = SampleSpec(
            images=self.images,
            steps=steps if self.steps is None else self.steps,
            cfg=self.cfg,
            seed=self.seed,
            solver=solver,
            classes=tuple(range(config.num_classes)) if self.classes is None else self.classes,
            interval=self.interval,
            dtype=dtype,
        )
        return check_spec(spec, config)


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
class ImageSampling(UpstreamSampling):
    """Sampling for the images alone: with every solver, guided where wished, and decoded."""

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
            help="Solver: euler, heun, ab2, ab4 or dpmpp-2m for rf; ddim, ddim-trailing, ddpm or "
            "dpmpp-2m for ddpm. [default: ab2 for rf, dpmpp-2m for ddpm; a distilled checkpoint's own]",
        ),
    ] = None
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", metavar="PATH", help="AutoencoderKL that decodes latents: a diffusers folder or a hub name."
        ),
    ] = None

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for. Raises `UsageError` for an interval without guidance."""
        spec = super().spec(checkpoint, solvers, dtype)
        if self.interval != ALWAYS and self.cfg == 1.0:
            low, high = self.interval
            raise UsageError(
                f"--cfg-interval {low:g},{high:g}: nothing is guided at a scale of 1; give a scale with --cfg, "
                "or leave it out"
            )
        return spec


def note_steps(checkpoint: Checkpoint, spec: SampleSpec) -> None:
    """Say by which steps a distilled checkpoint is sampled, and what other steps than its own cost."""
    distilled = checkpoint.distilled
    if distilled is None or not first_process():
        return
    warning = other_steps(checkpoint, spec.solver, spec.steps)
    note(warning or f"{checkpoint.name}: distilled to {told_steps(distilled)}; sampling so")


def samples_label(spec: SampleSpec, options: ImageSampling, checkpoint: Checkpoint) -> str:
    """Return the ending of the name of samples: ``samples``, and all settings that are not the default."""
    usual, everything = type(options)(), tuple(range(checkpoint.config.num_classes))
    solver, steps = usual_sampling(checkpoint)
    parts = (
        "samples",
        spec.images != usual.images and f"images{spec.images}",
        spec.solver != solver and SOLVERS[spec.solver].name,
        spec.steps != steps and f"steps{spec.steps}",
        spec.cfg != usual.cfg and f"cfg{spec.cfg:g}",
        spec.interval != usual.interval and "from{:g}to{:g}".format(*spec.interval),
        spec.guide is not None and spec.guide.label,
        spec.classes != everything and f"classes{short_list(spec.classes)}",
        spec.seed != usual.seed and f"seed{spec.seed}",
        options.vae is not None and "vae",
        spec.dtype != "fp32" and spec.dtype,
    )
    return label_of(*parts)


def short_list(numbers: Sequence[int]) -> str:
    """Return numbers as part of a name, such as ``0,3,7``; of long lists how many there are, and a digest."""
    text = ",".join(map(str, numbers))
    return text if len(text) <= _LONGEST else f"{len(numbers)}x{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def solver_row(sampling: Mapping[str, Any]) -> Row:
    """Return how images are sampled, and at what cost, as a row of a table; `sampling` is conditions with their NFE."""
    dtype, guide = recorded_dtype(sampling), parse_guide(sampling.get("guide"))
    guided = "" if guide is None else f"guided by {guide.told}, "
    row = "{solver}, {steps} steps, cfg {cfg:g}, {guided}{nfe} NFE an image".format(**sampling, guided=guided)
    return ("solver", row if dtype == "fp32" else f"{row}, {dtype}")
