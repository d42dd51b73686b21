"""The one way of the commands that train a checkpoint towards another: check, foretell, train, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer

from ditmoe_cli.cli.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.cli.groups import at_least, completing, one_of, seed_of_64_bits
from ditmoe_cli.cli.options import Destination, checked_device, complete_checkpoint, dtype_on
from ditmoe_cli.cli.planning import Job, Told, reuse, size_facts, size_rows
from ditmoe_cli.cli.reuse import last_step, made_before
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import Row, emit, note
from ditmoe_cli.compression.estimates import profiling_estimate
from ditmoe_cli.compression.one_pass import write_planned
from ditmoe_cli.compression.planner import request_digest
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.trained_tensors import trained_size
from ditmoe_cli.compression.training.trainer import Trainer
from ditmoe_cli.compression.training.training_pair import kept_codes
from ditmoe_cli.compression.training.training_request import CODES, DEFAULT_BATCH, DEFAULT_MINUTES, Codes
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.staging import check_space, check_target
from ditmoe_cli.files.workfolder import WorkFolder, followed_work, open_work, work_key
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.processes import Share, first_process, process_group
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import Basis


def parse_groups(text: str) -> tuple[str, ...]:
    """Return the groups of weights that a list names, each once and in the order of `GROUPS`, all for ``all``."""
    words = {word.strip() for word in text.split(",")}
    unknown = sorted(words - {"all", *GROUPS})
    return (*(group for group in GROUPS if words & {"all", group}), *unknown)


@dataclass(frozen=True)
class TrainingOptions:
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

    def fields(self, original: Checkpoint, iterations: int | None) -> dict[str, Any]:
        """Return what is asked for, as fields of a `TrainingRequest`."""
        return {
            "original": original.fingerprint,
            "minutes": DEFAULT_MINUTES if self.minutes is None and iterations is None else self.minutes,
            "iterations": iterations,
            "train": self.train,
            "codes": cast(Codes, self.codes),
            "batch": self.batch,
            "rate": self.rate,
            "seed": self.seed,
        }

    def named(self, stage: Stage, may_be_same: bool = False) -> Stage:
        """Return the stage with its original. Raises `UsageError` where nothing names it."""
        if self.original is not None:
            return replace(stage, original=str(resolve_path(self.original, note).absolute()))
        if stage.original is None or (stage.original == stage.checkpoint and not may_be_same):
            raise UsageError("--original is missing: give the checkpoint that this one was made from")
        return stage


def opened_pair(trainer: Trainer, student: Checkpoint, original: Checkpoint) -> None:
    """Tell what there is to tell of a pair. Raises for one that cannot be trained so."""
    lines = list(trainer.check(student, original))
    kept = kept_codes(trainer.tensors(student)) if trainer.asked.codes == "learn" else None
    for line in (*lines, *([kept] if kept is not None else [])):
        telling()(line)


def telling() -> Callable[[str], None]:
    """Return what takes lines for people: of several processes the first one's notes."""
    return note if first_process() else lambda _: None


@dataclass(frozen=True)
class Training:
    """A training to be run: the job, what trains, towards which checkpoint, and on what profile.

    Attributes:
        job: the stage, the student and the output.
        trainer: what trains.
        original: the checkpoint that is trained towards.
        rows: returns what a record tells, for reading.
        basis: the profile that it rests on, or the way to make it; None where it rests on none.
        with_profile: returns the trainer that knows its profile.
        inputs: paths that are read beside both checkpoints.
        device, dtype: what the options name.
    """

    job: Job
    trainer: Trainer
    original: Checkpoint
    rows: Callable[[Any], list[Row]]
    device: str
    dtype: str
    basis: Basis | None = None
    with_profile: Callable[[RoutingProfile], Trainer] | None = None
    inputs: Sequence[Path] = ()

    @property
    def options(self) -> Mapping[str, Any]:
        """What was asked for, by the names of the options."""
        return self.trainer.asked.options()

    def request(self, profile: RoutingProfile | None) -> str:
        """Return the digest of what is asked for."""
        settings = self.basis.settings if self.basis is not None else None
        return request_digest(
            self.trainer.asked, self.job.checkpoint.fingerprint, settings, profile.digest if profile else None
        )


