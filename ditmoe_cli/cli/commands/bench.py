"""``ditmoe bench``: what running a checkpoint takes on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from ditmoe_cli.cli.foretelling import foretell
from ditmoe_cli.cli.groups import seed_of_64_bits
from ditmoe_cli.cli.machine import Threads
from ditmoe_cli.cli.options import DeviceOpt, Size, Source, checked_device, parse_size
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes
from ditmoe_cli.errors import GateError
from ditmoe_cli.model.effort import branches_at, passes_estimate

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.bench import Bench, Sizes


EXAMPLES = (
    "ditmoe bench small.safetensors",
    "ditmoe quantize ckpt.pt --bits 4 --uniform | ditmoe bench --batch 32 --cfg 1.5 --max-memory 8GiB",
)


@dataclass(frozen=True)
class Measuring:
    """The forward passes to measure, and their device."""

    panel: ClassVar[str] = "Measuring"

    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images per forward pass.")] = 8
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Timed passes, of which the fastest is reported.")
    ] = 3
    cfg: Annotated[
        float, typer.Option("--cfg", metavar="S", help="Scale of classifier-free guidance; 1 is no guidance.")
    ] = 1.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of the noise.")] = 0
    device: DeviceOpt = "auto"
    max_memory: Annotated[
        Size | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            parser=parse_size,
            help="Exit with code 6 if weights and working memory take more bytes than SIZE, as 2.5GiB or 900MB.",
        ),
    ] = None


@dataclass(frozen=True)
class BenchPrinting(Printing):
    """How a command prints that has a result but no output."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing; end in an exit code only.")] = False


def run(measuring: Measuring, source: Source, printing: BenchPrinting, threads: Threads) -> None:
    """Measure memory and time of a checkpoint.

    Prints the bytes of its weights in memory, private memory before and after loading and at its peak, and the time of
    one denoising step. On the CPU the step is timed with as many threads as there are cores, with half of them, and so
    on down to one, unless --threads is given; the fastest is kept. Runs on noise; writes nothing.
    """
    stage = source.stage()
    opened = open_stage(stage)
    from torch import get_num_threads

    from ditmoe_cli.evaluation.bench import WARM_UPS, Load, bench, check_load, thread_counts

    device = checked_device(measuring.device)
    counts = (threads.threads,) if threads.threads is not None else thread_counts(get_num_threads())
    load = Load(measuring.batch, measuring.repeats, measuring.cfg, measuring.seed, device, counts)
    check_load(load, opened.config)
    passes = WARM_UPS + (1 + load.repeats) * len(counts)
    foretell([passes_estimate(opened.config, load.batch, branches_at(load.cfg), passes)], lambda: device)
    result = bench(opened, load)
    emit(printing, stage.done("bench", {}).to_json(result.to_json()), rows(result), "")
    limit = measuring.max_memory
    if limit is not None and result.needed > limit.bytes:
        raise GateError(
            f"running takes {result.needed:,} bytes, above --max-memory {limit.text} ({limit.bytes:,} bytes)"
        )


def rows(result: Bench) -> list[Row]:
    """Return the measurements as a table."""
    footprint, memory, load = result.footprint, result.memory, result.load
    buffer, least = footprint.buffer, min(result.seconds)
    beyond = "" if memory.growth is None else f", {human(memory.growth - footprint.least)} beyond weights and buffer"
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    place = f"{load.device}, {threads}" if load.device == "cpu" else load.device
    by_threads = ", ".join(f"{count}: {min(seconds):.4g} s" for count, seconds in result.timed.items())
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
        ("needed", f"{human_bytes(result.needed)}{beyond}"),
        ("step", f"{least:.4g} s for {load.batch} images, {branches}, on {place}"),
        *([("by threads", by_threads)] if len(result.timed) > 1 else []),
        ("images per second", f"{load.batch / least:.4g}"),
    ]


def parts(sizes: Sizes, by: str) -> str:
    """Return bytes by kind or by group in one line."""
    counts: dict[str, int] = getattr(sizes, by)
    return ", ".join(f"{name} {human_bytes(count)}" for name, count in counts.items())


def human(count: int | None) -> str:
    """Return a byte count that may be unknown, or below 0."""
    if count is None:
        return "n/a"
    return f"{'-' if count < 0 else ''}{human_bytes(abs(count))}"
