"""A model's own way from noise to images: its inputs and predictions at every evaluation of one way of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_predictor
from ditmoe_cli.diffusion.solvers import integrate
from ditmoe_cli.model.block_choices import ComputeTable, full_table
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.model.scheduled import ComputeCount, Statistics, no_statistics

PURPOSE = "schedule"
"""The noise that schedules are chosen on; no other images have it."""


@dataclass(frozen=True)
class Way:
    """A model with the way in which it is sampled, for some images.

    Attributes:
        model: the model.
        sampling: solver, steps and guidance.
        seed: of the noise.
        classes: image i has the label ``classes[i mod len(classes)]``.
        weak: the weaker model that guides, if any.
    """

    model: DiTMoE
    sampling: ScheduledSampling
    seed: int
    classes: tuple[int, ...]
    weak: Denoiser | None = None

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Return the labels of images (N,)."""
        return torch.tensor([self.classes[i % len(self.classes)] for i in indices], device=self.model.device)

    def shown(self, final: Tensor) -> Tensor:
        """Return final images as they are seen: pixels are clipped to -1 to 1, latents are as they are."""
        return final.clamp(-1.0, 1.0) if self.model.config.pixel_space else final


@dataclass(frozen=True)
class Visited:
    """What a model was asked for N images, at each of K evaluations, and what came of it.

    Attributes:
        states: (K, N, C, H, W) the images that it was given.
        predictions: (K, N, C', H, W) its guided predictions.
        final: (N, C, H, W) where the images ended.
        flops: operations of an image.
    """

    states: Tensor
    predictions: Tensor
    final: Tensor
    flops: float


def visited(way: Way, indices: Sequence[int]) -> Visited:
    """Return the way of the images `indices` with everything computed."""
    states: list[Tensor] = []
    predictions: list[Tensor] = []
    counts: list[ComputeCount] = []
    times, guidance = way.sampling.times, way.sampling.guidance
    plain = Scheduled(full_table(len(times), way.model.config.depth, way.sampling.null), counted=counts.append)
    predict = scheduled_predictor(way.model, way.labels(indices), guidance, times, plain, way.weak)

    def kept(x: Tensor, t: float) -> Tensor:
        states.append(x)
        predictions.append(predict(x, t))
        return predictions[-1]

    final = _integrated(way, indices, kept)
    return Visited(torch.stack(states), torch.stack(predictions), final, counts[0].total / len(final))


@dataclass(frozen=True)
class Outcome:
    """Where images end by a table (N, C, H, W), what was computed, and the operations an image."""

    final: Tensor
    count: ComputeCount

    @property
    def flops(self) -> float:
        """Operations of an image."""
        return self.count.total / len(self.final)


def by_table(
    way: Way,
    indices: Sequence[int],
    table: ComputeTable,
    statistics: Statistics = no_statistics,
    before: Sequence[Tensor] = (),
    slopes: Tensor | None = None,
) -> Outcome:
    """Return where the images `indices` end where compute goes by a table, with slopes where predictions follow.

    Predictions `before` stand for those of the first evaluations, which compute everything.
    """
    counts: list[ComputeCount] = []
    first = len(before)
    rest = ComputeTable(table.choices, table.cells[first:], table.null[first:], table.residual)
    known = None if slopes is None else slopes[first:]
    scheduled = Scheduled(rest, lambda k, branch, block: statistics(first + k, branch, block), counts.append, known)
    guidance, times = way.sampling.guidance, way.sampling.times[first:]
    predict = scheduled_predictor(way.model, way.labels(indices), guidance, times, scheduled, way.weak)
    kept = iter(before)

    def predicted(x: Tensor, t: float) -> Tensor:
        known = next(kept, None)
        return predict(x, t) if known is None else known

    return Outcome(_integrated(way, indices, predicted), counts[0])


def by_solver(way: Way, indices: Sequence[int], sampling: ScheduledSampling) -> Tensor:
    """Return where the images `indices` end by another solver or number of steps, everything computed."""
    predict = guided_predictor(way.model, way.labels(indices), sampling.guidance, times=sampling.times, weak=way.weak)
    return _integrated(way, indices, predict, sampling)


def _integrated(
    way: Way, indices: Sequence[int], predict: Predictor, sampling: ScheduledSampling | None = None
) -> Tensor:
    config, sampling = way.model.config, sampling or way.sampling
    shape = (config.in_channels, config.input_size, config.input_size)
    stream = image_noise(way.seed, indices, way.model.device, PURPOSE)
    with torch.inference_mode():
        return integrate(sampling.solver, sampling.steps, predict, stream.draw(shape), lambda _: stream.draw(shape))
