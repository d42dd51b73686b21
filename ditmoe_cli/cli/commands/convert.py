"""``ditmoe convert``: any layout to safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from ditmoe_cli.cli.groups import one_of
from ditmoe_cli.cli.options import Destination, Source
from ditmoe_cli.cli.planning import Job, preview, reuse, write
from ditmoe_cli.cli.reuse import made_before
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, note
from ditmoe_cli.files.casting import DTYPES
from ditmoe_cli.model.checkpoint import Checkpoint, in_dtype

EXAMPLES = (
    "ditmoe convert ckpt.pt -o ckpt.safetensors",
    "ditmoe convert run/checkpoints -o shards --max-shard-size 5GB",
    "ditmoe convert ckpt.pt --dtype bf16",
)


@dataclass(frozen=True)
class Casting:
    """The dtype of the output's weights."""

    panel: ClassVar[str] = "Output"

    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            callback=one_of(*DTYPES),
            help="Dtype of all weights that are not quantised: fp32, bf16 or fp16. [default: as stored]",
        ),
    ] = None

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint in that dtype."""
        if self.dtype is None:
            return checkpoint
        kept = sum(weight.quantized for weight in checkpoint.weights.values())
        if kept:
            note(f"{kept} quantised weights stay as they are; --dtype is for the others")
        cast = in_dtype(checkpoint, self.dtype)
        if cast is checkpoint:
            note(f"warning: --dtype {self.dtype} has no effect: the weights are stored in it")
        return cast


def run(source: Source, casting: Casting, to: Destination, printing: Printing) -> None:
    """Write a checkpoint of any layout as safetensors.

    The output carries its whole configuration. Tensors keep their upstream names and, without --dtype, their bytes;
    where a training checkpoint holds averaged (EMA) weights, those are written.
    """
    stage = source.stage()
    opened = casting.of(open_stage(stage))
    job = Job("convert", stage, opened, to.at(opened.path, "converted"), printing)
    if to.dry_run:
        return preview(job, None)
    made = made_before(job.output, opened, None)
    return reuse(job, made) if made is not None else write(job, None)
