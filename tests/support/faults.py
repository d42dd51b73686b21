"""Faults at every point of a run: a kill, an error of the system or signals before its N-th system call or bytecode.

Each run is a fork of this process, so that kills, locks and exit codes are the real ones.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ditmoe_cli.cli import interruption
from ditmoe_cli.cli.app import run as run_program
from ditmoe_cli.files import renaming

WRITING = ("write", "pwrite", "pwritev", "fsync", "fdatasync", "mkdir", "ftruncate", "posix_fallocate", "sendfile")
CALLS = (*WRITING, "open", "rename", "replace", "unlink", "rmdir", "scandir", "close", "copy_file_range")
_SECONDS = 60

Act = Callable[[int, str], None]
"""What happens before a call: given its number, from 1, and its name."""


def kill_at(number: int) -> Act:
    """Kill the process before the call of that number."""

    def act(now: int, name: str) -> None:  # noqa: ARG001
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def signal_at(number: int, which: int, again: bool = False) -> Act:
    """Send a signal before the call of that number; with `again` before each one after it, too."""

    def act(now: int, name: str) -> None:  # noqa: ARG001
        if now == number or (again and now > number):
            os.kill(os.getpid(), which)

    return act


def error_at(number: int, code: int) -> Act:
    """Let the call of that number fail."""

    def act(now: int, name: str) -> None:  # noqa: ARG001
        if now == number:
            raise OSError(code, os.strerror(code))

    return act


def full_from(number: int) -> Act:
    """Let every call that writes fail from that number on, as on a disk that is full."""

    def act(now: int, name: str) -> None:
        if now >= number and name in WRITING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal that killed it, and what it said on stderr."""

    code: int
    said: str


@dataclass
class Counting:
    """Counts calls that change or read the disk, of all threads, and acts before each."""

    act: Act
    calls: list[str]

    def before(self, name: str) -> None:
        self.calls.append(name)
        self.act(len(self.calls), name)

    def install(self) -> None:
        """Wrap the functions of `os`, `open`, and the renames in one step; for the rest of this process."""
        for name in CALLS:
            if hasattr(os, name):
                setattr(os, name, self._wrapped(name, getattr(os, name)))
        renaming._renameat2 = self._wrapped("renameat2", renaming._renameat2)
        counting, real = self, io.open

        class Counted(io.FileIO):
            def write(self, data: Any, /) -> int:
                counting.before("write")
                return super().write(data) or 0

        def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
            if "b" not in mode or not set(mode) & set("wax+"):
                return real(file, mode, *args, **named)
            counting.before("open")
            raw = Counted(file, mode.replace("b", ""))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        io.open = builtins.open = opened  # type: ignore[assignment]

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.before(name)
            return real(*args, **named)

        return call


def count_calls(run: Callable[[], int], notes: Path) -> list[str]:
    """Return the names of the calls of a run that nothing happens to."""
    ended = forked(run, lambda *_: None, notes)
    assert ended.code == 0, ended.said
    names: list[str] = json.loads((notes / "calls").read_text())
    return names


def forked(run: Callable[[], int], act: Act, notes: Path) -> Ended:
    """Run in a fork of this process, with `act` before each of its calls; notes are kept in a folder of their own."""
    counting = Counting(act, [])

    def body() -> int:
        counting.install()
        return run()

    return _in_a_fork(body, notes, lambda: (notes / "calls").write_text(json.dumps(counting.calls)))


def traced(run: Callable[[], int], files: Iterable[str], at: int, which: int, notes: Path) -> tuple[Ended, int]:
    """Run in a fork, and send a signal at the bytecode `at` of those files and at each one after it; also count them.

    With `at` below 0 none is sent.
    """
    chosen, count = tuple(files), itertools.count()
    reached = [0]

    def follow(frame: FrameType, event: str, argument: object) -> Any:  # noqa: ARG001
        if not frame.f_code.co_filename.endswith(chosen):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            reached[0] = next(count)
            if 0 <= at <= reached[0]:
                signal.raise_signal(which)
        return follow

    def body() -> int:
        sys.settrace(follow)
        return run()

    ended = _in_a_fork(body, notes, lambda: (notes / "count").write_text(str(reached[0])))
    return ended, int((notes / "count").read_text()) if (notes / "count").exists() else 0


def _in_a_fork(body: Callable[[], int], notes: Path, at_end: Callable[[], object]) -> Ended:
    notes.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        _be_the_program(body, notes / "stderr", at_end)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), (notes / "stderr").read_text())


def _be_the_program(body: Callable[[], int], said: Path, at_end: Callable[[], object]) -> NoReturn:
    """Do what the program does around a run, with a stderr of its own; a run that hangs is ended by SIGALRM."""
    code = 99
    try:
        signal.alarm(_SECONDS)
        atexit.register(at_end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sys.stderr = said.open("w", buffering=1)
        sys.stdout = io.StringIO()
        with interruption.EndedBySignals():
            code = body()
            interruption.ignore_signals()
        sys.settrace(None)
        interruption.leave(code)
    except BaseException as error:
        sys.stderr.write(f"escaped: {type(error).__name__}: {error}\n")
    finally:
        os._exit(98 if code == 99 else code)


def program(*words: object) -> Callable[[], int]:
    """Return the run of a command."""
    return lambda: run_program([str(word) for word in words])


State = dict[str, tuple[bytes, int]]


def state_of(place: Path) -> State | None:
    """Return the bytes and the time of change of a file, or of the files in a folder; None where nothing stands."""
    if place.is_file():
        return {"": (place.read_bytes(), place.stat().st_mtime_ns)}
    if place.is_dir():
        return {child.name: (child.read_bytes(), child.stat().st_mtime_ns) for child in sorted(place.iterdir())}
    return None


def bytes_in(state: State | None) -> dict[str, bytes] | None:
    """Return what a state holds, without its times."""
    return None if state is None else {name: data for name, (data, _) in state.items()}


def hidden_in(folder: Path) -> list[str]:
    """Return the names of hidden files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
