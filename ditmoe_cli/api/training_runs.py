"""The one way to train a checkpoint towards another: check, foretell, train, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.api.devices import checked_device, dtype_on
from ditmoe_cli.api.earlier_results import last_step, made_before, require_clock
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.planner_runs import found_again
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.compression.estimates import profiling_estimate
from ditmoe_cli.compression.one_pass import write_planned
from ditmoe_cli.compression.planner import request_digest
from ditmoe_cli.compression.training.trained_tensors import trained_size
from ditmoe_cli.compression.training.trainer import Trainer
from ditmoe_cli.compression.training.training_pair import kept_codes
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.staging import check_space, check_target
from ditmoe_cli.files.workfolder import WorkFolder, followed_work, open_work, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import AUTO
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.processes import Share, first_process, process_group
from ditmoe_cli.routing.calibrate import made_profile
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import Basis


@dataclass(frozen=True)
class Training:
    """A training to be run: the student, what trains, towards which checkpoint, and on what profile.

    Attributes:
        student: the checkpoint to train.
        output: where the result goes.
        trainer: what trains.
        original: the checkpoint that is trained towards.
        device, dtype: what was asked for.
        basis: the profile that it rests on, or the way to make it; None where it rests on none.
        with_profile: returns the trainer that knows its profile.
        inputs: paths that are read beside both checkpoints.
    """

    student: Checkpoint
    output: Output
    trainer: Trainer
    original: Checkpoint
    device: str = "auto"
    dtype: str = AUTO
    basis: Basis | None = None
    with_profile: Callable[[RoutingProfile], Trainer] | None = None
    inputs: Sequence[Path] = ()

    def request(self, profile: RoutingProfile | None) -> str:
        """Return the digest of what is asked for."""
        settings = self.basis.settings if self.basis is not None else None
        return request_digest(
            self.trainer.asked, self.student.fingerprint, settings, profile.digest if profile else None
        )


@dataclass(frozen=True, repr=False)
class TrainedCheckpoint(WrittenCheckpoint):
    """A checkpoint that was trained, with the `record` of its training."""

    record: Any = None


@dataclass(frozen=True, repr=False)
class ForeseenTraining(ForeseenCheckpoint):
    """What a training would write, and of how many weights it would train how many values."""

    original: Path = field(kw_only=True)
    trained_weights: int = field(kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return sizes, original, weights and estimate by name."""
        return {**super().to_json(), "original": str(self.original), "trained_weights": self.trained_weights}


def check_pair(trainer: Trainer, student: Checkpoint, original: Checkpoint) -> None:
    """Tell what there is to tell of a pair. Raises for one that cannot be trained so."""
    lines = list(trainer.check(student, original))
    kept = kept_codes(trainer.tensors(student)) if trainer.asked.codes == "learn" else None
    for line in (*lines, *([kept] if kept is not None else [])):
        telling()(line)


def telling() -> Callable[[str], None]:
    """Return what takes lines for people: of several processes the first one's notes."""
    return note if first_process() else lambda _: None


def trained_result(training: Training, *, dry_run: bool = False) -> TrainedCheckpoint | ForeseenTraining | None:
    """Train, or foresee that in a dry run, unless the same request was trained before.

    None in all processes but the first, which writes.
    """
    started = time.monotonic()
    trainer, original, basis = training.trainer, training.original, training.basis
    student, output, known = training.student, training.output, basis.profile if basis is not None else None
    request = training.request(known)
    made = made_before(output, student, request)
    if not first_process() and (made is not None or dry_run):
        return None
    if made is not None:
        require_clock(made, trainer.asked.clock)
        record = trainer.recorded(last_step(made))
        details = {"original": str(original.path), **record.to_json()}
        found = found_again(student, output, made, basis.path if basis else None, None, details, dry_run=dry_run)
        return TrainedCheckpoint(**vars(found), record=record)
    tensors = trainer.tensors(student)
    estimates = trainer.estimates(student, original, tensors)
    if basis is not None and basis.calibration is not None:
        estimates = [profiling_estimate(original.config, basis.calibration), *estimates]
    planned = trainer.output(student, tensors, request)
    beside = [original.path, *training.inputs, *([basis.path] if basis is not None else [])]
    check_target(output.path, output.force, [student.path, *beside])
    if dry_run:
        return ForeseenTraining(
            path=output.path,
            bytes=planned.predicted_bytes(output),
            bytes_before=student.header.file_bytes,
            plan=None,
            estimates=estimates,
            rate=known_rate(likely_device(training.device)),
            original=original.path,
            trained_weights=trained_size(student, tensors).values,
        )
    check_space(output.path, planned.needed_bytes(output))
    from ditmoe_cli.compression.training.training_session import require_finite

    device = checked_device(training.device)
    foretell(estimates, lambda: device)
    require_finite(student)
    with process_group() as share:
        profile: RoutingProfile | None = None
        if basis is not None and training.with_profile is not None:
            profile = made_profile(original, basis, lambda: device, telling())
            training = replace(training, trainer=training.with_profile(profile))
        result = _trained(training, profile, device, share)
    return replace(result, seconds=round(time.monotonic() - started, 1)) if result is not None else None


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


def _trained(training: Training, profile: RoutingProfile | None, device: str, share: Share) -> TrainedCheckpoint | None:
    """Train and write the result, which the first process returns."""
    import torch

    from ditmoe_cli.compression.training.exchange import exchange_on
    from ditmoe_cli.compression.training.training_session import PIECE, TrainingWork
    from ditmoe_cli.model.dtypes import torch_dtype_of

    trainer, original, student, output = training.trainer, training.original, training.student, training.output
    request = training.request(profile)
    dtype = dtype_on(training.dtype, training.device)(original)
    share.check_same("dtype", dtype)
    given = {"device": device.partition(":")[0], "dtype": dtype, "processes": share.world}
    given |= {} if trainer.asked.clock is None else {"clock": trainer.asked.clock}
    key = {"request": request, "profile": profile.digest if profile else None, **given}
    with _shared_folder(output.path, work_key(key), share) as folder:
        exchange = exchange_on(share, torch.device(device))
        record = trainer.trained(
            TrainingWork(student, original, device, torch_dtype_of(dtype), folder, telling(), exchange)
        )
        if not share.first:
            return None
        piece = folder.read(PIECE)
        if piece is None:
            raise BadInputError(f"{folder.folder}: the trained weights are gone; run it again")
        planned = trainer.output(student, trainer.tensors(student), request, record)
        planned = planned.trained(device, dtype, share.world)
        size = write_planned(student, planned, output, piece.raw)
    return TrainedCheckpoint(
        path=output.path,
        bytes=size,
        bytes_before=student.header.file_bytes,
        figures={"original": str(original.path), **record.to_json()},
        profile=profile.path if profile else None,
        seconds=0.0,
        record=record,
    )
