"""``ditmoe export``: a checkpoint in the layout of another program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api import export_runs as asked
from ditmoe_cli.api.argument_checks import one_of
from ditmoe_cli.api.export_runs import ForeseenExport, exported_result
from ditmoe_cli.api.foretelling import estimate_row
from ditmoe_cli.cli.card_options import CardContents
from ditmoe_cli.cli.options import Destination, Source, Weights
from ditmoe_cli.cli.planning import size_rows
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit
from ditmoe_cli.exporting.diffusers_folder import VAE
from ditmoe_cli.exporting.targets import TARGETS, Target

EXAMPLES = (
    "ditmoe export small.safetensors --to diffusers -o small",
    "ditmoe export pruned.safetensors --to upstream -o pruned.pt",
    "ditmoe compress ckpt.pt --ratio 0.25 | ditmoe export --to diffusers -o quarter | ditmoe fid",
)


@dataclass(frozen=True)
class Layout:
    """Whose layout is written."""

    panel: ClassVar[str] = "Layout"

    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            callback=one_of(*TARGETS),
            help=f"The program to write for. {'. '.join(f'{name}: {t.summary}' for name, t in TARGETS.items())}.",
        ),
    ]

    @property
    def target(self) -> Target:
        """The target of that name."""
        return TARGETS[self.to]


@dataclass(frozen=True)
class ExportDestination(asked.ExportDestination, Destination):
    """Where an export goes, and the VAE that it holds or names."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="The file or folder to write. [default: named after the input and the program]",
        ),
    ] = None

    vae: Annotated[
        str | None,
        typer.Option(
            "--vae",
            metavar="PATH",
            help="What decodes latents, for diffusers: a folder of an AutoencoderKL, which is copied, or a hub name, "
            f"which is fetched when images are first decoded. [default: {VAE}]",
        ),
    ] = None


def run(
    source: Source,
    layout: Layout,
    weights: Weights,
    carding: CardContents,
    to: ExportDestination,
    printing: Printing,
) -> None:
    """Write a checkpoint in the layout of another program.

    What the layout cannot express is refused by name. Folders have a model card, README.md. A pipe goes on
    with the checkpoint that was exported.
    """
    stage, target = source.stage(), layout.target
    checkpoint = open_stage(stage)
    wanted = to.wanted(target, Path(stage.checkpoint or checkpoint.path), weights.storage)
    result = exported_result(checkpoint, target, wanted, carding, dry_run=to.dry_run)
    document, path = result.to_json(), str(result.path)
    rows: list[Row] = [*size_rows(document), *result.usage]
    if isinstance(result, ForeseenExport):
        rows = [("would write", path), *rows, estimate_row(result.estimates, result.rate)]
    elif result.seconds is None:
        rows = [("up to date", path), *rows]
    else:
        rows = [("wrote", path), *rows, ("seconds", f"{result.seconds:,.1f}")]
    if to.dry_run:
        document = {"plan": None, "estimate": None, **document, "dry_run": True}
        return emit(printing, stage.to_json(document), rows, path, editable=True)
    done = stage.done("export", {"to": target.name, "output": path})
    return emit(printing, done.to_json(document), rows, path)
