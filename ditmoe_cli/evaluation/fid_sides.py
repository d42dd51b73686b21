"""Sides of a ``fid`` comparison: checkpoints, samples, images or statistics, with the features of their images.

Sampled images and all features go through a workspace on disk: several processes fill it, and an interrupted run
continues from it. Features of sampled images are taken while the next batch is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.computed_share import Computed
from ditmoe_cli.evaluation.features.extraction import (
    Extraction,
    background,
    create_arrays,
    extract_missing,
    store_activations,
)
from ditmoe_cli.evaluation.features.extractors import Activations
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, check_comparable, read_statistics
from ditmoe_cli.evaluation.images import ImageSet, Kind, images_digest, kind_of, read_images
from ditmoe_cli.evaluation.sampled_models import SampledModel, are_copies, have_same_noise, model_of, parse_model
from ditmoe_cli.evaluation.samples import SAMPLES, Sampling, computed_of, fill, read_computed, read_origin
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.worker import Notify, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.arrays import npz_names
from ditmoe_cli.files.provenance import Card
from ditmoe_cli.files.workfolder import work_key
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import phase

SideKey = tuple[Path, str]
"""A side by its path, and the digest of its schedule, which is empty where it has none."""


@dataclass(frozen=True)
class Item:
    """A side before it is read or sampled: its path, the opened checkpoint if it is one, and its schedule, if any."""

    path: Path
    checkpoint: Checkpoint | None
    schedule: ComputeSchedule | None = None

    @property
    def key(self) -> SideKey:
        """What tells it from other sides."""
        return self.path, self.schedule.digest if self.schedule is not None else ""


@dataclass(frozen=True)
class Comparison:
    """The subject, the reference of its distance, and the original of its paired error."""

    subject: Item
    reference: Item
    original: Item

    @property
    def items(self) -> tuple[Item, Item, Item]:
        """Subject, reference and original."""
        return self.subject, self.reference, self.original


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        path, kind: its path, and the kind of input there.
        identity: a checkpoint's fingerprint, or the digest of a file.
        images: its images; None for statistics without any.
        statistics: statistics that its file holds.
        spec, vae, model: how its images were sampled, and of which checkpoint; None for images of other programs.
        activations: features of the images, once taken.
        computed: what a schedule computed of its images; None without a schedule.
    """

    path: str
    kind: Kind
    identity: str
    images: ImageSet | None = None
    statistics: StoredStatistics | None = None
    spec: SampleSpec | None = None
    vae: Mapping[str, Any] | None = None
    model: SampledModel | None = None
    activations: Activations | None = None
    computed: Computed | None = None

    def conditions(self) -> dict[str, Any]:
        """Return kind, path, identity, sampling, VAE, and how a distilled checkpoint was distilled, as JSON."""
        nfe = {"nfe": self.computed.nfe, "computed": self.computed.to_json()} if self.computed else {}
        sampling = {**self.spec.conditions(), "nfe": self.spec.nfe, **nfe} if self.spec else None
        vae = dict(self.vae) if self.vae else None
        named = {"kind": self.kind, "path": self.path, "identity": self.identity}
        return {**named, "sampling": sampling, "vae": vae, **(self.model.to_json() if self.model else {})}

    def paired_with(self, other: Side) -> bool:
        """Return whether image i of both has the same noise, label and size, and only the models differ.

        Steps and guidance belong to the model where one is a distilled copy of the other.
        """
        same_noise = have_same_noise(self.spec, other.spec, copies=are_copies(self.model, other.model))
        return same_noise and _identity_of_vae(self.vae) == _identity_of_vae(other.vae) and self.shape == other.shape

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(H, W, C) of its images; None for statistics that do not record it."""
        if self.images is None:
            return tuple(self.source["shape"]) if self.source else None
        return self.images.images.shape[1:]

    @property
    def source(self) -> dict[str, Any] | None:
        """Conditions and shape of its images; of statistics those that their file records, if any."""
        if self.statistics is not None:
            return self.statistics.source
        return {**self.conditions(), "shape": list(self.shape or ())}


def _identity_of_vae(vae: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what identifies a VAE; the name that it was opened under does not."""
    return None if vae is None else {key: value for key, value in vae.items() if key != "name"}


def card_of(path: Path, checkpoint: Checkpoint | None) -> Card | None:
    """Return the extractor and grey levels that a side's metadata records; None where it records none."""
    if checkpoint is not None:
        return checkpoint.card
    origin = read_origin(path) if kind_of(path) == "images" else None
    return origin.card if origin else None


