"""Scores of ``fid`` that an earlier run kept: the key of a comparison, and what is kept under it. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.vae import decoding_digest
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features.extractors import EXTRACTORS
from ditmoe_cli.evaluation.features.inception_weights import checked_weights, will_fetch
from ditmoe_cli.evaluation.fid import FidSettings, extractor_name
from ditmoe_cli.evaluation.fid_score import Score, parse_score
from ditmoe_cli.evaluation.fid_sides import Comparison, Item
from ditmoe_cli.evaluation.fid_specs import SpecOf, side_specs
from ditmoe_cli.evaluation.images import images_digest
from ditmoe_cli.evaluation.kept_results import keep, read_kept, result_key
from ditmoe_cli.evaluation.worker import Notify
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.model.checkpoint import Checkpoint

_SIDES = ("subject", "reference", "original")


@dataclass(frozen=True)
class KeptScore:
    """A score, the seconds that it took, what was said while it was taken, and digests of the statistics written."""

    score: Score
    seconds: float
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, str] | None = None

    def has_statistics(self, path: Path | None) -> bool:
        """Return whether a file of the subject's statistics is as this comparison wrote it; so is none to write."""
        wanted = (self.statistics or {}).get(path.suffix) if path else None
        return path is None or (path.is_file() and not path.is_symlink() and file_digest(path) == wanted)


def score_key(comparison: Comparison, spec_of: SpecOf, settings: FidSettings, device: str) -> str | None:
    """Return the key of a comparison's score: the digest of contents and settings that it depends on.

    None where these are not known without measuring: for an extractor of the user's, or weights and VAEs to fetch.
    """
    name, grey_levels = extractor_name(comparison, settings.extractor)
    if name not in EXTRACTORS or (name == "inception" and will_fetch(settings.weights)):
        return None
    vae = decoding_digest(settings.vae) if settings.vae is not None else None
    if settings.vae is not None and vae is None:
        return None
    try:
        sides = _identities(comparison, spec_of, settings.weak)
    except (UsageError, BadInputError):  # which the comparison itself reports
        return None
    return result_key(
        "fid",
        {
            **sides,
            "extractor": [name, grey_levels, settings.extractor],
            "weights": checked_weights(settings.weights)[1] if name == "inception" else None,
            "precision": settings.precision,
            "vae": vae,
            "request": asdict(settings.request),
            "anyway": settings.anyway,
            "statistics": settings.statistics is not None,
            "device": device,
        },
    )


def _identities(comparison: Comparison, spec_of: SpecOf, weak: Checkpoint | None) -> dict[str, Any]:
    """Return what determines each side, as JSON; of distilled checkpoints and their originals how they were sampled."""
    specs, found = side_specs(comparison, spec_of, weak), dict[str, Any]()
    for side in _SIDES:
        item: Item = getattr(comparison, side)
        spec, model = specs.specs[item.key], specs.models[item.key]
        if item.checkpoint is not None and item.schedule is None and not specs.distilled:
            spec = spec_of(item.checkpoint)
        found[side] = {**_identity(item, spec), **(model.to_json() if model is not None else {})}
    return found


def _identity(item: Item, spec: SampleSpec | None) -> dict[str, Any]:
    """Return what determines a side, as JSON: contents, and for a checkpoint its card and how it would be sampled."""
    if item.checkpoint is None or spec is None:
        return {"contents": images_digest(item.path)}
    card = asdict(item.checkpoint.card)
    return {"checkpoint": item.checkpoint.fingerprint, "card": card, "spec": spec.to_json()}


def kept_score(key: str, comparison: Comparison) -> KeptScore | None:
    """Return the score that is kept under a key, with the paths of this comparison; None where there is none."""
    document = read_kept(key)
    if document is None:
        return None
    try:
        score, seconds = parse_score(document["score"]), float(document["seconds"])
        notes = tuple(map(str, document["notes"]))
        statistics = {str(suffix): str(digest) for suffix, digest in document["statistics"].items()}
        conditions = dict(score.conditions)
        for side in _SIDES:
            if conditions[side] is not None:
                before, now = conditions[side]["path"], str(getattr(comparison, side).path)
                conditions[side] = {**conditions[side], "path": now}
                notes = tuple(note.replace(before, now) for note in notes)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return KeptScore(replace(score, conditions=conditions), seconds, notes, statistics)


def keep_score(key: str, kept: KeptScore, statistics: Path | None, notify: Notify) -> None:
    """Keep a score under a key, with the digest of the file of statistics that was written beside it."""
    digests = dict(kept.statistics or {})
    if statistics is not None:
        digests[statistics.suffix] = file_digest(statistics)
    document = {
        "score": kept.score.to_json(),
        "seconds": kept.seconds,
        "notes": list(kept.notes),
        "statistics": digests,
    }
    keep(key, document, notify)
