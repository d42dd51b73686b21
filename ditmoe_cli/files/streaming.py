"""Bytes that pass through a few threads at a time: read, checked, hashed and written while they are in the cache.

hashlib, reads, writes, numpy and torch release the interpreter's lock, so that Python's threads share the work. Each
takes a job, such as a weight, from a list. Errors come in the order of the list, so that the first of several broken
tensors is named however many threads there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.staging import UNFLUSHED
from ditmoe_cli.free_memory import free_memory
from ditmoe_cli.threads import one_thread_each, usable_threads

Result = TypeVar("Result")
Count = Callable[[int], None]
"""Count bytes as done. Called by one thread at a time."""

CHUNK = 2**20  # bytes worked on at a time: they stay in a core's cache from one step to the next
_SYNCED_TOGETHER = 2**26  # bytes
_to_disk: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has the other alone


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Yield bytes a few at a time."""
    data = data.cast("B")
    for start in range(0, data.nbytes, CHUNK):
        yield data[start : start + CHUNK]


def sha256_of(parts: Iterable[memoryview]) -> str:
    """Return the SHA-256 of bytes that come in parts."""
    hashed = sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def in_threads(jobs: Sequence[Callable[[], Result]], kept: ThreadPoolExecutor | None = None) -> list[Result]:
    """Do jobs in as many threads as torch would compute with, each computing by itself, and return their results.

    The threads are those of `kept`, which stay, or new ones, which end. Where a job fails, or a signal comes, jobs that
    wait are dropped, and those under way end before the error is raised: none is left to write to a closed file.
    """
    workers = min(usable_threads(), len(jobs))
    if workers < 2:
        return [job() for job in jobs]
    with one_thread_each():
        pool = ThreadPoolExecutor(workers, "ditmoe") if kept is None else kept
        futures: list[Future[Result]] = []
        try:
            futures += (pool.submit(job) for job in jobs)
            return [future.result() for future in futures]
        finally:
            _to_the_end(partial(pool.shutdown, cancel_futures=True) if kept is None else partial(_settle, futures))


def _settle(futures: Sequence[Future[Any]]) -> None:
    """Drop jobs that wait, and wait for those under way."""
    wait([future for future in futures if not future.cancel()])


def _to_the_end(ending: Callable[[], object]) -> None:
    """Wait for threads to end, whatever signals come meanwhile."""
    raised: BaseException | None = None
    while True:
        try:
            ending()
            break
        except BaseException as error:  # of a signal; it is raised when no thread writes any more
            raised = error
    if raised is not None:
        raise raised


def hash_tensors(infos: Iterable[TensorInfo], raw: Callable[[str], memoryview], count: Count) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes by name; ``raw(name)`` returns the bytes."""
    listed, counting = list(infos), one_at_a_time(count)

    def hashed(name: str) -> str:
        return sha256_of(counted(chunks(raw(name)), counting))

    found = in_threads([partial(hashed, info.name) for info in listed])
    return {info.name: text for info, text in zip(listed, found, strict=True)}


def one_at_a_time(count: Count) -> Count:
    """Return a function that several threads may call, which calls `count`."""
    lock = Lock()

    def counting(number: int) -> None:
        with lock:
            count(number)

    return counting


def counted(parts: Iterable[memoryview], count: Count) -> Iterator[memoryview]:
    """Yield parts of bytes, each counted when the next is asked for."""
    for part in parts:
        yield part
        count(part.nbytes)


def digested(parts: Iterable[memoryview], update: Callable[[memoryview], None]) -> Iterator[memoryview]:
    """Yield parts of bytes, each handed to the `update` of a digest before."""
    for part in parts:
        update(part)
        yield part


def write_at(file: int, data: memoryview, position: int) -> None:
    """Write bytes to an open file, given by its descriptor, from `position` on."""
    data = data.cast("B")
    while data.nbytes:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def write_parts(file: int, start: int, size: int, parts: Iterable[memoryview], wrote: Count, name: str) -> None:
    """Write the `size` bytes of what is called `name`, which come in parts, to an open file from `start` on.

    Raises `DitmoeError` where they are more or fewer; nothing is written behind their place.
    """
    done = 0
    for part in parts:
        if done + part.nbytes <= size:
            write_at(file, part, start + done)
            wrote(part.nbytes)
        done += part.nbytes
    if done != size:
        raise DitmoeError(f"internal error: {name} has {done} bytes, planned {size}")


def _flush(file: int) -> None:
    """Bring what was written to an open file to disk, where its file system has that."""
    try:
        _to_disk(file)
    except OSError as error:
        if error.errno not in UNFLUSHED:
            raise


@contextmanager
def syncing(files: Sequence[int], size: int) -> Iterator[Count]:
    """Yield a function that counts bytes as written to open files, and bring them to disk meanwhile.

    The system would let them wait, by default for seconds or for a tenth of the memory, while the disk is idle. Files
    whose `size` is more than half of the available memory give their memory back once they are on disk: before the
    next command could read them there, they would be gone anyway. Raises the `OSError` of a write that failed late, as
    the function does from then on.
    """
    forgets = size >= _SYNCED_TOGETHER and hasattr(os, "posix_fadvise") and size > free_memory() / 2
    waiting, counting = 0, Lock()
    wanted: SimpleQueue[bool] = SimpleQueue()
    failed: list[OSError] = []

    def wrote(number: int) -> None:
        nonlocal waiting
        if failed:
            raise failed[0]
        with counting:
            waiting += number
            if waiting >= _SYNCED_TOGETHER:
                waiting = 0
                wanted.put(True)

    def work() -> None:
        try:
            while wanted.get():
                for file in files:
                    _flush(file)
                    if forgets:
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:  # the system tells of it once
            failed.append(error)

    thread = Thread(target=work, name="ditmoe-sync", daemon=True)
    thread.start()
    try:
        yield wrote
    finally:
        wanted.put(False)
        _to_the_end(thread.join)
    if failed:
        raise failed[0]
