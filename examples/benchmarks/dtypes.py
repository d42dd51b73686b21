"""Measure what computing in another dtype than fp32 changes: routing, predictions and images.

    python examples/benchmarks/dtypes.py demo:digits --images 512
    python examples/benchmarks/dtypes.py cifar10.pt --images 64 --cfg 1.5
    python examples/benchmarks/dtypes.py random:S --blocks 4 --images 4 --steps 8

Samples the same seeds in each dtype. Prints a Markdown table with, for each dtype:

- the share of tokens that go to another set of experts than in fp32, at the states that fp32 passes through at
  `--times` of its steps: the mean over blocks, and the block with most;
- ‖v - v_fp32‖ / ‖v_fp32‖ of predictions v at these states, by time, noise first, and as `--dtype auto` measures it;
- the mean squared error of images on the card's grey levels, and the Fréchet distance over pixels, to those in fp32;
- processor time of sampling over that in fp32, on one thread.

Its last row is fp32 from other seeds, for scale. ``random:S`` is a model of random weights in pixels of 32 x 32, in the
shape of a published one, of `--blocks` blocks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from synthetic_checkpoint import MODELS, config_of, write
from torch import Tensor

from ditmoe_cli.diffusion.automatic_dtype import measured_difference
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER, DEFAULT_STEPS
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.evaluation.features.extractors import PixelExtractor
from ditmoe_cli.evaluation.images import to_uint8
from ditmoe_cli.evaluation.scores.frechet import frechet_of_features
from ditmoe_cli.evaluation.scores.paired_error import paired_error
from ditmoe_cli.evaluation.step_parts import routed_step, share_rerouted
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.dtypes import DTYPES, Dtype, relative_difference, torch_dtype_of
from ditmoe_cli.model.loading import build_model

RANDOM = "random:"
BATCH = 64
CPU = torch.device("cpu")
State = tuple[Tensor, float]  # x (N, C, S, S) and the time t
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Evaluation:
    """A prediction, and the experts (T, k) that each block's router chose in it."""

    prediction: Tensor
    chosen: list[Tensor]


@dataclass(frozen=True)
class Run:
    """What a dtype gave: images, the processor seconds they took, and evaluations at the states of fp32."""

    images: Images
    seconds: float
    evaluations: list[Evaluation]


@dataclass(frozen=True)
class Routed:
    """Shares of tokens that go to another set of experts: the mean over blocks, and that of the block with most."""

    mean: float
    most: float


def sampled(model: DiTMoE, spec: SampleSpec) -> tuple[Images, float]:
    """Sample all images; return them as uint8 (N, H, W, C), and the processor seconds that it took."""
    start = time.process_time()
    pixels = torch.cat([sample_batch(model, spec, part) for part in batches(spec.images, BATCH)])
    return to_uint8(pixels), time.process_time() - start


def states_of(model: DiTMoE, spec: SampleSpec, count: int) -> list[State]:
    """Return up to `count` evenly spaced states that sampling the first batch passes through, with first and last."""
    seen: list[State] = []
    watchers = Watchers(on_step=lambda x, t: seen.append((x.clone(), t)))
    sample_batch(model, spec, next(batches(spec.images, BATCH)), watchers)
    return [seen[int(place)] for place in np.unique(np.linspace(0, len(seen) - 1, count).round())]


def evaluated(model: DiTMoE, spec: SampleSpec, states: Sequence[State]) -> list[Evaluation]:
    """Evaluate a model at states of the first batch."""
    labels = torch.tensor(spec.labels(range(len(states[0][0]))))
    predict = guided_predictor(model, labels, spec.guidance, times=[t for _, t in states])
    with torch.inference_mode():
        return [Evaluation(*routed_step(model, lambda x=x, t=t: predict(x, t))) for x, t in states]


