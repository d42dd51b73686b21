"""The score that ``fid`` reports: a distance between two sides, scores beside it, and errors of paired images.

A distance over Inception features is called ``fid``, over any other ``frechet``. Since a distance is not monotone in
damage, the mean squared error against the original's images of the same seeds is reported wherever the original is
known. Scores beside the distance come from the same features and follow one program's convention (`conventions`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ditmoe_cli.briefs import Brief, Fact, shortened
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features.extraction import Extraction
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, check_comparable
from ditmoe_cli.evaluation.fid_sides import Side, statistics_of
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, Convention
from ditmoe_cli.evaluation.scores.extrapolation import frechet_infinity
from ditmoe_cli.evaluation.scores.feature_statistics import Array, FeatureStatistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features
from ditmoe_cli.evaluation.scores.inception_score import inception_score
from ditmoe_cli.evaluation.scores.intervals import FRECHET_RESAMPLING, Interval, bootstrap, bootstrap_frechet
from ditmoe_cli.evaluation.scores.kernel_distance import kernel_distance
from ditmoe_cli.evaluation.scores.metrics import Request
from ditmoe_cli.evaluation.scores.paired_error import PairedError, paired_error
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall
from ditmoe_cli.evaluation.worker import Notify
from ditmoe_cli.files.arrays import read_document, write_arrays
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.header import is_safetensors, read_safetensors_header
from ditmoe_cli.progress import each, phase

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.features.extractors import Extractor

SCORE_SCHEMA = "ditmoe.score/1"
FEW_IMAGES = 2048


@dataclass(frozen=True, repr=False)
class Score(Brief):
    """A distance with its interval, scores beside it, and conditions.

    Attributes:
        metric: ``fid`` or ``frechet``.
        value: the distance.
        images, reference_images: numbers of images; None where statistics do not record them.
        paired: error against the original's images of the same seeds.
        paired_features: mean of ‖f(aᵢ) - f(bᵢ)‖² over these pairs, with its interval.
        interval: of the distance.
        scores: scores beside the distance, by name.
        conditions: extractor, convention, resampling, and how each side was made.
    """

    metric: str
    value: float
    images: int | None
    reference_images: int | None
    paired: PairedError | None
    paired_features: Interval | None = None
    interval: Interval | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def _brief(self) -> list[Fact]:
        interval = f" ({shortened(self.interval.low)} to {shortened(self.interval.high)})" if self.interval else ""
        plain = {name: value for name, value in self.scores.items() if isinstance(value, float)}
        sides = {side: told["path"] for side in ("subject", "reference") if (told := self.conditions.get(side))}
        return [
            (self.metric, f"{shortened(self.value)}{interval}"),
            *((name, shortened(value)) for name, value in plain.items()),
            *([("paired mse", f"{shortened(self.paired.mse)} over {self.paired.n} pairs")] if self.paired else []),
            ("images", f"{self.images} against {self.reference_images}"),
            *sides.items(),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the score as JSON; the distance is keyed by the metric's name."""
        return {
            self.metric: self.value,
            "metric": self.metric,
            "images": self.images,
            "reference_images": self.reference_images,
            "paired": asdict(self.paired) if self.paired else None,
            "paired_features": asdict(self.paired_features) if self.paired_features else None,
            "interval": asdict(self.interval) if self.interval else None,
            "scores": dict(self.scores),
            "conditions": dict(self.conditions),
        }


def parse_score(document: Mapping[str, Any]) -> Score:
    """Return the score of its JSON. Raises `ValueError`, `KeyError` or `TypeError` where it is malformed."""
    paired, features, interval = (document[name] for name in ("paired", "paired_features", "interval"))
    return Score(
        metric=document["metric"],
        value=float(document[document["metric"]]),
        images=document["images"],
        reference_images=document["reference_images"],
        paired=PairedError(**paired) if paired else None,
        paired_features=Interval(**features) if features else None,
        interval=Interval(**interval) if interval else None,
        scores=dict(document["scores"]),
        conditions=dict(document["conditions"]),
    )


@dataclass(frozen=True)
class ScoredSides:
    """Sides to score: subject, reference, and the original that the subject's images pair with, if any.

    `reference_statistics` are the reference's where its features were not taken.
    """

    subject: Side
    reference: Side
    original: Side | None = None
    reference_statistics: StoredStatistics | None = None


@dataclass(frozen=True)
class _Compared:
    """Subject and reference with their statistics, and the convention of the scores over them."""

    subject: Side
    reference: Side
    subject_statistics: StoredStatistics
    reference_statistics: StoredStatistics
    convention: Convention
    inception: bool

    @property
    def both_drawn(self) -> bool:
        """Whether a resample draws from the reference's images too, not only from the subject's."""
        return self.reference.activations is not None and self.reference.statistics is None


