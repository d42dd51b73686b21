"""Work folders: pieces are whole or absent, keys keep runs apart, and what cannot go on is cleaned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor

from ditmoe_cli.errors import BadInputError, DitmoeError, InfeasibleError, OutputExistsError
from ditmoe_cli.files.workfolder import (
    KeptLoop,
    WorkFolder,
    discard_work,
    followed_work,
    open_work,
    work_folder,
    work_key,
)

KEY = work_key({"plan": "a"})


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {"x": torch.full((3, 2), value), "flags": torch.tensor([True, False]), "none": torch.empty(0, 4)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class StoppedError(Exception):
    """What ends a run early."""


def run_until(target: Path, stop: int, key: str = KEY, total: int = 4) -> tuple[list[str], list[int]]:
    """Sum up 0..total-1 in a kept loop, and stop before step `stop`; return the notes and the steps that were done."""
    notes: list[str] = []
    done: list[int] = []
    try:
        with open_work(target, key, notes.append) as work:
            loop = work.loop("sum", total)
            so_far = loop.state.tensor("sum") if loop.state else torch.zeros(1)
            for step in range(loop.start, total):
                if step == stop:
                    raise StoppedError
                so_far = so_far + step
                done.append(step)
                loop.keep(step, {"value": so_far}, {"step": step}, {"sum": so_far})
            target.write_text(" ".join(str(int(loop.result(step).tensor("value"))) for step in range(total)))
    except StoppedError:
        pass
    return notes, done


def test_a_piece_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    with open_work(tmp_path / "x", KEY, print) as work:
        work.write("piece", tensors(), {"error": 0.5, "names": ["a"]})
        piece = work.read("piece")
        assert piece is not None
        assert piece.document == {"error": 0.5, "names": ["a"]}
        assert sorted(piece.names) == sorted(tensors())
        for name, tensor in tensors().items():
            assert piece.tensor(name).equal(tensor) and piece.tensor(name).dtype == tensor.dtype
        assert work.read("absent") is None


def test_a_piece_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    with open_work(tmp_path / "x", KEY, print) as work:
        for value in (1.0, 2.0):
            work.write("piece", tensors(value))
        piece = work.read("piece")
        assert piece is not None and piece.tensor("x")[0, 0] == 2.0
        assert names(work.folder) == ["key.json", "piece.safetensors"]


def cut(data: bytes) -> bytes:
    return data[:-5]


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_header(data: bytes) -> bytes:
    return data[:9] + bytes([data[9] ^ 1]) + data[10:]


def empty(data: bytes) -> bytes:
    return data[:0]


@pytest.mark.parametrize("damage", [cut, flip_last, flip_header, empty])
def test_a_damaged_piece_is_made_again(tmp_path: Path, damage: Any) -> None:
    with open_work(tmp_path / "x", KEY, print) as work:
        work.write("piece", tensors())
        file = work.folder / "piece.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        assert work.read("piece") is None


def test_a_piece_of_another_key_is_none(tmp_path: Path) -> None:
    with open_work(tmp_path / "x", KEY, print) as work:
        WorkFolder(work.folder, work_key({"plan": "b"}), print).write("piece", tensors())
        assert work.read("piece") is None


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_loop_goes_on_where_it_was_left(tmp_path: Path, stop: int) -> None:
    target = tmp_path / "x"
    notes, first = run_until(target, stop)
    assert first == list(range(stop)) and not target.exists()
    kept = f"kept {stop} of 4 blocks; the same command goes on with block {stop + 1}"
    assert notes == ([kept] if stop else [])
    assert work_folder(target).exists() == bool(stop), "nothing is left where nothing is kept"
    notes, second = run_until(target, -1)
    assert notes == ([f"going on with block {stop + 1} of 4 (kept in {work_folder(target)})"] if stop else [])
    assert second == list(range(stop, 4))
    assert target.read_text() == "0 1 3 6"
    assert names(tmp_path) == ["x"]


def test_only_the_newest_state_is_kept(tmp_path: Path) -> None:
    run_until(tmp_path / "x", 3)
    states = [name for name in names(work_folder(tmp_path / "x")) if "state" in name]
    assert states == ["sum.state.2.safetensors"]


def test_a_loop_whose_steps_are_all_done_goes_on_behind_it(tmp_path: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        with pytest.raises(StoppedError), open_work(tmp_path / "x", KEY, notes.append) as work:
            loop = work.loop("sum", 2)
            for step in range(loop.start, 2):
                loop.keep(step, tensors())
            raise StoppedError
    kept = "kept 2 of 2 blocks; the same command goes on with the writing"
    assert notes == [kept, f"going on with all 2 blocks done (kept in {work_folder(tmp_path / 'x')})", kept]


@pytest.mark.parametrize("lost", ["sum.0", "sum.1", "sum.2", "sum.state.2"])
def test_a_loop_goes_on_only_from_what_is_whole(tmp_path: Path, lost: str) -> None:
    """Without its newest state a loop begins anew: steps before it are not done twice with a state of their own."""
    target = tmp_path / "x"
    run_until(target, 3)
    file = work_folder(target) / f"{lost}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    _, done = run_until(target, -1)
    assert done == [0, 1, 2, 3]
    assert target.read_text() == "0 1 3 6"


def test_a_kill_between_a_result_and_its_state_takes_the_step_again(tmp_path: Path, monkeypatch: Any) -> None:
    target, write = tmp_path / "x", WorkFolder.write

    def torn(self: WorkFolder, name: str, tensors: Mapping[str, Tensor], document: Any = None) -> None:
        if name == "sum.state.2":
            raise StoppedError
        write(self, name, tensors, document)

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "write", torn)
        _, first = run_until(target, -1)
    _, second = run_until(target, -1)
    assert (first, second) == ([0, 1, 2], [2, 3])
    assert target.read_text() == "0 1 3 6"


@pytest.mark.parametrize(("error", "stays"), [(BadInputError, False), (InfeasibleError, False), (OSError, True)])
def test_what_an_error_of_the_input_ends_will_never_go_on(tmp_path: Path, error: type[Exception], stays: bool) -> None:
    with pytest.raises(error), open_work(tmp_path / "x", KEY, print) as work:
        work.write("piece", tensors())
        raise error("on purpose")
    assert work_folder(tmp_path / "x").exists() == stays


def test_another_key_starts_anew_and_says_what_it_deletes(tmp_path: Path) -> None:
    target = tmp_path / "x"
    run_until(target, 2)
    notes, done = run_until(target, -1, key=work_key({"plan": "b"}))
    assert notes == [f"deleting what an unfinished run of another request kept in {work_folder(target)}"]
    assert done == [0, 1, 2, 3]
    assert names(tmp_path) == ["x"]


def test_keys_hold_the_request_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work_key({"a": 1, "b": 2}) == work_key({"b": 2, "a": 1}) != work_key({"a": 1, "b": 3})
    monkeypatch.setattr("ditmoe_cli.files.workfolder.__version__", "another")
    assert work_key({"plan": "a"}) != KEY


def test_two_runs_on_one_target_end_in_one_error(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with open_work(target, KEY, print) as work:
        work.write("piece", tensors())
        with pytest.raises(OutputExistsError, match=r"x: another run is writing it"), open_work(target, KEY, print):
            pytest.fail("entered")
        with open_work(tmp_path / "y", KEY, print):
            assert work.read("piece") is not None
    assert names(tmp_path) == []


HOLDER = """
import os, signal, sys
from pathlib import Path
import torch
from ditmoe_cli.files.workfolder import open_work
with open_work(Path(sys.argv[1]), sys.argv[2], print) as work:
    work.write("piece", {"x": torch.zeros(3)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_lets_the_next_one_go_on(tmp_path: Path) -> None:
    target = tmp_path / "x"
    killed = subprocess.run([sys.executable, "-c", HOLDER, str(target), KEY], cwd=REPOSITORY, check=False)
    assert killed.returncode < 0
    with open_work(target, KEY, print) as work:
        assert work.read("piece") is not None
    assert names(tmp_path) == []


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "x")
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    with pytest.raises(BadInputError, match=r"\.x\.work: stands where"), open_work(tmp_path / "x", KEY, print):
        pytest.fail("entered")
    discard_work(tmp_path / "x")
    assert (folder / "thesis").read_text() == "years of work"
    work_folder(tmp_path / "y").write_text("a file")
    with pytest.raises(BadInputError, match=r"\.y\.work: stands where"), open_work(tmp_path / "y", KEY, print):
        pytest.fail("entered")


def test_a_run_that_was_killed_before_it_kept_anything_leaves_no_hindrance(tmp_path: Path) -> None:
    for left in ([], ["key.json.new"]):
        folder = work_folder(tmp_path / "x")
        folder.mkdir()
        for name in left:
            (folder / name).write_text("{")
        run_until(tmp_path / "x", -1)
        (tmp_path / "x").unlink()
    assert names(tmp_path) == []


def test_half_written_pieces_are_cleaned(tmp_path: Path) -> None:
    run_until(tmp_path / "x", 2)
    (work_folder(tmp_path / "x") / "sum.2.safetensors.new").write_text("half")
    with pytest.raises(StoppedError), open_work(tmp_path / "x", KEY, print) as work:
        assert not list(work.folder.glob("*.new"))
        raise StoppedError


def test_what_a_whole_target_needs_no_more_is_discarded(tmp_path: Path) -> None:
    run_until(tmp_path / "x", 2)
    discard_work(tmp_path / "x")
    discard_work(tmp_path / "x")
    assert names(tmp_path) == []


def test_work_for_another_target_is_kept(tmp_path: Path) -> None:
    run_until(tmp_path / "x", 2)
    run_until(tmp_path / "y", -1)
    assert names(tmp_path) == [".x.work", "y"]


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match=r"\.x\.work") as caught, open_work(tmp_path / "x", KEY, print) as work:
        monkeypatch.setattr(os, "fsync", full)
        work.write("piece", tensors())
    assert caught.value.errno == 28
    assert names(tmp_path) == []


