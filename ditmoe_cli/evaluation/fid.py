"""Comparing two of: checkpoints, samples, statistics, images; everything that can be refused is refused first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import choose_solver
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features.compared_features import (
    Lab,
    Side,
    card_of,
    check_statistics,
    featured,
    keep_statistics,
    kept_statistics,
    sampled_side,
    statistics_of,
    stored_side,
)
from ditmoe_cli.evaluation.features.extractors import (
    BATCH,
    EXTRACTORS,
    Extractor,
    NamedExtractor,
    check_wanted,
    make_extractor,
)
from ditmoe_cli.evaluation.features.inception import cached_weights, will_fetch
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, write_statistics
from ditmoe_cli.evaluation.fid_score import Score, score
from ditmoe_cli.evaluation.samples import Runtime, Sampling, Say, decoded_by, require_images
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS
from ditmoe_cli.evaluation.scores.extrapolation import sizes_for
from ditmoe_cli.evaluation.scores.requested import Request
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.cache import cache_folder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import Share, process_group
from ditmoe_cli.progress import ProgressBar

_MUST_AGREE = ("steps", "cfg", "solver", "classes", "interval")


@dataclass(frozen=True)
class Item:
    """Something to compare, before it is sampled or read: its path, and the checkpoint if it is one."""

    path: Path
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Comparison:
    """A subject, the reference that its distance is taken to, and the original that its paired error is against."""

    subject: Item
    reference: Item
    original: Item

    @property
    def items(self) -> tuple[Item, Item, Item]:
        """Subject, reference and original."""
        return self.subject, self.reference, self.original


@dataclass(frozen=True)
class Measure:
    """How to compare.

    Attributes:
        extractor: its name; None for what the sides name.
        weights: Inception's, where they are named.
        anyway: whether settings, sizes and channels of images may differ.
        request: scores beside the distance.
        precision: of Inception.
        vae: decodes latents.
        work: folder for what a run has under way; None for the cache.
        statistics: where the subject's statistics go, if anywhere; with spatial ones where the convention has them.
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

    def wanted(self, extractor: Extractor) -> tuple[str, ...]:
        """Return the activations beside features that are to be taken."""
        spatial = self.statistics and extractor.name == "inception" and CONVENTIONS[self.request.convention].spatial
        return tuple(dict.fromkeys((*self.request.wanted, *(("spatial",) if spatial else ()))))


def compare(
    comparison: Comparison,
    spec_of: Callable[[Checkpoint], SampleSpec],
    measure: Measure,
    runtime: Runtime,
    bar: ProgressBar,
    say: Say,
) -> Score | None:
    """Sample or read all sides and score them; what can be refused is refused before anything is sampled.

    `spec_of(checkpoint)` says how to sample the subject; its spec rules the other sides. Under torchrun the work is
    shared, and all ranks but the first return None. Raises `BadInputError` where sides do not fit together, and
    `UsageError` for an extractor that leads nowhere, or one that lacks what a score takes.
    """
    with process_group() as share:
        return _Comparing(comparison, spec_of, measure, runtime, bar, say, share).run()


