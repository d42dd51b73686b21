"""What scores are asked for, and what each of them takes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, Convention, convention_named

SCORES: Mapping[str, str] = {
    "sfid": "sFID",
    "is": "Inception score",
    "pr": "precision and recall",
    "kid": "kernel distance (KID)",
    "fid-inf": "distance at infinitely many images (FID∞)",
}
DEFAULT_CONVENTION = "adm"
_OF_SUBJECT_FEATURES = ("is", "pr", "kid", "fid-inf")
_OF_REFERENCE_FEATURES = ("pr", "kid")


@dataclass(frozen=True)
class Request:
    """Scores of `SCORES` beside the distance, the convention that they follow, and resamples for an interval of it."""

    scores: tuple[str, ...] = ()
    convention: str = DEFAULT_CONVENTION
    resamples: int = 0

    @property
    def wanted(self) -> tuple[str, ...]:
        """Activations beside features that the scores take."""
        inception = CONVENTIONS[self.convention].inception
        logits = "biased_logits" if inception is not None and inception.bias else "logits"
        return (*(("spatial",) if "sfid" in self.scores else ()), *((logits,) if "is" in self.scores else ()))

    @property
    def of_subject_features(self) -> tuple[str, ...]:
        """The options for which statistics of the subject are not enough."""
        return (*self._metrics(_OF_SUBJECT_FEATURES), *(("⟨bootstrap⟩",) if self.resamples else ()))

    @property
    def of_reference_features(self) -> tuple[str, ...]:
        """The options for which statistics of the reference are not enough."""
        return self._metrics(_OF_REFERENCE_FEATURES)

    @property
    def fewest(self) -> tuple[tuple[str, int], ...]:
        """The images that scores take of each side whose features they need, by option."""
        convention = CONVENTIONS[self.convention]
        subsets, parts = convention.kernel, convention.inception
        found = {
            "kid": 2 if subsets is None or subsets.shrink else subsets.size,
            "pr": (convention.neighbours or 1) + 1,
            "is": (parts.parts if parts is not None else None) or 1,
        }
        return tuple((f"⟨metrics⟩ {name}", count) for name, count in found.items() if name in self.scores)

    def _metrics(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"⟨metrics⟩ {name}" for name in self.scores if name in names)


def parse_scores(text: str | None, convention: str) -> tuple[str, ...]:
    """Return the scores of a list such as ``sfid,is``, or ``all`` that a convention has.

    Raises `UsageError` for unknown ones, and for those that the convention's program does not give.
    """
    if text is None:
        convention_named(convention)
        return ()
    having = available(convention_named(convention))
    names = having if text == "all" else tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in SCORES:
            raise UsageError(f"⟨metrics⟩ {name}: unknown; choose from {', '.join(SCORES)} or all")
        if name not in having:
            others = [key for key, value in CONVENTIONS.items() if name in available(value)]
            raise UsageError(
                f"⟨metrics⟩ {name}: {convention} has no such score; give ⟨convention⟩ {' or '.join(others)}"
            )
    return tuple(dict.fromkeys(names))


def available(convention: Convention) -> tuple[str, ...]:
    """Return the scores that a convention has; the extrapolated distance is ours, and always at hand."""
    having = {
        "sfid": convention.spatial,
        "is": convention.inception is not None,
        "pr": convention.neighbours is not None,
        "kid": convention.kernel is not None,
        "fid-inf": True,
    }
    return tuple(name for name, there in having.items() if there)
