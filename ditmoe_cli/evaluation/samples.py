"""Samples of a checkpoint, and the files that hold them with all that decided what they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditmoe_cli.checkpoint.header import read_safetensors_header
from ditmoe_cli.checkpoint.provenance import Card, parse_card
from ditmoe_cli.diffusion.sampling import ProgressBar, SampleSpec, batches, sample_batch
from ditmoe_cli.diffusion.solvers import SOLVERS
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.images import SAMPLES_SCHEMA, ImageSet, read_document, to_uint8, write_arrays, write_images
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Runtime:
    """Where and how to sample; none of it changes an image beyond rounding."""

    device: str = "cpu"
    batch: int = 64


@dataclass(frozen=True)
class SampledBy:
    """What a samples file says of its origin: fingerprint of the checkpoint, spec and card."""

    checkpoint: str
    spec: SampleSpec
    card: Card

    def to_json(self) -> dict[str, Any]:
        """Return the origin as JSON."""
        return {"checkpoint": self.checkpoint, "spec": asdict(self.spec), "card": asdict(self.card)}


def sample_latents(checkpoint: Checkpoint, spec: SampleSpec, runtime: Runtime, bar: ProgressBar) -> Any:
    """Sample all images of `spec`; return final latents, or pixel values, as an fp32 tensor (N, C, S, S)."""
    import torch

    from ditmoe_cli.model.loading import build_model

    chunks = list(batches(spec.images, runtime.batch))
    model = build_model(checkpoint, torch.device(runtime.device))
    parts = []
    with bar(f"sampling {checkpoint.path.name}", spec.images) as progress:
        for indices in chunks:
            parts.append(sample_batch(model, spec, indices).cpu())
            progress(len(indices))
    return torch.cat(parts)


def require_pixels(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` for a checkpoint whose samples are latents."""
    if not checkpoint.config.pixel_space:
        raise BadInputError(
            f"{checkpoint.path}: makes latents of {checkpoint.config.in_channels} channels, which need a VAE to become "
            "images; write them with ditmoe sample, decode them, and give fid the images as npz or PNG"
        )


def sample_images(checkpoint: Checkpoint, spec: SampleSpec, runtime: Runtime, bar: ProgressBar) -> ImageSet:
    """Sample all images of `spec`. Raises `BadInputError` for checkpoints whose samples are latents."""
    require_pixels(checkpoint)
    pixels = sample_latents(checkpoint, spec, runtime, bar)
    labels = np.asarray(spec.labels(range(spec.images)), dtype=np.int64)
    return ImageSet(to_uint8(pixels), labels)


def write_samples(
    checkpoint: Checkpoint, spec: SampleSpec, runtime: Runtime, path: Path, force: bool, bar: ProgressBar
) -> int:
    """Sample and write: `images` uint8 for pixel models, `latents` fp32 (N, C, S, S) for others; return the bytes."""
    from ditmoe_cli.checkpoint.staging import check_target
    from ditmoe_cli.diffusion.noise import image_seed

    check_target(path.absolute(), force, [checkpoint.path])
    origin = SampledBy(checkpoint.fingerprint, spec, checkpoint.card).to_json()
    seeds = np.asarray([image_seed(spec.seed, i) for i in range(spec.images)], dtype=np.int64)
    if checkpoint.config.pixel_space:
        found = sample_images(checkpoint, spec, runtime, bar)
        return write_images(path, found.images, found.labels, seeds, origin, force, [checkpoint.path])
    latents = sample_latents(checkpoint, spec, runtime, bar).numpy()
    labels = np.asarray(spec.labels(range(spec.images)), dtype=np.int64)
    arrays = {"latents": latents, "labels": labels, "seed": seeds}
    return write_arrays(path, arrays, {**origin, "schema": SAMPLES_SCHEMA}, force, [checkpoint.path])


def read_origin(path: Path) -> SampledBy | None:
    """Return what a samples file says of its origin; None for images of others."""
    if path.suffix != ".safetensors":
        return None
    document = read_document(read_safetensors_header(path), SAMPLES_SCHEMA, path)
    return None if document is None else _parse_origin(document, path)


def _parse_origin(document: Mapping[str, Any], path: Path) -> SampledBy:
    try:
        spec = dict(document["spec"])
        spec["classes"] = tuple(spec["classes"])
        if spec["solver"] not in SOLVERS:
            raise ValueError(f"solver {spec['solver']}")
        return SampledBy(str(document["checkpoint"]), SampleSpec(**spec), parse_card(document["card"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: the samples' metadata is malformed ({error})") from None
