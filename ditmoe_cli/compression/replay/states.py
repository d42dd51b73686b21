"""Calibration states (z_t, t, y): inputs of the model during sampling, to fit blocks on and to measure errors on.

A profile keeps a state for each of its images and step bins, and each final image. For more states the forward process
noises the final images anew to the sampler's times: no further sampling is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.working_sizes import (
    FEWEST_JUDGED,
    FEWEST_STATES,
    FEWEST_TOKENS,
    HELD_OUT,
    JUDGED_TOKENS,
    MOST_TOKENS,
    judged_images,
)
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sampling_times
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile

PURPOSE = "refit"


@dataclass(frozen=True)
class States:
    """N states.

    Attributes:
        z: (N, C, S, S) noisy images, fp32.
        t: (N,) times, as the model is given them.
        labels: (N,) classes.
        images: (N,) index of each state's image.
        held: (N,) whether a state is held out, to choose the strength of a fit; the same for all states of an image.
        cfg: guidance scale s.
    """

    z: Tensor
    t: Tensor
    labels: Tensor
    images: Tensor
    held: Tensor
    cfg: float

    def __len__(self) -> int:
        return len(self.z)

    @property
    def branches(self) -> int:
        """2 under guidance, else 1."""
        return len(self.branch_weights)

    @property
    def branch_weights(self) -> tuple[float, ...]:
        """The weights s² and (s - 1)² of the branches' squared errors in the guided one, if errors are uncorrelated.

        1 for the one branch without guidance.
        """
        return (1.0,) if self.cfg == 1.0 else (self.cfg**2, (self.cfg - 1.0) ** 2)


def calibration_states(profile: RoutingProfile, spec: SampleSpec, wanted: int) -> States:
    """Return about `wanted` states: those that the profile keeps, then its final images noised anew.

    `spec` is the profile's own. Raises `BadInputError` for a profile without states.
    """
    _require_states(profile)
    z, t, labels, images = (profile.tensor(f"states.{name}") for name in ("z", "t", "label", "image"))
    kept = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:wanted].sort().values
    fresh = _noised(profile, spec, wanted - len(kept))
    parts = [(z[kept], t[kept], labels[kept].long(), images[kept].long()), *([fresh] if fresh else [])]
    z, t, labels, images = (torch.cat(columns) for columns in zip(*parts, strict=True))
    held = images % HELD_OUT == HELD_OUT - 1 if int(images.max()) >= HELD_OUT - 1 else images == images.max()
    return States(z, t, labels, images, held, spec.cfg)


def _require_states(profile: RoutingProfile) -> None:
    if "states.z" not in profile.header.tensors or "image.final" not in profile.header.tensors:
        raise BadInputError(
            f"{profile.path}: keeps no states to fit on; profile again without ⟨fast⟩ and with a ⟨reservoir⟩, or do "
            "without them: ⟨no_refit⟩, or quantize ⟨uniform⟩ ⟨rounding⟩ nearest"
        )


def fitting_states(calibrated: Calibrated, unknowns: int, tokens_per_unknown: int, tokens: int = 0) -> States:
    """Return the states to fit a block on.

    Args:
        calibrated: the checkpoint and its profile.
        unknowns: largest number of unknowns of one output.
        tokens_per_unknown: tokens for each unknown, within `FEWEST_TOKENS` and `MOST_TOKENS` in all.
        tokens: number of tokens in all; 0 for that default.

    Raises `BadInputError` for a profile without states.
    """
    tokens = tokens or min(max(tokens_per_unknown * unknowns, FEWEST_TOKENS), MOST_TOKENS)
    wanted = max(tokens // calibrated.checkpoint.config.num_patches, FEWEST_STATES)
    spec = profiled_spec(calibrated.profile.calibration, calibrated.checkpoint)
    return calibration_states(calibrated.profile, spec, wanted)


def judging_states(calibrated: Calibrated) -> States:
    """Return states to judge plans by, of `judged_images` noised anew: about `JUDGED_TOKENS` tokens of all branches.

    Raises `BadInputError` for a profile without states.
    """
    profile = calibrated.profile
    spec = profiled_spec(profile.calibration, calibrated.checkpoint)
    branches = 1 if spec.cfg == 1.0 else 2
    wanted = max(JUDGED_TOKENS // (calibrated.checkpoint.config.num_patches * branches), FEWEST_JUDGED)
    images = torch.tensor(judged_images(image_count(profile)))
    found = _noised(profile, spec, wanted, images, "judge")
    assert found is not None
    return States(*found, torch.zeros(wanted, dtype=torch.bool), spec.cfg)


def image_count(profile: RoutingProfile) -> int:
    """Return the number of a profile's images. Raises `BadInputError` where it keeps no states of them."""
    _require_states(profile)
    return int(profile.header.tensors["image.final"].info.shape[0])


def _noised(
    profile: RoutingProfile, spec: SampleSpec, count: int, some: Tensor | None = None, purpose: str = PURPOSE
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return `count` states (z, t, label, image): images, or `some` of them, in turn, each round at another step."""
    if count <= 0:
        return None
    final = profile.tensor("image.final")
    noise = image_noise(spec.seed, range(count), torch.device("cpu"), purpose).draw(final.shape[1:])
    chosen = torch.arange(len(final)) if some is None else some
    turns = torch.arange(count)
    images, rounds = chosen[turns % len(chosen)], turns // len(chosen)
    times = sampling_times(spec)
    # neighbouring images at distant steps, so that a partial round covers all steps
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
