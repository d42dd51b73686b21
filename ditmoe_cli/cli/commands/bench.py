"""``ditmoe bench``: what running checkpoints takes on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from ditmoe_cli.api import bench_runs as asked
from ditmoe_cli.api.argument_checks import refuse_idle, seed_of_64_bits
from ditmoe_cli.api.bench_runs import benched, labels, scheduled_text, seconds_text
from ditmoe_cli.api.output_names import Size, parse_size
from ditmoe_cli.cli.guiding_options import StepGuiding, beside
from ditmoe_cli.cli.options import DeviceOpt, DtypeOpt, Models, Source, complete_checkpoint
from ditmoe_cli.cli.sampling_options import Scheduling, scheduled
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, columns, emit
from ditmoe_cli.diffusion.few_steps import told_sampling
from ditmoe_cli.errors import GateError
from ditmoe_cli.model.dtypes import AUTO
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.bench import Bench, Benches, Difference, Spread
    from ditmoe_cli.evaluation.memory_use import Sizes
    from ditmoe_cli.model.checkpoint import Checkpoint


MACHINE = Models
EXAMPLES = (
    "ditmoe bench small.safetensors",
    "ditmoe bench ckpt.pt pruned.safetensors nf4.safetensors --batch 1 --repeats 9 --max-ratio 1.1",
    "ditmoe bench ckpt.pt --schedule half.schedule.safetensors --repeats 2",
    "ditmoe bench ckpt.pt --guide-with half.safetensors --guide-scale 0.5",
    "ditmoe bench ckpt.pt --dtype bf16 --device cuda --batch 32 --cfg 1.5",
    "ditmoe quantize ckpt.pt --bits 4 --uniform | ditmoe bench --batch 32 --cfg 1.5 --max-memory 8GiB",
)


def positive_ratio(value: float) -> float:
    """Return a ratio that may be a limit. Raises `ValueError`."""
    if not value > 0:
        raise ValueError("give a ratio above 0")
    return value


@dataclass(frozen=True)
class Measured(Source):
    """The checkpoints to measure: arguments, else that of the envelope on stdin."""

    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OTHERS...",
            autocompletion=complete_checkpoint,
            help="More checkpoints, whose steps take turns with those of the first.",
        ),
    ] = None

    def stages(self) -> list[Stage]:
        """Return the stages to work on."""
        return [self.stage(), *(incoming(other, self.given) for other in self.others or ())]


@dataclass(frozen=True)
class Measuring(asked.Measuring):
    """The forward passes to measure, their device, and the most that they may take."""

    panel: ClassVar[str] = "Measuring"

    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images per forward pass.")] = 8
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats", metavar="N", help="Timed passes of each checkpoint, of which the fastest is reported."
        ),
    ] = 5
    cfg: Annotated[
        float, typer.Option("--cfg", metavar="S", help="Scale of classifier-free guidance; 1 is no guidance.")
    ] = 1.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of the noise.")] = 0
    device: DeviceOpt = "auto"
    dtype: DtypeOpt = AUTO
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Time one thread by the processor time that it takes: other work of the machine lengthens it little.",
        ),
    ] = False
    max_memory: Annotated[
        Size | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            parser=parse_size,
            help="Exit with code 6 if weights and working memory take more bytes than SIZE, as 2.5GiB or 900MB.",
        ),
    ] = None
    max_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-ratio",
            metavar="X",
            callback=positive_ratio,
            help="Exit with code 6 if a step of one of OTHERS takes more than X times as long as the first's, by the "
            "median over rounds.",
        ),
    ] = None


@dataclass(frozen=True)
class BenchPrinting(Printing):
    """How a command prints that has a result but no output."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing; end in an exit code only.")] = False