def score(sides: ScoredSides, extraction: Extraction, request: Request, notify: Notify) -> Score:
    """Return the distance of the subject to the reference, the requested scores, and errors against the original.

    Raises `BadInputError` where statistics come from other features, or images are too few for a score.
    """
    subject, reference, original = sides.subject, sides.reference, sides.original
    compared = _Compared(
        subject,
        reference,
        subject_statistics=statistics_of(subject, extraction),
        reference_statistics=sides.reference_statistics or statistics_of(reference, extraction),
        convention=CONVENTIONS[request.convention],
        inception=extraction.extractor.name == "inception",
    )
    here, there = compared.subject_statistics, compared.reference_statistics
    check_comparable(here, there, subject.path, reference.path)
    counts = here.statistics.n, there.statistics.n
    _warn(counts, extraction.extractor, notify)
    paired, features = _paired(subject, original, extraction)
    with phase(f"comparing {Path(subject.path).name} with {Path(reference.path).name}"):
        value = _distance(compared, here.statistics, there.statistics, "features")
    scores: dict[str, Any] = {}
    for name in each(request.scores, "scoring", "scores"):
        scores.update(SCORES[name](compared))
    result = Score(
        metric="fid" if compared.inception else "frechet",
        value=value,
        images=counts[0],
        reference_images=counts[1],
        paired=paired,
        paired_features=features,
        interval=_interval(compared, request.resamples) if request.resamples else None,
        scores=scores,
        conditions={
            "extractor": extraction.description,
            "convention": request.convention if compared.inception or request.scores else None,
            "bootstrap": _resampling(compared, request.resamples),
            "subject": subject.conditions(),
            "reference": reference.conditions(),
            "original": original.conditions() if original else None,
        },
    )
    _require_numbers(result, subject.path)
    return result


def _require_numbers(result: Score, path: str) -> None:
    """Raise `BadInputError` where a score is no finite number, or a distance is below 0."""
    numbers = {result.metric: result.value, **_flat(result.scores)}
    for name, value in numbers.items():
        if not np.isfinite(np.asarray(value, dtype=np.float64)).all():
            raise BadInputError(f"{path}: {name} comes out as {value}; are images and statistics whole?")


def _warn(counts: tuple[int | None, int | None], extractor: Extractor, notify: Notify) -> None:
    from ditmoe_cli.evaluation.features.extractors import NamedExtractor
    from ditmoe_cli.evaluation.features.inception_weights import WEIGHTS_DIGEST

    fewest = min((n for n in counts if n is not None), default=FEW_IMAGES)
    if fewest < FEW_IMAGES:
        notify(f"warning: only {fewest} images; distances are biased upwards, and comparable at equal counts alone")
    has_weights = not isinstance(extractor, NamedExtractor)
    if extractor.name == "inception" and has_weights and not extractor.digest.startswith(WEIGHTS_DIGEST):
        notify("warning: these are not the weights that FID is defined by; compare the value with its like only")


def _distance(
    compared: _Compared, here: FeatureStatistics, there: FeatureStatistics, kind: Literal["features", "spatial"]
) -> float:
    """Return the Fréchet distance of statistics, or, exactly, of features where there are no more images than these."""
    sides = compared.subject, compared.reference
    stored = any(side.statistics is not None for side in sides)
    a, b = (getattr(side.activations, kind, None) for side in sides)
    if not stored and a is not None and b is not None and min(len(a), len(b)) <= here.dimension:
        return frechet_of_features(a, b)
    return frechet_distance(here, there)


def _paired(subject: Side, original: Side | None, extraction: Extraction) -> tuple[PairedError | None, Interval | None]:
    """Return the errors of pixels and of features between images of the same seeds."""
    if original is None or subject.images is None or original.images is None:
        return None, None
    try:
        error = paired_error(subject.images.images, original.images.images, extraction.grey_levels)
    except BadInputError as problem:
        raise BadInputError(f"{subject.path} against {original.path}: {problem}") from None
    if subject.activations is None or original.activations is None:
        return error, None
    return error, paired_distance(subject.activations.features, original.activations.features)


