"""Scoring: the distance of one set of images to another, under stated conditions, beside the paired error.

A side of a comparison is a checkpoint (sampled), images, or statistics. A distance over Inception features is
called ``fid``, over any other ``frechet``. Since a distance is not monotone in damage, the mean squared error
against the original's images of the same seeds stands beside it wherever the original is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditmoe_cli.checkpoint.provenance import Card, file_digest
from ditmoe_cli.diffusion.sampling import ProgressBar, SampleSpec
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features import Extractor, describe_extractor, extract
from ditmoe_cli.evaluation.frechet import frechet_distance
from ditmoe_cli.evaluation.images import ImageSet, kind_of, read_images, write_arrays
from ditmoe_cli.evaluation.inception import WEIGHTS_DIGEST
from ditmoe_cli.evaluation.metrics import PairedError, paired_error
from ditmoe_cli.evaluation.samples import Runtime, read_origin, sample_images
from ditmoe_cli.evaluation.statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.statistics_io import StoredStatistics, check_comparable, read_statistics
from ditmoe_cli.model.checkpoint import Checkpoint

SCORE_SCHEMA = "ditmoe.score/1"
FEW_IMAGES = 2048


@dataclass(frozen=True)
class Side:
    """One side of a comparison, at hand: images or statistics, and what they come from.

    `identity` is a fingerprint or digest; `spec` is known where the images were sampled by us.
    """

    path: str
    kind: str
    identity: str
    images: ImageSet | None = None
    statistics: StoredStatistics | None = None
    spec: SampleSpec | None = None

    def conditions(self) -> dict[str, Any]:
        """Return what the side is, as JSON."""
        sampling = {**self.spec.conditions(), "nfe": self.spec.nfe} if self.spec else None
        return {"kind": self.kind, "path": self.path, "identity": self.identity, "sampling": sampling}


@dataclass(frozen=True)
class Score:
    """A distance, its conditions, and the paired error where there is one."""

    metric: str
    value: float
    images: int | None
    reference_images: int | None
    paired: PairedError | None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the score as JSON; the distance stands under its own name."""
        return {
            self.metric: self.value,
            "metric": self.metric,
            "images": self.images,
            "reference_images": self.reference_images,
            "paired": asdict(self.paired) if self.paired else None,
            "conditions": dict(self.conditions),
        }


def card_of(path: Path, checkpoint: Checkpoint | None) -> Card | None:
    """Return what a side says of its images: extractor and grey levels; None where it says nothing."""
    if checkpoint is not None:
        return checkpoint.card
    origin = read_origin(path) if path.suffix == ".safetensors" and kind_of(path) == "images" else None
    return origin.card if origin else None


def sampled_side(checkpoint: Checkpoint, spec: SampleSpec, runtime: Runtime, bar: ProgressBar) -> Side:
    """Sample a checkpoint."""
    images = sample_images(checkpoint, spec, runtime, bar)
    return Side(str(checkpoint.path), "checkpoint", checkpoint.fingerprint, images, spec=spec)


def stored_side(path: Path) -> Side:
    """Read images or statistics. Raises `BadInputError`."""
    kind = kind_of(path)
    if kind == "statistics":
        return Side(str(path), kind, file_digest(path), statistics=read_statistics(path))
    origin = read_origin(path)
    return Side(str(path), kind, file_digest(path), read_images(path), spec=origin.spec if origin else None)


def check_statistics(side: Side, other: Checkpoint, extractor: Extractor, grey_levels: int) -> None:
    """Refuse statistics whose extractor or width is not what `extractor` makes of the images of `other`.

    Found out on two black images, so that nothing is sampled in vain. Raises `BadInputError`.
    """
    config = other.config
    if side.statistics is None:
        return
    black = np.zeros((2, config.input_size, config.input_size, config.in_channels), dtype=np.uint8)
    width = extractor(black).shape[1]
    expected = FeatureStatistics(np.zeros(width), np.zeros((width, width)), None)
    described = describe_extractor(extractor, grey_levels)
    check_comparable(StoredStatistics(expected, described), side.statistics, str(other.path), side.path)


def score(
    subject: Side,
    reference: Side,
    original: Side | None,
    extractor: Extractor,
    grey_levels: int,
    bar: ProgressBar,
    say: Callable[[str], None],
) -> Score:
    """Return the distance of `subject` to `reference`, and its paired error against `original`.

    Raises `BadInputError` where statistics come from other features, or sides have fewer than two images.
    """
    described = describe_extractor(extractor, grey_levels)
    stored = [_statistics(side, extractor, described, bar) for side in (subject, reference)]
    check_comparable(stored[0], stored[1], subject.path, reference.path)
    counts = [one.statistics.n for one in stored]
    few = min((n for n in counts if n is not None), default=FEW_IMAGES)
    if few < FEW_IMAGES:
        say(f"warning: only {few} images; distances are biased upwards, and comparable at equal counts alone")
    if extractor.name == "inception" and not extractor.digest.startswith(WEIGHTS_DIGEST):
        say("warning: these are not the weights that FID is defined by; compare the value with its like only")
    paired = None
    if original is not None and subject.images is not None and original.images is not None:
        try:
            paired = paired_error(subject.images.images, original.images.images, grey_levels)
        except BadInputError as error:
            raise BadInputError(f"{subject.path} against {original.path}: {error}") from None
    conditions = {
        "extractor": described,
        "subject": subject.conditions(),
        "reference": reference.conditions(),
        "original": original.conditions() if original else None,
    }
    metric = "fid" if extractor.name == "inception" else "frechet"
    return Score(
        metric, frechet_distance(stored[0].statistics, stored[1].statistics), counts[0], counts[1], paired, conditions
    )


def _statistics(side: Side, extractor: Extractor, described: dict[str, Any], bar: ProgressBar) -> StoredStatistics:
    if side.statistics is not None:
        return side.statistics
    assert side.images is not None
    if len(side.images) < 2:
        raise BadInputError(f"{side.path}: a distance needs at least 2 images, got {len(side.images)}")
    with bar(f"{extractor.name} features of {Path(side.path).name}", len(side.images)) as progress:
        features = extract(extractor, side.images, progress=progress)
    return StoredStatistics(feature_statistics(features), described)


def write_score(path: Path, result: Score, force: bool, inputs: Iterable[Path] = ()) -> int:
    """Write a score as safetensors: numbers as tensors, everything else as metadata; return the bytes."""
    numbers = {result.metric: result.value}
    if result.paired is not None:
        numbers["paired_mse"] = result.paired.mse
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}
    return write_arrays(path, arrays, {**result.to_json(), "schema": SCORE_SCHEMA}, force, inputs)
