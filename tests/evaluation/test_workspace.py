"""Workspaces: rows are read back, missing ones are listed, other runs wait, and empty workspaces are deleted."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError, DitmoeError
from ditmoe_cli.evaluation.workspace import Workspace

Spans = list[tuple[int, int]]


def silent(_: str) -> None:
    """Drop the message."""


def values(count: int, first: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return rows (count, 2, 3), each filled with its number."""
    return np.arange(6 * first, 6 * (first + count), dtype=np.float32).reshape(count, 2, 3)


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """Return a workspace of ten rows with one array."""
    created = Workspace(tmp_path / "work", 10)
    created.create("a", (2, 3), np.float32)
    return created


# rows


def test_rows_come_back(work: Workspace) -> None:
    for first, count in ((4, 3), (0, 4), (7, 3)):
        work.put("a", first, values(count, first))
    result = work.array("a")
    assert np.array_equal(result, values(10)) and result.dtype == np.float32
    assert np.array_equal(np.load(work.folder / "a.npy"), values(10)), "as anyone reads it"
    assert not result.flags.writeable
    assert work.done("a").all() and work.missing(["a"], 4) == []


def test_rows_of_an_array_that_is_gone_are_missing(work: Workspace) -> None:
    work.create("b", (2, 3), np.float32)
    for name in ("a", "b"):
        work.put(name, 0, values(10))
    (work.folder / "a.npy").unlink()
    for name in ("a", "b"):
        work.create(name, (2, 3), np.float32)
    assert work.missing(["a"], 10) == [range(10)] and work.missing(["b"], 10) == []


def test_values_take_the_dtype_and_the_order_of_the_array(work: Workspace) -> None:
    work.put("a", 2, np.asfortranarray(values(4, 2).astype(np.float64)))
    assert np.array_equal(work.array("a")[2:6], values(4, 2))
    assert not work.array("a")[:2].any() and not work.array("a")[6:].any()


