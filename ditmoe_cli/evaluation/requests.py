"""What scores are asked for, and what each of them takes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.conventions import CONVENTIONS, Convention, convention_named

SCORES: Mapping[str, str] = {
    "sfid": "sFID",
    "is": "Inception score",
    "pr": "precision and recall",
    "kid": "kernel distance (KID)",
    "fid-inf": "distance at infinitely many images (FID∞)",
}
DEFAULT_CONVENTION = "adm"
PRECISIONS = ("fp32", "bf16")
_FEATURES_OF_BOTH = frozenset({"pr", "kid"})


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
    def needs_reference_features(self) -> bool:
        """Whether statistics of the reference are not enough."""
        return bool(_FEATURES_OF_BOTH.intersection(self.scores))


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
            raise UsageError(f"--metrics {name}: unknown; choose from {', '.join(SCORES)} or all")
        if name not in having:
            others = [key for key, value in CONVENTIONS.items() if name in available(value)]
            raise UsageError(
                f"--metrics {name}: {convention} has no such score; give --convention {' or '.join(others)}"
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
