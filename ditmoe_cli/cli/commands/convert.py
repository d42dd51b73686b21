"""``ditmoe convert``: any layout to safetensors."""

from __future__ import annotations

from ditmoe_cli.cli.options import Destination, Source
from ditmoe_cli.cli.planning import Job, preview, write
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing

EXAMPLES = (
    "ditmoe convert ckpt.pt -o ckpt.safetensors",
    "ditmoe convert run/checkpoints -o shards --max-shard-size 5GB",
)


def run(source: Source, to: Destination, printing: Printing) -> None:
    """Write a checkpoint of any layout as safetensors.

    The output carries its whole configuration. Tensors keep their upstream names and bytes; where a training checkpoint
    holds EMA weights, those are written.
    """
    stage = source.stage()
    opened = open_stage(stage)
    job = Job("convert", stage, opened, to.at(opened.path, "converted"), printing)
    return preview(job, None) if to.dry_run else write(job, None)
