"""The ``fid`` command's comparison of two sides: each is a checkpoint, samples, images or statistics.

Inputs are read and checked first; then checkpoints are sampled, features are taken, and the sides are scored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features.extraction import Extraction, cached_statistics, keep_statistics
from ditmoe_cli.evaluation.features.extractors import (
    BATCH,
    EXTRACTORS,
    Extractor,
    NamedExtractor,
    check_extras,
    make_extractor,
)
from ditmoe_cli.evaluation.features.inception_weights import cached_weights, will_fetch
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, write_statistics
from ditmoe_cli.evaluation.fid_checks import Inputs, check_inputs
from ditmoe_cli.evaluation.fid_score import Score, ScoredSides, score
from ditmoe_cli.evaluation.fid_sides import (
    Comparison,
    Item,
    Side,
    SideKey,
    card_of,
    read_side,
    sampled_side,
    statistics_of,
    with_features,
    workspace_of,
)
from ditmoe_cli.evaluation.fid_specs import SideSpecs, SpecOf, side_specs
from ditmoe_cli.evaluation.sampled_models import guidance_warning
from ditmoe_cli.evaluation.samples import Sampling, open_decoder, require_images
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS
from ditmoe_cli.evaluation.scores.metrics import Request
from ditmoe_cli.evaluation.worker import Notify, Runtime, Worker
from ditmoe_cli.evaluation.workspace import Workspace, make_room
from ditmoe_cli.files.cache import cache_folder
from ditmoe_cli.files.staging import check_space
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import process_group

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.vae import Decoder

KEPT_BYTES = 2 * 10**9  # of images and features in the cache, after a run


@dataclass(frozen=True)
class FidSettings:
    """Settings of a comparison.

    Attributes:
        extractor: its name; None for the one that the sides' metadata name.
        weights: of Inception; None for the cached ones.
        anyway: whether sampling settings, sizes and channels of images may differ.
        request: scores beside the distance.
        precision: of Inception.
        vae: decodes latents.
        weak: the checkpoint that guides, where one was given.
        work: folder of workspaces; None for the cache.
        statistics: file to write the subject's statistics to, with spatial ones where the convention has sFID.
        force: whether that file is replaced.
    """

    extractor: str | None = None
    weights: Path | None = None
    anyway: bool = False
    request: Request = field(default_factory=Request)
    precision: str = "fp32"
    vae: str | None = None
    weak: Checkpoint | None = None
    work: Path | None = None
    statistics: Path | None = None
    force: bool = False

    def extras(self, extractor: Extractor) -> tuple[str, ...]:
        """Return the activations to take beside features."""
        convention = CONVENTIONS[self.request.convention]
        spatial = self.statistics and extractor.name == "inception" and convention.spatial
        return tuple(dict.fromkeys((*self.request.activations, *(("spatial",) if spatial else ()))))


@dataclass(frozen=True)
class Measured:
    """A score, and the seconds that it took."""

    score: Score
    seconds: float


@dataclass
class _Shared:
    """What comparisons of one run share: sides on disk, extractions by extractor and grey levels, and the VAE."""

    sides: dict[SideKey, Side] = field(default_factory=dict)
    extractions: dict[tuple[str, int], Extraction] = field(default_factory=dict)
    decoders: list[Decoder] = field(default_factory=list)
    used: dict[Path, Workspace] = field(default_factory=dict)

    def read(self, item: Item, notify: Notify) -> Side:
        """Return the side of an item on disk, read once."""
        if item.key not in self.sides:
            self.sides[item.key] = read_side(item.path, notify)
        return self.sides[item.key]


def measure_distances(
    comparisons: Sequence[Comparison], spec_of: SpecOf, settings: FidSettings, runtime: Runtime, notify: Notify
) -> Iterator[Measured | None]:
    """Yield the score of each comparison, once all their inputs are checked; what two share is sampled once.

    `spec_of` returns a checkpoint's spec; other sides follow the subject's (`side_specs`). Under torchrun the work is
    shared, and all ranks but the first yield None. Raises `BadInputError` where sides do not fit together, and
    `UsageError` for an extractor that cannot be imported, or that lacks activations which a score needs.
    """
    with process_group() as share:
        worker = Worker(runtime, share, notify if share.first else _drop_message)
        shared = _Shared()
        checked: list[tuple[Inputs, Extraction]] = []
        for comparison in comparisons:
            read = dict.fromkeys(item for item in comparison.items if item.checkpoint is None)
            stored = {item.key: shared.read(item, worker.notify) for item in read}
            extraction = _make_extraction(comparison, stored, settings, worker, shared)
            specs = side_specs(comparison, spec_of, settings.weak)
            inputs = _plan_samplings(comparison, stored, specs, settings, runtime.device, shared)
            _warn_of_guidance(inputs, worker.notify)
            check_inputs(inputs, extraction, settings.request, settings.anyway)
            checked.append((inputs, extraction))
        if share.first:
            _check_space(checked)
        for inputs, extraction in checked:
            start = time.monotonic()
            sides, statistics = _take_features(inputs, extraction, settings.request, worker, shared)
            if not share.first:
                yield None
                continue
            result = _score(inputs, sides, statistics, extraction, settings, worker)
            yield Measured(result, time.monotonic() - start)
        if share.first:
            _settle(shared, settings)


def _check_space(checked: Sequence[tuple[Inputs, Extraction]]) -> None:
    """Raise `DitmoeError` where the images to sample do not fit on the disk of their workspaces."""
    needed: dict[Path, int] = {}
    folder: Path | None = None
    for inputs, extraction in checked:
        folder = extraction.folder
        for sampling in inputs.samplings.values():
            work = workspace_of(sampling, extraction)
            made = work.nbytes if work.folder.is_dir() else 0
            needed[work.folder] = max(0, sampling.nbytes - made)
    if folder is not None:
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        check_space(existing / "images and features", sum(needed.values()))


def _settle(shared: _Shared, settings: FidSettings) -> None:
    """Keep the images and features in the cache for other runs, within bounds; delete those of a folder of the user's.

    Features of an extractor that is not known by a digest serve no other run.
    """
    passing = settings.work is not None or any(extraction.salt for extraction in shared.extractions.values())
    if passing:
        for work in shared.used.values():
            work.discard()
    for extraction in shared.extractions.values():
        if settings.work is None:
            make_room(extraction.folder, KEPT_BYTES, list(shared.used.values()))


def _drop_message(_: str) -> None:
    """Drop a message that the first process shows."""


# ------------------------------------------------------------------ the extractor


def _make_extraction(
    comparison: Comparison, stored: Mapping[SideKey, Side], settings: FidSettings, worker: Worker, shared: _Shared
) -> Extraction:
    """Return the extraction; the first process downloads weights before the others look for them."""
    named = _named_by_statistics(comparison, stored, settings)
    name, grey_levels = (named.name, 255) if named else extractor_name(comparison, settings.extractor)
    if named is None and (name, grey_levels) in shared.extractions:
        return shared.extractions[name, grey_levels]
    if not worker.share.first:
        worker.share.wait()
    extractor = named or _make(name, grey_levels, settings, worker)
    if worker.share.first:
        worker.share.wait()
    extraction = _extraction(extractor, grey_levels, settings, worker)
    if named is None:
        shared.extractions[name, grey_levels] = extraction
    return extraction


def _extraction(extractor: Extractor, grey_levels: int, settings: FidSettings, worker: Worker) -> Extraction:
    extras = settings.extras(extractor)
    if not isinstance(extractor, NamedExtractor):
        check_extras(extractor, extras)
    return Extraction(
        extractor=extractor,
        grey_levels=grey_levels,
        extras=extras,
        salt="" if getattr(extractor, "stable", True) else worker.share.from_first(lambda: token_hex(6)),
        folder=settings.work or cache_folder("work"),
        cache=cache_folder("statistics"),
        batch=min(worker.runtime.batch, BATCH),
    )


def _named_by_statistics(
    comparison: Comparison, stored: Mapping[SideKey, Side], settings: FidSettings
) -> NamedExtractor | None:
    """Return the extractor that both sides' statistics name, where no image is looked at."""
    if settings.request.needs_subject_features or settings.request.needs_reference_features:
        return None
    pair = [stored.get(item.key) for item in (comparison.subject, comparison.reference)]
    statistics = [side.statistics for side in pair if side is not None and side.statistics is not None]
    return _named_extractor(statistics, settings.extractor) if len(statistics) == len(pair) else None


