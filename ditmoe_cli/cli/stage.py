"""The envelope that one command passes to the next through a pipe.

An envelope holds absolute paths and results, never tensors. A command without a CHECKPOINT argument reads one from
stdin, to its end, before it imports torch: all commands of a pipe start at once, and those that wait take no memory.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.api.opening import tell_of
from ditmoe_cli.cli.terminal import note
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.provenance import STAGE_SCHEMA
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint, resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.processes import under_torchrun

_HANDED: ContextVar[Stage | None] = ContextVar("handed", default=None)
_PATHS = ("checkpoint", "original", "profile", "samples", "weak", "schedule")


@dataclass(frozen=True)
class Stage:
    """Where a pipeline stands: absolute paths, the overrides of the original, and the commands that ran.

    Attributes:
        checkpoint: the checkpoint to work on.
        original: the checkpoint that the pipeline began with.
        profile: the routing profile of either.
        samples: images of the checkpoint.
        weak: the checkpoint that guided those images, or the original in a distilled one's weights; written where there
            is one.
        schedule: the schedule of what the checkpoint's blocks compute; written where there is one.
        given: the overrides (heads, top-k, sampler, classes) that the original was opened with; files that we write
            carry their whole configuration and need none.
        history: the commands that ran, with their options and the paths that they wrote.
        piped: whether the stage came through a pipe; not part of the envelope.
    """

    checkpoint: str | None = None
    original: str | None = None
    profile: str | None = None
    samples: str | None = None
    given: Mapping[str, Any] | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    piped: bool = False
    weak: str | None = None
    schedule: str | None = None

    def to_json(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return the envelope with this command's result."""
        document = {"schema": STAGE_SCHEMA, **asdict(self), "history": list(self.history), "result": dict(result)}
        del document["piped"]
        for name in ("weak", "schedule"):
            if document[name] is None:
                del document[name]
        return document

    def done(self, command: str, options: Mapping[str, Any], **paths: Path | None) -> Stage:
        """Return the stage after a command, with the paths that it wrote; another checkpoint has no schedule."""
        schedule = None if "checkpoint" in paths else self.schedule
        written = {name: str(path.absolute()) if path else None for name, path in paths.items()}
        entry = {"command": command, "options": dict(options), **{name: path for name, path in written.items() if path}}
        found: dict[str, Any] = {"schedule": schedule, **written}
        return replace(self, history=(*self.history, entry), **found)


NO_CHECKPOINT = (
    "no checkpoint: give a CHECKPOINT (a file, a folder, demo:digits or hf:OWNER/REPO/FILE), or pipe in another ditmoe "
    "command"
)


def incoming(checkpoint: str | None, given: Given, shared: bool = False, missing: str = NO_CHECKPOINT) -> Stage:
    """Return the stage to work on: that of a named checkpoint, else that of the envelope on stdin.

    With a named checkpoint stdin is never read. Raises `UsageError` under torchrun for a command whose work cannot be
    `shared` between processes: each would write the same file; with the message `missing` where nothing names a
    checkpoint.
    """
    if checkpoint is None and (handed := _HANDED.get()) is not None:
        return replace(handed, given=_overridden(handed, given))
    if under_torchrun() and not shared:
        raise UsageError(
            "this command works in one process; start it without torchrun (profile-experts, sample, fid, heal and "
            "distill can share)"
        )
    if checkpoint is not None:
        path = str(resolve_path(checkpoint, note).absolute())
        return Stage(checkpoint=path, original=path, given=asdict(given))
    if under_torchrun():
        raise UsageError("under torchrun the checkpoint must be given as an argument, not through a pipe")
    stage = parse_stage(_read_stdin(missing))
    return replace(stage, given=_overridden(stage, given), piped=True)


def _overridden(stage: Stage, given: Given) -> dict[str, Any]:
    """Return the overrides of a stage, and those that are `given` in place of them."""
    return {**(stage.given or {}), **{name: value for name, value in asdict(given).items() if value is not None}}


@contextmanager
def handed_on(stage: Stage) -> Iterator[None]:
    """Have commands that name no checkpoint work on a stage, in place of the envelope on stdin."""
    before = _HANDED.set(stage)
    try:
        yield
    finally:
        _HANDED.reset(before)


def _read_stdin(missing: str) -> str:
    """Return the text on stdin. Raises `UsageError` with the message `missing` where nobody could write any.

    Nobody could to a terminal, the null device (as in scripts), a closed stdin, a folder or an empty file.
    """
    try:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(missing)
        text = sys.stdin.buffer.read().decode(errors="replace")
    except (OSError, ValueError):  # a stream that is open for writing alone, or not at all
        raise UsageError(missing) from None
    if not text.strip() and not _is_pipe():
        raise UsageError(missing)
    return text


def _is_pipe() -> bool:
    """Return whether another program may write to stdin. In tests stdin is an object without a number: it counts."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def parse_stage(text: str) -> Stage:
    """Return the stage of an envelope. Raises `BadInputError` where it is empty, cut short or of another schema."""
    if not text.strip():
        raise BadInputError(
            "stdin is empty: the command before this one in the pipe failed, see its message; "
            "without such a command, give a CHECKPOINT"
        )
    try:
        document = parse_json(text, names=True)
    except ValueError:
        raise BadInputError("stdin is not JSON, or cut short: expected the output of another ditmoe command") from None
    if not isinstance(document, dict) or document.get("schema") != STAGE_SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise BadInputError(f"stdin has schema {schema!r}, expected {STAGE_SCHEMA!r}: pipe in another ditmoe command")
    paths = {name: document.get(name) for name in _PATHS}
    wrong = next((name for name, value in paths.items() if not isinstance(value, str | None)), None)
    given, history = document.get("given"), document.get("history", [])
    if not _are_overrides(given):
        wrong = wrong or "given"
    if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
        wrong = wrong or "history"
    if wrong:
        raise BadInputError(f"stdin: field {wrong!r} of the envelope is malformed")
    return Stage(
        checkpoint=paths["checkpoint"],
        original=paths["original"],
        profile=paths["profile"],
        samples=paths["samples"],
        given=given,
        history=tuple(history),
        weak=paths["weak"],
        schedule=paths["schedule"],
    )


def _are_overrides(given: object) -> bool:
    """Return whether an envelope's `given` holds fields of `Given`, or nothing."""
    if given is None:
        return True
    if not isinstance(given, dict) or not set(given) <= {"num_heads", "top_k", "sampler", "num_classes"}:
        return False
    counts = (given.get("num_heads"), given.get("top_k"), given.get("num_classes"))
    whole = all(count is None or (type(count) is int and count > 0) for count in counts)
    return whole and given.get("sampler") in (None, "rf", "ddpm")


def open_stage(
    stage: Stage, path: str | None = None, given: Given | None = None, allow_unknown: bool = False
) -> Checkpoint:
    """Open the stage's checkpoint, or that of `path` such as its original; print notes, warnings and assumptions.

    The stage's overrides hold for its checkpoint and its original; `given` are the overrides for any other. With
    `allow_unknown`, a head count that cannot be told is left open.
    """
    chosen = path or stage.checkpoint
    if chosen is None:
        raise BadInputError("stdin: the envelope names no checkpoint")
    own = chosen in (stage.original, stage.checkpoint)
    overrides = dict(stage.given or {}) if own else asdict(given) if given else {}
    checkpoint = open_checkpoint(chosen, allow_unknown=allow_unknown, **overrides)
    tell_of(checkpoint, first=not stage.piped)  # the pipe's first command prints them
    return checkpoint
