"""Solvers by name, and which family of weights each one integrates. Torch-free, so that options can name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.config import Sampler

Solver = Literal["euler", "ddim", "ddpm"]


SOLVERS: Mapping[Solver, Sampler] = {
    "euler": "rf",  # equal Euler steps, upstream's
    "ddim": "ddpm",  # DDIM, eta 0
    "ddpm": "ddpm",  # ancestral sampling
}
DEFAULT_SOLVER: Mapping[Sampler, Solver] = {"rf": "euler", "ddpm": "ddim"}


def choose_solver(solver: str | None, family: Sampler) -> Solver:
    """Return the solver to use for weights of a family. Raises `UsageError` where it is unknown or does not fit."""
    if solver is None:
        return DEFAULT_SOLVER[family]
    known = next((name for name in SOLVERS if name == solver), None)
    if known is None:
        raise UsageError(f"--solver {solver}: unknown; choose {', '.join(SOLVERS)}")
    if SOLVERS[known] != family:
        fitting = ", ".join(name for name, fitted in SOLVERS.items() if fitted == family)
        raise UsageError(f"--solver {solver}: is not for {family} weights; choose {fitting}")
    return known
