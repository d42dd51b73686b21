"""States that a model is trained on, with what its teacher predicts there.

`NoisedImages` are images that the forward process noises to times and by noise that differ from state to state; the
teacher predicts each time that a state is asked for. `TeacherStates` are states whose predictions are kept, as those
that judge (`kept_states`).

Targets are guided predictions v = s v_c - (s - 1) v_u. A rectified flow's second half of the output means nothing and
is left out; DDPM's learned variance is kept beside the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.diffusion.forward_process import interpolate, respaced_schedule
from ditmoe_cli.diffusion.guidance import combine
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import TRAINING_STEPS
from ditmoe_cli.model.config import DiTMoEConfig, Sampler
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.progress import phase

PURPOSE = "healing"
_ROUNDS = 512  # states of each image
_NULL_EVERY = 10


def target_channels(config: DiTMoEConfig) -> int:
    """Return the channels of a target: all of DDPM's output, the first half of a rectified flow's."""
    return config.out_channels if config.sampler == "ddpm" else config.in_channels


def guided_prediction(model: DiTMoE, z: Tensor, t: Tensor, labels: Tensor, cfg: float) -> Tensor:
    """Return the guided prediction (N, channels, S, S), both branches in one batch; with gradients where recorded."""
    channels = target_channels(model.config)
    if cfg == 1.0:
        out: Tensor = model(z, t, labels)
        return out[:, :channels].float()
    null = torch.full_like(labels, model.config.num_classes)
    cond, uncond = model(torch.cat((z, z)), torch.cat((t, t)), torch.cat((labels, null))).float().chunk(2)
    return combine(cond, uncond, cfg, model.config.sampler)[:, :channels]


@dataclass(frozen=True)
class TeacherStates:
    """N states, and the teacher's guided predictions there.

    Attributes:
        z: (N, C, S, S) noisy images, fp32.
        t: (N,) times, as the model is given them.
        labels: (N,) classes.
        targets: (N, channels, S, S) what the teacher predicts.
        cfg: guidance scale s.
    """

    z: Tensor
    t: Tensor
    labels: Tensor
    targets: Tensor
    cfg: float

    def __len__(self) -> int:
        return len(self.z)

    def at(self, rows: Tensor) -> TeacherStates:
        """Return some of the states."""
        return TeacherStates(self.z[rows], self.t[rows], self.labels[rows], self.targets[rows], self.cfg)

    def on(self, device: torch.device) -> TeacherStates:
        """Return the states on a device."""
        z, t, labels, targets = (part.to(device) for part in (self.z, self.t, self.labels, self.targets))
        return TeacherStates(z, t, labels, targets, self.cfg)


class StateSource(Protocol):
    """Where states come from."""

    def __len__(self) -> int:
        """Return how many there are."""

    def at(self, rows: Tensor, /) -> TeacherStates:
        """Return some of them, by their numbers (n,)."""


@dataclass(frozen=True)
class Noising:
    """Images noised anew: state n is image n mod I at a time and with a noise of its own, functions of the seed and n.

    Times cover (0, 1] of a rectified flow, and DDPM's 0 to 999, or `times` alone, evenly, and so do those of each
    image, and of any few neighbouring states.

    Attributes:
        images: (I, C, S, S) latents, or pixels in [-1, 1].
        labels: (I,) their classes.
        family: the forward process.
        seed: of times and noise.
        null: the label of every tenth state in place of its own, so that the unconditional branch is trained too; None
            where guidance trains it, or there is none.
        purpose: noise of each has seeds of its own.
        times: of a model that knows no others; empty for all.
    """

    images: Tensor
    labels: Tensor
    family: Sampler
    seed: int
    null: int | None = None
    purpose: str = PURPOSE
    times: tuple[float, ...] = ()

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy images z (n, C, S, S), times t (n,) and labels (n,) of some states."""
        chosen, rounds = rows % len(self.images), rows // len(self.images)
        noise = image_noise(self.seed, rows.tolist(), torch.device("cpu"), self.purpose).draw(self.images.shape[1:])
        places = spread(chosen, rounds, self.seed)
        t = _times(places, self.family) if not self.times else torch.tensor(self.times)[_part(places, len(self.times))]
        z = _noised(self.images[chosen], noise, t, self.family)
        labels = self.labels[chosen]
        if self.null is not None:
            labels = labels.masked_fill((chosen + rounds) % _NULL_EVERY == _NULL_EVERY - 1, self.null)
        return z, t, labels