def run_training(training: Training, to: Destination) -> None:
    """Train, or preview that, or print what an earlier run has made."""
    job, trainer, original, basis = training.job, training.trainer, training.original, training.basis
    student, output, known = job.checkpoint, job.output, basis.profile if basis is not None else None
    request = training.request(known)
    made = made_before(output, student, request)
    if not first_process() and (made is not None or to.dry_run):
        return None  # the first process prints
    if made is not None:
        record = trainer.recorded(last_step(made))
        details = {"original": str(original.path), **record.to_json()}
        told = Told(training.options, training.rows(record))
        return reuse(job, made, basis.path if basis else None, None, details, told=told, dry_run=to.dry_run)
    tensors = trainer.tensors(student)
    estimates = trainer.estimates(student, original, tensors)
    if basis is not None and basis.calibration is not None:
        estimates = [profiling_estimate(original.config, basis.calibration), *estimates]
    planned = trainer.output(student, tensors, request)
    size = planned.predicted_bytes(output)
    beside = [original.path, *training.inputs, *([basis.path] if basis is not None else [])]
    check_target(output.path, output.force, [student.path, *beside])
    if to.dry_run:
        rate = known_rate(likely_device(training.device))
        trained = trained_size(student, tensors).values
        facts = {**size_facts(student, size), "original": str(original.path), "trained_weights": trained}
        result = {**facts, "estimate": estimate_of(estimates, rate), "plan": None, "dry_run": True}
        rows: list[Row] = [("would write", output.path), *size_rows(result), estimate_row(estimates, rate)]
        return emit(job.printing, job.stage.to_json(result), rows, str(output.path), editable=True)
    check_space(output.path, planned.needed_bytes(output))
    from ditmoe_cli.compression.training.training_session import require_finite

    device = checked_device(training.device)
    foretell(estimates, lambda: device)
    require_finite(student)
    with process_group() as share:
        if basis is None or training.with_profile is None:
            return _trained(training, None, device, share)
        profile = made_profile(original, basis, lambda: device, telling())
        return _trained(replace(training, trainer=training.with_profile(profile)), profile, device, share)


@contextmanager
def _shared_folder(target: Path, key: str, share: Share) -> Iterator[WorkFolder]:
    """Yield the work folder of a target: the first process opens it, and the others follow until it is done."""
    if share.first:
        with open_work(target, key, note) as folder:
            share.wait()
            yield folder
            share.wait()
        return
    share.wait()
    yield followed_work(target, key)
    share.wait()


def _trained(training: Training, profile: RoutingProfile | None, device: str, share: Share) -> None:
    """Train, write the result and print it."""
    import torch

    from ditmoe_cli.compression.training.exchange import exchange_on
    from ditmoe_cli.compression.training.training_session import PIECE, TrainingWork
    from ditmoe_cli.model.dtypes import torch_dtype_of

    job, trainer, original = training.job, training.trainer, training.original
    student, output, request = job.checkpoint, job.output, training.request(profile)
    dtype = dtype_on(training.dtype, training.device)(original)
    share.check_same("dtype", dtype)
    given = {"device": device.partition(":")[0], "dtype": dtype, "processes": share.world}
    key = {"request": request, "profile": profile.digest if profile else None, **given}
    with _shared_folder(output.path, work_key(key), share) as folder:
        exchange = exchange_on(share, torch.device(device))
        record = trainer.trained(
            TrainingWork(student, original, device, torch_dtype_of(dtype), folder, telling(), exchange)
        )
        if not share.first:
            return  # the first process writes and prints
        piece = folder.read(PIECE)
        if piece is None:
            raise BadInputError(f"{folder.folder}: the trained weights are gone; run it again")
        planned = trainer.output(student, trainer.tensors(student), request, record)
        size = write_planned(student, planned, output, piece.raw)
    result: Mapping[str, Any] = {
        **size_facts(student, size),
        "original": str(original.path),
        **record.to_json(),
        "plan_digest": None,
        "seconds": round(time.monotonic() - job.started, 1),
    }
    paths = {"profile": profile.path if profile else None}
    stage = job.stage.done(job.command, training.options, checkpoint=output.path, samples=None, **paths)
    rows: list[Row] = [
        ("wrote", output.path),
        *training.rows(record),
        *size_rows(result),
        ("seconds", f"{result['seconds']:,.1f}"),
    ]
    emit(job.printing, stage.to_json(result), rows, str(output.path))
