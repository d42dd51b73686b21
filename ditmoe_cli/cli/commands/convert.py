"""``ditmoe convert``: any layout to safetensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.api.conversion_runs import converted_result, label_of_conversion
from ditmoe_cli.cli.options import Destination, Source, Weights
from ditmoe_cli.cli.planning import Job, show_result
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.files.pipelines import model_folder
from ditmoe_cli.model.checkpoint import Checkpoint

EXAMPLES = (
    "ditmoe convert ckpt.pt -o ckpt.safetensors",
    "ditmoe convert run/checkpoints -o shards --max-shard-size 5GB",
    "ditmoe convert ckpt.pt --dtype bf16",
    "ditmoe convert DiT-MoE-XL-8E2A --from-diffusers",
)


@dataclass(frozen=True)
class Layouts:
    """Layouts of other programs."""

    panel: ClassVar[str] = "Layout"

    from_diffusers: Annotated[
        bool,
        typer.Option(
            "--from-diffusers",
            help="Read the model in the folder of a diffusers pipeline, and nothing else there.",
        ),
    ] = False

    def opened(self, stage: Stage) -> Checkpoint:
        """Return the stage's checkpoint."""
        if not self.from_diffusers or stage.checkpoint is None:
            return open_stage(stage)
        folder = model_folder(Path(stage.checkpoint))
        return open_stage(replace(stage, checkpoint=str(folder)))


def run(source: Source, weights: Weights, layouts: Layouts, to: Destination, printing: Printing) -> None:
    """Write a checkpoint of any layout as safetensors.

    The output carries its whole configuration. Tensors keep their upstream names and, without --dtype, their bytes;
    where a training checkpoint holds averaged (EMA) weights, those are written.
    """
    stage = source.stage()
    opened = layouts.opened(stage)
    storage = weights.storage
    output = to.at(Path(stage.checkpoint or opened.path), label_of_conversion(storage))
    result = converted_result(opened, storage, output, dry_run=to.dry_run)
    show_result(Job("convert", stage, opened, output, printing), result, dry_run=to.dry_run)