def test_long_names_have_work_folders_too(tmp_path: Path) -> None:
    for ending in ("a", "b"):
        target = tmp_path / ("x" * 249 + ending)
        run_until(target, 2)
    assert len(names(tmp_path)) == 2, "each its own"
    assert run_until(target, -1)[1] == [2, 3]


def test_a_result_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with open_work(tmp_path / "x", KEY, print) as work:
        loop = KeptLoop(work, "sum", 2, "block")
        with pytest.raises(BadInputError, match="block 1 is gone"):
            loop.result(0)


def test_the_key_is_in_the_folder(tmp_path: Path) -> None:
    run_until(tmp_path / "x", 1)
    assert json.loads((work_folder(tmp_path / "x") / "key.json").read_text())["key"] == KEY


@pytest.mark.parametrize("key", [KEY, work_key({"plan": "b"})])
def test_a_run_that_was_killed_while_it_deleted_a_folder_leaves_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise StoppedError

    target = tmp_path / "x"
    run_until(target, 2)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(StoppedError), open_work(target, work_key({"plan": "c"}), print):
            pytest.fail("entered")
    assert run_until(target, -1, key=key)[1] == [0, 1, 2, 3]
    assert names(tmp_path) == ["x"]


def test_what_is_kept_is_told_of_whole_steps_only(tmp_path: Path) -> None:
    target = tmp_path / "x"
    assert "kept 3 of 4 blocks; the same command goes on with block 4" in run_until(target, 3)[0]
    damaged = work_folder(target) / "sum.1.safetensors"
    damaged.write_bytes(cut(damaged.read_bytes()))
    assert run_until(target, 1) == (["kept 1 of 4 blocks; the same command goes on with block 2"], [0])