def routed(found: Sequence[Evaluation], exact: Sequence[Evaluation]) -> Routed:
    """Return the shares of tokens that are routed otherwise, over all states."""
    blocks = [
        float(np.mean([share_rerouted([here], [there]) for here, there in zip(of_here, of_there, strict=True)]))
        for of_here, of_there in zip(
            zip(*(each.chosen for each in found), strict=True),
            zip(*(each.chosen for each in exact), strict=True),
            strict=True,
        )
    ]
    return Routed(float(np.mean(blocks)), max(blocks))


def run_in(checkpoint: Checkpoint, dtype: Dtype, spec: SampleSpec, states: Sequence[State]) -> Run:
    """Sample and evaluate in a dtype."""
    model = build_model(checkpoint, CPU, torch_dtype_of(dtype))
    evaluations = evaluated(model, spec, states)  # first, since it also warms up
    images, seconds = sampled(model, replace(spec, dtype=dtype))
    return Run(images, seconds, evaluations)


def distances(images: Images, exact: Images, grey_levels: int) -> str:
    """Return mean squared error and Fréchet distance over pixels, as cells."""
    pixels = PixelExtractor(grey_levels)
    far = frechet_of_features(pixels(images), pixels(exact))
    return f"{paired_error(images, exact, grey_levels).mse:.3g} | {far:.3g}"


def cells(found: Run, exact: Run, auto: float, grey_levels: int) -> str:
    """Return a row's cells."""
    shares = routed(found.evaluations, exact.evaluations)
    far = [
        relative_difference(here.prediction, there.prediction)
        for here, there in zip(found.evaluations, exact.evaluations, strict=True)
    ]
    shown = " | ".join(f"{100 * value:.3g} %" for value in (shares.mean, shares.most, *far, auto))
    return f"{shown} | {distances(found.images, exact.images, grey_levels)} | {found.seconds / exact.seconds:.2f}"


def opened(name: str, blocks: int | None, folder: Path) -> Checkpoint:
    """Open a checkpoint, or write a random one into the folder and open that."""
    if not name.startswith(RANDOM):
        return open_checkpoint(name)
    shape = MODELS[name.removeprefix(RANDOM)]
    path = folder / "random.safetensors"
    write(path, config_of(replace(shape, depth=blocks or shape.depth), channels=3), shape.dtype, "safetensors", 10**10)
    return open_checkpoint(path)


def study(checkpoint: Checkpoint, spec: SampleSpec, dtypes: Sequence[Dtype], times: int) -> None:
    """Print the table of one checkpoint."""
    grey_levels = checkpoint.card.grey_levels
    model = build_model(checkpoint, CPU)
    states = states_of(model, spec, times)
    exact = run_in(checkpoint, "fp32", spec, states)
    at = [f"prediction at {t:.3g}" for _, t in states]
    heads = ["dtype", "routed otherwise", "in the block with most", *at, "by `auto`", "paired MSE", "Fréchet", "time"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for dtype in dtypes:
        auto = measured_difference(checkpoint, str(CPU), dtype)
        print(f"| {dtype} | {cells(run_in(checkpoint, dtype, spec, states), exact, auto, grey_levels)} |", flush=True)
    other, _ = sampled(model, replace(spec, seed=spec.seed + 1))
    blank = " | " * (len(heads) - 5)
    print(f"| another seed |{blank}| {distances(other, exact.images, grey_levels)} | |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a checkpoint, or random:S for random weights of a published shape")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, help="by default those of sample")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--times", type=int, default=3, help="evaluations of which routing and predictions are compared"
    )
    parser.add_argument("--blocks", type=int, help="of random weights")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = opened(options.checkpoint, options.blocks, Path(folder))
        family, classes = checkpoint.config.sampler, tuple(range(checkpoint.config.num_classes))
        steps = options.steps or DEFAULT_STEPS[family]
        spec = SampleSpec(options.images, steps, options.cfg, options.seed, DEFAULT_SOLVER[family], classes)
        study(checkpoint, spec, options.dtypes, options.times)


if __name__ == "__main__":
    main()
