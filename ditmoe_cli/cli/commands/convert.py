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
from ditmoe_cli.cli.planning import preview, write
from ditmoe_cli.cli.stage import default_output, incoming, open_stage
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
    printing = Printing(json, quiet)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = output or default_output(opened.path, "converted")
    if dry_run:
        return preview(stage, opened, None, target, force, max_shard_size, printing)
    return write(stage, "convert", opened, None, target, force, max_shard_size, printing)
