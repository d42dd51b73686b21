"""Locks between processes; a lock ends with the process that has it, however that ends."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # by the file system


@contextmanager
def locked(path: Path, notify: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes out of ``with`` blocks on the same lock file, which is deleted at the end.

    Where another process has the lock, `notify` takes a line and the lock is waited for; without `notify`
    `BlockingIOError` is raised instead. On file systems without locks nobody is kept out.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
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
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def is_abandoned(path: Path) -> bool:
    """Return whether a lock file was left behind by a process that has ended; the file is deleted then."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return False
    path.unlink(missing_ok=True)
    lock.release()
    return True
