"""Locks between processes; a lock ends with the process that has it, however that ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.files.cleanup import Undoing, undo_first

if TYPE_CHECKING:
    from filelock import FileLock

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # by the file system


@contextmanager
def locked(path: Path, notify: Callable[[str], None] | None = None, guarded: Path | None = None) -> Iterator[None]:
    """Keep other processes out of ``with`` blocks on the same lock file, which is deleted at the end.

    Where another process has the lock, `notify` takes a line and the lock is waited for; without `notify`
    `BlockingIOError` is raised instead. The lock stays while what it guards is there, and its file after the process,
    for `taken_over`. On file systems without locks nobody is kept out.
    """
    from filelock import FileLock, Timeout

    undo_first()  # filelock's own is to release all locks
    lock, is_settled = FileLock(path), False

    def unlock() -> bool:
        if lock.is_locked or is_settled or not path.exists():
            return _unlock(lock, path, guarded)
        with taken_over(path, guarded):  # an interrupt came while filelock was at it, and left the file
            return True

    with Undoing(unlock):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            is_settled = notify is None
            if notify is None:
                raise BlockingIOError(errno.EWOULDBLOCK, "another run has the lock", str(path)) from None
            notify(f"waiting for another run that has {path}")
            lock.acquire()
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        is_settled = True
        yield


@contextmanager
def taken_over(path: Path, guarded: Path | None) -> Iterator[bool]:
    """Yield whether the process that had a lock file has ended; the lock is held meanwhile.

    The file is deleted then, unless what it guards is still there. False where a process has the lock, or the file is
    not ours to lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with Undoing(lambda: _unlock(lock, path, guarded)):
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            yield False
        else:
            yield True


def _unlock(lock: FileLock, path: Path, guarded: Path | None) -> bool:
    """Release a lock if it is held, its file being deleted before, while nobody else can have it.

    Return False, and keep it, while what it guards is there: that may be deleted before the process ends.
    """
    if lock.is_locked:
        if guarded is not None and os.path.lexists(guarded):
            return False
        path.unlink(missing_ok=True)
        lock.release()
    return True
