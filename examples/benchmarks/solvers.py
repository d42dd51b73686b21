"""Compare how near solvers come to the flow's solution in few steps.

    python examples/benchmarks/solvers.py demo:digits --images 256
    python examples/benchmarks/solvers.py cifar10.pt --images 32 --cfg 1.5

Prints a Markdown table of relative squared errors ‖z - z*‖² / ‖z*‖² of final images by solver and steps, z* being those
of Adams-Bashforth of order 4 in `--reference` steps. A star marks errors
no larger than that of upstream's 50 Euler steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.schedule import SOLVERS, Solver
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.dit import Denoiser
from ditmoe_cli.model.loading import build_model

STEPS = (5, 8, 10, 12, 16, 20, 30, 50)


def images(model: Denoiser, spec: SampleSpec) -> torch.Tensor:
    """Sample all images of a spec."""
    return torch.cat([sample_batch(model, spec, part) for part in batches(spec.images, 64)]).double()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative squared error."""
    return float((found - exact).square().sum() / exact.square().sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--reference", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.checkpoint)
    if checkpoint.config.sampler != "rf":
        raise SystemExit("this compares solvers of rectified flow")
    model = build_model(checkpoint, torch.device("cpu"))
    classes = tuple(range(checkpoint.config.num_classes))
    spec = SampleSpec(options.images, options.reference, options.cfg, 0, "ab4", classes)
    exact = images(model, spec)
    upstream = error(images(model, replace(spec, solver="euler", steps=50)), exact)
    solvers: list[Solver] = [solver for solver, kind in SOLVERS.items() if kind.family == "rf"]
    print("| steps | " + " | ".join(solvers) + " |\n|---" + "|---" * len(solvers) + "|")
    for steps in options.steps:
        found = [error(images(model, replace(spec, solver=solver, steps=steps)), exact) for solver in solvers]
        cells = (f"{value:.2e}{' *' if value <= upstream else ''}" for value in found)
        print(f"| {steps} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