def extractor_name(comparison: Comparison, given: str | None) -> tuple[str, int]:
    """Return the extractor's name and the grey levels: those given, else those that the sides' metadata name.

    Metadata may name our own extractors only: naming others would let a file run code. Raises `BadInputError`.
    """
    pair = comparison.subject, comparison.reference
    cards = [card for item in pair if (card := card_of(item.path, item.checkpoint))]
    by_metadata = next((card.extractor for card in cards if card.extractor), "inception")
    if given is None and by_metadata not in EXTRACTORS:
        raise BadInputError(
            f"{comparison.subject.path}: names the extractor {by_metadata!r}, which is code outside ditmoe; give "
            f"⟨extractor⟩ {by_metadata} to run it, or ⟨extractor⟩ pixels"
        )
    return given or by_metadata, cards[0].grey_levels if cards else 255


def _make(name: str, grey_levels: int, settings: FidSettings, worker: Worker) -> Extractor:
    """Return the extractor of a name. Raises `UsageError` for settings of Inception where it is another."""
    for setting, given in (("weights", settings.weights is not None), ("precision", settings.precision != "fp32")):
        if given and name != "inception":
            value = settings.weights if setting == "weights" else settings.precision
            raise UsageError(f"⟨{setting}⟩ {value}: is for Inception, and the extractor is {name}; leave it out")
    if name == "inception" and will_fetch(settings.weights):
        worker.notify(f"fetching the Inception weights (96 MB) into {cached_weights()}")
    return make_extractor(
        name,
        grey_levels=grey_levels,
        weights=settings.weights,
        device=worker.runtime.device,
        preprocessing=CONVENTIONS[settings.request.convention].preprocessing,
        precision=settings.precision,
    )