class _Comparing:
    """One comparison, on one process."""

    def __init__(
        self,
        comparison: Comparison,
        spec_of: Callable[[Checkpoint], SampleSpec],
        measure: Measure,
        runtime: Runtime,
        bar: ProgressBar,
        say: Say,
        share: Share,
    ) -> None:
        self.comparison, self.spec_of, self.measure, self.runtime = comparison, spec_of, measure, runtime
        self.bar, self.share = bar, share
        self.say: Say = say if share.first else lambda _: None
        self.done: dict[Path, Side] = {}

    def run(self) -> Score | None:
        """Check everything, make all sides, and score them on the first process."""
        subject, reference, original = self.comparison.items
        self.done = {item.path: stored_side(item.path) for item in self.comparison.items if item.checkpoint is None}
        lab = self._lab()
        spec = self._subject_spec()
        samplings = self._samplings(spec)
        self._check(lab, samplings, spec)
        if spec is None and original.path not in (subject.path, reference.path):
            samplings.pop(original.path, None)  # nothing to pair it with
        for path, what in samplings.items():
            with self._holding(lab.workspace(what.key, what.spec.images)):
                self.done[path] = sampled_side(what, self.runtime, lab, self.share, self.bar, self.say)
        stored = self._features(lab)
        if not self.share.first:
            return None
        sides = [self.done.get(item.path) for item in (subject, reference, original)]
        assert sides[0] is not None and sides[1] is not None
        paired = sides[2] if sides[2] is not None and sides[0].paired_with(sides[2]) else None
        if sides[2] is not None and paired is None and original.path != reference.path:
            self.say(f"{original.path}: pairs with nothing, since it has other seeds, settings or sizes")
        found = score(sides[0], sides[1], paired, stored, lab, self.measure.request, self.bar, self.say)
        if self.measure.statistics is not None:
            inputs = [item.path for item in self.comparison.items]
            write_statistics(self.measure.statistics, statistics_of(sides[0], lab), self.measure.force, inputs)
        for path, side in self.done.items():
            if side.images is not None:
                identity = samplings[path].key if path in samplings else side.identity
                lab.workspace(identity, len(side.images)).discard()
        return found

    def _lab(self) -> Lab:
        """Return what features are taken with; the first process fetches weights before the others look for them."""
        base = self.measure.work or cache_folder("work")
        if not self.share.first:
            self.share.wait()
        extractor, grey_levels = self._extractor()
        if self.share.first:
            self.share.wait()
        wanted = self.measure.wanted(extractor)
        if not isinstance(extractor, NamedExtractor):
            check_wanted(extractor, wanted)
        salt = "" if getattr(extractor, "stable", True) else self.share.from_first(lambda: token_hex(6))
        batch = min(self.runtime.batch, BATCH)
        return Lab(extractor, grey_levels, wanted, salt, base, cache_folder("statistics"), batch, self.say)

    def _extractor(self) -> tuple[Extractor, int]:
        """Return the extractor and the grey levels: what was asked for, else what the sides' own metadata name.

        A file's metadata may name our own extractors only: naming others would let a file run code.
        """
        measure = self.measure
        if self._statistics_alone():
            return self._named(), 255
        cards = [card for item in self.comparison.items[:2] if (card := card_of(item.path, item.checkpoint))]
        grey_levels = cards[0].grey_levels if cards else 255
        named = next((card.extractor for card in cards if card.extractor), "inception")
        if measure.extractor is None and named not in EXTRACTORS:
            raise BadInputError(
                f"{self.comparison.subject.path}: names the extractor {named!r}, which is code outside ditmoe; give "
                f"⟨extractor⟩ {named} to run it, or ⟨extractor⟩ pixels"
            )
        name = measure.extractor or named
        if name == "inception" and will_fetch(measure.weights):
            self.say(f"fetching the Inception weights (96 MB) into {cached_weights()}")
        made = make_extractor(
            name,
            grey_levels=grey_levels,
            weights=measure.weights,
            device=self.runtime.device,
            preprocessing=CONVENTIONS[measure.request.convention].preprocessing,
            precision=measure.precision,
        )
        return made, grey_levels

    def _statistics_alone(self) -> bool:
        """Whether statistics are compared with statistics, so that no image is looked at."""
        request = self.measure.request
        sides = [self.done.get(item.path) for item in self.comparison.items[:2]]
        takers = request.of_subject_features or request.of_reference_features
        return not takers and all(side is not None and side.statistics is not None for side in sides)

    def _named(self) -> NamedExtractor:
        """Return what the features of statistics are called: what was said, else what one of their files says."""
        sides = [self.done[item.path].statistics for item in self.comparison.items[:2]]
        told = next((side.extractor for side in sides if side is not None and side.extractor), None)
        name = self.measure.extractor
        if told is not None and name in (None, told["name"]):
            return NamedExtractor(told["name"], told["digest"], told["preprocessing"])
        return NamedExtractor(name or "unknown", "unknown", "unknown")

    def _subject_spec(self) -> SampleSpec | None:
        """Return how the subject is, or was, sampled; None for images of others and statistics."""
        subject = self.comparison.subject
        return self.spec_of(subject.checkpoint) if subject.checkpoint is not None else self.done[subject.path].spec

    def _samplings(self, spec: SampleSpec | None) -> dict[Path, Sampling]:
        """Return what is to be sampled, by path; one VAE serves all."""
        found: dict[Path, Sampling] = {}
        for item in self.comparison.items:
            if item.checkpoint is None or item.path in found:
                continue
            own = followed(spec, item.checkpoint) if spec else self.spec_of(item.checkpoint)
            decoder = next((what.decoder for what in found.values() if what.decoder), None)
            if decoder is None:
                decoder = decoded_by(item.checkpoint, self.measure.vae, self.runtime.device)
            elif not item.checkpoint.config.pixel_space:
                from ditmoe_cli.diffusion.vae import check_fits

                check_fits(decoder, item.checkpoint.config.in_channels, item.path)
            found[item.path] = Sampling(item.checkpoint, own, decoder)
            require_images(found[item.path])
        if self.measure.vae is not None and not found:
            raise UsageError(f"⟨vae⟩ {self.measure.vae}: no side is a checkpoint whose latents it could decode")
        return found

    def _check(self, lab: Lab, samplings: dict[Path, Sampling], spec: SampleSpec | None) -> None:
        """Refuse sides that do not fit together."""
        subject, reference, original = self.comparison.items
        self._check_counts(subject.path, samplings, lab, self.measure.request.of_subject_features)
        self._check_counts(reference.path, samplings, lab, self.measure.request.of_reference_features)
        for item, other in ((subject, reference), (reference, subject)):
            if item.path in self.done and other.path in samplings:
                check_statistics(self.done[item.path], samplings[other.path], lab)
        if self.measure.anyway:
            return
        one = self._shape(subject.path, samplings)
        for path in (reference.path, *([original.path] if self._pairs(original.path, spec) else [])):
            two = self._shape(path, samplings)
            if one is not None and two is not None and one != two:
                told = f"{subject.path} has images of {_by(one)}, {path} has images of {_by(two)}"
                raise BadInputError(f"sizes or channels differ: {told}; make both alike, or give ⟨anyway⟩")
        theirs, ours = (self._source(path, samplings) for path in (reference.path, subject.path))
        if theirs is not None and ours is not None:
            _check_settings(reference.path, theirs, ours)

    def _source(self, path: Path, samplings: dict[Path, Sampling]) -> dict[str, Any] | None:
        """Return how the images of a side are, or were, sampled; None where that is not known."""
        if path in samplings:
            what = samplings[path]
            vae = what.origin.vae
            return {"sampling": what.spec.conditions(), "vae": vae}
        source = self.done[path].source
        return source if source is not None and source["sampling"] is not None else None

    def _pairs(self, path: Path, spec: SampleSpec | None) -> bool:
        """Tell whether an original is, or will be, sampled as the subject is."""
        stored = self.done.get(path)
        return spec is not None and (stored is None or stored.spec == spec)

    def _shape(self, path: Path, samplings: dict[Path, Sampling]) -> tuple[int, ...] | None:
        return samplings[path].shape if path in samplings else self.done[path].shape

    def _check_counts(self, path: Path, samplings: dict[Path, Sampling], lab: Lab, options: tuple[str, ...]) -> None:
        """Refuse a side that has no images, or too few, for its distance and the scores that `options` ask for."""
        request, side = self.measure.request, self.done.get(path)
        if (
            request.resamples
            and path == self.comparison.subject.path
            and side is not None
            and side.statistics is not None
        ):
            raise BadInputError(f"{path}: holds statistics, and ⟨bootstrap⟩ needs images alone")
        if side is not None and side.images is None:
            if options:
                raise BadInputError(f"{path}: holds statistics, and {options[0]} needs images")
            if "sfid" in request.scores and side.statistics is not None and side.statistics.spatial is None:
                raise BadInputError(f"{path}: has no spatial statistics (mu_s, sigma_s); sFID needs them, or images")
            return
        count = len(side.images) if side is not None and side.images is not None else samplings[path].spec.images
        if count < 2:
            raise BadInputError(f"{path}: a distance needs at least 2 images, got {count}")
        for option, least in request.fewest:
            if option in options and count < least:
                raise BadInputError(f"{path}: {option} takes at least {least} images, got {count}")
        if "⟨metrics⟩ fid-inf" in options:
            try:
                sizes_for(count, lab.probe(self._shape(path, samplings) or ()).features.shape[1])
            except BadInputError as error:
                raise BadInputError(f"{path}: ⟨metrics⟩ fid-inf: {error}") from None

    @contextmanager
    def _holding(self, work: Workspace) -> Iterator[None]:
        """Hold a workspace while it is filled, and until all processes have opened what is in it.

        No longer, and one at a time: other runs may want the same reference, and must never wait for each other.
        """
        with work.held(self.say) if self.share.first else nullcontext():
            self.share.wait()
            yield
            self.share.wait()

    def _features(self, lab: Lab) -> StoredStatistics | None:
        """Take the features of stored images, and return the reference's statistics where these are at hand."""
        request, reference = self.measure.request, self.comparison.reference.path
        subject, found = self.comparison.subject.path, None
        takers = {reference: request.of_reference_features, subject: request.of_subject_features}
        for path, side in list(self.done.items()):
            if side.images is None or side.activations is not None:
                continue
            if side.statistics is not None and not takers.get(path):
                continue
            # resamples draw from both sides' images, so that kept statistics would give another interval
            statistics_do = not request.of_reference_features and not request.resamples
            plain = path == reference != subject and side.spec is None and side.statistics is None and statistics_do
            with self._holding(lab.workspace(side.identity, len(side.images))):
                kept = kept_statistics(side, lab) if plain and self.share.first else None
                if self.share.from_first(lambda kept=kept: kept is not None):  # type: ignore[misc]
                    found = kept
                    self.say(f"using the statistics of {side.path} that an earlier run kept")
                    continue
                self.done[path] = featured(side, lab, self.share, self.bar)
                if plain and self.share.first:
                    found = statistics_of(self.done[path], lab)
                    keep_statistics(side, lab, found, self.say)
        return found


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a reference that was made under other settings; another seed or number of images is no matter."""
    pairs = [(name, theirs["sampling"].get(name), ours["sampling"].get(name)) for name in _MUST_AGREE]
    there, here = (side["vae"]["digest"] if side.get("vae") else None for side in (theirs, ours))
    pairs.append(("VAE", there, here))
    told = ", ".join(f"{name} {there} there, {here} here" for name, there, here in pairs if there != here)
    if told:
        raise BadInputError(f"{path}: was sampled under other settings ({told}); give the same, or ⟨anyway⟩")


def followed(spec: SampleSpec, checkpoint: Checkpoint) -> SampleSpec:
    """Return the subject's spec, or raise `BadInputError` where another checkpoint cannot be sampled by it."""
    try:
        choose_solver(spec.solver, checkpoint.config.sampler)
        return check_spec(spec, checkpoint.config.num_classes)
    except UsageError as error:
        raise BadInputError(f"{checkpoint.path}: cannot be sampled as the other side is: {error}") from None
