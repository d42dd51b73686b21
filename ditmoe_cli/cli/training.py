"""Options of the commands that train a checkpoint towards another, and what these print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import training_requests as asked
from ditmoe_cli.api.argument_checks import at_least, one_of, seed_of_64_bits
from ditmoe_cli.api.training_requests import parse_groups
from ditmoe_cli.api.training_runs import ForeseenTraining, TrainedCheckpoint, Training
from ditmoe_cli.cli.groups import completing
from ditmoe_cli.cli.options import ClockOpt, complete_checkpoint
from ditmoe_cli.cli.planning import Job, Told, show_foreseen, show_written
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import Row, note
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.training_request import CODES, DEFAULT_BATCH, DEFAULT_MINUTES
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import resolve_path


@dataclass(frozen=True)
class TrainingOptions(asked.TrainingOptions):
    """What is trained towards what, for how long, and how."""

    panel: ClassVar[str] = "Training"

    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="CHECKPOINT",
            autocompletion=complete_checkpoint,
            help="The checkpoint that it was made from. [default: the one that the pipe began with]",
        ),
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="M", help=f"Time to train, all in. [default: {DEFAULT_MINUTES:g}]"),
    ] = None
    train: Annotated[
        tuple[str, ...],
        typer.Option(
            "--train",
            metavar="LIST",
            parser=parse_groups,
            autocompletion=completing("all", *GROUPS, "lora:8"),
            help=f"What to train: all, or some of {', '.join(GROUPS)}; or lora:R, which is all, matrices by updates of "
            "rank R, in less memory. [default: all]",
        ),
    ] = GROUPS
    codes: Annotated[
        str,
        typer.Option(
            "--codes",
            metavar="fixed|learn",
            callback=one_of(*CODES),
            help="Of quantised weights, fixed: train scales, not codes; learn: codes of integer formats too.",
        ),
    ] = "fixed"
    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            metavar="N",
            callback=at_least(1),
            help="States of a step; computed in parts, to the same result, where memory demands it.",
        ),
    ] = DEFAULT_BATCH
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="R",
            help="Learning rate, relative to the size of weights. [default: 0.01 to heal, 0.003 to distil]",
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of noise and orders.")
    ] = 0

    clock: ClockOpt = None

    def named(self, stage: Stage, may_be_same: bool = False) -> Stage:
        """Return the stage with its original. Raises `UsageError` where nothing names it."""
        if self.original is not None:
            return replace(stage, original=str(resolve_path(self.original, note).absolute()))
        if stage.original is None or (stage.original == stage.checkpoint and not may_be_same):
            raise UsageError("--original is missing: give the checkpoint that this one was made from")
        return stage


def show_trained(
    job: Job,
    training: Training,
    result: TrainedCheckpoint | ForeseenTraining | None,
    rows: Callable[[Any], list[Row]],
    *,
    dry_run: bool,
) -> None:
    """Print what was trained or would be; `rows` returns what a record tells. Nothing where another process prints."""
    if isinstance(result, ForeseenTraining):
        return show_foreseen(job, result)
    if result is not None:
        told = Told(training.trainer.asked.options(), rows(result.record))
        return show_written(job, result, told, dry_run=dry_run)
    return None
