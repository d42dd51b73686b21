"""``ditmoe quantize``: fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import quantizing_requests as asked
from ditmoe_cli.api.argument_checks import one_of
from ditmoe_cli.api.output_names import Size, parse_size
from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.mixing_options import Mixing
from ditmoe_cli.cli.options import Destination, Models, Planning, Source
from ditmoe_cli.cli.planning import print_methods, run_planner
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.precision.candidates import DEFAULT_GROUP_SIZE
from ditmoe_cli.compression.precision.uniform import KINDS

MACHINE = Models
EXAMPLES = (
    "ditmoe quantize ckpt.pt --bits 3.25",
    "ditmoe quantize ckpt.pt --size 2.5GiB --floor attn=4 --dry-run",
    "ditmoe quantize ckpt.pt --uniform --format nf4",
)


@dataclass(frozen=True)
class Precision(asked.Precision):
    """How precise weights stay: the size to meet, by one format or a planned mix."""

    panel: ClassVar[str] = "Precision"

    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", metavar="B", help="Bits per weight, as 4 or 3.25: the file is as large as with B bits everywhere."
        ),
    ] = None
    size: Annotated[
        Size | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            parser=parse_size,
            help="Size of the whole file, as 2.5GiB or 900MB; replaces --bits.",
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            autocompletion=completing(*MIXES),
            help="How the mix is planned; see --list-methods.",
        ),
    ] = DEFAULT_METHODS["quantize"]
    uniform: Annotated[bool, typer.Option("--uniform", help="Give all weights one format instead of a mix.")] = False
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="nf4|fp4|int8|int|ternary",
            autocompletion=completing(*KINDS),
            help="Format of --uniform. [default: chosen by --bits]",
        ),
    ] = None


@dataclass(frozen=True)
class Grids(asked.Grids):
    """The grids that weights are rounded to."""

    panel: ClassVar[str] = "Grids"

    double_quant: Annotated[bool, typer.Option("--double-quant", help="Quantise the scales of nf4 or fp4 too.")] = False
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            metavar="32|64|128",
            autocompletion=completing("32", "64", "128"),
            help="Number of weights that share a scale.",
        ),
    ] = DEFAULT_GROUP_SIZE
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Use ranges symmetric about 0, without zero points.")
    ] = False


@dataclass(frozen=True)
class RoundingOptions(asked.RoundingOptions):
    """How weights are rounded."""

    panel: ClassVar[str] = "Rounding"

    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            metavar="gptq|nearest",
            callback=one_of("gptq", "nearest"),
            help="How weights are rounded to their grid. [default: gptq, with --uniform nearest]",
        ),
    ] = None
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            metavar="N",
            show_default=False,
            help="Calibration tokens to round on. [default: 8 for each input, at least 20480 and at most 65536]",
        ),
    ] = 0
    smooth: Annotated[
        float,
        typer.Option(
            "--smooth",
            metavar="A",
            help="Divide each input of the mixtures by the power A, 0 to 1, of its largest value before rounding, and "
            "multiply its weights by the same; 0 is off.",
        ),
    ] = 0.0


def run(
    precision: Precision,
    grids: Grids,
    mixing: Mixing,
    rounding: RoundingOptions,
    planning: Planning,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Store weights in fewer bits: a format for each, planned so that the prediction changes least.

    A planned mix takes the routing profile of --profile, of the pipe, or beside the checkpoint; without one it is
    profiled first. --uniform with --rounding nearest needs none. Router, patch and label embedding, norms and biases
    stay as they are.
    """
    if planning.list_methods:
        return print_methods("quantize", printing)
    planner = asked.quantizing_of(precision, grids, mixing, rounding)
    return run_planner(planner, planning, automatic, source, to, printing)
