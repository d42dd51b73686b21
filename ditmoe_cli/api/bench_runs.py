"""What running checkpoints takes on this machine: checked, told before, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.devices import checked_device, dtype_on
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.guiding_requests import Guiding
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.sampling_requests import note_steps
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.diffusion.few_steps import check_unguided
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import AUTO
from ditmoe_cli.model.effort import Estimate, branches_at, passes_estimate
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.bench import Bench, Benches, Load, ScheduledBench, Spread


@dataclass(frozen=True)
class Measuring:
    """The forward passes to measure, and their device."""

    batch: int = 8
    repeats: int = 5
    cfg: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str = AUTO
    processor_time: bool = False

    def load(self, threads: int | None, opened: Sequence[Checkpoint]) -> Load:
        """Return the work to time with so many threads, else with as many as torch uses and fewer.

        Raises `UsageError` where a value is out of range for one of the checkpoints.
        """
        from torch import get_num_threads

        from ditmoe_cli.evaluation.bench import Load, check_load, thread_counts

        device = checked_device(self.device)
        tried = () if self.processor_time else thread_counts(get_num_threads())
        load = Load(
            batch=self.batch,
            repeats=self.repeats,
            cfg=self.cfg,
            seed=self.seed,
            device=device,
            threads=tried if threads is None else (threads,),
            processor_time=self.processor_time,
        )
        for checkpoint in opened:
            check_load(load, checkpoint.config)
        return replace(load, dtype=dtype_on(self.dtype, device)(opened[0]))


@dataclass(frozen=True, repr=False)
class BenchedCheckpoints(Brief):
    """What running some checkpoints takes.

    Attributes:
        checkpoints: the checkpoints in the order that they were given in.
        found: what was measured of them.
    """

    checkpoints: tuple[Checkpoint, ...]
    found: Benches

    @property
    def results(self) -> tuple[Bench, ...]:
        """What was measured of each checkpoint: its ``.seconds``, ``.image_seconds``, ``.needed``, ``.footprint``."""
        return self.found.results

    @property
    def seconds(self) -> tuple[float, ...]:
        """The seconds of each checkpoint's fastest step."""
        return tuple(min(result.seconds) for result in self.results)

    @property
    def ratios(self) -> tuple[Spread, ...]:
        """The ratio of each checkpoint's seconds to the first's, by its quartiles over rounds."""
        return tuple(self.found.ratios)

    @property
    def needed(self) -> tuple[int, ...]:
        """The bytes of weights and working memory that each checkpoint needs."""
        return tuple(result.needed for result in self.results)

    def _brief(self) -> list[Fact]:
        load, several = self.results[0].load, zip(labels(self.checkpoints), self.results, self.ratios, strict=True)
        return [
            *(
                (name, f"{seconds_text(min(result.seconds))}, {human_bytes(result.needed)}{_times(ratio)}")
                for name, result, ratio in several
            ),
            *([("schedule", scheduled_text(self.scheduled))] if self.scheduled else []),
            ("a step of", f"{load.batch} images on {load.device} in {load.dtype}, cfg {load.cfg:g}"),
        ]

    @property
    def scheduled(self) -> ScheduledBench | None:
        """What sampling by a schedule took; None without one."""
        return self.found.scheduled

    def to_json(self) -> dict[str, Any]:
        """Return all that was measured, by name: of one checkpoint, or of each of several under ``files``.

        Beside it, under ``schedule``, is what a schedule computed and took, if there is one.
        """
        by = {"schedule": self.scheduled.to_json()} if self.scheduled is not None else {}
        if len(self.results) == 1:
            return {**self.results[0].to_json(), **by}
        return {
            **by,
            "interleaved": self.found.interleaved,
            "files": [
                {"path": str(checkpoint.path), "ratio": asdict(ratio), **result.to_json()}
                for checkpoint, result, ratio in zip(self.checkpoints, self.results, self.ratios, strict=True)
            ],
        }


def benched(
    opened: Sequence[Checkpoint],
    measuring: Measuring,
    guiding: Guiding,
    threads: int | None = None,
    schedule: ComputeSchedule | None = None,
) -> BenchedCheckpoints:
    """Measure steps of checkpoints, which take turns where memory has room for all of them.

    Of the checkpoint that a schedule is for, sampling by it takes turns with them, at the guidance that it is for.
    """
    guiding = guiding.of(schedule)
    if schedule is not None and measuring.cfg == 1.0:
        measuring = replace(measuring, cfg=schedule.sampling.cfg)
    for each in opened:
        guiding.check(each)
        check_unguided(each, measuring.cfg)
    from ditmoe_cli.evaluation.bench import bench, guided_load, image_specs, planned_index, scheduled_passes

    load = replace(measuring.load(threads, opened), guide=guiding.used)
    specs = image_specs(opened, load)
    for each in opened:
        note_steps(each, specs[each.path])
    expected = [_expected(each, guided_load(load, specs[each.path]), guiding) for each in opened]
    if schedule is not None:
        config, passes = opened[planned_index(schedule, opened, load)].config, scheduled_passes(schedule, load)
        expected.append(passes_estimate(config, load.batch, branches_at(load.cfg), passes))
    foretell(expected, lambda: load.device)
    found = bench(opened, load, weak=guiding.weak, schedule=schedule)
    if not found.interleaved:
        note("the checkpoints do not fit in memory together: each was timed after the other, and ratios vary more")
    return BenchedCheckpoints(tuple(opened), found)


def _expected(checkpoint: Checkpoint, load: Load, guiding: Guiding) -> Estimate:
    """Return what measuring a checkpoint takes, the weaker model included."""
    weak = guiding.model_for(checkpoint.config, load.passes if load.guide is not None else 0)
    return passes_estimate(checkpoint.config, load.batch, branches_at(load.cfg), load.passes, weak)


def labels(opened: Sequence[Checkpoint]) -> list[str]:
    """Return names to tell checkpoints by: those of their files, or their paths where two files have one name."""
    names = [checkpoint.name for checkpoint in opened]
    paths = [str(checkpoint.path) for checkpoint in opened]
    return names if len(set(names)) == len(set(paths)) else paths


def seconds_text(seconds: float) -> str:
    """Return a duration for reading, in four digits."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1000 * seconds:.4g} ms"


def scheduled_text(scheduled: ScheduledBench) -> str:
    """Return the share of operations that a schedule computed beside that of seconds, for reading."""
    ratio = scheduled.ratio
    spread = "" if len(scheduled.seconds) == 1 else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return (
        f"{scheduled.computed.method}: FLOP share {scheduled.computed.flops:.3f}, seconds {ratio.median:.3f}{spread}; "
        f"{seconds_text(scheduled.step_seconds)} a step, at most {human_bytes(scheduled.computed.kept)} kept an image"
    )


def _times(ratio: Spread) -> str:
    """Return a ratio to the first for reading; nothing for the first's own."""
    return "" if ratio.low == ratio.high == 1 else f", {ratio.median:.3f} times as long"
