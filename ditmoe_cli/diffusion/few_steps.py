"""By which few steps a distilled checkpoint is sampled. Torch-free.

Its weights are right at the times of its own steps alone, and the guidance that its images have is in them: it is
evaluated once a step, in the conditional branch.
"""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS, Interval, Solver, choose_solver
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.provenance import Distilled
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler

MOST_STEPS = 1000
_ROUTINGS = ("top1", "rank2")  # of `weak_guidance.RANKS`, which rests on this module


def own_sampling(checkpoint: Checkpoint) -> tuple[Solver, int] | None:
    """Return solver and steps that a checkpoint was distilled for; None for one that was not.

    Raises `BadInputError` for a solver that is unknown or of the other family, and for more than 1,000 steps.
    """
    distilled = checkpoint.distilled
    if distilled is None:
        return None
    try:
        solver = choose_solver(distilled.solver, checkpoint.config.sampler)
    except UsageError:
        raise BadInputError(
            f"{checkpoint.path}: its metadata says that it was distilled to steps of {distilled.solver[:40]!r}, which "
            f"is no solver of {checkpoint.config.sampler} weights; is the file whole?"
        ) from None
    if distilled.steps > MOST_STEPS:
        raise BadInputError(
            f"{checkpoint.path}: its metadata says that it was distilled to {distilled.steps} steps, more than "
            f"{MOST_STEPS}; is the file whole?"
        )
    return solver, distilled.steps


def usual_sampling(checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER) -> tuple[Solver, int]:
    """Return solver and steps that a checkpoint is sampled by where none are named: its own, else its family's.

    `solvers` are those of each family.
    """
    family = checkpoint.config.sampler
    return own_sampling(checkpoint) or (solvers[family], DEFAULT_STEPS[family])


def told_steps(distilled: Distilled) -> str:
    """Return how a checkpoint was distilled in words, as ``4 steps of euler, with guidance 1.5 in its weights``."""
    guided = distilled.cfg != 1.0 or distilled.guide is not None
    said = f"with {told_guidance(distilled)} in its weights" if guided else "without guidance"
    return f"{told_sampling(distilled.solver, distilled.steps)}, {said}"


def told_guidance(distilled: Distilled) -> str:
    """Return the guidance in the weights in words, as ``guidance 1.5 and guidance 0.5 by a weaker copy``."""
    guidance = [f"guidance {distilled.cfg:g}"] if distilled.cfg != 1.0 else []
    if distilled.guide is not None:
        weaker = f"its {distilled.guide} experts" if distilled.guide in _ROUTINGS else "a weaker copy"
        guidance.append(f"guidance {distilled.guide_scale:g} by {weaker}")
    return " and ".join(guidance) or "no guidance"


def check_unguided(checkpoint: Checkpoint, cfg: float, interval: Interval | None = None) -> None:
    """Raise `UsageError` where a distilled checkpoint is to be guided, as by a scale other than 1."""
    if checkpoint.distilled is None or (cfg == 1.0 and interval is None):
        return
    given = f"⟨cfg⟩ {cfg:g}" if cfg != 1.0 or interval is None else "⟨cfg_interval⟩ {:g},{:g}".format(*interval)
    raise UsageError(
        f"{given}: {checkpoint.name} was distilled to {told_steps(checkpoint.distilled)}, and its null branch means "
        "nothing; leave it out"
    )


def other_steps(checkpoint: Checkpoint, solver: Solver, steps: int) -> str | None:
    """Return a warning of what sampling a distilled checkpoint by other steps than its own costs; None where by own."""
    own = own_sampling(checkpoint)
    if own is None or own == (solver, steps):
        return None
    by = told_sampling(solver, steps)
    return (
        f"warning: {checkpoint.name}: distilled to {told_sampling(*own)}, and sampled by {by}: its weights are right "
        "at its own times only, and images get worse than the original's; distill again for these steps"
    )


def told_sampling(solver: str, count: int) -> str:
    """Return steps in words, as ``4 steps of euler``."""
    name = next((info.name for key, info in SOLVERS.items() if key == solver), solver)
    return f"{count} step{'' if count == 1 else 's'} of {name}"
