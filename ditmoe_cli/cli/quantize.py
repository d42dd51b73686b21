"""``ditmoe quantize``: fewer bits."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

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
from ditmoe_cli.cli.output import Printing
from ditmoe_cli.cli.stage import default_output, incoming, open_stage
from ditmoe_cli.cli.writing import preview, write
from ditmoe_cli.errors import UsageError

Bits = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--bits", metavar="4|8", help="4: NF4, blocks of 64; 8: int8, one scale a row."),
]


def run(
    checkpoint: CheckpointArg = None,
    bits: Bits = None,
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
    """Store experts and attention in 4 or 8 bits.

    Routed and shared experts and attention are stored as bitsandbytes serialises them. Router, embedders, norms,
    modulation and biases stay as they are.
    """
    from ditmoe_cli.compression.quantize.uniform import format_of_bits, plan_uniform

    if bits is None:
        raise UsageError("--bits is missing: give 4 or 8")
    fmt = format_of_bits(bits)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    plan = plan_uniform(opened, bits)
    target = output or default_output(opened.path, f"quantize-bits{bits}")
    if dry_run:
        return preview(stage, opened, plan, target, force, max_shard_size, Printing(json, quiet))
    details = {"format": fmt, "weights": len(plan.formats)}
    return write(stage, "quantize", opened, plan, target, force, max_shard_size, Printing(json, quiet), details)
