"""The sides of a comparison: what stands there, its images, their features, and the statistics of these.

Images that are sampled, and all features, go through a workspace on disk: several processes fill it, and a run that was
cut off is gone on with. Features of what is sampled are taken while the next batch is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, is_out_of_memory
from ditmoe_cli.evaluation.features.extractors import Activations, Extractor, activations, describe_extractor
from ditmoe_cli.evaluation.features.statistics_files import (
    StoredStatistics,
    check_comparable,
    read_statistics,
    write_statistics,
)
from ditmoe_cli.evaluation.images import ImageSet, Kind, kind_of, read_images
from ditmoe_cli.evaluation.samples import SAMPLES, Runtime, Sampling, Say, fill, image_set, read_origin
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.fingerprint import canonical_json, file_digest
from ditmoe_cli.files.provenance import Card
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import Share
from ditmoe_cli.progress import ProgressBar


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        path, kind: where it stands and what it is.
        identity: a fingerprint, or the digest of a file.
        images: its images; None for bare statistics.
        statistics: what a file tells of its features.
        spec, vae: how the images were sampled, where we did that.
        activations: features of the images, once taken.
    """

    path: str
    kind: Kind
    identity: str
    images: ImageSet | None = None
    statistics: StoredStatistics | None = None
    spec: SampleSpec | None = None
    vae: Mapping[str, Any] | None = None
    activations: Activations | None = None

    def conditions(self) -> dict[str, Any]:
        """Return what the side is, as JSON."""
        sampling = {**self.spec.conditions(), "nfe": self.spec.nfe} if self.spec else None
        vae = dict(self.vae) if self.vae else None
        return {"kind": self.kind, "path": self.path, "identity": self.identity, "sampling": sampling, "vae": vae}

    def paired_with(self, other: Side) -> bool:
        """Whether image i of both was made from the same noise and label, in the same way, and is of the same size."""
        same = self.spec is not None and self.spec == other.spec and unnamed(self.vae) == unnamed(other.vae)
        return same and self.shape == other.shape

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(H, W, C) of its images; None for statistics that do not tell."""
        if self.images is None:
            return tuple(self.source["shape"]) if self.source else None
        return self.images.images.shape[1:]

    @property
    def source(self) -> dict[str, Any] | None:
        """What is known of its images: of statistics, what their file says."""
        if self.statistics is not None:
            return self.statistics.source
        return {**self.conditions(), "shape": list(self.shape or ())}


def unnamed(vae: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what tells a VAE, without the name that it was found under."""
    return None if vae is None else {key: value for key, value in vae.items() if key != "name"}


@dataclass(frozen=True)
class Lab:
    """What features are taken with, and where they are kept meanwhile.

    Attributes:
        extractor, grey_levels: the features, and what they are of.
        wanted: activations beside features.
        salt: makes names differ from those of other runs, where features of equal description may differ.
        folder: holds a workspace for each side.
        kept: holds statistics of references.
        batch: images at a time.
        say: is told where fewer have to do.
    """

    extractor: Extractor
    grey_levels: int
    wanted: tuple[str, ...]
    salt: str
    folder: Path
    kept: Path
    batch: int
    say: Say

    @property
    def described(self) -> dict[str, Any]:
        """What statistics say about the features."""
        return describe_extractor(self.extractor, self.grey_levels)

    @property
    def tag(self) -> str:
        """Stands for the features in names of files."""
        return hashlib.sha256((self.salt + canonical_json(self.described)).encode()).hexdigest()[:12]

    def names(self) -> dict[str, str]:
        """Return the workspace's array for each kind of activations; features are the last to be written."""
        logits = next((name for name in self.wanted if name.endswith("logits")), None)
        extra = {"spatial": "spatial"} if "spatial" in self.wanted else {}
        extra |= {"logits": logits} if logits else {}
        return {**{kind: f"{name}-{self.tag}" for kind, name in extra.items()}, "features": f"features-{self.tag}"}

    def probe(self, shape: Sequence[int]) -> Activations:
        """Return the activations of two images (H, W, C) of noise, to learn their widths from.

        Not of black ones, on which an extractor that normalises may fail.
        """
        noise = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        return activations(self.extractor, ImageSet(noise), self.wanted)

    def workspace(self, identity: str, rows: int) -> Workspace:
        """Return the workspace of a side."""
        return Workspace(self.folder / f"{identity[:32]}-{rows}", rows)


def card_of(path: Path, checkpoint: Checkpoint | None) -> Card | None:
    """Return what a side says of its images: extractor and grey levels; None where it says nothing."""
    if checkpoint is not None:
        return checkpoint.card
    origin = read_origin(path) if path.suffix == ".safetensors" and kind_of(path) == "images" else None
    return origin.card if origin else None


def stored_side(path: Path) -> Side:
    """Read images or statistics. Raises `BadInputError`."""
    kind = kind_of(path)
    if kind == "statistics":
        held = read_images(path) if holds_images(path) else None
        return Side(str(path), kind, file_digest(path), held, read_statistics(path))
    origin = read_origin(path)
    images = read_images(path)
    spec, vae = (origin.spec, origin.vae) if origin else (None, None)
    return Side(str(path), kind, file_digest(path), images, spec=spec, vae=vae)


