"""What model cards show beside what a file records: scores, and a picture of pairs, given or drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_cli.api.model_cards import Loading, Measurement, Shown, model_card, read_score
from ditmoe_cli.api.sample_runs import SampledImages
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint

MOST_PAIRS = 16  # in the picture of a card


@dataclass(frozen=True)
class CardContents:
    """What a model card shows beside what the file records.

    Attributes:
        scores: what `score` and `compare` found, or files of what ``fid`` and ``compare`` printed.
        picture: a PNG of pairs of images.
        samples: two files to draw such pairs of: samples of the checkpoint and of its original, in any order.
    """

    scores: Sequence[Path | Measurement] | None = None
    picture: Path | None = None
    samples: Sequence[Path] | None = None

    @property
    def inputs(self) -> list[Path]:
        """The files that are read."""
        scores = [score for score in self.scores or () if isinstance(score, Path)]
        return [*scores, *([] if self.picture is None else [self.picture]), *(self.samples or ())]

    def card_of(self, checkpoint: Checkpoint, picture: str, loading: Loading | None = None) -> tuple[str, bytes | None]:
        """Return the card of a checkpoint, which calls its picture so, and that picture; None where it has none.

        Raises `BadInputError` as `read_score` and `pairs_of` do, and for a picture that is not there.
        """
        scores = [read_score(score, checkpoint) for score in self.scores or ()]
        pixels, sampling = self._pictured(checkpoint)
        shown = Shown(scores, None if pixels is None else picture, loading, sampling)
        return model_card(checkpoint, shown), pixels

    def _pictured(self, checkpoint: Checkpoint) -> tuple[bytes | None, Mapping[str, Any] | None]:
        """Return the picture, and how its images were sampled where that is known."""
        if self.picture is not None and self.samples:
            raise UsageError("⟨samples⟩ and ⟨picture⟩: a card shows one picture; give one of both")
        if self.picture is not None:
            if not self.picture.is_file():
                raise BadInputError(f"{self.picture}: no such file")
            return self.picture.read_bytes(), None
        if not self.samples:
            return None, None
        from ditmoe_cli.evaluation.sample_pairs import pairs_of

        pairs = pairs_of(self.samples, checkpoint)
        return pairs.picture(MOST_PAIRS), pairs.spec.conditions()


def contents_of(
    scores: Iterable[str | Path | Measurement] | None,
    picture: str | Path | None,
    samples: Iterable[str | Path | SampledImages] | None,
) -> tuple[tuple[Path | Measurement, ...] | None, Path | None, tuple[Path, ...] | None]:
    """Return what a card shows, its files as paths."""
    found = tuple(Path(each) if isinstance(each, str) else each for each in scores or ())
    files = tuple(each.path if isinstance(each, SampledImages) else Path(each) for each in samples or ())
    return found or None, None if picture is None else Path(picture), files or None