def test_arrays_without_dimensions_of_their_own(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work", 3)
    work.create("labels", (), np.int64)
    work.put("labels", 1, np.asarray([7, 8]))
    assert work.array("labels").tolist() == [0, 7, 8]


@pytest.mark.parametrize(("first", "shape"), [(8, (3, 2, 3)), (-1, (2, 2, 3)), (0, (2, 3)), (0, (2, 3, 2))])
def test_rows_that_do_not_go_in_leave_the_array_as_it_was(work: Workspace, first: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not go into"):
        work.put("a", first, np.ones(shape, dtype=np.float32))
    assert not work.array("a").any() and not work.done("a").any()


def test_a_full_disk_is_an_error_and_no_signal(work: Workspace) -> None:
    """The file has its full size from the start, but no blocks; a map of it would end in SIGBUS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="arge"):
            work.put("a", 0, values(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not work.done("a").any()
    assert list(work.folder.glob("*.done")) == []


# what is missing


@given(
    spans=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 8)), max_size=8),
    others=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 8)), max_size=8),
    batch=st.integers(1, 12),
)
def test_what_is_missing_comes_in_runs_of_at_most_a_batch(spans: Spans, others: Spans, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(Path(folder), 30)
        whole: dict[str, set[int]] = {}
        for name, filled in (("a", spans), ("a.b", others)):  # a name that begins like another
            work.create(name, (), np.int64)
            for first, count in filled:
                work.put(name, first, np.zeros(min(count, 30 - first), dtype=np.int64))
            whole[name] = {i for first, count in filled for i in range(first, min(first + count, 30))}
        for names in (["a"], ["a.b"], ["a", "a.b"]):
            runs = work.missing(names, batch)
            rows = [i for run in runs for i in run]
            assert rows == [i for i in range(30) if not all(i in whole[name] for name in names)]
            assert all(1 <= len(run) <= batch and run.step == 1 for run in runs)
            for one, two in itertools.pairwise(runs):
                assert one.stop < two.start or len(one) == batch, "no run is cut short without need"


def test_a_later_run_finds_what_an_earlier_one_made(work: Workspace) -> None:
    work.put("a", 3, values(4, 3))
    later = Workspace(work.folder, 10)
    later.create("a", (2, 3), np.float32)
    assert later.missing(["a"], 2) == [range(2), range(2, 3), range(7, 9), range(9, 10)]
    later.create("b", (), np.int64)
    assert sum(map(len, later.missing(["a", "b"], 64))) == 10
    for run in later.missing(["a"], 2):
        later.put("a", run.start, values(len(run), run.start))
    assert np.array_equal(later.array("a"), values(10))


def test_files_of_others_are_no_marks(work: Workspace) -> None:
    for name in ("a.done", "a.0-3.done.tmp", "a.x-3.done", "b.0-3.done", "a.b.0-3.done"):
        (work.folder / name).touch()
    assert not work.done("a").any()


# left over in another form, or damaged


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"), [(10, (2, 3), np.uint8), (10, (3, 2), np.float32), (9, (2, 3), np.float32)]
)
def test_an_array_of_another_form_is_refused(
    work: Workspace, rows: int, shape: tuple[int, ...], dtype: type[np.generic]
) -> None:
    work.put("a", 0, values(1))
    with pytest.raises(BadInputError, match=f"another form; delete {work.folder}"):
        Workspace(work.folder, rows).create("a", shape, dtype)
    assert np.array_equal(work.array("a")[:1], values(1))


@pytest.mark.parametrize("size", [0, 3, 60, 130, 367])
def test_a_damaged_array_is_refused(work: Workspace, size: int) -> None:
    os.truncate(work.folder / "a.npy", size)
    for attempt in (lambda: work.create("a", (2, 3), np.float32), lambda: work.array("a")):
        with pytest.raises(BadInputError, match=f"delete {work.folder}") as caught:
            attempt()
        assert "a.npy" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"nonsense", b"PK\x03\x04nonsense", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'"])
def test_what_is_no_array_is_refused(work: Workspace, content: bytes) -> None:
    (work.folder / "a.npy").write_bytes(content)
    with pytest.raises(BadInputError, match=f"delete {work.folder}"):
        work.array("a")


def test_an_archive_in_the_place_of_an_array_is_refused(work: Workspace) -> None:
    with (work.folder / "a.npy").open("wb") as file:
        np.savez(file, a=values(10))
    with pytest.raises(BadInputError, match=f"delete {work.folder}"):
        work.array("a")


def test_a_creation_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work", 4)
    work.folder.mkdir()
    (work.folder / "a.new").write_bytes(b"half")
    work.create("a", (2,), np.float64)
    assert work.array("a").shape == (4, 2)
    assert [file.name for file in work.folder.iterdir()] == ["a.npy"]


# holding


def test_nothing_done_leaves_nothing(work: Workspace) -> None:
    with work.locked(silent):
        assert work.folder.is_dir()
    assert list(work.folder.parent.iterdir()) == []


@pytest.mark.parametrize("error", [BadInputError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("done", [0, 2])
def test_a_failure_keeps_what_was_done_and_nothing_else(work: Workspace, error: type[BaseException], done: int) -> None:
    with pytest.raises(error), work.locked(silent):
        if done:
            work.put("a", 0, values(done))
        raise error
    assert [file.name for file in work.folder.parent.iterdir()] == (["work"] if done else [])
    assert not done or work.done("a").sum() == done


def test_a_workspace_may_be_held_again_and_made_in_a_new_folder(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "new" / "deep" / "work", 2)
    for _ in range(2):
        with work.locked(silent):
            work.create("a", (), np.int64)
            work.put("a", 0, np.zeros(2))
            work.remove()
    assert list(work.folder.parent.iterdir()) == []


def test_what_another_run_has_is_not_deleted(work: Workspace) -> None:
    work.put("a", 0, values(10))
    with Workspace(work.folder, 10).locked(silent):
        work.discard()
        with pytest.raises(BlockingIOError), work.locked(None):
            raise AssertionError("inside twice")
        assert work.done("a").all()
    result = work.array("a")
    work.discard()
    assert list(work.folder.parent.iterdir()) == []
    assert np.array_equal(result, values(10)), "what is open stays readable"
    work.discard()
    assert list(work.folder.parent.iterdir()) == [], "and there may be nothing"


def test_one_at_a_time(work: Workspace) -> None:
    """Six threads, each with a lock of its own: no two are inside at once, and those that wait notify."""
    inside, most = [0], [0]
    messages: list[str] = []
    counting = threading.Lock()

    def hold() -> None:
        with Workspace(work.folder, 10).locked(messages.append):
            with counting:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with counting:
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1] and inside == [0]
    assert messages and all("waiting for another run" in line for line in messages)
    assert list(work.folder.parent.iterdir()) == []


_HOLD = """
import sys, time
from pathlib import Path
import numpy as np
from ditmoe_cli.evaluation.workspace import Workspace
work = Workspace(Path(sys.argv[1]), 10)
with work.locked(lambda text: None):
    work.create("a", (2, 3), np.float32)
    work.put("a", 0, np.ones((3, 2, 3), dtype=np.float32))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_another_process_is_waited_for_until_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work", 10)
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(work.folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    messages: list[str] = []
    entered: list[float] = []

    def wait() -> None:
        with work.locked(messages.append):
            entered.append(time.monotonic())

    thread = threading.Thread(target=wait)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        thread.start()
        time.sleep(0.2)
        assert entered == [] and len(messages) == 1 and "work.lock" in messages[0]
        left = time.monotonic()
        child.send_signal(number)
        thread.join(timeout=30)
        assert len(entered) == 1 and entered[0] >= left, "the lock goes with the process"
    finally:
        child.kill()
        child.communicate()
        thread.join(timeout=30)
    assert work.done("a").sum() == 3, "and its rows stay"
    assert [file.name for file in tmp_path.iterdir()] == ["work"]


def test_a_row_that_is_missing_is_named(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "w", 3)
    work.create("x", (2,), np.float64)
    work.put("x", 0, np.zeros((2, 2)))
    with pytest.raises(DitmoeError, match="rows 2 to 2 were not made"):
        work.require_whole(["x"])
    work.put("x", 2, np.zeros((1, 2)))
    work.require_whole(["x"])