def run(
    measuring: Measuring,
    weaker: StepGuiding,
    scheduling: Scheduling,
    measured: Measured,
    printing: BenchPrinting,
    threads: Models,
) -> None:
    """Measure memory and time of checkpoints.

    Prints the bytes of a checkpoint's weights in memory, private memory before and after loading and at its peak, the
    time of one denoising step and of the parts of the model in it, and operations a second against those of a large
    product. With OTHERS, steps of all take turns, and ratios to the first are printed with their quartiles. On the CPU
    steps are timed with as many threads as there are cores, with half of them, and so on down to one, unless --threads
    is given; the fastest is kept. In another dtype than fp32, the difference from fp32 is measured too. With
    --schedule, sampling a batch by it and without it takes turns with steps. Runs on noise; writes nothing.
    """
    if not measured.others:
        refuse_idle(measuring, "with one checkpoint; give OTHERS", "max_ratio")
    stages = measured.stages()
    opened = [open_stage(stage) for stage in stages]
    guiding = beside(weaker.opened(measured.given), stages[0])
    schedule = scheduling.of(stages[0])
    found = benched(opened, measuring, guiding, threads.threads, schedule)
    done = scheduled(stages[0], schedule) if len(opened) == 1 else replace(stages[0], checkpoint=None)
    printed = rows(found.results[0]) if len(opened) == 1 else comparison_rows(opened, found.found)
    printed += [("schedule", scheduled_text(found.scheduled))] if found.scheduled is not None else []
    emit(printing, done.done("bench", {}).to_json(found.to_json()), printed, "")
    check_limits(measuring, opened, found.found)


def check_limits(measuring: Measuring, opened: Sequence[Checkpoint], found: Benches) -> None:
    """Raise `GateError` where a checkpoint takes more memory, or more time than the first, than was allowed."""
    limit, most = measuring.max_memory, measuring.max_ratio
    for checkpoint, result, ratio in zip(opened, found.results, found.ratios, strict=True):
        which = f"{checkpoint.path}: " if len(opened) > 1 else ""
        if limit is not None and result.needed > limit.bytes:
            raise GateError(
                f"{which}running takes {result.needed:,} bytes, above --max-memory {limit.text} ({limit.bytes:,} bytes)"
            )
        if most is not None and ratio.median > most:
            than = f"{ratio.median:.4g} times as long as one of {opened[0].path}"
            raise GateError(f"{which}a step takes {than}, above --max-ratio {most:g}")


def comparison_rows(opened: Sequence[Checkpoint], found: Benches) -> list[Row]:
    """Return several measurements as two tables, a row a checkpoint: sizes and speeds, and the parts of a step."""
    results, first = found.results, found.results[0]
    names = labels(opened)
    heads = (
        "step",
        "median",
        "ratio to the first",
        "images/s",
        "weights",
        "needed",
        "GFLOP/s",
        "of peak",
        "an image",
        "NFE",
    )
    speeds = [heads, *(speed_cells(result, ratio) for result, ratio in zip(results, found.ratios, strict=True))]
    apart = len({result.spec for result in results}) > 1
    shares = [tuple(first.speed.parts), *(tuple(part_texts(result).values()) for result in results)]
    return [
        *zip(["file", *names], columns(speeds), strict=True),
        ("measured", f"{work_text(first)}; {order_text(found)}"),
        *zip(["parts of a step", *names], columns(shares), strict=True),
        ("peak", peak_text(first)),
        *((f"{name}, an image", image_text(result)) for name, result in zip(names, results, strict=True) if apart),
        *(
            (f"{name} against fp32", difference_text(result.difference))
            for name, result in zip(names, results, strict=True)
            if result.difference
        ),
    ]


def speed_cells(result: Bench, ratio: Spread) -> tuple[str, ...]:
    """Return a checkpoint's cells in the table of sizes and speeds."""
    return (
        seconds_text(min(result.seconds)),
        seconds_text(statistics.median(result.seconds)),
        ratio_text(ratio),
        f"{result.load.batch / min(result.seconds):.4g}",
        human_bytes(result.footprint.weights.total),
        human_bytes(result.needed),
        f"{result.rate / 1e9:,.1f}",
        f"{result.rate / result.speed.peak.flops:.0%}",
        seconds_text(result.image_seconds),
        str(result.spec.nfe),
    )


def image_text(result: Bench) -> str:
    """Return what sampling an image takes."""
    spec = result.spec
    guided = f", cfg {spec.cfg:g}" if spec.cfg != 1.0 else ""
    guided += f", guided by {spec.guide.told}" if spec.guide is not None else ""
    return f"{seconds_text(result.image_seconds)} by {told_sampling(spec.solver, spec.steps)}{guided}, {spec.nfe} NFE"


