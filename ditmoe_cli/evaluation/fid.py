"""The ``fid`` command's comparison of two sides: each is a checkpoint, samples, images or statistics.

Inputs are read and checked first; then checkpoints are sampled, features are taken, and the sides are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import choose_solver
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
from ditmoe_cli.evaluation.features.inception import cached_weights, will_fetch
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, write_statistics
from ditmoe_cli.evaluation.fid_checks import Inputs, check_inputs
from ditmoe_cli.evaluation.fid_score import Score, ScoredSides, score
from ditmoe_cli.evaluation.fid_sides import (
    Comparison,
    Side,
    card_of,
    read_side,
    sampled_side,
    statistics_of,
    with_features,
)
from ditmoe_cli.evaluation.samples import Sampling, open_decoder, require_images
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS
from ditmoe_cli.evaluation.scores.metrics import Request
from ditmoe_cli.evaluation.worker import Notify, Runtime, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.cache import cache_folder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import process_group

SpecOf = Callable[[Checkpoint], SampleSpec]


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
    work: Path | None = None
    statistics: Path | None = None
    force: bool = False

    def extras(self, extractor: Extractor) -> tuple[str, ...]:
        """Return the activations to take beside features."""
        convention = CONVENTIONS[self.request.convention]
        spatial = self.statistics and extractor.name == "inception" and convention.spatial
        return tuple(dict.fromkeys((*self.request.activations, *(("spatial",) if spatial else ()))))


def measure_distance(
    comparison: Comparison,
    spec_of: SpecOf,
    settings: FidSettings,
    runtime: Runtime,
    notify: Notify,
) -> Score | None:
    """Sample or read all sides and score them; inputs are checked before anything is sampled.

    `spec_of` returns the subject's spec, which the other sides follow. Under torchrun the work is shared, and all ranks
    but the first return None. Raises `BadInputError` where sides do not fit together, and `UsageError` for an extractor
    that cannot be imported, or that lacks activations which a score needs.
    """
    with process_group() as share:
        worker = Worker(runtime, share, notify if share.first else _drop_message)
        paths = dict.fromkeys(item.path for item in comparison.items if item.checkpoint is None)
        stored = {path: read_side(path, worker.notify) for path in paths}
        extraction = _make_extraction(comparison, stored, settings, worker)
        inputs = _plan_samplings(comparison, stored, spec_of, settings, runtime.device)
        check_inputs(inputs, extraction, settings.request, settings.anyway)
        sides, statistics = _take_features(inputs, extraction, settings.request, worker)
        if not share.first:
            return None
        return _score(inputs, sides, statistics, extraction, settings, worker)


def _drop_message(_: str) -> None:
    """Drop a message that the first process shows."""


# ------------------------------------------------------------------ the extractor


def _make_extraction(
    comparison: Comparison, stored: Mapping[Path, Side], settings: FidSettings, worker: Worker
) -> Extraction:
    """Return the extraction; the first process downloads weights before the others look for them."""
    if not worker.share.first:
        worker.share.wait()
    extractor, grey_levels = _choose_extractor(comparison, stored, settings, worker)
    if worker.share.first:
        worker.share.wait()
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


def _choose_extractor(
    comparison: Comparison, stored: Mapping[Path, Side], settings: FidSettings, worker: Worker
) -> tuple[Extractor, int]:
    """Return the extractor and the grey levels: those of the settings, else those that the sides' metadata name.

    Metadata may name our own extractors only: naming others would let a file run code.
    """
    pair = comparison.subject, comparison.reference
    stored_pair = [stored.get(item.path) for item in pair]
    if not (settings.request.needs_subject_features or settings.request.needs_reference_features):
        statistics = [side.statistics for side in stored_pair if side is not None and side.statistics is not None]
        if len(statistics) == len(pair):
            return _named_extractor(statistics, settings.extractor), 255  # no image is looked at
    cards = [card for item in pair if (card := card_of(item.path, item.checkpoint))]
    grey_levels = cards[0].grey_levels if cards else 255
    by_metadata = next((card.extractor for card in cards if card.extractor), "inception")
    if settings.extractor is None and by_metadata not in EXTRACTORS:
        raise BadInputError(
            f"{comparison.subject.path}: names the extractor {by_metadata!r}, which is code outside ditmoe; give "
            f"⟨extractor⟩ {by_metadata} to run it, or ⟨extractor⟩ pixels"
        )
    name = settings.extractor or by_metadata
    if name == "inception" and will_fetch(settings.weights):
        worker.notify(f"fetching the Inception weights (96 MB) into {cached_weights()}")
    extractor = make_extractor(
        name,
        grey_levels=grey_levels,
        weights=settings.weights,
        device=worker.runtime.device,
        preprocessing=CONVENTIONS[settings.request.convention].preprocessing,
        precision=settings.precision,
    )
    return extractor, grey_levels


def _named_extractor(statistics: list[StoredStatistics], name: str | None) -> NamedExtractor:
    """Return the extractor that statistics record, unless another `name` is given."""
    recorded = next((each.extractor for each in statistics if each.extractor), None)
    if recorded is not None and name in (None, recorded["name"]):
        return NamedExtractor(recorded["name"], recorded["digest"], recorded["preprocessing"])
    return NamedExtractor(name or "unknown", "unknown", "unknown")


# ------------------------------------------------------------------ what is sampled


def _plan_samplings(
    comparison: Comparison, stored: Mapping[Path, Side], spec_of: SpecOf, settings: FidSettings, device: str
) -> Inputs:
    """Return the inputs with a sampling for each checkpoint; all use one VAE.

    Raises `BadInputError` for checkpoints that cannot be sampled as the subject is or need a VAE, `UsageError` for a
    VAE without a checkpoint.
    """
    subject = comparison.subject
    spec = spec_of(subject.checkpoint) if subject.checkpoint is not None else stored[subject.path].spec
    samplings: dict[Path, Sampling] = {}
    for item in comparison.items:
        if item.checkpoint is None or item.path in samplings:
            continue
        own_spec = _followed(spec, item.checkpoint) if spec else spec_of(item.checkpoint)
        decoder = next((sampling.decoder for sampling in samplings.values() if sampling.decoder), None)
        if decoder is None:
            decoder = open_decoder(item.checkpoint, settings.vae, device)
        elif not item.checkpoint.config.pixel_space:
            from ditmoe_cli.diffusion.vae import check_fits

            check_fits(decoder, item.checkpoint.config.in_channels, item.path)
        samplings[item.path] = Sampling(item.checkpoint, own_spec, decoder)
        require_images(samplings[item.path])
    if settings.vae is not None and not samplings:
        raise UsageError(f"⟨vae⟩ {settings.vae}: no side is a checkpoint whose latents it could decode")
    return Inputs(comparison, stored, samplings, spec)


def _followed(spec: SampleSpec, checkpoint: Checkpoint) -> SampleSpec:
    """Return the subject's spec. Raises `BadInputError` where another checkpoint cannot be sampled by it."""
    try:
        choose_solver(spec.solver, checkpoint.config.sampler)
        return check_spec(spec, checkpoint.config)
    except UsageError as error:
        raise BadInputError(f"{checkpoint.path}: cannot be sampled as the other side is: {error}") from None


