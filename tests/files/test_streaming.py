"""Jobs in threads: results and errors in order, and none left at the end; hashes and writes against plain ones."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files import streaming
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.streaming import chunks, hash_tensors, in_threads, sha256_of, syncing, write_at


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(streaming, "usable_threads", lambda: request.param)
    return int(request.param)


@given(data=st.binary(max_size=40))
def test_chunks_are_all_bytes_in_order(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK", 7)
        parts = list(chunks(memoryview(data)))
    assert b"".join(parts) == data
    assert all(part.nbytes == 7 for part in parts[:-1])


@pytest.mark.usefixtures("_threads")
def test_results_come_in_the_order_of_the_jobs() -> None:
    assert in_threads([lambda n=n: n * n for n in range(20)]) == [n * n for n in range(20)]  # type: ignore[misc]
    assert in_threads([]) == []


@pytest.mark.usefixtures("_threads")
def test_the_first_error_is_raised_and_jobs_that_wait_are_dropped() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        if number in (3, 4):
            raise ValueError(f"job {number}")
        done.append(number)

    with pytest.raises(ValueError, match="job 3"):
        in_threads([lambda n=n: job(n) for n in range(1000)])  # type: ignore[misc]
    assert done[:3] == [0, 1, 2]
    assert len(done) < 999


def test_threads_compute_by_themselves_and_torch_has_its_number_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert in_threads([torch.get_num_threads] * 5) == [1] * 5
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_jobs_under_way_end_before_an_interruption_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "usable_threads", lambda: 2)
    begun, goes_on, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        goes_on.wait()
        ended.append(True)

    signals = [KeyboardInterrupt, KeyboardInterrupt]

    class Interrupted(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if signals:
                raise signals.pop()
            goes_on.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    def broken() -> None:
        begun.wait()
        raise ValueError("broken")

    monkeypatch.setattr(streaming, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_threads([broken, slow])
    assert ended == [True]


@pytest.mark.usefixtures("_threads")
def test_hashes_are_those_of_the_bytes() -> None:
    content = {f"t{n}": bytes([n]) * (3 * n) for n in range(9)}
    counted: list[int] = []
    infos = [TensorInfo(name, "U8", (len(data),)) for name, data in content.items()]
    found = hash_tensors(infos, lambda name: memoryview(content[name]), counted.append)
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    assert sum(counted) == sum(map(len, content.values()))
    assert sha256_of([memoryview(b"a"), memoryview(b"b")]) == hashlib.sha256(b"ab").hexdigest()


def partly(data: bytes | memoryview, most: int) -> bytes:
    return bytes(data[:most])


def test_writes_go_on_where_the_system_took_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: really(file, partly(data, 3), position))
    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    write_at(file, memoryview(b"0123456789"), 2)
    os.close(file)
    assert (tmp_path / "x").read_bytes() == b"\0\0" + b"0123456789"


def test_what_is_written_goes_to_disk_meanwhile_and_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(streaming, "_SYNCED_TOGETHER", 10)
    monkeypatch.setattr(streaming, "_to_disk", synced.append)
    with syncing([7, 8], 20) as wrote:
        for _ in range(5):
            wrote(4)
    assert synced == [7, 8]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming, "_to_disk", full)
    with pytest.raises(OSError, match="No space"), syncing([7], 20) as wrote:
        wrote(10)


def test_nothing_more_is_written_once_the_disk_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def broken(_: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(streaming, "_SYNCED_TOGETHER", 10)
    monkeypatch.setattr(streaming, "_to_disk", broken)
    with pytest.raises(OSError, match="Input/output"), syncing([7], 20) as wrote:
        wrote(10)
        failed.wait()
        for thread in (thread for thread in threading.enumerate() if thread.name == "ditmoe-sync"):
            thread.join()
        wrote(1)
        raise AssertionError("it was told of the failure")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_is_written_to_all_the_same(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(streaming, "_SYNCED_TOGETHER", 10)
    monkeypatch.setattr(streaming, "_to_disk", unknown)
    with syncing([7], 20) as wrote:
        wrote(10)
        wrote(10)


def test_the_syncing_ends_before_an_interruption_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is left that would flush a file that is closed, or another one that has its number by then."""
    signals = [KeyboardInterrupt, KeyboardInterrupt]

    class Interrupted(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if signals:
                raise signals.pop()
            super().join(timeout)

    before = threading.active_count()
    monkeypatch.setattr(streaming, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt), syncing([], 0):
        pass
    assert threading.active_count() == before and not signals


def test_an_error_within_ends_the_syncing() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), syncing([], 0):
        raise KeyError
    assert threading.active_count() == before


@pytest.mark.parametrize(("size", "forgotten"), [(501, [7]), (500, [])])
def test_files_that_memory_cannot_hold_give_it_back(
    size: int, forgotten: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(streaming, "_SYNCED_TOGETHER", 10)
    monkeypatch.setattr(streaming, "_to_disk", lambda _: None)
    monkeypatch.setattr(streaming, "free_memory", lambda: 1000.0)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: dropped.append(file))
    with syncing([7], size) as wrote:
        wrote(10)
    assert dropped == forgotten
