"""Compare how near solvers come to the flow's solution in few steps, and how near their images come to real ones.

    python examples/benchmarks/solvers.py demo:digits --images 256
    python examples/benchmarks/solvers.py cifar10.pt --images 32 --cfg 1.5
    python examples/benchmarks/solvers.py digits-ddpm.pt --images 512 --seeds 0 1 2 --digits

Prints a Markdown table of relative squared errors ‖z - z*‖² / ‖z*‖² of final images by solver and steps, the mean over
seeds, z* being the flow's solution: Adams-Bashforth of order 4 in `--reference` steps for rectified flow, DDIM for DDPM
weights. A star marks errors no larger than that of 50 steps of Euler or DDIM. Ancestral sampling follows no flow and so
has no error.

With ``--digits`` a second table holds Fréchet distances to scikit-learn's digits over raw pixels of 0 to 16, mean and
deviation over seeds, also of what upstream samples with and of the flow's solution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.schedule import SOLVERS, UPSTREAM, Solver
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser
from ditmoe_cli.model.loading import build_model

STEPS = (5, 8, 10, 12, 16, 20, 30, 50)
Setting = tuple[Solver, int]
# The solution of each family's flow, and the steps whose error is good enough.
SOLUTION: Mapping[Sampler, Setting] = {"rf": ("ab4", 200), "ddpm": ("ddim", 500)}
ENOUGH: Mapping[Sampler, Setting] = {"rf": ("euler", 50), "ddpm": ("ddim", 50)}


@dataclass
class Study:
    """A model, how many images of which seeds to sample, and the solution of each seed."""

    model: Denoiser
    spec: SampleSpec
    seeds: Sequence[int]
    real: FeatureStatistics | None
    solutions: dict[int, torch.Tensor] = field(default_factory=dict)

    def images(self, setting: Setting, seed: int) -> torch.Tensor:
        """Sample all images of a seed, fp64 (N, C, S, S)."""
        spec = replace(self.spec, solver=setting[0], steps=setting[1], seed=seed)
        return torch.cat([sample_batch(self.model, spec, part) for part in batches(spec.images, 256)]).double()

    def solve(self, setting: Setting) -> list[float]:
        """Sample and keep the solution of each seed; return their distances to real images."""
        self.solutions = {seed: self.images(setting, seed) for seed in self.seeds}
        return [self.distance(images) for images in self.solutions.values()]

    def measure(self, setting: Setting) -> tuple[float, list[float]]:
        """Return the mean relative squared error over seeds, and each seed's distance to real images."""
        found = {seed: self.images(setting, seed) for seed in self.seeds}
        errors = [error(images, self.solutions[seed]) for seed, images in found.items()]
        return float(np.mean(errors)), [self.distance(images) for images in found.values()]

    def distance(self, images: torch.Tensor) -> float:
        """Return the Fréchet distance of images to real ones; NaN where there are none."""
        if self.real is None:
            return float("nan")
        pixels = (images.clamp(-1, 1) + 1).mul(8).reshape(len(images), -1).numpy()
        return frechet_distance(feature_statistics(pixels), self.real)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative squared error."""
    return float((found - exact).square().sum() / exact.square().sum())


def digits() -> FeatureStatistics:
    """Return the statistics of scikit-learn's digits, 64 pixels of 0 to 16."""
    from sklearn.datasets import load_digits

    pixels: NDArray[np.float64] = load_digits().data
    return feature_statistics(pixels)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def print_table(
    steps: Sequence[int], solvers: Sequence[Solver], cell: Callable[[Setting], str], names: Sequence[str]
) -> None:
    """Print a Markdown table with a column a solver."""
    print("\n| steps | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for count in steps:
        print(f"| {count} | " + " | ".join(cell((solver, count)) for solver in solvers) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--reference", type=int, help="steps of the solution; by default 200 for rf, 500 for ddpm")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--digits", action="store_true", help="measure Fréchet distances to scikit-learn's digits too")
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.checkpoint)
    family = checkpoint.config.sampler
    solver, steps = SOLUTION[family]
    solution = (solver, options.reference or steps)
    spec = SampleSpec(options.images, solution[1], options.cfg, 0, solver, tuple(range(checkpoint.config.num_classes)))
    model = build_model(checkpoint, torch.device("cpu"))
    study = Study(model, spec, options.seeds, digits() if options.digits else None)
    exact = study.solve(solution)
    enough = study.measure(ENOUGH[family])[0]
    solvers: list[Solver] = [solver for solver, kind in SOLVERS.items() if kind.family == family]
    measured = {
        (solver, count): study.measure((solver, count)) for solver in solvers for count in sorted(options.steps)
    }

    def error_cell(setting: Setting) -> str:
        value = measured[setting][0]
        return f"{value:.2e}{' *' if value <= enough else ''}"

    followed: list[Solver] = [solver for solver in solvers if solver != "ddpm"]
    print_table(options.steps, followed, error_cell, [SOLVERS[solver].name for solver in followed])
    if options.digits:
        names = [SOLVERS[solver].name for solver in solvers]
        print_table(options.steps, solvers, lambda setting: spread(measured[setting][1]), names)
        ours = study.measure(UPSTREAM[family])[1]
        print(f"\nupstream's {UPSTREAM[family][1]} steps of {UPSTREAM[family][0]}: {spread(ours)}")
        print(f"the solution, {solution[1]} steps of {solution[0]}: {spread(exact)}")


if __name__ == "__main__":
    main()