@dataclass(frozen=True)
class NoisedImages:
    """States of noised images, about which the teacher is asked each time: `_ROUNDS` of each image, then the same."""

    teacher: DiTMoE
    noising: Noising
    cfg: float

    def __len__(self) -> int:
        return len(self.noising.images) * _ROUNDS

    def at(self, rows: Tensor) -> TeacherStates:
        """Return some states, on the teacher's device."""
        z, t, labels = (part.to(self.teacher.device) for part in self.noising.at(rows))
        with torch.no_grad():
            targets = guided_prediction(self.teacher, z, t, labels, self.cfg)
        return TeacherStates(z, t, labels, targets, self.cfg)


def spread(images: Tensor, rounds: Tensor, seed: int) -> Tensor:
    """Return a number in [0, 1) for each image i and round r: the fractional part of i √3 + r φ + seed √2.

    Both the rounds of an image and the images of a round are evenly spread (Kronecker).
    """
    golden = (5**0.5 - 1) / 2
    return ((images.double() + 1) * 3**0.5 + rounds.double() * golden + seed * 2**0.5) % 1.0


def _part(places: Tensor, count: int) -> Tensor:
    """Return in which of `count` even parts of [0, 1) places (n,) lie."""
    return (places * count).long().clamp_max(count - 1)


def _times(places: Tensor, family: Sampler) -> Tensor:
    """Return the times at `places` (n,) in [0, 1), as the model takes them."""
    return (1.0 - places).float() if family == "rf" else _part(places, TRAINING_STEPS).float()


def _noised(images: Tensor, noise: Tensor, t: Tensor, family: Sampler) -> Tensor:
    """Return images (n, C, S, S) noised to times t (n,), as the model takes them."""
    if family == "rf":
        return interpolate(images, noise, t)
    kept = respaced_schedule(list(range(TRAINING_STEPS))).alphas_bar[t.long()].reshape(-1, 1, 1, 1)
    return kept.sqrt().float() * images + (1 - kept).sqrt().float() * noise


def kept_states(source: StateSource, count: int, batch: FittingBatches) -> TeacherStates:
    """Return the first states of a source, kept."""
    parts = []
    with phase("asking the original", count, "states") as progress:
        for rows, states in batch.computed(lambda rows: source.at(torch.arange(count)[rows.start : rows.stop]), count):
            parts.append(states)
            progress(len(rows))
    return _joined(parts)


def sampled_images(teacher: DiTMoE, spec: SampleSpec, batch: FittingBatches, purpose: str = PURPOSE) -> Tensor:
    """Return the teacher's images (I, C, S, S) of `spec`. Noise of each `purpose` is its own."""
    images: list[Tensor] = []
    with phase("sampling from the original", spec.images, "images") as progress:
        for rows, some in batch.computed(
            lambda rows: sample_batch(teacher, spec, rows, purpose=purpose).float().cpu(), spec.images
        ):
            images.append(some)
            progress(len(rows))
    return torch.cat(images)


def _joined(parts: Sequence[TeacherStates]) -> TeacherStates:
    columns = zip(*((part.z, part.t, part.labels, part.targets) for part in parts), strict=True)
    z, t, labels, targets = (torch.cat(column) for column in columns)
    return TeacherStates(z, t, labels, targets, parts[0].cfg)
