"""Sampling options turned into a sample spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.sampling import SampleSpec
    from ditmoe_cli.model.checkpoint import Checkpoint


def sample_spec(
    checkpoint: Checkpoint, images: int, steps: int, cfg: float, seed: int, solver: str | None, classes: str | None
) -> SampleSpec:
    """Return the spec that the options ask for. Raises `UsageError` for values out of range."""
    from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
    from ditmoe_cli.diffusion.solvers import choose_solver

    config = checkpoint.config
    chosen = choose_solver(solver, config.sampler)
    labels = parse_classes(classes) if classes is not None else tuple(range(config.num_classes))
    return check_spec(SampleSpec(images, steps, cfg, seed, chosen, labels), config.num_classes)


def parse_classes(text: str) -> tuple[int, ...]:
    """Return the labels of a list such as ``0,3,7``. Raises `UsageError`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--classes {text}: give class numbers separated by commas, as 0,3,7") from None
