"""Scoring: the distance of one set of images to another, under stated conditions, beside the paired error.

A distance over Inception features is called ``fid``, over any other ``frechet``. Since a distance is not monotone in
damage, the mean squared error against the original's images of the same seeds stands beside it wherever the original is
known. Other scores are taken on request from the same features, the way that one program takes them (`conventions`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features.compared_features import Lab, Side, statistics_of
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, check_comparable
from ditmoe_cli.evaluation.samples import Say
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, Convention
from ditmoe_cli.evaluation.scores.extrapolation import frechet_infinity
from ditmoe_cli.evaluation.scores.feature_statistics import Array, FeatureStatistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features
from ditmoe_cli.evaluation.scores.inception_score import inception_score
from ditmoe_cli.evaluation.scores.intervals import Interval, bootstrap, bootstrap_frechet
from ditmoe_cli.evaluation.scores.kernel_distance import kernel_distance
from ditmoe_cli.evaluation.scores.paired_error import PairedError, paired_error
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall
from ditmoe_cli.evaluation.scores.requested import Request
from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.progress import ProgressBar

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.features.extractors import Extractor

SCORE_SCHEMA = "ditmoe.score/1"
FEW_IMAGES = 2048


@dataclass(frozen=True)
class Score:
    """A distance with its interval, other scores by name, their conditions, and the paired errors where there are any.

    `paired_features` is the mean of ‖f(aᵢ) - f(bᵢ)‖² over pairs of images of the same seed, with its interval.
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

    def to_json(self) -> dict[str, Any]:
        """Return the score as JSON; the distance stands under its own name."""
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


def score(
    subject: Side,
    reference: Side,
    original: Side | None,
    stored: StoredStatistics | None,
    lab: Lab,
    request: Request,
    bar: ProgressBar,
    say: Say,
) -> Score:
    """Return the distance of `subject` to `reference`, what else is asked for, and paired errors against `original`.

    `stored` are the reference's statistics where its features were not taken. Raises `BadInputError` where statistics
    come from other features, or images are too few for a score.
    """
    here, there = statistics_of(subject, lab), stored or statistics_of(reference, lab)
    check_comparable(here, there, subject.path, reference.path)
    counts = here.statistics.n, there.statistics.n
    _warn(counts, lab.extractor, say)
    paired, features = _paired(subject, original, lab)
    inception = lab.extractor.name == "inception"
    return Score(
        metric="fid" if inception else "frechet",
        value=_distance(subject, reference, here.statistics, there.statistics),
        images=counts[0],
        reference_images=counts[1],
        paired=paired,
        paired_features=features,
        interval=_interval(subject, reference, there, request.resamples, bar) if request.resamples else None,
        scores=_scores(subject, reference, here, there, request, inception),
        conditions={
            "extractor": lab.described,
            "convention": request.convention if inception or request.scores else None,
            "bootstrap": _resampling(subject, reference, request),
            "subject": subject.conditions(),
            "reference": reference.conditions(),
            "original": original.conditions() if original else None,
        },
    )


def _warn(counts: tuple[int | None, int | None], extractor: Extractor, say: Say) -> None:
    from ditmoe_cli.evaluation.features.extractors import NamedExtractor
    from ditmoe_cli.evaluation.features.inception import WEIGHTS_DIGEST

    few = min((n for n in counts if n is not None), default=FEW_IMAGES)
    if few < FEW_IMAGES:
        say(f"warning: only {few} images; distances are biased upwards, and comparable at equal counts alone")
    known = not isinstance(extractor, NamedExtractor)
    if extractor.name == "inception" and known and not extractor.digest.startswith(WEIGHTS_DIGEST):
        say("warning: these are not the weights that FID is defined by; compare the value with its like only")


def _distance(
    subject: Side,
    reference: Side,
    here: FeatureStatistics,
    there: FeatureStatistics,
    kind: Literal["features", "spatial"] = "features",
) -> float:
    """Return the Fréchet distance of two sides' statistics, or, exactly, of their features where these are few."""
    given = subject.statistics is not None or reference.statistics is not None
    a, b = (getattr(side.activations, kind, None) for side in (subject, reference))
    if not given and a is not None and b is not None and min(len(a), len(b)) <= here.dimension:
        return frechet_of_features(a, b)
    return frechet_distance(here, there)


def _paired(subject: Side, original: Side | None, lab: Lab) -> tuple[PairedError | None, Interval | None]:
    if original is None or subject.images is None or original.images is None:
        return None, None
    try:
        error = paired_error(subject.images.images, original.images.images, lab.grey_levels)
    except BadInputError as problem:
        raise BadInputError(f"{subject.path} against {original.path}: {problem}") from None
    if subject.activations is None or original.activations is None:
        return error, None
    return error, paired_distance(subject.activations.features, original.activations.features)


