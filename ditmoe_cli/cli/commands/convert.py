"""``ditmoe convert``: any layout to safetensors."""

from __future__ import annotations

from ditmoe_cli.cli.options import (
    CheckpointArg,
    DryRun,
    Force,
    Heads,
    Json,
    OutputOpt,
    Quiet,
    SamplerOpt,
    ShardSize,
    TopK,
    given,
)
from ditmoe_cli.cli.planning import Job, Target, preview, write
from ditmoe_cli.cli.stage import incoming, open_stage
from ditmoe_cli.cli.terminal import Printing


def run(
    checkpoint: CheckpointArg = None,
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: OutputOpt = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: ShardSize = "10GB",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write any layout as safetensors.

    The output carries its whole configuration. Tensors keep their upstream names and bytes; EMA weights are preferred.
    """
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = Target(output, force, max_shard_size).output(opened, "converted")
    job = Job("convert", stage, opened, target, Printing(json, quiet))
    return preview(job, None) if dry_run else write(job, None)
