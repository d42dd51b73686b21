"""The scores that ``fid`` takes beside the distance: names, what each needs, and which conventions have it. Torch-free.

A new score is computed in a module of this folder, declared in `METRICS`, and called in `evaluation.fid_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, Convention, convention_named

DEFAULT_CONVENTION = "adm"


@dataclass(frozen=True)
class Metric:
    """A score's needs, by convention.

    Attributes:
        offered: whether a convention has the score.
        subject_features, reference_features: whether it needs features of that side's images; else statistics do.
        activations: activations beside features that it needs.
        fewest: images that it needs of each side whose features it takes; 0 where any number does.
    """

    offered: Callable[[Convention], bool]
    subject_features: bool = True
    reference_features: bool = False
    activations: Callable[[Convention], tuple[str, ...]] = lambda _: ()
    fewest: Callable[[Convention], int] = lambda _: 0


def _logits(convention: Convention) -> tuple[str, ...]:
    return ("biased_logits" if convention.inception is not None and convention.inception.bias else "logits",)


def _parts(convention: Convention) -> int:
    return (convention.inception.parts if convention.inception is not None else None) or 1


def _subset(convention: Convention) -> int:
    return 2 if convention.kernel is None or convention.kernel.shrink else convention.kernel.size


METRICS: Mapping[str, Metric] = {
    "sfid": Metric(lambda it: it.spatial, subject_features=False, activations=lambda _: ("spatial",)),
    "is": Metric(lambda it: it.inception is not None, activations=_logits, fewest=_parts),
    "pr": Metric(
        lambda it: it.neighbours is not None, reference_features=True, fewest=lambda it: (it.neighbours or 1) + 1
    ),
    "kid": Metric(lambda it: it.kernel is not None, reference_features=True, fewest=_subset),
    "fid-inf": Metric(lambda _: True),  # ours, under every convention
}


@dataclass(frozen=True)
class Request:
    """Scores of `METRICS` to take beside the distance, their convention, and resamples for the distance's interval."""

    scores: tuple[str, ...] = ()
    convention: str = DEFAULT_CONVENTION
    resamples: int = 0

    @property
    def activations(self) -> tuple[str, ...]:
        """Activations beside features that the scores need."""
        convention = CONVENTIONS[self.convention]
        return tuple(
            kind for name, metric in METRICS.items() if name in self.scores for kind in metric.activations(convention)
        )

    @property
    def needs_subject_features(self) -> tuple[str, ...]:
        """Settings for which statistics of the subject are not enough."""
        settings = tuple(_setting(name) for name in self.scores if METRICS[name].subject_features)
        return (*settings, *(("⟨bootstrap⟩",) if self.resamples else ()))

    @property
    def needs_reference_features(self) -> tuple[str, ...]:
        """Settings for which statistics of the reference are not enough."""
        return tuple(_setting(name) for name in self.scores if METRICS[name].reference_features)

    @property
    def fewest(self) -> tuple[tuple[str, int], ...]:
        """Images that each score needs of a side whose features it takes, by setting; the last metric first."""
        convention = CONVENTIONS[self.convention]
        named = [(name, metric.fewest(convention)) for name, metric in METRICS.items() if name in self.scores]
        return tuple((_setting(name), count) for name, count in reversed(named))


def _setting(name: str) -> str:
    return f"⟨metrics⟩ {name}"


def parse_scores(text: str | None, convention: str) -> tuple[str, ...]:
    """Return the scores of a list such as ``sfid,is``; ``all`` stands for every score of the convention.

    Raises `UsageError` for unknown names, and for scores that the convention does not have.
    """
    offered = offered_by(convention_named(convention))
    if text is None:
        return ()
    names = offered if text == "all" else tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in METRICS:
            raise UsageError(f"⟨metrics⟩ {name}: unknown; choose from {', '.join(METRICS)} or all")
        if name not in offered:
            others = [key for key, value in CONVENTIONS.items() if name in offered_by(value)]
            raise UsageError(
                f"⟨metrics⟩ {name}: {convention} has no such score; give ⟨convention⟩ {' or '.join(others)}"
            )
    return tuple(dict.fromkeys(names))


def offered_by(convention: Convention) -> tuple[str, ...]:
    """Return the scores that a convention has."""
    return tuple(name for name, metric in METRICS.items() if metric.offered(convention))
