"""``ditmoe export``: a checkpoint in the layout of another program."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api.argument_checks import one_of, refuse_idle
from ditmoe_cli.api.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.api.model_cards import Loading, Shown, model_card
from ditmoe_cli.api.output_names import stem
from ditmoe_cli.api.written_checkpoints import size_facts
from ditmoe_cli.cli.card_options import CardContents
from ditmoe_cli.cli.options import Destination, Source, Weights
from ditmoe_cli.cli.planning import size_rows
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note, with_options
from ditmoe_cli.compression.estimates import carrying_out
from ditmoe_cli.export.diffusers_folder import PICTURE, VAE, pipeline_code
from ditmoe_cli.export.exported import Wanted
from ditmoe_cli.export.targets import TARGETS, Target, laid_out
from ditmoe_cli.files.staging import check_space
from ditmoe_cli.model.throughput import known_rate, likely_device

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
class ExportDestination(Destination):
    """Where an export goes."""

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

    def wanted(self, target: Target, checkpoint: Path, weights: Weights) -> Wanted:
        """Return where the export goes; without --output it is named after the input, the program and the weights."""
        storage = weights.storage
        told = replace(storage, dequantize=storage.dequantize and not target.plain).name
        ending = target.endings[0] if target.endings else ""
        path = self.output or Path(f"{stem(checkpoint)}.{target.name}{told}{ending}")
        if target.is_file(path):
            refuse_idle(self, "on a single file", "max_shard_size")
        return Wanted(path.absolute(), self.force, self.max_shard_size.bytes, storage, self.vae)


def run(
    source: Source,
    layout: Layout,
    weights: Weights,
    carding: CardContents,
    to: ExportDestination,
    printing: Printing,
) -> None:
    """Write a checkpoint in the layout of another program.

    What the layout cannot express is refused by name. Folders of pipelines have a model card, README.md. A pipe goes on
    with the checkpoint that was exported.
    """
    started, target = time.monotonic(), layout.target
    stage = source.stage()
    checkpoint = open_stage(stage)
    wanted = to.wanted(target, Path(stage.checkpoint or checkpoint.path), weights)
    if target.vae and not target.is_file(wanted.path):  # the folder of a pipeline, as hubs show it
        scores, picture = carding.read_scores(checkpoint), None if carding.picture is None else PICTURE
        shown = Shown(scores, picture, Loading(target.reader, pipeline_code(wanted.path.name)))
        wanted = replace(wanted, card=model_card(checkpoint, shown, with_options), picture=carding.picture)
    else:
        refuse_idle(carding, f"with --to {target.name}, whose output has no card", "scores", "picture")
    export = laid_out(target, checkpoint, wanted, note)
    path, size = wanted.path, export.nbytes
    estimates, rate = carrying_out(export.checkpoint, None, size), known_rate(likely_device("cpu"))
    is_there = export.check()
    result = {**size_facts(size, checkpoint.header.file_bytes), target.name: export.facts()}
    rows: list[Row] = [*size_rows(result), *export.usage()]
    if is_there:
        note(f"{path} is up to date")
        result, rows = {**result, "up_to_date": True}, [("up to date", path), *rows]
    if to.dry_run:
        result |= {"dry_run": True, "plan": None, "estimate": None if is_there else estimate_of(estimates, rate)}
        rows = rows if is_there else [("would write", path), *rows, estimate_row(estimates, rate)]
        return emit(printing, stage.to_json(result), rows, str(path), editable=True)
    if not is_there:
        check_space(path, size)
        foretell(estimates, lambda: "cpu")
        export.write()
        seconds = round(time.monotonic() - started, 1)
        result, rows = {**result, "seconds": seconds}, [("wrote", path), *rows, ("seconds", f"{seconds:,.1f}")]
    done = stage.done("export", {"to": target.name, "output": str(path)})
    return emit(printing, done.to_json(result), rows, str(path))
