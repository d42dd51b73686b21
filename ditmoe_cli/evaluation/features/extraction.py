"""Features of images, taken through a workspace by several processes, and statistics that are kept for later runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.batch_halving import computed_batches
from ditmoe_cli.evaluation.features.extractors import Activations, Extractor, activations, describe_extractor
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, read_statistics, write_statistics
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.worker import Notify, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.workfolder import work_key
from ditmoe_cli.processes import Share
from ditmoe_cli.progress import phase


@dataclass(frozen=True)
class Extraction:
    """An extractor with its settings, and the folders that features and statistics go to.

    Attributes:
        extractor, grey_levels: the extractor, and the grey levels of the images.
        extras: activations beside features.
        salt: makes file names differ between runs whose features may differ under one description; else empty.
        folder: holds a workspace for each image set.
        cache: holds statistics of references.
        batch: images at a time.
    """

    extractor: Extractor
    grey_levels: int
    extras: tuple[str, ...]
    salt: str
    folder: Path
    cache: Path
    batch: int

    @property
    def description(self) -> dict[str, Any]:
        """Description of the extractor that statistics carry."""
        return describe_extractor(self.extractor, self.grey_levels)

    @property
    def tag(self) -> str:
        """Hash of the description and of this package's version, for names of files."""
        return hashlib.sha256((self.salt + work_key(self.description)).encode()).hexdigest()[:12]

    def array_names(self) -> dict[str, str]:
        """Return the workspace's array for each kind of activations; features come last, and are written last."""
        logits = next((name for name in self.extras if name.endswith("logits")), None)
        kinds = {"spatial": "spatial"} if "spatial" in self.extras else {}
        kinds |= {"logits": logits} if logits else {}
        return {**{kind: f"{name}-{self.tag}" for kind, name in kinds.items()}, "features": f"features-{self.tag}"}

    def probe(self, shape: Sequence[int]) -> Activations:
        """Return the activations of two images (H, W, C) of noise, which show the widths.

        Black images would not do: an extractor that normalises may fail on them.
        """
        noise = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        return activations(self.extractor, ImageSet(noise), self.extras)

    def workspace(self, identity: str, rows: int) -> Workspace:
        """Return the workspace of an image set, by the set's identity and number of images."""
        return Workspace(self.folder / f"{identity[:32]}-{rows}", rows)

    def statistics_path(self, identity: str) -> Path:
        """Return the path in the cache of an image set's statistics."""
        return self.cache / f"{identity[:32]}-{self.tag}.safetensors"


def create_arrays(work: Workspace, extraction: Extraction, shape: Sequence[int], share: Share) -> None:
    """Create the arrays for the activations of images (H, W, C)."""
    if share.first:
        probe = extraction.probe(shape)
        for kind, name in extraction.array_names().items():
            work.create(name, getattr(probe, kind).shape[1:], np.float64)
    share.wait()


def extract_missing(
    work: Workspace, extraction: Extraction, images: NDArray[np.uint8], title: str, worker: Worker
) -> Activations:
    """Take this process's share of the activations that a workspace lacks; return those of all images.

    `title` names the images where progress is shown.
    """
    share, names = worker.share, tuple(extraction.array_names().values())
    share.wait()  # until rows that other processes store beside their sampling are done
    batches = share.of(share.from_first(lambda: work.missing(names, extraction.batch)))
    if batches:
        with phase(f"{extraction.extractor.name} features of {title}", sum(map(len, batches)), "images") as progress:
            for indices in batches:
                store_activations(work, extraction, indices.start, images[indices.start : indices.stop], worker.notify)
                progress(len(indices))
    share.wait()
    work.require_whole(names)
    found = Activations(**{kind: work.array(name) for kind, name in extraction.array_names().items()})
    share.wait()  # until all have opened them: the first one may delete the folder once it has scored them
    return found


def store_activations(
    work: Workspace, extraction: Extraction, first: int, images: NDArray[np.uint8], notify: Notify
) -> None:
    """Store the activations of images from row `first` on, in halves where memory runs out."""

    def compute(rows: range) -> Activations:
        part = ImageSet(images[rows.start - first : rows.stop - first])
        return activations(extraction.extractor, part, extraction.extras, extraction.batch)

    def halved(size: int, half: int) -> None:
        notify(f"out of memory with the features of {size} images at a time; going on with {half}")

    for rows, result in computed_batches(compute, [range(first, first + len(images))], halved):
        for kind, name in extraction.array_names().items():
            work.put(name, rows.start, getattr(result, kind))


@contextmanager
def background(task: Callable[[int, NDArray[Any]], None], title: str) -> Iterator[Callable[[int, NDArray[Any]], None]]:
    """Yield a function that starts `task` in one background thread, once the call before it is done.

    At the end the last call is waited for, a phase of that `title`.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        running: list[Future[None]] = []

        def submit(first: int, values: NDArray[Any]) -> None:
            if running:
                running.pop().result()
            running.append(pool.submit(task, first, values))

        yield submit
        if running:
            with phase(title):
                running.pop().result()


def cached_statistics(identity: str, extraction: Extraction) -> StoredStatistics | None:
    """Return the statistics of an image set that an earlier run kept; None where there are none with all extras."""
    path = extraction.statistics_path(identity)
    if not path.is_file():
        return None
    try:
        statistics = read_statistics(path)
    except BadInputError:  # a damaged file, which is written again
        return None
    return None if "spatial" in extraction.extras and statistics.spatial is None else statistics


def keep_statistics(
    identity: str, name: str, statistics: StoredStatistics, extraction: Extraction, notify: Notify
) -> None:
    """Write an image set's statistics to the cache; notify instead of raising where that fails.

    Those of no more images than features are not kept: the distance is exact from features, which are soon taken.
    """
    count = statistics.statistics.n
    if extraction.salt or count is None or count <= statistics.statistics.dimension:
        return
    path = extraction.statistics_path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(path, statistics, force=True)
    except OSError as error:
        notify(f"the statistics of {name} are not kept: {path.parent}: {error.strerror or error}")
