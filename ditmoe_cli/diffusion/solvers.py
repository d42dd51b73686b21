"""Solvers by name, and which family of weights each one integrates. Torch-free, so that options can name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.config import Sampler

Solver = Literal["euler", "heun", "ab2", "ab4", "dpmpp-2m", "ddim", "ddpm", "ddpm-dpmpp-2m"]


@dataclass(frozen=True)
class Kind:
    """The family that a solver is for, the name it is asked for by, and what it does."""

    family: Sampler
    name: str
    summary: str


SOLVERS: Mapping[Solver, Kind] = {
    "euler": Kind("rf", "euler", "equal Euler steps, upstream's"),
    "heun": Kind("rf", "heun", "Heun's second-order steps, two evaluations each"),
    "ab2": Kind("rf", "ab2", "Adams-Bashforth of order 2"),
    "ab4": Kind("rf", "ab4", "Adams-Bashforth of order 4"),
    "dpmpp-2m": Kind("rf", "dpmpp-2m", "DPM-Solver++(2M)"),
    "ddim": Kind("ddpm", "ddim", "DDIM, eta 0, upstream's spacing"),
    "ddpm": Kind("ddpm", "ddpm", "ancestral sampling"),
    "ddpm-dpmpp-2m": Kind("ddpm", "dpmpp-2m", "DPM-Solver++(2M)"),
}
# the cheapest that was measured to match upstream's 50 Euler steps; no DDPM weights were at hand to measure with
DEFAULT_SOLVER: Mapping[Sampler, Solver] = {"rf": "ab2", "ddpm": "ddim"}
DEFAULT_STEPS: Mapping[Sampler, int] = {"rf": 16, "ddpm": 20}
CALIBRATION_SOLVER: Mapping[Sampler, Solver] = {"rf": "euler", "ddpm": "ddim"}
# what DiT-MoE's authors sampled with: 50 Euler steps, or 250 ancestral ones
UPSTREAM: Mapping[Sampler, tuple[Solver, int]] = {"rf": ("euler", 50), "ddpm": ("ddpm", 250)}


def solver_names(family: Sampler) -> list[str]:
    """Return the names of the solvers for weights of a family."""
    return [kind.name for kind in SOLVERS.values() if kind.family == family]


def choose_solver(solver: str | None, family: Sampler, default: Mapping[Sampler, Solver] = DEFAULT_SOLVER) -> Solver:
    """Return the solver to use for weights of a family. Raises `UsageError` where it is unknown or does not fit."""
    if solver is None:
        return default[family]
    named = [key for key, kind in SOLVERS.items() if solver in (key, kind.name)]
    fitting = next((key for key in named if SOLVERS[key].family == family), None)
    if fitting is not None:
        return fitting
    if not named:
        raise UsageError(f"--solver {solver}: unknown; choose {', '.join(solver_names(family))}")
    raise UsageError(f"--solver {solver}: is not for {family} weights; choose {', '.join(solver_names(family))}")