def _named_extractor(statistics: list[StoredStatistics], name: str | None) -> NamedExtractor:
    """Return the extractor that statistics record, unless another `name` is given."""
    recorded = next((each.extractor for each in statistics if each.extractor), None)
    if recorded is not None and name in (None, recorded["name"]):
        return NamedExtractor(recorded["name"], recorded["digest"], recorded["preprocessing"])
    return NamedExtractor(name or "unknown", "unknown", "unknown")


# ------------------------------------------------------------------ what is sampled


def _plan_samplings(
    comparison: Comparison,
    stored: Mapping[SideKey, Side],
    specs: SideSpecs,
    settings: FidSettings,
    device: str,
    shared: _Shared,
) -> Inputs:
    """Return the inputs with a sampling for each checkpoint; all use one VAE.

    Raises `BadInputError` for checkpoints that need a VAE, `UsageError` for a VAE without a checkpoint.
    """
    samplings: dict[SideKey, Sampling] = {}
    for item in comparison.items:
        if item.checkpoint is None or item.key in samplings:
            continue
        own_spec = specs.specs[item.key]
        assert own_spec is not None  # of all checkpoints
        decoder = shared.decoders[0] if shared.decoders and not item.checkpoint.config.pixel_space else None
        if decoder is None and not (item.checkpoint.config.pixel_space and _any_latents(comparison)):
            decoder = open_decoder(item.checkpoint, settings.vae, device)
            shared.decoders += [decoder] if decoder else []
        elif decoder is not None:
            from ditmoe_cli.diffusion.vae import check_fits

            check_fits(decoder, item.checkpoint.config.in_channels, item.path)
        samplings[item.key] = Sampling(item.checkpoint, own_spec, decoder, settings.weak, item.schedule)
        require_images(samplings[item.key])
    if settings.vae is not None and not samplings:
        raise UsageError(f"⟨vae⟩ {settings.vae}: no side is a checkpoint whose latents it could decode")
    return Inputs(comparison, stored, samplings, specs.subject)


def _any_latents(comparison: Comparison) -> bool:
    """Return whether a side is a model of latents, which the VAE is for."""
    return any(item.checkpoint is not None and not item.checkpoint.config.pixel_space for item in comparison.items)


