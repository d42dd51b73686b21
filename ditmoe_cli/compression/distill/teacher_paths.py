"""Paths of an original from noise to its images, as far as a student of few steps follows them.

A student of N steps follows z_0 (noise), z_1, …, z_N (image), of which the original's solver, in a multiple of N steps,
passes each: of DDPM's some at the timestep beside the student's. Its own steps are affine in its prediction f,

    z' = a z + b f(z, t)

with a = 1, b = -1 / N of Euler's steps of a rectified flow; and of DDIM's from ᾱ to ᾱ' a = √(ᾱ' / ᾱ),
b = √(1 - ᾱ') - a √(1 - ᾱ). So its target, with which it gets from z_i to z_{i+1}, is (z_{i+1} - a z_i) / b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.distill.distilling import STUDENT_SOLVER
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.diffusion.forward_process import sampling_schedule
from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import evaluation_times, flow_times
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Denoiser, DiTMoE
from ditmoe_cli.progress import phase

PURPOSE = "distilling"


@dataclass(frozen=True)
class StudentSteps:
    """The steps of a student: times t, a and b of each (N,)."""

    times: Tensor
    keep: Tensor
    gain: Tensor

    def __len__(self) -> int:
        return len(self.times)

    def advanced(self, z: Tensor, prediction: Tensor, step: Tensor) -> Tensor:
        """Return z (n, C, S, S) after the steps of numbers (n,), by predictions of at least C channels."""
        keep, gain = (_over(part, step) for part in (self.keep, self.gain))
        return keep * z + gain * prediction[:, : z.shape[1]]

    def target(self, z: Tensor, after: Tensor, step: Tensor) -> Tensor:
        """Return the prediction that leads from z to `after` in the steps of numbers (n,)."""
        keep, gain = (_over(part, step) for part in (self.keep, self.gain))
        return (after - keep * z) / gain


def _over(values: Tensor, step: Tensor) -> Tensor:
    return values[step].reshape(-1, 1, 1, 1)


def student_steps(family: Sampler, steps: int, device: torch.device) -> StudentSteps:
    """Return the steps of a student of weights of a family."""
    if family == "rf":
        times = torch.tensor(flow_times(steps), device=device)
        return StudentSteps(times, torch.ones_like(times), torch.full_like(times, -1 / steps))
    schedule = sampling_schedule(STUDENT_SOLVER[family], steps)
    here, after = schedule.alphas_bar.flip(0), schedule.alphas_bar_prev.flip(0)
    keep = (after / here).sqrt()
    gain = (1 - after).sqrt() - keep * (1 - here).sqrt()
    times = torch.tensor(schedule.timesteps).flip(0)
    return StudentSteps(*(part.float().to(device) for part in (times, keep, gain)))


@dataclass(frozen=True)
class Paths:
    """P paths.

    Attributes:
        z: (P, K + 1, C, S, S) the states that are kept, from noise to image, fp32.
        labels: (P,) classes.
    """

    z: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.z)

    def at(self, rows: Tensor | slice) -> Paths:
        """Return some of them."""
        return Paths(self.z[rows], self.labels[rows])

    def in_steps(self, steps: int) -> Paths:
        """Return them as a student of some steps, which divide K, follows them."""
        return Paths(self.z[:, :: (self.z.shape[1] - 1) // steps], self.labels)


def sampled_paths(
    teacher: DiTMoE,
    spec: SampleSpec,
    kept: int,
    batch: FittingBatches,
    weak: Denoiser | None = None,
    rows: range | None = None,
) -> Paths:
    """Return the teacher's paths to the images of `spec`, of which `kept` states and the images are kept.

    `weak` is the model of the spec's guide. With `rows` they are those of these images alone.
    """
    parts, chosen = list[Tensor](), range(spec.images) if rows is None else rows
    with phase("sampling from the original", len(chosen), "images") as progress:
        for some, part in batch.computed(
            lambda rows: _path(teacher, spec, kept, chosen[rows.start : rows.stop], weak), len(chosen)
        ):
            parts.append(part)
            progress(len(some))
    return Paths(torch.cat(parts), torch.tensor(spec.labels(chosen)))


def _path(teacher: DiTMoE, spec: SampleSpec, kept: int, indices: Sequence[int], weak: Denoiser | None) -> Tensor:
    starts = list(dict.fromkeys(evaluation_times(spec.solver, spec.steps)))
    wanted, states = frozenset(starts[:: spec.steps // kept]), dict[float, Tensor]()

    def through(predict: Predictor) -> Predictor:
        def watched(x: Tensor, t: float) -> Tensor:
            if t in wanted:  # Heun's method asks at an estimate of the next state before it asks at that
                states[t] = x.float().cpu()
            return predict(x, t)

        return watched

    images = sample_batch(teacher, spec, indices, Watchers(through=through), PURPOSE, weak)
    return torch.stack([*states.values(), images.float().cpu()], dim=1)
