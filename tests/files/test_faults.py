"""Whatever happens before any system call or bytecode of a write: the target is absent, the old or the whole new one."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_pico
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
from ditmoe_cli.files.staging import staged

PICO = make_pico(hidden=16, depth=1, experts=2, heads=1)


@dataclass(frozen=True)
class Scene:
    """What is written over what: a file or a folder, over an older one or nothing, with or without exchange."""

    name: str
    has_old: bool
    has_exchange: bool = True

    @property
    def is_folder(self) -> bool:
        return not self.name.endswith(".safetensors")

    def __str__(self) -> str:
        old = "over an old one" if self.has_old else "new"
        return f"{'folder' if self.is_folder else 'file'}, {old}{'' if self.has_exchange else ', no exchange'}"

    def set_up(self, folder: Path) -> Path:
        """Make the folder, with the old output in it, and return the target."""
        folder.mkdir()
        target = folder / self.name
        if self.has_old:
            PICO.with_state(pos_embed=PICO.state["pos_embed"] + 1).save(target)
        return target

    def write(self, target: Path) -> int:
        if not self.has_exchange:
            renaming._renameat2 = lambda *_: False
        PICO.save(target, force=self.has_old, shard_bytes=20_000)
        return 0


SCENES = [
    Scene("x.safetensors", has_old=False),
    Scene("x.safetensors", has_old=True),
    Scene("x", has_old=False),
    Scene("x", has_old=True),
    Scene("x", has_old=True, has_exchange=False),
]


class Stage:
    """A scene that is played again and again, and what its outcomes are compared with."""

    def __init__(self, scene: Scene, root: Path) -> None:
        self.scene, self.root, self.count = scene, root, 0
        self.folder = root / "whole"
        target = scene.set_up(self.folder)
        self.old = bytes_in(state_of(target))
        self.calls = count_calls(lambda: scene.write(target), root / "notes")
        self.new = bytes_in(state_of(target))
        assert hidden_in(self.folder) == [] and self.new is not None and self.new != self.old

    def play(self, run: Callable[[Callable[[], int]], Ended]) -> tuple[Ended, Path]:
        """Play the scene in a new folder."""
        if self.count:
            shutil.rmtree(self.folder)
        self.count += 1
        self.folder = self.root / str(self.count)
        target = self.scene.set_up(self.folder)
        return run(lambda: self.scene.write(target)), target

    def check(self, target: Path, may_be_absent: bool = False) -> bool:
        """Check that the target is the old or the new one, and that the next run in the folder cleans; is it new?"""
        found = bytes_in(state_of(target))
        if not (may_be_absent and found is None):
            assert found in (self.old, self.new)
        with staged(target.with_name("next")) as staging:
            staging.write_text("")
        assert hidden_in(target.parent) == [] or may_be_absent
        with staged(target, force=True) as staging:  # the next run on the same target puts back what was moved aside
            assert found == self.new or bytes_in(state_of(target)) == self.old
            staging.write_text("")
        assert hidden_in(target.parent) == []
        return found == self.new


@pytest.fixture(params=SCENES, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    yield Stage(request.param, tmp_path)


def under(stage: Stage, act: Act) -> tuple[Ended, Path]:
    return stage.play(lambda run: forked(run, act, stage.root / "notes"))


def test_a_kill_before_any_call(stage: Stage) -> None:
    outcomes = []
    for number in range(1, len(stage.calls) + 1):
        ended, target = under(stage, kill_at(number))
        assert ended.code == -signal.SIGKILL
        outcomes.append(stage.check(target, may_be_absent=not stage.scene.has_exchange))
    assert outcomes == sorted(outcomes) and len(set(outcomes)) == 2, "old at first, new at last"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_any_call(stage: Stage, code: int) -> None:
    for number in range(1, len(stage.calls) + 1):
        ended, target = under(stage, error_at(number, code))
        is_new = stage.check(target)
        assert ended.code == 0 or "escaped" in ended.said
        assert is_new or ended.code, f"{stage.calls[number - 1]}: an error that nobody was told"


def test_a_disk_that_is_full_from_any_call_on(stage: Stage) -> None:
    for number in range(1, len(stage.calls) + 1):
        ended, target = under(stage, full_from(number))
        assert hidden_in(target.parent) == [], "room is given back at once"
        is_new = stage.check(target)
        assert is_new or "No space left" in ended.said


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_from_any_call_on(stage: Stage, which: int, code: int) -> None:
    for number in range(1, len(stage.calls) + 1):
        ended, target = under(stage, signal_at(number, which, again=True))
        assert ended.code == code and ended.said.count("\n") == 1 and "escaped" not in ended.said
        assert hidden_in(target.parent) == []
        stage.check(target)


FILES = (
    "files/staging.py",
    "files/locks.py",
    "files/cleanup.py",
    "files/writer.py",
    "files/renaming.py",
    "contextlib.py",
)


def test_signals_from_any_bytecode_on(stage: Stage) -> None:
    """Also between a call and the clause that undoes what it did."""
    (_, count), _ = under_signals(stage, -1)
    step = max(1, count // 40)
    for number in range(0, count, step):
        (ended, _), target = under_signals(stage, number)
        assert ended.code == 130 and ended.said == "ditmoe: error: interrupted\n"
        assert hidden_in(target.parent) == [], number
        stage.check(target)


def under_signals(stage: Stage, at: int) -> tuple[tuple[Ended, int], Path]:
    found: list[tuple[Ended, int]] = []

    def run(write: Callable[[], int]) -> Ended:
        found.append(traced(write, FILES, at, signal.SIGINT, stage.root / "notes"))
        return found[0][0]

    _, target = stage.play(run)
    return found[0], target


def test_the_points_are_many(tmp_path: Path) -> None:
    assert sum(len(Stage(scene, tmp_path_of(tmp_path, i)).calls) for i, scene in enumerate(SCENES)) * 7 > 300


def tmp_path_of(root: Path, number: int) -> Path:
    place = root / str(number)
    place.mkdir()
    return place


def test_an_old_folder_is_there_at_every_moment(tmp_path: Path) -> None:
    """Seen before and after each call of the run, in which nothing happens."""
    target = SCENES[3].set_up(tmp_path / "x")

    def look(number: int, name: str) -> None:  # noqa: ARG001
        assert target.is_dir() and (target / "config.json").is_file()

    ended = forked(lambda: SCENES[3].write(target), look, tmp_path / "notes")
    assert ended.code == 0, ended.said