def holds_images(path: Path) -> bool:
    """Tell whether a file of statistics holds reference images too, as ADM's do."""
    import zipfile

    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def check_statistics(side: Side, other: Sampling, lab: Lab) -> None:
    """Refuse statistics whose extractor or width is not what `lab` makes of the images of `other`.

    Found out on a probe, so that nothing is sampled in vain. Raises `BadInputError`.
    """
    if side.statistics is None:
        return
    width = lab.probe(other.shape).features.shape[1]
    expected = FeatureStatistics(np.zeros(width), np.zeros((width, width)), None)
    check_comparable(StoredStatistics(expected, lab.described), side.statistics, str(other.checkpoint.path), side.path)


def sampled_side(what: Sampling, runtime: Runtime, lab: Lab, share: Share, bar: ProgressBar, say: Say) -> Side:
    """Sample a checkpoint, and take the features of its images on the way."""
    work = lab.workspace(what.key, what.spec.images)
    prepare(work, lab, what.shape, share)
    with _beside(lambda first, values: _store(work, lab, first, values)) as after:
        fill(work, what, runtime, share, bar, say, after)
    side = Side(
        *(str(what.checkpoint.path), "checkpoint", what.checkpoint.fingerprint),
        images=image_set(what, work.array(SAMPLES)),
        spec=what.spec,
        vae=what.origin.vae,
    )
    return with_features(side, work, lab, share, bar)


def featured(side: Side, lab: Lab, share: Share, bar: ProgressBar) -> Side:
    """Return a side with the features of its images. Raises `BadInputError` for fewer than two images."""
    if side.activations is not None or side.images is None:
        return side
    if len(side.images) < 2:
        raise BadInputError(f"{side.path}: a distance needs at least 2 images, got {len(side.images)}")
    work = lab.workspace(side.identity, len(side.images))
    prepare(work, lab, side.images.images.shape[1:], share)
    return with_features(side, work, lab, share, bar)


def prepare(work: Workspace, lab: Lab, shape: Sequence[int], share: Share) -> None:
    """Make the arrays that features of images (H, W, C) go into."""
    if share.first:
        probe = lab.probe(shape)
        for kind, name in lab.names().items():
            work.create(name, getattr(probe, kind).shape[1:], np.float64)
    share.wait()


def with_features(side: Side, work: Workspace, lab: Lab, share: Share, bar: ProgressBar) -> Side:
    """Take this process's share of the features that a workspace lacks, and return the side with all of them."""
    assert side.images is not None
    names = lab.names()
    share.wait()  # what is stored beside another process's sampling is there
    left = share.from_first(lambda: work.missing(tuple(names.values()), lab.batch))
    mine = share.of(left)
    if mine:
        with bar(f"{lab.extractor.name} features of {Path(side.path).name}", sum(map(len, mine))) as progress:
            for indices in mine:
                _store(work, lab, indices.start, side.images.images[indices.start : indices.stop])
                progress(len(indices))
    share.wait()
    work.require_whole(tuple(names.values()))
    found = {kind: work.array(name) for kind, name in names.items()}
    return replace(side, activations=Activations(**found))


def _store(work: Workspace, lab: Lab, first: int, images: NDArray[np.uint8]) -> None:
    try:
        found = activations(lab.extractor, ImageSet(images), lab.wanted, lab.batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(images) == 1:
            raise
    else:
        for kind, name in lab.names().items():
            work.put(name, first, getattr(found, kind))
        return
    half = len(images) // 2
    lab.say(f"out of memory with the features of {len(images)} images at a time; going on with {half}")
    for start in range(0, len(images), half):
        _store(work, lab, first + start, images[start : start + half])


@contextmanager
def _beside(work: Callable[[int, NDArray[Any]], None]) -> Iterator[Callable[[int, NDArray[Any]], None]]:
    """Yield a function that starts `work` in a thread beside this one, after what it started before is done."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        started: list[Future[None]] = []

        def submit(first: int, values: NDArray[Any]) -> None:
            if started:
                started.pop().result()
            started.append(pool.submit(work, first, values))

        yield submit
        if started:
            started.pop().result()


def statistics_of(side: Side, lab: Lab) -> StoredStatistics:
    """Return the statistics of a side: its file's own, else those of its features.

    ADM's files hold statistics of far more images than they hold images.
    """
    if side.statistics is not None:
        return side.statistics
    found = side.activations
    assert found is not None
    spatial = feature_statistics(found.spatial) if found.spatial is not None else None
    return StoredStatistics(feature_statistics(found.features), lab.described, spatial, side.source)


def kept_statistics(side: Side, lab: Lab) -> StoredStatistics | None:
    """Return the statistics that an earlier run kept of a side's images; None where there are none that would do.

    Of no more images than features none are kept: the distance is exact from the features, and these are soon taken.
    """
    path = _kept_path(side, lab)
    if not path.is_file():
        return None
    try:
        found = read_statistics(path)
    except BadInputError:  # cut short: made anew
        return None
    return None if "spatial" in lab.wanted and found.spatial is None else found


def keep_statistics(side: Side, lab: Lab, found: StoredStatistics, say: Say) -> None:
    """Keep a side's statistics for another run; where that fails, this one goes on."""
    count = found.statistics.n
    if lab.salt or count is None or count <= found.statistics.dimension:
        return
    path = _kept_path(side, lab)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(path, found, force=True)
    except OSError as error:
        say(f"the statistics of {side.path} are not kept: {path.parent}: {error.strerror or error}")


def _kept_path(side: Side, lab: Lab) -> Path:
    return lab.kept / f"{side.identity[:32]}-{lab.tag}.safetensors"