def paired_distance(a: Array, b: Array) -> Interval:
    """Return the mean of ‖aᵢ - bᵢ‖² over rows of a and b (N, D), with a 95 % bootstrap interval over images."""
    distances = ((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2).sum(axis=1)
    return bootstrap(lambda values: float(values.mean()), [distances])


def _resampling(subject: Side, reference: Side, request: Request) -> dict[str, Any] | None:
    """Return what the interval of the distance is over."""
    if not request.resamples:
        return None
    both = reference.activations is not None and reference.statistics is None
    return {"resamples": request.resamples, "reference": both, "paired": both and subject.paired_with(reference)}


def _interval(
    subject: Side, reference: Side, there: StoredStatistics, resamples: int, bar: ProgressBar
) -> Interval | None:
    if subject.activations is None:
        raise BadInputError(f"{subject.path}: holds statistics, and ⟨bootstrap⟩ needs images")
    features = subject.activations.features
    with bar("resampling", resamples) as progress:
        if reference.activations is None or reference.statistics is not None:
            return bootstrap_frechet(features, there.statistics, resamples=resamples, progress=progress)
        return bootstrap_frechet(
            *(features, reference.activations.features),
            paired=subject.paired_with(reference),
            resamples=resamples,
            progress=progress,
        )


def _scores(
    subject: Side, reference: Side, here: StoredStatistics, there: StoredStatistics, request: Request, inception: bool
) -> dict[str, Any]:
    """Return the scores that were asked for beside the distance, by name."""
    convention = CONVENTIONS[request.convention]
    found: dict[str, Any] = {}
    for name in request.scores:
        if name == "sfid":
            if here.spatial is None or there.spatial is None:
                side = subject if here.spatial is None else reference
                raise BadInputError(
                    f"{side.path}: has no spatial statistics (mu_s, sigma_s); sFID needs them, or images"
                )
            found["sfid"] = _distance(subject, reference, here.spatial, there.spatial, "spatial")
        elif name == "is":
            found["inception_score"] = _inception_score(subject, convention)
        elif name == "pr":
            assert convention.neighbours is not None
            both = precision_recall(
                _features(subject, "pr"), _features(reference, "pr"), neighbours=convention.neighbours
            )
            found |= {"precision": both.precision, "recall": both.recall}
        elif name == "kid":
            found["kid" if inception else "kernel_distance"] = _kernel_distance(subject, reference, convention)
        else:
            line = frechet_infinity(_features(subject, "fid-inf"), there.statistics)
            found["fid_infinity" if inception else "frechet_infinity"] = asdict(line)
    return found


def _inception_score(subject: Side, convention: Convention) -> dict[str, float]:
    parts = convention.inception
    if subject.activations is None or subject.activations.logits is None or parts is None:
        raise BadInputError(f"{subject.path}: holds statistics, and an Inception score needs images")
    found = inception_score(subject.activations.logits, parts=parts.parts, chunk=parts.chunk, seed=parts.seed)
    return {"mean": found.mean, "deviation": found.deviation, "parts": len(found.parts)}


def _kernel_distance(subject: Side, reference: Side, convention: Convention) -> dict[str, float]:
    subsets = convention.kernel
    assert subsets is not None
    found = kernel_distance(
        *(_features(subject, "kid"), _features(reference, "kid")),
        subsets=subsets.subsets,
        size=subsets.size,
        degree=subsets.degree,
        coefficient=subsets.coefficient,
        seed=subsets.seed,
        shrink=subsets.shrink,
    )
    return {"mean": found.mean, "deviation": found.deviation, "subsets": len(found.values), "size": found.size}


def _features(side: Side, score: str) -> Array:
    if side.activations is None:
        raise BadInputError(f"{side.path}: holds statistics, and ⟨metrics⟩ {score} needs images")
    return side.activations.features


def write_score(path: Path, result: Score, force: bool, inputs: Iterable[Path] = ()) -> int:
    """Write a score as safetensors: numbers as tensors, everything else as metadata; return the bytes."""
    numbers = {result.metric: result.value, **_flat(result.scores)}
    if result.paired is not None:
        numbers["paired_mse"] = result.paired.mse
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}
    return write_arrays(path, arrays, {**result.to_json(), "schema": SCORE_SCHEMA}, force, inputs)


def _flat(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested numbers under names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in scores.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