# ------------------------------------------------------------------ sampling and features


def _take_features(
    inputs: Inputs, extraction: Extraction, request: Request, worker: Worker
) -> tuple[dict[Path, Side], StoredStatistics | None]:
    """Return all sides with the features that the request needs, and the reference's statistics from the cache.

    An original that pairs with nothing, since the subject's spec is unknown, is not sampled.
    """
    subject, reference, original = (item.path for item in inputs.comparison.items)
    sides = dict(inputs.sides)
    for path, sampling in inputs.samplings.items():
        if inputs.spec is None and path == original and original not in (subject, reference):
            continue
        with _locked(extraction.workspace(sampling.key, sampling.spec.images), worker):
            sides[path] = sampled_side(sampling, extraction, worker)
    needs = {reference: request.needs_reference_features, subject: request.needs_subject_features}
    # resamples draw from both sides' images, so that statistics alone would give another interval
    statistics_do = not request.needs_reference_features and not request.resamples
    reference_statistics: StoredStatistics | None = None
    for path, side in inputs.sides.items():
        if side.images is None or (side.statistics is not None and not needs.get(path)):
            continue
        with _locked(extraction.workspace(side.identity, len(side.images)), worker):
            if path == reference != subject and side.spec is None and side.statistics is None and statistics_do:
                sides[path], reference_statistics = _reference_features(side, extraction, worker)
            else:
                sides[path] = with_features(side, extraction, worker)
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
    sides: Mapping[Path, Side],
    reference_statistics: StoredStatistics | None,
    extraction: Extraction,
    settings: FidSettings,
    worker: Worker,
) -> Score:
    """Score the sides, write the subject's statistics where asked for, and delete the workspaces."""
    comparison = inputs.comparison
    subject, original = sides[comparison.subject.path], sides.get(comparison.original.path)
    paired = original if original is not None and subject.paired_with(original) else None
    if original is not None and paired is None and comparison.original.path != comparison.reference.path:
        worker.notify(f"{comparison.original.path}: pairs with nothing, since it has other seeds, settings or sizes")
    scored = ScoredSides(subject, sides[comparison.reference.path], paired, reference_statistics)
    result = score(scored, extraction, settings.request, worker.notify)
    if settings.statistics is not None:
        paths = [item.path for item in comparison.items]
        write_statistics(settings.statistics, statistics_of(subject, extraction), settings.force, paths)
    for path, side in sides.items():
        if side.images is not None:
            identity = inputs.samplings[path].key if path in inputs.samplings else side.identity
            extraction.workspace(identity, len(side.images)).discard()
    return result
