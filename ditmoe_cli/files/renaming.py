"""Renames in one step of the kernel: two paths exchanged, or a path taken only where nothing stands.

Linux has both as renameat2(2), most of its file systems too; where they are lacking the functions say so.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD: a relative path starts at the working directory
_NO_REPLACE, _EXCHANGE = 1, 2
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # EPERM: containers forbid unknown calls


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths take each other's place at one moment; return False where the system cannot.

    Raises `OSError` where it can, and fails.
    """
    return _renameat2(one, other, _EXCHANGE)


def rename_to_new(source: Path, target: Path) -> bool:
    """Rename `source` to `target`, where nothing stands; return False where the system cannot without a race.

    Raises `FileExistsError` where something stands there, and `OSError` where the renaming fails.
    """
    return _renameat2(source, target, _NO_REPLACE)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _LACKING:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