# work folders of several processes


def test_a_piece_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made.append(1)
        return tensors(), {"n": 5}

    with open_work(tmp_path / "x", KEY, lambda _: None) as work:
        for _ in range(2):
            piece = work.made("piece", make)
            assert piece.document == {"n": 5} and torch.equal(piece.tensor("x"), tensors()["x"])
    assert made == [1]


def test_a_followed_folder_is_read_and_left_alone(tmp_path: Path) -> None:
    with open_work(tmp_path / "x", KEY, lambda _: None) as work:
        followed = followed_work(tmp_path / "x", KEY)
        with pytest.raises(DitmoeError, match="not to be seen from this one; name an output in a folder"):
            followed.made("piece", lambda: (tensors(), {}))
        work.write("piece", tensors(), {"n": 1})
        loop = work.loop("loop", 2)
        loop.keep(0, tensors(), {}, tensors(2.0))
        before = {path: path.read_bytes() for path in work.folder.iterdir()}
        followed.write("other", tensors())
        followed.write("piece", tensors(3.0))
        followed.drop("piece")
        followed.drop_loop("loop")
        followed.clear()
        own = followed.loop("loop", 2)
        own.keep(1, tensors(4.0))
        assert {path: path.read_bytes() for path in work.folder.iterdir()} == before
        assert followed.made("piece", lambda: ({}, {})).document == {"n": 1}
        assert own.start == 1 and own.state is not None and torch.equal(own.state.tensor("x"), tensors(2.0)["x"])
    assert followed_work(tmp_path / "x", "another key").read("piece") is None