def ratio_text(ratio: Spread) -> str:
    """Return the median of a ratio with its quartiles; 1 alone for that of a checkpoint to itself."""
    if ratio.low == ratio.high == 1:
        return "1"
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def order_text(found: Benches) -> str:
    """Return how often and in which order steps were timed."""
    count = found.results[0].load.repeats
    many = "s" if count > 1 else ""
    return f"{count} round{many} in turn" if found.interleaved else f"{count} time{many} one after the other"


def work_text(result: Bench) -> str:
    """Return what a step computes, and where."""
    load = result.load
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    place = f"{load.device}, {threads}" if load.device == "cpu" else load.device
    branches = "one branch" if load.rows == load.batch else "both branches"
    guided = f", guided by {load.guide.told}" if load.guide is not None else ""
    clock = ", processor time" if load.processor_time else ""
    images = f"{load.batch} image{'s' if load.batch > 1 else ''}"
    return f"{images}, {branches}{guided}, on {place} in {load.dtype}{clock}"


def peak_text(result: Bench) -> str:
    """Return the speed of a large product."""
    return f"{result.speed.peak.flops / 1e9:,.1f} GFLOP/s in {result.load.dtype}, of a large product"


def part_texts(result: Bench) -> dict[str, str]:
    """Return the seconds of each part of a step and its share, by part."""
    whole = sum(result.speed.parts.values())
    return {part: f"{seconds_text(each)} {each / whole:.0%}" for part, each in result.speed.parts.items()}


def rows(result: Bench) -> list[Row]:
    """Return the measurements as a table."""
    footprint, memory, load = result.footprint, result.memory, result.load
    buffer, least = footprint.buffer, min(result.seconds)
    beyond = "" if memory.growth is None else f", {human(memory.growth - result.least)} beyond weights and buffer"
    by_threads = ", ".join(f"{count}: {seconds_text(min(seconds))}" for count, seconds in result.timed.items())
    return [
        ("file", human_bytes(footprint.file)),
        ("weights", f"{human_bytes(footprint.weights.total)}, {footprint.ratio:.3f} of fp32"),
        ("by kind", parts(footprint.weights, "kinds")),
        ("by group", parts(footprint.weights, "groups")),
        ("in fp32", f"{human_bytes(footprint.fp32.total)}: {parts(footprint.fp32, 'groups')}"),
        *([("weaker model", f"{human_bytes(result.weak)} of weights")] if result.weak else []),
        ("unpacked at a time", f"{human_bytes(buffer.bytes)} ({buffer.name or 'no packed weight'})"),
        (
            "private memory",
            f"{human(memory.before)} before loading, {human(memory.loaded)} after, {human(memory.peak)} at its peak",
        ),
        ("needed", f"{human_bytes(result.needed)}{beyond}"),
        *([("kept unpacked", human_bytes(result.kept))] if result.kept else []),
        ("step", f"{seconds_text(least)} for {work_text(result)}"),
        *([("by threads", by_threads)] if len(result.timed) > 1 else []),
        ("images per second", f"{load.batch / least:.4g}"),
        ("an image", image_text(result)),
        (
            "speed",
            f"{result.rate / 1e9:,.1f} GFLOP/s, {result.rate / result.speed.peak.flops:.0%} of {peak_text(result)}",
        ),
        ("parts of a step", ", ".join(f"{part} {text}" for part, text in part_texts(result).items())),
        *([("against fp32", difference_text(result.difference))] if result.difference else []),
    ]


def difference_text(difference: Difference) -> str:
    """Return how far a dtype strays from fp32."""
    return f"prediction {difference.prediction:.2g} off, {difference.rerouted:.2%} of tokens to other experts"


def parts(sizes: Sizes, by: str) -> str:
    """Return bytes by kind or by group in one line."""
    counts: dict[str, int] = getattr(sizes, by)
    return ", ".join(f"{name} {human_bytes(count)}" for name, count in counts.items())


def human(count: int | None) -> str:
    """Return a byte count that may be unknown, or below 0."""
    if count is None:
        return "n/a"
    return f"{'-' if count < 0 else ''}{human_bytes(abs(count))}"