def paired_distance(a: Array, b: Array) -> Interval:
    """Return the mean of ‖aᵢ - bᵢ‖² over rows of a and b (N, D), with its 95 % bootstrap interval over images."""
    distances = ((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2).sum(axis=1)
    return bootstrap(lambda values: float(values.mean()), [distances])


def _resampling(compared: _Compared, resamples: int) -> dict[str, Any] | None:
    """Return how the interval of the distance is resampled, as JSON."""
    if not resamples:
        return None
    paired = compared.both_drawn and compared.subject.paired_with(compared.reference)
    return {"resamples": resamples, "reference": compared.both_drawn, "paired": paired}


def _interval(compared: _Compared, resamples: int) -> Interval:
    subject, reference = compared.subject, compared.reference
    if subject.activations is None:
        raise BadInputError(f"{subject.path}: holds statistics, and ⟨bootstrap⟩ needs images")
    features, resampling = subject.activations.features, replace(FRECHET_RESAMPLING, resamples=resamples)
    with phase("resampling the distance", resamples, "resamples") as progress:
        if reference.activations is None or reference.statistics is not None:
            statistics = compared.reference_statistics.statistics
            return bootstrap_frechet(features, statistics, resampling=resampling, progress=progress)
        return bootstrap_frechet(
            features,
            reference.activations.features,
            paired=subject.paired_with(reference),
            resampling=resampling,
            progress=progress,
        )


# ------------------------------------------------------------------ scores beside the distance


def _spatial_distance(compared: _Compared) -> dict[str, Any]:
    here, there = compared.subject_statistics.spatial, compared.reference_statistics.spatial
    if here is None or there is None:
        side = compared.subject if here is None else compared.reference
        raise BadInputError(f"{side.path}: has no spatial statistics (mu_s, sigma_s); sFID needs them, or images")
    return {"sfid": _distance(compared, here, there, "spatial")}


def _inception_score(compared: _Compared) -> dict[str, Any]:
    subject, parts = compared.subject, compared.convention.inception
    if subject.activations is None or subject.activations.logits is None or parts is None:
        raise BadInputError(f"{subject.path}: holds statistics, and an Inception score needs images")
    result = inception_score(subject.activations.logits, parts=parts.parts, chunk=parts.chunk, seed=parts.seed)
    return {"inception_score": {"mean": result.mean, "deviation": result.deviation, "parts": len(result.parts)}}


def _precision_recall(compared: _Compared) -> dict[str, Any]:
    neighbours = compared.convention.neighbours
    assert neighbours is not None
    subject, reference = (_features(side, "pr") for side in (compared.subject, compared.reference))
    result = precision_recall(subject, reference, neighbours=neighbours)
    return {"precision": result.precision, "recall": result.recall}


def _kernel_distance(compared: _Compared) -> dict[str, Any]:
    assert compared.convention.kernel is not None
    subject, reference = (_features(side, "kid") for side in (compared.subject, compared.reference))
    result = kernel_distance(subject, reference, compared.convention.kernel)
    values = {
        "mean": result.mean,
        "deviation": result.deviation,
        "subsets": len(result.values),
        "size": result.size,
    }
    return {"kid" if compared.inception else "kernel_distance": values}


def _infinite_distance(compared: _Compared) -> dict[str, Any]:
    line = frechet_infinity(_features(compared.subject, "fid-inf"), compared.reference_statistics.statistics)
    return {"fid_infinity" if compared.inception else "frechet_infinity": asdict(line)}


SCORES: Mapping[str, Callable[[_Compared], dict[str, Any]]] = {
    "sfid": _spatial_distance,
    "is": _inception_score,
    "pr": _precision_recall,
    "kid": _kernel_distance,
    "fid-inf": _infinite_distance,
}


def _features(side: Side, metric: str) -> Array:
    if side.activations is None:
        raise BadInputError(f"{side.path}: holds statistics, and ⟨metrics⟩ {metric} needs images")
    return side.activations.features


# ------------------------------------------------------------------ writing


def write_score(path: Path, result: Score, force: bool, inputs: Iterable[Path] = ()) -> int:
    """Write a score as safetensors, numbers as tensors and everything else as metadata; return the bytes."""
    numbers = {result.metric: result.value, **_flat(result.scores)}
    if result.paired is not None:
        numbers["paired_mse"] = result.paired.mse
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}
    return write_arrays(path, arrays, {**result.to_json(), "schema": SCORE_SCHEMA}, force, inputs)


def is_written(path: Path, result: Score) -> bool:
    """Return whether a file holds a score as `write_score` writes it."""
    if path.is_symlink() or not is_safetensors(path):
        return False
    try:
        document = read_document(read_safetensors_header(path), SCORE_SCHEMA, path)
    except BadInputError:
        return False
    return document == {**json.loads(canonical_json(result.to_json())), "schema": SCORE_SCHEMA}


def _flat(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested numbers by names joined by dots."""
    numbers: dict[str, Any] = {}
    for name, value in scores.items():
        numbers |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return numbers
