"""How much of what a prediction changes from step to step follows from the state: a table by tenths of the way.

    python followed_predictions.py ../shared/digits-ddpm/checkpoint.pt --way ddpm:250

Slopes are fitted to half of the images, and judged on the others. With o and o' the predictions of two steps, the share
that is left is Σ‖o - ô‖² / Σ‖o - o'‖²: 1 for reuse of the prediction, 0 where it is known without asking the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.followed_predictions import following, slopes_at
from ditmoe_cli.diffusion.schedule import choose_solver
from ditmoe_cli.model.checkpoint import open_checkpoint, resolve_path
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.scheduling.way_states import Visited, Way, visited

PARTS = 10


def share_left(seen: Visited, evaluation: int, extrapolates: bool) -> float:
    """Return the share of a change from one evaluation to the next that slopes leave, on the second half of images."""
    half, channels = seen.states.shape[1] // 2, seen.states.shape[2]
    last, before = evaluation - 1, evaluation - 2 if extrapolates else None
    slopes = slopes_at(seen.states[:, :half], seen.predictions[:, :half], evaluation, last, before)
    state, predicted = seen.states[:, half:], seen.predictions[:, half:]
    kept = state[last], predicted[last]
    found = following(slopes, state[evaluation], kept, None if before is None else predicted[before])
    return energy(predicted[evaluation] - found, channels) / energy(predicted[evaluation] - predicted[last], channels)


def energy(off: Tensor, channels: int) -> float:
    """Return Σ off² over the channels of the state."""
    return float(off[:, :channels].double().square().sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of one way of sampling."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file, a folder or demo:digits")
    parser.add_argument("--way", default="euler:50", help="solver and steps, as euler:50, ddim:50 or ddpm:250")
    parser.add_argument("--images", type=int, default=24)
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(resolve_path(options.checkpoint, lambda _: None).absolute())
    solver, _, steps = options.way.partition(":")
    sampling = ScheduledSampling(choose_solver(solver, checkpoint.config.sampler), int(steps))
    model = build_model(checkpoint, torch.device("cpu"), torch.float32).prepack()
    way = Way(model, sampling, 0, tuple(range(checkpoint.config.num_classes)))
    seen = visited(way, range(options.images))
    print("| steps | change, relative | left by the state (a) | left by both (a, b) |\n|---|---|---|---|")
    evaluations, channels = len(sampling.times), checkpoint.config.in_channels
    for part in range(PARTS):
        inside = [k for k in range(evaluations) if k * PARTS // evaluations == part and k >= 2]
        changes = [
            (energy(seen.predictions[k] - seen.predictions[k - 1], channels) / energy(seen.predictions[k], channels))
            ** 0.5
            for k in inside
        ]
        left = [sum(share_left(seen, k, both) for k in inside) / len(inside) for both in (False, True)]
        print(f"| {inside[0]} to {inside[-1]} | {sum(changes) / len(changes):.3f} | {left[0]:.3f} | {left[1]:.3f} |")


if __name__ == "__main__":
    main()
