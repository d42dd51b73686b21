"""Locks between processes; a lock ends with the process that has it, however that ends."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ditmoe_cli.files.cleanup import Undoing

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # by the file system


@contextmanager
def locked(path: Path, notify: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes out of ``with`` blocks on the same lock file, which is deleted at the end.

    Where another process has the lock, `notify` takes a line and the lock is waited for; without `notify`
    `BlockingIOError` is raised instead. On file systems without locks nobody is kept out.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)

    def unlock() -> None:
        if lock.is_locked:
            path.unlink(missing_ok=True)
            lock.release()

    with Undoing(unlock):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if notify is None:
                raise BlockingIOError(errno.EWOULDBLOCK, "another run has the lock", str(path)) from None
            notify(f"waiting for another run that has {path}")
            lock.acquire()
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield


@contextmanager
def taken_over(path: Path) -> Iterator[bool]:
    """Yield whether the process that had a lock file has ended; the lock is held meanwhile, and the file deleted then.

    False where a process has the lock, or the file is not ours to lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)

    def unlock() -> None:
        if lock.is_locked:
            path.unlink(missing_ok=True)
            lock.release()

    with Undoing(unlock):
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            yield False
        else:
            yield True
