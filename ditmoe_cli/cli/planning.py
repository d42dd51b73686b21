"""What the commands that write checkpoints share: carrying a plan out, or saying what it would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditmoe_cli.cli.options import checked_device, checkpoint_output
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import Printing, Row, emit, human_bytes, note, progress

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import CompressionPlan
    from ditmoe_cli.model.opened import Checkpoint
    from ditmoe_cli.routing.profile import RoutingProfile


class Described(Protocol):
    """A method that says what it does and where it comes from."""

    @property
    def summary(self) -> str:
        """What it does, in a few words."""

    @property
    def source(self) -> str:
        """Its paper."""


def print_methods(methods: Mapping[str, Described], printing: Printing) -> None:
    """Print each method with what it does and where it comes from."""
    result = {name: {"summary": method.summary, "source": method.source} for name, method in methods.items()}
    rows = [(name, f"{method.summary} ({method.source})") for name, method in methods.items()]
    emit(printing, Stage().to_json({"methods": result}), rows, None)


def valid_profile_for(
    checkpoint: Checkpoint, named: Path | None, target: Path, device: str, force: bool
) -> RoutingProfile:
    """Return a valid profile, making one beside `target` where `named` is none; refuses a bad target before that."""
    from ditmoe_cli.files.staging import check_target
    from ditmoe_cli.routing.calibrate import valid_profile

    read = [named] if named and named.is_file() else []
    check_target(target.absolute(), force, [checkpoint.path, *read])
    beside = target.absolute().parent
    return valid_profile(checkpoint, named, beside, lambda: checked_device(device), progress, note)


def preview(
    stage: Stage,
    checkpoint: Checkpoint,
    plan: CompressionPlan | None,
    target: Path,
    force: bool,
    shard_size: str,
    printing: Printing,
    decided: bool = True,
) -> None:
    """Print a plan and the exact bytes that carrying it out would write. Writes nothing, refuses what writing would.

    A plan that is not `decided` has the right size only, and is not printed.
    """
    from ditmoe_cli.compression.apply import planned_output
    from ditmoe_cli.files.staging import check_target

    output = checkpoint_output(target, force, shard_size)
    check_target(output.path, force, [checkpoint.path])
    result = _sizes(checkpoint, planned_output(checkpoint, plan).predicted_bytes(output))
    result["dry_run"] = True
    result["plan"] = plan.to_json() if plan is not None and decided else None
    emit(printing, stage.to_json(result), [("would write", output.path), *_size_rows(result)], str(output.path))


def write(
    stage: Stage,
    command: str,
    checkpoint: Checkpoint,
    plan: CompressionPlan | None,
    target: Path,
    force: bool,
    shard_size: str,
    printing: Printing,
    details: Mapping[str, Any] | None = None,
    profile: RoutingProfile | None = None,
    device: str = "cpu",
) -> None:
    """Carry a plan out (None: a plain copy) and print the result."""
    from ditmoe_cli.compression.apply import apply

    output = checkpoint_output(target, force, shard_size)
    done_by = apply(checkpoint, plan, output, progress, profile, device)
    result = {**_sizes(checkpoint, done_by.bytes), **(details or {}), "plan_digest": plan.digest if plan else None}
    computed = done_by.computed
    if computed.repaired:
        result["refit_error"] = list(computed.repaired)
    if computed.error is not None:
        result |= {"prediction_error": computed.error, "top_k_agreement": list(computed.agreement)}
    made = {"profile": profile.path} if profile else {}
    options = plan.options if plan else {}
    done = stage.done(command, options, checkpoint=output.path, samples=None, **made)
    emit(printing, done.to_json(result), [("wrote", output.path), *_size_rows(result)], str(output.path))


def _sizes(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    before = checkpoint.header.file_bytes
    return {"bytes": size, "bytes_before": before, "ratio": size / before}


def _size_rows(result: Mapping[str, Any]) -> list[Row]:
    before, after = result["bytes_before"], result["bytes"]
    return [("bytes", f"{before:,} -> {after:,} ({human_bytes(after)}, {result['ratio']:.3f} of the input)")]
