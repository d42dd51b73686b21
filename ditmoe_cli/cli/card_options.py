"""Options of model cards: what they show beside what a file records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import card_contents as asked
from ditmoe_cli.api.argument_checks import ending


@dataclass(frozen=True)
class CardContents(asked.CardContents):
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
    samples: Annotated[
        list[Path] | None,
        typer.Option(
            "--samples",
            metavar="FILE",
            help="Given twice: what sample wrote of the copy and of its original, by the same seeds, to draw pairs of "
            "in place of --picture.",
        ),
    ] = None
