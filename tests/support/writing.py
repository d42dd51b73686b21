"""Writes of a small checkpoint that something happens to.

    python tests/support/writing.py x.safetensors --old

Plays one scene again and again, with another fault each time, checks what each leaves, and prints the number of
faults of each kind. A program of its own, since forks of a small process are quick.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import (
    Act,
    Ended,
    bytes_in,
    count_calls,
    error_at,
    forked,
    full_from,
    hidden_in,
    kill_at,
    signal_at,
    state_of,
    traced,
)

from ditmoe_cli.files import renaming
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import Output, one_by_one

TRACED = (
    "files/staging.py",
    "files/locks.py",
    "files/cleanup.py",
    "files/writer.py",
    "files/streaming.py",
    "files/renaming.py",
    "contextlib.py",
)
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

Run = Callable[[Callable[[], int]], Ended]


@dataclass(frozen=True)
class Scene:
    """What is written, over an old one or nothing, with the kernel's exchange or without."""

    name: str
    has_old: bool
    has_exchange: bool

    def set_up(self, folder: Path) -> Path:
        """Make the folder, with the old output in it, and return the target."""
        folder.mkdir()
        target = folder / self.name
        if self.has_old:
            save(target, b"old!", force=False)
        return target

    def write(self, target: Path) -> int:
        """Write the new output."""
        if not self.has_exchange:
            renaming._renameat2 = lambda *_: False
        save(target, b"new!", force=self.has_old)
        return 0


def save(target: Path, content: bytes, force: bool) -> None:
    """Write a checkpoint, as a folder in two shards."""
    infos = [TensorInfo(name, "F32", (2,)) for name in "abc"]
    jobs = one_by_one(infos, lambda _: memoryview(content * 2))
    Output(target, force, shard_bytes=16).write(infos, jobs, Provenance({}), ())


class Stage:
    """A scene that is played again and again, and what its outcomes are compared with."""

    def __init__(self, scene: Scene, root: Path) -> None:
        self.scene, self.root, self.count = scene, root, 0
        target = scene.set_up(root / "0")
        self.old = bytes_in(state_of(target))
        self.calls = count_calls(lambda: scene.write(target), root / "notes")
        self.new = bytes_in(state_of(target))
        assert hidden_in(root / "0") == [] and self.new is not None and self.new != self.old

    def play(self, run: Run) -> tuple[Ended, Path]:
        """Play the scene in a new folder; return how it ended, and the target."""
        shutil.rmtree(self.root / str(self.count))
        self.count += 1
        target = self.scene.set_up(self.root / str(self.count))
        return run(lambda: self.scene.write(target)), target

    def under(self, act: Act) -> tuple[Ended, Path]:
        """Play the scene with `act` before each call."""
        return self.play(lambda run: forked(run, act, self.root / "notes"))

    def is_new(self, target: Path, may_be_aside: bool = False) -> bool:
        """Check that the target is the old or the new one, and that the next run cleans; return which it is."""
        found = bytes_in(state_of(target))
        assert found in ((self.old, self.new, None) if may_be_aside else (self.old, self.new)), found
        with staged(target.with_name("next")) as staging:
            staging.write_text("")
        left = hidden_in(target.parent)
        assert not left or (may_be_aside and found is None), (left, found == self.new)
        with staged(target, force=True) as staging:  # the next run on the same target puts back what was moved aside
            assert bytes_in(state_of(target)) == (self.new if found == self.new else self.old)
            staging.write_text("")
        assert hidden_in(target.parent) == []
        return found == self.new


def kills(stage: Stage) -> int:
    """Kill the write before each call: the target is the old one at first, and the new one in the end."""
    outcomes = []
    for number in range(1, len(stage.calls) + 1):
        ended, target = stage.under(kill_at(number))
        assert ended.code in (-signal.SIGKILL, 0), ended  # threads may take a call more or less
        outcomes.append(stage.is_new(target, may_be_aside=not stage.scene.has_exchange))
    assert outcomes == sorted(outcomes) and set(outcomes) == {True, False}
    return len(outcomes)


def errors(stage: Stage) -> int:
    """Let each call fail: either the write is done, or it says that it failed."""
    for number, name in enumerate(stage.calls, start=1):
        ended, target = stage.under(error_at(number, (errno.ENOSPC, errno.EIO)[number % 2]))
        assert stage.is_new(target) or ended.code, f"{name}: an error that nobody was told of"
    return len(stage.calls)


def full_disks(stage: Stage) -> int:
    """Let the disk be full from each call on: the room is given back at once."""
    for number in range(1, len(stage.calls) + 1):
        ended, target = stage.under(full_from(number))
        assert hidden_in(target.parent) == [], hidden_in(target.parent)
        assert stage.is_new(target) or "No space left" in ended.said, ended
    return len(stage.calls)


def signals(stage: Stage) -> int:
    """Send signals before each call and all that follow: one line, the signal's exit code, and nothing hidden."""
    for number in range(1, len(stage.calls) + 1):
        which, code = list(SIGNALS.items())[number % len(SIGNALS)]
        ended, target = stage.under(signal_at(number, which, again=True))
        assert ended.code == code and ended.said.count("\n") == 1 and "error: " in ended.said, ended
        assert hidden_in(target.parent) == [], hidden_in(target.parent)
        stage.is_new(target)
    return len(stage.calls)


def signals_between(stage: Stage, most: int) -> int:
    """Send signals at bytecodes, and at all that follow: also between a call and the clause that undoes it."""
    _, count, _ = _signalled(stage, -1)
    points = range(0, count, max(1, count // most))
    for number in points:
        ended, _, target = _signalled(stage, number)
        assert hidden_in(target.parent) == [], (number, hidden_in(target.parent))
        if not stage.is_new(target) or ended.code:  # one that Python swallows in the last clean-up comes too late
            assert (ended.code, ended.said) == (130, "ditmoe: error: interrupted\n"), ended
    return len(points)


def _signalled(stage: Stage, at: int) -> tuple[Ended, int, Path]:
    counts: list[int] = []

    def run(write: Callable[[], int]) -> Ended:
        ended, count = traced(write, TRACED, at, signal.SIGINT, stage.root / "notes")
        counts.append(count)
        return ended

    ended, target = stage.play(run)
    return ended, counts[0], target


def main() -> None:
    """Play one scene with all kinds of faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the target; a file where it ends in .safetensors, else a folder")
    parser.add_argument("--old", action="store_true", help="write over an old one")
    parser.add_argument("--no-exchange", action="store_true", help="as on a system without it")
    parser.add_argument("--bytecodes", type=int, default=60, help="at which signals begin, of some thousand")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "2"  # so that signals and errors meet threads that write
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        stage = Stage(Scene(given.name, given.old, not given.no_exchange), root)
        counts = {play.__name__: play(stage) for play in (kills, errors, full_disks, signals)}
        counts["signals_between"] = signals_between(stage, given.bytecodes)
        sys.stdout.write(json.dumps(counts))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
