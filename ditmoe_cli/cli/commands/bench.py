"""``ditmoe bench``: what running a checkpoint takes on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ditmoe_cli.cli.options import (
    Cfg,
    CheckpointArg,
    Device,
    Heads,
    Json,
    SamplerOpt,
    Seed,
    TopK,
    checked_device,
    given,
    parse_size,
)
from ditmoe_cli.cli.stage import incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes, progress
from ditmoe_cli.errors import GateError

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.bench import Bench, Sizes

BatchOpt = Annotated[int, typer.Option("--batch", metavar="N", help="Images per forward pass.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Timed passes; the least time is reported.")]
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-memory", metavar="SIZE", help="Exit with 6 if weights and working memory take more."),
]
QuietOpt = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing; the exit code tells.")]


def run(
    checkpoint: CheckpointArg = None,
    batch: BatchOpt = 8,
    repeats: Repeats = 3,
    cfg: Cfg = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    json: Json = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure what running a checkpoint takes.

    Bytes of its weights in memory, private memory before and after loading and at its peak, and the time of one
    denoising step. Runs on noise; writes nothing.
    """
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    limit = parse_size(max_memory, "--max-memory") if max_memory is not None else None
    opened = open_stage(stage)
    from ditmoe_cli.evaluation.bench import Load, bench, check_load

    load = check_load(Load(batch, repeats, cfg, seed, checked_device(device)))
    found = bench(opened, load, progress)
    emit(Printing(json, quiet), stage.done("bench", {}).to_json(found.to_json()), rows(found), "")
    if limit is not None and found.needed > limit:
        raise GateError(f"running takes {found.needed:,} bytes, above --max-memory {max_memory} ({limit:,} bytes)")


def rows(found: Bench) -> list[Row]:
    """Return what was measured as a table."""
    footprint, memory, load = found.footprint, found.memory, found.load
    buffer, least = footprint.buffer, min(found.seconds)
    beyond = "" if memory.growth is None else f", {human(memory.growth - footprint.least)} beyond weights and buffer"
    branches = "one branch" if load.rows == load.batch else "both branches"
    return [
        ("file", human_bytes(footprint.file)),
        ("weights", f"{human_bytes(footprint.weights.total)}, {footprint.ratio:.3f} of fp32"),
        ("by kind", parts(footprint.weights, "kinds")),
        ("by group", parts(footprint.weights, "groups")),
        ("in fp32", f"{human_bytes(footprint.fp32.total)}: {parts(footprint.fp32, 'groups')}"),
        ("unpacked at a time", f"{human_bytes(buffer.bytes)} ({buffer.name or 'no packed weight'})"),
        (
            "private memory",
            f"{human(memory.before)} before loading, {human(memory.loaded)} after, {human(memory.peak)} at its peak",
        ),
        ("needed", f"{human_bytes(found.needed)}{beyond}"),
        ("step", f"{least:.4g} s for {load.batch} images, {branches}, on {load.device}"),
        ("images per second", f"{load.batch / least:.4g}"),
    ]


def parts(sizes: Sizes, by: str) -> str:
    """Return bytes by kind or by group in one line."""
    found: dict[str, int] = getattr(sizes, by)
    return ", ".join(f"{name} {human_bytes(count)}" for name, count in found.items())


def human(count: int | None) -> str:
    """Return a byte count that may be unknown, or below 0."""
    if count is None:
        return "n/a"
    return f"{'-' if count < 0 else ''}{human_bytes(abs(count))}"
