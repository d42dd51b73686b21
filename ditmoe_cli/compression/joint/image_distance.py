"""The distance that a compressed model's images will have from the original's of the same seeds.

Both models sample some images as the profile's calibration did, of its labels, from noise of their own: weights are
fitted on most images of the calibration. Errors of n images with mean m and standard deviation s tell that of N others:

    m ± t(0.975, n - 1) s √(1 / n + 1 / N)

(the prediction interval of a mean; W. Q. Meeker, G. J. Hahn and L. A. Escobar, Statistical Intervals, 2nd ed., Wiley
2017, section 4.7), and not below 0. For many steps an error of the prediction may grow in ways of its own: both are
told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.evaluation.images import to_uint8
from ditmoe_cli.evaluation.scores.paired_error import paired_error
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.calibration_settings import profiled_spec

PURPOSE = "distance"
SAMPLED = 8  # images, by both models
IMAGES = 256  # whose mean is foretold
LEVEL = 0.95


@dataclass(frozen=True)
class ExpectedDistance:
    """The mean squared error of so many images to the original's of the same seeds, as it is expected.

    Attributes:
        mean: of the images that were sampled.
        low, high: 95 % interval of the mean of `images` others.
        images: number of images that the interval is for.
        sampled: number of images that it rests on.
        of: what is compared: ``pixels`` on the scale of the model's grey levels, as ``fid`` has it, or ``latents``.
    """

    mean: float
    low: float
    high: float
    images: int
    sampled: int
    of: str


def expected_distance(original: Calibrated, written: Checkpoint) -> ExpectedDistance:
    """Return the expected distance of the images of a compressed checkpoint to those of its original.

    Takes the calibration's steps for `SAMPLED` images with one model in memory, and then with the other.
    """
    profile, checkpoint = original.profile, original.checkpoint
    spec = profiled_spec(profile.calibration, checkpoint)
    indices = sampled_images(spec.images)
    expected, found = (_sampled(each, original, spec, indices) for each in (checkpoint, written))
    pixels = checkpoint.config.pixel_space
    errors = image_errors(found, expected, checkpoint.card.grey_levels if pixels else None)
    mean, low, high = mean_of_others(errors, IMAGES)
    return ExpectedDistance(mean, low, high, IMAGES, len(errors), "pixels" if pixels else "latents")


def sampled_images(images: int) -> list[int]:
    """Return `SAMPLED` indices whose labels are spread over those of so many calibration images."""
    return [place * max(images, SAMPLED) // SAMPLED for place in range(SAMPLED)]


def image_errors(found: Tensor, expected: Tensor, grey_levels: int | None) -> list[float]:
    """Return the mean squared error of each of some images (N, C, S, S): in grey levels², or of latents where None."""
    if grey_levels is None:
        squares = (found.double() - expected.double()).square().flatten(1).mean(dim=1)
        return [float(square) for square in squares]
    pairs = zip(to_uint8(found), to_uint8(expected), strict=True)
    return [paired_error(a[None], b[None], grey_levels).mse for a, b in pairs]


def mean_of_others(errors: Sequence[float], images: int) -> tuple[float, float, float]:
    """Return the mean of n errors, and the ends of the 95 % prediction interval of the mean of `images` others.

    As the head of this module has it; n is at least 2.
    """
    from scipy.special import stdtrit

    count = len(errors)
    mean = math.fsum(errors) / count
    deviation = math.sqrt(math.fsum((error - mean) ** 2 for error in errors) / (count - 1))
    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * deviation * math.sqrt(1 / count + 1 / images)
    return mean, max(mean - reach, 0.0), mean + reach


def _sampled(checkpoint: Checkpoint, original: Calibrated, spec: SampleSpec, indices: Sequence[int]) -> Tensor:
    """Return the final images of some indices, with the settings of the calibration."""
    batch = max(int(original.profile.calibration.get("batch", 1)), 1)
    model = build_model(checkpoint, torch.device(original.device), original.dtype).prepack()
    images = []
    with phase(f"sampling images of {checkpoint.name}", len(indices), "images") as progress:
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            images.append(sample_batch(model, spec, part, purpose=PURPOSE).cpu())
            progress(len(part))
    return torch.cat(images)
