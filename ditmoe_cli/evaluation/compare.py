"""What is scored against what: sides chosen, checked against each other, sampled or read, and handed to the score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.diffusion.sampling import ProgressBar, SampleSpec, check_spec
from ditmoe_cli.diffusion.solvers import choose_solver
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features import EXTRACTORS, Extractor, make_extractor
from ditmoe_cli.evaluation.inception import cached_weights, will_fetch
from ditmoe_cli.evaluation.samples import Runtime, require_pixels
from ditmoe_cli.evaluation.score import Score, Side, card_of, check_statistics, sampled_side, score, stored_side
from ditmoe_cli.model.checkpoint import Checkpoint

_MUST_AGREE = ("steps", "cfg", "solver", "classes")


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
    """How to compare: the extractor (None: what the sides name) with its weights, and whether settings may differ."""

    extractor: str | None = None
    weights: Path | None = None
    anyway: bool = False


def compare(
    comparison: Comparison,
    spec_of: Callable[[Checkpoint], SampleSpec],
    measure: Measure,
    runtime: Runtime,
    bar: ProgressBar,
    say: Callable[[str], None],
) -> Score:
    """Sample or read all sides and score them; what can be refused is refused before anything is sampled.

    `spec_of(checkpoint)` says how to sample the subject; its spec rules the other sides. Raises `BadInputError`
    where sides do not fit together, and `UsageError` for an extractor that leads nowhere.
    """
    for item in comparison.items:
        if item.checkpoint is not None:
            require_pixels(item.checkpoint)
    extractor, grey_levels = _extractor(comparison, measure, runtime.device, say)
    done = {item.path: stored_side(item.path) for item in comparison.items if item.checkpoint is None}
    _check_stored(comparison, done, extractor, grey_levels)
    subject_spec = _spec_of_subject(comparison.subject, done, spec_of)
    if not measure.anyway:
        _check_settings(done.get(comparison.reference.path), subject_spec)

    def side(item: Item) -> Side:
        if item.path not in done:
            assert item.checkpoint is not None
            spec = followed(subject_spec, item.checkpoint) if subject_spec else spec_of(item.checkpoint)
            done[item.path] = sampled_side(item.checkpoint, spec, runtime, bar)
        return done[item.path]

    subject, reference = side(comparison.subject), side(comparison.reference)
    original = side(comparison.original) if subject.spec else None
    paired = original if original is not None and original.spec == subject.spec else None
    return score(subject, reference, paired, extractor, grey_levels, bar, say)


def _extractor(
    comparison: Comparison, measure: Measure, device: str, say: Callable[[str], None]
) -> tuple[Extractor, int]:
    """Return the extractor and the grey levels: what was asked for, else what the sides' own metadata name.

    A file's metadata may name our own extractors only: naming others would let a file run code.
    """
    cards = [card for item in comparison.items[:2] if (card := card_of(item.path, item.checkpoint))]
    grey_levels = cards[0].grey_levels if cards else 255
    named = next((card.extractor for card in cards if card.extractor), "inception")
    if measure.extractor is None and named not in EXTRACTORS:
        raise BadInputError(
            f"{comparison.subject.path}: names the extractor {named!r}, which is code outside ditmoe; give "
            f"--extractor {named} to run it, or --extractor pixels"
        )
    name = measure.extractor or named
    if name == "inception" and will_fetch(measure.weights):
        say(f"fetching the Inception weights (96 MB) into {cached_weights()}")
    return make_extractor(name, grey_levels=grey_levels, weights=measure.weights, device=device), grey_levels


def _check_stored(comparison: Comparison, done: dict[Path, Side], extractor: Extractor, grey_levels: int) -> None:
    """Refuse statistics that do not fit the checkpoint on the other side."""
    for item, other in ((comparison.subject, comparison.reference), (comparison.reference, comparison.subject)):
        if item.path in done and other.checkpoint is not None:
            check_statistics(done[item.path], other.checkpoint, extractor, grey_levels)


def _spec_of_subject(
    subject: Item, done: dict[Path, Side], spec_of: Callable[[Checkpoint], SampleSpec]
) -> SampleSpec | None:
    """Return how the subject is, or was, sampled; None for images of others and statistics."""
    return spec_of(subject.checkpoint) if subject.checkpoint is not None else done[subject.path].spec


def _check_settings(reference: Side | None, spec: SampleSpec | None) -> None:
    """Refuse stored samples that were made under other settings; another seed or number of images is no matter."""
    if reference is None or reference.spec is None or spec is None:
        return
    differing = [name for name in _MUST_AGREE if getattr(reference.spec, name) != getattr(spec, name)]
    if differing:
        told = ", ".join(
            f"{name} {getattr(reference.spec, name)} there, {getattr(spec, name)} here" for name in differing
        )
        raise BadInputError(f"{reference.path}: was sampled under other settings ({told}); give the same, or --anyway")


def followed(spec: SampleSpec, checkpoint: Checkpoint) -> SampleSpec:
    """Return the subject's spec, or raise `BadInputError` where another checkpoint cannot be sampled by it."""
    try:
        choose_solver(spec.solver, checkpoint.config.sampler)
        return check_spec(spec, checkpoint.config.num_classes)
    except UsageError as error:
        raise BadInputError(f"{checkpoint.path}: cannot be sampled as the other side is: {error}") from None
