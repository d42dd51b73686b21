"""Sampling options turned into a sample spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditmoe_cli.cli.terminal import Row
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.sampling import SampleSpec
    from ditmoe_cli.model.opened import Checkpoint


@dataclass(frozen=True)
class SamplingOptions:
    """The options of sampling, as they were given."""

    images: int
    steps: int | None
    cfg: float
    seed: int
    solver: str | None
    classes: str | None
    interval: str | None = None
    upstream: bool = False


def sample_spec(checkpoint: Checkpoint, options: SamplingOptions, calibration: bool = False) -> SampleSpec:
    """Return the spec that the options ask for; a `calibration` has a solver of its own where none is named.

    Raises `UsageError` for values out of range.
    """
    from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
    from ditmoe_cli.diffusion.schedule import CALIBRATION_SOLVER, DEFAULT_SOLVER, DEFAULT_STEPS, UPSTREAM, choose_solver

    config = checkpoint.config
    if options.upstream and (options.solver is not None or options.steps is not None):
        raise UsageError("--upstream-exact names solver and steps; leave out --solver and --steps")
    default = CALIBRATION_SOLVER if calibration else DEFAULT_SOLVER
    solver, steps = choose_solver(options.solver, config.sampler, default), DEFAULT_STEPS[config.sampler]
    if options.upstream:
        solver, steps = UPSTREAM[config.sampler]
    steps = steps if options.steps is None else options.steps
    classes = options.classes
    labels = parse_classes(classes) if classes is not None else tuple(range(config.num_classes))
    spec = SampleSpec(
        options.images, steps, options.cfg, options.seed, solver, labels, parse_interval(options.interval)
    )
    return check_spec(spec, config.num_classes)


def solver_row(sampling: Mapping[str, Any]) -> Row:
    """Return how images are sampled, and at what cost, as a row of a table; `sampling` is conditions with their NFE."""
    told = "{solver}, {steps} steps, cfg {cfg:g}, {nfe} NFE an image".format(**sampling)
    return ("solver", told)


def parse_interval(text: str | None) -> tuple[float, float]:
    """Return the two noise levels of an interval such as ``0.2,0.8``; all where there is none. Raises `UsageError`."""
    if text is None:
        return (0.0, 1.0)
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--cfg-interval {text}: give two noise levels between 0 and 1, as 0.2,0.8") from None
    return low, high


def parse_classes(text: str) -> tuple[int, ...]:
    """Return the labels of a list such as ``0,3,7``. Raises `UsageError`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--classes {text}: give class numbers separated by commas, as 0,3,7") from None
