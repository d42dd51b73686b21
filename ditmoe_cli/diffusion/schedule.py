"""Solvers by name, with the family of weights and the times of model evaluations of each. Torch-free.

Rectified-flow models are evaluated at t in (0, 1], 1 being noise; DDPM models at timesteps 0 to 999, 999 being noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Literal

from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.config import DiTMoEConfig, Sampler

Solver = Literal["euler", "heun", "ab2", "ab3", "ab4", "dpmpp-2m", "ddim", "ddim-trailing", "ddpm", "ddpm-dpmpp-2m"]
Interval = tuple[float, float]
ALWAYS: Interval = (0.0, 1.0)
TRAINING_STEPS = 1000


@dataclass(frozen=True)
class SolverInfo:
    """A solver: the family of its weights, the name that users give, and a summary."""

    family: Sampler
    name: str
    summary: str


SOLVERS: Mapping[Solver, SolverInfo] = {
    "euler": SolverInfo("rf", "euler", "equal Euler steps, upstream's"),
    "heun": SolverInfo("rf", "heun", "Heun's second-order steps, two evaluations each"),
    "ab2": SolverInfo("rf", "ab2", "Adams-Bashforth of order 2"),
    "ab3": SolverInfo("rf", "ab3", "Adams-Bashforth of order 3, its first two steps Heun's"),
    "ab4": SolverInfo("rf", "ab4", "Adams-Bashforth of order 4"),
    "dpmpp-2m": SolverInfo("rf", "dpmpp-2m", "DPM-Solver++(2M)"),
    "ddim": SolverInfo("ddpm", "ddim", "DDIM, eta 0, upstream's spacing"),
    "ddim-trailing": SolverInfo("ddpm", "ddim-trailing", "DDIM, eta 0, equal steps from timestep 999"),
    "ddpm": SolverInfo("ddpm", "ddpm", "ancestral sampling"),
    "ddpm-dpmpp-2m": SolverInfo("ddpm", "dpmpp-2m", "DPM-Solver++(2M)"),
}
# The cheapest that matched what upstream samples with when measured: 50 Euler steps, or 250 ancestral ones.
DEFAULT_SOLVER: Mapping[Sampler, Solver] = {"rf": "ab2", "ddpm": "ddpm-dpmpp-2m"}
DEFAULT_STEPS: Mapping[Sampler, int] = {"rf": 16, "ddpm": 20}
CALIBRATION_SOLVER: Mapping[Sampler, Solver] = {"rf": "euler", "ddpm": "ddim"}
# How DiT-MoE's authors sampled: 50 Euler steps, or 250 ancestral steps.
UPSTREAM: Mapping[Sampler, tuple[Solver, int]] = {"rf": ("euler", 50), "ddpm": ("ddpm", 250)}


def solver_names(family: Sampler) -> list[str]:
    """Return the names of the solvers for weights of a family."""
    return [info.name for info in SOLVERS.values() if info.family == family]


def choose_solver(solver: str | None, family: Sampler, default: Mapping[Sampler, Solver] = DEFAULT_SOLVER) -> Solver:
    """Return the solver for weights of a family, `default` where none is named.

    Raises `UsageError` for an unknown solver and for one of the other family.
    """
    if solver is None:
        return default[family]
    candidates = [key for key, info in SOLVERS.items() if solver in (key, info.name)]
    fitting = next((key for key in candidates if SOLVERS[key].family == family), None)
    if fitting is not None:
        return fitting
    if not candidates:
        raise UsageError(f"⟨solver⟩ {solver}: unknown; choose {', '.join(solver_names(family))}")
    raise UsageError(f"⟨solver⟩ {solver}: is not for {family} weights; choose {', '.join(solver_names(family))}")


def flow_times(steps: int) -> list[float]:
    """Return the times 1, (steps - 1) / steps, …, 1 / steps at which equal steps of a rectified flow start."""
    return [i / steps for i in range(steps, 0, -1)]


def ancestral_timesteps(steps: int) -> list[int]:
    """Return `steps` timesteps from 0 to 999, evenly spaced and rounded (upstream's spacing ``"N"``).

    Positions are summed up as upstream sums them: near a half, i * stride would round otherwise. A single step is at
    999, not at 0 as upstream has it: the model would take noise at timestep 0 for an image and return it.
    """
    if steps == 1:
        return [TRAINING_STEPS - 1]
    stride = (TRAINING_STEPS - 1) / (steps - 1)
    return [round(position) for position in accumulate(repeat(stride, steps - 1), initial=0.0)]


def ddim_timesteps(steps: int) -> list[int]:
    """Return `steps` timesteps at the smallest integer stride that yields exactly that many (``"ddimN"``).

    Where no stride does, which upstream refuses, they are ⌊1000 i / steps⌋, so that the last is near pure noise too. A
    single step is at 999, as in `ancestral_timesteps`.
    """
    if steps == 1:
        return [TRAINING_STEPS - 1]
    strides = (s for s in range(1, TRAINING_STEPS + 1) if len(range(0, TRAINING_STEPS, s)) == steps)
    stride = next(strides, None)
    return list(range(0, TRAINING_STEPS, stride)) if stride else [i * TRAINING_STEPS // steps for i in range(steps)]


def data_timesteps(steps: int) -> list[int]:
    """Return round(999 i / steps) for i = 1 … steps: even steps from 999, the last of which ends on the image.

    For DPM-Solver++, which extrapolates on the scale ln(α / σ): a point at timestep 0 would make its last step huge.
    """
    return [round((TRAINING_STEPS - 1) * i / steps) for i in range(1, steps + 1)]


def trailing_timesteps(steps: int) -> list[int]:
    """Return round(1000 i / steps) - 1 for i = 1 … steps: equal steps from 999, the last of which ends on the image.

    diffusers' ``timestep_spacing="trailing"`` (https://huggingface.co/docs/diffusers/api/schedulers/ddim;
    https://arxiv.org/abs/2305.08891, table 2). Where `steps` divides M, these are among those of M steps.
    """
    return [round(TRAINING_STEPS * i / steps) - 1 for i in range(1, steps + 1)]


_TIMESTEPS: Mapping[Solver, Callable[[int], list[int]]] = {
    "ddim": ddim_timesteps,
    "ddim-trailing": trailing_timesteps,
    "ddpm": ancestral_timesteps,
    "ddpm-dpmpp-2m": data_timesteps,
}


def ddpm_timesteps(solver: Solver, steps: int) -> list[int]:
    """Return the timesteps, ascending, of a solver for DDPM weights."""
    return _TIMESTEPS[solver](steps)


HEUN_STARTS = 2  # steps of ab3 that lack the history which the others have


def evaluation_times(solver: Solver, steps: int) -> list[float]:
    """Return the time of every model evaluation, in order.

    Heun's method evaluates at both ends of each step, except at the very last end, t = 0.
    """
    if SOLVERS[solver].family == "ddpm":
        return [float(t) for t in reversed(ddpm_timesteps(solver, steps))]
    starts = flow_times(steps)
    twice = {"heun": steps, "ab3": HEUN_STARTS}.get(solver, 0)
    ends = zip(starts[:twice], [*starts[1:], 0.0], strict=False)
    return [t for start, end in ends for t in (start, end) if t > 0] + starts[twice:]


def noise_level(t: float, family: Sampler) -> float:
    """Return a time on the scale 0 (image) to 1 (noise)."""
    return t if family == "rf" else t / (TRAINING_STEPS - 1)


def check_guidance(scale: float, config: DiTMoEConfig) -> None:
    """Raise `UsageError` for a scale that is negative or not finite, and for one that needs a missing null class."""
    if not 0.0 <= scale < float("inf"):
        raise UsageError(f"⟨cfg⟩ {scale}: must be a finite guidance scale of at least 0")
    if scale != 1.0 and not config.null_class:
        raise UsageError(
            f"⟨cfg⟩ {scale:g}: the checkpoint was trained without class dropout and has no null class to guide away "
            "from; only ⟨cfg⟩ 1 is possible"
        )


def is_guided(t: float, scale: float, family: Sampler, interval: Interval = ALWAYS) -> bool:
    """Return whether guidance takes both branches at a time: scale other than 1, noise level inside the interval."""
    return scale != 1.0 and interval[0] <= noise_level(t, family) <= interval[1]
