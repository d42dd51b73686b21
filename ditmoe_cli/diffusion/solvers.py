"""Solvers by name, and which family of weights each one integrates. Torch-free, so that options can name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.config import Sampler

Solver = Literal["euler", "ddim", "ddpm"]


@dataclass(frozen=True)
class SolverInfo:
    """The family a solver is for, and what it is."""

    family: Sampler
    summary: str


SOLVERS: Mapping[Solver, SolverInfo] = {
    "euler": SolverInfo("rf", "Euler steps of the rectified flow, upstream's"),
    "ddim": SolverInfo("ddpm", "DDIM, eta 0"),
    "ddpm": SolverInfo("ddpm", "DDPM ancestral sampling"),
}
DEFAULT_SOLVER: Mapping[Sampler, Solver] = {"rf": "euler", "ddpm": "ddim"}


def choose_solver(solver: str | None, family: Sampler) -> Solver:
    """Return the solver to use for weights of a family. Raises `UsageError` where it is unknown or does not fit."""
    if solver is None:
        return DEFAULT_SOLVER[family]
    known = next((name for name in SOLVERS if name == solver), None)
    if known is None:
        raise UsageError(f"--solver {solver}: unknown; choose {', '.join(SOLVERS)}")
    if SOLVERS[known].family != family:
        fitting = ", ".join(name for name, info in SOLVERS.items() if info.family == family)
        raise UsageError(f"--solver {solver}: is not for {family} weights; choose {fitting}")
    return known
