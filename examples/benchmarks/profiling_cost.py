"""Measure the time of profile-experts over that of plain sampling of the same images.

    python examples/benchmarks/profiling_cost.py --images 4 --steps 4

Builds a DiT-MoE-S/2-8E2A of random weights (0.2 B parameters, 256 tokens), and times plain sampling, ``--fast`` and the
full profile in turn, several rounds in one process; prints the least processor time of each and the ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.routing.calibration_settings import STEPS, Calibration, usual_images
from ditmoe_cli.routing.collect.collector import PURPOSE, collect

S_2_8E = DiTMoEConfig(
    input_size=32,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    hidden_size=384,
    depth=12,
    num_heads=6,
    num_classes=1000,
    top_k=2,
    attention="timm",
    sampler="rf",
    blocks=(BlockConfig(router_rows=8, expert_widths=(1536,) * 8, shared_width=768),) * 12,
)


def random_model(config: DiTMoEConfig) -> DiTMoE:
    """Return a model of random weights on the scale of trained ones."""
    model = DiTMoE(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02)
    return model.eval().requires_grad_(False)


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Time the three in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(S_2_8E)
    spec = SampleSpec(options.images, options.steps, 1.0, 0, "euler", tuple(range(1000)))
    indices = range(options.images)
    # the share of all tokens that the defaults keep: a sixth, 20,480 of 24 images x 20 steps x 256 tokens
    evaluations, patches = options.images * options.steps, S_2_8E.num_patches
    share = Calibration.reservoir / (usual_images(patches) * STEPS * patches)
    reservoir = max(round(evaluations * patches * share), evaluations)
    full = Calibration(spec, bins=options.steps, reservoir=reservoir, batch=options.images)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: sample_batch(model, spec, indices, purpose=PURPOSE),
        "fast": lambda: collect(model, replace(full, fast=True)),
        "full": lambda: collect(model, full),
    }
    runs["plain"]()
    times = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    least = {name: min(values) for name, values in times.items()}
    for name, value in least.items():
        print(f"{name:<6} {value:7.2f} s   {value / least['plain']:.3f} x plain")


if __name__ == "__main__":
    main()
