"""What compressed blocks are fitted on: states (z_t, t, y) that the model meets while it samples.

A profile keeps a state for each of its images and step bins, and where each image ended. Where more are wanted, the
images are noised anew to the sampler's times, as the forward process would: no further sampling is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sampling_times
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.profile import RoutingProfile

PURPOSE = "refit"
HELD_OUT = 8  # every eighth image


@dataclass(frozen=True)
class States:
    """N states.

    Attributes:
        z: (N, C, S, S) noisy images, fp32.
        t: (N,) times, as the model is given them.
        labels: (N,) classes.
        images: (N,) the image that each belongs to.
        held: (N,) whether the state is held out, for choosing the strength of a fit; whole images are.
        branch_weights: error weight of the conditional branch and, under guidance, of the unconditional one.
    """

    z: Tensor
    t: Tensor
    labels: Tensor
    images: Tensor
    held: Tensor
    branch_weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.z)


def calibration_states(profile: RoutingProfile, spec: SampleSpec, wanted: int) -> States:
    """Return about `wanted` states: those that the profile keeps, and its images noised anew for the rest.

    `spec` is the profile's. Raises `BadInputError` for a profile without states.
    """
    if "states.z" not in profile.header.tensors or "image.final" not in profile.header.tensors:
        raise BadInputError(
            f"{profile.path}: keeps no states to fit on; profile again without --fast and with a --reservoir, or do "
            "without them: --no-refit, or quantize --uniform --rounding nearest"
        )
    z, t, labels, images = (profile.tensor(f"states.{name}") for name in ("z", "t", "label", "image"))
    kept = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:wanted].sort().values
    fresh = _noised(profile, spec, wanted - len(kept))
    parts = [(z[kept], t[kept], labels[kept].long(), images[kept].long()), *([fresh] if fresh else [])]
    z, t, labels, images = (torch.cat(columns) for columns in zip(*parts, strict=True))
    held = images % HELD_OUT == HELD_OUT - 1 if int(images.max()) >= HELD_OUT - 1 else images == images.max()
    return States(z, t, labels, images, held, _branch_weights(spec.cfg))


def _noised(profile: RoutingProfile, spec: SampleSpec, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return `count` states (z, t, label, image): images in turn, and with each round of images another step."""
    if count <= 0:
        return None
    final = profile.tensor("image.final")
    drawn = range(count)
    noise = image_noise(spec.seed, drawn, torch.device("cpu"), PURPOSE).draw(final.shape[1:])
    images = torch.arange(count) % len(final)
    times = sampling_times(spec)
    rounds = torch.arange(count) // len(final)
    # neighbouring images at distant steps, so that a partial round covers all of them
    steps = (rounds + images * max(len(times) // 3, 1)) % len(times)
    labels = torch.tensor(spec.labels(images.tolist()))
    z = torch.stack(
        [
            times[int(s)].noised(final[i][None], noise[n][None])[0]
            for n, (i, s) in enumerate(zip(images, steps, strict=True))
        ]
    )
    t = torch.tensor([times[int(s)].t for s in steps], dtype=torch.float32)
    return z, t, labels, images


def _branch_weights(cfg: float) -> tuple[float, ...]:
    """Return s² and (s - 1)²: what the squared errors of both branches weigh in the guided one, if unrelated."""
    return (1.0,) if cfg == 1.0 else (cfg**2, (cfg - 1.0) ** 2)
