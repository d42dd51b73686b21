"""What model cards show beside what a file records: scores, and a picture of pairs, given or drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_cli.api.model_cards import Loading, Shown, model_card, read_score
from ditmoe_cli.api.sample_runs import SampledImages
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint

MOST_PAIRS = 16  # in the picture of a card


@dataclass(frozen=True)
class CardContents:
    """What a model card shows beside what the file records.

    Attributes:
        scores: files of what was measured, as ``fid`` and ``compare`` print it.
        picture: a PNG of pairs of images.
        samples: two files to draw such pairs of: samples of the checkpoint and of its original, in any order.
    """

    scores: Sequence[Path] | None = None
    picture: Path | None = None
    samples: Sequence[Path] | None = None

    @property
    def inputs(self) -> list[Path]:
        """The files that are read."""
        return [*(self.scores or ()), *([] if self.picture is None else [self.picture]), *(self.samples or ())]

    def card_of(self, checkpoint: Checkpoint, picture: str, loading: Loading | None = None) -> tuple[str, bytes | None]:
        """Return the card of a checkpoint, which calls its picture so, and that picture; None where it has none.

        Raises `BadInputError` as `read_score` and `pairs_of` do, and for a picture that is not there.
        """
        scores = [read_score(file, checkpoint) for file in self.scores or ()]
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
    scores: Iterable[str | Path] | None,
    picture: str | Path | None,
    samples: Iterable[str | Path | SampledImages] | None,
) -> tuple[tuple[Path, ...] | None, Path | None, tuple[Path, ...] | None]:
    """Return the files that a card shows, as paths."""
    files = None if samples is None else (each.path if isinstance(each, SampledImages) else each for each in samples)
    return _paths(scores), None if picture is None else Path(picture), _paths(files)


def _paths(files: Iterable[str | Path] | None) -> tuple[Path, ...] | None:
    return tuple(map(Path, files)) or None if files is not None else None