def read_side(path: Path, notify: Notify = lambda _: None) -> Side:
    """Return the side of images or statistics on disk; `notify` takes what a folder has beside images.

    Raises `BadInputError` for malformed files.
    """
    kind = kind_of(path)
    if kind == "statistics":
        images = read_images(path) if _holds_images(path) else None
        statistics = read_statistics(path)
        return Side(
            path=str(path),
            kind=kind,
            identity=images_digest(path),
            images=images,
            statistics=statistics,
            model=_model_of_source(statistics.source, path),
        )
    origin = read_origin(path)
    return Side(
        path=str(path),
        kind=kind,
        identity=images_digest(path),
        images=read_images(path, notify),
        spec=origin.spec if origin else None,
        vae=origin.vae if origin else None,
        model=origin.model if origin else None,
        computed=read_computed(path) if origin else None,
    )


def _model_of_source(source: Mapping[str, Any] | None, path: Path) -> SampledModel | None:
    """Return the checkpoint that statistics were taken of; None where they do not tell."""
    if source is None or source.get("kind") != "checkpoint":
        return None
    try:
        return parse_model(str(source["identity"]), source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path}: the statistics' metadata is malformed ({error})") from None


def _holds_images(path: Path) -> bool:
    """Return whether a file of statistics holds reference images too, as ADM's do."""
    return "arr_0" in npz_names(path)


def check_statistics(side: Side, other: Sampling, extraction: Extraction) -> None:
    """Raise `BadInputError` where a side's statistics have another extractor or width than features of `other` get.

    The width is taken from a probe, so that nothing is sampled in vain.
    """
    if side.statistics is None:
        return
    width = extraction.probe(other.shape).features.shape[1]
    expected = FeatureStatistics(np.zeros(width), np.zeros((width, width)), None)
    check_comparable(
        StoredStatistics(expected, extraction.description),
        side.statistics,
        str(other.checkpoint.path),
        side.path,
    )


def workspace_of(sampling: Sampling, extraction: Extraction) -> Workspace:
    """Return the workspace of a checkpoint's images and features; another version of this package has another."""
    return extraction.workspace(work_key({"sampling": sampling.key}), sampling.spec.images)


def sampled_side(sampling: Sampling, extraction: Extraction, worker: Worker) -> Side:
    """Sample a checkpoint, and take the features of each batch while the next is sampled."""
    work = workspace_of(sampling, extraction)
    create_arrays(work, extraction, sampling.shape, worker.share)
    title = f"{extraction.extractor.name} features of {sampling.checkpoint.name}"
    with background(
        lambda first, images: store_activations(work, extraction, first, images, worker.notify), f"the last {title}"
    ) as extract_batch:
        fill(work, sampling, worker, extract_batch)
    images = ImageSet(work.array(SAMPLES), sampling.labels)
    path = sampling.checkpoint.path
    return Side(
        path=str(path),
        kind="checkpoint",
        identity=sampling.checkpoint.fingerprint,
        images=images,
        spec=sampling.spec,
        vae=sampling.origin.vae,
        model=model_of(sampling.checkpoint),
        activations=extract_missing(work, extraction, images.images, path.name, worker),
        computed=computed_of(sampling, work),
    )


def with_features(side: Side, extraction: Extraction, worker: Worker) -> Side:
    """Return a side with the features of its images. Raises `BadInputError` for fewer than two images."""
    if side.activations is not None or side.images is None:
        return side
    images = side.images.images
    if len(images) < 2:
        raise BadInputError(f"{side.path}: a distance needs at least 2 images, got {len(images)}")
    work = extraction.workspace(side.identity, len(images))
    create_arrays(work, extraction, images.shape[1:], worker.share)
    return replace(side, activations=extract_missing(work, extraction, images, Path(side.path).name, worker))


def statistics_of(side: Side, extraction: Extraction) -> StoredStatistics:
    """Return the statistics that a side's file holds, else those of its features.

    The file's come first, since ADM's hold statistics of far more images than they hold images.
    """
    if side.statistics is not None:
        return side.statistics
    activations = side.activations
    assert activations is not None
    with phase(f"mean and covariance of {Path(side.path).name}"):
        spatial = feature_statistics(activations.spatial) if activations.spatial is not None else None
        features = feature_statistics(activations.features)
    return StoredStatistics(features, extraction.description, spatial, side.source)
