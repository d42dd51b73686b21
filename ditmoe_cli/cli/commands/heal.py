"""``ditmoe heal``: a compressed checkpoint trained to predict as its original does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer

from ditmoe_cli.cli.calibration_options import AutomaticProfile
from ditmoe_cli.cli.costs import held_text
from ditmoe_cli.cli.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.cli.groups import at_least, completing, one_of, seed_of_64_bits
from ditmoe_cli.cli.options import Destination, Measuring, Models, Source, checked_device, complete_checkpoint, dtype_on
from ditmoe_cli.cli.planning import Job, Told, reuse, size_facts, size_rows
from ditmoe_cli.cli.reuse import last_step, made_before
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.compression.estimates import profiling_estimate
from ditmoe_cli.compression.heal.healed_output import HealingRecord, healed_output, healing_record
from ditmoe_cli.compression.heal.healing import (
    CODES,
    DEFAULT_BATCH,
    DEFAULT_MINUTES,
    SCOPES,
    Codes,
    Healing,
    Scope,
    check_pair,
    check_profile,
    kept_codes,
    tensors_to_heal,
)
from ditmoe_cli.compression.heal.healing_memory import healing_estimate
from ditmoe_cli.compression.one_pass import write_planned
from ditmoe_cli.compression.planner import request_digest
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.trained_tensors import TrainedSize, trained_size
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.staging import check_space, check_target
from ditmoe_cli.files.workfolder import WorkFolder, followed_work, open_work, work_key
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.processes import Share, first_process, process_group
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile, read_profile
from ditmoe_cli.routing.profile_search import Basis, ProfileRequest, search

MACHINE = Models
EXAMPLES = (
    "ditmoe heal half.safetensors --original ckpt.pt",
    "ditmoe prune ckpt.pt --neurons 0.35 --allocate global | ditmoe heal --minutes 5 | ditmoe fid",
    "torchrun --nproc-per-node 8 -m ditmoe_cli heal half.safetensors --original ckpt.pt --device cuda",
)


def parse_groups(text: str) -> tuple[str, ...]:
    """Return the groups of weights that a list names, each once and in the order of `GROUPS`, all for ``all``."""
    words = {word.strip() for word in text.split(",")}
    unknown = sorted(words - {"all", *GROUPS})
    return (*(group for group in GROUPS if words & {"all", group}), *unknown)


@dataclass(frozen=True)
class Teaching:
    """What is trained towards what, and for how long."""

    panel: ClassVar[str] = "Healing"

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
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Steps to train in place of a time, in block scope for each block."),
    ] = None
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="auto|block|model",
            callback=one_of(*SCOPES),
            help="block: one block after the other, in the memory of one; model: end to end on the prediction; auto: "
            "blocks first, then the model where memory suffices.",
        ),
    ] = "auto"
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
        typer.Option("--rate", metavar="R", help="Learning rate, relative to the size of weights. [default: 0.01]"),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", callback=seed_of_64_bits, help="Seed of noise and orders.")
    ] = 0

    def request(self, original: Checkpoint) -> Healing:
        """Return what is asked for. Raises `UsageError` for values out of range."""
        minutes = DEFAULT_MINUTES if self.minutes is None and self.steps is None else self.minutes
        return Healing(
            original=original.fingerprint,
            minutes=minutes,
            steps=self.steps,
            scope=cast(Scope, self.scope),
            train=self.train,
            codes=cast(Codes, self.codes),
            batch=self.batch,
            rate=self.rate,
            seed=self.seed,
        )

    def named(self, stage: Stage) -> Stage:
        """Return the stage with its original. Raises `UsageError` where nothing names it."""
        if self.original is not None:
            return replace(stage, original=str(resolve_path(self.original, note).absolute()))
        if stage.original is None or stage.original == stage.checkpoint:
            raise UsageError("--original is missing: give the checkpoint that the one to heal was made from")
        return stage


def run(
    teaching: Teaching,
    measuring: Measuring,
    automatic: AutomaticProfile,
    source: Source,
    to: Destination,
    printing: Printing,
) -> None:
    """Train a compressed checkpoint for some minutes to predict as its original does, without data.

    It is trained on images that the original samples, noised anew, towards what the original predicts there. Every
    eighth image is held out: the weights that do best on those are kept, and never worse ones than the input's. The
    output has the same tensors and bytes. torchrun's processes share the work.
    """
    started = time.monotonic()
    tell = note if first_process() else lambda _: None
    stage = teaching.named(source.stage(shared=True))
    student, original = open_stage(stage), open_stage(stage, stage.original)
    asked = teaching.request(original)
    warning = check_pair(student, original)
    if warning is not None:
        tell(f"warning: {warning}")
    tensors = tensors_to_heal(student, asked)
    kept = kept_codes(tensors) if asked.codes == "learn" else None
    if kept is not None:
        tell(kept)
    job = Job("heal", stage, student, to.at(student.path, asked.label), printing, started)
    basis = search(original, profile_request(stage, original, measuring, automatic, job.output.path.parent, to), tell)
    check_profile(basis.profile, basis.settings)
    options = asked.options()
    request = _request(asked, student, basis, basis.profile)
    made = made_before(job.output, student, request)
    if not first_process() and (made is not None or to.dry_run):
        return None  # the first process prints
    if made is not None:
        record = healing_record(last_step(made)) or HealingRecord()
        details = {"original": str(original.path), **record.to_json()}
        told = Told(options, record_rows(record))
        return reuse(job, made, basis.path, None, details, told=told, dry_run=to.dry_run)
    trained = trained_size(student, tensors)
    estimates = _estimates(student, original, asked, trained, basis)
    planned = healed_output(student, tensors, request, options, basis.settings)
    size = planned.predicted_bytes(job.output)
    check_target(job.output.path, job.output.force, [student.path, original.path, basis.path])
    if to.dry_run:
        rate = known_rate(likely_device(measuring.device))
        facts = {**size_facts(student, size), "original": str(original.path), "trained_weights": trained.values}
        result = {**facts, "estimate": estimate_of(estimates, rate), "plan": None, "dry_run": True}
        rows: list[Row] = [("would write", job.output.path), *size_rows(result), estimate_row(estimates, rate)]
        return emit(printing, stage.to_json(result), rows, str(job.output.path), editable=True)
    check_space(job.output.path, planned.needed_bytes(job.output))
    from ditmoe_cli.compression.heal.healed_weights import require_finite

    device = checked_device(measuring.device)
    foretell(estimates, lambda: device)
    require_finite(student)
    with process_group() as share:
        profile = made_profile(original, basis, lambda: device, tell)
        return _heal(job, original, asked, basis, profile, device, measuring, share)


def profile_request(
    stage: Stage,
    original: Checkpoint,
    measuring: Measuring,
    automatic: AutomaticProfile,
    beside: Path,
    to: Destination,
) -> ProfileRequest:
    """Return what is asked of the original's profile; that of the pipe counts where it is the original's."""
    found = automatic.request(stage, original, measuring, beside)
    if measuring.profile is None and found.given is not None:
        piped = read_profile(found.given)
        if piped.checkpoint not in (original.fingerprint, *original.ancestors):
            found = replace(found, given=None)
    return replace(found, dtype=dtype_on(measuring.dtype, measuring.device, measures=not to.dry_run))


def _request(asked: Healing, student: Checkpoint, basis: Basis, profile: RoutingProfile | None) -> str:
    return request_digest(asked, student.fingerprint, basis.settings, profile.digest if profile else None)


def _estimates(
    student: Checkpoint, original: Checkpoint, asked: Healing, trained: TrainedSize, basis: Basis
) -> list[Estimate]:
    """Return what making the profile, and healing, take."""
    made = [profiling_estimate(original.config, basis.calibration)] if basis.calibration is not None else []
    return [*made, healing_estimate(student.config, original.config, asked, trained, basis.settings)]


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


def _heal(
    job: Job,
    original: Checkpoint,
    asked: Healing,
    basis: Basis,
    profile: RoutingProfile,
    device: str,
    measuring: Measuring,
    share: Share,
) -> None:
    """Heal, write the result and print it."""
    import torch

    from ditmoe_cli.compression.heal.healed_weights import PIECE, HealingWork, heal
    from ditmoe_cli.compression.training.exchange import exchange_on
    from ditmoe_cli.model.dtypes import torch_dtype_of

    student, output = job.checkpoint, job.output
    request = _request(asked, student, basis, profile)
    dtype = dtype_on(measuring.dtype, measuring.device)(original)
    share.check_same("dtype", dtype)
    kind, tell = device.partition(":")[0], note if share.first else lambda _: None
    key = {"request": request, "profile": profile.digest, "device": kind, "dtype": dtype, "processes": share.world}
    with _shared_folder(output.path, work_key(key), share) as folder:
        exchange = exchange_on(share, torch.device(device))
        work = HealingWork(student, original, profile, device, torch_dtype_of(dtype), folder, tell, exchange)
        record = heal(work, asked)
        if not share.first:
            return  # the first process writes and prints
        piece = folder.read(PIECE)
        if piece is None:
            raise BadInputError(f"{folder.folder}: the healed weights are gone; run it again")
        tensors = tensors_to_heal(student, asked)
        planned = healed_output(student, tensors, request, asked.options(), profile.calibration, record)
        size = write_planned(student, planned, output, piece.raw)
    seconds = round(time.monotonic() - job.started, 1)
    result: Mapping[str, Any] = {
        **size_facts(student, size),
        "original": str(original.path),
        **record.to_json(),
        "plan_digest": None,
        "seconds": seconds,
    }
    stage = job.stage.done("heal", asked.options(), checkpoint=output.path, samples=None, profile=profile.path)
    rows: list[Row] = [
        ("wrote", output.path),
        *record_rows(record),
        *size_rows(result),
        ("seconds", f"{seconds:,.1f}"),
    ]
    emit(job.printing, stage.to_json(result), rows, str(output.path))


def record_rows(record: HealingRecord) -> list[Row]:
    """Return what healing has done, for reading."""
    course = (("each block", record.block_steps), ("the model", record.model_steps))
    steps = " and ".join(f"{count:,} steps of {scope}" for scope, count in course if count)
    before, after = record.held_error_before, record.held_error_after
    return [
        ("healed", f"{steps}, on {record.images:,} images noised anew"),
        ("error", f"{held_text(record.held_error)} of the guided prediction, on held-out states"),
        ("worst bin", f"{held_text((max(before), max(after)))}, of {len(before)} step bins"),
    ]
