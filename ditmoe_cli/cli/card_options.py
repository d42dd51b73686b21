"""Options of model cards: what they show beside what a file records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api.argument_checks import ending
from ditmoe_cli.api.model_cards import read_score
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class CardContents:
    """What a model card shows beside what the file records."""

    panel: ClassVar[str] = "Model card"

    scores: Annotated[
        list[Path] | None,
        typer.Option(
            "--scores", metavar="FILE", help="What fid or compare printed as JSON, for the card; repeated for several."
        ),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            callback=ending(".png"),
            help="A PNG of the original's images beside the copy's, as compare --grid draws it, for the card.",
        ),
    ] = None

    @property
    def inputs(self) -> list[Path]:
        """The files that are read."""
        return [*(self.scores or ()), *([] if self.picture is None else [self.picture])]

    def read_scores(self, checkpoint: Checkpoint) -> Sequence[Mapping[str, Any]]:
        """Return the scores. Raises `BadInputError` as `read_score` does, and for a picture that is not there."""
        if self.picture is not None and not self.picture.is_file():
            raise BadInputError(f"{self.picture}: no such file")
        return [read_score(file, checkpoint) for file in self.scores or ()]