def _warn_of_guidance(inputs: Inputs, notify: Notify) -> None:
    """Say where an original's images have another guidance than what is in the weights of its distilled copy."""
    keys = dict.fromkeys(item.key for item in inputs.comparison.items)
    for copied, other in permutations(keys, 2):
        models = inputs.model(copied), inputs.model(other)
        warning = guidance_warning(copied[0], models[0], other[0], models[1], inputs.spec_of(other))
        if warning is not None:
            notify(warning)


# ------------------------------------------------------------------ sampling and features


def _take_features(
    inputs: Inputs, extraction: Extraction, request: Request, worker: Worker, shared: _Shared
) -> tuple[dict[SideKey, Side], StoredStatistics | None]:
    """Return all sides with the features that the request needs, and the reference's statistics from the cache.

    An original that pairs with nothing, since the subject's spec is unknown, is not sampled.
    """
    subject, reference, original = (item.key for item in inputs.comparison.items)
    sides = dict(inputs.sides)
    for key, sampling in inputs.samplings.items():
        if inputs.spec is None and key == original and original not in (subject, reference):
            continue
        work = workspace_of(sampling, extraction)
        shared.used[work.folder] = work
        with _locked(work, worker):
            sides[key] = sampled_side(sampling, extraction, worker)
    needs = {reference: request.needs_reference_features, subject: request.needs_subject_features}
    # resamples draw from both sides' images, so that statistics alone would give another interval
    statistics_do = not request.needs_reference_features and not request.resamples
    reference_statistics: StoredStatistics | None = None
    for key, side in inputs.sides.items():
        if side.images is None or (side.statistics is not None and not needs.get(key)):
            continue
        work = extraction.workspace(side.identity, len(side.images))
        shared.used[work.folder] = work
        with _locked(work, worker):
            if key == reference != subject and side.spec is None and side.statistics is None and statistics_do:
                sides[key], reference_statistics = _reference_features(side, extraction, worker)
            else:
                sides[key] = with_features(side, extraction, worker)
    return sides, reference_statistics


def _reference_features(side: Side, extraction: Extraction, worker: Worker) -> tuple[Side, StoredStatistics | None]:
    """Return a reference's statistics from the cache, else its features with statistics that are kept for other runs.

    Processes but the first return None for the statistics.
    """
    first = worker.share.first
    cached = cached_statistics(side.identity, extraction) if first else None
    if worker.share.from_first(lambda: cached is not None):
        worker.notify(f"using the statistics of {side.path} that an earlier run kept")
        return side, cached
    side = with_features(side, extraction, worker)
    if not first:
        return side, None
    statistics = statistics_of(side, extraction)
    keep_statistics(side.identity, side.path, statistics, extraction, worker.notify)
    return side, statistics


@contextmanager
def _locked(work: Workspace, worker: Worker) -> Iterator[None]:
    """Lock a workspace while it is filled, until all processes have opened its arrays.

    One at a time and no longer, since other runs may use the same reference, and must never wait for each other.
    """
    with work.locked(worker.notify) if worker.share.first else nullcontext():
        worker.share.wait()
        yield
        worker.share.wait()


# ------------------------------------------------------------------ the score


def _score(
    inputs: Inputs,
    sides: Mapping[SideKey, Side],
    reference_statistics: StoredStatistics | None,
    extraction: Extraction,
    settings: FidSettings,
    worker: Worker,
) -> Score:
    """Score the sides, and write the subject's statistics where asked for."""
    comparison = inputs.comparison
    subject, original = sides[comparison.subject.key], sides.get(comparison.original.key)
    paired = original if original is not None and subject.paired_with(original) else None
    if original is not None and paired is None and comparison.original.key != comparison.reference.key:
        worker.notify(f"{comparison.original.path}: pairs with nothing, since it has other seeds, settings or sizes")
    scored = ScoredSides(subject, sides[comparison.reference.key], paired, reference_statistics)
    result = score(scored, extraction, settings.request, worker.notify)
    if settings.statistics is not None:
        paths = [item.path for item in comparison.items]
        write_statistics(settings.statistics, statistics_of(subject, extraction), settings.force, paths)
    return result
