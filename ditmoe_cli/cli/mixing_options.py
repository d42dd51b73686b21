"""Options of the formats that a plan may choose from, for commands that mix them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import quantizing_requests as asked
from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of a list separated by commas."""
    return tuple(filter(None, text.replace(" ", "").split(",")))


@dataclass(frozen=True)
class Mixing(asked.Mixing):
    """Formats that a planned mix may choose from."""

    panel: ClassVar[str] = "Formats of a mix"

    allow: Annotated[
        tuple[str, ...],
        typer.Option(
            "--allow",
            metavar="B,...",
            parser=parse_names,
            help="Widths to choose from, in bits; 16 leaves a weight as it is. [default: 2,3,4,5,6,8,16]",
        ),
    ] = DEFAULT_ALLOWED
    floor: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            metavar="GROUP=B",
            help="Fewest bits of experts, shared, attn, modulation or embedders, as attn=4; may be repeated.",
        ),
    ] = None
    protect: Annotated[
        tuple[str, ...],
        typer.Option(
            "--protect", metavar="GROUP,...", parser=parse_names, help="Groups of weights to leave as they are."
        ),
    ] = ()
    tie: Annotated[
        tuple[str, ...],
        typer.Option(
            "--tie", metavar="gate,up", parser=parse_names, help="Matrices of an expert to give the same format."
        ),
    ] = ()
